"""The page of all pods that were compiled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launch.compile import table
from launch.compile.costs import Measured

_HEAD = """# Pods

Written by `make pods`: each row is compiled ahead of time for its topology on a machine without
TPUs, and never ran on one. Sequences of 8192 tokens in windows of 2048; N = 1 and N = 4 passes.

- **Memory** is per device, in GB of 10^9 bytes, against that of the data sheet. Temporary holds
  gradients, activations and parameters made whole. Train splits the optimizer's state as its
  parameters.
- **Model TFLOP** are the products of `sleepnet.nn.flops` with a backward pass twice as dear,
  nothing computed again; **TFLOP** those of the compiled program, with loops as often as they run;
  **as bf16 passes** counts a float32 product at the highest precision, as all are that touch a fast
  weight, six times. **HBM** is what instructions read and write outside the chip, an estimate;
  **sent** what a device sends if each collective runs in a ring. All per device and step.
- **Least ms** is each of the three at the peak rates of Google's data sheets
  (`launch/common/chips.py`), and the largest is the bound: no step is faster, as far as the counts
  hold, and a real one is slower.
- **Wake** is a token for each of 8 minds, with parameters in bfloat16, on one chip; or, where they
  do not fit, split over all. **Sleep** is that of one window over the chips of one host.
"""
_QUICK = (
    "Rows with * were compiled with the least effort of the compiler "
    "(`exec_time_optimization_effort=-1`). Such programs keep less on the chip and sum gradients "
    "whole before they split them: for 125M, bytes of HBM and bytes sent are about twice those of "
    "full effort. FLOPs are the same."
)


def page(records: Mapping[str, dict[str, Any]], wanted: Sequence[str]) -> str:
    """From what `launch.compile --json` wrote, by the row's name."""
    rows = [row for name, record in records.items() for row in _rows(name, record)]
    parts = [_HEAD.rstrip()]
    if any(record["quick"] for record in records.values()):
        parts.append(_QUICK)
    parts += ["## Memory", table.memory(rows), "## Work and bounds", table.work(rows)]
    parts += [_list(table.problems(rows), "## What does not fit")]
    parts += [_list(table.lifts(rows), "## What would lift the other bounds")]
    parts += ["## Whose bytes of HBM", table.traffic(rows)]
    parts += ["## Collectives", table.exchange(rows)]
    if missing := [name for name in wanted if name not in records]:
        parts.append(f"Not compiled yet: {', '.join(missing)}.")
    parts += ["## Made by", _list([_made(*item) for item in records.items()], "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(name, record):
    mark = "*" if record["quick"] else ""
    for values in record["steps"]:
        row = Measured.from_dict(values)
        yield dataclasses.replace(row, step=f"{name}{mark} {row.step}")


def _made(name, record):
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    when = f"{record['date']}, in {record['seconds']:.0f} s"
    return f"{name}: {when}, libtpu {record['libtpu']}; {machine}"


def _list(lines: Sequence[str], heading: str) -> str:
    return (
        "\n\n".join(x for x in (heading, "\n".join(f"- {x}" for x in lines)) if x) if lines else ""
    )
