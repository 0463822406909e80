"""What sleeping costs: operations, memory and precision, read from the programs themselves.

Operations are counted in the traced program, with loops written out, before XLA sees it: such
a count holds on every device.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import dot_products, is_highest
from minds import params, stream

import sleepnet
from sleepnet.cycle import cache, slices
from sleepnet.nn import flops

CORE_AND_CODA = sleepnet.ModelConfig(
    vocab_size=16, pattern="[AG]G", d_model=32, window=16, num_heads=2, unroll=True
)


@functools.cache
def sleep_flops(passes):
    config = CORE_AND_CODA
    lowered = jax.jit(functools.partial(sleepnet.sleep, config=config, passes=passes)).lower(
        params(config), sleepnet.init_state(config, 2)
    )
    return (lowered.cost_analysis() or {}).get("flops", 0.0)


def test_one_pass_costs_only_the_eviction():
    """N = 1 behind a wake pass multiplies nothing."""
    assert sleep_flops(1) == 0


def test_four_passes_run_the_core_three_times_more():
    """Every pass costs the core once, the wake pass is the first of the N, and the coda, run
    once for its fast weights alone, comes on top."""
    core = flops.part_flops(CORE_AND_CODA, "core", 16) * 2  # two rows
    coda = flops.part_flops(CORE_AND_CODA, "coda", 16) * 2
    per_pass = sleep_flops(3) - sleep_flops(2)
    assert sleep_flops(4) - sleep_flops(2) == pytest.approx(2 * per_pass, rel=0.02)
    assert per_pass == pytest.approx(core, rel=0.1)  # norms and gates are on top
    for passes in (2, 3, 4):
        rest = sleep_flops(passes) - (passes - 1) * per_pass
        assert 0 < rest < coda


BIG = sleepnet.ModelConfig(
    vocab_size=64, pattern="AG", d_model=128, window=32, num_heads=4, unroll=True
)
GROUPED = dataclasses.replace(
    BIG,
    pattern="G[A]G",
    eviction="sliding",
    num_kv_heads=2,
    num_key_heads=2,
    num_value_heads=4,
    mlp="swiglu",
)


def program_flops(config, window_passes):
    """Of one row's rollout with every position scored."""
    W, L = len(window_passes), config.window
    tokens = np.zeros((1, W, L), np.int32)
    lowered = jax.jit(
        functools.partial(sleepnet.rollout, config=config, window_passes=window_passes)
    ).lower(params(config), tokens, None, tokens, np.ones((1, W, L), bool))
    return lowered.cost_analysis()["flops"]


def counted_flops(config, window_passes):
    return flops.rollout_flops(config, window_passes, (config.window,) * len(window_passes))


@pytest.mark.parametrize("config", [BIG, GROUPED], ids=["AG", "G[A]G"])
def test_counted_flops_are_those_of_the_program(config):
    """The formula leaves out norms, gates and softmax, below 5% at d_model 128. Where every
    output is read, and per further pass, the two agree; what the last pass need not compute
    (behind its last write to a fast weight) the formula counts and the program drops."""
    assert program_flops(config, (1, 1)) == pytest.approx(counted_flops(config, (1, 1)), rel=0.05)
    further = [f(config, (4, 1)) - f(config, (3, 1)) for f in (program_flops, counted_flops)]
    assert further[0] == pytest.approx(further[1], rel=0.05)
    whole_window = counted_flops(config, (1,))
    assert 0 <= counted_flops(config, (3, 1)) - program_flops(config, (3, 1)) < whole_window


def gradient_flops(config, passes):
    """Of one row: two windows that sleep, and one of which every position is scored."""
    L = config.window
    tokens, mask = np.zeros((1, 3, L), np.int32), np.array([[[False] * L] * 2 + [[True] * L]])

    def loss(params):
        result = sleepnet.rollout(
            params, tokens, None, tokens, mask,
            config=config, window_passes=(passes, passes, 1), scored_per_window=(0, 0, L),
        )  # fmt: skip
        return jnp.sum(result.nll_BWL)

    return jax.jit(jax.grad(loss)).lower(params(config)).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("k", "forward_passes"), [(1, 1), pytest.param(None, 3, marks=pytest.mark.slow)]
)
def test_a_pass_that_no_gradient_reaches_costs_one_forward_pass(k, forward_passes):
    """And the map of the fast weights, at d_model 128 below 5%; one that they do reach costs three.
    In the program of the gradient as by the formula."""
    config = dataclasses.replace(BIG, gradient_passes=k)
    plans = [((N, N, 1), (0, 0, config.window)) for N in (2, 3)]
    fewer, more = (flops.training_flops(config, *plan) for plan in plans)
    further = gradient_flops(config, 3) - gradient_flops(config, 2)
    assert further == pytest.approx(more - fewer, rel=0.05)
    one_pass = 2 * flops.part_flops(config, "core", config.window)
    assert further == pytest.approx(forward_passes * one_pass, rel=0.05)


LEAN = sleepnet.ModelConfig(
    vocab_size=16, pattern="G", d_model=16, window=8, num_heads=2, passes=2, remat="window"
)


@functools.cache
def gradient_bytes(config, windows):
    """Temporary memory of the compiled gradient of a rollout of two rows."""
    shape = (2, windows, config.window)
    tokens, mask = np.zeros(shape, np.int32), np.ones(shape, bool)

    def loss(params):
        result = sleepnet.rollout(
            params, tokens, None, tokens, mask,
            config=config, window_passes=(config.passes,) * windows,
        )  # fmt: skip
        return jnp.sum(result.nll_BWL)

    compiled = jax.jit(jax.grad(loss)).lower(params(config)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def crossing_bytes(config):
    """Of all that crosses a boundary, for two rows."""
    state = sleepnet.init_state(config, 2)
    return sum(x.nbytes for x in jax.tree.leaves((state.fast_weights, state.window.carried)))


def growth(config, fewer, more):
    """Bytes per window more, over the bytes that cross a boundary."""
    grown = gradient_bytes(config, more) - gradient_bytes(config, fewer)
    return grown / (more - fewer) / crossing_bytes(config)


@pytest.mark.slow
def test_a_window_more_costs_the_gradient_only_what_crosses_its_boundary():
    """remat="window": from 4 to 16 windows, memory grows by at most 3 times the bytes of fast
    weights per window; less would be to forget one."""
    assert 1 <= growth(LEAN, 4, 16) <= 3


@pytest.mark.slow
def test_without_recomputing_every_window_keeps_its_activations():
    """remat="none": the same growth is more than 20 times as large."""
    assert growth(dataclasses.replace(LEAN, remat="none"), 4, 16) > 20 * growth(LEAN, 4, 16)


@pytest.mark.slow
def test_memory_of_kept_keys_grows_as_slowly():
    """The same with attention and sliding eviction, at 4, 8 and 16 windows."""
    config = dataclasses.replace(LEAN, pattern="AG", eviction="sliding")
    for fewer, more in ((4, 8), (8, 16)):
        assert 1 <= growth(config, fewer, more) <= 3
    assert growth(dataclasses.replace(config, remat="none"), 4, 16) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("k", "low", "high"), [(1, 1, 3), (None, 20, 1000)])
def test_a_pass_that_no_gradient_reaches_keeps_a_map_of_each_fast_weight(k, low, high):
    """From 3 to 11 passes, the gradient's memory grows by at most 3 times the bytes of the maps
    (less than once would be to forget one), and by more than 20 times where gradients reach all."""
    few, many = (
        gradient_bytes(dataclasses.replace(LEAN, passes=N, gradient_passes=k), 2) for N in (3, 11)
    )
    assert low <= (many - few) / 8 / crossing_bytes(LEAN) <= high  # K = V


def programs(config):
    """A wake, a sleep, and the gradient of a rollout through both."""
    state, tokens = sleepnet.init_state(config, 3), stream()[:, :2]

    def wake_and_sleep(params, state):
        _, state = sleepnet.wake(params, state, tokens[:, 0], config=config)
        _, state = sleepnet.wake(params, state, tokens[:, 1, :1], config=config)
        return sleepnet.sleep(params, state, config=config)

    def loss(params):
        result = sleepnet.rollout(params, tokens, None, tokens, tokens > 0, config=config)
        return jnp.sum(result.nll_BWL)

    yield jax.jit(wake_and_sleep).lower(params(config), state)
    yield jax.jit(jax.grad(loss)).lower(params(config))


def test_whatever_touches_a_fast_weight_is_exact_in_every_program():
    """With matmul_precision="default" only products with a matrix of parameters run as the
    device likes. Those have no batch axis; all others of a G block must be HIGHEST."""
    config = dataclasses.replace(CORE_AND_CODA, pattern="G", passes=2, unroll=False)
    for lowered in programs(config):
        batched = [line for line in dot_products(lowered) if "batching_dims" in line]
        assert batched
        assert [line for line in batched if not is_highest(line)] == []


def test_a_sleep_is_one_program():
    """All passes and the eviction are dispatched once, and nothing asks the host meanwhile."""
    config = dataclasses.replace(CORE_AND_CODA, passes=3, unroll=False)
    args = params(config), sleepnet.init_state(config, 2)
    sleep = functools.partial(sleepnet.sleep, config=config, rows_B=np.array([True, False]))
    assert [equation.primitive.name for equation in jax.make_jaxpr(sleep)(*args).eqns] == ["jit"]
    assert "callback" not in jax.jit(sleep).lower(*args).as_text()


def test_in_bfloat16_only_the_rule_computes_in_float32():
    """Every product of a sleep, and of a slice of one, takes bfloat16 from features and matrices,
    or is one of the rule's: float32 and exact. What crosses is kept likewise."""
    config = dataclasses.replace(CORE_AND_CODA, passes=3, unroll=False, compute_dtype="bfloat16")
    state, run = sleepnet.init_state(config, 2), functools.partial(sleepnet.sleep, config=config)
    one_piece = jax.jit(run).lower(params(config), state)
    one_slice = slices._slice.lower(
        params(config), state.window, np.int32(0), config=config, part="core", tokens=8
    )
    for lowered in (one_piece, one_slice):
        products = [operand_dtypes(line) for line in dot_products(lowered)]
        assert set(products) == {("bf16", "bf16", "DEFAULT"), ("f32", "f32", "HIGHEST")}
    slept = jax.eval_shape(run, params(config), state)
    assert dtypes(slept.fast_weights) == {"float32"}
    assert dtypes(cache.fast_weights_of(slept.window.blocks)) == {"float32"}
    attention, delta = slept.window.blocks["core"]
    assert dtypes((attention, delta.tail, slept.window.features_BLD)) == {"bfloat16"}


def operand_dtypes(line):
    """Of a product in the text of a program, with its precision."""
    precision, left, right = re.search(
        r"precision = \[(\w+), \1\].*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", line
    ).groups()
    return left, right, precision


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_precision_of_everything_else_is_a_choice():
    """matmul_precision="highest" reaches every product of every program."""
    config = dataclasses.replace(
        CORE_AND_CODA, pattern="AG", passes=2, unroll=False, matmul_precision="highest"
    )
    for lowered in programs(config):
        assert [line for line in dot_products(lowered) if not is_highest(line)] == []
