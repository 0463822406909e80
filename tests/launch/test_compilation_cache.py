"""Compiled programs are kept where that is possible, and training needs no home."""

import pathlib
import pwd

import jax
import pytest

from launch.common import compilation_cache
from sleepnet.storage import StorageError


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """JAX's setting, and a user without any of the variables that name folders."""
    before = jax.config.jax_compilation_cache_dir
    for name in (compilation_cache.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def folder():
    return jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("home", [None, "", "a file", "a folder of a file"])
def test_without_a_home_that_can_be_written_nothing_is_kept_and_it_is_said(
    tmp_path, monkeypatch, home
):
    """As in a container whose user has no entry and no HOME, or one that is not there."""
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    (tmp_path / "a file").write_text("kept")
    if home is not None:
        place = tmp_path / home.replace("folder of a file", "file/none")
        monkeypatch.setenv("HOME", str(place) if home else "")
    said = compilation_cache.use(None)
    reason = f"cannot write to {place}" if home else "your home is unknown"
    assert said.startswith(f"compiled programs are not kept for the next start: {reason}")
    assert "\n" not in said and "--compilation_cache=FOLDER" in said and folder() is None


def test_the_folder_is_that_of_the_flag_or_of_the_environment_or_of_the_user(tmp_path, monkeypatch):
    """The first of them that is named; it is made, and ~ stands for the home."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))

    def used(given=None):
        said = compilation_cache.use(given)
        kept = pathlib.Path(folder())
        assert said == f"compiled programs are kept in {kept}" and kept.is_dir()
        return kept.relative_to(tmp_path).as_posix()

    assert used() == "home/.cache/sleepnet"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert used() == "caches/sleepnet"
    monkeypatch.setenv(compilation_cache.VARIABLE, "~/compiled")
    assert used() == "home/compiled"
    assert used(tmp_path / "flag") == "flag"
    assert compilation_cache.use(pathlib.Path("none")).startswith("compiled programs are not kept")
    assert folder() is None


def test_a_bucket_that_jax_is_given_by_its_own_variable_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(compilation_cache.VARIABLE, "gs://bucket/compiled")
    assert compilation_cache.use(None) == "compiled programs are kept in gs://bucket/compiled"
    assert folder() == "gs://bucket/compiled" and not list(tmp_path.iterdir())


def test_a_folder_that_was_asked_for_and_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StorageError, match=f"--compilation_cache={tmp_path}/file: cannot write to"):
        compilation_cache.use(tmp_path / "file")
