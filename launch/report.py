"""Report of evaluated runs: python -m launch.report --workdir=A --workdir=B --out=DIR."""

from launch.common import cli
from sleepnet.evaluation import markdown
from sleepnet.evaluation.report import REPORT, report

_WORKDIR = cli.define_paths("workdir", "Folder of an evaluated run; may be given several times.")
_OUT = cli.define_path("out", None, "Folder for report.md and its figures.", required=True)


def main(_):
    results = report(_WORKDIR.value, _OUT.value)
    for summary in results["groups"]:
        print(markdown.accuracy_table(summary))
    print(f"the report lies at {_OUT.value / REPORT}")


if __name__ == "__main__":
    cli.run(main)
