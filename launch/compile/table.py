"""Compiled steps as tables for people."""

from collections.abc import Sequence

from launch.common.chips import GB
from launch.compile.costs import Measured
from sleepnet.evaluation.markdown import table

_NOTHING = "–"
_KINDS = ("parameters", "optimizer", "state", "batch", "temporary", "code", "total")


def memory(rows: Sequence[Measured]) -> str:
    """Bytes per device by kind."""
    kinds = [kind for kind in _KINDS if any(kind in row.bytes for row in rows)]
    header = ["step", "devices", *(f"{kind} GB" for kind in kinds), "of GB", "fits"]
    return table(
        header,
        [
            [
                row.step,
                str(row.devices),
                *(_gigabytes(row.bytes.get(kind)) for kind in kinds),
                f"{row.room / GB:.0f}" if row.room else _NOTHING,
                "no" if row.problem else "yes",
            ]
            for row in rows
        ],
    )


def work(rows: Sequence[Measured]) -> str:
    """FLOPs, bytes moved and sent per device, and the least time with what holds it."""
    header = ["step", "model TFLOP", "TFLOP", "as bf16 passes", "HBM GB", "sent GB",
              "least ms FLOP", "HBM", "ICI", "bound", "compiled in s"]  # fmt: skip
    return table(
        header,
        [
            [
                row.step,
                _number(row.model_flops / 1e12),
                _number(row.flops and row.flops / 1e12),
                _number(row.matrix_unit_flops and row.matrix_unit_flops / 1e12),
                _gigabytes(row.hbm_bytes),
                _gigabytes(None if row.flops is None else _sent(row)),
                *(_number(1e3 * row.seconds[b] if row.seconds else None)
                  for b in ("FLOP", "HBM", "ICI")),
                row.bound or _NOTHING,
                f"{row.compile_seconds:.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def exchange(rows: Sequence[Measured]) -> str:
    """Collectives by kind: how often a device takes part, and what it sends."""
    lines = [
        [row.step, kind, str(times), _gigabytes(sent)]
        for row in rows
        for kind, (times, sent) in sorted(row.exchanged.items())
    ]
    return table(["step", "collective", "times", "sent GB"], lines) if lines else ""


def traffic(rows: Sequence[Measured]) -> str:
    """Shares of the bytes of HBM by the code that moves them."""
    sources = list(dict.fromkeys(source for row in rows for source in row.hbm_shares))
    lines = [[row.step, *(f"{row.hbm_shares.get(s, 0.0):.0%}" for s in sources)] for row in rows]
    return table(["step", *sources], lines) if sources else ""


def problems(rows: Sequence[Measured]) -> list[str]:
    """A line for each step that does not compile or fit, with what would help."""
    return [f"{row.step}: {row.problem}; try {row.help}" for row in rows if row.problem]


def lifts(rows: Sequence[Measured]) -> list[str]:
    """A line for each step whose bound is not that of its products."""
    return [
        f"{row.step}: {row.bound} bound; what lifts it: {row.lift}"
        for row in rows
        if row.bound not in (None, "FLOP")
    ]


def _sent(row: Measured) -> float:
    return sum(sent for _, sent in row.exchanged.values())


def _gigabytes(size: float | None) -> str:
    return _NOTHING if size is None else _number(size / GB)


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
