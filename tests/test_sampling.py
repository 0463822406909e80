"""Draws follow the distribution that was asked for and repeat with their seed, in any batch."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import scipy.stats

import sleepnet
from sleepnet import ConfigError, Sampling
from sleepnet.inference.sampling import sample, stack

Y = 11
LOGITS_Y = np.random.default_rng(0).normal(0, 2, Y).astype(np.float32)
KINDS = {
    "greedy": Sampling(temperature=0),
    "plain": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=3.0),
    "top_k": Sampling(top_k=4),
    "top_p": Sampling(top_p=0.8),
    "all three": Sampling(temperature=2.0, top_k=6, top_p=0.7),
}


def distribution(logits_Y, sampling: Sampling) -> np.ndarray:
    """By the definition, in float64 and one token at a time."""
    order = sorted(range(len(logits_Y)), key=lambda y: (-float(logits_Y[y]), y))
    p_Y = np.zeros(len(logits_Y))
    if sampling.temperature == 0:
        p_Y[order[0]] = 1
        return p_Y
    order = order[: sampling.top_k]
    weight = {y: math.exp((logits_Y[y] - logits_Y[order[0]]) / sampling.temperature) for y in order}
    reached = 0.0
    for y in order:
        if reached >= sampling.top_p * sum(weight.values()):
            break
        p_Y[y] = weight[y]
        reached += weight[y]
    return p_Y / p_Y.sum()


ROWS = 2048  # of every batch: one program, and one for a row alone


def draw_each(logits_RY, samplings, draw_R) -> np.ndarray:
    """R draws, in a batch of always the same size."""
    R = len(samplings)
    samplings = [*samplings, *[Sampling()] * (ROWS - R)]
    logits_BY = np.concatenate([logits_RY, np.zeros((ROWS - R, Y), np.float32)])
    draw_B = np.pad(np.asarray(draw_R, np.uint32), (0, ROWS - R))
    return np.asarray(sample(logits_BY, draw_B, stack(samplings)))[:R]


def draw(logits_Y, sampling, n=ROWS) -> np.ndarray:
    """The first n draws of a seed."""
    return draw_each(np.broadcast_to(logits_Y, (n, Y)), [sampling] * n, np.arange(n))


@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS)
def test_draws_follow_the_distribution(sampling):
    """Draws of one seed against the exact probabilities: chi-square, and none outside."""
    counts_Y = np.bincount(draw(LOGITS_Y, sampling), minlength=Y)
    expected_Y = ROWS * distribution(LOGITS_Y, sampling)
    allowed_Y = expected_Y > 0
    assert counts_Y[~allowed_Y].sum() == 0
    if allowed_Y.sum() > 1:
        assert scipy.stats.chisquare(counts_Y[allowed_Y], expected_Y[allowed_Y]).pvalue > 1e-3


def test_equal_logits_are_cut_by_their_ids():
    """Of equals the first: exactly k tokens are left, and the greedy one is the first."""
    zeros_Y = np.zeros(Y, np.float32)
    below_Y = np.where(np.arange(Y) % 2, zeros_Y, -zeros_Y)  # -0.0 is equal to 0.0
    for logits_Y in (zeros_Y, below_Y, -below_Y):
        assert set(draw(logits_Y, Sampling(top_k=3))) == {0, 1, 2}
        assert set(draw(logits_Y, Sampling(temperature=0))) == {0}


def test_a_rows_draws_do_not_depend_on_its_batch():
    """Alone, or beside others that are drawn in every other way; each kind differs by its seed."""
    kinds = [dataclasses.replace(kind, seed=seed) for kind in KINDS.values() for seed in range(8)]
    rng = np.random.default_rng(1)
    logits_BY = rng.normal(0, 2, (len(kinds), Y)).astype(np.float32)
    draw_B = rng.integers(0, 2**31 - 1, len(kinds), dtype=np.uint32)
    together_B = draw_each(logits_BY, kinds, draw_B)
    for b, kind in enumerate(kinds):
        (alone,) = sample(logits_BY[b : b + 1], draw_B[b : b + 1], stack([kind]))
        assert alone == together_B[b]


def test_a_seed_draws_the_same_in_every_version():
    """A saved mind goes on with the draws that it would have made."""
    drawn = {
        seed: draw(np.zeros(Y, np.float32), Sampling(seed=seed), 16).tolist() for seed in GOLDEN
    }
    assert drawn == GOLDEN


GOLDEN = {
    0: [8, 9, 1, 2, 7, 3, 6, 8, 6, 4, 5, 10, 2, 1, 7, 9],
    1: [5, 4, 9, 6, 8, 10, 8, 8, 2, 6, 0, 3, 5, 7, 0, 2],
    2**31: [9, 8, 9, 6, 6, 4, 8, 6, 10, 4, 2, 9, 4, 6, 2, 7],
    2**32: [8, 8, 3, 0, 10, 2, 6, 6, 0, 2, 2, 6, 5, 6, 1, 1],
    2**63 - 1: [7, 0, 1, 5, 10, 6, 9, 10, 2, 2, 3, 8, 8, 10, 6, 2],
}


def test_extremes_of_heat_give_a_token():
    """Colder than float32 can tell is greedy; the hottest is uniform; the smallest top_p is one."""
    best = int(LOGITS_Y.argmax())
    for sampling in (
        Sampling(temperature=5e-324), Sampling(temperature=2e-38), Sampling(top_p=5e-324),
        Sampling(top_k=1),
    ):  # fmt: skip
        assert set(draw(LOGITS_Y, sampling)) == {best}, sampling
    for sampling in (Sampling(temperature=3e38), Sampling(temperature=9, top_k=2**31 - 1)):
        assert set(draw(LOGITS_Y, sampling)) == set(range(Y))


def test_logits_that_are_no_numbers_are_told_in_their_row_alone():
    logits_BY = np.stack([LOGITS_Y] * 4)
    logits_BY[1, 3], logits_BY[2, 0] = np.nan, np.inf
    logits_BY[3, :-1] = -np.inf  # masked by the caller: not drawn
    tokens_B = draw_each(logits_BY, [Sampling()] * 4, np.zeros(4))
    assert tokens_B[1] == tokens_B[2] == -1 and tokens_B[0] >= 0 and tokens_B[3] == Y - 1


def test_one_program_draws_in_every_way():
    draw(LOGITS_Y, Sampling())
    before = sample._cache_size()
    for kind in KINDS.values():
        draw(LOGITS_Y, kind)
    assert sample._cache_size() == before


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 .*; got -0.5; the nearest is 0"),
        ({"temperature": math.nan}, "temperature must be 0 .*; got nan"),
        ({"temperature": math.inf}, "got inf; the nearest is 3.4"),
        ({"temperature": "1"}, "temperature must be .*; got '1'"),
        ({"top_k": 0}, "top_k must be .*, or None for all; got 0; the nearest is 1"),
        ({"top_k": 2.5}, "top_k must be an integer .*; got 2.5"),
        ({"top_p": 0.0}, "top_p must lie above 0; got 0; .* set temperature=0"),
        ({"top_p": 1.5}, "top_p must be above 0, and at most 1 .*; got 1.5; the nearest is 1"),
        ({"seed": -1}, "seed must be an integer in .*; got -1; the nearest is 0"),
        ({"seed": 2**63}, f"the nearest is {2**63 - 1}"),
        ({"seed": True}, "seed must be an integer in .*; got True"),
    ],
    ids=str,
)
def test_what_cannot_be_sampled_is_told_when_it_is_made(wrong, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Sampling(**wrong)


def test_numpy_numbers_will_do():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(4))
    assert sampling == Sampling(temperature=0.5, top_k=3, seed=4)
    assert sleepnet.Sampling is Sampling and jax.tree.leaves(sampling) == [sampling]
