"""What a measurement ran on."""

import os
import pathlib
import platform
from typing import Any

import jax

_CPU_INFO = pathlib.Path("/proc/cpuinfo")  # of Linux


def describe_machine() -> dict[str, Any]:
    """Processor, cores, JAX's devices and versions, for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
