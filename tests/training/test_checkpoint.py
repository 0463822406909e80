"""A checkpoint is whole or it does not count, and what it gives back is what was saved."""

import contextlib
import os
import pathlib
import resource
import shutil
import threading

import jax
import numpy as np
import pytest
import waiting
from checkpointing import assert_same, damages, make_state, spoil
from jax.sharding import NamedSharding, PartitionSpec

from sleepnet.storage import StorageError
from sleepnet.training.checkpoint import Checkpoints, SaveError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 2 and 4, and their states."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir)
    states = {step: make_state(step, seed=step) for step in (2, 4)}
    for state in states.values():
        checkpoints.save(state, wait=True)
    return workdir, states


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run"), saved[1]


def test_saving_goes_on_behind_a_step_that_donates_its_state(tmp_path):
    """The arrays are copied before `save` returns: what the next steps write over them is lost."""
    steps = Checkpoints(tmp_path)
    double = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)
    state = make_state(1, rows=4096)
    reference = jax.tree.map(np.array, state)
    steps.save(state)
    for _ in range(3):
        state = double(state)
    steps.wait()
    assert_same(steps.restore(jax.eval_shape(lambda: reference), 1), reference)


def test_save_returns_before_the_files_are_written(tmp_path, monkeypatch):
    go = threading.Event()
    checkpoints = Checkpoints(tmp_path)
    finish = checkpoints._finish
    monkeypatch.setattr(checkpoints, "_finish", lambda *a: go.wait(waiting.PATIENCE) and finish(*a))
    checkpoints.save(make_state(1))
    checkpoints.check()
    go.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_step_is_saved_once(saved):
    checkpoints = Checkpoints(saved[0])
    before = files(checkpoints.path(4))
    checkpoints.save(make_state(4, seed=9), wait=True)
    assert files(checkpoints.path(4)) == before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("spec", [("x",), (None,)], ids=["split over 8", "copied to 8"])
def test_a_checkpoint_of_one_device_restores_on_a_mesh_and_back(saved, tmp_path, spec):
    workdir, states = saved
    mesh = jax.make_mesh((8,), ("x",))

    def place(leaf):
        axes = spec if leaf.ndim else ()
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like = jax.tree.map(place, states[4])
    on_mesh = Checkpoints(workdir).restore(like, 4)
    assert_same(on_mesh, states[4])
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(a)), on_mesh, like)
    there = Checkpoints(tmp_path)
    there.save(on_mesh, wait=True)
    back = there.restore(jax.eval_shape(lambda: states[4]), 4)
    assert_same(back, states[4])
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(back)} == {1}


def test_parameters_are_restored_and_verified_alone(copied):
    workdir, states = copied
    shutil.rmtree(workdir / "checkpoints" / "4" / "rest")
    checkpoints = Checkpoints(workdir)
    assert_same(checkpoints.restore_params(states[4].params, 4), states[4].params)
    with pytest.raises(StorageError, match="checkpoints/4 cannot be read"):
        checkpoints.restore(states[4], 4)


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    """Also over a restart, and where metrics are missing or not finite."""
    metrics = {1: 0.9, 2: 0.1, 3: 0.8, 4: None, 5: float("nan"), 6: 0.2, 7: 0.3}
    for step, metric in metrics.items():
        checkpoints = Checkpoints(tmp_path, kept=2, keep_best=2)
        checkpoints.save(make_state(step), metric=metric, wait=True)
    assert checkpoints.steps() == [1, 3, 6, 7]


def test_the_best_is_known_also_where_it_was_rated_after_its_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, kept=1, keep_best=1)
    checkpoints.save(make_state(1), wait=True)
    checkpoints.rate(1, 0.9)
    for step in (2, 3):
        checkpoints.save(make_state(step), metric=0.1, wait=True)
    assert checkpoints.steps() == [1, 3]


def test_all_stay_where_no_number_is_given(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(4):
        checkpoints.save(make_state(step))
    checkpoints.close()
    assert checkpoints.steps() == [0, 1, 2, 3]


@contextlib.contextmanager
def small_disk(path):
    """A folder that holds less than a megabyte: a disk of its own, or files that cannot grow."""
    path.mkdir()
    mounted = waiting.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path)
    if mounted.returncode == 0:
        try:
            yield "No space left on device"
        finally:
            assert waiting.run("umount", "--lazy", path).returncode == 0
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_costs_no_checkpoint(tmp_path):
    """With the folder and the reason; and the next save that fits is whole."""
    with small_disk(tmp_path / "disk") as reason:
        checkpoints = Checkpoints(tmp_path / "disk")
        checkpoints.save(make_state(1), wait=True)
        checkpoints.save(make_state(2, rows=1 << 16))
        with pytest.raises(SaveError, match=rf"checkpoints/2 could not be saved: .*{reason}"):
            waiting.until(checkpoints.check, "the failure of a save")
        checkpoints.check()  # told once
        assert checkpoints.steps() == [1]
        checkpoints.save(make_state(3), wait=True)
        assert checkpoints.steps() == [1, 3]
        for step in (1, 3):
            assert_same(checkpoints.restore(make_state(), step), make_state(step))
        names = sorted(path.name for path in checkpoints.folder.iterdir())
        assert names == ["1", "3"]


def test_an_earlier_failure_is_told_by_the_next_save_which_goes_on(tmp_path):
    with small_disk(tmp_path / "disk"):
        checkpoints = Checkpoints(tmp_path / "disk")
        checkpoints.save(make_state(2, rows=1 << 16))
        with pytest.raises(SaveError, match="checkpoints/2 could not be saved"):
            checkpoints.save(make_state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [3]


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(SaveError, match=r"checkpoints/1 could not be saved: cannot write to"):
        checkpoints.save(make_state(1))
    (tmp_path / "checkpoints").unlink()
    checkpoints.save(make_state(1), wait=True)
    assert checkpoints.steps() == [1]


@contextlib.contextmanager
def read_only(path):
    """As root, who may write whatever the modes say, by a mount."""
    if os.geteuid() == 0 and bind(path, "bind") and bind(path, "remount,bind,ro"):
        try:
            yield
        finally:
            assert waiting.run("umount", "--lazy", path).returncode == 0
        return
    path.chmod(0o500)
    try:
        if os.access(path, os.W_OK):
            pytest.fail("this user may write everywhere and may not mount: nothing is shown")
        yield
    finally:
        path.chmod(0o700)


def bind(path, options):
    return waiting.run("mount", "-o", options, path, path).returncode == 0


def test_a_folder_without_permission_is_told_and_costs_no_checkpoint(copied):
    workdir, states = copied
    checkpoints = Checkpoints(workdir, kept=1)
    with read_only(checkpoints.folder):
        with pytest.raises(
            SaveError, match=r"checkpoints/6 could not be saved: .*(Read-only|Permission)"
        ):
            checkpoints.save(make_state(6))
        assert checkpoints.steps() == [2, 4]
        assert_same(checkpoints.restore(states[4], 4), states[4])
    checkpoints.save(make_state(6), wait=True)
    assert checkpoints.steps() == [6]


def test_a_half_written_checkpoint_does_not_count_and_is_swept(copied):
    """As a kill leaves them: Orbax's folder before its last rename, and one half deleted."""
    workdir, states = copied
    checkpoints = Checkpoints(workdir)
    half = checkpoints.folder / "6.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.path(4), half)
    leaving = checkpoints.folder / ".leaving-1"
    leaving.mkdir()
    assert checkpoints.steps() == [2, 4]
    state, warnings = checkpoints.restore_latest(states[4])
    assert (int(state.step), warnings) == (4, [])
    assert half.exists()  # reading beside a run that writes takes nothing from it
    checkpoints.save(make_state(6), wait=True)
    assert checkpoints.steps() == [2, 4, 6]
    assert not half.exists() and not leaving.exists()


def test_damage_in_a_folder_that_cannot_be_written_is_passed_over_all_the_same(copied):
    workdir, states = copied
    (workdir / "checkpoints" / "4" / "params" / "_METADATA").unlink()
    with read_only(workdir):
        state, (warning,) = Checkpoints(workdir).restore_latest(states[4])
    assert_same(state, states[2])
    assert "kept as 4" in warning


def test_without_a_checkpoint_there_is_no_state(tmp_path):
    assert Checkpoints(tmp_path).restore_latest(make_state()) == (None, [])
    assert list(tmp_path.iterdir()) == []


def tally(saved, tmp_path, wanted):
    """Spoils one file at a time; returns how often that was told, or did no harm, per file."""
    workdir, states = saved
    like = jax.eval_shape(lambda: states[4])
    counts = {}
    for i, (file, how, seed) in enumerate(wanted):
        copy = shutil.copytree(workdir, tmp_path / str(i))
        assert spoil(copy / "checkpoints" / "4" / file, how, seed)
        state, warnings = Checkpoints(copy).restore_latest(like)
        told = int(state.step) == 2
        assert_same(state, states[2 if told else 4])
        assert bool(warnings) == told
        if told:
            assert "damaged-checkpoint-4" in warnings[0]
        assert (copy / "damaged-checkpoint-4").exists() == told
        kind = (pathlib.Path(file).parts[-1] if "/d/" not in file else "array data", how)
        told_before, harmless = counts.get(kind, (0, 0))
        counts[kind] = (told_before + told, harmless + (not told))
        shutil.rmtree(copy)
    return counts


def test_a_damaged_file_is_told_or_does_no_harm(saved, tmp_path):
    """A dozen of the cases of the slow test."""
    every = list(damages(saved[0] / "checkpoints" / "4", flips=1))
    counts = tally(saved, tmp_path, every[:: len(every) // 12])
    assert sum(told for told, _ in counts.values()) > 0


@pytest.mark.slow
def test_whatever_file_is_damaged_it_is_told_or_does_no_harm(saved, tmp_path, capsys):
    """Each file flipped in many places, truncated, emptied, deleted."""
    every = list(damages(saved[0] / "checkpoints" / "4", flips=30))
    assert len(every) >= 500
    counts = tally(saved, tmp_path, every)
    with capsys.disabled():
        print(f"\n{len(every)} cases: file, damage: told / harmless")
        for (file, how), (told, harmless) in sorted(counts.items()):
            print(f"  {file:24} {how:10} {told:4} / {harmless}")
        total = np.sum(list(counts.values()), axis=0)
        print(f"  all: {total[0]} told, {total[1]} harmless, 0 silent")
