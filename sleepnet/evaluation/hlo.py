"""A compiled program's text as instructions, and how often each of its computations runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0,
}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(rf"(ROOT )?%?([\w.-]+) = (\(*{_SHAPE.pattern}.*?) ([\w-]+)\(")
_ON_CHIP = "S(1)"  # in a layout on TPU: the array lies in VMEM


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program, as its text tells."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # beside the matrix unit, not in HBM

    @property
    def bytes(self) -> int:
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(f"cannot read the dtype {self.dtype}")
        return _DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program."""

    name: str
    operation: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]  # names
    line: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.line)
        if match is None:
            raise ValueError(f"cannot read this line of the program: {self.line}")
        return match[1]

    @property
    def called(self) -> list[str]:
        """Computations that run once with it; not the body of a loop."""
        return re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", self.line)


class Module:
    """The text of a compiled function, such as `jax.jit(f).lower(...).compile().as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, name = "", None
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if header and not line.startswith(" "):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else self.entry
            elif name and line.startswith("  "):
                instruction = _read(line.strip())
                if instruction:
                    self.computations[name][instruction.name] = instruction

    def operands(self, computation: str, instruction: Instruction) -> list[Array]:
        """What it takes, the members of a tuple one by one."""
        known = self.computations[computation]
        return [x for name in instruction.operands if name in known for x in known[name].results]

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation].values() if i.is_root)

    @functools.cached_property
    def runs(self) -> list[tuple[str, int]]:
        """Every computation that runs, those within fusions too, with how often."""
        return list(self._visits(self.entry, 1))

    @functools.cached_property
    def scheduled_runs(self) -> list[tuple[str, int]]:
        """Those whose instructions each read and write memory: not what is fused into one."""
        return list(self._visits(self.entry, 1, fused=False))

    def _visits(self, name: str, trips: int, fused: bool = True) -> Iterator[tuple[str, int]]:
        yield name, trips
        for instruction in self.computations[name].values():
            operation, line = instruction.operation, instruction.line
            if operation == "conditional" and not self._is_idle(instruction):
                raise ValueError(f"cannot read how often each branch of it runs: {line}")
            if operation == "while":
                body = instruction.attribute(r"body=%?([\w.-]+)")
                yield from self._visits(body, trips * self._trip_count(instruction), fused)
            elif fused or operation == "call":
                for called in instruction.called:
                    yield from self._visits(called, trips, fused)

    def _is_idle(self, conditional: Instruction) -> bool:
        """Whether no branch multiplies or communicates."""
        branches = conditional.attribute(r"branch_computations={(.*?)}")
        return not any(
            re.sub("-start$", "", instruction.operation) in (*PRODUCTS, *COLLECTIVES)
            for branch in re.findall(r"[\w.-]+", branches)
            for name, _ in self._visits(branch, 1)
            for instruction in self.computations[name].values()
        )

    def _trip_count(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line)
        if known:
            return int(known[1])
        # XLA for TPU leaves the count to the condition: from zero up to a constant.
        condition = self.computations[loop.attribute(r"condition=%?([\w.-]+)")]
        text = "\n".join(instruction.line for instruction in condition.values())
        constants = re.findall(r" s32\[\]\S* constant\((\d+)\)", text)
        if not re.search(r"ROOT .* compare\(.*direction=LT", text) or len(constants) != 1:
            raise ValueError(f"cannot read this condition of a loop: {text}")
        return int(constants[0])


PRODUCTS = ("dot", "convolution")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def _read(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, results, *_, operation = match.groups()
    return Instruction(
        name=name,
        operation=operation,
        results=tuple(
            Array(dtype, tuple(int(n) for n in shape.split(",") if n), _ON_CHIP in layout)
            for dtype, shape, layout in _SHAPE.findall(results)
        ),
        operands=tuple(re.findall(r"%([\w.-]+)", _within_brackets(line, match.end()))),
        line=line,
        is_root=bool(root),
    )


def _within_brackets(line: str, start: int) -> str:
    depth = 1
    for end in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        if depth == 0:
            return line[start:end]
    raise ValueError(f"cannot read this line of the program: {line}")
