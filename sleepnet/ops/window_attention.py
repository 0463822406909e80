"""Softmax attention of new tokens over the window: what is cached, and each other.

Keys and values come as segments, a sequence of (keys_BGSD, values_BGSD, mask_BTS): the
ones kept from earlier windows, those cached in this window, and those of this call. The
scores of all segments share one softmax, so no segment is ever copied into another.
G key/value heads serve H query heads, H / G each.
"""

import math

import jax
import jax.numpy as jnp

# Lower than any score, and yet finite: a query that may see nothing gives no NaN.
MASKED = -1e30


def full(q_BTHD, segments, *, precision=None):
    """Attends T queries over all segments.

    Args:
      q_BTHD: queries, already rotated, as are the keys.
      segments: (keys_BGSD, values_BGSD, mask_BTS) each; True where a query may look.
      precision: of the two products.

    Returns:
      out_BTHD in the dtype of the values. Scores and softmax are float32.
    """
    B, T, H, D = q_BTHD.shape
    G = segments[0][0].shape[1]
    q_BGQD = _heads_first(q_BTHD / math.sqrt(D), G)  # Q: the queries of all heads of a group
    scores = [
        jnp.where(
            mask_BTS[:, None, None],
            jnp.einsum(
                "bgqd,bgsd->bgqs", q_BGQD, keys, precision=precision,
                preferred_element_type=jnp.float32,
            ).reshape(B, G, H // G, T, -1),
            MASKED,
        )
        for keys, _, mask_BTS in segments
    ]  # fmt: skip
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = weights.reshape(B, G, -1, weights.shape[-1])
    out, start = jnp.zeros((), segments[0][1].dtype), 0
    for _, values, mask_BTS in segments:
        part = weights[..., start : start + mask_BTS.shape[-1]].astype(values.dtype)
        out += jnp.einsum("bgqs,bgsd->bgqd", part, values, precision=precision)
        start += mask_BTS.shape[-1]
    return jnp.moveaxis(out.reshape(B, H, T, D), 1, 2)


def _heads_first(q_BTHD, G):
    B, _, _, D = q_BTHD.shape
    return jnp.moveaxis(q_BTHD, 2, 1).reshape(B, G, -1, D)


def step(q_BHD, segments, *, precision=None):
    """`full` for one query per row, without the axis T; the masks are (B, S)."""
    with_time = [(keys, values, mask[:, None]) for keys, values, mask in segments]
    return full(q_BHD[:, None], with_time, precision=precision)[:, 0]
