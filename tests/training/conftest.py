"""Training goes through optax, whose schedules mix dtypes: strict promotion ends there."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
