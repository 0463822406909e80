"""Trains one experiment; run again, it resumes.

    python -m launch.train --config=experiments/depo_small.py --workdir=runs/depo \\
        [--config.model.passes=4] [--config.training.seed=1] [--profile_steps=100,110]

As one of several processes of a run: with --distributed where JAX finds its cluster by itself, or
with --coordinator_address, --num_processes and --process_id; and a workdir that all of them see.

SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint first (twice: stop at once). Exit codes: 0 done, 2 an
error that the message explains, 75 a run that stood still and was to stop then, or whose TPU chips
another process holds (try again), 128 + signal when stopped by one.
"""

import os
import pathlib
import platform
import signal
import sys
import time
from importlib import metadata

from absl import flags

from launch.common import cli, compilation_cache, distributed
from launch.common.live_line import notify
from launch.common.signals import Signals
from sleepnet import strict_json
from sleepnet.config import ConfigError
from sleepnet.storage import StorageError

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path(
    "workdir", None, "Folder of the run: made new, or resumed.", required=True
)
_PROFILE = flags.DEFINE_list(
    "profile_steps", None, "First and last step of a profile, such as 100,110: WORKDIR/profile."
)
_CACHE = cli.define_path(
    "compilation_cache", None,
    "Folder of compiled programs, that later starts reuse; none for no such folder. By default "
    "JAX_COMPILATION_CACHE_DIR, or sleepnet's in the user's cache folder.",
)  # fmt: skip
flags.mark_flag_as_required("config")
flags.adopt_module_key_flags(distributed)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def main(_):
    signals = Signals()
    config = cli.experiment_config(_CONFIG.value)
    profile_steps = _profile_steps(_PROFILE.value, config.training.steps)
    distributed.join(config, _WORKDIR.value)
    signals.install()
    with distributed.parting():
        _train(config, _WORKDIR.value, signals, profile_steps)


def _train(config, workdir: pathlib.Path, signals: Signals, profile_steps):
    """Exits where the run is not done."""
    cli.check_backend(config.model)
    show = _ProgressLine(sys.stderr)
    from sleepnet.training import loop  # heavy: once the config is good

    kept = compilation_cache.use(_CACHE.value)

    def on_claimed():
        _record_start(workdir, config)
        print(
            f"training {config.task.name}, pattern {config.model.pattern}, "
            f"N = {config.model.passes}, seed {config.training.seed}: {config.training.steps} "
            f"steps of {config.training.batch_size} examples, in {workdir}"
        )
        show.notice(kept)
        if tip := _huge_pages_tip():
            show.notice(tip)

    def on_stall(report: str):
        show.notice(report)
        if config.training.stall_stops:
            os._exit(cli.TRY_AGAIN)

    try:
        state = loop.train(
            config, workdir, on_claimed=on_claimed,
            on_progress=show, on_notice=show.notice, on_stall=on_stall,
            on_phase=lambda phase, _: signals.has_nothing_to_save(phase in ("restore", "compile")),
            should_stop=signals.asked, profile_steps=profile_steps,
        )  # fmt: skip
    except loop.TrainingError as error:
        sys.exit(cli.complain(error))
    finally:
        show.end()
    step = int(state.step)
    if not loop.is_finished(config, workdir, step):
        by = "" if signals.asked() else " with another process"
        print(f"stopped{by} at step {step} and saved; the same command goes on from there")
        sys.exit(128 + (signals.received or signal.SIGTERM))
    print(f"done: step {step}, checkpoint in {workdir / 'checkpoints' / str(step)}")


def _profile_steps(given: list[str] | None, steps: int) -> tuple[int, int] | None:
    if given is None:
        return None
    if len(given) == 2 and all(map(str.isdigit, given)):
        first, last = map(int, given)
        if 1 <= first <= last <= steps:
            return first, last
    raise ConfigError(
        f"--profile_steps must be a first and a last step in 1..{steps}, such as 100,110; got "
        f"{','.join(given)}"
    )


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


class _ProgressLine:
    """One live line on a terminal, one line in ten on anything else."""

    def __init__(self, stream):
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._calls = 0

    def __call__(self, progress):
        metrics = progress.metrics
        text = (
            f"step {progress.step}/{progress.steps}  loss {metrics['loss']:.3f}  "
            f"accuracy {metrics['accuracy']:.3f}  {progress.tokens_per_second:,.0f} tokens/s  "
            f"goodput {progress.goodput:.0%}  "
            f"ETA {_duration(progress.seconds_left)}"
        )
        if self._live:
            notify(self._stream, f"\r\033[K{text}", end="")
        elif self._calls % 10 == 0 or progress.step == progress.steps:
            notify(self._stream, text)
        self._calls += 1

    def notice(self, text: str):
        notify(self._stream, text)

    def end(self):
        if self._live:
            notify(self._stream, "")


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
    path = workdir / "starts.jsonl"
    try:
        with path.open("a") as file:
            file.write(strict_json.dumps(record) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
