"""Batches of examples through grain; the one place here that knows it."""

from collections.abc import Iterator, Sequence

import numpy as np

from sleepnet.integers import as_integer
from sleepnet.tasks.base import Task
from sleepnet.tasks.layout import Example
from sleepnet.tasks.splits import check_split


class TaskSource:
    """Chosen rows of the first `num_batches` batches of a split, random-access, for grain.

    Its elements are whole batches, because what grain keeps book of for each element takes about
    as long as making a small example.
    """

    def __init__(
        self, task: Task, split: str, batch_size: int, num_batches: int, rows: Sequence[int]
    ):
        self._task = task
        self._split = split
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._rows = rows

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Example:
        first = index * self._batch_size
        return self._task.examples(self._split, [first + row for row in self._rows])


def batches(
    task: Task,
    split: str,
    batch_size: int,
    *,
    num_batches: int,
    first_batch: int = 0,
    rows: Sequence[int] | None = None,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Iterator[Example]:
    """The batches first_batch .. first_batch + num_batches - 1 of `split`, made ahead of time.

    Batch i holds the examples i * batch_size .. (i + 1) * batch_size - 1, whatever came before: to
    resume, pass the number of batches already seen as `first_batch`.

    Args:
      task: makes the examples.
      split: "train" or "test".
      batch_size: B.
      num_batches: how many to yield.
      first_batch: the number of the first of them.
      rows: which examples of each batch this process makes; all by default.
      num_threads: how many threads make batches; 0 makes each when it is asked for.
      prefetch: how many batches may wait.

    Returns:
      An iterator of Examples with a leading axis of rows on every array, each checked by
      `check_batch`.

    Raises:
      ValueError: an unknown split or a size that is no size; and, from the iterator, whatever
        `Task.example` and `check_batch` raise.
    """
    check_split(split)
    batch_size = as_integer("batch_size", batch_size, 1)
    num_batches = as_integer("num_batches", num_batches, 0)
    first_batch = as_integer("first_batch", first_batch, 0)
    num_threads = as_integer("num_threads", num_threads, 0)
    prefetch = as_integer("prefetch", prefetch, 0)
    rows = range(batch_size) if rows is None else rows
    if not len(rows):
        raise ValueError(f"rows must be some of 0..{batch_size - 1}; got none")
    rows = [as_integer("each of rows", row, 0, batch_size - 1) for row in rows]

    def checked(batch: Example) -> Example:
        check_batch(batch, task.vocab_size)
        return batch

    import grain  # here, since it is slow to import and configs need only the tasks

    end = first_batch + num_batches
    dataset = grain.MapDataset.source(TaskSource(task, split, batch_size, end, rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset[first_batch:end].map(checked).to_iter_dataset(options))


def check_batch(example: Example, vocab_size: int):
    """Checks that everything a model will look up is there; on a device nothing would.

    Args:
      example: an example or a batch.
      vocab_size: tokens and targets must lie below it.

    Raises:
      ValueError: names the first token, target or length out of range, and its position.
    """
    window = example.tokens_WL.shape[-1]
    _check_range("token", example.tokens_WL, vocab_size - 1)
    _check_range("target", example.targets_WL, vocab_size - 1)
    _check_range("length", example.length_W, window)


def _check_range(what: str, values: np.ndarray, high: int):
    if values.size == 0 or (values.min() >= 0 and values.max() <= high):
        return
    position = tuple(np.argwhere((values < 0) | (values > high))[0].tolist())
    raise ValueError(f"{what} {values[position]} at {position} lies outside 0..{high}")
