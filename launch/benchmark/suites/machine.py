"""What this machine can do, measured among the calls that are held against it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_GEMM_SIZE = 2048
_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates by the median call.

    gemm: float32 FLOPs per second in a product of two 2048 x 2048 matrices.
    copy: bytes per second, read and written, when 256 MiB are changed in place.
    read: bytes per second when a matrix of 256 MiB is multiplied by a vector.
    """

    gemm: float
    copy: float
    read: float

    @classmethod
    def from_timings(cls, timings: dict) -> "Machine":
        gemm, copy, read = (timings["machine", name].median_ms / 1e3 for name in _CALLS)
        return cls(gemm=2 * _GEMM_SIZE**3 / gemm, copy=2 * _BYTES / copy, read=_BYTES / read)

    def row(self) -> dict:
        return {
            "GEMM GFLOP/s": self.gemm / 1e9,
            "copy GB/s": self.copy / 1e9,
            "read GB/s": self.read / 1e9,
        }


def machine_calls() -> dict:
    """Calls for `interleaved`, whose timings `Machine.from_timings` reads."""
    return {("machine", name): make() for name, make in _CALLS.items()}


def _gemm_call():
    x = jnp.ones((_GEMM_SIZE, _GEMM_SIZE), jnp.float32)
    return functools.partial(jax.jit(functools.partial(jnp.dot, precision="highest")), x, x)


def _copy_call():
    x = jnp.ones((_BYTES // 4,), jnp.float32)
    # In place, or the time would be that of fresh pages.
    change = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call():
        nonlocal x
        x = change(x)
        return x

    return call


def _read_call():
    x, matrix = jnp.ones(1024, jnp.float32), jnp.ones((1024, _BYTES // 4096), jnp.float32)
    return functools.partial(jax.jit(jnp.dot), x, matrix)


_CALLS = {"gemm": _gemm_call, "copy": _copy_call, "read": _read_call}
