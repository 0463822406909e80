"""Which files a corpus consists of."""

import difflib
import glob
import os
import pathlib
from collections.abc import Sequence

from sleepnet.config import ConfigError
from sleepnet.config.checks import nearest
from sleepnet.input_files import regular_status
from sleepnet.tasks import records

SUFFIXES = (".jsonl", records.SUFFIX)


def find_files(patterns: Sequence[str]) -> list[pathlib.Path]:
    """List the files in the order of the patterns, those of one pattern by name.

    Args:
      patterns: paths, taken as they stand where there is such a file; else patterns of `glob`.

    Raises:
      ConfigError: nothing matches, a file that matches twice, or one that is not a regular file of
        a known kind.
    """
    found: dict[tuple[int, int], tuple[pathlib.Path, str]] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            status = _status(path)
            file = status.st_dev, status.st_ino  # the same through links and any spelling
            if file in found:
                other, by = found[file]
                names = f"{path} is" if path == other else f"{other} and {path} are one file,"
                raise ConfigError(f"{names} named twice, by {by!r} and {pattern!r}")
            found[file] = path, pattern
    if not found:
        raise ConfigError(f"it names no file; give one or more {' or '.join(SUFFIXES)}")
    return [path for path, _ in found.values()]


def _matches(pattern: str) -> list[pathlib.Path]:
    exists = os.path.lexists(pattern)  # also a link that leads nowhere, which is then named
    matches = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise ConfigError(f"no file matches {pattern!r}{_hint(pattern)}")
    return [pathlib.Path(path) for path in matches]


def _status(path: pathlib.Path) -> os.stat_result:
    try:
        status = regular_status(path)
    except OSError as error:
        inside = [str(path / f"*{suffix}") for suffix in SUFFIXES] if os.path.isdir(path) else []
        advice = f"; name what it holds, as in {' or '.join(inside)}" if inside else ""
        raise ConfigError(f"{path} cannot be read: {error.strerror}{advice}") from None
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{path} is of an unknown kind; allowed: {', '.join(SUFFIXES)}; "
            f"the nearest is {nearest(path.suffix, SUFFIXES)}"
        )
    return status


def _hint(pattern: str) -> str:
    folder = pathlib.Path(pattern).parent
    if not os.path.isdir(folder):
        return f": there is no folder {folder}"
    try:
        names = [str(path) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    except OSError as error:
        return f": the folder {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else f": {folder} has none of {SUFFIXES}"
