"""One step compiled: whether it fits, what it moves, and the least time that it can take.

FLOPs, bytes of HBM and bytes sent are read from the compiled program, loops as often as they run
(`sleepnet.evaluation.programs`). The least time is the largest of three, each at the peak rate of
the data sheet as if nothing else took time: products on the matrix unit, of which a float32 one at
the highest precision takes six passes; bytes of HBM; and bytes that a device sends, over the links
of the chip with the fewest. It is a bound, not a forecast: what a run reaches of it is not known
here.
"""

import collections
import dataclasses
import re
import resource
import time
from typing import Any

import jax

from launch.common.chips import GB
from launch.compile.steps import Step
from launch.compile.topologies import Topology
from sleepnet.config.model import REMAT_LEVELS
from sleepnet.evaluation.programs import Program
from sleepnet.experiment import ExperimentConfig

MB = 1e6
# Which code moves bytes of HBM, by what its path contains: the first that fits.
SOURCES = {
    "MLP": ".mlp",
    "attention": "AttentionBlock",
    "delta rule": "DeltaBlock",
    "logits, loss and embedding": "jvp(",
}
REST = "optimizer and copies"
# What would make the largest of the three times smaller.
LIFTS = {
    "FLOP": "more devices, or less recomputing (model.remat)",
    "ICI": "more rows a device at a time, so that parameters are gathered less often; or less "
    "mesh.fsdp and more mesh.data",
}
HBM_LIFTS = {
    "MLP": "more rows a device at a time share a read of its matrices",
    "attention": "a fused kernel, whose scores never leave the chip",
    "delta rule": "a fused kernel: model.backend=pallas has one for the forward pass",
    "logits, loss and embedding": "a loss that takes the vocabulary in pieces",
    REST: "more mesh.fsdp, so that a device updates less",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one step; None where the program did not compile, or nothing is promised of the chip.

    bytes: per device by kind; "temporary" lies beside the others: gradients, activations, whole
      parameters. "total" is all of them and the program's own code.
    hbm_shares: of its bytes, by `SOURCES`.
    exchanged: per kind of collective how often it runs and the bytes that a device sends.
    seconds: per bound the least time.
    """

    step: str
    devices: int
    problem: str | None
    help: str | None
    bytes: dict[str, int]
    room: float | None
    model_flops: int
    flops: int | None
    matrix_unit_flops: int | None
    hbm_bytes: int | None
    hbm_shares: dict[str, float]
    exchanged: dict[str, tuple[int, float]]
    seconds: dict[str, float]
    compile_seconds: float
    compile_cpu_seconds: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measured":
        """Reads back `to_dict`."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in fields})

    @property
    def bound(self) -> str | None:
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None

    @property
    def lift(self) -> str | None:
        if self.bound == "HBM" and "wake" in self.step:
            return "more rows share each read of the parameters"
        if self.bound == "HBM":
            most = max(self.hbm_shares, key=self.hbm_shares.__getitem__)
            return f"{self.hbm_shares[most]:.0%} is {most}: {HBM_LIFTS[most]}"
        return LIFTS[self.bound] if self.bound else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bound": self.bound, "lift": self.lift}


def measure(
    step: Step, config: ExperimentConfig, topology: Topology, *, quick: bool = False
) -> Measured:
    """Compiles it; a program that does not compile is a result too.

    Args:
      quick: with the least effort of the compiler for TPU.
    """
    room = topology.chip.hbm if topology.chip else None
    began, cpu_began = time.perf_counter(), _cpu_seconds()
    compiled, problem = None, None
    known = sum(step.kinds.values())
    if room and known > room:
        problem = f"needs {known / GB:.3g} of {room / GB:.3g} GB for its arguments alone"
    else:
        options = {"exec_time_optimization_effort": -1.0} if quick and topology.chip else None
        try:
            compiled = step.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            problem = _explained(error)
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
    kinds, found = dict(step.kinds), _NOTHING
    if compiled:
        memory = compiled.memory_analysis()
        kinds["temporary"] = memory.temp_size_in_bytes
        kinds["code"] = memory.generated_code_size_in_bytes
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        kinds["total"] = memory.argument_size_in_bytes + new + kinds["temporary"] + kinds["code"]
        if room and kinds["total"] > room:
            problem = f"needs {kinds['total'] / GB:.3g} of {room / GB:.3g} GB"
        found = _read(Program(compiled), topology)
    return Measured(
        step=step.name,
        devices=step.devices,
        problem=problem,
        help=_help(step, config, topology) if problem else None,
        bytes=kinds,
        room=room,
        model_flops=step.flops,
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
        **found,
    )


_NOTHING: dict[str, Any] = dict(
    flops=None, matrix_unit_flops=None, hbm_bytes=None, hbm_shares={}, exchanged={}, seconds={}
)


def _read(program: Program, topology: Topology) -> dict[str, Any]:
    exchanged: dict[str, tuple[int, float]] = {}
    for each in program.exchanges:
        times, sent = exchanged.get(each.kind, (0, 0.0))
        exchanged[each.kind] = (times + each.times, sent + each.sent)
    seconds = {}
    if topology.chip:
        seconds["FLOP"] = program.matrix_unit_flops / topology.chip.flops
        seconds["HBM"] = program.hbm_bytes / topology.chip.hbm_rate
        sent = sum(sent for _, sent in exchanged.values())
        seconds["ICI"] = sent / topology.ici_rate if sent else 0.0
    return dict(
        flops=program.dot_flops,
        matrix_unit_flops=program.matrix_unit_flops,
        hbm_bytes=program.hbm_bytes,
        hbm_shares=_shares(program),
        exchanged=exchanged,
        seconds=seconds,
    )


def _shares(program: Program) -> dict[str, float]:
    found = collections.defaultdict(float)
    for path, size in program.hbm_bytes_by_source.items():
        found[next((name for name, part in SOURCES.items() if part in path), REST)] += size
    return {name: size / program.hbm_bytes for name, size in found.items()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _explained(error: Exception) -> str:
    text = str(error)
    for words in (r"Used ([\d.]+\w) of ([\d.]+\w) hbm", r"\(([\d.]+\w)\) exceeds .*\(([\d.]+\w)\)"):
        if match := re.search(words, text):
            return f"the compiler finds no room: needs {match[1]} of {match[2]}"
    return "does not compile: " + text.strip().splitlines()[0][:200]


def _help(step: Step, config: ExperimentConfig, topology: Topology) -> str:
    """What would need less memory, for the step that needs too much."""
    if step.name != "train":
        return "parameters split over devices, or a chip with more memory"
    mesh, training = config.mesh, config.training
    ways = []
    if mesh.fsdp < step.devices:
        ways.append(f"mesh.fsdp={min(2 * mesh.fsdp, step.devices)}")
    if mesh.gather == "step" and mesh.fsdp > 1:
        ways.append("mesh.gather=block")
    if missing := [level for level in REMAT_LEVELS if level not in config.model.remat_levels]:
        ways.append(f"model.remat={'+'.join(REMAT_LEVELS)} (now without {', '.join(missing)})")
    if training.batch_size // (step.devices * training.parts) > 1:
        ways.append(f"training.parts={2 * training.parts}")
    return ", or ".join(ways) or f"more devices than the {len(topology.devices)} there are"
