"""What this machine can do, measured among the calls that are held against it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sleepnet.evaluation.latency import Timing

_GEMM_SIZE = 2048
_COPY_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates by the median call.

    gemm: float32 FLOPs per second in a product of two 2048 x 2048 matrices.
    bandwidth: bytes per second, read and written, when 256 MiB are changed in place.
    """

    gemm: float
    bandwidth: float

    @classmethod
    def from_timings(cls, timings: dict) -> "Machine":
        gemm, copy = (timings["machine", name].median_ms / 1e3 for name in ("gemm", "copy"))
        return cls(gemm=2 * _GEMM_SIZE**3 / gemm, bandwidth=2 * _COPY_BYTES / copy)

    def row(self) -> dict:
        return {"GEMM GFLOP/s": self.gemm / 1e9, "copy GB/s": self.bandwidth / 1e9}


def machine_calls() -> dict:
    """Calls for `interleaved`, whose timings `Machine.from_timings` reads."""
    return {("machine", "gemm"): _gemm_call(), ("machine", "copy"): _copy_call()}


def share(part: Timing, whole_s: float) -> float:
    """The fraction of a bound of `whole_s` seconds that a call reaches."""
    return whole_s / (part.median_ms / 1e3)


def _gemm_call():
    x = jnp.ones((_GEMM_SIZE, _GEMM_SIZE), jnp.float32)
    return functools.partial(jax.jit(functools.partial(jnp.dot, precision="highest")), x, x)


def _copy_call():
    x = jnp.ones((_COPY_BYTES // 4,), jnp.float32)
    # In place, or the time would be that of fresh pages.
    change = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call():
        nonlocal x
        x = change(x)
        return x

    return call
