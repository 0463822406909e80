"""The same scores as a rollout's, the way a model is used: token by token, then sleep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet import tasks
from sleepnet.config import ModelConfig
from sleepnet.cycle.cache import init_state, select_states
from sleepnet.cycle.sleep import sleep
from sleepnet.cycle.wake import wake
from sleepnet.evaluation.accuracy import compiled_score
from sleepnet.experiment import ExperimentConfig
from sleepnet.integers import as_integer
from sleepnet.nn.model import nll
from sleepnet.tasks import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far streaming and rollout are apart at the scored positions of some examples.

    Attributes:
      passes: N of the sleeps.
      examples: how many.
      max_nll: nats, the largest -log p(target) of the rollout: the scale of the difference.
      max_nll_difference: nats, the largest.
      equal_predictions: the share of scored positions with the same likeliest token.
    """

    passes: int
    examples: int
    max_nll: float
    max_nll_difference: float
    equal_predictions: float


def stream(
    params, example_batch: Example, *, model: ModelConfig, window_passes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores a batch through `wake` one token at a time, and `sleep` at each boundary.

    A row's padded places are skipped. Compiles one token and one sleep per N, however many
    windows there are.

    Args:
      example_batch: with a leading axis B.
      window_passes: N of the sleep behind each window. Nothing is read behind the last window,
        so it does not sleep.

    Returns:
      nll_BWL, float32 nats, 0 where nothing is scored; and prediction_BWL, int32, -1 there.

    Raises:
      ValueError: as `tasks.check_batch`.
    """
    tasks.check_batch(example_batch, model.vocab_size)
    tokens_BWL, length_BW, targets_BWL, mask_BWL, *_, reset_BW = example_batch
    B, W, _ = tokens_BWL.shape
    nll_BWL = np.zeros(tokens_BWL.shape, np.float32)
    prediction_BWL = np.full(tokens_BWL.shape, -1, np.int32)
    state = fresh = init_state(model, B)
    for w, passes in enumerate(window_passes):
        if reset_BW is not None:
            state = select_states(reset_BW[:, w], fresh, state)
        length_B = length_BW[:, w]
        for t in range(length_B.max()):
            nll_BWL[:, w, t], prediction_BWL[:, w, t], state = _one_token(
                params, state, tokens_BWL[:, w, t], t < length_B, targets_BWL[:, w, t],
                mask_BWL[:, w, t], model=model,
            )  # fmt: skip
        if w + 1 < W:
            state = sleep(params, state, config=model, passes=passes)
    return nll_BWL, prediction_BWL


def agreement(params, config: ExperimentConfig, passes: int | None = None) -> Agreement:
    """Streams `config.evaluation.streaming_examples` test examples and compares with `rollout`.

    A test split with fewer examples is streamed once.

    Args:
      passes: N; the trained one by default.

    Raises:
      ValueError: `streaming_examples` is 0.
    """
    passes = config.model.passes if passes is None else as_integer("passes", passes, 1)
    task = tasks.make(config.task)
    examples = task.num_distinct("test", config.evaluation.streaming_examples)
    (batch,) = tasks.batches(task, "test", examples, num_batches=1)
    window_passes = task.window_passes(passes)
    rolled = compiled_score(
        params, batch, model=config.model, window_passes=window_passes,
        scored_per_window=task.scored_per_window,
    )  # fmt: skip
    nll_BWL, prediction_BWL = stream(params, batch, model=config.model, window_passes=window_passes)
    nll_S, rolled_nll_S = nll_BWL[batch.mask_WL], np.asarray(rolled.nll_BWL)[batch.mask_WL]
    equal_S = np.equal(prediction_BWL, rolled.prediction_BWL)[batch.mask_WL]
    return Agreement(
        passes=passes,
        examples=examples,
        max_nll=float(rolled_nll_S.max()),
        max_nll_difference=_largest_difference(nll_S, rolled_nll_S),
        equal_predictions=float(equal_S.mean()),
    )


def _largest_difference(one_S, other_S) -> float:
    """The difference of two equal infinities is 0."""
    with np.errstate(invalid="ignore"):
        return float(np.where(one_S == other_S, 0.0, np.abs(one_S - other_S)).max())


@functools.partial(jax.jit, static_argnames="model")
def _one_token(params, state, token_B, valid_B, target_B, scored_B, *, model):
    logits_BY, state = wake(
        params, state, token_B[:, None], config=model,
        length_B=valid_B.astype(jnp.int32), logits="last",
    )  # fmt: skip
    likeliest_B = jnp.argmax(logits_BY, axis=-1).astype(jnp.int32)
    nll_B = jnp.where(scored_B, nll(logits_BY, target_B), 0.0)
    return nll_B, jnp.where(scored_B, likeliest_B, -1), state
