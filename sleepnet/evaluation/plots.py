"""Figures that read in black and white: markers, line styles and greys tell lines apart."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sleepnet.evaluation.summary import select

_DPI = 130
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "errorbar.capsize": 2.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
}
# In the order of N; more than six lines begin anew.
_LINES = (
    {"color": "0.0", "linestyle": "-", "marker": "o"},
    {"color": "0.4", "linestyle": "--", "marker": "s"},
    {"color": "0.0", "linestyle": "-.", "marker": "^", "markerfacecolor": "white"},
    {"color": "0.5", "linestyle": ":", "marker": "D"},
    {"color": "0.2", "linestyle": (0, (6, 2)), "marker": "v", "markerfacecolor": "white"},
    {"color": "0.6", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
)
THIN = {"color": "0.55", "linewidth": 0.8, "zorder": 0}


def draw(summary: dict, folder: pathlib.Path, prefix: str = "") -> dict[str, str]:
    """Draws every figure for which there are numbers.

    Args:
      summary: from `summarize`.
      folder: exists; gets the PNG files.
      prefix: of their names.

    Returns:
      Name of the figure -> file name, in the order of the report.
    """
    figures: dict[str, Callable[[dict], Figure]] = {
        "accuracy_by_depth": accuracy_by_depth,
        "learning_curves": learning_curves,
        "passes_at_test": passes_at_test,
    }
    if summary["latency"]:
        figures |= {"wake_latency": wake_latency, "sleep_latency": sleep_latency}
    files = {}
    for name, make in figures.items():
        files[name] = f"{prefix}{name}.png"
        with mpl.rc_context(LOOK):
            save(make(summary), folder / files[name])
    return files


def save(figure: Figure, path: pathlib.Path):
    """As PNG; without the version of matplotlib, so that equal numbers give equal files."""
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def accuracy_by_depth(summary: dict) -> Figure:
    """Accuracy against depth at the trained N: a line per way of training, and the floor."""
    figure, (axes,) = _figure(columns=1)
    names = summary["names"]
    by_depth = [row for row in summary["results"] if row["depth"] is not None]
    floors = {row["depth"]: row["floor"] for row in by_depth}
    depths = list(floors)
    for number, name in enumerate(names):
        rows = [row for row in select(by_depth, name=name) if row["passes"] == row["trained"]]
        x = _side_by_side(depths, number, len(names))
        _line_with_bars(axes, x, [row["accuracy"] for row in rows], number, name)
    axes.plot(depths, list(floors.values()), label="floor: context not read", **THIN)
    _share_axis(axes, f"depth ({summary['depth_name']})", "answers right (share)")
    axes.set_xticks(depths)
    _legend(axes)
    return figure


def learning_curves(summary: dict) -> Figure:
    """Training accuracy against tokens and against FLOPs; thin lines are seeds."""
    figure, panels = _figure(columns=2)
    units = (("tokens", "training tokens"), ("flops", "training FLOPs"))
    for axes, (total, label) in zip(panels, units, strict=True):
        for number, curve in enumerate(summary["curves"]):
            style = line_style(number)
            for of_seed in curve["accuracy"]["of_seeds"]:
                axes.plot(
                    curve[total], of_seed, linewidth=0.5, alpha=0.5,
                    color=style["color"], linestyle=style["linestyle"],
                )  # fmt: skip
            axes.plot(
                curve[total], curve["accuracy"]["mean"], label=curve["name"],
                markevery=max(1, len(curve[total]) // 8), **style,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
        _share_axis(axes, label, "tokens right in training (share)")
    panels[0].legend()
    return figure


def passes_at_test(summary: dict) -> Figure:
    """Accuracy over all depths against N at test: a line per way of training."""
    figure, (axes,) = _figure(columns=1)
    names = summary["names"]
    for number, name in enumerate(names):
        rows = select(summary["results"], name=name, depth=None)
        rows = sorted(rows, key=lambda row: row["passes"])
        x = _side_by_side([row["passes"] for row in rows], number, len(names))
        _line_with_bars(axes, x, [row["accuracy"] for row in rows], number, f"trained at {name}")
    floor = select(summary["results"], depth=None)[0]["floor"]
    axes.axhline(floor, label="floor: context not read", **THIN)
    _share_axis(axes, "N at test (passes of each sleep)", "answers right, all depths (share)")
    axes.set_xticks(sorted({row["passes"] for row in summary["results"]}))
    _legend(axes)
    return figure


def wake_latency(summary: dict) -> Figure:
    """Time of one token against N, in the first window and after many."""
    figure, (axes,) = _figure(columns=1)
    wake = summary["latency"]["wake"]
    for number, windows in enumerate(sorted({row["windows"] for row in wake})):
        label = f"after {windows} windows" if windows else "in the first window"
        _timing_line(axes, select(wake, windows=windows), number, label)
    _time_axes(axes, wake, "N (passes of each sleep before)", "wake (ms per token)")
    return figure


def sleep_latency(summary: dict) -> Figure:
    """Time of the sleep of one full window against N, beside the wake that reads it."""
    figure, (axes,) = _figure(columns=1)
    latency = summary["latency"]
    _timing_line(axes, latency["sleep"], 0, "one sleep")
    prefill = latency["prefill"]["median_ms"]
    axes.axhline(prefill, label="wake of the same window (prefill)", **THIN)
    _time_axes(axes, latency["sleep"], "N (passes)", "time of a full window (ms)")
    return figure


def _figure(columns: int) -> tuple[Figure, Any]:
    # No pyplot: it would keep every figure, and ask for a display.
    figure = Figure(figsize=(1.2 + 3.6 * columns, 3.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def line_style(number: int) -> dict:
    return _LINES[number % len(_LINES)]


def _side_by_side(x: list[float], number: int, lines: int) -> list[float]:
    """x, moved a little, so that the intervals of equal values can be told apart."""
    step = 0.012 * (max(x) - min(x) or 1)
    return [value + step * (number - (lines - 1) / 2) for value in x]


def _legend(axes):
    """Measured lines first, then what they are compared with."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: not isinstance(entry[0], ErrorbarContainer))
    axes.legend(*zip(*entries, strict=True))


def _line_with_bars(axes, x, estimates: list[dict], number: int, label: str):
    mean, low, high = ([estimate[key] for estimate in estimates] for key in ("mean", "low", "high"))
    below = [m - bound for m, bound in zip(mean, low, strict=True)]
    above = [bound - m for m, bound in zip(mean, high, strict=True)]
    axes.errorbar(x, mean, yerr=(below, above), elinewidth=0.8, label=label, **line_style(number))


def _timing_line(axes, rows: list[dict], number: int, label: str):
    x, median = [row["passes"] for row in rows], [row["median_ms"] for row in rows]
    to_p90 = [max(0.0, row["p90_ms"] - row["median_ms"]) for row in rows]
    none = [0.0] * len(rows)
    axes.errorbar(x, median, yerr=(none, to_p90), elinewidth=0.8, label=label, **line_style(number))


def _share_axis(axes, xlabel: str, ylabel: str):
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.02, 1.03))


def _time_axes(axes, rows: list[dict], xlabel: str, ylabel: str):
    axes.set(xlabel=xlabel, ylabel=ylabel, xticks=sorted({row["passes"] for row in rows}))
    highest = max(axes.get_ylim()[1], *(row["p90_ms"] for row in rows))
    axes.set_ylim(0, 1.1 * highest)  # from 0: flat must look flat
    _legend(axes)
