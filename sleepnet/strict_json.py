"""JSON that every reader takes: numbers that are not finite are strings in it.

Python writes them as bare NaN and Infinity, which are not JSON, and other readers refuse the whole
file. Here they are the strings "NaN", "Infinity" and "-Infinity", and `loads` returns them as
numbers, even if they were strings before; other strings stay as they are. `as_strings` makes
strings of them again, for values such as a config, in which every number is finite.
"""

import json
import math
from typing import Any

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **options) -> str:
    """Return strict JSON, for finite numbers the text of `json.dumps` with these options."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # only then is all of it gone through
        return json.dumps(as_strings(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return the value that `dumps` was given; bare NaN and Infinity are read, too.

    Keys stay strings.

    Raises:
      ValueError: the text is not JSON.
    """
    return _as_numbers(json.loads(text))


def as_strings(value: Any) -> Any:
    """Return the value with the names of its numbers that are not finite, also where they are keys.

    Tuples become lists.
    """
    if isinstance(value, dict):
        value = {_named(key): element for key, element in value.items()}
    return _inside(_named(value), as_strings)


def _named(value):
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _as_numbers(value):
    if isinstance(value, str):
        return _NUMBERS.get(value, value)
    return _inside(value, _as_numbers)


def _inside(value, change):
    if isinstance(value, dict):
        return {key: change(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [change(element) for element in value]
    return value
