"""How likely a model finds held-out text, by how much of the document it has slept on."""

import dataclasses
import math

import numpy as np

from sleepnet import tasks
from sleepnet.evaluation.accuracy import compiled_score
from sleepnet.evaluation.intervals import ratio
from sleepnet.experiment import ExperimentConfig
from sleepnet.integers import as_integer
from sleepnet.tasks import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossResult:
    """How well the next token was predicted, with 95% intervals over examples.

    Attributes:
      passes: N of the sleeps.
      depth: the number of the window in its document, from 1; None is all windows together.
      examples: those that have such a window.
      tokens: predicted ones.
      loss: mean -log p in nats per token, with its interval.
      perplexity: its exponential; infinite where that is beyond float64.
      bits_per_byte: `loss` in bits, times the tokens predicted in the whole split per byte of its
        text. The first token of a document is not predicted, and its end is. None unless the tokens
        determine the text: one that drops what is hard to predict would seem to be better.
      lost_bytes: of the text of the whole split, those that the tokens do not determine, as far as
        it can be told (`sleepnet.tokenizer`); None: not known.
      accuracy: the share of tokens that were the likeliest.
    """

    passes: int
    depth: int | None
    examples: int
    tokens: int
    loss: float
    loss_low: float
    loss_high: float
    perplexity: float
    bits_per_byte: float | None
    lost_bytes: int | None
    accuracy: float


def evaluate_text(
    params, config: ExperimentConfig, passes: int, *, split: str = "test"
) -> list[LossResult]:
    """Scores `config.evaluation.examples` examples of a text task, at most all of the split once.

    Args:
      params: from `init_params` or a checkpoint.
      config: of the run.
      passes: N of every sleep; also one other than the trained.
      split: "test", or "train".

    Returns:
      One result for each window of a document that the examples have, and last one for all.

    Raises:
      ValueError: an unknown split, or a task that is not of text.
    """
    passes = as_integer("passes", passes, 1)
    task = tasks.make(config.task)
    if not isinstance(task, Text):
        raise ValueError(f"only text has a likelihood by window; got {config.task.name}")
    sums_BD = _sums(params, config, task, passes, split)
    depths = [d for d in range(1, task.num_windows + 1) if sums_BD.tokens[:, d].any()]
    text = task.predicted_per_byte(split), task.lost_bytes(split)
    by_depth = [_result(passes, d, sums_BD.of([d]), *text) for d in depths]
    return [*by_depth, _result(passes, None, sums_BD.of(depths), *text)]


@dataclasses.dataclass(frozen=True)
class _Sums:
    """By example, and perhaps by depth."""

    nll: np.ndarray
    tokens: np.ndarray
    right: np.ndarray

    def of(self, depths: list[int]) -> "_Sums":
        """Over these depths, of the examples that have any."""
        nll, tokens, right = (x[:, depths].sum(1) for x in (self.nll, self.tokens, self.right))
        chosen = tokens > 0
        return _Sums(nll[chosen], tokens[chosen], right[chosen])


def _sums(params, config, task: Text, passes, split) -> _Sums:
    """Batches all have one size, and so one program; the last is cut to the examples wanted."""
    wanted = task.num_distinct(split, config.evaluation.examples)
    batch_size = min(config.evaluation.batch_size, wanted)
    parts = []
    for batch in tasks.batches(task, split, batch_size, num_batches=-(-wanted // batch_size)):
        seen = compiled_score(
            params, batch, model=config.model, window_passes=task.window_passes(passes),
            scored_per_window=task.scored_per_window,
        )  # fmt: skip
        nll_BWL = np.asarray(seen.nll_BWL, np.float64)
        right_BWL = np.asarray(seen.prediction_BWL) == batch.targets_WL
        for b, mask_WL in enumerate(batch.mask_WL):
            depth_S = batch.depth_WL[b][mask_WL]
            weights = (nll_BWL[b][mask_WL], None, right_BWL[b][mask_WL])
            parts.append([np.bincount(depth_S, w, task.num_windows + 1) for w in weights])
    return _Sums(*np.moveaxis(np.array(parts[:wanted]), 1, 0))


def _result(passes, depth, sums: _Sums, tokens_per_byte, lost_bytes) -> LossResult:
    loss = ratio(sums.nll, sums.tokens)
    tokens = int(sums.tokens.sum())
    return LossResult(
        passes=passes,
        depth=depth,
        examples=len(sums.tokens),
        tokens=tokens,
        loss=loss.mean,
        loss_low=loss.low,
        loss_high=loss.high,
        perplexity=_perplexity(loss.mean),
        bits_per_byte=loss.mean / math.log(2) * tokens_per_byte if lost_bytes == 0 else None,
        lost_bytes=lost_bytes,
        accuracy=float(sums.right.sum()) / tokens,
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
