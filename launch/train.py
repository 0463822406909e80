"""Trains one experiment; run again, it resumes.

    python -m launch.train --config=experiments/depo_small.py --workdir=runs/depo \
        [--config.model.passes=4] [--config.training.seed=1]

SIGTERM and Ctrl-C save a checkpoint first (twice: stop at once). Exit codes: 0 done, 2 an
error that the message explains, 128 + signal when stopped by one.
"""

import json
import os
import pathlib
import platform
import signal
import sys
import time
from importlib import metadata

from absl import flags

from launch import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: made new, or resumed.", required=True
)
flags.mark_flag_as_required("config")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def main(_):
    stop = _StopOnSignal()
    config = cli.experiment_config(_CONFIG.value)
    cli.check_backend(config.model)
    workdir = pathlib.Path(_WORKDIR.value)
    from sleepnet.training import loop  # heavy imports only once the config is known to be good

    loop.claim_workdir(config, workdir)
    _record_start(workdir, config)
    print(
        f"training {config.task.name}, pattern {config.model.pattern}, N = {config.model.passes}, "
        f"seed {config.training.seed}: {config.training.steps} steps of "
        f"{config.training.batch_size} examples, in {workdir}"
    )
    show = _ProgressLine(sys.stderr)
    if tip := _huge_pages_tip():
        show.notice(tip)
    try:
        state = loop.train(
            config, workdir, on_progress=show, on_notice=show.notice, should_stop=stop.asked
        )
    except loop.TrainingError as error:
        sys.exit(cli.complain(error))
    finally:
        show.end()
    step = int(state.step)
    if stop.signal is not None and step < config.training.steps:
        print(f"stopped at step {step} and saved; the same command goes on from there")
        sys.exit(128 + stop.signal)
    print(f"done: step {step}, checkpoint in {workdir / 'checkpoints' / str(step)}")


def _huge_pages_tip() -> str | None:
    """On CPU, where the memory allocator could use huge pages but has not been told to."""
    import jax

    offered = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    if jax.default_backend() != "cpu" or asked or not offered.exists():
        return None
    if "[madvise]" not in offered.read_text():  # always on, or never to be had
        return None
    return "tip: up to twice as fast on CPU with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 set"


class _StopOnSignal:
    """Remembers the first SIGTERM or SIGINT; a second one stops at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def asked(self) -> bool:
        return self.signal is not None

    def _receive(self, number, _):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping after this step; saving a checkpoint", file=sys.stderr)


class _ProgressLine:
    """One live line on a terminal, one line in ten on anything else."""

    def __init__(self, stream):
        self._stream = stream
        self._live = stream.isatty()
        self._calls = 0

    def __call__(self, progress):
        metrics = progress.metrics
        text = (
            f"step {progress.step}/{progress.steps}  loss {metrics['loss']:.3f}  "
            f"accuracy {metrics['accuracy']:.3f}  {progress.tokens_per_second:,.0f} tokens/s  "
            f"ETA {_duration(progress.seconds_left)}"
        )
        if self._live:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
        elif self._calls % 10 == 0 or progress.step == progress.steps:
            print(text, file=self._stream, flush=True)
        self._calls += 1

    def notice(self, text: str):
        print(text, file=self._stream, flush=True)

    def end(self):
        if self._live:
            print(file=self._stream)


def _duration(seconds: float) -> str:
    if seconds != seconds:  # not known before the second step
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _record_start(workdir: pathlib.Path, config):
    """Appends what this start ran with to starts.jsonl: command, seed, versions, device."""
    import jax

    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": config.training.seed,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "cores": os.cpu_count(),
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    cli.run(main)
