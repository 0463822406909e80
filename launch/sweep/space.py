"""The runs of a sweep: every combination of the grid, for every sample of the random fields."""

import dataclasses
import itertools
import math
import random
import re
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections

from launch.common import cli
from sleepnet.config import ConfigError
from sleepnet.config.checks import choices, nearest
from sleepnet.experiment import ExperimentConfig, field_paths, fields_at
from sleepnet.training import sharding

KINDS = ("log", "uniform", "int")


@dataclasses.dataclass(frozen=True)
class Draw:
    """A distribution of one field: "log" and "uniform" over [low, high], "int" with both ends."""

    field: str
    kind: str
    low: float
    high: float

    def text(self, seed: int, sample: int) -> str:
        """Of one sample, whatever other samples and fields there are."""
        source = random.Random(f"{seed}/{sample}/{self.field}")
        if self.kind == "int":
            return str(source.randint(int(self.low), int(self.high)))
        if self.kind == "log":
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        return f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder's name, the fields that set it apart, and its validated config."""

    name: str
    fields: dict[str, str]
    config: ExperimentConfig

    @property
    def overrides(self) -> list[str]:
        return [f"--config.{field}={value}" for field, value in self.fields.items()]


def parse_grid(text: str) -> tuple[str, list[str]]:
    """ "model.passes=1,2,4" -> ("model.passes", ["1", "2", "4"])."""
    field, equals, values = text.partition("=")
    listed = [value for value in values.split(",") if value]
    if not equals or not listed:
        raise ConfigError(f"--grid={text} is not SECTION.FIELD=VALUE,VALUE, as model.passes=1,2,4")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"--grid={text} names a value twice")
    return field, listed


def parse_draw(text: str) -> Draw:
    """ "training.muon_learning_rate=log:1e-3:3e-2"."""
    field, _, rest = text.partition("=")
    kind, *bounds = rest.split(":")
    if kind not in KINDS:
        raise ConfigError(choices(f"--random={text}", kind, KINDS, what="no such distribution"))
    try:
        low, high = map(float, bounds)
    except ValueError:
        raise ConfigError(
            f"--random={text} is not SECTION.FIELD={kind}:LOW:HIGH, as "
            f"training.muon_learning_rate=log:1e-3:3e-2"
        ) from None
    if not low < high or (kind == "log" and low <= 0):
        above = "0 < LOW < HIGH" if kind == "log" else "LOW < HIGH"
        raise ConfigError(f"--random={text} needs {above}")
    if kind == "int" and (low != int(low) or high != int(high)):
        raise ConfigError(f"--random={text} needs whole numbers")
    return Draw(field, kind, low, high)


def make_runs(
    base: ml_collections.ConfigDict,
    grid: Sequence[tuple[str, list[str]]],
    draws: Sequence[Draw],
    samples: int,
    seed: int,
) -> list[Run]:
    """All runs, validated.

    Raises:
      ConfigError: names every combination that cannot be, and why.
    """
    fields = [field for field, _ in grid] + [draw.field for draw in draws]
    for field in fields:
        _check_field(field)
        if fields.count(field) > 1:
            raise ConfigError(f"{field} is given twice")
    runs, bad = [], []
    for sample in range(samples if draws else 1):
        drawn = {draw.field: draw.text(seed, sample) for draw in draws}
        for values in itertools.product(*(values for _, values in grid)):
            chosen = dict(zip((field for field, _ in grid), values, strict=True)) | drawn
            name = _name(chosen)
            try:
                runs.append(Run(name, chosen, _config(base, chosen)))
            except ConfigError as error:
                bad.append(f"  {name}: {error}")
    _refuse(bad, len(runs) + len(bad))
    return list({run.name: run for run in runs}.values())  # two draws may round to one


def check_meshes(runs: Sequence[Run], num_devices: int):
    """Raises ConfigError with every run whose mesh does not fit so many devices, and why."""
    bad = []
    for run in runs:
        try:
            sharding.mesh_shape(run.config, num_devices)
        except ConfigError as error:
            bad.append(f"  {run.name}: {error}")
    _refuse(bad, len(runs))


def _refuse(bad: list[str], num_runs: int):
    if bad:
        raise ConfigError(f"{len(bad)} of {num_runs} runs cannot be; nothing was started:\n"
                          + "\n".join(bad))  # fmt: skip


def _config(base: ml_collections.ConfigDict, chosen: dict[str, str]) -> ExperimentConfig:
    values = base.to_dict()
    for path, text in chosen.items():
        section, field = path.split(".")
        if field not in values[section]:
            raise ConfigError(choices(path, field, values[section], what="no such field"))
        values[section][field] = _parse(path, text)
    return cli.experiment_config(ml_collections.ConfigDict(values))


def _parse(path: str, text: str):
    """As the field's type would be read from a flag."""
    if text == "None" and cli.reads_none(path):
        return None
    kind: Any = fields_at(path)[0].type
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple or kind is bool:
        raise ConfigError(f"{path}={text}: a sweep takes numbers, names, true and false")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{path} must be of type {kind.__name__}; got {text!r}") from None


def _check_field(path: str):
    known = field_paths()
    if path not in known:
        raise ConfigError(f"{path}: no such field; the nearest is {nearest(path, known)}")


def _name(chosen: dict[str, str]) -> str:
    """ "passes=2_seed=0": fields by their last names where these are enough to tell them apart."""
    short = [path.split(".")[1] for path in chosen]
    parts = [
        f"{path if short.count(name) > 1 else name}={value}"
        for (path, value), name in zip(chosen.items(), short, strict=True)
    ]
    return re.sub(r"[^\w.=+-]", "-", "_".join(parts)) or "run"
