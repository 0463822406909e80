"""Speed on this machine: python -m launch.benchmark --suite=rule --peer=transformers.

Prints a table, writes the figures to OUT/benchmarks/SUITE.json, and OUT/BENCHMARKS.md from all
suites that lie there. What a suite measures stands at the top of
launch/benchmark/suites/SUITE.py; what takes turns is compared within one run. For one core:
NPROC=1 taskset -c 0 python -m ...
"""

import datetime
import importlib

from absl import flags

from launch.benchmark import peers
from launch.benchmark.suites import Options, Shape, report, threads
from launch.common import cli
from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.evaluation.machine import describe_machine

SUITES = (
    "rule",
    "wake",
    "sleep",
    "horizon",
    "engine",
    "train",
    "loop",
    "gradients",
    "devices",
    "tpu",
)
_SUITE = flags.DEFINE_enum("suite", "rule", SUITES, "What to time.")
_PEERS = flags.DEFINE_multi_enum(
    "peer", [], [*peers.PEERS, "scan"], "For --suite=rule: run beside ours; may be repeated."
)
_ENVIRONMENTS = cli.define_path(
    "environments", ".venv-peers", "Where `make peers` put the peers' Python environments."
)
_SHAPES = flags.DEFINE_list(
    "shapes", [], "Of the rule, BxTxHxD with D = K = V, such as 1x4096x8x128; by default several."
)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each variant.", lower_bound=1)
_OUT = cli.define_path("out", "runs", "Folder for the figures.")


def main(_):
    options = Options(
        repeats=_REPEATS.value,
        shapes=tuple(map(_shape, _SHAPES.value)),
        peers=tuple(_PEERS.value),
        environments=_ENVIRONMENTS.value,
    )
    suite = importlib.import_module(f"launch.benchmark.suites.{_SUITE.value}")
    _check_heeded(suite.TAKES)
    try:
        measured = suite.run(options)
    except peers.PeerError as error:
        return cli.complain(error)
    record = {
        "suite": _SUITE.value,
        "about": suite.__doc__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine() | {"threads": threads()},
        **measured,
    }
    out = _OUT.value
    (out / "benchmarks").mkdir(parents=True, exist_ok=True)
    storage.write_json(out / "benchmarks" / f"{_SUITE.value}.json", record)
    records = [storage.read_json(path) for path in sorted((out / "benchmarks").glob("*.json"))]
    storage.write_atomic(out / "BENCHMARKS.md", report.page(records, str(out)))
    print(report.section(record))


def _check_heeded(takes: tuple[str, ...]):
    for flag, option in ((_PEERS, "peers"), (_SHAPES, "shapes"), (_REPEATS, "repeats")):
        if flag.present and option not in takes:
            raise ConfigError(
                f"--{flag.name}: --suite={_SUITE.value} does not take it; leave it out, "
                f"or take --suite=rule"
            )


def _shape(text: str) -> Shape:
    numbers = text.split("x")
    if len(numbers) != 4 or not all(part.isdigit() and int(part) for part in numbers):
        raise ConfigError(f"--shapes: {text!r} is not BxTxHxD, such as 1x4096x8x128")
    B, T, H, D = map(int, numbers)
    return B, T, H, D


if __name__ == "__main__":
    cli.run(main)
