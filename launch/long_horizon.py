"""How long do models remember? python -m launch.long_horizon --workdir=A --workdir=B --out=DIR.

Asks runs of experiments/long_horizon.py for facts that lie further and further back, and writes
DIR/report.md, a figure and results.json. Runs of the same model are averaged over their seeds.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from absl import flags
from matplotlib.figure import Figure

from launch import cli
from sleepnet import storage
from sleepnet.config import ConfigError, ExperimentConfig, FactsConfig
from sleepnet.evaluation.forgetting import forgetting
from sleepnet.evaluation.intervals import student_t
from sleepnet.evaluation.machine import describe_machine
from sleepnet.evaluation.markdown import table
from sleepnet.training.workdir import load_config, load_params

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a trained run; may be given several times.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder for report.md and its figure.", required=True)
_DISTANCES = flags.DEFINE_list(
    "distances", "1,2,4,8,16,32,64,128,256,512,1024,4096,16384", "In pages."
)
_FARTHEST_OF_ALL = flags.DEFINE_integer(
    "farthest_of_all", 512, "Distance beyond which models that keep everything are not asked."
)

_HEAD = """# How long facts are remembered

Written by `make results-long-horizon`. Four facts, "key value", stand on pages of 8 tokens; then
come pages of distractors, and last four questions. Models of two blocks of width 64 learned from
the same {tokens} tokens, or as many times more as their name says, where facts lay up to {trained}
pages back; test sets of facts are never seen in training. What stands in *italics* lies further
back than any of them was trained on.

The hybrids ("AG") and the sliding window ("AA") read a page at a time, and the hybrids sleep behind
each: the distance is the number of sleeps since. "Whole cache" ("AA") reads the same stream as one
window, and nothing leaves its cache.

![Accuracy against distance](forgetting.png)

{table}

Answers right; over several seeds of the parameters their mean, with a 95% interval (Student's t).
An answer that never read the facts is right {floor:.3f} of the time; who names one of the four
values at random, {any:.3f}. {answers} Measured on {machine}. What a token costs at each length of
context stands in [the benchmarks](../BENCHMARKS.md), suite horizon.
"""
_LINES = (
    dict(color="0.0", linestyle="-", marker="o"),
    dict(color="0.4", linestyle="--", marker="s"),
    dict(color="0.0", linestyle=":", marker="^", markerfacecolor="white"),
    dict(color="0.6", linestyle="-.", marker="D"),
    dict(color="0.6", linestyle="-", marker="x"),
)


_Runs = dict[str, list[dict[int, dict]]]  # name -> for each seed, distance -> its result


def main(_):
    out = pathlib.Path(_OUT.value)
    storage.prepare_folder(out)
    workdirs = list(map(pathlib.Path, _WORKDIR.value))
    configs = [load_config(workdir) for workdir in workdirs]
    tasks = [_facts(config) for config in configs]
    fewest = min(map(_tokens, configs, tasks))
    runs: _Runs = {}
    for workdir, config, task in zip(workdirs, configs, tasks, strict=True):
        distances = _distances(task)
        name = _name(config, task) + _more(_tokens(config, task) / fewest)
        print(f"{workdir}: {name}, {len(distances)} distances", flush=True)
        params, _ = load_params(workdir, None)
        results = forgetting(params, config, distances)
        asked = {d: vars(result) for d, result in zip(distances, results, strict=True)}
        runs.setdefault(name, []).append(asked)
    task = tasks[0]
    trained = max(task.depths[-1] for task in tasks)
    record = {"trained": trained, "machine": describe_machine(), "runs": runs}
    storage.write_json(out / "results.json", record)
    _draw(runs, trained).savefig(out / "forgetting.png", dpi=130, metadata={"Software": None})
    storage.write_atomic(out / "report.md", _page(runs, task, trained, fewest))
    print(_table(runs, task, trained))


def _facts(config: ExperimentConfig) -> FactsConfig:
    if not isinstance(config.task, FactsConfig):
        raise ConfigError(f"task.name must be 'facts' in every run; got {config.task.name!r}")
    return config.task


def _name(config: ExperimentConfig, task: FactsConfig) -> str:
    if _keeps_all(task):
        return "whole cache"
    if "G" not in config.model.pattern:
        return f"{config.model.eviction} window"
    return f"hybrid, N = {config.model.passes}"


def _tokens(config: ExperimentConfig, task: FactsConfig) -> int:
    """That a run has learned from."""
    return config.training.steps * config.training.batch_size * task.tokens


def _more(times: float) -> str:
    return "" if times == 1 else f", {times:g} x the tokens"


def _keeps_all(task: FactsConfig) -> bool:
    return task.window == task.tokens


def _distances(task: FactsConfig) -> list[int]:
    farthest = _FARTHEST_OF_ALL.value if _keeps_all(task) else None
    return [d for d in map(int, _DISTANCES.value) if farthest is None or d <= farthest]


def _table(runs: _Runs, task: FactsConfig, trained: int) -> str:
    distances = list(dict.fromkeys(d for seeds in runs.values() for d in seeds[0]))
    rows = []
    for distance in distances:
        cells = [f"{distance:,}", f"{(distance + 1) * task.page:,}"]
        cells += [_share(seeds, distance) for seeds in runs.values()]
        rows.append(cells if distance <= trained else [f"*{cell}*" for cell in cells])
    names = (f"{name} (seeds: {len(seeds)})" for name, seeds in runs.items())
    return table(["pages back", "tokens of context", *names], rows)


def _share(seeds: Sequence[dict], distance: int) -> str:
    if distance not in seeds[0]:
        return "–"
    shares = [seed[distance]["accuracy"] for seed in seeds]
    if len(shares) == 1:
        return f"{shares[0]:.3f}"
    estimate = student_t(shares)
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _page(runs: _Runs, task: FactsConfig, trained: int, tokens: int) -> str:
    every = [row for seeds in runs.values() for seed in seeds for row in seed.values()]
    fewest, most = (pick(row["answers"] for row in every) for pick in (min, max))
    machine = describe_machine()
    return _HEAD.format(
        tokens=f"{tokens / 1e6:.1f}M",
        trained=trained,
        table=_table(runs, task, trained),
        floor=every[0]["floor"],
        any=_some_value(task),
        answers=f"Each share is of {fewest} (the farthest) to {most} answers a seed.",
        machine=f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']}",
    )


def _some_value(task: FactsConfig) -> float:
    """How often one of the values that were told, chosen at random, is the right one."""
    return (1 + (task.facts - 1) / task.values) / task.facts


def _draw(runs: _Runs, trained: int) -> Figure:
    with mpl.rc_context({"font.size": 9, "legend.frameon": False}):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes: Any = figure.subplots()
        for (name, seeds), style in zip(runs.items(), itertools.cycle(_LINES)):
            distances = list(seeds[0])
            means = [sum(s[d]["accuracy"] for s in seeds) / len(seeds) for d in distances]
            axes.plot(distances, means, label=name, **style)
        axes.axvline(trained, color="0.6", linewidth=0.8)
        axes.text(trained * 1.1, 1.06, "beyond training →", color="0.4")
        floor = next(iter(next(iter(runs.values()))[0].values()))["floor"]
        axes.axhline(floor, color="0.6", linewidth=0.8, label="floor: facts not read")
        axes.set(
            xscale="log", ylim=(-0.02, 1.12), ylabel="answers right (share)",
            xlabel="pages since the fact was read; for hybrids, sleeps",
        )  # fmt: skip
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


if __name__ == "__main__":
    cli.run(main)
