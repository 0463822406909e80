"""Files that can be trusted: atomic writes, and a digest per array that loading verifies."""

import contextlib
import functools
import hashlib
import math
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sleepnet import strict_json

LANES = 4  # of 32 bits, of which a digest is made
# Odd, so that multiplying by them is a bijection, and half of their bits are set.
_FACTORS = (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x85EBCA6B)
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # 8 bytes are two words
_BLOCK = 1 << 18


class StorageError(RuntimeError):
    """Stored data that is damaged, foreign or cannot be written; the message says what to do."""


def exists(path: str | os.PathLike) -> bool:
    """Return whether there is a file or folder of this name.

    Raises:
      StorageError: it cannot be told: the name is too long, or a folder on the path may not be
        entered.
    """
    try:
        return pathlib.Path(path).exists()
    except OSError as error:
        raise StorageError(f"{path} cannot be reached: {error.strerror}") from None


def write_atomic(path: pathlib.Path, content: str | bytes):
    """Writes a file so that readers see the old content or the new one, never a part.

    Raises:
      StorageError: it cannot be written; what was there stays.
    """
    path = _target(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        _replace(path, data)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def prepare_file(path: str | os.PathLike):
    """Proves that `write_atomic` may write there, or raises StorageError; makes the folder."""
    prepare_folder(_target(path).parent)


def _target(path: str | os.PathLike) -> pathlib.Path:
    """Through links, which stay."""
    path = pathlib.Path(path).resolve()
    if exists(path) and not path.is_file():
        raise StorageError(f"cannot write {path}: it is no regular file")
    return path


def _replace(path: pathlib.Path, data: bytes):
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Name a new file that takes the place of `path` when the block ends, and goes if it fails.

    No other thread or process gets the same name. Whoever creates the file leaves its mode to the
    kernel, which applies the umask; a program cannot ask for its umask without setting it, for all
    of its threads.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: Any):
    """`write_atomic` of indented `strict_json`."""
    write_atomic(path, strict_json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Raises StorageError if the file is not there or is not JSON."""
    try:
        return strict_json.loads(pathlib.Path(path).read_bytes())
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


def prepare_folder(path: pathlib.Path):
    """Makes the folder and proves that it can be written to, or raises StorageError."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{secrets.token_hex(8)}"  # others may look at the same time
        _replace(probe, b"a byte, for which a full disk has no room")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write to {path}: {error.strerror}; name another folder"
        ) from None


def digests(tree: Any) -> dict[str, str]:
    """Path of each array in the tree -> its dtype, shape and a hash of its values, 128 bits.

    The same for NumPy and JAX arrays, however they are split over devices and processes: each
    device hashes what it holds. Of arrays that are spread over processes, all processes must ask
    at once. One changed word changes the hash for certain, any other change with probability
    at least 1 - 2**-64.

    Raises:
      StorageError: an array that is neither bool nor of integers or floats of 8 to 64 bits.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = np.zeros((len(leaves), LANES), np.uint32)
    spread = np.zeros((len(leaves), 1), bool)
    pieces = []  # dispatched to all devices before the first is waited for
    for i, (path, leaf) in enumerate(leaves):
        _check_dtype(path, leaf)
        if isinstance(leaf, jax.Array):
            spread[i] = not leaf.is_fully_addressable
            pieces += [(i, piece) for piece in _hash_shards(leaf)]
        else:
            pieces.append((i, _hash_array(np.asarray(leaf))))
    for i, piece in pieces:
        sums[i] += np.asarray(piece)
    if spread.any():
        of_processes = multihost_utils.process_allgather(sums)
        sums = np.where(spread, of_processes.sum(axis=0, dtype=np.uint32), sums)
    return {
        jax.tree_util.keystr(path): _name(leaf) + "".join(f"{lane:08x}" for lane in lanes)
        for (path, leaf), lanes in zip(leaves, sums, strict=True)
    }


def _check_dtype(path, leaf):
    dtype, bits = _described(leaf).dtype, 0
    if jnp.issubdtype(dtype, jnp.bool_):
        bits = 8
    elif jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    if bits not in (8, 16, 32, 64):
        raise StorageError(
            f"array {jax.tree_util.keystr(path)} of dtype {dtype} has no digest: allowed are bool, "
            f"and integers and floats of 8 to 64 bits; store it as several of those"
        )


def _described(leaf):
    """The leaf, or of a Python number its array."""
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _name(leaf) -> str:
    leaf = _described(leaf)
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]:"


def _hash_shards(array: jax.Array):
    """One hash per piece that this process's devices hold; copies count once."""
    strides = np.cumprod((1, *array.shape[:0:-1]), dtype=np.uint32)[::-1]
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [place.start or 0 for place in shard.index]
            yield _hash_shard(shard.data, np.asarray(starts, np.uint32), strides)


@jax.jit
def _hash_shard(x, starts, strides):
    """Of a piece of an array that begins at `starts`; its elements have these strides."""
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(x.ndim):
        places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + starts[axis]
        index += places * strides[axis]
    if words.ndim > x.ndim:
        index = 2 * index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, x.ndim)
    return _sum_lanes(words, index, range(words.ndim))


def hash_rows(arrays: Sequence[jax.Array], axes: Sequence[int]) -> jax.Array:
    """Hash the bits that each row of a batch has in several arrays, where they lie.

    Args:
      arrays: of any shapes and dtypes.
      axes: the batch axis of each.

    Returns:
      uint32 of shape (B, LANES). A row in which one word has changed has another hash for certain,
      one with any other change with probability at least 1 - 2**-64.
    """
    hashes, start = [], 0
    for array, axis in zip(arrays, axes, strict=True):
        words = jnp.moveaxis(_words(array), axis, 0)
        words = words.reshape(len(words), -1)
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, 1) + np.uint32(start % 2**32)
        hashes.append(_sum_lanes(words, index, [1]))
        start += words.shape[1]
    return functools.reduce(jnp.add, hashes)


def _sum_lanes(words, index, axes: Iterable[int]) -> jax.Array:
    """The sum of each lane over some axes; the lanes are the last axis of the result."""
    # One reduction for all lanes: four would each write an array of this size.
    zero = (np.uint32(0),) * LANES

    def add(these, those):
        return tuple(a + b for a, b in zip(these, those, strict=True))

    return jnp.stack(jax.lax.reduce(_lanes(words, index), zero, add, tuple(axes)), axis=-1)


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine, which the name of a dtype does not tell."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _hash_array(array: np.ndarray) -> np.ndarray:
    words = _native(array).reshape(-1).view(_WORDS[array.dtype.itemsize])
    total = np.zeros(LANES, np.uint32)
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
        total += [lane.sum(dtype=np.uint32) for lane in _lanes(block, index)]
    return total


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, of the same shape; of 8 bytes, the lower word before the
    higher on an axis behind."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)


def _lanes(words, index):
    """Each word under a bijection, another at each index and in each lane.

    Their sums modulo 2**32 do not depend on the order, hence not on how an array is split.
    """
    key = _mix(index, 0)
    return tuple(_mix(words ^ (key * np.uint32(_FACTORS[i])), i) for i in range(LANES))


def _mix(x, lane: int):
    """A bijection of uint32 in which every bit of x changes half the bits of the result."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FACTORS[lane])
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_FACTORS[lane - 1])
    return x ^ (x >> np.uint32(16))


def verify(tree: Any, expected: dict[str, str], source: str):
    """Raises StorageError naming the first array that is not what was written."""
    found = digests(tree)
    for path in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if path in expected else "was never stored"
        raise StorageError(f"{source}: array {path} {state}")
    for path, digest in expected.items():
        if found[path] != digest:
            raise StorageError(
                f"{source}: array {path} is damaged (its digest is {found[path]}, not {digest})"
            )


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a hash of itself, for `unseal`."""
    return {"record": record, "seal": _seal(record)}


def unseal(sealed: Any, source: str) -> dict[str, Any]:
    """Raises StorageError if the record is not what was sealed."""
    if not isinstance(sealed, dict) or sealed.get("seal") != _seal(sealed.get("record")):
        raise StorageError(f"{source}: the record of its arrays is damaged (its seal differs)")
    return sealed["record"]


def write_arrays(path: pathlib.Path, record: dict[str, Any], arrays: dict[str, np.ndarray]):
    """One file, atomically: a line of JSON with the record and each array's digest, then the bytes.

    Args:
      record: JSON.
      arrays: by name.

    Raises:
      StorageError: it cannot be written; what was there stays.
    """
    described = {
        name: {"dtype": array.dtype.name, "shape": array.shape} for name, array in arrays.items()
    }
    whole = {"record": record, "arrays": described, "digests": digests(arrays)}
    data = [_native(array).tobytes() for array in arrays.values()]
    write_atomic(path, b"".join([_line(seal(whole)), *data]))


def read_arrays(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of `write_arrays`.

    Raises:
      StorageError: the file is not there, or any byte of it is not what was written.
    """
    path = pathlib.Path(path)
    try:
        line, newline, data = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        sealed = strict_json.loads(line)
    except ValueError:
        raise StorageError(f"{path} is damaged in its first line, or no file of arrays") from None
    whole = unseal(sealed, str(path))
    if _line(sealed) != line + newline:  # JSON can say the same in other bytes
        raise StorageError(f"{path} is damaged in its first line")
    arrays, start = {}, 0
    for name, described in whole["arrays"].items():
        dtype, shape = jnp.dtype(described["dtype"]), tuple(described["shape"])
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > len(data):
            raise StorageError(f"{path} is cut off: array {name} is not all there")
        arrays[name] = np.ndarray(shape, dtype, data[start:stop])
        start = stop
    if start != len(data):
        raise StorageError(f"{path} is damaged: {len(data) - start} bytes follow its last array")
    verify(arrays, whole["digests"], str(path))
    return whole["record"], arrays


def _line(sealed: dict[str, Any]) -> bytes:
    return strict_json.dumps(sealed, separators=(",", ":")).encode() + b"\n"


def _seal(record):
    return hashlib.sha256(strict_json.dumps(record, sort_keys=True).encode()).hexdigest()
