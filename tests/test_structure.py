"""The rooms of the library: imports point one way, and each dependency has one door."""

import ast
import os
import pathlib
import sys

import pytest
import waiting

ROOT = pathlib.Path(__file__).parent.parent
# A module may import those of lower rank. A name stands for a module or for a whole package, whose
# modules may import each other; those of `cycle` have an order of their own.
RANKS = {
    "integers": -1,
    "config": 0, "types": 0, "strict_json": 0, "input_files": 0,
    "storage": 1,
    "ops": 1, "tokenizer": 1,
    "nn": 2,
    "cycle": 3,
    "inference": 4,
    "tasks": 4,
    "experiment": 5,
    "training": 6,
    "evaluation": 7,
}  # fmt: skip
CYCLE = {
    "cache": 0,
    "wake": 1,
    "sleep": 2,
    "rollout": 3, "slices": 3, "parallel": 3, "policies": 3,
}  # fmt: skip
# Leaves see nothing of the library but this.
LEAVES = {
    "integers": set(),
    "config": {"integers"},
    "types": set(),
    "strict_json": set(),
    "storage": {"strict_json"},
    "input_files": set(),
    "tokenizer": {"config", "input_files"},
    "tasks": {"config", "input_files", "integers", "storage", "tokenizer"},
}
DOORS = {
    "orbax": {"sleepnet.training.checkpoint"},
    "grain": {"sleepnet.tasks.loader", "sleepnet.tasks.records"},
    "array_record": {"sleepnet.tasks.records"},
    "tokenizers": {"sleepnet.tokenizer"},
}


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(tree):
    """Full names of all that a module imports, wherever in its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else node.module


TREES = {
    name_of(path): ast.parse(path.read_text())
    for package in ("sleepnet", "launch", "experiments")
    for path in files(package)
}
LIBRARY = {name: tree for name, tree in TREES.items() if name.split(".")[0] == "sleepnet"}


def room(name):
    """ "sleepnet.ops.rope" -> "ops"; the package itself has none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - {"sleepnet"}))
def test_imports_point_one_way(name):
    """config, types -> ops -> nn -> cycle -> inference -> training -> evaluation; tasks, tokenizer
    and storage are leaves."""
    here = room(name)
    assert here in RANKS, f"{name}: give it a place in the order of imports"
    for imported in imports(LIBRARY[name]):
        if imported.split(".")[0] != "sleepnet":
            continue
        there = room(imported)
        assert there is not None, f"{name} imports the package, which imports everything"
        assert there == here or RANKS[there] < RANKS[here], f"{name} imports {imported}"
        assert there == here or there in LEAVES.get(here, RANKS), f"{name} imports {imported}"
        if here == there == "cycle":
            lower, higher = (CYCLE[full.split(".")[2]] for full in (imported, name))
            assert lower < higher, f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_the_library_knows_nothing_of_its_users(name):
    """Nothing in sleepnet imports launch, experiments, or what reads their flags."""
    tops = {imported.split(".")[0] for imported in imports(LIBRARY[name])}
    assert not tops & {"launch", "experiments", "absl", "ml_collections"}


@pytest.mark.parametrize("library", DOORS)
def test_each_dependency_has_one_door(library):
    """Orbax only in training/checkpoint, grain only in tasks/loader."""
    users = {
        name for name, tree in TREES.items()
        if any(imported.split(".")[0] == library for imported in imports(tree))
    }  # fmt: skip
    assert users == DOORS[library]


@pytest.mark.parametrize("name", sorted(TREES))
def test_nothing_leans_on_the_inside_of_jax(name):
    """No jax._src, neither imported nor reached for; but where a cluster is looked for, which JAX
    tells nobody, and where the program goes on without."""
    leans = any(imported.startswith("jax._src") for imported in imports(TREES[name]))
    assert leans == (name == "launch.doctor.clusters")
    attributes = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert "_src" not in attributes


OF_DEVICES = {"pmap", "shard_map", "make_mesh", "Mesh", "NamedSharding", "local_devices"}
KNOW_DEVICES = {"sleepnet.cycle.parallel", "sleepnet.training.sharding"}


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - KNOW_DEVICES))
def test_only_two_modules_know_of_devices(name):
    """pmap, meshes and shardings are named in `parallel` (sleep) and `sharding` (training)."""
    named = set()
    for node in ast.walk(LIBRARY[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] == "jax":
            named.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jax":
            named |= {alias.name for alias in node.names}
    assert not named & OF_DEVICES


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_the_library_never_prints(name):
    """What it has to say it returns, raises or writes to its metrics."""
    called = {
        node.func.id
        for node in ast.walk(LIBRARY[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in called


@pytest.mark.parametrize("name", sorted(set(TREES) - {"sleepnet.strict_json"}))
def test_all_that_is_written_as_json_is_json(name):
    """By `strict_json`, or where only what is finite can be written, by json told to see to it."""
    for node in ast.walk(TREES[name]):
        assert not (isinstance(node, ast.ImportFrom) and node.module == "json"), name
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        writes = ast.unparse(node.func) in ("json.dump", "json.dumps")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert not writes or given.get("allow_nan") == "False", f"{name}, line {node.lineno}"


def test_nothing_sets_the_umask():
    """It is that of all threads: a file that another creates meanwhile is open to everybody."""
    setting = {
        name for name, tree in TREES.items() for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "umask")
        or (isinstance(node, ast.alias) and node.name == "umask")
    }  # fmt: skip
    assert not setting


# JAX_PLATFORMS names no platform: the first question for a device would fail.
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from absl import flags
defined = flags.FLAGS.flags_by_module_dict()
assert not [module for module in defined if module.startswith("sleepnet")], defined.keys()
"""


def test_a_config_is_read_without_what_is_slow_to_import():
    """So that a wrong flag is reported at once."""
    slow = "import sys, sleepnet.experiment; print({'grain', 'orbax'} & sys.modules.keys())"
    assert waiting.run(sys.executable, "-c", slow).stdout == "set()\n"


def test_importing_asks_for_no_device_and_defines_no_flag():
    """Importing every module works before jax.distributed, in Colab and beside other flags."""
    done = waiting.run(
        sys.executable, "-c", IMPORT_ALL, *sorted(LIBRARY),
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# What waits for a time, or for ever. `tests/waiting.py` waits for events, with a deadline.
IMPATIENT = {
    "time.sleep", "time.time", "time.monotonic", "time.perf_counter", "os.read", "select.select",
    "subprocess.run", "subprocess.Popen", "subprocess.check_output", "thread.join",
}  # fmt: skip
PROGRAMS = {"waiting.py", "kill_and_resume.py", "soak_engine.py"}


def calls(path):
    """Names of what is called, with their line; a `join` without arguments is a thread's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            bare = node.func.attr == "join" and not node.args
            name = "thread.join" if bare else ast.unparse(node.func)
            yield name, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_tests_wait_for_events_and_not_for_a_time():
    """So that none fails on a machine that is busy, and none hangs."""
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in PROGRAMS]
    assert not [call for path in paths for call in calls(path) if call[0] in IMPATIENT]
