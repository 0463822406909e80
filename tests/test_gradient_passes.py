"""Gradients through the last k of a window's N passes: which they are, and what they cost.

The oracle differentiates nothing. It lives two float64 minds side by side by the plain formulas of
`reference`: one from the parameters as they are, and one from parameters of which one number is
moved; in a detached pass the second computes from the first's features and parameters, with only
its own fast weights. Differences of its loss are what the gradient must be.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree
from minds import CONFIGS, TINY, L, older, params, stream
from reference import Mind, log_softmax

import sleepnet
from sleepnet.config.model import RULES
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import process_window
from sleepnet.nn import model

QUICK = dataclasses.replace(TINY, unroll=True)
TOKENS, TARGETS = stream()[:2, :3], stream(7)[:2, :3]  # two rows of three windows
LENGTHS = np.array([[6, 6, 6], [4, 0, 5]], np.int32)
# Loss in the last window alone; and in all, each of which then sleeps.
LAST, ALL = ((3, 3, 1), (0, 0, L)), ((3, 3, 3), (L, L, L))
ONE_TOKEN = ((3, 3, 1), (0, 0, 1))  # in each window


def life(plan):
    """Tokens, lengths, targets and mask; windows are as long as the most that is scored."""
    _, scored_per_window = plan
    W, T = len(scored_per_window), max(scored_per_window)
    lengths = np.minimum(LENGTHS[:, :W], T)
    mask = np.arange(T) < np.minimum(lengths, scored_per_window)[..., None]
    return TOKENS[:, :W, :T], lengths, TARGETS[:, :W, :T], mask


def lived(tree, config, plan):
    window_passes, scored_per_window = plan
    return sleepnet.rollout(
        tree, *life(plan), config=config,
        window_passes=window_passes, scored_per_window=scored_per_window,
    )  # fmt: skip


def loss(tree, config, plan):
    return jnp.sum(lived(tree, config, plan).nll_BWL)


def lower(config, plan=LAST):
    """The program of `gradients`."""
    of_loss = functools.partial(loss, config=config, plan=plan)
    return jax.jit(jax.value_and_grad(of_loss)).lower(params(config))


@functools.cache
def gradients(config, plan=LAST):
    """The loss with its gradient."""
    return lower(config, plan).compile()(params(config))


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


def oracle_loss(moved, config, plan, windows):
    tokens, lengths, targets, _ = life(plan)
    total = 0.0
    for row in range(len(tokens)):
        base = Mind(params(config), config)
        mind = Moved(moved, base)
        for w, (passes, read) in enumerate(zip(*plan, strict=True)):
            n = lengths[row, w]
            if w >= windows:
                mind.params = base.params
            logits = mind.live(tokens[row, w, :n], passes, bool(read))
            if read:
                total -= log_softmax(logits)[np.arange(n), targets[row, w, :n]].sum()
    return total


def oracle_derivative(path, place, config, plan, windows, h=1e-5):
    """By one coordinate, of the parameters of the first so many `windows`; the error of a central
    difference is about h^2."""

    def at(step):
        def move(here, x):
            x = np.array(x, np.float64)
            if here == path:
                x[place] += step
            return x

        tree = jax.tree_util.tree_map_with_path(move, params(config))
        return oracle_loss(tree, config, plan, windows)

    return (at(h) - at(-h)) / (2 * h)


def assert_follows_the_definition(config, plan):
    assert_derivatives(gradients(config, plan)[1], config, plan, windows=len(plan[0]))


def assert_derivatives(actual, config, plan, windows):
    """At two coordinates of every parameter: the largest gradient and one at random."""
    rng = np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        leaf = np.asarray(leaf)
        largest = np.unravel_index(np.abs(leaf).argmax(), leaf.shape)
        bound = GRADIENTS * np.abs(leaf).max()
        for place in (largest, tuple(rng.integers(leaf.shape))):
            expected = oracle_derivative(path, place, config, plan, windows)
            name = jax.tree_util.keystr(path)
            assert abs(leaf[place] - expected) <= bound, (name, place, leaf[place], expected)


@pytest.mark.parametrize(
    ("pattern", "plan"), [("AG", LAST), ("G", ALL)], ids=["loss in the last", "loss in all"]
)
def test_gradients_of_the_last_passes_are_those_of_the_definition(pattern, plan):
    """k = 1 of N = 3 over three windows of ragged rows; with loss in the last window alone, and in
    all of them, whose wake passes are then differentiated too."""
    assert_follows_the_definition(lasting(QUICK, 1, pattern=pattern), plan)


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


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["G", "[AG]G"])
def test_windows_of_one_token_follow_the_definition(pattern):
    """They take the rule's step instead of its chunks."""
    assert_follows_the_definition(lasting(QUICK, 1, pattern=pattern), ONE_TOKEN)


def by_the_first_window(config):
    """The gradient of the last window's loss by the parameters that the first window slept with."""
    tokens, lengths, targets, mask = life(LAST)

    def loss(first):
        rest, B = params(config), len(tokens)
        minds = cache.empty_fast_weights(config, B), cache.empty_carried(config, B), np.zeros(B)
        for w, (passes, scored) in enumerate(zip(*LAST, strict=True)):
            y_BLD, *minds = process_window(
                rest if w else first, *minds, tokens[:, w], lengths[:, w],
                config=config, passes=passes, read=scored > 0,
            )  # fmt: skip
        log_p = jax.nn.log_softmax(model.logits(rest, y_BLD, config=config))
        nll = -jnp.take_along_axis(log_p, targets[:, -1, :, None], -1)[..., 0]
        return jnp.sum(jnp.where(mask[:, -1], nll, 0.0))

    return jax.jit(jax.grad(loss))(params(config))


def test_detached_passes_let_gradients_of_fast_weights_through():
    """What the first window's last pass wrote crosses two detached passes of the second window on
    its way to the third: its gradient is that of the definition, and not zero."""
    config = lasting(QUICK, 1, pattern="G")
    actual = by_the_first_window(config)
    for name in ("key", "value", "beta", "A_log"):
        assert np.abs(actual["core"]["0_gated_delta"][name]).max() > 1e-4
    assert_derivatives(actual, config, LAST, windows=1)


def test_all_passes_are_the_default():
    """k = N, and any k above, is the program of no k at all."""

    def program(k):
        return lower(lasting(QUICK, k, pattern="G"), ((3, 1), (0, L))).as_text()

    expected = program(None)
    assert program(2) != expected
    assert program(7) == expected


def test_what_a_mind_does_is_the_same_whatever_its_gradients():
    """Written out, a rollout is the same program, operation by operation."""

    def program(config):
        run = functools.partial(lived, config=config, plan=((3, 1), (0, L)))
        return jax.jit(run).lower(params(config)).as_text()

    assert without_names(program(lasting(QUICK, 1))) == without_names(program(QUICK))


def without_names(text):
    """Of private functions, which are named after what they were traced from."""
    return re.sub(r"@[\w.]+", "@", text)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_do_not_depend_on_k(config):
    """Also where passes are scanned; to rounding, because XLA fuses loops of another length in
    another way."""
    for plan in (LAST, ALL):
        losses = [gradients(lasting(config, k), plan)[0] for k in (1, 2, 3)]
        assert_agree(losses, [losses[-1]] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_wake_and_sleep_have_the_gradients_of_rollout(config):
    """Where all windows bear loss: `wake` is read, and `sleep` detaches its first passes."""
    config = lasting(config, 1)
    tokens, lengths, targets, mask = life(ALL)

    def loss(tree):
        state, total = sleepnet.init_state(config, len(tokens)), 0.0
        for w in range(tokens.shape[1]):
            logits, state = sleepnet.wake(
                tree, state, tokens[:, w], config=config, length_B=lengths[:, w]
            )
            state = sleepnet.sleep(tree, state, config=config)
            log_p = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_p, targets[:, w, :, None], -1)[..., 0]
            total += jnp.sum(jnp.where(mask[:, w], nll, 0.0))
        return total

    streamed = jax.jit(jax.value_and_grad(loss))(params(config))
    assert_agree(streamed, gradients(config, ALL), GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_devices_that_share_a_window_have_its_gradients(config):
    """By parameters and by the fast weights before it, over two devices as on one."""
    config, tokens = lasting(config, 1), stream()[:, 0]

    def gradient(sleep_from_tokens):
        def loss(tree, fast_weights):
            state = dataclasses.replace(older(config), fast_weights=fast_weights)
            slept = sleep_from_tokens(tree, state, tokens, config=config)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(slept.fast_weights))

        return jax.grad(loss, (0, 1))(params(config), older(config).fast_weights)

    shared = functools.partial(sleepnet.parallel.sleep_from_tokens, devices=2, axis="window")
    assert_agree(gradient(shared), gradient(sleepnet.sleep_from_tokens), GRADIENTS)
