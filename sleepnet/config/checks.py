"""Validate frozen config dataclasses: errors name the field, its value and the nearest choice."""

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from sleepnet.integers import as_integer

MAX_SEED = 2**63 - 1
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # in size, that float32 holds
FOLLOWS: Any = None  # the default of a field that is set from others when the config is made


class ConfigError(ValueError):
    """An invalid field; the message names it, what is allowed and the nearest choice."""


def normalize(config):
    """Convert field values to Python's types; raise ConfigError for values of another type.

    Lists become tuples, and NumPy's numbers Python's, so that a config is hashable, can be a
    static argument, and can be written as JSON.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is FOLLOWS:
            continue
        value = tuple(value) if isinstance(value, list) else value
        value = _plain(field.name, value, typing.get_origin(field.type) or field.type)
        if isinstance(value, tuple):
            kind, *_ = typing.get_args(field.type)
            value = tuple(_plain(f"each of {field.name}", element, kind) for element in value)
        object.__setattr__(config, field.name, value)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """The value as Python's own type, if it is of this kind; an integer may stand for a float."""
    if kind is int:
        return as_integer(name, value, error=ConfigError)
    if kind is float:
        return _plain_float(name, value)
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {value!r}")
    return value


def _plain_float(name: str, value: Any) -> float:
    if isinstance(value, float | np.floating):
        value = float(value)
    else:
        try:
            value = as_integer(name, value)
        except ValueError:
            raise ConfigError(f"{name} must be of type float; got {value!r}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite; got {value}")
    if value and not LEAST_FLOAT <= abs(value) <= MOST_FLOAT:
        near = min(max(abs(value), LEAST_FLOAT), MOST_FLOAT) * (1 if value > 0 else -1)
        raise ConfigError(
            f"{name} must be 0, or between {LEAST_FLOAT:.3g} and {MOST_FLOAT:.3g} in size, which "
            f"float32 holds; got {value}; the nearest is {near:.3g}"
        )
    return value


def paths(config, *names: str):
    """Expand fields that hold a path or several, and refuse URLs."""

    def local(name, given):
        try:
            return local_path(given)
        except ConfigError as error:
            raise ConfigError(f"{name}={given!r}: {error}") from None

    for name in names:
        value = getattr(config, name)
        several = isinstance(value, tuple)
        paths = tuple(local(name, each) for each in value) if several else local(name, value)
        object.__setattr__(config, name, paths)


def one_of(config, name: str, allowed: Iterable[Any]):
    """Raise ConfigError unless the field has one of the allowed values."""
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(choices(name, value, allowed))


def positive(config, *names: str):
    """Raise ConfigError unless all fields are above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            kind = next(field.type for field in dataclasses.fields(config) if field.name == name)
            near = "; the nearest is 1" if kind is int else ""
            raise ConfigError(f"{name} must be above 0; got {getattr(config, name)}{near}")


def positive_if_given(config, *names: str):
    """Raise ConfigError unless all fields are above 0 or None."""
    positive(config, *(name for name in names if getattr(config, name) is not None))


def not_negative(config, *names: str):
    """Raise ConfigError unless all fields are 0 or more."""
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(
                f"{name} must be 0 or more; got {getattr(config, name)}; the nearest is 0"
            )


def fraction(config, name: str):
    """Raise ConfigError unless the field lies strictly between 0 and 1."""
    value = getattr(config, name)
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must lie strictly between 0 and 1; got {value}")


def in_range(config, name: str, low: float, high: float):
    """Raise ConfigError unless the field lies in low..high."""
    value = getattr(config, name)
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise ConfigError(f"{name} must lie in {low}..{high}; got {value}; the nearest is {near}")


def ordered_pair(config, name: str, low: float):
    """Raise ConfigError unless the field is a pair with low <= first <= second and 0 < second."""
    value = getattr(config, name)
    if len(value) != 2 or not low <= value[0] <= value[1] or value[1] <= 0:
        raise ConfigError(f"{name} must be (low, high) with {low} <= low <= high; got {value}")


def divides(config, small: str, large: str):
    """Raise ConfigError unless one field divides another."""
    a, b = getattr(config, small), getattr(config, large)
    if b % a:
        near = min((d for d in range(1, b + 1) if b % d == 0), key=lambda d: abs(d - a))
        raise ConfigError(f"{small} must divide {large}={b}; got {a}; the nearest is {near}")


def default(config, name: str, value: Any):
    """Set the field if it is None."""
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)


def nearest(value: Any, allowed: Iterable[Any]) -> str:
    """Return the allowed value whose name is most similar to that of `value`."""
    names = [str(name) for name in allowed]
    return difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]


def choices(name: str, value: Any, allowed: Iterable[Any], what: str | None = None) -> str:
    """Return the message for a value that is not allowed."""
    allowed = list(allowed)
    reason = what or f"got {value!r}"
    listed = ", ".join(str(choice) for choice in allowed)
    return f"{name}: {reason}; allowed: {listed}; the nearest is {nearest(value, allowed)!r}"


# One slash is what pathlib leaves; of other names it may be a file and its argument, or a host. One
# letter is a Windows drive.
_URL = re.compile(r"([a-z][a-z0-9+.-]+(?=://)|gs|gcs|s3|file):/+", re.IGNORECASE)


def local_path(given: str) -> str:
    """Expand ~ and ~user, and refuse what no file of this machine can be called.

    Returns:
      The path, or what is no path but a name of its own (as tokenizer="bytes"), unchanged.

    Raises:
      ConfigError: a URL, an empty path, or the home of a user that is not known. The message lacks
        the value and who gave it, for callers to put in front.
    """
    if not given:
        raise ConfigError("the path is empty; leave it out, or name a file or folder")
    if match := _URL.match(given):
        raise ConfigError(_no_url(match[1].lower(), given[match.end() :]))
    if not given.startswith("~"):
        return given
    user, path = given[1:].partition("/")[0], os.path.expanduser(given)
    if path == given or (not user and os.environ.get("HOME") == ""):
        reason = f"there is no user {user!r} here" if user else "your home is unknown (see HOME)"
        raise ConfigError(f"{reason}; give the path from the root, such as /home/NAME/...")
    return path


def _no_url(scheme: str, rest: str) -> str:
    """Return the message for a URL, with the path that may take its place."""
    if scheme == "file":
        return f"a URL is not a path; the nearest is /{rest}"
    bucket = rest.partition("/")[0] or "BUCKET"
    how = f" (gcsfuse --implicit-dirs {bucket} /mnt/{bucket})" if scheme in ("gs", "gcs") else ""
    return (
        f"a URL is not a path: mount what {scheme}:// names{how} and give the path there, such as "
        f"/mnt/{rest or bucket}"
    )
