"""The TPU kernel: the numbers of the local rule in interpret mode, a program for TPU, and a
refusal everywhere else. What it does on a TPU's own arithmetic no test here can show."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import minds
import numpy as np
import pytest
import waiting
from agreement import GRADIENTS, assert_agree
from reference import local_rule

import sleepnet
from sleepnet.evaluation.programs import Program
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import pallas_tpu

# B, T, key heads, value heads, K, V; rule; chunk. Nothing is a whole number of chunks.
CASES = {
    "one short chunk": ((2, 5, 1, 2, 8, 4), "gated_delta", None),
    "grouped heads": ((1, 70, 2, 4, 16, 24), "gated_delta", 32),
    "many heads": ((1, 37, 16, 16, 64, 128), "gated_delta", 16),  # two steps over heads
    "shared key head": ((1, 37, 1, 16, 128, 128), "delta", 16),
    "no correction": ((2, 37, 2, 2, 8, 8), "gated_hebbian", 16),
    "no gate": ((1, 140, 2, 2, 8, 8), "hebbian", 128),
}
each = pytest.mark.parametrize(("shape", "rule", "chunk"), CASES.values(), ids=CASES)


def draw(shape, dtype=jnp.float32):
    B, T, Hk, H, K, V = shape
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, B, T, Hk, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(B, T, H, V))
    g = -0.3 * rng.exponential(size=(B, T, H))
    beta = rng.uniform(0.01, 0.999, size=(B, T, H))
    state = rng.normal(size=(B, H, K, V))
    return [jnp.asarray(x, dtype) for x in (q, k, v)] + [
        jnp.asarray(x, jnp.float32) for x in (g, beta, state)
    ]


def oracle(inputs, rule):
    """In float64, token by token; key heads repeated for the value heads that they serve."""
    q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in inputs)
    rows = zip(q, k, v, g, beta, state, strict=True)
    return tuple(
        np.stack(x) for x in zip(*(local_rule(*row, rule=rule) for row in rows), strict=True)
    )


interpreted = jax.jit(
    functools.partial(pallas_tpu.chunked, interpret=True), static_argnames=("rule", "chunk")
)


@each
def test_numbers_are_those_of_the_rule(shape, rule, chunk):
    inputs = draw(shape)
    assert_agree(interpreted(*inputs, rule=rule, chunk=chunk), oracle(inputs, rule))


@pytest.mark.parametrize(
    ("shape", "rule"),
    [((1, 256, 2, 2, 128, 64), "gated_delta"), ((1, 100, 1, 4, 32, 128), "hebbian")],
)
def test_its_own_account_is_of_the_products_that_it_takes(shape, rule):
    """XLA cannot look into the kernel on TPU; in interpret mode its products can be counted."""
    program = interpreted.lower(*draw(shape), rule=rule, chunk=64).compile()
    B, T, Hk, H, K, V = shape
    float32 = jnp.dtype("float32")
    told = pallas_tpu.cost(B, T, Hk, H, K, V, float32, float32, rule=rule, size=64)
    running_sums = 2 * 2 * B * H * -(-T // 64) * 64**2  # taken before the kernel
    assert Program(program).dot_flops == told.flops + running_sums


def test_bfloat16_is_widened_and_not_summed():
    """Operands in bfloat16 give the float32 state of the same numbers; only the output is
    rounded, to bfloat16's eight bits."""
    shape, rule, chunk = CASES["grouped heads"]
    inputs = draw(shape, jnp.bfloat16)
    out, state = interpreted(*inputs, rule=rule, chunk=chunk)
    expected_out, expected_state = oracle(inputs, rule)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_agree(state, expected_state)
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        expected_out,
        rtol=2**-8,
        atol=1e-5 * np.abs(expected_out).max(),
    )


def test_gradients_are_those_of_the_rule():
    shape, rule, chunk = CASES["grouped heads"]
    inputs = draw(shape)

    def gradients(form):
        def loss(*inputs):
            out, state = form(*inputs, rule=rule)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(loss, range(6)))(*inputs)

    kernel = functools.partial(pallas_tpu.chunked, chunk=chunk, interpret=True)
    assert_agree(gradients(kernel), gradients(gated_delta.recurrent), GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grouped heads", "no correction"])
def test_detached_gradients_are_those_of_the_rule(case):
    """From state to state, with the numbers of the kernel."""
    shape, rule, chunk = CASES[case]
    inputs = draw(shape)

    def gradients(form):
        def loss(*inputs):
            out, state = form(*inputs, rule=rule, detached=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(loss, range(6)))(*inputs)

    kernel = functools.partial(pallas_tpu.chunked, chunk=chunk, interpret=True)
    assert_agree(gradients(kernel), gradients(gated_delta.chunked), GRADIENTS)


def test_a_mind_with_the_kernel_is_the_same_mind(monkeypatch):
    """A window woken and slept over in three passes with backend="pallas"."""
    monkeypatch.setattr(
        pallas_tpu, "chunked", functools.partial(pallas_tpu.chunked, interpret=True)
    )
    config = dataclasses.replace(minds.HARD, backend="pallas", chunk=16)

    def live(config):
        params = minds.params(dataclasses.replace(config, backend="xla"))
        logits, state = sleepnet.wake(
            params, sleepnet.init_state(config, minds.B), minds.stream()[:, 0], config=config
        )
        return logits, sleepnet.sleep(params, state, config=config, passes=3).fast_weights

    assert_agree(live(config), live(minds.HARD))


def test_a_program_for_tpu_is_one_kernel():
    """Lowered for TPU there is one Mosaic call and no loop over chunks."""
    program = jax.jit(pallas_tpu.chunked).trace(*draw((1, 256, 2, 2, 128, 128)))
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 1
    assert "stablehlo.while" not in text


def test_another_platform_is_refused_when_the_program_is_made():
    with pytest.raises(ValueError, match=r"backend: 'pallas' .* TPU, .* for cpu; allowed .* 'xla'"):
        jax.jit(pallas_tpu.chunked).lower(*draw((1, 5, 1, 2, 8, 4)))
    config = dataclasses.replace(minds.TINY, backend="pallas")
    with pytest.raises(ValueError, match="backend: 'pallas'"):
        minds.woken(config, state=sleepnet.init_state(config, minds.B))


def test_a_program_of_the_launcher_refuses_it_before_anything_compiles(tmp_path):
    command = [sys.executable, "-m", "launch.train", "--config=experiments/depo_small.py"]
    command += ["--config.model.backend=pallas", f"--workdir={tmp_path / 'run'}"]
    done = waiting.run(*command)
    assert done.returncode == 2
    assert "model.backend='pallas'" in done.stderr and "allowed here: xla" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(backend="palas"), "backend: got 'palas'; allowed: xla, pallas; .* 'pallas'"),
        (dict(backend="pallas", chunk=256), "chunk: .* 16, 32, 64, 128; got 256; .* 128"),
        (dict(backend="pallas", chunk=8), "chunk: .* got 8; the nearest is 16"),
    ],
)
def test_bad_choices_are_named(chosen, message):
    with pytest.raises(sleepnet.ConfigError, match=message):
        dataclasses.replace(minds.TINY, **chosen)


def test_a_dtype_that_the_kernel_does_not_take_is_named():
    inputs = draw((1, 5, 1, 2, 8, 4))
    inputs[1] = inputs[1].astype(jnp.float16)
    with pytest.raises(ValueError, match=r"dtype of k: got 'float16'; allowed: float32, bfloat16"):
        pallas_tpu.chunked(*inputs)
