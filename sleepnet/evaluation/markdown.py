"""The text of the report, from the numbers of `summarize`."""

from collections.abc import Sequence
from typing import Any

from sleepnet.evaluation.summary import SMOOTHED_ROWS, select

_NOTHING = "–"
_HOW_CURVES = (
    f"Tokens predicted right on training batches: centred moving average over {SMOOTHED_ROWS} "
    f"logged rows, mean over seeds; thin lines are the seeds. Tokens count every place of "
    f"every window, padding included; FLOPs the matrix products, backward included."
)
_HOW_STREAMING = (
    "Streaming agreement: the largest difference in nats between -log p through `wake` token by "
    "token with `sleep` at boundaries and through `rollout`, beside the largest -log p; and the "
    "share of equal predictions. Wall time is of training, compilation included, over all starts."
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    rows = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def measured_table(columns: Sequence[str], rows: Sequence[dict]) -> str:
    """What a benchmark measured: numbers as many as are worth reading, those of three as their
    median with its quantiles."""
    return table(columns, [[_shown(key, row.get(key)) for key in columns] for row in rows])


def accuracy_table(summary: dict, measure: str = "accuracy") -> str:
    """How it was trained, evaluated at the trained N, by depth.

    Args:
      summary: from `summarize`.
      measure: "accuracy" or "exact".
    """
    own = [row for row in summary["results"] if row["trained"] == row["passes"]]
    depths = _depths(own)
    rows = []
    for name in summary["names"]:
        of_depth = {row["depth"]: row[measure] for row in select(own, name=name)}
        seeds = len(select(own, name=name)[0]["seeds"])
        rows.append([name, seeds, *(_interval(of_depth[depth]) for depth in depths)])
    floor_name = {"accuracy": "floor", "exact": "exact_floor"}[measure]
    floors = {row["depth"]: row[floor_name] for row in own}
    rows.append(["floor", "", *(_share(floors[depth]) for depth in depths)])
    return table(["trained", "seeds", *_depth_names(depths, summary["depth_name"])], rows)


def passes_table(summary: dict) -> str:
    """N at test by how it was trained, over all depths."""
    rows = select(summary["results"], depth=None)
    every = sorted({row["passes"] for row in rows})
    cells = {(row["name"], row["passes"]): _interval(row["accuracy"]) for row in rows}
    return table(
        ["", *(f"N = {passes} at test" for passes in every)],
        [
            [f"trained {name}", *(cells.get((name, passes), _NOTHING) for passes in every)]
            for name in summary["names"]
        ],
    )


def record_table(record: dict) -> str:
    """One run's evaluation.json: what was measured by N at test and depth."""
    if "loss" in record["results"][0]:
        return loss_table(record)
    results = record["results"]
    depths = _depths(results)
    rows = []
    for passes in record["request"]["passes"]:
        of_depth = {row["depth"]: row for row in select(results, passes=passes)}
        trained = " (trained)" if passes == record["trained_passes"] else ""
        rows.append([f"N = {passes}{trained}", *(_result(of_depth[depth]) for depth in depths)])
    floors = {row["depth"]: row["floor"] for row in results}
    rows.append(["floor", *(_share(floors[depth]) for depth in depths)])
    return table(["", *_depth_names(depths, record["depth_name"])], rows)


def loss_table(record: dict) -> str:
    """The evaluation.json of a run on text: a row for each N, over all windows and by window."""
    results = record["results"]
    depths = [depth for depth in _depths(results) if depth is not None]
    rows = []
    for passes in record["request"]["passes"]:
        of_depth = {row["depth"]: row for row in select(results, passes=passes)}
        all_windows = of_depth[None]
        trained = " (trained)" if passes == record["trained_passes"] else ""
        loss = f"{all_windows['loss']:.4f} [{all_windows['loss_low']:.4f}, "
        rows.append(
            [f"N = {passes}{trained}", f"{loss}{all_windows['loss_high']:.4f}]",
             f"{all_windows['perplexity']:.3f}", _bits(all_windows["bits_per_byte"]),
             _share(all_windows["accuracy"]), *(f"{of_depth[d]['loss']:.3f}" for d in depths)]
        )  # fmt: skip
    names = [f"window {depth}" for depth in depths]
    heads = ["", "nats per token", "perplexity", "bits per byte", "likeliest", *names]
    lines = [table(heads, rows), *_lost(results[-1].get("lost_bytes", 0))]
    return "\n\n".join(lines)


def _lost(lost_bytes: int | None) -> list[str]:
    if lost_bytes == 0:
        return []
    how_many = "an unknown number of" if lost_bytes is None else f"{lost_bytes:,}"
    advice = "; tokenise the text again to count them" if lost_bytes is None else ""
    return [
        f"Bits per byte are not stated: the tokens do not determine {how_many} bytes of the "
        f"held-out text{advice}."
    ]


def section(summary: dict, files: dict[str, str], commands: str) -> str:
    """All that the report says of one group.

    Args:
      summary: from `summarize`.
      files: from `draw`.
      commands: the shell lines that make this section again.
    """
    parts = [
        "## Accuracy by depth",
        _how_intervals(summary),
        accuracy_table(summary),
        _figure("accuracy_by_depth", files),
        "All answers of that depth in an example right:",
        accuracy_table(summary, "exact"),
        "## Other N at test",
        "Answers right over all depths.",
        passes_table(summary),
        _figure("passes_at_test", files),
        "## Learning curves",
        _HOW_CURVES,
        _figure("learning_curves", files),
        "## Time",
        _latency(summary, files),
        "## Runs",
        _runs_table(summary),
        f"Machine that evaluated: {_machines(summary)}.",
        "## Do it again",
        f"```\n{commands}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_intervals(summary) -> str:
    seeds = {len(row["seeds"]) for row in summary["results"]}
    how = []
    if max(seeds) > 1:
        how.append(
            "Mean over seeds of training with its 95% interval (Student's t, clipped to [0, 1]): "
            "how much seeds differ on the same held-out examples."
        )
    if min(seeds) == 1:
        how.append(
            "Of one seed alone, the 95% Wilson interval with one trial per example: it says "
            "nothing of other seeds."
        )
    if any("k = " in name for name in summary["names"]):
        how.append(
            "Where k is given, gradients of training ran through the last k of a window's N passes "
            "(`model.gradient_passes`), else through all."
        )
    examples = sorted({run["request"]["examples"] for run in summary["runs"]})
    held_out = f"{', '.join(map(str, examples))} held-out examples a run, at step {summary['step']}"
    return (
        f"Each model answers in one pass per token, after sleeps with the N it was trained with. "
        f"{' '.join(how)} {held_out}. The floor is the best answer that never reads the context."
    )


def _latency(summary, files) -> str:
    latency = summary["latency"]
    if latency is None:
        return "Not measured (`--nolatency`)."
    wake = table(
        ["N", "windows before", "median ms per token", "p90"],
        [[row["passes"], row["windows"], *_times(row)] for row in latency["wake"]],
    )
    sleep = table(
        ["one full window", "median ms", "p90"],
        [
            ["wake (prefill)", *_times(latency["prefill"])],
            *([f"sleep, N = {row['passes']}", *_times(row)] for row in latency["sleep"]),
        ],
    )
    where = f"Batch {latency['batch_size']}, {_machine(latency['machine'])}"
    intro = (
        f"{where}; medians over {latency['runs']} run(s). Points are medians, whiskers reach to "
        f"the 90th percentile. N = 1 sleeps by eviction alone. "
        f"`wake` is timed inside jit; outside it, the call first checks its tokens on the host."
    )
    figures = (_figure(name, files) for name in ("wake_latency", "sleep_latency"))
    return "\n\n".join((intro, wake, sleep, *figures))


def _runs_table(summary) -> str:
    header = ["workdir", "trained", "seed", "tokens", "FLOPs", "wall time"]
    header += ["max nll gap", "same token"]
    rows = []
    for run in summary["runs"]:
        agreed = run["agreement"]
        streaming = [_NOTHING, _NOTHING]
        if agreed:
            gap = f"{agreed['max_nll_difference']:.1e} of {agreed['max_nll']:.2g}"
            streaming = [gap, f"{agreed['equal_predictions']:.2%}"]
        rows.append(
            [f"`{run['workdir']}`", run["name"], run["seed"], _count(run["tokens"]),
             f"{run['flops']:.2e}", _seconds(run["seconds"]), *streaming]
        )  # fmt: skip
    return f"{table(header, rows)}\n\n{_HOW_STREAMING}"


def _machines(summary) -> str:
    return "; ".join(dict.fromkeys(_machine(run["machine"]) for run in summary["runs"]))


def _machine(machine: dict) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['devices']} JAX device(s) "
        f"({machine['device']}), jax {machine['jax']}, Python {machine['python']}"
    )


def _depths(rows: Sequence[dict]) -> list[int | None]:
    """In the order of evaluation: rising, and last all together."""
    return list(dict.fromkeys(row["depth"] for row in rows))


def _depth_names(depths, depth_name: str) -> list[str]:
    return ["all" if depth is None else f"{depth} {depth_name}" for depth in depths]


def _figure(name: str, files: dict[str, str]) -> str:
    return f"![{name.replace('_', ' ')}]({files[name]})" if name in files else ""


def _interval(estimate: dict) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _result(row: dict) -> str:
    return f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _bits(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _times(row: dict) -> tuple[str, str]:
    return f"{row['median_ms']:.3g}", f"{row['p90_ms']:.3g}"


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _seconds(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0f} s"


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        middle, low, high = value
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    if isinstance(value, float):
        if " of " in key:
            return f"{value:.0%}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
