"""Many runs over the fields of a config; run again, it goes on: what is done stays as it is.

    python -m launch.sweep --config=experiments/depo_small.py --workdir=runs/sweep \\
        --grid=model.passes=1,2,4 --grid=training.seed=0,1,2 [--parallel=2] [--evaluate] \\
        [--random=training.muon_learning_rate=log:1e-3:3e-2 --samples=8] [--dry_run]

All combinations of the grid, for each sample of the random fields (log, uniform, int); all are
validated before any begins, and their meshes held against this machine's devices. Each trains in
WORKDIR/NAME, with its log in train.log; the table is in WORKDIR/sweep.jsonl and sweep.md. Ctrl-C
lets all save first (twice: stop at once). Exit codes: 0 all done, 1 some failed, 2 an error that
the message explains, 128 + signal when stopped by one.
"""

import pathlib
import signal
import subprocess
import sys

from absl import flags

from launch.common import cli
from launch.common.live_line import notify
from launch.sweep import space
from sleepnet import storage, tasks
from sleepnet.config import ConfigError
from sleepnet.nn import flops

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", None, "Folder of all runs.", required=True)
_GRID = flags.DEFINE_multi_string("grid", [], "SECTION.FIELD=VALUE,VALUE; may be repeated.")
_RANDOM = flags.DEFINE_multi_string("random", [], "SECTION.FIELD=KIND:LOW:HIGH; may be repeated.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Of the random fields.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random fields.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1)
_RETRIES = flags.DEFINE_integer("retries", 1, "Of a run that failed.", lower_bound=0)
_EVALUATE = flags.DEFINE_bool("evaluate", False, "Run launch.evaluate on each, too.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print all commands and the cost; do nothing.")
flags.mark_flag_as_required("config")


def main(_):
    if not _GRID.value and not _RANDOM.value:
        raise ConfigError("give a --grid=model.passes=1,2,4 or a --random=...; one run is for "
                          "launch.train")  # fmt: skip
    runs = space.make_runs(
        _CONFIG.value,
        [space.parse_grid(text) for text in _GRID.value],
        [space.parse_draw(text) for text in _RANDOM.value],
        _SAMPLES.value,
        _SEED.value,
    )
    folder = _WORKDIR.value
    if _DRY_RUN.value:
        print(_cost(runs))
        for run in runs:
            print(" ".join(["python", *_train(run, folder / run.name)[1:]]))
        return 0
    return _work(runs, folder)


def _work(runs, folder: pathlib.Path) -> int:
    from launch.sweep import book  # heavy imports only once all runs are known to be good
    from launch.sweep.crew import Crew

    if left := [run for run in runs if not book.is_done(run, folder / run.name)]:
        space.check_meshes(left, _num_devices())
    print(_cost(runs), flush=True)
    storage.prepare_folder(folder)
    stop = _Stop()
    crew = Crew(
        folder,
        train=_train,
        evaluate=_measure if _EVALUATE.value else None,
        parallel=_PARALLEL.value,
        retries=_RETRIES.value,
        say=lambda line: notify(sys.stdout, line),  # the runs go on, whoever listens
        should_stop=stop.asked,
    )
    rows = crew.work(runs)
    print(f"\n{book.markdown(rows)}\n\nthe table lies at {folder / book.TABLE}")
    if stop.signal is not None:
        print("stopped; the same command goes on")
        return 128 + stop.signal
    return 1 if any(row.status == book.FAILED for row in rows) else 0


def _num_devices() -> int:
    """Of this machine. A child asks: who has asked holds them, and the runs need them."""
    ask = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=300)
    except subprocess.SubprocessError:
        raise ConfigError("the devices here do not answer; python -m launch.doctor tells why"
                          ) from None  # fmt: skip
    return int(done.stdout.split()[-1])


def _train(run, workdir) -> list[str]:
    return [sys.executable, "-m", "launch.train", *_shared(), f"--workdir={workdir}",
            *run.overrides]  # fmt: skip


def _measure(run, workdir) -> list[str]:
    del run
    return [sys.executable, "-m", "launch.evaluate", f"--workdir={workdir}", "--nolatency"]


def _shared() -> list[str]:
    """--config and its overrides, as they were given to us."""
    given = cli.flags_in(sys.argv[1:])
    return cli.as_flags((name, value) for name, value in given if cli.is_config(name))


def _cost(runs) -> str:
    config = runs[0].config
    total = sum(_flops(run.config) for run in runs)
    steps = sorted({run.config.training.steps for run in runs})
    return (
        f"{len(runs)} runs of {config.task.name}, {' or '.join(map(str, steps))} steps each, "
        f"{_PARALLEL.value} at a time on this machine's devices: {total:.2g} FLOPs; each run that "
        f"ends tells how long the rest will take"
    )


def _flops(config) -> float:
    task = tasks.make(config.task)
    passes = task.window_passes(config.model.passes)
    forward = flops.rollout_flops(config.model, passes, task.scored_per_window)
    return 3.0 * forward * config.training.batch_size * config.training.steps


class _Stop:
    """Remembers the first SIGTERM or SIGINT; a second one stops at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def asked(self) -> bool:
        return self.signal is not None

    def _receive(self, number, _):
        if self.signal is not None:
            raise SystemExit(128 + number)  # and Crew ends its children
        self.signal = number
        notify(sys.stderr, "\nstopping: all runs save a checkpoint")


if __name__ == "__main__":
    cli.run(main)
