"""What a compiled program does, read from its text: products and collectives, per device.

The body of a loop counts as often as it runs; XLA's own count (`cost_analysis`) takes it once.
"""

import functools
import math
import re

_DTYPE_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(rf"(?:ROOT )?%?([\w.-]+) = (\(?{_SHAPE.pattern}.*?) ([\w-]+)\(")
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def _dimensions(text):
    return [int(n) for n in text.split(",") if n]


def _found(pattern, line):
    match = re.search(pattern, line)
    if match is None:
        raise ValueError(f"cannot read this line of the program: {line}")
    return match[1]


def _result_bytes(operation, text, line):
    sizes = []
    for dtype, dimensions in _SHAPE.findall(text):
        if dtype not in _DTYPE_BYTES:
            raise ValueError(f"cannot read the dtype {dtype} in this line of the program: {line}")
        sizes.append(_DTYPE_BYTES[dtype] * math.prod(_dimensions(dimensions)))
    if operation in ("all-gather-start", "collective-permute-start"):
        # The operand, the result, and for some the scalars of a context.
        arrays = [size for size in sizes if size > 4] or sizes
        if len(arrays) > 2:
            raise ValueError(f"cannot read this line of the program: {line}")
        return arrays[-1]
    return sum(sizes)


class Program:
    """Of a compiled function, such as `jax.jit(f).lower(...).compile()`."""

    def __init__(self, compiled):
        self.computations, name = {}, None
        for line in compiled.as_text().splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if header and not line.startswith(" "):
                name = header[2]
                self.computations[name] = []
                self.entry = name if header[1] else getattr(self, "entry", None)
            elif name and line.startswith("  "):
                self.computations[name].append(line.strip())

    @functools.cached_property
    def dot_flops(self) -> int:
        """Of all products of matrices that XLA did not hand to a library or a kernel."""
        return sum(trips * self._dot_flops(name) for name, trips in self._visits(self.entry))

    @functools.cached_property
    def collectives(self) -> list[tuple[str, int]]:
        """(kind, bytes of the result) of every collective, as often as it runs.

        On TPU one that overlaps with products is written in each of the fusions that it spans:
        its channel tells that it is the same.
        """
        found, homes = [], {}
        for name, trips in self._visits(self.entry):
            for line in self.computations[name]:
                match = _INSTRUCTION.match(line)
                kind = re.sub("-start$", "", match[5]) if match else None
                if match and kind in _COLLECTIVES:
                    channel = _found(r"channel_id=(\d+)", line)
                    size = _result_bytes(match[5], match[2], line)
                    if homes.setdefault((kind, channel, size), name) == name:
                        found += [(kind, size)] * trips
        return found

    def _visits(self, name, trips=1):
        """Every computation that runs, with how often."""
        yield name, trips
        for line in self.computations[name]:
            if " conditional(" in line and not self._is_idle(line):
                raise ValueError(f"cannot read how often each branch of it runs: {line}")
            body = re.search(r"body=%?([\w.-]+)", line)
            if body:
                yield from self._visits(body[1], trips * self._trip_count(line))
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line):
                yield from self._visits(called, trips)

    def _is_idle(self, conditional):
        """Whether no branch has anything to count."""
        branches = _found(r"branch_computations={(.*?)}", conditional)
        return not any(
            match and re.sub("-start$", "", match[5]) in ("dot", *_COLLECTIVES)
            for branch in re.findall(r"[\w.-]+", branches)
            for name, _ in self._visits(branch)
            for match in map(_INSTRUCTION.match, self.computations[name])
        )

    def _trip_count(self, loop):
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
        if known:
            return int(known[1])
        # XLA for TPU leaves the count to the condition: from zero up to a constant.
        condition = "\n".join(self.computations[_found(r"condition=%?([\w.-]+)", loop)])
        _found(r"ROOT .* compare\(.*direction=(LT)", condition)
        constants = re.findall(r" s32\[\]\S* constant\((\d+)\)", condition)
        if len(constants) != 1:
            raise ValueError(f"cannot read this condition of a loop: {condition}")
        return int(constants[0])

    def _dot_flops(self, name):
        shapes, flops = {}, 0
        for line in self.computations[name]:
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            shapes[match[1]] = _dimensions(match[4])
            if match[5] == "dot":
                lhs = shapes[_found(r" dot\([^%]*%?([\w.-]+)", line)]
                contracted = _dimensions(_found(r"lhs_contracting_dims=\{([\d,]*)\}", line))
                flops += 2 * math.prod(shapes[match[1]]) * math.prod(lhs[i] for i in contracted)
        return flops
