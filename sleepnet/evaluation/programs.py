"""What a compiled program does, read from its text: products, memory and exchange, per device.

The body of a loop counts as often as it runs; XLA's own count (`cost_analysis`) takes it once.
"""

import collections
import functools
import itertools
import math
import re
from typing import NamedTuple

from sleepnet.evaluation.hlo import COLLECTIVES, Array, Instruction, Module
from sleepnet.evaluation.traffic import hbm_bytes

# Passes of the bfloat16 matrix unit of a TPU that a float32 product takes, by its precision.
MATRIX_PASSES = {"highest": 6, "high": 3}


class Exchange(NamedTuple):
    """One collective of a program.

    kind: such as "all-gather".
    size: bytes of its result on one device.
    group: devices that take part with each other.
    times: how often it runs.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, all times, where the group is a ring."""
        share = (self.group - 1) / self.group
        of_result = {
            "all-gather": share,
            "all-to-all": share,
            "reduce-scatter": self.group - 1,
            "all-reduce": 2 * share,
            "collective-permute": 1,
        }[self.kind]
        return of_result * self.size * self.times


class Program:
    """Of a compiled function, such as `jax.jit(f).lower(...).compile()`."""

    def __init__(self, compiled):
        self.module = Module(compiled.as_text())

    @functools.cached_property
    def dot_flops(self) -> int:
        """Of all products of matrices that XLA did not hand to a library or a kernel."""
        return round(sum(flops for flops, _ in self._products()))

    @functools.cached_property
    def matrix_unit_flops(self) -> int:
        """The same, each times the bfloat16 passes that its precision takes on a TPU."""
        return round(sum(flops * passes for flops, passes in self._products()))

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Read and written by instructions outside fast memory; see `traffic`."""
        return sum(self.hbm_bytes_by_source.values())

    @functools.cached_property
    def hbm_bytes_by_source(self) -> dict[str, int]:
        """The same by the path of the code that it comes from; "" where none is told."""
        found = collections.Counter()
        for name, times in self.module.scheduled_runs:
            for instruction in self.module.computations[name].values():
                source = re.search(r'op_name="([^"]*)"', instruction.line)
                moved = hbm_bytes(self.module, name, instruction)
                found[source[1] if source else ""] += times * moved
        return dict(found)

    @functools.cached_property
    def collectives(self) -> list[tuple[str, int]]:
        """(kind, bytes of the result) of every collective, as often as it runs."""
        return [(x.kind, x.size) for x in self.exchanges for _ in range(x.times)]

    @functools.cached_property
    def exchanges(self) -> list[Exchange]:
        """Every collective.

        On TPU one that overlaps with products is written in each of the fusions that it spans: its
        chain, or else its channel, tells that it is the same.
        """
        found, homes = [], {}
        scheduled = {name for name, _ in self.module.scheduled_runs}
        for name, times in self.module.runs:
            for instruction in self.module.computations[name].values():
                kind = re.sub("-start$", "", instruction.operation)
                if kind not in COLLECTIVES:
                    continue
                size = sum(x.bytes for x in _received(instruction))
                chain = re.search(r'(?:chain_id|async_collective_name)="([^"]*)"', instruction.line)
                if chain:
                    which = chain[0]
                elif name in scheduled:
                    which = f"{name} {instruction.name}"
                else:
                    which = instruction.attribute(r"channel_id=(\d+)")
                if homes.setdefault((kind, which, size), name) == name:
                    found.append(Exchange(kind, size, _group(instruction), times))
        return found

    def _products(self):
        for name, times in self.module.runs:
            for instruction in self.module.computations[name].values():
                if instruction.operation in ("dot", "convolution"):
                    left, right = self.module.operands(name, instruction)
                    count = _dot_flops if instruction.operation == "dot" else _convolution_flops
                    yield times * count(instruction, left, right), _passes(instruction, left, right)


def _received(instruction: Instruction) -> tuple[Array, ...]:
    arrays: tuple[Array, ...] = instruction.results
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        # The operand, the result, and for some the scalars of a context.
        arrays = tuple(x for x in arrays if x.bytes > 4) or arrays
        if len(arrays) > 2:
            raise ValueError(f"cannot read this line of the program: {instruction.line}")
        return arrays[-1:]
    return arrays


def _group(instruction: Instruction) -> int:
    """Devices of a group, from any of the forms in which XLA writes them."""
    line = instruction.line
    if instruction.operation.startswith("collective-permute"):
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    raise ValueError(f"cannot read the devices of this line of the program: {line}")


def _passes(instruction: Instruction, left: Array, right: Array) -> int:
    asked = re.search(r"operand_precision=\{(\w+),(\w+)\}", instruction.line)
    if asked is None or "f32" not in (left.dtype, right.dtype):
        return 1
    return max(MATRIX_PASSES.get(precision, 1) for precision in asked.groups())


def _dot_flops(instruction: Instruction, left: Array, right: Array) -> int:
    del right
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    depth = math.prod(left.shape[int(i)] for i in contracted.split(",") if i)
    return 2 * math.prod(instruction.results[0].shape) * depth


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """XLA for TPU writes every product as a convolution; batch axes become axes of its window."""
    (out,) = instruction.results
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    left_labels, right_labels, out_labels = re.split("_|->", labels)
    depth = right.shape[right_labels.index("i")]
    windows = [_window(instruction.line, i) for i in range(len(left_labels) - 2)]
    used = math.prod(
        _share_used(
            left.shape[left_labels.index(str(i))], right.shape[right_labels.index(str(i))],
            out.shape[out_labels.index(str(i))], **window,
        )
        for i, window in enumerate(windows)
    )  # fmt: skip
    return 2 * math.prod(out.shape) * depth * used


def _window(line: str, axis: int) -> dict[str, int]:
    """Stride, padding and dilations of one axis."""
    match = re.search(r"window=\{(.*?)\}", line)
    fields = dict(re.findall(r"(\w+)=(\S+)", match[1])) if match else {}
    values = {name: text.split("x")[axis] for name, text in fields.items()}
    return {
        "stride": int(values.get("stride", 1)),
        "before": int(values.get("pad", "0_0").split("_")[0]),
        "left_dilation": int(values.get("lhs_dilate", 1)),
        "right_dilation": int(values.get("rhs_dilate", 1)),
    }


@functools.cache
def _share_used(left, right, out, *, stride, before, left_dilation, right_dilation) -> float:
    """Per output, places of the kernel that meet an input: neither padding nor a gap."""
    places = (
        o * stride + k * right_dilation - before
        for o, k in itertools.product(range(out), range(right))
    )
    met = sum(p % left_dilation == 0 and 0 <= p // left_dilation < left for p in places)
    return met / out
