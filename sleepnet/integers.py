"""Integers of any type, numbers and arrays, checked in one way everywhere.

Lengths, counts, passes, seeds and token ids may be Python's, NumPy's or JAX's integers. bool and
float are refused: a flag or a share in their place is a mistake.
"""

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_integer(
    name: str,
    value: Any,
    low: int | None = None,
    high: int | None = None,
    *,
    note: str = "",
    error: type[ValueError] = ValueError,
) -> int:
    """Return an integer of any type as a Python int.

    Args:
      name: of the argument, for the message.
      value: a Python or NumPy integer, or an integer array without axes that is not traced.
      low, high: the least and the greatest value allowed; None where there is no bound.
      note: what else the message says of the allowed values, such as " (config.window)".
      error: the class to raise.

    Raises:
      ValueError: the value is not an integer or out of its bounds; the message names it, what is
        allowed and the nearest choice.
    """
    number = _index(value)
    if number is not None and _clip(number, low, high) == number:
        return number
    shown, near = (repr(value), _nearest(value)) if number is None else (str(number), number)
    nearest = "" if near is None else f"; the nearest is {_clip(near, low, high)}"
    raise error(f"{name} must be an integer{_bounds(low, high)}{note}; got {shown}{nearest}")


def as_tuple(name: str, values: Any, count: int, low: int, high: int | None = None):
    """Return `count` integers of any type, such as an array, as a tuple of Python ints.

    Raises:
      ValueError: another number of values, or one that is not an integer within its bounds.
    """
    numbers = [_index(value) for value in values] if isinstance(values, Iterable) else [None]
    if len(numbers) != count or any(n is None or _clip(n, low, high) != n for n in numbers):
        raise ValueError(f"{name} must be {count} integers{_bounds(low, high)}; got {values}")
    return tuple(int(n) for n in numbers if n is not None)


def as_integers(name: str, values: Any):
    """Return integers as an array of the dtype that they came in; an empty list has no dtype.

    Raises:
      ValueError: they are not integers; the message names their dtype, and the first of them
        where they are NumPy's or a list.
    """
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} must be an array of integers; got nested lists of different lengths"
        ) from None
    dtype = array.dtype
    if isinstance(values, list | tuple):  # of which NumPy makes one dtype, whatever they hold
        elements = list(_flat(values))
        if any(isinstance(x, bool | np.bool_) for x in elements):
            dtype = np.dtype(bool)
        elif elements and dtype.kind in "Of" and all(isinstance(x, int) for x in elements):
            raise ValueError(
                f"{name} must be integers of at most 64 bits; got {max(elements, key=abs)}"
            )
    is_integer = jnp.issubdtype(dtype, jnp.integer) and dtype.kind != "m"  # a duration
    if is_integer or not array.size:
        return array
    first = f", beginning with {array.flat[0]}" if isinstance(array, np.ndarray) else ""
    raise ValueError(
        f"{name} must be integers; got {dtype} of shape {array.shape}{first}; convert them, "
        f"for example by x.astype(np.int32)"
    )


def to_int32(array):
    """Return integers as int32, of which one program is compiled whatever they came in.

    Check their values first: those beyond int32 wrap around. NumPy arrays are copied, for a device
    may read an array after the call that it was given to, when its owner writes to it again.
    """
    if isinstance(array, jax.Array) and array.dtype == jnp.int32 and not array.weak_type:
        return array
    return array.astype(np.int32)


def _index(value) -> int | None:
    """The Python int; None for what is not an integer."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _flat(values) -> Iterator[Any]:
    """Yield the elements of nested lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _nearest(value) -> int | None:
    """The integer nearest to a number of another type."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return round(number) if math.isfinite(number) and not isinstance(value, str) else None


def _clip(number: int, low: int | None, high: int | None) -> int:
    number = number if low is None else max(number, low)
    return number if high is None else min(number, high)


def _bounds(low: int | None, high: int | None) -> str:
    if low is None:
        return ""
    return f" of {low} or more" if high is None else f" in {low}..{high}"
