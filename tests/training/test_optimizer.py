"""Which leaf goes to which optimizer, and what the schedules are."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from agreement import assert_agree
from optax.contrib import MuonDimensionNumbers, muon

from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.nn.model import init_params
from sleepnet.training.optimizer import at_step, is_decayed, labels, optimizer, schedule

MODEL = ModelConfig(
    vocab_size=7, pattern="G[AG]", d_model=8, num_heads=2, window=4, learned_positions=True
)
MATRICES = {
    "attention": {"query", "key", "value", "out", "mlp_in", "mlp_out"},
    "gated_delta": {"query", "key", "value", "gate", "beta", "timestep", "out", "mlp_in",
                    "mlp_out"},
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def first_update(transformation, grads, params):
    return jax.jit(transformation.update)(grads, transformation.init(params), params)


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def test_muon_takes_the_blocks_matrices_and_nothing_else(params):
    taken = {path for path, label in leaves(labels(params)).items() if label == "muon"}
    expected = {
        (part, name, leaf)
        for part, name in (("prelude", "0_gated_delta"), ("core", "0_attention"),
                           ("core", "1_gated_delta"))
        for leaf in MATRICES[name[2:]]
    }  # fmt: skip
    assert taken == expected


def test_steps_are_those_of_optax_muon(params):
    """Momentum, its bias correction, orthogonalisation, decay and the rates of both optimizers.

    Optax would let Adam's decay reach norms too; that is compared leaf by leaf below."""
    rng = np.random.default_rng(2)
    config = TrainingConfig(
        steps=5, warmup_steps=2, muon_learning_rate=0.02, muon_weight_decay=0.1,
        adam_learning_rate=3e-3, clip_norm=1.0,
    )  # fmt: skip

    def matrices(params):
        axes = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda label: axes if label == "muon" else None, labels(params))

    ours = optimizer(config)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config, 0.02), weight_decay=0.1,
            adam_learning_rate=schedule(config, 3e-3), adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        ),
    )  # fmt: skip
    mine, theirs = params, params
    my_state, their_state = ours.init(params), reference.init(params)
    for _ in range(config.steps):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
        updates, my_state = jax.jit(ours.update)(grads, my_state, mine)
        mine = optax.apply_updates(mine, updates)
        updates, their_state = jax.jit(reference.update)(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert_agree(mine, theirs)


def test_a_stacked_matrix_is_orthogonalised_repeat_by_repeat(params):
    """Muon's update of a stacked (R, in, out) leaf has near-unit singular values in each repeat."""
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
    config = TrainingConfig(muon_learning_rate=1.0, adam_learning_rate=1.0, clip_norm=1e9)
    updates, _ = first_update(optimizer(config), grads, params)
    for matrix in updates["core"]["1_gated_delta"]["query"]:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert 0.5 < singular.min() and singular.max() < 1.5


def test_other_leaves_move_as_under_adamw_with_nesterov_momentum(params):
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
    config = TrainingConfig(
        adam_learning_rate=3e-3, adam_weight_decay=0.1, adam_b2=0.98, clip_norm=1e9
    )
    ours = optimizer(config)
    updates, _ = first_update(ours, grads, params)
    for name, decay in {"embedding": 0.1, "head": 0.1, "positions": 0.1, "final_norm": 0.0}.items():
        adamw = optax.nadamw(3e-3, b1=0.9, b2=0.98, weight_decay=decay)
        reference, _ = first_update(adamw, grads[name], params[name])
        np.testing.assert_allclose(updates[name], reference, rtol=1e-5, atol=1e-9)


MATRIX_NAMES = {
    "query", "key", "value", "gate", "beta", "timestep", "out", "mlp_in", "mlp_gate", "mlp_out",
}  # fmt: skip
EMBEDDINGS = {"embedding", "positions", "head"}
NEVER_DECAYED = {
    "attention_norm", "delta_norm", "mlp_norm", "out_norm", "final_norm",
    "conv", "A_log", "dt_bias",
}  # fmt: skip
EVERY_BLOCK = dataclasses.replace(MODEL, pattern="GA[AGAG]GA", mlp="swiglu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["GA[AGAG]GA", "A", "G"])
def test_decay_reaches_matrices_and_embeddings_alone(pattern, tied):
    """Of every leaf of every kind of block, in prelude, core and coda."""
    model = dataclasses.replace(EVERY_BLOCK, pattern=pattern, tie_embeddings=tied)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path[-1].key
        assert name in MATRIX_NAMES | EMBEDDINGS | NEVER_DECAYED
        assert is_decayed(path, leaf) == (name not in NEVER_DECAYED), path


def test_without_gradients_decayed_leaves_shrink_and_others_stay_bit_equal(params):
    """Three steps, under Muon's decay and under Adam's; of the matrices one shape, to compile
    fast."""
    kept = {"query", "out"} | NEVER_DECAYED
    core = {
        name: {leaf: x for leaf, x in block.items() if leaf in kept}
        for name, block in params["core"].items()
    }
    params = params | {"core": core, "prelude": {}}
    config = TrainingConfig(
        steps=3, muon_learning_rate=0.02, adam_learning_rate=0.01,
        muon_weight_decay=0.1, adam_weight_decay=0.3,
    )  # fmt: skip
    zero, now = jax.tree.map(np.zeros_like, params), params
    ours = optimizer(config)
    state, update = ours.init(params), jax.jit(ours.update)
    for _ in range(3):
        updates, state = update(zero, state, now)
        now = optax.apply_updates(now, updates)
    before = leaves(params)
    for path, leaf in leaves(now).items():
        if path[-1] in NEVER_DECAYED:
            assert np.array_equal(leaf, before[path]), path
        else:
            rate = 0.01 * 0.3 if path[-1] in EMBEDDINGS else 0.02 * 0.1
            np.testing.assert_allclose(leaf, before[path] * (1 - rate) ** 3, rtol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm(params):
    """Adam does not see the scale of a first gradient, so look at its first moment."""
    grads = jax.tree.map(lambda p: np.full(p.shape, 3.0, p.dtype), params)
    config = TrainingConfig(clip_norm=0.5)
    _, state = first_update(optimizer(config), grads, params)
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu"))
              if hasattr(s, "nu"))  # fmt: skip
    share = 3.0 * 0.5 / float(optax.global_norm(grads))
    np.testing.assert_allclose(mu["embedding"], np.full((7, 8), 0.1 * share), rtol=1e-5)


def test_learning_rates_follow_the_step_and_momentum_the_updates(params):
    """A state whose last three steps were skipped goes on at the rate of its step."""
    grads = jax.tree.map(np.ones_like, {"final_norm": params["final_norm"]})
    config = TrainingConfig(steps=10, warmup_steps=0, decay_fraction=1.0, adam_learning_rate=1.0)
    ours = optimizer(config)
    update = jax.jit(lambda state, step: ours.update(grads, at_step(state, step), grads))
    _, state = update(ours.init(grads), np.int32(0))
    step, later = update(state, np.int32(1)), update(state, np.int32(4))
    np.testing.assert_allclose(
        later[0]["final_norm"] / step[0]["final_norm"], (10 - 4) / (10 - 1), rtol=1e-6
    )
    counts = [int(x) for path, x in jax.tree_util.tree_leaves_with_path(later[1])
              if path[-1] == jax.tree_util.GetAttrKey("count")]  # fmt: skip
    assert sorted(counts) == [2, 2, 5, 5]  # updates that were made, and the step, of each optimizer


def test_schedules_hit_their_corners():
    config = TrainingConfig(steps=100, warmup_steps=10, decay_fraction=0.2)
    rate = schedule(config, 2.0)
    at = {0: 0.0, 5: 1.0, 10: 2.0, 79: 2.0, 90: 1.0, 100: 0.0}
    for step, expected in at.items():
        assert float(rate(step)) == pytest.approx(expected)
    long_decay = schedule(TrainingConfig(steps=100, warmup_steps=50, decay_fraction=0.8), 2.0)
    assert [float(long_decay(s)) for s in (50, 75, 100)] == pytest.approx([2.0, 1.0, 0.0])
    cosine = schedule(TrainingConfig(steps=110, warmup_steps=10, schedule="cosine"), 2.0)
    assert [float(cosine(s)) for s in (10, 60, 110)] == pytest.approx([2.0, 1.0, 0.0])
