"""Several processes decide alike, whatever each sees; an error of one ends all of them at once."""

import dataclasses
import json

import pytest
from pretended import Pretended

from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.storage import StorageError
from sleepnet.tasks import DepoConfig
from sleepnet.training import loop, multihost
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.metrics import METRICS
from sleepnet.training.run_io import Rollback, Rollbacks, RunFiles
from sleepnet.training.workdir import CONFIG as CONFIG_FILE
from sleepnet.training.workdir import claim_workdir, locked

TRAINING = TrainingConfig(steps=6, batch_size=8, log_every=1, evaluate_every=3)
CONFIG = ExperimentConfig(
    model=ModelConfig(vocab_size=6, pattern="G", d_model=8, num_heads=1, window=4, passes=2),
    task=DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4, test_fraction=0.5),
    training=TRAINING,
    mesh=MeshConfig(data=1),
)
ELSEWHERE = "process 0 failed; its log tells why"


@pytest.fixture
def two(monkeypatch):
    return Pretended(monkeypatch, 2)


@pytest.fixture
def three(monkeypatch):
    return Pretended(monkeypatch, 3)


def raised(end):
    """The kind and the message of what a process ended with."""
    return type(end), str(end)


def failing(errors):
    """Raises the error of the process that calls it, if it has one; else returns its number."""

    def act(process):
        def call():
            if process in errors:
                raise errors[process]
            return process

        return multihost.together(call)

    return act


def test_where_all_is_well_each_has_its_own_result(three):
    assert three.run(failing({})) == [0, 1, 2]
    assert three.run(lambda process: multihost.gather(10 + process)) == 3 * [[10, 11, 12]]


@pytest.mark.parametrize("error", [StorageError("full"), ConfigError("of another version")])
def test_an_error_for_a_person_is_one_in_all_processes(three, error):
    """The one that has it tells why, the others where to look; all raise what programs expect."""
    ends = three.run(failing({1: error}))
    assert ends[1] is error
    elsewhere = StorageError, "process 1 failed; its log tells why"
    assert raised(ends[0]) == raised(ends[2]) == elsewhere


def test_any_other_error_is_no_damage_elsewhere(three):
    """Where memory is short, no process may take its own damaged file for the reason to go on."""
    short, damaged = MemoryError(), StorageError("damaged")
    ends = three.run(failing({0: damaged, 2: short}))
    assert ends[2] is short
    elsewhere = RuntimeError, "process 2 failed; its log tells why"
    assert raised(ends[0]) == raised(ends[1]) == elsewhere
    assert ends[0].__cause__ is damaged


def test_a_process_alone_has_its_own_errors():
    with pytest.raises(StorageError, match=r"^full$"):
        failing({0: StorageError("full")})(0)


@pytest.mark.parametrize("value", [None, True, [], [3, 5], "", "ä" * 1000, {"a": [1.5, None]}])
def test_what_the_first_makes_all_have(three, value):
    asked = []

    def act(process):
        return multihost.from_first(lambda: asked.append(process) or value)

    assert three.run(act) == 3 * [value]
    assert asked == [0]


def other_config(folder):
    claim_workdir(
        dataclasses.replace(CONFIG, training=dataclasses.replace(TRAINING, batch_size=16)), folder
    )


def a_file(folder):
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (other_config, "training.batch_size=16, and this one has 8"),
        (a_file, "cannot write to"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "cannot be read"),
    ],
    ids=["another config", "a file", "damaged config"],
)
def test_a_workdir_that_cannot_be_had_ends_all_processes(two, tmp_path, prepare, reason):
    workdir = tmp_path / "run"
    workdir.mkdir()
    prepare(workdir)
    ends = two.run(lambda _: loop.train(CONFIG, workdir))
    assert isinstance(ends[0], StorageError)
    assert reason in str(ends[0])
    assert raised(ends[1]) == (StorageError, ELSEWHERE)


def test_a_workdir_in_use_ends_all_processes(two, tmp_path):
    with locked(tmp_path):
        ends = two.run(lambda _: loop.train(CONFIG, tmp_path))
    assert "is in use by another run" in str(ends[0])
    assert raised(ends[1]) == (StorageError, ELSEWHERE)
    assert not (tmp_path / CONFIG_FILE).exists()


def test_what_the_program_writes_when_it_has_the_workdir_may_fail_for_all(two, tmp_path):
    """It is called in the first process alone, and the workdir is free again."""
    called = []

    def on_claimed():
        called.append(json.loads((tmp_path / CONFIG_FILE).read_text())["training"]["steps"])
        raise StorageError("cannot write starts.jsonl")

    ends = two.run(lambda _: loop.train(CONFIG, tmp_path, on_claimed=on_claimed))
    assert called == [6]
    assert [str(end) for end in ends] == ["cannot write starts.jsonl", ELSEWHERE]
    with locked(tmp_path):
        pass


def views(tmp_path, name, *contents):
    """Folders of processes to which a shared disk shows a file differently."""
    folders = [tmp_path / str(process) for process in range(len(contents))]
    for folder, content in zip(folders, contents, strict=True):
        folder.mkdir()
        if content is not None:
            (folder / name).write_text(content)
    return folders


@pytest.mark.parametrize("late", [0, 1])
def test_where_files_come_late_all_take_the_batches_of_the_first(two, tmp_path, late):
    back = Rollback(6, 4, 5, loss=float("inf"), grad_norm=1.0)
    stored = json.dumps([dataclasses.asdict(back)])
    seen = [None if process == late else stored for process in range(2)]
    folders = views(tmp_path, "rollbacks.json", *seen)
    found = two.run(lambda process: Rollbacks(folders[process]).all)
    assert found == 2 * [[back] if late else []]


def test_a_rollback_that_cannot_be_written_ends_all(two, tmp_path):
    back = Rollback(6, 4, 5, loss=1.0, grad_norm=1.0)
    ends = two.run(lambda _: Rollbacks(tmp_path / "nowhere").add(back))
    assert "cannot write" in str(ends[0])
    assert raised(ends[1]) == (StorageError, ELSEWHERE)


@pytest.mark.parametrize("late", [0, 1])
def test_whether_a_run_is_finished_is_what_the_first_sees(two, tmp_path, late):
    row = json.dumps({"step": 6, "test_loss": 1.0}) + "\n"
    folders = views(tmp_path, METRICS, *("" if process == late else row for process in range(2)))
    ends = two.run(lambda process: loop.is_finished(CONFIG, folders[process], 6))
    assert ends == 2 * [bool(late)]
    assert two.run(lambda process: loop.is_finished(CONFIG, folders[process], 5)) == 2 * [False]


def test_rows_that_the_first_cannot_write_stop_all_at_the_next_save(two, tmp_path, monkeypatch):
    """Not the first alone: the others would wait for it in the next step."""

    class Full:
        def refuse(self, *_):
            raise StorageError("cannot write metrics.jsonl: No space left on device")

        write = sync = refuse

    def act(process):
        notices = []
        files = RunFiles(TRAINING, tmp_path, notices.append)
        if process == 0:
            files._rows = Full()
        files.write(1, {"loss": 1.0}, {})
        with pytest.raises(StorageError) as told:
            files.save(None, wait=False)
        return notices, str(told.value)

    (first, reason), (other, elsewhere) = two.run(act)
    assert first == ["cannot write metrics.jsonl: No space left on device; the run goes on"]
    assert reason == "cannot write metrics.jsonl: No space left on device"
    assert other == [] and elsewhere == f"metrics cannot be written: {ELSEWHERE}"


def test_a_checkpoint_that_cannot_be_deleted_ends_all(two, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    monkeypatch.setattr(Checkpoints, "_delete", refuse)
    ends = two.run(lambda _: Checkpoints(tmp_path).discard_after(2))
    assert "checkpoints/4 cannot be deleted: Permission denied" in str(ends[0])
    assert raised(ends[1]) == (StorageError, ELSEWHERE)
