"""Gradients through the last k of a window's N passes: which they are, and what they cost.

The oracle differentiates nothing. It lives two float64 minds side by side by the plain formulas of
`reference`: one from the parameters as they are, and one from parameters of which one number is
moved; in a detached pass the second computes from the first's features and parameters, with only
its own fast weights. Differences of its loss are what the gradient must be.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree, assert_identical
from minds import CONFIGS, HARD, TINY, L, params, stream
from reference import Mind, log_softmax

import sleepnet
from sleepnet.config import RULES
from sleepnet.ops import gated_delta, gated_delta_tpu

QUICK = dataclasses.replace(TINY, unroll=True)
TOKENS, TARGETS = stream()[:2, :3], stream(7)[:2, :3]  # two rows of three windows
LENGTHS = np.array([[6, 6, 6], [4, 0, 5]], np.int32)
# Loss in the last window alone; and in all, each of which then sleeps.
LAST, ALL = ((3, 3, 1), (0, 0, L)), ((3, 3, 3), (L, L, L))


def scored(scored_per_window):
    wanted = np.arange(L) < np.array(scored_per_window)[:, None]
    return wanted & (np.arange(L) < LENGTHS[..., None])


def loss(tree, config, plan):
    window_passes, scored_per_window = plan
    result = sleepnet.rollout(
        tree, TOKENS, LENGTHS, TARGETS, scored(scored_per_window), config=config,
        window_passes=window_passes, scored_per_window=scored_per_window,
    )  # fmt: skip
    return jnp.sum(result.nll_BWL)


@functools.cache
def gradients(config, plan=LAST):
    """The loss with its gradient."""
    of_loss = functools.partial(loss, config=config, plan=plan)
    return jax.jit(jax.value_and_grad(of_loss))(params(config))


def lasting(config, k, **changes):
    return dataclasses.replace(config, gradient_passes=k, **changes)


class Moved(Mind):
    """A mind with other parameters than `base`, whose detached passes are those of `base`."""

    def __init__(self, params, base):
        super().__init__(params, base.config)
        self.base = base

    def live(self, tokens, passes, read):
        """One window. Returns the logits of the first pass."""
        base, config = self.base, self.config
        detached = max(0, passes - config.gradient_passes)
        before, base_before = dict(self.states), dict(base.states)
        for mind in (self, base):
            mind.wrote_kept, mind.wrote_tails = {}, {}
        x, base_x = self.embed(tokens), base.embed(tokens)
        read = read or not detached
        for part in ("prelude", "core"):
            x, base_x = self.both(part, x, base_x, not read, keep=True)
        y = self.run("coda", x, keep=True)
        base.run("coda", base_x, keep=True)
        if detached:
            x = base_x
        for done in range(1, passes):
            x, base_x = self.both("core", x, base_x, done < detached)
        if passes > 1:
            for place, _ in self.places("coda"):
                if place in before:
                    self.states[place], base.states[place] = before[place], base_before[place]
            self.both("coda", x, base_x, False)
        if not read:
            self.wrote_kept, self.wrote_tails = base.wrote_kept, base.wrote_tails
        self.evict()
        base.evict()
        return self.logits(y)

    def both(self, part, x, base_x, detached, keep=False):
        if not detached:
            return self.run(part, x, keep), self.base.run(part, base_x, keep)
        for place, letter in self.places(part):
            if letter == "G":
                self.write(place, base_x)
            base_x = self.base.block(place, letter, base_x, keep)
        return base_x, base_x

    def write(self, place, base_x):
        """The base's map on this mind's fast weights."""
        tail = self.tails[place]
        self.tails[place] = self.base.tails[place]
        self.delta_block(self.base.of(place, "G"), base_x, place, keep=False)
        self.tails[place] = tail


def oracle_loss(moved, config, plan):
    total = 0.0
    for row, lengths in enumerate(LENGTHS):
        base = Mind(params(config), config)
        mind = Moved(moved, base)
        for w, (passes, read) in enumerate(zip(*plan, strict=True)):
            n = lengths[w]
            logits = mind.live(TOKENS[row, w, :n], passes, bool(read))
            if read:
                total -= log_softmax(logits)[np.arange(n), TARGETS[row, w, :n]].sum()
    return total


def oracle_derivative(path, place, config, plan, h=1e-5):
    """By one coordinate; the error of a central difference is about h^2."""

    def at(step):
        def move(here, x):
            x = np.array(x, np.float64)
            if here == path:
                x[place] += step
            return x

        tree = jax.tree_util.tree_map_with_path(move, params(config))
        return oracle_loss(tree, config, plan)

    return (at(h) - at(-h)) / (2 * h)


def assert_follows_the_definition(config, plan):
    """At two coordinates of every parameter: the largest gradient and one at random."""
    rng = np.random.default_rng(0)
    _, actual = gradients(config, plan)
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        leaf = np.asarray(leaf)
        largest = np.unravel_index(np.abs(leaf).argmax(), leaf.shape)
        bound = GRADIENTS * np.abs(leaf).max()
        for place in (largest, tuple(rng.integers(leaf.shape))):
            expected = oracle_derivative(path, place, config, plan)
            name = jax.tree_util.keystr(path)
            assert abs(leaf[place] - expected) <= bound, (name, place, leaf[place], expected)


@pytest.mark.parametrize("plan", [LAST, ALL], ids=["last", "all"])
def test_gradients_of_the_last_passes_are_those_of_the_definition(plan):
    """k = 1 of N = 3 over three windows of ragged rows; with loss in the last window alone, and in
    all of them, whose wake passes are then differentiated too."""
    assert_follows_the_definition(lasting(QUICK, 1), plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [LAST, ALL], ids=["last", "all"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_whole_minds_are_those_of_the_definition(config, k, plan):
    """The same with prelude, coda, repeats, carried tails and keys, both evictions."""
    assert_follows_the_definition(lasting(config, k), plan)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_every_rule_are_those_of_the_definition(rule):
    assert_follows_the_definition(lasting(QUICK, 1, rule=rule), LAST)
