"""Measures trained runs: python -m launch.evaluate --workdir=runs/depo_small_n4_seed0.

Accuracy by depth for every N (of text: loss, perplexity and bits per byte), streaming against
rollout, and latency go into evaluation.json of each workdir.
"""

import dataclasses
import pathlib

from absl import flags

from launch.common import cli, moved_files
from launch.common.signals import Signals
from sleepnet.config import ConfigError
from sleepnet.evaluation import markdown, record
from sleepnet.training.workdir import load_config, load_params

_WORKDIR = cli.define_paths("workdir", "Folder of a trained run; may be given several times.")
_PASSES = flags.DEFINE_list(
    "passes", None, "Every N to sleep with, such as 1,2,4. The trained N always joins them."
)
_EXAMPLES = flags.DEFINE_integer("examples", None, "Held-out examples; by default the config's.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to measure; the last by default.")
_LATENCY = flags.DEFINE_bool("latency", True, "Take times, too.")
_AGAIN = flags.DEFINE_bool("again", False, "Measure even what evaluation.json already holds.")
_FILES = moved_files.define("tokenizer", "train_files", "test_files")


def main(_):
    Signals()  # ends at once: evaluation.json is replaced when all is measured, and whole till then
    for workdir in _WORKDIR.value:
        stored = _evaluate(workdir, _passes(_PASSES.value))
        measured = "loss" if "loss" in stored["results"][0] else "answers right"
        print(f"\n{workdir}: step {stored['step']}, held-out {measured} with 95% intervals")
        print(markdown.record_table(stored))
        _print_agreement(stored["agreement"])


def _evaluate(workdir: pathlib.Path, passes: tuple[int, ...] | None) -> dict:
    config = record.widen(load_config(workdir), passes, _EXAMPLES.value)
    if not cli.has_backend(config.model):
        print(f"{workdir}: model.backend={config.model.backend!r} is not for here: measured by xla")
        model = dataclasses.replace(config.model, backend="xla")
        config = dataclasses.replace(config, model=model)
    params, step = load_params(workdir, _STEP.value)
    found = record.find(workdir, params, config, step, latency=_LATENCY.value)
    if found and not _AGAIN.value:
        print(f"{workdir / record.FILE} already holds this; --again measures anew")
        return found
    config = moved_files.apply(config, _FILES)
    measured = record.measure(
        params, config, step, latency=_LATENCY.value,
        on_notice=lambda notice: print(f"{workdir}: {notice}", flush=True),
    )  # fmt: skip
    record.save(workdir, measured)
    return measured


def _passes(given: list[str] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(map(int, given))
    except ValueError:
        raise ConfigError(
            f"--passes must be whole numbers such as 1,2,4; got {','.join(given)}"
        ) from None


def _print_agreement(agreed: dict | None):
    if agreed:
        print(
            f"streaming: -log p within {agreed['max_nll_difference']:.1e} nats of the rollout, "
            f"{agreed['equal_predictions']:.2%} equal predictions ({agreed['examples']} examples)"
        )


if __name__ == "__main__":
    cli.run(main)
