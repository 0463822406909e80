"""Files that can be trusted: atomic writes, and a digest per array that loading verifies."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np


class StorageError(RuntimeError):
    """Stored data that is damaged, foreign or cannot be written; the message says what to do."""


def write_atomic(path: pathlib.Path, content: str | bytes):
    """Writes a file so that readers see the old content or the new one, never a part."""
    path = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # temporary files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: pathlib.Path, value: Any):
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Raises StorageError if the file is not there or is not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


def prepare_folder(path: pathlib.Path):
    """Makes the folder and proves that it can be written to, or raises StorageError."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ".writable", b"")
        (path / ".writable").unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {path}: {error.strerror}; name another folder"
        ) from None


def digests(tree: Any) -> dict[str, str]:
    """Path of each array in the tree -> SHA-256 of its dtype, shape and bytes."""

    def digest(leaf):
        array = np.ascontiguousarray(leaf)
        header = f"{array.dtype.name}{array.shape}".encode()
        return hashlib.sha256(header + array.tobytes()).hexdigest()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def verify(tree: Any, expected: dict[str, str], source: str):
    """Raises StorageError naming the first array that is not what was written."""
    found = digests(tree)
    for path in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if path in expected else "was never stored"
        raise StorageError(f"{source}: array {path} {state}")
    for path, digest in expected.items():
        if found[path] != digest:
            raise StorageError(f"{source}: array {path} is damaged (its digest differs)")
