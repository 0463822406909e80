"""The local rule: its five forms agree with a float64 loop written from the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree, assert_identical, dot_products, is_highest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import local_rule

from sleepnet.config.model import RULES
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import triangular

B, T, HK, H, K, V = 2, 13, 1, 2, 6, 4  # nothing a multiple of anything else
CHUNKS = ((2, 7), (4, 1), (4, 3), (16, 1), (None, None))  # tokens, chunks of a group


def draw(seed, T=T, beta_max=1.0, decay=0.3, alike=0.0):
    """q, k, v, g, beta and a state as a block would hand them over; `alike` ties the keys."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, T, HK, K))
    k = alike * k[:, :1] + (1 - alike) * k
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(B, T, H, V))
    g = -decay * rng.exponential(size=(B, T, H))
    beta = beta_max * rng.uniform(0.01, 0.999, size=(B, T, H))
    state = rng.normal(size=(B, H, K, V))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta, state)]


def mask(inputs, first, stop):
    """The same inputs with every token outside first..stop - 1 masked, row by row."""
    q, k, v, g, beta, state = inputs
    place = np.arange(q.shape[1])
    valid = (place >= np.reshape(first, (-1, 1))) & (place < np.reshape(stop, (-1, 1)))
    g, beta = (jnp.where(valid[..., None], x, 0.0) for x in (g, beta))
    return [q, k, v, g, beta, state]


def oracle(inputs, rule):
    rows = [local_rule(*(np.asarray(x[b]) for x in inputs), rule=rule) for b in range(B)]
    return tuple(np.stack(x) for x in zip(*rows, strict=True))


@functools.partial(jax.jit, static_argnames="rule")
def by_steps(q, k, v, g, beta, state, rule):
    def step(state, token):
        out, state = gated_delta.step(*token, state, rule=rule)
        return state, out

    state, outs = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)])
    return jnp.moveaxis(outs, 0, 1), state


recurrent = jax.jit(gated_delta.recurrent, static_argnames="rule")
chunked = jax.jit(gated_delta.chunked, static_argnames=("rule", "chunk", "group", "detached"))
summarize = jax.jit(gated_delta.summarize, static_argnames=("rule", "chunk"))


def every_form(inputs, rule):
    yield recurrent(*inputs, rule=rule)
    yield by_steps(*inputs, rule=rule)
    for chunk, group in CHUNKS:
        yield chunked(*inputs, rule=rule, chunk=chunk, group=group)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    beta_max=st.sampled_from((1.0, 2.0)),
    decay=st.sampled_from((0.0, 0.05, 1.0, 8.0)),
    alike=st.sampled_from((0.0, 0.9, 0.999)),
    lengths=st.tuples(*[st.integers(0, T)] * B),
)
def test_every_form_is_the_rule(rule, seed, beta_max, decay, alike, lengths):
    """recurrent, step and chunked in chunks and groups of any size agree with the formulas in
    float64, also where only a prefix of each row is valid."""
    inputs = mask(draw(seed, beta_max=beta_max, decay=decay, alike=alike), 0, lengths)
    expected = oracle(inputs, rule)
    for actual in every_form(inputs, rule):
        assert_agree(actual, expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_single_token_is_a_sequence(rule):
    """T = 1 works in every form."""
    inputs = draw(3, T=1)
    for actual in (recurrent(*inputs, rule=rule), chunked(*inputs, rule=rule)):
        assert_agree(actual, oracle(inputs, rule))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), first=st.tuples(*[st.integers(0, T)] * B))
def test_tokens_may_be_split_anywhere(seed, first):
    """Row by row, tokens before `first` and then the rest leave what all at once leave."""
    inputs = draw(seed)
    for form in (recurrent, functools.partial(chunked, chunk=4)):
        form = functools.partial(form, rule="gated_delta")
        out, state = form(*inputs)
        out_1, state_1 = form(*mask(inputs, 0, first))
        out_2, state_2 = form(*mask([*inputs[:5], state_1], first, T))
        before = np.arange(T)[None, :, None, None] < np.reshape(first, (-1, 1, 1, 1))
        assert_agree((np.where(before, out_1, out_2), state_2), (out, state))


@pytest.mark.parametrize("first", [1, 6])
def test_calls_may_be_split_anywhere(first):
    """The state of one call is where the next goes on, for lengths that no chunk divides."""
    *tokens, state = draw(5)
    out_1, state_1 = chunked(*(x[:, :first] for x in tokens), state)
    out_2, state_2 = chunked(*(x[:, first:] for x in tokens), state_1)
    expected = oracle([*tokens, state], "gated_delta")
    assert_agree((np.concatenate([out_1, out_2], 1), state_2), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.optimized
def test_masked_tokens_leave_the_state_bit_for_bit(rule):
    """beta = 0 and g = 0 is an exact no-op on S, whatever stands in q, k and v."""
    inputs = mask(draw(7), 0, [0, 0])
    for _, state in every_form(inputs, rule):
        assert_identical(state, inputs[-1])


def test_a_state_of_zeros_is_the_default():
    """Leaving the state out is starting from zeros."""
    *tokens, state = draw(8)
    zeros = jnp.zeros_like(state)
    first = [x[:, 0] for x in tokens]
    expected = oracle([*tokens, zeros], "gated_delta")
    assert_agree(recurrent(*tokens), expected)
    assert_agree(chunked(*tokens, chunk=4), expected)
    assert_agree(gated_delta.step(*first)[0], expected[0][:, 0])


@pytest.mark.parametrize("chunk", [16, 64])
def test_nearly_equal_keys_keep_the_precision(chunk):
    """64 keys that differ by a thousandth, written at full strength without decay."""
    inputs = draw(9, T=64, decay=0.0, alike=0.999)
    inputs[4] = jnp.full_like(inputs[4], 0.999)
    assert_agree(chunked(*inputs, chunk=chunk), oracle(inputs, "gated_delta"))


@pytest.mark.parametrize("g", [-50.0, -1e4])
def test_tokens_that_forget_everything(g):
    """Whole chunks of g = -50 and far below: right values, and no NaN in the gradients."""
    inputs = draw(10)
    inputs[3] = jnp.full_like(inputs[3], g)
    assert_agree(chunked(*inputs, rule="gated_delta", chunk=4), oracle(inputs, "gated_delta"))
    for gradient in gradients("gated_delta", 4)(*inputs):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("g", [-50.0, -1e4])
def test_weak_decays_keep_their_precision_beside_strong_ones(g):
    """A token that forgets everything does not blur the decays of the tokens around it."""
    inputs = draw(10, decay=0.05)
    strong = np.random.default_rng(0).uniform(size=inputs[3].shape) < 0.3
    inputs[3] = jnp.where(strong, g, inputs[3])
    actual, expected = gradients("gated_delta", 4)(*inputs), gradients("gated_delta", 0)(*inputs)
    assert_agree(actual, expected, GRADIENTS)
    for actual in every_form(inputs, "gated_delta"):
        assert_agree(actual, oracle(inputs, "gated_delta"))


@functools.cache
def gradients(rule, chunk, group=None):
    """Of a fixed random functional of outputs and state, by every input; chunk 0 is recurrent."""
    form = gated_delta.recurrent if chunk == 0 else functools.partial(
        gated_delta.chunked, chunk=chunk, group=group
    )  # fmt: skip

    def functional(*inputs):
        out, state = form(*inputs, rule=rule)
        weights = jax.random.normal(jax.random.key(1), out.shape)
        state_weights = jax.random.normal(jax.random.key(2), state.shape)
        return jnp.sum(out * weights) + jnp.sum(state * state_weights)

    return jax.jit(jax.grad(functional, argnums=range(6)))


@pytest.mark.parametrize(
    ("rule", "chunk", "group"),
    [
        ("gated_delta", 4, 1),
        ("gated_delta", 2, 7),
        ("gated_delta", None, None),
        ("gated_hebbian", 4, 3),
        *(pytest.param(rule, 4, 3, marks=pytest.mark.slow) for rule in ("delta", "hebbian")),
    ],
)
def test_gradients_are_those_of_the_recurrence(rule, chunk, group):
    """By q, k, v, g, beta and the initial state; masked rows and correlated keys included."""
    for seed, alike in ((11, 0.0), (12, 0.99)):
        inputs = mask(draw(seed, alike=alike, beta_max=2.0), 0, [T, 5])
        actual, expected = gradients(rule, chunk, group)(*inputs), gradients(rule, 0)(*inputs)
        assert_agree(actual, expected, GRADIENTS)


def kept_bytes(T, chunk, K=32, V=16, heads=2):
    """What the forward pass of one row keeps for the backward pass, inputs included."""
    x = jax.ShapeDtypeStruct((1, T, heads, K), jnp.float32)
    v, gate = jax.ShapeDtypeStruct((1, T, heads, V), jnp.float32), jax.ShapeDtypeStruct(
        (1, T, heads), jnp.float32
    )  # fmt: skip
    form = functools.partial(gated_delta.chunked, chunk=chunk, group=1)
    _, vjp = jax.eval_shape(functools.partial(jax.vjp, form), x, x, v, gate, gate)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))


def test_the_backward_pass_keeps_inputs_states_and_inverses():
    """Per token and head at most q, k, v and two gates, and per chunk a state and an inverse."""
    K, V, heads, chunk = 32, 16, 2, 8
    for T in (64, 256):
        allowed = 4 * heads * (T * (2 * K + V + 2) + T // chunk * (K * V + chunk * chunk))
        last_state, mask_of_g = 4 * heads * K * V, 4 * heads * T
        assert kept_bytes(T, chunk) <= allowed + last_state + mask_of_g


def test_memory_of_the_gradient_grows_linearly():
    """Temporary bytes of the compiled gradient, from 512 to 2048 tokens."""

    def temporary_bytes(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        gate = jax.ShapeDtypeStruct((1, T, 2), jnp.float32)

        def loss(q, k, v, g, beta):
            out, state = gated_delta.chunked(q, k, v, g, beta)
            return jnp.sum(out**2) + jnp.sum(state**2)

        grad = jax.jit(jax.grad(loss, argnums=range(5)))
        return grad.lower(x, x, x, gate, gate).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) <= 4.2 * temporary_bytes(512)


@pytest.mark.parametrize("rule", RULES)
def test_summarize_is_the_affine_map_of_its_tokens(rule):
    """S_out = M S_in + R for every S_in, with any chunk size."""
    inputs = draw(13, beta_max=2.0)
    for chunk in (4, None):
        M, R = summarize(*inputs[1:5], rule=rule, chunk=chunk)
        for seed in (1, 2):
            state = np.random.default_rng(seed).normal(size=inputs[5].shape)
            expected = oracle([*inputs[:5], state], rule)[1]
            assert_agree(np.asarray(M, np.float64) @ state + R, expected)


def test_summaries_compose_to_the_summary_of_both():
    """compose(first, second) is the map of the first tokens and then the second."""
    q, k, v, g, beta, state = draw(14)
    first, second = (summarize(*mask([q, k, v, g, beta, state], *span)[1:5])
                     for span in ((0, 5), (5, T)))  # fmt: skip
    M, R = gated_delta.compose(first, second)
    expected = oracle([q, k, v, g, beta, state], "gated_delta")[1]
    assert_agree(np.asarray(M, np.float64) @ np.asarray(state, np.float64) + R, expected)


def triangles(C, seed=0):
    """Strictly lower triangular matrices: random, and nearly all ones as of equal keys."""
    rng = np.random.default_rng(seed)
    alike = 0.999 - 0.002 * rng.uniform(size=(C, C))
    return jnp.asarray(np.tril([rng.uniform(-0.5, 0.5, (C, C)), alike], -1), jnp.float32)


inverse = jax.jit(triangular.unit_lower_inverse)


@pytest.mark.parametrize("C", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("form", [triangular.by_doubling, triangular.by_substitution])
def test_inverse_agrees_with_float64(C, form):
    """(I + A)^-1 for random triangles and for those of nearly equal keys; on TPU it runs by
    substitution."""
    A = triangles(C)
    for actual, a in zip(jax.jit(form)(A), np.asarray(A, np.float64), strict=True):
        assert_agree(actual, np.linalg.inv(np.eye(C) + a))


def test_inverse_has_the_gradient_of_a_dense_inverse():
    """Its own rule for the backward pass is autodiff of the inverse, below the diagonal."""
    A = triangles(32)
    cotangent = jax.random.normal(jax.random.key(0), A.shape)
    own = jax.vjp(inverse, A)[1](cotangent)[0]
    dense = jax.vjp(jax.jit(lambda A: jnp.linalg.inv(jnp.eye(32) + A)), A)[1](cotangent)[0]
    for actual, expected in zip(jnp.tril(own, -1), jnp.tril(dense, -1), strict=True):
        assert_agree(actual, expected, GRADIENTS)


def forms_to_lower():
    tokens, inputs = draw(15), draw(15)
    first = [x[:, 0] for x in tokens[:5]] + [tokens[5]]
    yield "recurrent", jax.jit(gated_delta.recurrent).lower(*inputs)
    yield "step", jax.jit(gated_delta.step).lower(*first)
    for chunk in (4, 64):
        form = functools.partial(gated_delta.chunked, chunk=chunk)
        yield f"chunked {chunk}", jax.jit(form).lower(*inputs)
        form = functools.partial(gated_delta.summarize, chunk=chunk)
        yield f"summarize {chunk}", jax.jit(form).lower(*inputs[1:5])
    yield "gradient", gradients("gated_delta", 4).lower(*inputs)
    yield "long gradient", gradients("gated_delta", 64).lower(*inputs)


def test_every_product_runs_at_the_highest_precision():
    """In all forms and in the gradient: no accelerator rounds S to bfloat16 or TF32."""
    for name, lowered in forms_to_lower():
        dots = dot_products(lowered)
        assert dots, name
        assert [line for line in dots if not is_highest(line)] == [], name


@pytest.mark.parametrize("form", [recurrent, chunked, by_steps])
def test_bfloat16_tokens_write_a_float32_state(form):
    """Inputs are rounded once, at the door: the state is that of float32 arithmetic on them."""
    *tokens, state = draw(16)
    tokens = [x.astype(jnp.bfloat16) for x in tokens]
    out, state_out = form(*tokens, state, rule="gated_delta")
    expected_out, expected = oracle([*tokens, state], "gated_delta")
    assert (out.dtype, state_out.dtype) == (jnp.bfloat16, jnp.float32)
    assert_agree(state_out, expected)
    assert_agree(out, expected_out, tol=2**-8)  # half a unit in the last place of bfloat16


MISFITS = {
    "query width": lambda q, k, v, g, beta, state: (q[..., :-1], k, v, g, beta, state),
    "tokens of v": lambda q, k, v, g, beta, state: (q, k, v[:, :-1], g, beta, state),
    "heads of g": lambda q, k, v, g, beta, state: (q, k, v, g[..., :1], beta, state),
    "heads of beta": lambda q, k, v, g, beta, state: (q, k, v, g, beta[..., :1], state),
    "heads of k": lambda q, k, v, g, beta, state: (
        *(jnp.repeat(x, 3, 2) for x in (q, k)), v, g, beta, state
    ),
    "rows of state": lambda q, k, v, g, beta, state: (q, k, v, g, beta, state[:1]),
    "no token": lambda *inputs: (*(x[:, :0] for x in inputs[:5]), inputs[5]),
    "transposed state": lambda q, k, v, g, beta, state: (q, k, v, g, beta, state.mT),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("form", [gated_delta.recurrent, gated_delta.chunked])
def test_shapes_that_do_not_fit_are_named(form, misfit):
    """A ValueError that shows the shapes, instead of a broadcast."""
    with pytest.raises(ValueError, match=r"got .*\("):
        form(*MISFITS[misfit](*draw(17)))


@pytest.mark.parametrize("form", [gated_delta.recurrent, gated_delta.chunked])
def test_an_unknown_rule_is_named(form):
    """It is not taken for one without a gate."""
    with pytest.raises(ValueError, match=r"rule: got 'gated_dleta'; .* nearest is 'gated_delta'"):
        form(*draw(18), rule="gated_dleta")


@pytest.mark.parametrize(
    "rule",
    [
        "gated_delta",
        "gated_hebbian",
        *(pytest.param(r, marks=pytest.mark.slow) for r in RULES[1::2]),
    ],
)
def test_detached_gradients_go_from_state_to_state_alone(rule):
    """With the same numbers, bit for bit: the state's gradient is that of the definition with all
    else held constant, and inputs have none; the output lets none through."""
    inputs = mask(draw(5), 0, (T, 9))
    form = functools.partial(chunked, rule=rule, chunk=4, group=3)
    detached = functools.partial(form, detached=True)
    assert_identical(detached(*inputs), form(*inputs))
    results, pull = jax.vjp(detached, *inputs)
    d_out, d_state = (jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(results))
    _, pull_state = jax.vjp(lambda state: recurrent(*inputs[:5], state, rule=rule)[1], inputs[5])
    *others, actual = pull((d_out, d_state))
    assert_agree(actual, *pull_state(d_state), GRADIENTS)
    assert all(not np.any(other) for other in others)
