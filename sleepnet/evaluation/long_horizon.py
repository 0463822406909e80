"""The page of the long horizon: how long facts are remembered, and what a token costs meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sleepnet.evaluation.intervals import student_t
from sleepnet.evaluation.machine import describe_machine
from sleepnet.evaluation.markdown import measured_table, table
from sleepnet.evaluation.plots import LOOK, THIN, line_style
from sleepnet.tasks import FactsConfig

Runs = Mapping[str, Sequence[Mapping[int, Mapping[str, Any]]]]  # name -> for each seed, by distance

FIGURE = "forgetting.png"
_HEAD = """# The long horizon

Written by `make results-long-horizon`.

## How long facts are remembered

{facts} facts, "key value", stand on pages of {page} tokens; then come pages of distractors, and
last the questions. Models of one size learned from the same {tokens} tokens, or as many times more
as their name says, where facts lay up to {trained} pages back; sets of facts in the test are never
seen in training. What stands in *italics* lies further back than any of them was trained on.

The hybrids ("AG") and the sliding window ("AA") read a page at a time, and the hybrids sleep behind
each: the distance is the number of sleeps since. "Whole cache" ("AA") reads the same stream as one
window, and nothing leaves its cache.

![Accuracy against distance, and time against context]({figure})

{table}

Answers right; over several seeds of the parameters their mean, with a 95% interval (Student's t).
An answer that never read the facts is right {floor:.3f} of the time; who names one of the told
values at random, {any:.3f}. Each share is of {fewest} to {most} answers a seed. Measured on
{machine}.
"""
_COSTS = """
## What a token costs

{model}, batch 1: a mind that sleeps beside attention that keeps all of its context. What the
columns say stands in [the benchmarks](../BENCHMARKS.md), suite horizon, with a larger model.
Measured on {machine}.

{table}
"""
_COLUMNS = (
    "mind", "context", "ms p50", "ms p99", "/ shortest", "answer ms", "read s", "sleep ms",
    "tokens/s", "state MB",
)  # fmt: skip


def page(runs: Runs, task: FactsConfig, trained: int, tokens: int, costs: dict | None) -> str:
    """The page, in Markdown.

    Args:
      runs: of each result "accuracy", "answers" and "floor".
      task: of one of them.
      trained: pages, the farthest that one of them was trained on.
      tokens: that those were trained on whose name says no more.
      costs: what `launch.benchmark --suite=horizon` has written.
    """
    every = [row for seeds in runs.values() for seed in seeds for row in seed.values()]
    answers = [row["answers"] for row in every]
    machine = describe_machine()
    text = _HEAD.format(
        facts=task.facts, page=task.page, tokens=f"{tokens / 1e6:.1f}M", trained=trained,
        figure=FIGURE, table=accuracy_table(runs, task.page, trained), floor=every[0]["floor"],
        any=_some_value(task), fewest=min(answers), most=max(answers),
        machine=f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']}",
    )  # fmt: skip
    return text + (_cost_section(costs) if costs else "")


def accuracy_table(runs: Runs, page_tokens: int, trained: int) -> str:
    """A row for each distance, a column for each model."""
    rows = []
    for distance in dict.fromkeys(d for seeds in runs.values() for d in seeds[0]):
        cells = [f"{distance:,}", f"{(distance + 1) * page_tokens:,}"]
        cells += [_share(seeds, distance) for seeds in runs.values()]
        rows.append(cells if distance <= trained else [f"*{cell}*" for cell in cells])
    names = (f"{name} (seeds: {len(seeds)})" for name, seeds in runs.items())
    return table(["pages back", "tokens of context", *names], rows)


def _share(seeds, distance: int) -> str:
    if distance not in seeds[0]:
        return "–"
    shares = [seed[distance]["accuracy"] for seed in seeds]
    if len(shares) == 1:
        return f"{shares[0]:.3f}"
    estimate = student_t(shares)
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _some_value(task: FactsConfig) -> float:
    """How often one of the values that were told, chosen at random, is the right one."""
    return (1 + (task.facts - 1) / task.values) / task.facts


def _cost_section(costs: dict) -> str:
    rows = _of_smallest(costs)
    machine = costs["machine"]
    return _COSTS.format(
        model=rows[0]["model"],
        machine=f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']}",
        table=measured_table(_COLUMNS, rows),
    )


def _of_smallest(costs: dict) -> list[dict[str, Any]]:
    """The rows of the model that was measured last: the smallest, over the longest contexts."""
    rows = costs["rows"]
    return [row for row in rows if row["model"] == rows[-1]["model"]]


def draw(runs: Runs, trained: int, costs: dict | None) -> Figure:
    """Accuracy against distance, and beside it milliseconds a token against context."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(8.4 if costs else 4.6, 4.2), layout="constrained")
        left, *right = figure.subplots(1, 2 if costs else 1, squeeze=False)[0]
        _draw_accuracy(left, runs, trained)
        if costs:
            _draw_costs(right[0], _of_smallest(costs))
    return figure


def _draw_accuracy(axes, runs: Runs, trained: int):
    for number, (name, seeds) in enumerate(runs.items()):
        distances = list(seeds[0])
        means = [sum(s[d]["accuracy"] for s in seeds) / len(seeds) for d in distances]
        axes.plot(distances, means, label=name, **line_style(number))
    floor = next(iter(next(iter(runs.values()))[0].values()))["floor"]
    axes.axhline(floor, label="floor: facts not read", **THIN)
    axes.axvline(trained, **THIN)
    axes.text(trained * 1.1, 1.06, "beyond training →", color="0.4")
    axes.set(
        xscale="log", ylim=(-0.02, 1.12), ylabel="answers right (share)",
        xlabel="pages since the fact was read; for hybrids, sleeps",
    )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_costs(axes, rows):
    for number, mind in enumerate(dict.fromkeys(row["mind"] for row in rows)):
        timed = [row for row in rows if row["mind"] == mind and isinstance(row["ms p50"], float)]
        contexts = [int(row["context"]) for row in timed]
        axes.plot(contexts, [row["ms p50"] for row in timed], label=mind, **line_style(number))
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms a token, p50")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
