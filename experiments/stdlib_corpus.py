"""A small corpus that is certainly there: the docstrings of Python's standard library.

    python -m experiments.stdlib_corpus runs/stdlib

writes runs/stdlib/train.jsonl and test.jsonl, a document for each module that documents itself.
Which modules are held out, one in ten, is a function of their names; the text is that of the
Python that runs it.
"""

import ast
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

from launch.common import cli
from sleepnet import storage, strict_json
from sleepnet.config import ConfigError
from sleepnet.config.checks import local_path
from sleepnet.tasks.splits import SPLITS, split_of

_TEST_FRACTION = 0.1
_LEAST_CHARACTERS = 400  # shorter ones have little to remember
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def main(argv: list[str]):
    out = _folder(argv[1:])
    storage.prepare_folder(out)
    lines = {split: [] for split in SPLITS}
    for name, text in documents(pathlib.Path(sysconfig.get_path("stdlib"))):
        row = strict_json.dumps({"module": name, "text": text}) + "\n"
        lines[split_of(name.encode(), _TEST_FRACTION)].append(row)
    for split, rows in lines.items():
        path = out / f"{split}.jsonl"
        storage.write_atomic(path, "".join(rows))
        size = path.stat().st_size
        print(f"{path}: {len(rows)} modules of Python {platform.python_version()}, {size} bytes")


def _folder(words: list[str]) -> pathlib.Path:
    if len(words) != 1:
        raise ConfigError("give one folder for train.jsonl and test.jsonl, such as runs/stdlib")
    try:
        return pathlib.Path(local_path(words[0]))
    except ConfigError as error:
        raise ConfigError(f"{words[0]}: {error}") from None


def documents(library: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(name, docstrings) of each module, by name."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            text = "\n\n".join(_docstrings(ast.parse(path.read_bytes())))
            if len(text) >= _LEAST_CHARACTERS:
                yield ".".join(parts), text


def _docstrings(module: ast.Module) -> Iterator[str]:
    """Each with the name of what it documents, in the order in which they stand."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(module):
        if isinstance(node, nodes) and (text := ast.get_docstring(node)):
            name = getattr(node, "name", None)
            yield f"{name}: {text}" if name else text


if __name__ == "__main__":
    cli.run(main, takes_words=True)
