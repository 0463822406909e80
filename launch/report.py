"""Report of evaluated runs: python -m launch.report --workdir=A --workdir=B --out=DIR."""

import pathlib

from absl import flags

from launch import cli
from sleepnet.evaluation import markdown
from sleepnet.evaluation.report import REPORT, report

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of an evaluated run; may be given several times.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder for report.md and its figures.", required=True)


def main(_):
    out = pathlib.Path(_OUT.value)
    results = report([pathlib.Path(workdir) for workdir in _WORKDIR.value], out)
    for summary in results["groups"]:
        print(markdown.accuracy_table(summary))
    print(f"the report lies at {out / REPORT}")


if __name__ == "__main__":
    cli.run(main)
