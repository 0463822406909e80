"""Products in full float32, whatever the platform's default.

Left to the platform, a float32 product is bfloat16 multiplies on TPU and TF32 on Hopper: too
little for fast weights, which every later token reads.
"""

import functools

import jax.numpy as jnp
from jax import lax

einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)
