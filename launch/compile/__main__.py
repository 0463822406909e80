"""Compiles an experiment for a topology that is not here, and says what it would need.

    python -m launch.compile --config=experiments/pod_125m.py --topology=v5e:2x4 \\
        [--step=train] [--rows=8] [--quick] [--json=PATH]

The train step over all devices, the wake step of a token on one, and the sleep of a window over a
host's: does it compile, does it fit, how much memory of each kind, FLOPs, bytes moved and sent, the
least time and what bounds it. Shapes alone: nothing is allocated and nothing runs. TPU topologies
need the TPU compiler (pip install -e '.[tpu]'); --topology=cpu:8 needs nothing. Exit codes: 0 all
compile and fit, 1 one does not, 2 an error that the message explains.
"""

import datetime
from importlib import metadata

from absl import flags

from launch.common import cli
from launch.compile.steps import STEPS
from sleepnet import storage

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices to compile for, such as v5e:4x4, v5p:2x2x2 or cpu:8.", required=True
)
_STEPS = flags.DEFINE_multi_enum("step", STEPS, STEPS, "What to compile; may be repeated.")
_ROWS = flags.DEFINE_integer("rows", 8, "Minds that a wake step serves.", lower_bound=1)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Compile with least effort: faster, for a program that is slower and larger."
)
_JSON = cli.define_path("json", None, "File for the figures.")
flags.mark_flag_as_required("config")


def main(_):
    import jax

    jax.config.update("jax_platforms", "cpu")  # of this machine's devices none is asked
    from launch.compile.report import report
    from sleepnet.evaluation.machine import describe_machine

    config = cli.experiment_config(_CONFIG.value)
    found = report(
        config, _TOPOLOGY.value, steps=_STEPS.value, rows=_ROWS.value, quick=_QUICK.value
    )
    print(found.text())
    if _JSON.value:
        record = {
            **found.to_dict(),
            "quick": _QUICK.value,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": describe_machine(),
            "libtpu": _version("libtpu"),
            "config": config.to_dict(),
        }
        storage.write_json(_JSON.value, record)
    return 0 if found.fits else 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    cli.run(main)
