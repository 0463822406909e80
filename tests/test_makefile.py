"""`make` builds environments from pinned versions, for the Pythons that the pages name."""

import json
import os
import pathlib
import re
import tomllib

import pytest
import waiting
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PINNED = {path.stem.split("-")[1]: path for path in (ROOT / ".ci").glob("constraints-*.txt")}
SUPPORTED = sorted(PINNED)


def make(target, python=None, venv="none/venv"):
    """Return what `make` would run, also where `make` runs these tests."""
    passed_on = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON")
    environ = {name: value for name, value in os.environ.items() if name not in passed_on}
    given = [] if python is None else [f"PYTHON={python}"]
    return waiting.run(
        "make", "--dry-run", target, *given, f"VENV={venv}", "TPU=none/tpu", "PEERS=none/peers",
        env=environ,
    )  # fmt: skip


@pytest.fixture
def python(tmp_path):
    """Makes a Python of any version, which says no more than that."""

    def of(version):
        path = tmp_path / f"python{version}"
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
        return path

    return of


def test_the_pages_name_the_pythons_that_have_pinned_versions():
    listed = f"Python {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}"
    for page in ("README.md", "BUILD.md"):
        assert listed in " ".join((ROOT / page).read_text().split()), page
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"python: {json.dumps(SUPPORTED)}" in workflow
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classified = [line.split(" :: ")[-1] for line in project["classifiers"] if "3." in line]
    assert classified == SUPPORTED
    assert project["requires-python"] == f">={SUPPORTED[0]}"


@pytest.mark.parametrize("version", SUPPORTED)
def test_each_python_takes_its_own_pinned_versions(python, version):
    done = make("environment", python(version))
    assert done.returncode == 0, done.stderr
    assert f"--constraint .ci/constraints-{version}.txt" in done.stdout


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_python_of_an_environment_that_is_there_stays_its_own(python, version, tmp_path):
    """Unless another is given: no Python is needed that did not make it."""
    made_by, other = python(version), python(SUPPORTED[0])
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(made_by)
    for given, taken in ((None, made_by), (other, other)):
        done = make("environment", given, venv=tmp_path / "venv")
        assert done.returncode == 0, done.stderr
        assert f"{taken} -m venv {tmp_path / 'venv'}\n" in done.stdout
        number = taken.name.removeprefix("python")
        assert f"--constraint .ci/constraints-{number}.txt" in done.stdout


@pytest.mark.parametrize("target", ["demo", "test", "test-tpu", "peers"])
@pytest.mark.parametrize("version", ["3.10", "3.14", None])
def test_another_python_is_refused_with_those_that_are_supported(python, target, version):
    """In a line, before anything is made; also a name behind which there is none."""
    given = python(version) if version else "python-that-is-not-here"
    done = make(target, given)
    assert (done.returncode, done.stdout) == (2, "")
    reason = f"is Python {version}" if version else "cannot be run"
    assert re.fullmatch(
        rf"Makefile:\d+: \*\*\* PYTHON={given} {reason}; supported are {' '.join(SUPPORTED)}: .*\n",
        done.stderr,
    ), done.stderr


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_required_is_pinned_to_a_version_that_fits(version):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["text"], *extras["test"], *extras["dev"]]
    pins = dict(line.split("==") for line in PINNED[version].read_text().split())
    pins = {canonicalize_name(name): number for name, number in pins.items()}
    for required in map(Requirement, lines):
        if required.name != "sleepnet":
            assert required.specifier.contains(pins[canonicalize_name(required.name)]), required
