"""All steps of an experiment, compiled for one topology."""

import dataclasses
from collections.abc import Sequence

from launch.compile import costs, table, topologies
from launch.compile import steps as made
from launch.compile.steps import STEPS
from sleepnet.experiment import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found, a row per step."""

    topology: str
    rows: tuple[costs.Measured, ...]

    @property
    def fits(self) -> bool:
        """Whether every step compiles and fits."""
        return not any(row.problem for row in self.rows)

    def text(self) -> str:
        """Tables of memory, work, traffic and exchange, and notes on what does not fit."""
        made_of = (table.memory, table.work, table.traffic, table.exchange)
        tables = [tabulate(self.rows) for tabulate in made_of]
        notes = [*table.problems(self.rows), *table.lifts(self.rows)]
        return "\n\n".join(part for part in (*tables, "\n".join(notes)) if part)

    def to_dict(self) -> dict:
        """Ready for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"topology": self.topology, "fits": self.fits, "steps": rows}


def report(
    config: ExperimentConfig,
    topology: str,
    *,
    steps: Sequence[str] = STEPS,
    rows: int = 8,
    quick: bool = False,
) -> Report:
    """Compiles the steps of an experiment for a topology; runs nothing.

    Args:
      topology: such as "v5e:4x4", or "cpu:8" for devices of this machine.
      steps: of "train", "wake", "sleep"; a model of N = 1 has no sleep to compile.
      rows: minds of the wake step.
      quick: with the least effort of the compiler, whose programs are somewhat slower and larger.

    Raises:
      ConfigError: an unknown topology, no compiler for it, or a mesh that it does not take.
    """
    there = topologies.topology(topology)
    wanted = {
        "train": lambda: made.train(config, there),
        "wake": lambda: made.wake(config, there, rows),
        "sleep": lambda: made.sleep(config, there),
    }
    compiled = [wanted[name]() for name in steps]
    return Report(
        topology,
        tuple(costs.measure(step, config, there, quick=quick) for step in compiled if step),
    )
