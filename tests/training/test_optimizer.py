"""Which leaf goes to which optimizer, and what the schedules are."""

import jax
import numpy as np
import optax
import pytest
from agreement import assert_agree
from optax.contrib import MuonDimensionNumbers, muon

from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.model import init_params
from sleepnet.training.optimizer import labels, optimizer, schedule

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
    """Momentum, its bias correction, orthogonalisation, decay and the rates of both optimizers."""
    rng = np.random.default_rng(2)
    config = TrainingConfig(
        steps=5, warmup_steps=2, muon_learning_rate=0.02, muon_weight_decay=0.1,
        adam_weight_decay=0.2, adam_learning_rate=3e-3, clip_norm=1.0,
    )  # fmt: skip

    def matrices(params):
        axes = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda label: axes if label == "muon" else None, labels(params))

    ours = optimizer(config)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config, 0.02), weight_decay=0.1,
            adam_learning_rate=schedule(config, 3e-3), adam_weight_decay=0.2, adam_b2=0.95,
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
    adamw = optax.nadamw(3e-3, b1=0.9, b2=0.98, weight_decay=0.1)
    updates, _ = first_update(ours, grads, params)
    for name in ("embedding", "head", "final_norm", "positions"):
        reference, _ = first_update(adamw, grads[name], params[name])
        np.testing.assert_allclose(updates[name], reference, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_clipped_by_its_global_norm(params):
    """Adam does not see the scale of a first gradient, so look at its first moment."""
    grads = jax.tree.map(lambda p: np.full(p.shape, 3.0, p.dtype), params)
    config = TrainingConfig(clip_norm=0.5)
    _, state = first_update(optimizer(config), grads, params)
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu"))
              if hasattr(s, "nu"))  # fmt: skip
    share = 3.0 * 0.5 / float(optax.global_norm(grads))
    np.testing.assert_allclose(mu["embedding"], np.full((7, 8), 0.1 * share), rtol=1e-5)


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
