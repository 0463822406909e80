"""A function compiled before its first call, and as a rule only once."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Program:
    """A jitted function, compiled for arguments like those given; says so if it must be again."""

    def __init__(self, name: str, jitted: Any, like: tuple, on_notice: Callable[[str], None]):
        self._name, self._jitted, self._on_notice = name, jitted, on_notice
        self._compiled = self._compile(like)

    def __call__(self, *arguments):
        try:
            return self._compiled(*arguments)
        except TypeError as error:  # of the call: the program itself is no Python
            self._on_notice(f"the {self._name} is compiled AGAIN, which takes its time: {error}")
            self._compiled = self._compile(arguments)
            return self._compiled(*arguments)

    def _compile(self, arguments):
        began = time.perf_counter()
        compiled = self._jitted.lower(*arguments).compile()
        seconds = time.perf_counter() - began
        self._on_notice(f"the {self._name} compiled in {seconds:.1f} s{_memory(compiled)}")
        return compiled


def _memory(compiled) -> str:
    """What the program needs on a device, where the compiler says so."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return ""
    kept = sizes.argument_size_in_bytes
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    return f"; on a device it takes {(kept + new) / 2**20:,.0f} MiB, {kept / 2**20:,.0f} to begin"


def peak_memory() -> dict[str, int]:
    """The most bytes that a device of this process has held, where it tells."""
    here = (d for d in jax.devices() if d.process_index == jax.process_index())
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in here]
    known = [peak for peak in peaks if peak is not None]
    return {"peak_memory_bytes": max(known)} if known else {}
