"""Several real processes save one checkpoint, agree on what they restore, and on what failed."""

import os
import sys

import pytest
import waiting

from launch.common.ports import reserved_port


def run(count, workdir, *actions):
    """What each of `count` processes printed, line by line."""
    program = waiting.ROOT / "tests" / "training" / "processes.py"
    with reserved_port() as port:
        running = [
            waiting.Program(
                sys.executable, program, f"localhost:{port}", count, i, workdir, *actions,
                env=os.environ | {"PYTHONPATH": str(waiting.ROOT)},
            )
            for i in range(count)
        ]  # fmt: skip
        ends = [process.end() for process in running]
    assert [end.returncode for end in ends] == [0] * count, ends
    return [[line for line in end.stdout.splitlines() if "Gloo" not in line] for end in ends]


@pytest.mark.slow
def test_what_two_processes_save_one_restores_and_the_other_way_round(tmp_path):
    two = run(2, tmp_path, "save=2", "wait", "save=4", "wait", "restore")
    assert two == 2 * [
        ["saving 2 digests True", "waited [2]", "saving 4 digests True", "waited [2, 4]",
         "restored 4 True 0"]
    ]  # fmt: skip
    one = run(1, tmp_path, "restore", "save=6", "wait")
    assert one == [["restored 4 True 0", "saving 6 digests True", "waited [2, 4, 6]"]]
    assert run(2, tmp_path, "restore") == 2 * [["restored 6 True 0"]]


@pytest.mark.slow
def test_damage_that_one_process_meets_is_damage_to_all(tmp_path):
    """All go back to the same checkpoint, and the damaged one is renamed once."""
    run(2, tmp_path, "save=2", "wait", "save=4", "wait")
    arrays = (tmp_path / "checkpoints" / "4").rglob("ocdbt.process_1/d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert run(2, tmp_path, "restore") == 2 * [["restored 2 True 1"]]
    assert (tmp_path / "damaged-checkpoint-4").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_save_that_fails_in_one_process_fails_in_all_and_holds_up_none(tmp_path, index):
    lines = run(2, tmp_path, "save=2", "wait", f"fail={index}", "save=4", "wait", "save=6", "wait")
    reason = [line for line in lines[index] if "SaveError" in line]
    assert len(reason) == 1 and "checkpoints/4 could not be saved" in reason[0]
    assert "No space left on device" in reason[0]
    other = [line for line in lines[1 - index] if "SaveError" in line]
    assert len(other) == 1 and f"process {index} failed" in other[0]
    assert all(process[-1].startswith("waited") for process in lines)
