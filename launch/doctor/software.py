"""Versions: of what is installed, and whether it fits together."""

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from launch.doctor.findings import Finding, ok, wrong

SHOWN = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Whose requirements must be met; jax names the jaxlib and libtpu that it takes.
WHOSE = ("sleepnet", "jax")
EXTRAS = ("tpu", "cuda13")
OLDEST_PYTHON = (3, 11)


def versions() -> dict[str, str]:
    """Of Python and of all packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in SHOWN:
        if (version := _version(name)) is not None:
            found[name] = version
    return found


def check() -> list[Finding]:
    problems = [_unmet(name) for name in WHOSE]
    unmet = [line for lines in problems for line in lines]
    if sys.version_info < OLDEST_PYTHON:
        unmet.append(f"python is {platform.python_version()}, and 3.11 is the oldest that will do")
    if unmet:
        return [wrong("software", "; ".join(unmet), "pip install -e . with .ci/constraints-*.txt")]
    return [ok("software", ", ".join(f"{name} {version}" for name, version in versions().items()))]


def _unmet(name: str) -> list[str]:
    """What a package requires and is not there, or not in a version that fits."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return [] if name == "sleepnet" else [f"{name} is not installed"]
    return list(mismatches(name, requirements, _version))


def mismatches(name: str, requirements: Iterable[str], version_of) -> Iterable[str]:
    """Lines for each requirement of `name` that `version_of` does not meet.

    What belongs to an extra, as libtpu to jax[tpu], may be missing; where it is there, it must fit.
    """
    for required in map(Requirement, requirements):
        belongs = [_applies(required, extra) for extra in ("", *EXTRAS)]
        optional = not belongs[0]
        if not any(belongs):
            continue
        version = version_of(required.name)
        if version is None:
            if not optional:
                yield f"{required.name} is not installed, and {name} needs it"
        elif not required.specifier.contains(version, prereleases=True):
            yield f"{required.name} is {version}, and {name} needs {required.specifier}"


def _applies(required: Requirement, extra: str) -> bool:
    return required.marker is None or required.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
