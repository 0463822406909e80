"""The numbers behind the report of one group of runs, as plain JSON.

Figures and text are drawn from what `summarize` returns and from nothing else.
"""

import statistics
from collections.abc import Iterable

import numpy as np

from sleepnet.evaluation.intervals import student_t
from sleepnet.evaluation.runs import Run

SMOOTHED_ROWS = 5  # of metrics, in the centred moving average of learning curves


def summarize(group: list[Run]) -> dict:
    """Numbers of one group from `group_runs`.

    Returns:
      config: what its runs share. depth_name, step. names: how its runs were trained, each once.
      results: per name, N at test ("passes") and depth (None: all together): trained N, seeds,
        accuracy and exact, each with mean, low, high (95%) and the values by seed; floors.
      curves: per name: seeds, step, tokens, flops, and smoothed training accuracy and loss:
        the mean over seeds, and each seed's.
      runs: per run what it cost, and how streaming agreed.
      latency: medians over the runs measured on the first machine, or None.
    """
    names = list(dict.fromkeys(run.name for run in group))
    of_name = {name: [run for run in group if run.name == name] for name in names}
    return {
        "config": group[0].shared_config,
        "depth_name": group[0].evaluation["depth_name"],
        "step": group[0].step,
        "names": names,
        "results": [row for name in names for row in _results(of_name[name])],
        "curves": [_curve(of_name[name]) for name in names],
        "runs": [_run(run) for run in group],
        "latency": _latency(group),
    }


def select(rows: Iterable[dict], **wanted) -> list[dict]:
    """The rows whose fields have the wanted values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _results(runs: list[Run]) -> list[dict]:
    """One row per (N at test, depth) that any of the runs was evaluated on."""
    found = {}
    for run in runs:
        for result in run.evaluation["results"]:
            key = result["passes"], result["depth"]
            found.setdefault(key, []).append((run.seed, result))
    rows = []
    for (passes, depth), of_seeds in found.items():
        seeds, results = zip(*of_seeds, strict=True)
        rows.append(
            {
                "name": runs[0].name,
                "trained": runs[0].trained,
                "passes": passes,
                "depth": depth,
                "seeds": list(seeds),
                "accuracy": _estimate(results, "accuracy"),
                "exact": _estimate(results, "exact"),
                "floor": results[0]["floor"],
                "exact_floor": results[0]["exact_floor"],
            }
        )
    return rows


def _estimate(results, name: str) -> dict:
    """Over seeds Student's t; for a single seed the Wilson interval that evaluation took."""
    values = [result[name] for result in results]
    if len(values) > 1:
        return student_t(values)._asdict() | {"values": values}
    (only,) = results
    bounds = {"low": only[f"{name}_low"], "high": only[f"{name}_high"]}
    return {"mean": only[name], **bounds, "values": values}


def _curve(runs: list[Run]) -> dict:
    by_step = [{row["step"]: row for row in run.metrics} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    curve = {"name": runs[0].name, "seeds": [run.seed for run in runs], "step": steps}
    for total in ("tokens", "flops"):
        curve[total] = [by_step[0][step][total] for step in steps]
    for metric in ("accuracy", "loss"):
        of_seeds = [_smooth([rows[step][metric] for step in steps]) for rows in by_step]
        curve[metric] = {"mean": np.mean(of_seeds, axis=0).tolist(), "of_seeds": of_seeds}
    return curve


def _smooth(values: list[float]) -> list[float]:
    """A centred moving average, over fewer rows near both ends."""
    reach = SMOOTHED_ROWS // 2
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [statistics.fmean(window) for window in windows]


def _run(run: Run) -> dict:
    return {
        "workdir": str(run.workdir),
        "name": run.name,
        "seed": run.seed,
        "request": run.evaluation["request"],
        "tokens": run.spent("tokens"),
        "flops": run.spent("flops"),
        "seconds": run.seconds,
        "agreement": run.evaluation["agreement"],
        "machine": run.evaluation["machine"],
    }


def _latency(group: list[Run]) -> dict | None:
    """Times of two machines have no common median: the first machine's runs alone count."""
    timed = [run.evaluation for run in group if run.evaluation["latency"]]
    if not timed:
        return None
    machine = timed[0]["machine"]
    timings = [evaluation["latency"] for evaluation in timed if evaluation["machine"] == machine]
    return {
        "machine": machine,
        "runs": len(timings),
        "batch_size": timings[0]["batch_size"],
        "wake": _median_rows(timings, "wake", ("passes", "windows")),
        "sleep": _median_rows(timings, "sleep", ("passes",)),
        "prefill": _median_timing([timing["prefill"] for timing in timings]),
    }


def _median_rows(timings: list[dict], name: str, keys: tuple[str, ...]) -> list[dict]:
    found = {}
    for timing in timings:
        for row in timing[name]:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True)) | _median_timing(rows)
        for key, rows in sorted(found.items())
    ]


def _median_timing(rows: list[dict]) -> dict:
    fields = ("median_ms", "p90_ms")
    return {field: statistics.median(row[field] for row in rows) for field in fields}
