"""The configuration: what cannot be is refused in words, and what is kept comes back."""

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleepnet.config import ConfigError, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.config.model import REMAT_LEVELS, shortest_period, split_pattern
from sleepnet.config.training import MAX_B2
from sleepnet.experiment import ExperimentConfig, from_dict
from sleepnet.tasks import DepoConfig, FactsConfig, Rule110Config, TextConfig
from sleepnet.training.optimizer import optimizer


def model(**changes):
    return ModelConfig(**{"vocab_size": 8, "d_model": 16, **changes})


# field: (bad value, what the message must hold: the field, the value, what is allowed, nearest)
BAD_MODELS = {
    "vocab_size": (0, r"vocab_size must be above 0; got 0"),
    "window": (-3, r"window must be above 0; got -3"),
    "passes": (0, r"passes must be above 0; got 0"),
    "gradient_passes": (0, r"gradient_passes must be above 0; got 0"),
    "norm_eps": (0.0, r"norm_eps must be above 0; got 0\.0"),
    "rope_base": (float("nan"), r"rope_base must be finite; got nan"),
    "num_kv_heads": (3, r"num_kv_heads must divide num_heads=4; got 3; the nearest is (2|4)"),
    "num_heads": (5, r"num_heads must divide d_model=16; got 5; the nearest is 4"),
    "num_value_heads": (6, r"num_key_heads must divide num_value_heads=6; got 4"),
    "head_dim": (5, r"head_dim must be even.*got 5"),
    "key_dim": (0, r"key_dim must be above 0; got 0"),
    "chunk": (12, r"chunk must be a power of two, such as 8; got 12"),
    "eviction": ("slide", r"eviction: got 'slide'; allowed: hard, sliding; .*'sliding'"),
    "rule": ("gated-delta", r"rule: got 'gated-delta'; allowed: gated_delta, .*'gated_delta'"),
    "mlp": ("swigul", r"mlp: got 'swigul'; allowed: gelu, swiglu; .*'swiglu'"),
    "conv_init": ("id", r"conv_init: got 'id'; allowed: identity, uniform; .*'identity'"),
    "param_dtype": ("float16", r"param_dtype: got 'float16'; allowed: float32, .*'b?float"),
    "compute_dtype": ("bf16", r"compute_dtype: got 'bf16'; .*'bfloat16'"),
    "matmul_precision": ("higest", r"matmul_precision: got 'higest'; .*'highest'"),
    "beta_max": (1.9, r"beta_max: got 1\.9; allowed: 1\.0, 2\.0; the nearest is"),
    "init_decay_rate": ((0.0, 1.0), r"init_decay_rate must be \(low, high\).*got \(0\.0, 1\.0\)"),
    "d_model": (16.0, r"d_model must be an integer; got 16\.0"),
    "pattern": (5, r"pattern must be of type str; got 5"),
    "remat": (None, r"remat must be of type str; got None"),
    "unroll": (1, r"unroll must be of type bool; got 1"),
    "init_scale": (float("inf"), r"init_scale must be finite; got inf"),
    "mlp_ratio": (0.01, r"a width of 1 or more with d_model=16; got 0\.01; the nearest is 0\.0625"),
    "init_timestep": ((0.03, 0.02), r"init_timestep must be \(low, high\).*got \(0\.03, 0\.02\)"),
}


@pytest.mark.parametrize("field", BAD_MODELS)
def test_a_bad_model_is_named_with_what_is_allowed(field):
    """Field, value, what may stand there, and where there is one the nearest choice."""
    value, message = BAD_MODELS[field]
    with pytest.raises(ConfigError, match=message):
        model(**{field: value})


def test_no_remat_stands_alone():
    with pytest.raises(ConfigError, match=r"remat: got 'none'; allowed: window, pass, block;"):
        model(remat="none+window")


@pytest.mark.parametrize("remat", ["windows", "pass+windows"])
def test_a_bad_level_of_remat_is_named_with_what_is_allowed(remat):
    """Of several, the one that cannot be."""
    with pytest.raises(ConfigError, match=r"remat: got .*windows.*; allowed: .*'window'"):
        model(remat=remat)


BAD_SECTIONS = [
    (DepoConfig, {"name": "dpo"}, r"name: got 'dpo'; allowed: depo"),
    (DepoConfig, {"hops": 8}, r"hops must lie in 1\.\.7; got 8; the nearest is 7"),
    (DepoConfig, {"min_nodes": 2}, r"min_nodes must lie in 3\.\.8; got 2; the nearest is 3"),
    (DepoConfig, {"queries": 9}, r"queries must lie in 1\.\.8; got 9; the nearest is 8"),
    (DepoConfig, {"test_hops": (2, 1)}, r"test_hops must rise within 1\.\.4; got \(2, 1\)"),
    (DepoConfig, {"test_hops": (1, 5)}, r"test_hops must rise within 1\.\.4; got \(1, 5\)"),
    (DepoConfig, {"test_hops": ()}, r"test_hops must rise within 1\.\.4; got \(\)"),
    (DepoConfig, {"test_hops": (1.5, 2)}, r"each of test_hops must be an integer; got 1\.5"),
    (DepoConfig, {"max_word": 40, "window": 200}, r"at most 2\*\*63 - 1 can be numbered"),
    (DepoConfig, {"symbols": 7}, r"symbols=7 .*only 7 nodes, and nodes is 8; set symbols to 8"),
    (DepoConfig, {"max_word": 4}, r"a question takes up to 9 tokens .*window=8"),
    (DepoConfig, {"min_word": 2}, r"min_word must lie in 1\.\.1; got 2; the nearest is 1"),
    (DepoConfig, {"test_fraction": 1.0}, r"test_fraction .*between 0 and 1; got 1\.0"),
    (
        DepoConfig,
        {"seed": -1},
        r"seed must lie in 0\.\.9223372036854775807; got -1; the nearest is 0",
    ),
    (Rule110Config, {"cells": 25}, r"cells must lie in 3\.\.24; got 25; the nearest is 24"),
    (Rule110Config, {"cells_asked": 30}, r"cells_asked must lie in 1\.\.24; got 30"),
    (Rule110Config, {"questions": 5}, r"questions must lie in 1\.\.4; got 5; the nearest is 4"),
    (Rule110Config, {"steps": (8, 4)}, r"steps must rise .*got \(8, 4\)"),
    (Rule110Config, {"steps": ()}, r"steps must rise .*got \(\)"),
    (TrainingConfig, {"muon_weight_decay": float("nan")}, r"muon_weight_decay must be finite"),
    (TrainingConfig, {"schedule": "cos"}, r"schedule: got 'cos'; .*'cosine'"),
    (TrainingConfig, {"clip_norm": 0.0}, r"clip_norm must be above 0; got 0\.0"),
    (TrainingConfig, {"adam_b2": 1.0}, r"in 0\.0\.\.0\.999999; got 1\.0; the nearest is 0\.999999"),
    (TrainingConfig, {"adam_b2": 1 - 1e-9}, r"adam_b2 must lie in .*the nearest is 0\.999999"),
    (TrainingConfig, {"adam_b2": -0.1}, r"adam_b2 must lie in .*got -0\.1; the nearest is 0\.0"),
    (
        TrainingConfig,
        {"adam_weight_decay": -0.1},
        r"must be 0 or more; got -0\.1; the near",
    ),
    (TrainingConfig, {"adam_learning_rate": 0.0}, r"adam_learning_rate must be above 0; got 0\.0"),
    (TrainingConfig, {"muon_learning_rate": -1}, r"muon_learning_rate must be above 0; got -1$"),
    (TrainingConfig, {"steps": 0}, r"steps must be above 0; got 0; the nearest is 1"),
    (
        TrainingConfig,
        {"decay_fraction": 1.1},
        r"must lie in .*got 1\.1; the nearest is 1",
    ),
    (TrainingConfig, {"stall_seconds": -1.0}, r"stall_seconds must be 0 or more; got -1\.0"),
    (TrainingConfig, {"on_bad_step": "skp"}, r"on_bad_step: got 'skp'; .*nearest is 'skip'"),
    (TrainingConfig, {"spike_factor": 0.5}, r"spike_factor must be above 1, or 0 for never"),
    (TrainingConfig, {"best_kept": 2}, r"best_kept=2 needs evaluate_every above 0"),
    (TrainingConfig, {"evaluate_every": 50}, r"multiple of log_every=20; got 50; .* is 40"),
    (TrainingConfig, {"warmup_steps": 1000}, r"warmup_steps must be below steps=1000; got 1000"),
    (EvaluationConfig, {"passes": ()}, r"passes must be integers of 1 or more; got \(\)"),
    (EvaluationConfig, {"passes": (0, 1)}, r"passes must be .*got \(0, 1\)"),
    (EvaluationConfig, {"passes": (1.5, 2)}, r"each of passes must be an integer; got 1\.5"),
    (EvaluationConfig, {"streaming_examples": -1}, r"streaming_examples must be 0 or more; got -1"),
]


@pytest.mark.parametrize(("section", "changes", "message"), BAD_SECTIONS)
def test_a_bad_task_or_run_is_named_with_what_is_allowed(section, changes, message):
    """The same for tasks, training and evaluation."""
    with pytest.raises(ConfigError, match=message):
        section(**changes)


CLASSES = [
    ModelConfig, DepoConfig, Rule110Config, FactsConfig, TextConfig, TrainingConfig,
    EvaluationConfig, MeshConfig,
]  # fmt: skip
FLOATS = [
    (cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)
    if float in (field.type, *typing.get_args(field.type))
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, 1e-60, 10**99])
@pytest.mark.parametrize(("cls", "field"), FLOATS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_no_field_takes_a_number_that_float32_does_not_hold(cls, field, value):
    """Neither what is not finite nor what becomes infinity or 0 on the device."""
    needed = {"vocab_size": 8} if cls is ModelConfig else {}
    pair = next(f.type for f in dataclasses.fields(cls) if f.name == field) is not float
    with pytest.raises(ConfigError, match=f"{field} must be (finite|0, or between)"):
        cls(**needed, **{field: (value, value) if pair else value})


@pytest.mark.parametrize("b2", [0.0, MAX_B2])
def test_the_ends_of_the_range_of_b2_train(b2):
    """Updates are finite from the first step on."""
    with jax.numpy_dtype_promotion("standard"):
        adam = optimizer(TrainingConfig(adam_b2=b2, adam_learning_rate=0.1))
        params = {"head": jnp.ones(3)}
        state = adam.init(params)
        for gradient in ([1.0, 1e-3, -2.0], [0.0, 1.0, 1.0], [-1.0, 1e-6, 0.0]):
            updates, state = adam.update({"head": jnp.array(gradient)}, state, params)
            assert np.isfinite(updates["head"]).all()


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("", "AGAG"),
        ("AXG", "AG"),
        ("agag", "AGAG"),
        ("A[G", "AG"),
        ("AG]", "AG"),
        ("]A[", "A"),
        ("A[]G", "AG"),
        ("[A][G]", "AG"),
        ("A[[G]]", "AG"),
        ("A G", "AG"),
    ],
)
def test_a_malformed_pattern_is_named_with_the_nearest(pattern, nearest):
    """Other letters, unbalanced brackets, two cores or an empty one."""
    with pytest.raises(ConfigError) as error:
        model(pattern=pattern)
    assert f"got {pattern!r}" in str(error.value)
    assert f"nearest is {nearest!r}" in str(error.value)
    model(pattern=nearest)


@pytest.mark.parametrize(
    ("pattern", "prelude", "core", "coda"),
    [
        ("AGAG", "", "AGAG", ""),
        ("[AG]", "", "AG", ""),
        ("GG[AGAG]G", "GG", "AGAG", "G"),
        ("A[G]", "A", "G", ""),
        ("[G]AA", "", "G", "AA"),
    ],
)
def test_brackets_mark_the_core(pattern, prelude, core, coda):
    """What stands before them is the prelude, behind them the coda; without them all is core."""
    assert split_pattern(pattern) == {"prelude": prelude, "core": core, "coda": coda}
    assert model(pattern=pattern).num_blocks == len(prelude + core + coda)


@pytest.mark.parametrize(
    ("letters", "period", "repeats"),
    [("AGAG", "AG", 2), ("AAA", "A", 3), ("AGA", "AGA", 1), ("AGGAGG", "AGG", 2), ("", "", 0)],
)
def test_shortest_periods(letters, period, repeats):
    """By hand."""
    assert shortest_period(letters) == (period, repeats)


@given(st.text("AG", min_size=1, max_size=12))
def test_a_period_repeats_to_its_letters_and_has_none_of_its_own(letters):
    """Whatever the letters are."""
    period, repeats = shortest_period(letters)
    assert period * repeats == letters
    assert shortest_period(period) == (period, 1)


def test_sizes_that_are_left_out_follow_the_others():
    """Heads and widths default to those of attention, values to keys."""
    config = model(num_heads=4, num_key_heads=2, num_value_heads=4, key_dim=6)
    assert (config.head_dim, config.num_kv_heads, config.value_dim) == (4, 4, 6)
    config = model(num_heads=2, num_key_heads=4)
    assert (config.key_dim, config.num_value_heads) == (8, 4)


@pytest.mark.parametrize(
    ("remat", "levels"),
    [("none", set()), ("pass", {"pass"}), ("window+block", {"window", "block"})],
)
def test_remat_names_levels(remat, levels):
    """One, or several joined by a plus."""
    assert model(remat=remat).remat_levels == levels <= set(REMAT_LEVELS)


EXPERIMENTS = [
    ExperimentConfig(model=model(window=8), task=DepoConfig()),
    ExperimentConfig(
        model=model(
            pattern="G[AG]A", num_kv_heads=2, init_decay_rate=(0.5, 4.0), chunk=8, chunk_group=2
        ),
        task=Rule110Config(steps=(4, 8, 32), curriculum=100),
        training=TrainingConfig(steps=7, schedule="cosine"),
        evaluation=EvaluationConfig(passes=(1, 8)),
    ),
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_written_config_reads_back_as_it_was(experiment):
    """As dictionaries and through JSON, which knows no tuples."""
    assert from_dict(experiment.to_dict()) == experiment
    assert from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


BAD_DICTS = [
    ({"model": 3}, r"sections must be dictionaries; got 3"),
    ({"model.windw": 8}, r"model\.windw: no such field; allowed: .*nearest is 'window'"),
    ({"modle": {}}, r"modle: no such field; allowed: model, .*nearest is 'model'"),
    ({"task.node": 8}, r"task\.node: no such field; .*'nodes'"),
    ({"training.stps": 8}, r"training\.stps: no such field; .*'steps'"),
    ({"evaluation.pass": (1,)}, r"evaluation\.pass: no such field; .*'passes'"),
    ({"task.name": "rule100"}, r"got 'rule100'; allowed: depo, rule110, facts, text; .*'rule110'"),
    ({"model": None}, r"no section 'model'"),
    ({"task": None}, r"no section 'task'"),
    ({"model.passes": 0}, r"model\.passes must be above 0; got 0"),
    ({"model.passes": "4"}, r"model\.passes must be an integer; got '4'"),
    ({"model.passes": True}, r"model\.passes must be an integer; got True"),
    ({"model.passes": 2.0}, r"model\.passes must be an integer; got 2\.0"),
    ({"model.unroll": 1}, r"model\.unroll must be of type bool; got 1"),
    ({"model.key_dim": "8"}, r"model\.key_dim must be an integer; got '8'"),
    ({"model.rope_base": "1e4"}, r"model\.rope_base must be of type float; got '1e4'"),
    ({"model.pattern": 3}, r"model\.pattern must be of type str; got 3"),
    ({"model.vocab_size": None}, r"model\.vocab_size must be an integer; got None"),
    ({"task.test_hops": 3}, r"task\.test_hops must be of type tuple; got 3"),
    ({"model.window": 9}, r"model\.window is 9 and task\.window is 8"),
]


def changed(changes):
    """The first experiment as a dictionary, with fields of the given paths changed."""
    values = EXPERIMENTS[0].to_dict()
    for path, value in changes.items():
        section, _, field = path.partition(".")
        if field:
            values[section] = values[section] | {field: value}
        elif value is None:
            del values[section]
        else:
            values[section] = value
    return values


@pytest.mark.parametrize(("changes", "message"), BAD_DICTS)
def test_a_bad_dictionary_is_named_by_its_full_path(changes, message):
    """Unknown fields, missing sections, wrong types and impossible values."""
    with pytest.raises(ConfigError, match=message):
        from_dict(changed(changes))


def test_whole_numbers_may_stand_for_floats():
    """JSON and command lines write 1 for 1.0."""
    assert from_dict(changed({"model.rope_base": 100})).model.rope_base == 100.0


def test_configs_are_frozen_and_can_be_static_arguments():
    """Equal configs are one key of a jit cache."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        model().passes = 3
    assert hash(model(passes=2)) == hash(model(passes=2)) and model(passes=2) == model(passes=2)
    assert model(passes=2) != model(passes=3)
