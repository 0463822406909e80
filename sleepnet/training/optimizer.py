"""Muon for the matrices of the blocks, AdamW for everything else.

As in the paper (Muon lr 2e-3, AdamW lr 5e-5). Left alone, optax's Muon would take every 2-D
array, the embedding and the head too, and send our stacked (R, in, out) matrices to Adam. Both
take Nesterov momentum, which optax's Muon hands to its AdamW.
"""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from sleepnet.config import PARTS, TrainingConfig

# Stacked (R, ...) arrays of the blocks that are no matrices between two spaces of features.
NOT_MATRICES = ("conv",)


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, then Muon and AdamW with their own rates under one schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        muon(
            schedule(config, config.muon_learning_rate),
            weight_decay=config.muon_weight_decay,
            adam_learning_rate=schedule(config, config.adam_learning_rate),
            adam_weight_decay=config.adam_weight_decay,
            adam_b2=config.adam_b2,
            muon_weight_dimension_numbers=muon_dimensions,
        ),
    )


def muon_dimensions(params):
    """Per leaf the axes that Muon orthogonalises; None for the leaves that AdamW takes."""

    def of_leaf(path, leaf):
        names = [key.key for key in path]
        if names[0] in PARTS and leaf.ndim == 3 and names[-1] not in NOT_MATRICES:
            return MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return None

    return jax.tree_util.tree_map_with_path(of_leaf, params)


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
