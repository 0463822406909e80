"""Figures of the suites as Markdown."""

from collections.abc import Sequence
from typing import Any

from sleepnet.evaluation.markdown import measured_table

_HEAD = """# Benchmarks

Written by `python -m launch.benchmark --out={out}` from `benchmarks/*.json`; `make benchmark`
repeats them all, `make benchmark-tpu` that of the TPU compiler. Machines are noisy: trust ratios,
which come from calls that took turns, more than times.
"""


def page(records: Sequence[dict[str, Any]], out: str) -> str:
    """All suites that were measured."""
    return "\n".join([_HEAD.format(out=out), *map(section, records)])


def section(record: dict[str, Any]) -> str:
    """One suite: how it was measured, where, and its table."""
    machine = dict(record["machine"])
    where = [machine.pop("cpu"), machine.pop("device"), *(f"{k} {v}" for k, v in machine.items())]
    where += [f"{k} {v}" for peer in record.get("peers", {}).values() for k, v in peer.items()]
    columns = list(dict.fromkeys(key for row in record["rows"] for key in row))
    return "\n".join(
        [
            f"## {record['suite']}",
            "",
            record["about"].strip(),
            "",
            f"{record['date']}: {', '.join(map(str, where))}.",
            "",
            measured_table(columns, record["rows"]),
            "",
        ]
    )
