"""Packing: what a row holds, for any lengths of documents."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet.tasks.packing import Packing
from sleepnet.tasks.permutation import shuffled

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
SIZES = st.integers(1, 6)


def packing(lengths, window, windows, key=b"0 train"):
    return Packing(np.array(lengths), window, windows, key)


@settings(max_examples=100)
@given(
    lengths=LENGTHS, window=st.integers(1, 7), windows=st.integers(1, 6), epoch=st.integers(0, 3)
)
def test_every_token_is_in_every_epoch_once(lengths, window, windows, epoch):
    packed = packing(lengths, window, windows)
    rows = [packed.row(epoch * packed.rows + i) for i in range(packed.rows)]
    seen = collections.Counter(
        token
        for row in rows
        for piece in row
        for token in range(piece.start, piece.start + piece.length)
    )
    assert seen == dict.fromkeys(range(sum(lengths)), 1)
    assert packed.fill == pytest.approx(sum(lengths) / (packed.rows * windows * window))


@settings(max_examples=100)
@given(lengths=LENGTHS, window=SIZES, windows=SIZES)
def test_a_piece_is_of_one_document_and_fits_with_the_others_in_its_row(lengths, window, windows):
    packed = packing(lengths, window, windows)
    starts = [0, *itertools.accumulate(lengths)]
    for i in range(packed.rows):
        row = packed.row(i)
        assert row and sum(piece.windows for piece in row) <= windows
        for piece in row:
            document = np.searchsorted(starts, piece.start, side="right") - 1
            assert (piece.start - starts[document]) % (window * windows) == 0
            left = starts[document + 1] - piece.start
            assert piece.length == min(left, window * windows)
            assert piece.ends == (piece.length == left)
            assert piece.windows == -(-piece.length // window)


@settings(max_examples=50)
@given(lengths=LENGTHS, windows=SIZES)
def test_no_two_rows_are_half_empty(lengths, windows):
    """Their pieces would have met in one."""
    packed = packing(lengths, 5, windows)
    used = [sum(piece.windows for piece in packed.row(i)) for i in range(packed.rows)]
    assert sum(2 * windows_used <= windows for windows_used in used) <= 1


def test_short_documents_fill_the_rows_that_long_ones_leave():
    """Sizes of 3 and 1 windows in rows of 4: no window stays empty."""
    packed = packing([30] * 10 + [10] * 10, 10, 4)
    assert (packed.rows, packed.fill) == (10, 1.0)


def test_epochs_and_keys_differ_in_order_and_in_what_meets_in_a_row():
    lengths = np.random.default_rng(0).integers(1, 9, 200)
    packed, other = packing(lengths, 5, 4), packing(lengths, 5, 4, b"1 train")
    first, second, third = (
        [frozenset(piece.start for piece in p.row(i)) for i in rows]
        for p, rows in (
            (packed, range(packed.rows)),
            (packed, range(packed.rows, 2 * packed.rows)),
            (other, range(packed.rows)),
        )
    )
    assert first != second != third != first
    assert len({*first} & {*second}) < packed.rows / 2
    assert len({*first} & {*third}) < packed.rows / 2


def test_a_far_row_costs_no_more_than_the_first():
    packed = packing([3, 5, 8], 4, 2)
    assert packed.row(10**15) == packed.row(10**15)


@settings(max_examples=100)
@given(size=st.integers(1, 700), key=st.binary(max_size=20))
def test_a_shuffle_is_a_permutation(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_a_shuffle_is_the_same_on_every_machine():
    """These numbers are part of the promise that a run goes on anywhere."""
    found = [shuffled(i, 10, b"0 train 0 0") for i in range(10)]
    assert found == [2, 9, 8, 0, 1, 3, 6, 7, 4, 5]


@pytest.mark.parametrize("size", [3, 16, 21])
def test_a_shuffle_puts_everything_everywhere_equally_often(size):
    """Chi-squared over 1000 keys: each place sees each thing as often as chance would have it."""
    keys = [b"%d" % i for i in range(1000)]
    counts = np.zeros((size, size))
    for key in keys:
        for place in range(size):
            counts[place, shuffled(place, size, key)] += 1
    expected = len(keys) / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
