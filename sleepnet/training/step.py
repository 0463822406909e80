"""One training step: gradients through all windows and passes, then the optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.config.model import check_trainable
from sleepnet.cycle.rollout import Rollout, rollout
from sleepnet.experiment import ExperimentConfig
from sleepnet.nn.model import init_params
from sleepnet.training import guard, sharding
from sleepnet.training.optimizer import at_step, optimizer


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. step: int32, steps that are done."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    recent: guard.Recent


def init_train_state(model: ModelConfig, training: TrainingConfig) -> TrainState:
    """The state before the first step; random parameters from `training.seed`.

    Raises:
      ConfigError: parameters that cannot be trained; see `check_trainable`.
    """
    check_trainable(model)
    params = init_params(model, jax.random.key(training.seed))
    # Strongly typed from the start: a weak type would compile the step twice.
    opt_state = jax.tree.map(_strong, optimizer(training).init(params))
    return TrainState(jnp.int32(0), params, opt_state, guard.no_steps(training))


def score(params, batch, *, model: ModelConfig, window_passes, scored_per_window) -> Rollout:
    """`rollout` over a batch of a task (`sleepnet.tasks.Example`, leading axis B)."""
    return rollout(
        params, batch.tokens_WL, batch.length_W, batch.targets_WL, batch.mask_WL,
        config=model, window_passes=window_passes, scored_per_window=scored_per_window,
        reset_BW=batch.reset_W,
    )  # fmt: skip


def make_train_step(
    model: ModelConfig,
    training: TrainingConfig,
    window_passes,
    scored_per_window,
    *,
    mesh=None,
    gather: str = "block",
):
    """(state, batch) -> (state, metrics), compiled, with the state donated.

    The batch goes through in `training.parts` parts whose gradients are summed; the sums are
    those of the whole batch.

    Args:
      mesh: of `sharding.make_mesh`; state and batch are then split over its devices by the rules
        of `sleepnet.training.sharding`. One device by default.
      gather: when split parameters are made whole; see `MeshConfig`.

    Metrics, float32 scalars: loss (masked mean cross-entropy in nats over all scored
    positions of the batch), accuracy, grad_norm (before clipping); int32: bad, 1 for a step that
    `guard.judge` calls bad, whose update is left out if `training.on_bad_step` says so, and how
    many were bad so far, and in a row. Learning rates follow `state.step`, which counts those too.

    Raises:
      ConfigError: parameters that cannot be trained; see `check_trainable`.
    """
    check_trainable(model)
    update = optimizer(training, mesh).update
    gradient = _gradient_of_batch(
        model, training, window_passes, scored_per_window, mesh=mesh, gather=gather
    )

    def train_step(state, batch):
        (loss, accuracy), grads = gradient(state.params, batch)
        if mesh is not None:
            grads = jax.lax.with_sharding_constraint(grads, sharding.of_state(mesh, grads))
        before = at_step(state.opt_state, state.step)
        updates, opt_state = update(grads, before, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.global_norm(grads)
        bad, recent = guard.judge(state.recent, loss, grad_norm, training.spike_factor)
        if training.on_bad_step == "skip":
            params, opt_state = guard.keep_where(bad, (state.params, before), (params, opt_state))
        metrics = {
            "loss": loss, "accuracy": accuracy, "grad_norm": grad_norm,
            "bad": bad.astype(jnp.int32), "bad_so_far": recent.bad,
            "bad_in_a_row": recent.bad_in_a_row,
        }  # fmt: skip
        return TrainState(state.step + 1, params, opt_state, recent), metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    like = jax.eval_shape(lambda: init_train_state(model, training))
    placed = sharding.of_state(mesh, like)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(placed, sharding.of_batch(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
    )


def _gradient_of_batch(model, training, window_passes, scored_per_window, *, mesh, gather):
    """(params, batch) -> ((loss, accuracy), gradient of the loss), part by part of the batch."""

    def share_of_loss(params, rows, scored):
        """What some rows add to the means over the `scored` positions of the whole batch."""
        seen = score(
            params, rows, model=model,
            window_passes=window_passes, scored_per_window=scored_per_window,
        )  # fmt: skip
        right = (seen.prediction_BWL == rows.targets_WL) & rows.mask_WL
        return jnp.sum(seen.nll_BWL) / scored, jnp.sum(right, dtype=jnp.int32) / scored

    if mesh is not None and mesh.size > 1:
        share_of_loss = sharding.over_rows(
            mesh, share_of_loss, gather=gather, dtype=model.compute_dtype
        )

    def gradient(params, batch):
        scored = jnp.maximum(jnp.sum(batch.mask_WL), 1).astype(jnp.float32)
        of_part = jax.value_and_grad(share_of_loss, has_aux=True)
        if training.parts == 1:
            return of_part(params, batch, scored)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of_part(params, part, scored)), None

        parts = jax.tree.map(lambda x: _split(x, training.parts), batch)
        zero = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
        return jax.lax.scan(add, zero, parts)[0]

    return gradient


def _split(x, parts: int):
    """(B, ...) -> (parts, B / parts, ...) without moving a row to another device."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _strong(x):
    return jax.lax.convert_element_type(x, x.dtype) if hasattr(x, "dtype") else x


def make_init(config: ExperimentConfig, mesh) -> Callable[[], TrainState]:
    """Makes the state, each device its own part; without a mesh, on one device."""

    def make():
        return init_train_state(config.model, config.training)

    if mesh is None:
        return jax.jit(make)
    return jax.jit(make, out_shardings=sharding.of_state(mesh, jax.eval_shape(make)))


def state_shapes(config: ExperimentConfig, mesh) -> TrainState:
    """Of the state, with the shardings that it shall have."""
    like = jax.eval_shape(make_init(config, None))
    if mesh is None:
        return like
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        like, sharding.of_state(mesh, like),
    )  # fmt: skip
