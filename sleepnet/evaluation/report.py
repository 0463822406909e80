"""The report: runs in, `report.md`, figures and `results.json` out."""

import pathlib
import shlex
from collections.abc import Sequence

from sleepnet import storage
from sleepnet.evaluation import markdown
from sleepnet.evaluation.plots import draw
from sleepnet.evaluation.runs import Run, group_runs, load_run
from sleepnet.evaluation.summary import summarize

REPORT, RESULTS, VERSION = "report.md", "results.json", 1


def report(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> dict:
    """Writes report.md, results.json and PNG figures into `out`.

    Runs that differ only in N, in k and in the seed of training are one group and are averaged over
    seeds; groups follow each other. Equal workdirs give equal files.

    Args:
      workdirs: of evaluated runs.
      out: made if needed; files of an earlier report are replaced.

    Returns:
      What results.json holds: version, and groups: from `summarize`.

    Raises:
      StorageError: a workdir without config.json or evaluation.json, runs that cannot be
        averaged, or a folder that cannot be written.
    """
    out = pathlib.Path(out)
    groups = group_runs([load_run(workdir) for workdir in workdirs])
    storage.prepare_folder(out)
    results = {"version": VERSION, "groups": [summarize(group) for group in groups]}
    titles = _titles(groups)
    sections = []
    for number, (group, summary) in enumerate(zip(groups, results["groups"], strict=True), start=1):
        files = draw(summary, out, prefix=f"group{number}_" if len(groups) > 1 else "")
        text = markdown.section(summary, files, _commands(group, workdirs, out))
        sections.append(f"# {titles[number - 1]}\n\n{text}")
    storage.write_json(out / RESULTS, results)
    storage.write_atomic(out / REPORT, "\n".join(sections))
    return results


def _titles(groups: list[list[Run]]) -> list[str]:
    """The task; and among several groups, the fields in which they differ."""
    flat = [_flatten(group[0].shared_config) for group in groups]
    fields = list(dict.fromkeys(field for config in flat for field in config))
    differing = [field for field in fields if len({str(config.get(field)) for config in flat}) > 1]
    titles = []
    for config in flat:
        shown = [f"{field}={config[field]}" for field in differing if field in config]
        titles.append(": ".join((config["task.name"], *[", ".join(shown)] * bool(shown))))
    return titles


def _flatten(sections: dict) -> dict:
    return {f"{name}.{key}": v for name, fields in sections.items() for key, v in fields.items()}


def _commands(group: list[Run], workdirs, out) -> str:
    """How this group was trained, where that is known, how it was evaluated, and the report."""
    lines = [_command("train", run.arguments) for run in group if run.arguments is not None]
    lines += [_command("evaluate", arguments) for arguments in _evaluations(group)]
    lines.append(_command("report", [*map(_workdir, workdirs), f"--out={out}"]))
    return "\n".join(lines)


def _evaluations(group: list[Run]) -> list[list[str]]:
    """Arguments of one call for all the runs of which the same was asked."""
    asked: dict[str, list[str]] = {}
    for run in group:
        request = run.evaluation["request"]
        passes = ",".join(map(str, request["passes"]))
        options = f"--passes={passes} --examples={request['examples']} --step={run.step} --again"
        asked.setdefault(options, []).append(_workdir(run.workdir))
    return [[*given, *options.split()] for options, given in asked.items()]


def _command(program: str, arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", f"launch.{program}", *arguments])


def _workdir(path) -> str:
    return f"--workdir={path}"
