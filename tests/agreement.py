"""What agreement means: max|difference| <= tol * max|reference|, leaf by leaf."""

import re

import jax
import numpy as np

VALUES = 1e-5  # outputs, states and logits in float32
GRADIENTS = 1e-4


def assert_agree(actual, reference, tol=VALUES):
    """Leaves of equal trees agree, each against the largest magnitude of its reference."""
    leaves, structure = jax.tree.flatten_with_path(actual)
    expected = structure.flatten_up_to(reference)
    for (path, a), r in zip(leaves, expected, strict=True):
        a, r = np.asarray(a, np.float64), np.asarray(r, np.float64)
        where = jax.tree_util.keystr(path)
        assert a.shape == r.shape, f"{where}: shape {a.shape}, reference {r.shape}"
        if not a.size:
            continue
        assert np.isfinite(a).all(), f"{where}: not finite"
        difference, bound = np.abs(a - r).max(), tol * np.abs(r).max()
        assert difference <= bound, f"{where}: differs by {difference:.3g}, allowed {bound:.3g}"


def assert_identical(actual, reference):
    """Leaves of equal trees are equal bit for bit."""
    leaves, structure = jax.tree.flatten_with_path(actual)
    for (path, a), r in zip(leaves, structure.flatten_up_to(reference), strict=True):
        np.testing.assert_array_equal(a, r, err_msg=jax.tree_util.keystr(path))


def rows(tree, index, axis=0):
    """The rows `index` of every leaf, along the batch axis."""
    return jax.tree.map(lambda x: np.take(np.asarray(x), index, axis=axis), tree)


def dot_products(lowered) -> list[str]:
    """The lines of a lowered program's text that hold a product of matrices."""
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


def is_highest(line: str) -> bool:
    return re.search(r"precision = \[HIGHEST, HIGHEST\]", line) is not None
