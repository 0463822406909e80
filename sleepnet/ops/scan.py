"""One loop for blocks, passes, windows and chunks: scanned, or written out."""

import jax
import jax.numpy as jnp
from jax import lax


def loop(body, carry, xs=None, *, length: int, unroll: bool, reverse: bool = False):
    """`lax.scan(body, carry, xs, length, reverse)`, written out if asked or if it runs only once.

    Written out, small models run faster on CPU and the compiler's FLOP count, which takes the
    body of a loop once, is true. Scanned, the program stays small however deep the model.
    """
    if not unroll and length > 1:
        return lax.scan(body, carry, xs, length=length, reverse=reverse)
    outs: list = [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        carry, outs[i] = body(carry, jax.tree.map(lambda x: x[i], xs))  # noqa: B023
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)
