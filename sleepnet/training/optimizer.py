"""Muon for the matrices of the blocks, AdamW for everything else.

As in the paper (Muon lr 2e-3, AdamW lr 5e-5). Both take Nesterov momentum, and the result is that
of `optax.contrib.muon`, told which leaves are matrices: left alone it would take every 2-D array,
the embedding and the head too, and send our stacked (R, in, out) matrices to AdamW. It stands here
in its parts, because a matrix must be whole to be orthogonalised: over a mesh, every device takes
its share of them.

Weight decay reaches the matrices and embeddings alone (`is_decayed`). Learning rates follow the
step of the run (`at_step`), whatever became of the steps before it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sleepnet.config import TrainingConfig
from sleepnet.config.model import PARTS
from sleepnet.training import sharding

MOMENTUM, EPS = 0.95, 1e-8  # of optax's Muon
# Stacked (R, ...) arrays of the blocks that are no matrices between two spaces of features.
NOT_MATRICES = ("conv",)
# Of the leaves outside the blocks, those that weight decay reaches.
DECAYED = ("embedding", "positions", "head")


def optimizer(config: TrainingConfig, mesh=None) -> optax.GradientTransformation:
    """Clipping, then Muon and AdamW with their own rates under one schedule.

    Args:
      mesh: that parameters and gradients are split over; see `sleepnet.training.sharding`.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {
                "muon": optax.chain(
                    nesterov_momentum(MOMENTUM),
                    optax.stateless(lambda updates, _: _orthogonalised(updates, mesh)),
                    _weight_decay(config.muon_weight_decay),
                    optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate)),
                ),
                "adam": optax.chain(
                    optax.scale_by_adam(b2=config.adam_b2, nesterov=True),
                    _weight_decay(config.adam_weight_decay),
                    optax.scale_by_learning_rate(schedule(config, config.adam_learning_rate)),
                ),
            },
            labels,
        ),
    )


def labels(params) -> Any:
    """Per leaf "muon", where two axes of a stacked (R, in, out) array are a matrix, or "adam"."""

    def of_leaf(path, leaf):
        return "muon" if _is_matrix(path, leaf) else "adam"

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def is_decayed(path, leaf) -> bool:
    """Return whether weight decay reaches a leaf: matrices of the blocks, embeddings and the head.

    Norms, short convolutions, `A_log` and `dt_bias` have a meaning at their own scale, and none
    at 0: a decayed `dt_bias` makes the fast weights forget within a few tokens.
    """
    return _is_matrix(path, leaf) or path[0].key in DECAYED


def _is_matrix(path, leaf) -> bool:
    return path[0].key in PARTS and leaf.ndim == 3 and path[-1].key not in NOT_MATRICES


def _weight_decay(rate: float) -> optax.GradientTransformation:
    """Add `rate` times the parameter to the updates of decayed leaves."""

    def decay(path, update, param):
        return update + rate * param if rate and is_decayed(path, param) else update

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(decay, updates, params)
    )


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """Return the state whose learning rates are those of step `step` + 1.

    A skipped step leaves momentum and its bias correction as they were, for these count the
    updates that were made; the schedule goes on, so that a run ends at its last rate.

    Args:
      opt_state: of `optimizer`.
      step: int32, the steps of the run that are done, skipped ones too.
    """

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=step) if is_schedule(node) else node,
        opt_state, is_leaf=is_schedule,
    )  # fmt: skip


class Momentum(NamedTuple):
    """State of `nesterov_momentum`: steps so far, and the running mean of gradients."""

    count: Any  # int32
    mu: Any


def nesterov_momentum(decay: float) -> optax.GradientTransformation:
    """A bias-corrected mean of gradients that looks a step ahead, as in `optax.contrib.muon`."""

    def init(params):
        return Momentum(jnp.int32(0), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, decay, 1)
        ahead = optax.tree.bias_correction(mu, decay, optax.safe_increment(count))
        here = optax.tree.bias_correction(updates, decay, count)
        looked = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, here)
        return looked, Momentum(count, mu)

    return optax.GradientTransformation(init, update)


def _orthogonalised(updates, mesh):
    """Of matrices (R, in, out): near-orthogonal ones, scaled by sqrt(max(1, out / in))."""
    return sharding.over_matrices(mesh, _newton_schulz, updates)


def _newton_schulz(x_MIO):
    """M matrices at once; the momentum of `scale_by_muon` is that of one step, and left behind."""
    axes = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = scale_by_muon(beta=0.0, nesterov=False, eps=EPS, weight_dimension_numbers=axes)
    orthogonal, _ = muon.update(x_MIO, muon.init(x_MIO))
    _, fan_in, fan_out = x_MIO.shape
    return orthogonal * max(1.0, fan_out / fan_in) ** 0.5


def schedule(config: TrainingConfig, peak: float) -> optax.Schedule:
    """Linear warm-up; then constant with a linear decay at the end, or a cosine to 0."""
    warm, steps = config.warmup_steps, config.steps
    pieces, boundaries = [optax.linear_schedule(0.0, peak, warm)], [warm]
    if config.schedule == "cosine":
        pieces.append(optax.cosine_decay_schedule(peak, steps - warm))
    else:
        decay = min(round(config.decay_fraction * steps), steps - warm)
        pieces.append(optax.constant_schedule(peak))
        if decay:
            pieces.append(optax.linear_schedule(peak, 0.0, decay))
            boundaries.append(steps - decay)
    return optax.join_schedules(pieces, boundaries)
