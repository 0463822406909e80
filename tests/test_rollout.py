"""Rollout: the same minds as in streaming, and gradients through all their windows and sleeps."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import minds
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree, assert_identical
from minds import CONFIGS, FULL, HARD, RAGGED, TINY, B, L, W, newborn, params, stream
from reference import Mind, fast_weights, log_softmax

import sleepnet
from sleepnet.config.model import RULES

both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
jitted = jax.jit(sleepnet.rollout, static_argnames=("config", "window_passes", "scored_per_window"))


QUICK = dataclasses.replace(TINY, unroll=True)  # compiles in half the time


def targets():
    return stream(7)


def valid(lengths):
    return np.arange(L) < lengths[..., None]


def run(config, passes, tokens, lengths, reset=None, mask=None):
    """Every window sleeps with `passes`; scored is every valid token, unless `mask` is given."""
    return jitted(
        params(config),
        tokens,
        lengths,
        targets()[:, : tokens.shape[1]],
        valid(lengths) if mask is None else mask,
        config=config,
        window_passes=(passes,) * tokens.shape[1],
        reset_BW=np.zeros(lengths.shape, bool) if reset is None else reset,
    )


def scored(logits, lengths, w):
    """What rollout reports of one window's logits: nll and prediction, (B, L)."""
    nll, prediction = np.zeros((B, L)), np.full((B, L), -1)
    for b, n in enumerate(lengths[:, w]):
        log_p = log_softmax(np.asarray(logits[b][:n], np.float64))
        nll[b, :n] = -log_p[np.arange(n), targets()[b, w, :n]]
        prediction[b, :n] = log_p.argmax(-1)
    return nll, prediction


def streamed(config, window_passes, lengths):
    """The same life by wake and sleep, one window after another."""
    state, scores = newborn(config), []
    for w, passes in enumerate(window_passes):
        logits, state = minds.woken(config, window=w, length_B=lengths[:, w], state=state)
        state = sleepnet.sleep(params(config), state, config=config, passes=passes)
        scores.append(scored(logits, lengths, w))
    return *(np.stack(x, 1) for x in zip(*scores, strict=True)), state.fast_weights


def assert_same_life(result, nll, prediction, weights):
    assert_agree(result.nll_BWL, nll)
    np.testing.assert_array_equal(result.prediction_BWL, prediction)
    assert_agree(result.fast_weights, weights)


@both
@pytest.mark.parametrize("passes", [1, 3])
def test_rollout_is_streaming(config, passes):
    """nll, predictions and fast weights of a rollout are those of wake and sleep, window by
    window, in ragged rows."""
    result = run(config, passes, stream(), RAGGED)
    assert_same_life(result, *streamed(config, (passes,) * W, RAGGED))


@both
@pytest.mark.parametrize("lengths", [FULL, RAGGED], ids=["full", "ragged"])
def test_rollout_follows_algorithm_1(config, lengths):
    """The same against the float64 model."""
    logits, alone = minds.oracle_life(config, config.passes, lengths is RAGGED)
    scores = [scored([row[w] for row in logits], lengths, w) for w in range(W)]
    nll, prediction = (np.stack(x, 1) for x in zip(*scores, strict=True))
    result = run(config, config.passes, stream(), lengths)
    assert_same_life(result, nll, prediction, fast_weights(alone))


@pytest.mark.parametrize("window_passes", [None, (1, 2)], ids=["default", "given"])
def test_every_window_sleeps_as_often_as_it_is_told(window_passes):
    """By default N times, and once behind the last; else as `window_passes` says."""
    result = score(valid(FULL[:, :2]), window_passes=window_passes)
    expected = streamed(QUICK, window_passes or (QUICK.passes, 1), FULL)
    assert_same_life(result, *expected)


def score(mask, **options):
    """Two full windows of the stream, scored where `mask`."""
    lived = (x[:, :2] for x in (stream(), FULL, targets()))
    return jitted(params(QUICK), *lived, mask, config=QUICK, **options)


@both
def test_a_reset_row_is_a_newborn(config):
    """From the window of its reset on, a row lives and scores as if its life began there, and
    rows that are not reset keep every bit."""
    reset = np.zeros((B, W), bool)
    reset[0, 2] = reset[2, 1] = True
    result = run(config, 3, stream(), FULL, reset)
    undisturbed = run(config, 3, stream(), FULL)
    assert_identical(result.nll_BWL[1], undisturbed.nll_BWL[1])
    for row, start in ((0, 2), (2, 1)):
        life = stream()[row, start:]
        mind = Mind(params(config), config)
        for w, window in enumerate(life):
            log_p = log_softmax(mind.live(window, 3))
            nll = -log_p[np.arange(L), targets()[row, start + w]]
            assert_agree(result.nll_BWL[row, start + w], nll)
        assert_agree(
            jax.tree.map(lambda x, row=row: x[:, row : row + 1], result.fast_weights),
            fast_weights([mind]),
        )


@both
def test_empty_windows_before_a_life_leave_no_trace(config):
    """A context padded on the left by a whole window is the context."""
    tokens, lengths = stream(), RAGGED.copy()
    lengths[:, 3] = 0
    later, later_lengths = np.roll(tokens, 1, axis=1), np.roll(lengths, 1, axis=1)
    early = run(config, 3, tokens, lengths, mask=np.zeros((B, W, L), bool))
    late = run(config, 3, later, later_lengths, mask=np.zeros((B, W, L), bool))
    assert_agree(late.fast_weights, early.fast_weights)


@both
def test_a_row_does_not_see_its_neighbours(config):
    """Bit for bit, beside rows of other tokens and lengths."""
    tokens, lengths = stream(), RAGGED.copy()
    result = run(config, 3, tokens, lengths)
    tokens[1:], lengths[1:] = 4, 3
    other = run(config, 3, tokens, lengths)
    assert_identical(other.nll_BWL[0], result.nll_BWL[0])
    assert_identical(*(
        jax.tree.map(lambda x: x[:, 0], r.fast_weights) for r in (other, result)
    ))  # fmt: skip


def test_scoring_few_positions_is_scoring_all():
    """`scored_per_window` saves logits and changes no score."""
    mask = np.zeros((B, 2, L), bool)
    mask[0, 1, [1, 4]] = mask[1, 0, 5] = mask[2, 1, 0] = True
    everything = score(mask, window_passes=None)
    few = score(mask, window_passes=None, scored_per_window=(1, 2))
    assert_agree(few.nll_BWL, everything.nll_BWL)
    assert_identical(few.prediction_BWL, everything.prediction_BWL)
    assert ((np.asarray(few.nll_BWL) != 0) == mask).all()
    assert ((np.asarray(few.prediction_BWL) >= 0) == mask).all()
    assert_identical(few.fast_weights, everything.fast_weights)


@pytest.fixture(scope="module")
def lives_by_rule():
    return {rule: by_rule(rule) for rule in RULES}


def by_rule(rule):
    config = dataclasses.replace(TINY, pattern="G", rule=rule)
    return config, run(config, 2, stream()[:, :2], FULL[:, :2])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_follows_its_formula(lives_by_rule, rule):
    """The four local rules, against the float64 model."""
    config, result = lives_by_rule[rule]
    alone = [Mind(params(config), config) for _ in range(B)]
    for b, mind in enumerate(alone):
        for w in range(2):
            nll = -log_softmax(mind.live(stream()[b, w], 2))[np.arange(L), targets()[b, w]]
            assert_agree(result.nll_BWL[b, w], nll)
    assert_agree(result.fast_weights, fast_weights(alone))


def test_rules_differ(lives_by_rule):
    """No two of them write the same fast weights."""
    written = [np.asarray(result.fast_weights["core"][0]) for _, result in lives_by_rule.values()]
    for i, a in enumerate(written):
        for b in written[i + 1 :]:
            assert np.abs(a - b).max() > 0.01 * np.abs(a).max()


# One row; the first window's tokens come nowhere else, and only the last window bears loss: all
# that reaches their embeddings came through a sleep.
LIFE = np.array([[[7, 2, 9, 4, 12, 0], [1, 3, 5, 3, 1, 8]]], np.int32)
LABELS = np.array([[[0] * L, [3, 5, 3, 1, 8, 1]]], np.int32)
SCORED = np.array([[[False] * L, [True] * L]])
SMALL = dataclasses.replace(HARD, pattern="G")


@functools.cache
def gradients(config, window_passes):
    return loss_and_gradients(config, window_passes)(params(config), LABELS)[1]


@functools.cache
def loss_and_gradients(config, window_passes):
    """A program of the parameters and the labels."""

    def loss(params, labels):
        result = sleepnet.rollout(
            params, LIFE, None, labels, SCORED, config=config, window_passes=window_passes
        )
        return jnp.sum(result.nll_BWL)

    return jax.jit(jax.value_and_grad(loss))


def oracle_loss(tree, config, passes):
    mind = Mind(tree, config)
    mind.live(LIFE[0, 0], passes)
    log_p = log_softmax(mind.live(LIFE[0, 1], 1))
    return -log_p[np.arange(L), LABELS[0, 1]].sum()


def oracle_derivative(tree, path, place, config, passes, h=1e-5):
    """Central difference of the float64 model by one coordinate; its error is about h^2."""

    def shifted(step):
        def shift(at, x):
            x = np.array(x, np.float64)
            if at == path:
                x[place] += step
            return x

        return oracle_loss(jax.tree_util.tree_map_with_path(shift, tree), config, passes)

    return (shifted(h) - shifted(-h)) / (2 * h)


def test_gradients_are_those_of_the_float64_model(config=QUICK):
    """By finite differences of the reference, two coordinates of every parameter: the largest
    gradient and one at random; through three passes and a boundary."""
    rng = np.random.default_rng(0)
    actual = gradients(config, (3, 1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        leaf = np.asarray(leaf)
        largest = np.unravel_index(np.abs(leaf).argmax(), leaf.shape)
        for place in (largest, tuple(rng.integers(leaf.shape))):
            expected = oracle_derivative(params(config), path, place, config, 3)
            difference = abs(leaf[place] - expected)
            name = jax.tree_util.keystr(path)
            assert difference <= GRADIENTS * np.abs(leaf).max(), (name, place)


def test_gradients_reach_the_past_through_sleep_alone():
    """Tokens that only the first window holds are learned from the second window's loss; with
    no boundary crossed by keys or convolution, through fast weights."""
    embedding = np.asarray(gradients(QUICK, (3, 1))["embedding"])
    assert (np.abs(embedding[LIFE[0, 0]]).max(axis=1) > 0).all()
    assert (embedding[[6, 10, 11]] == 0).all()  # in no window


def test_labels_that_are_not_scored_may_hold_anything():
    """Bit for bit the same loss and gradients, under JAX_DEBUG_NANS=1 too."""
    program = loss_and_gradients(SMALL, (3, 3))
    labels = np.where(SCORED, LABELS, np.int32([-1, HARD.vocab_size, 10**6, -(10**6), 0, -100]))
    expected = program(params(SMALL), LABELS)
    chex.assert_tree_all_finite(expected)
    with jax.debug_nans(True):
        assert_identical(program(params(SMALL), labels), expected)


@pytest.mark.parametrize("label", [-1, HARD.vocab_size, -(10**6), 10**6])
def test_where_no_one_looks_a_label_that_is_no_token_scores_nan(label):
    """Under jit, at its own position alone, and not the score of some other token."""
    labels = targets()[:, :2].copy()
    labels[1, 0, 3] = label
    lived = (stream()[:, :2], FULL[:, :2])
    nll_BWL = jitted(
        params(QUICK), *lived, labels, valid(FULL[:, :2]), config=QUICK, window_passes=None
    ).nll_BWL
    assert np.argwhere(np.isnan(nll_BWL)).tolist() == [[1, 0, 3]]


every_policy = pytest.mark.parametrize(
    "policy",
    [
        "window+pass+block",
        *(
            pytest.param(policy, marks=pytest.mark.slow)
            for policy in ("window", "pass", "block", "window+pass")
        ),
    ],
)


@every_policy
def test_recomputing_changes_no_gradient(policy):
    """Whatever backward recomputes, the gradients agree."""
    config = dataclasses.replace(SMALL, remat=policy)
    assert_agree(gradients(config, (3, 3)), gradients(SMALL, (3, 3)), GRADIENTS)


def test_unrolling_changes_no_gradient():
    """Loops written out give what scans give."""
    config = dataclasses.replace(SMALL, unroll=True)
    assert_agree(gradients(config, (3, 3)), gradients(SMALL, (3, 3)), GRADIENTS)


@pytest.mark.slow
@both
@pytest.mark.parametrize("policy", ["window", "pass", "block", "window+pass"])
def test_recomputing_whole_minds_changes_no_gradient(config, policy):
    """The same with prelude, coda, repeats and both evictions; written out, against scans."""
    changed = dataclasses.replace(config, remat=policy, unroll=True)
    assert_agree(gradients(changed, (3, 3)), gradients(config, (3, 3)), GRADIENTS)


@pytest.mark.slow
@both
def test_gradients_of_whole_minds_are_those_of_the_float64_model(config):
    """As above, with prelude, coda, repeats and both evictions."""
    test_gradients_are_those_of_the_float64_model(config)


MISFITS = {
    "one window": (dict(tokens_BWL=LIFE[0]), r"\(B, W, 1\.\.6\); got \(2, 6\)"),
    "long windows": (dict(tokens_BWL=np.zeros((1, 2, 7), np.int32)), r"1\.\.6\); got \(1, 2, 7\)"),
    "length": (dict(length_BW=FULL), r"length_BW must have shape \(1, 2\); got \(3, 4\)"),
    "targets": (dict(targets_BWL=LABELS[:, :1]), r"targets_BWL .*\(1, 2, 6\); got \(1, 1, 6\)"),
    "mask": (dict(mask_BWL=SCORED[..., :5]), r"mask_BWL .*\(1, 2, 6\); got \(1, 2, 5\)"),
    "reset": (dict(reset_BW=np.zeros(2, bool)), r"reset_BW .*\(1, 2\); got \(2,\)"),
    "passes": (dict(window_passes=(1,)), r"window_passes must be 2 integers.*\(1,\)"),
    "no passes": (dict(window_passes=(0, 1)), r"1 or more; got \(0, 1\)"),
    "half a pass": (dict(window_passes=(1.5, 1)), r"1 or more; got \(1\.5, 1\)"),
    "not even one pass": (dict(window_passes=()), r"must be 2 integers.*got \(\)"),
    "scored": (dict(scored_per_window=(1, 7)), r"0\.\.6; got \(1, 7\)"),
    "floats": (dict(tokens_BWL=LIFE + 0.5), r"tokens_BWL must be integers; got float"),
    "no windows": (dict(tokens_BWL=LIFE[:, :0]), r"got \(1, 0, 6\)"),
    "only a mask": (dict(targets_BWL=None), r"given together"),
    "vocabulary": (dict(tokens_BWL=LIFE + 1), r"id 13 in row 0 at place 4.*0\.\.12"),
    "long row": (
        dict(length_BW=np.array([[6, 7]])),
        r"length_BW must lie in 0\.\.6; got 7 in row 0",
    ),
    "negative target": (
        dict(targets_BWL=LABELS - SCORED * np.int32([0, 0, 0, 2, 0, 0])),
        r"target -1 in row 0 at place 3 of window 1 .*0\.\.12; the nearest is 0",
    ),
    "target too large": (
        dict(targets_BWL=LABELS + SCORED * np.int32([0, 0, 10, 0, 0, 0])),
        r"target 13 in row 0 at place 2 of window 1 .*; the nearest is 12",
    ),
    "targets of another kind": (
        dict(targets_BWL=LABELS / 1),
        r"targets_BWL must be integers; got float64",
    ),
    "mask of another kind": (dict(mask_BWL=SCORED * 1), r"mask_BWL must be bool; got int64"),
    "reset of another kind": (dict(reset_BW=[[0.5, 1.0]]), r"reset_BW must be bool; got float64"),
    "padding scored": (
        dict(length_BW=np.array([[6, 4]])),
        r"mask_BWL scores place 4 of window 1 in row 0, which holds 4 tokens",
    ),
    "more than scored": (dict(scored_per_window=(0, 3)), r"6 places of window 1, and .* allows 3"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named(misfit):
    """With the shape or numbers it should have."""
    changes, message = MISFITS[misfit]
    call = dict(tokens_BWL=LIFE, targets_BWL=LABELS, mask_BWL=SCORED) | changes
    with pytest.raises(ValueError, match=message):
        sleepnet.rollout(params(SMALL), **call, config=SMALL)
