"""The rows of `launch.pods`: each pod experiment on each of its topologies."""

import dataclasses
import importlib
import pathlib

from launch.sweep import space
from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.experiment import ExperimentConfig, from_dict


@dataclasses.dataclass(frozen=True)
class Pod:
    """One row: an experiment with what its topology changes."""

    experiment: str
    topology: str
    passes: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.experiment}-{self.topology.replace(':', '-')}-n{self.passes}"

    @property
    def changes(self) -> tuple[str, ...]:
        return (f"model.passes={self.passes}", *self.overrides)

    def config(self) -> ExperimentConfig:
        base = importlib.import_module(f"experiments.{self.experiment}").get_config()
        grid = [space.parse_grid(change) for change in self.changes]
        (run,) = space.make_runs(base, grid, [], samples=1, seed=0)
        return run.config

    def command(self, json: pathlib.Path) -> list[str]:
        return ["-m", "launch.compile", f"--config=experiments/{self.experiment}.py",
                f"--topology={self.topology}", *(f"--config.{x}" for x in self.changes),
                f"--json={json}"]  # fmt: skip

    def is_done(self, path: pathlib.Path, quick: bool) -> bool:
        """Return whether a file holds this row, compiled from the present config.

        Args:
          path: of a record that `launch.compile` wrote; it may be missing.
          quick: whether one that was compiled with least effort will do.
        """
        if not path.exists():
            return False
        record = storage.read_json(path)
        try:
            same = from_dict(record["config"]) == self.config()
        except ConfigError:  # a field that is no more
            return False
        return same and (quick or not record["quick"])


PODS = tuple(
    Pod(experiment, topology, passes, overrides)
    for experiment, topology, overrides in (
        ("pod_125m", "v5e:2x4", ()),
        ("pod_1b", "v5e:4x4", ()),
        ("pod_1b", "v5p:2x2x2", ("mesh.fsdp=8",)),
        ("pod_7b", "v5p:4x4x4", ()),
        ("pod_7b", "v5e:16x16", ("mesh.fsdp=256", "training.parts=1")),
    )
    for passes in (1, 4)
)
