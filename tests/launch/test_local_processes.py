"""Several processes are one run: the same data bit for bit, the same losses and parameters."""

import itertools
import signal
import sys

import numpy as np
import pytest
import waiting

from launch import local_processes

PYTHON = sys.executable


def command(*program, processes=2, devices=1, grace=30):
    return [
        PYTHON, "-m", "launch.local_processes", f"--processes={processes}",
        f"--devices={devices}", f"--grace={grace}", "--", *map(str, program),
    ]  # fmt: skip


def run(*program, **arguments):
    return waiting.run(*command(*program, **arguments))


def test_every_process_is_told_who_it_is_and_which_devices_it_has():
    tell = "import os, sys; print(sys.argv[1:], os.environ['XLA_FLAGS'].split()[-1])"
    done = run(PYTHON, "-c", tell, processes=3, devices=4)
    assert done.returncode == 0, done.stderr
    for i in range(3):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"[{i}]"))
        assert "--num_processes=3" in line and f"--process_id={i}" in line
        assert line.endswith("--xla_force_host_platform_device_count=4")


def test_the_first_that_fails_ends_the_others_and_names_the_code():
    fail = (
        "import sys, time\n"
        f"sys.exit(7) if '--process_id=1' in sys.argv else time.sleep({waiting.TOO_LONG})"
    )
    done = run(PYTHON, "-c", fail, grace=0.5)
    assert done.returncode == 7
    assert "a process ended with 7" in done.stdout


def test_the_code_is_that_of_the_process_at_fault_where_several_have_ended_meanwhile():
    """Not of those that JAX aborts because of it, however late we look."""

    class Ended:
        def __init__(self, code):
            self.poll = lambda: code

    assert local_processes._wait([Ended(-signal.SIGABRT), Ended(0), Ended(2)], grace=1) == 2
    assert local_processes._wait([Ended(0), Ended(-signal.SIGABRT)], grace=1) == 134


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_goes_to_all(number):
    """Each process decides what it does with it; the exit code is theirs."""
    wait = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(128 + {int(number)}))\n"
        f"print('ready', flush=True)\ntime.sleep({waiting.TOO_LONG})"
    )
    program = waiting.Program(*command(PYTHON, "-c", wait))
    program.output.until("(] ready\n.*){2}")
    program.send(number)
    assert program.end().returncode == 128 + number


FAIL = """
import jax, numpy
from absl import flags
from jax.experimental import multihost_utils
from launch.common import cli, distributed
from sleepnet.config import ConfigError
flags.DEFINE_bool("explained", False, "")
def main(_):
    jax.distributed.initialize(**distributed.cluster()._asdict())
    with distributed.parting():
        multihost_utils.process_allgather(numpy.zeros(3))
        if jax.process_index() == 1:
            raise ConfigError("no such thing") if flags.FLAGS.explained else ValueError("a bug")
        multihost_utils.process_allgather(numpy.zeros(3))
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [([], 1, "ValueError: a bug"), (["--explained"], 2, "error: no such thing")],
    ids=["traceback", "explained"],
)
def test_a_process_that_fails_leaves_with_its_own_code_though_others_wait(arguments, code, said):
    """JAX would keep it for minutes, and then abort it with 134."""
    done = run(PYTHON, "-c", FAIL, *arguments, grace=1)
    assert done.returncode == code and f"[1] {said}" in done.stdout


def test_a_program_must_be_given():
    done = run()
    assert done.returncode == 2 and "give the program behind two dashes" in done.stderr


def seen_by(folder, processes, devices, fsdp):
    """Arrays of every process of a run of `worker.py`, and the rows that each made."""
    folder.mkdir()
    worker = [PYTHON, "tests/launch/worker.py", f"--out={folder}", f"--fsdp={fsdp}"]
    done = run(*worker, processes=processes, devices=devices)
    assert done.returncode == 0, done.stdout[-3000:]
    files = [dict(np.load(folder / f"process{i}.npz")) for i in range(processes)]
    return files, [file.pop("rows").tolist() for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_one_two_and_four_processes_are_the_same_run(fsdp, tmp_path):
    """1 x 8, 2 x 4 and 4 x 2 devices over 50 steps: every global batch bit for bit, made in parts
    by the processes; losses and parameters to float tolerance."""
    (one,), _ = seen_by(tmp_path / "1", 1, 8, fsdp)
    for processes, devices in ((2, 4), (4, 2)):
        files, rows = seen_by(tmp_path / str(processes), processes, devices, fsdp)
        assert sorted(itertools.chain(*rows)) == list(range(16))
        for file in files:
            assert file.keys() == one.keys()
            for name, value in file.items():
                if name.startswith("['seen']"):
                    np.testing.assert_array_equal(value, one[name], err_msg=name)
                else:
                    bound = 1e-5 * np.abs(one[name]).max()
                    np.testing.assert_allclose(value, one[name], rtol=0, atol=bound, err_msg=name)
