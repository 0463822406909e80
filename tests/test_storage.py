"""A digest tells any change of an array, and nothing else: not where or how it is held. And a
disk that takes nothing is named, and loses nothing."""

import errno
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from disks import full_disk
from jax.sharding import NamedSharding, PartitionSpec

from launch.sweep import book, space
from sleepnet import storage
from sleepnet.config import ModelConfig
from sleepnet.evaluation import record
from sleepnet.evaluation.forgetting import forgetting_of_run
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training.workdir import load_config

SHAPES = [(), (1,), (0,), (0, 4), (24,), (8, 3), (2, 8, 5)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.int32, np.uint32, np.int8, np.bool_]


def array_of(dtype, shape, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**15, shape)
    return np.asarray(words % 2 if dtype == np.bool_ else words).astype(dtype)


def by_the_definition(array):
    """Word by word, in integers without bounds."""
    factors = (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x85EBCA6B)

    def mix(x, lane):
        x = ((x ^ (x >> 16)) * factors[lane]) % 2**32
        x = ((x ^ (x >> 15)) * factors[lane - 1]) % 2**32
        return x ^ (x >> 16)

    size = array.dtype.itemsize
    data = np.ascontiguousarray(array).tobytes()
    size, data = (
        min(size, 4),
        [data[i : i + min(size, 4)] for i in range(0, len(data), min(size, 4))],
    )
    sums = [0] * 4
    for i, word in enumerate(data):
        for lane in range(4):
            key = mix(i % 2**32, 0) * factors[lane] % 2**32
            sums[lane] += mix(int.from_bytes(word, "little") ^ key, lane)
    return "".join(f"{total % 2**32:08x}" for total in sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_digest_is_its_definition_on_numpy_and_on_jax(dtype):
    for shape in SHAPES if dtype == np.float32 else [(), (8, 3)]:
        array = array_of(dtype, shape)
        (digest,) = storage.digests(array).values()
        name = f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]:"
        assert digest == name + by_the_definition(array)
        assert storage.digests(jnp.asarray(array)) == {"": digest}


def test_digests_of_stored_arrays_stay_what_they_were():
    """Checkpoints and saved minds carry them."""
    assert storage.digests(np.arange(6, dtype=np.float32).reshape(2, 3)) == {
        "": "float32[2,3]:465677a14c30901a89a0b22d6773a8f4"
    }
    assert storage.digests(np.arange(6).astype(ml_dtypes.bfloat16)) == {
        "": "bfloat16[6]:848a95f6f46010517c991f7e4cb614e9"
    }


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64], ids=lambda d: d.__name__)
def test_a_digest_of_64_bits_is_one_on_numpy_and_on_jax(dtype):
    """Of both words of every element, wherever they lie."""
    for shape in [(), (0, 4), (8, 3)] if dtype == np.float64 else [(8, 3)]:
        words = np.random.default_rng(0).integers(0, 2**63, shape, np.uint64)
        array = np.asarray(words).view(dtype)
        name = f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]:"
        digest = {"": name + by_the_definition(array)}
        assert storage.digests(array) == digest
        with jax.enable_x64(True):
            assert storage.digests(jnp.asarray(array)) == digest
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), ("a", "b"))
        spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(("b", "a"))))
        assert spread.dtype == dtype and storage.digests(spread) == digest
    array.view(np.uint64)[7, 2] ^= np.uint64(1 << 62)
    assert storage.digests(array) != digest


@pytest.mark.parametrize(
    "array",
    [np.zeros(3, np.complex64), np.zeros(3, ml_dtypes.int4), np.array(["a"]), np.array([None]),
     jnp.zeros(3, jnp.complex64), jax.random.key(0)],
    ids=lambda array: str(array.dtype),
)  # fmt: skip
def test_an_array_without_a_digest_is_named(array):
    with pytest.raises(storage.StorageError, match=r"array \['x'\] of dtype .* allowed are bool"):
        storage.digests({"fine": np.zeros(2), "x": array})


@pytest.mark.parametrize("dtype", [">i8", ">f4", ">u2"])
def test_the_byte_order_of_an_array_does_not_matter(dtype, tmp_path):
    """Neither to its digest nor to what is read back."""
    swapped = np.arange(6).reshape(2, 3).astype(dtype)
    native = swapped.astype(swapped.dtype.newbyteorder("="))
    assert storage.digests(swapped) == storage.digests(native)
    storage.write_arrays(tmp_path / "arrays", {}, {"x": swapped, "of nothing": swapped[:0]})
    found = storage.read_arrays(tmp_path / "arrays")[1]
    np.testing.assert_array_equal(found["x"], native)
    assert found["x"].dtype == native.dtype and found["of nothing"].shape == (0, 3)


@pytest.mark.parametrize("spec", [(), ("b", "a"), (("a", "b"),), (None, "b")], ids=str)
def test_a_digest_does_not_depend_on_the_devices(spec):
    """One device, or eight in any arrangement, copies among them."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    array = array_of(np.float32, (8, 8, 3))
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert storage.digests(spread) == storage.digests(array)


def test_the_hash_of_a_row_is_that_of_its_words_one_after_another():
    """In all arrays of a batch, wherever their batch axis."""
    batch, later = array_of(np.float32, (3, 2)), array_of(np.float32, (2, 3, 4), seed=1)
    hashes = np.asarray(storage.hash_rows([jnp.asarray(batch), jnp.asarray(later)], [0, 1]))
    for row, lanes in enumerate(hashes):
        words = np.concatenate([batch[row], later[:, row].ravel()])
        assert "".join(f"{lane:08x}" for lane in lanes) == by_the_definition(words)


def test_a_digest_is_taken_where_the_pieces_lie(monkeypatch):
    """No array is put together: not even to be looked at from the host."""
    mesh = jax.make_mesh((8,), ("a",))
    whole = NamedSharding(mesh, PartitionSpec("a"))
    array = jax.device_put(jnp.ones((4096, 256)), whole)
    sizes = []
    fetch = np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *rest: sizes.append(np.size(x)) or fetch(x, *rest))
    storage.digests(array)
    assert max(sizes) < 256


def test_every_single_flipped_bit_changes_every_lane():
    """A changed word is seen for certain, not with some probability."""
    array = array_of(np.float32, (5, 3))
    (digest,) = storage.digests(array).values()
    lanes = digest.split(":")[1]
    for place in range(array.size):
        for bit in range(32):
            other = array.copy()
            other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            (changed,) = storage.digests(other).values()
            changed = changed.split(":")[1]
            assert all(changed[i : i + 8] != lanes[i : i + 8] for i in range(0, 32, 8))


def test_moved_swapped_and_negated_values_are_told():
    array = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    others = [
        array.T, -array, np.roll(array, 1), array[::-1], np.zeros_like(array),
        array.reshape(4, 16), array.astype(np.int32), array.view(np.int32),
    ]  # fmt: skip
    digests = [storage.digests(np.ascontiguousarray(other))[""] for other in [array, *others]]
    assert len(set(digests)) == len(digests)


def test_verify_names_the_array():
    tree = {"a": np.zeros(3, np.float32), "b": jnp.ones(2)}
    expected = storage.digests(tree)
    storage.verify(tree, expected, "mind")
    with pytest.raises(storage.StorageError, match=r"mind: array \['b'\] is damaged"):
        storage.verify(tree | {"b": jnp.zeros(2)}, expected, "mind")
    with pytest.raises(storage.StorageError, match=r"mind: array \['b'\] is missing"):
        storage.verify({"a": tree["a"]}, expected, "mind")
    with pytest.raises(storage.StorageError, match=r"mind: array \['c'\] was never stored"):
        storage.verify(tree | {"c": tree["a"]}, expected, "mind")


def test_a_seal_protects_the_digests_themselves():
    sealed = storage.seal({"digests": storage.digests({"a": np.zeros(3)}), "step": 3})
    assert storage.unseal(sealed, "mind")["step"] == 3
    for broken in (
        None, [], {}, {"record": sealed["record"]}, sealed | {"seal": ""},
        sealed | {"record": sealed["record"] | {"step": 4}},
    ):  # fmt: skip
        with pytest.raises(storage.StorageError, match="mind: the record of its arrays is damaged"):
            storage.unseal(broken, "mind")


def test_on_a_full_disk_the_file_is_named_and_keeps_what_it_had(tmp_path):
    path = tmp_path / "config.json"
    storage.write_json(path, {"kept": 1})
    with full_disk(), pytest.raises(storage.StorageError, match=f"cannot write {path}: "):
        storage.write_json(path, {"lost": 2})
    assert storage.read_json(path) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_only_regular_files_are_replaced_and_links_stay(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    storage.write_atomic(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    os.mkfifo(pipe)
    for what in (pipe, tmp_path):
        with pytest.raises(storage.StorageError, match="is no regular file"):
            storage.write_atomic(what, "new")
    assert pipe.is_fifo()


def test_a_path_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    """A name that is too long; or a folder that may not be entered, which stops no root."""
    config = ExperimentConfig(model=ModelConfig(vocab_size=20, window=8), task=DepoConfig())
    path = tmp_path / ("x" * 300)
    assert not storage.exists(tmp_path / "x") and storage.exists(tmp_path)
    for act in (
        storage.exists, storage.prepare_file, lambda path: storage.write_json(path, {}),
        load_config, lambda path: record.load(path, config),
        lambda path: forgetting_of_run(path, {}, config, 1, ()),
        lambda path: book.is_done(space.Run("", {}, config), path),
    ):  # fmt: skip
        with pytest.raises(storage.StorageError, match=f"{path}.* cannot be reached: File name "):
            act(path)

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "stat", refused)
    with pytest.raises(storage.StorageError, match="cannot be reached: Permission denied"):
        load_config(tmp_path)


def test_a_folder_on_a_full_disk_is_told_before_it_is_used(tmp_path):
    with full_disk(), pytest.raises(storage.StorageError, match="name another folder"):
        storage.prepare_folder(tmp_path / "run")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002], ids=oct)
def test_a_file_is_open_to_those_whom_the_umask_leaves(tmp_path, monkeypatch, mask):
    """As one that `open` creates, old or new; and nothing sets the umask to learn it."""
    before = os.umask(mask)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("it was set for all threads"))
        for text in ("new", "replaced"):
            storage.write_atomic(tmp_path / "written", text)
        (tmp_path / "opened").write_text("")
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("written", "opened")]
    assert modes == [0o666 & ~mask] * 2


def test_one_folder_may_be_prepared_by_many_at_once(tmp_path, monkeypatch):
    """Whatever another process does between two steps of this one, both find it writable, and
    nothing is left in it."""
    folder = tmp_path / "run"

    def interrupted(act):
        def then(*arguments, **options):
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", replace)
                patch.setattr(pathlib.Path, "unlink", unlink)
                storage.prepare_folder(folder)
            return act(*arguments, **options)

        return then

    replace, unlink = os.replace, pathlib.Path.unlink
    monkeypatch.setattr(os, "replace", interrupted(replace))
    monkeypatch.setattr(pathlib.Path, "unlink", interrupted(unlink))
    storage.prepare_folder(folder)
    assert list(folder.iterdir()) == []
