"""Reads compiled programs: products and collectives, with loop bodies times their trip counts.

XLA's own count (`cost_analysis`) takes the body of a loop once.
"""

import functools
import math
import re

DTYPE_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2}
SHAPE = r"(\w+)\[([\d,]*)\]"
INSTRUCTION = re.compile(rf"(?:ROOT )?%?([\w.-]+) = (\(?{SHAPE}.*?) ([\w-]+)\(")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def dimensions(text):
    return [int(n) for n in text.split(",") if n]


class Program:
    """The text of a compiled program, per device."""

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
        return sum(trips * self._dot_flops(name) for name, trips in self._visits(self.entry))

    @functools.cached_property
    def collectives(self) -> list[tuple[str, int]]:
        """(kind, bytes of the result) of every collective, as often as it runs."""
        found = []
        for name, trips in self._visits(self.entry):
            for line in self.computations[name]:
                match = INSTRUCTION.match(line)
                kind = match and re.sub("-start$", "", match[5])
                if kind in COLLECTIVES:
                    sizes = [DTYPE_BYTES[t] * math.prod(dimensions(d))
                             for t, d in re.findall(SHAPE, match[2])]  # fmt: skip
                    found += [(kind, max(sizes))] * trips
        return found

    def _visits(self, name, trips=1):
        """Every computation that runs, with how often."""
        yield name, trips
        for line in self.computations[name]:
            body = re.search(r"body=%?([\w.-]+)", line)
            if body:
                count = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
                yield from self._visits(body[1], trips * count)
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line):
                yield from self._visits(called, trips)

    def _dot_flops(self, name):
        shapes, flops = {}, 0
        for line in self.computations[name]:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            shapes[match[1]] = dimensions(match[4])
            if match[5] == "dot":
                lhs = shapes[re.search(r" dot\([^%]*%?([\w.-]+)", line)[1]]
                contracted = dimensions(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1])
                flops += 2 * math.prod(shapes[match[1]]) * math.prod(lhs[i] for i in contracted)
        return flops
