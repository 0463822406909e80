"""What ends one of several processes ends all of them soon, each with a reason and an exit code."""

import dataclasses
import os
import sys

import pytest
import waiting

from launch.common.ports import reserved_port
from launch.doctor import roll_call
from launch.doctor.findings import WRONG
from launch.local_processes import environment, joining
from sleepnet.training.workdir import locked

TRAIN = [
    "-m", "launch.train", "--config=experiments/depo_small.py", "--config.model.pattern=G",
    "--config.model.d_model=8", "--config.model.passes=1", "--config.training.batch_size=2",
    "--config.training.steps=2", "--config.training.warmup_steps=0",
]  # fmt: skip
# An error that only process 1 has, while process 0 waits for it.
ALONE = """
import jax
from jax.experimental import multihost_utils
from launch.common import cli, distributed
def main(_):
    cluster = distributed.cluster()
    jax.distributed.initialize(**cluster._asdict(), heartbeat_timeout_seconds=20)
    with distributed.parting():
        if cluster.process_id == 1:
            raise RuntimeError("of process 1 alone")
        multihost_utils.sync_global_devices("all are here")
cli.run(main)
"""


def run(*command, processes=2):
    """(exit code, what it said) of each process of a run."""
    with reserved_port() as port:
        running = [
            waiting.Program(
                sys.executable, *command, *joining(f"127.0.0.1:{port}", processes, i),
                env=os.environ | environment("cpu", 1, i),
            )
            for i in range(processes)
        ]  # fmt: skip
        ends = [program.end() for program in running]
    return [(end.returncode, end.stderr) for end in ends]


def assert_all_end(workdir, reason, hint="process 0 failed; its log tells why", more=()):
    """Process 0 with the reason, the other with a hint; each by itself, with code 2 and a line."""
    ends = run(*TRAIN, *more, f"--workdir={workdir}")
    assert [code for code, _ in ends] == [2, 2], ends
    (_, told), (_, hinted) = ends
    assert told.startswith("error: ") and reason in told and told.count("\n") == 1
    assert hinted.startswith("error: ") and hint in hinted and hinted.count("\n") == 1


@pytest.mark.slow
def test_a_workdir_of_another_config_ends_all_and_that_of_this_one_none(tmp_path):
    ends = run(*TRAIN, f"--workdir={tmp_path}")
    assert [code for code, _ in ends] == [0, 0], ends
    starts = (tmp_path / "starts.jsonl").read_text()
    assert starts.count("\n") == 1
    reason = "training.seed=0, and this one has 1"
    assert_all_end(tmp_path, reason, more=["--config.training.seed=1"])
    assert (tmp_path / "starts.jsonl").read_text() == starts


@pytest.mark.slow
def test_a_workdir_in_use_ends_all(tmp_path):
    with locked(tmp_path):
        assert_all_end(tmp_path, "is in use by another run")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_ends_all(tmp_path):
    """Before JAX joins them: the roll tells the others."""
    (tmp_path / "file").write_text("")
    assert_all_end(tmp_path / "file", "cannot write to", hint="cannot write to its --workdir")


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_it_at_once_and_then_the_others(tmp_path):
    """Its traceback is told, and it waits for nobody; JAX ends the others once it has missed its
    heartbeats (here for 20 seconds)."""
    (_, (code, told)) = run("-c", ALONE)
    assert code == 1 and "RuntimeError: of process 1 alone" in told


def test_the_roll_tells_whose_fault_it_is_that_nobody_sees_a_workdir():
    """Not that of those who look for what process 0 could not write."""
    cards = [roll_call.card(process, 2, {}) for process in range(2)]
    first, other = (dataclasses.replace(card, sees=None) for card in cards)
    blind = dataclasses.replace(other, sees=False)

    def shared(*roll):
        found = roll_call.findings(list(roll), 2)
        return [(one.status, one.seen) for one in found if one.check == "shared"]

    assert shared(first, other) == []
    assert shared(first, blind) == [(WRONG, f"{first.name} cannot write to its --workdir")]
    seen = f"{other.name}: does not see what process 0 writes in its --workdir"
    assert shared(dataclasses.replace(first, sees=True), blind) == [(WRONG, seen)]
