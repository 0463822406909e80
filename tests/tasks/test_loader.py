"""Batches: which examples they hold, how they resume, and what they refuse."""

import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.tasks import DepoConfig, Rule110Config


@pytest.fixture(params=["depo", "rule110", "text"])
def task(request, text):
    return tasks.make(
        {"depo": DepoConfig(), "rule110": Rule110Config(), "text": text}[request.param]
    )


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_batch_i_holds_the_examples_from_i_times_the_batch_size(task, split, num_threads):
    drawn = tasks.batches(task, split, 4, num_batches=5, first_batch=2, num_threads=num_threads)
    drawn = list(drawn)
    assert len(drawn) == 5
    for i, batch in enumerate(drawn, start=2):
        for b in range(4):
            for rows, array in zip(batch, task.example(split, 4 * i + b), strict=True):
                row = None if rows is None else rows[b]
                np.testing.assert_array_equal(row, array, strict=True)


@pytest.mark.parametrize("first_batch", [0, 1, 7, 8])
def test_a_resumed_run_sees_the_tail_of_the_whole(task, first_batch):
    whole = list(tasks.batches(task, "train", 3, num_batches=8))
    resumed = tasks.batches(task, "train", 3, num_batches=8 - first_batch, first_batch=first_batch)
    for expected, batch in zip(whole[first_batch:], resumed, strict=True):
        for a, b in zip(expected, batch, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_several_processes_interleave_to_the_same_batches(task, processes):
    """Bit for bit, also from a later batch on: a run may go on with another number of them."""
    of_process = [
        tasks.batches(task, "train", 8, first_batch=3, num_batches=4, rows=range(p, 8, processes))
        for p in range(processes)
    ]
    whole = list(tasks.batches(task, "train", 8, num_batches=7))[3:]
    for expected, *shares in zip(whole, *of_process, strict=True):
        for rows, *of_shares in zip(expected, *shares, strict=True):
            if rows is None:
                assert of_shares == [None] * processes
                continue
            together = np.stack(of_shares, axis=1).reshape(rows.shape)
            np.testing.assert_array_equal(together, rows, strict=True)


def test_a_far_batch_costs_no_more_than_the_first(task):
    (batch,) = tasks.batches(task, "train", 2, num_batches=1, first_batch=10**9)
    np.testing.assert_array_equal(
        batch.tokens_WL[1], task.example("train", 2 * 10**9 + 1).tokens_WL
    )


def test_an_iterator_may_be_dropped_early(task):
    iterator = tasks.batches(task, "train", 2, num_batches=10**6)
    assert isinstance(next(iterator), tasks.Example)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"split": "dev"}, r"'dev'.*'train', 'test'"),
        ({"batch_size": 0}, "batch_size must be an integer of 1 or more; got 0"),
        ({"num_batches": -1}, "num_batches must be an integer of 0 or more; got -1"),
        ({"first_batch": -2}, "first_batch must be an integer of 0 or more; got -2"),
    ],
)
def test_impossible_arguments_are_refused_at_once(task, change, match):
    arguments = {"split": "train", "batch_size": 2, "num_batches": 1} | change
    with pytest.raises(ValueError, match=match):
        tasks.batches(task, **arguments)


def small_batch() -> tasks.Example:
    task = tasks.make(DepoConfig())
    return task.examples("train", range(3))


def test_a_sound_batch_or_example_passes(task):
    tasks.check_batch(task.example("test", 0), task.vocab_size)
    tasks.check_batch(small_batch(), tasks.make(DepoConfig()).vocab_size)


@pytest.mark.parametrize(
    ("field", "position", "value", "match"),
    [
        ("tokens_WL", (1, 2, 3), 12, r"token 12 at \(1, 2, 3\) lies outside 0\.\.11"),
        ("tokens_WL", (2, 0, 0), -1, r"token -1 at \(2, 0, 0\) lies outside 0\.\.11"),
        ("targets_WL", (0, 3, 7), 99, r"target 99 at \(0, 3, 7\) lies outside 0\.\.11"),
        ("length_W", (2, 1), 9, r"length 9 at \(2, 1\) lies outside 0\.\.8"),
        ("length_W", (0, 1), -1, r"length -1 at \(0, 1\) lies outside 0\.\.8"),
    ],
)
def test_the_first_value_out_of_range_is_named(field, position, value, match):
    batch = small_batch()
    getattr(batch, field)[position] = value
    getattr(batch, field)[(2,) + (-1,) * (len(position) - 1)] = value  # a later one
    with pytest.raises(ValueError, match=match):
        tasks.check_batch(batch, vocab_size=12)


def test_every_batch_is_checked(task):
    class Broken(type(task)):
        def examples(self, split, indices):
            batch = super().examples(split, indices)
            if 5 in indices:
                batch.tokens_WL[indices.index(5), 0, 1] = 1000
            return batch

    iterator = tasks.batches(Broken(task.config), "train", 2, num_batches=4)
    next(iterator), next(iterator)
    with pytest.raises(ValueError, match=r"token 1000 at \(1, 0, 1\)"):
        next(iterator)
