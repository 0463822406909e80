"""How long do models remember? python -m launch.long_horizon --workdir=A --workdir=B --out=DIR.

Asks runs of experiments/long_horizon.py for facts that lie further and further back, and writes
DIR/report.md, a figure and results.json. Runs of the same model are averaged over their seeds. What
was measured stays in forgetting.json of each workdir, and is not measured twice.
"""

import pathlib

from absl import flags

from launch.common import cli
from launch.common.signals import Signals
from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.evaluation import long_horizon, plots
from sleepnet.evaluation.forgetting import forgetting_of_run
from sleepnet.evaluation.machine import describe_machine
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import FactsConfig
from sleepnet.training.workdir import differences, load_config, load_params

_WORKDIR = cli.define_paths("workdir", "Folder of a trained run; may be given several times.")
_OUT = cli.define_path("out", None, "Folder for report.md and its figure.", required=True)
_DISTANCES = flags.DEFINE_list(
    "distances", "1,2,4,8,16,32,64,128,256,512,1024,4096,16384", "In pages."
)
_FARTHEST_OF_ALL = flags.DEFINE_integer(
    "farthest_of_all", 512, "Distance beyond which models that keep everything are not asked."
)
_COSTS = cli.define_path(
    "costs", None, "JSON of launch.benchmark --suite=horizon, to show beside accuracy."
)
_AGAIN = flags.DEFINE_bool("again", False, "Measure even what forgetting.json already holds.")


def main(_):
    Signals()  # ends at once: what was measured is on disk
    out, workdirs = _OUT.value, _WORKDIR.value
    distances, costs = _distances(), _costs()
    configs = [load_config(workdir) for workdir in workdirs]
    tasks = [_facts(config) for config in configs]
    fewest = min(map(_tokens, configs, tasks))
    names = [
        _name(config, task) + _more(_tokens(config, task) / fewest)
        for config, task in zip(configs, tasks, strict=True)
    ]
    _check_comparable(workdirs, configs, names)
    storage.prepare_folder(out)
    runs: dict[str, list] = {}
    for workdir, config, task, name in zip(workdirs, configs, tasks, names, strict=True):
        print(f"{workdir}: {name}", flush=True)
        farthest = _FARTHEST_OF_ALL.value if _keeps_all(task) else max(distances)
        some = [distance for distance in distances if distance <= farthest]
        runs.setdefault(name, []).append(_asked(workdir, config, some))
    task, trained = tasks[0], max(task.depths[-1] for task in tasks)
    record = {"trained": trained, "machine": describe_machine(), "runs": runs}
    storage.write_json(out / "results.json", record)
    plots.save(long_horizon.draw(runs, trained, costs), out / long_horizon.FIGURE)
    text = long_horizon.page(runs, task, trained, fewest, costs)
    storage.write_atomic(out / "report.md", text)
    print(long_horizon.accuracy_table(runs, task.page, trained))


def _asked(workdir: pathlib.Path, config: ExperimentConfig, distances) -> dict[int, dict]:
    """By distance, from workdir/forgetting.json as far as it goes."""
    params, step = load_params(workdir, None)
    return forgetting_of_run(
        workdir, params, config, step, distances, again=_AGAIN.value,
        on_notice=lambda notice: print(f"{workdir}: {notice}", flush=True),
    )  # fmt: skip


def _facts(config: ExperimentConfig) -> FactsConfig:
    if not isinstance(config.task, FactsConfig):
        raise ConfigError(f"task.name must be 'facts' in every run; got {config.task.name!r}")
    return config.task


def _name(config: ExperimentConfig, task: FactsConfig) -> str:
    if "G" in config.model.pattern:
        return f"hybrid, N = {config.model.passes}"
    return "whole cache" if _keeps_all(task) else f"{config.model.eviction} window"


def _check_comparable(workdirs, configs: list[ExperimentConfig], names: list[str]):
    """All were told the same facts, and runs of one name differ in their seeds alone."""
    for i, name in enumerate(names):
        _check_same(workdirs, configs, 0, i, but=("task.window", "model.", "training."))
        _check_same(workdirs, configs, names.index(name), i, but=("training.seed",))


def _check_same(workdirs, configs, i: int, j: int, *, but: tuple[str, ...]):
    for field, one, other in differences(configs[i].to_dict(), configs[j].to_dict()):
        if not field.startswith(but):
            raise ConfigError(
                f"{workdirs[i]} and {workdirs[j]} cannot stand on one page: {field} is {one!r} "
                f"and {other!r}"
            )


def _tokens(config: ExperimentConfig, task: FactsConfig) -> int:
    """That a run has learned from."""
    return config.training.steps * config.training.batch_size * task.tokens


def _more(times: float) -> str:
    return "" if times == 1 else f", {times:g} x the tokens"


def _keeps_all(task: FactsConfig) -> bool:
    return task.window == task.tokens


def _distances() -> list[int]:
    given = _DISTANCES.value
    if not given or not all(text.strip().isdecimal() and int(text) > 0 for text in given):
        raise ConfigError(
            f"--distances must be whole numbers of 1 or more, such as 1,4,16; got {','.join(given)}"
        )
    return sorted({int(text) for text in given})


def _costs() -> dict | None:
    if _COSTS.value is None:
        return None
    costs = storage.read_json(_COSTS.value)
    suite = costs.get("suite") if isinstance(costs, dict) else None
    if suite != "horizon":
        raise ConfigError(
            f"--costs must be what suite horizon wrote; {_COSTS.value} is of {suite!r}"
        )
    return costs


if __name__ == "__main__":
    cli.run(main)
