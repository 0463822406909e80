"""One training step: gradients through all windows and passes, then the optimizer."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.model import init_params
from sleepnet.rollout import Rollout, rollout
from sleepnet.training.optimizer import optimizer


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. step: int32, steps that are done."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState


def init_train_state(model: ModelConfig, training: TrainingConfig) -> TrainState:
    """The state before the first step; random parameters from `training.seed`."""
    params = init_params(model, jax.random.key(training.seed))
    # Strongly typed from the start: a weak type would compile the step twice.
    opt_state = jax.tree.map(_strong, optimizer(training).init(params))
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)


def masked_mean(x, mask):
    """The mean of x where mask; 0 where the mask is empty."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def score(params, batch, *, model: ModelConfig, window_passes, scored_per_window) -> Rollout:
    """`rollout` over a batch of a task (`sleepnet.tasks.Example`, leading axis B)."""
    return rollout(
        params, batch.tokens_WL, batch.length_W, batch.targets_WL, batch.mask_WL,
        config=model, window_passes=window_passes, scored_per_window=scored_per_window,
    )  # fmt: skip


def make_train_step(model: ModelConfig, training: TrainingConfig, window_passes, scored_per_window):
    """(state, batch) -> (state, metrics), compiled, with the state donated.

    Metrics, float32 scalars: loss (masked mean cross-entropy in nats over all scored
    positions of the batch), accuracy, grad_norm (before clipping).
    """
    update = optimizer(training).update

    def loss_of(params, batch):
        seen = score(
            params, batch, model=model,
            window_passes=window_passes, scored_per_window=scored_per_window,
        )  # fmt: skip
        right = seen.prediction_BWL == batch.targets_WL
        return masked_mean(seen.nll_BWL, batch.mask_WL), masked_mean(right, batch.mask_WL)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        updates, opt_state = update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _strong(x):
    return jax.lax.convert_element_type(x, x.dtype) if hasattr(x, "dtype") else x
