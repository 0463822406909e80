"""A sweep: bad combinations are all named before anything starts; what is done is never done again;
one failure leaves the others alone; and stopping loses nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest
import waiting

from experiments import depo_small
from launch.sweep import book, space
from launch.sweep.book import DONE, FAILED, STOPPED, WAITING
from launch.sweep.crew import Crew
from sleepnet.config import ConfigError


def runs(*grid, draws=(), samples=1, seed=0, **training):
    base = depo_small.get_config()
    base.training.steps = 4
    base.training.warmup_steps = 0
    base.training.update(training)
    return space.make_runs(
        base, [space.parse_grid(text) for text in grid],
        [space.parse_draw(text) for text in draws], samples, seed,
    )  # fmt: skip


# Which runs.


def test_a_grid_is_every_combination_by_a_readable_name():
    made = runs("model.passes=1,2", "training.seed=0,1")
    assert [run.name for run in made] == [
        "passes=1_seed=0", "passes=1_seed=1", "passes=2_seed=0", "passes=2_seed=1",
    ]  # fmt: skip
    assert [(run.config.model.passes, run.config.training.seed) for run in made] == [
        (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert made[3].overrides == ["--config.model.passes=2", "--config.training.seed=1"]


def test_a_grid_may_leave_a_field_to_follow_others():
    """By None, where the field's type allows it."""
    follows, given = runs("model.head_dim=None,8", "task.test_hops=None")
    assert follows.config == runs("training.seed=0")[0].config
    assert given.config.model.head_dim == 8 != follows.config.model.head_dim
    assert "--config.model.head_dim=None" in follows.overrides
    with pytest.raises(ConfigError, match=r"model\.passes must be an integer; got None"):
        runs("model.passes=1,None")


def test_fields_of_one_name_are_told_apart():
    [run] = runs("task.seed=1", "training.seed=2")
    assert run.name == "task.seed=1_training.seed=2"


def test_every_bad_combination_is_named_at_once():
    with pytest.raises(ConfigError) as raised:
        runs("model.passes=1,0", "model.rule=delta,gated_dleta")
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 of 4 runs cannot be; nothing was started:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "passes=1_rule=gated_dleta", "passes=0_rule=delta", "passes=0_rule=gated_dleta",
    ]  # fmt: skip
    assert "the nearest is 'gated_delta'" in lines[1]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (["model.pases=1"], "the nearest is model.passes"),
        (["passes=1"], "no such field; the nearest is model.passes"),
        (["model.passes"], "is not SECTION.FIELD=VALUE,VALUE"),
        (["model.passes=1,1"], "names a value twice"),
        (["model.passes=1", "model.passes=2"], "model.passes is given twice"),
        (["model.passes=many"], "model.passes must be of type int; got 'many'"),
        (["task.cells=24"], "task.cells: no such field"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_grid_is_answered_with_the_nearest_good_one(grid, expected):
    with pytest.raises(ConfigError) as raised:
        runs(*grid)
    assert expected in str(raised.value)


def test_more_samples_leave_the_earlier_ones_as_they_were():
    """And other fields too: what has been trained stays part of the sweep."""
    draw = "training.muon_learning_rate=log:1e-3:3e-2"
    few = [run.fields["training.muon_learning_rate"] for run in runs(draws=[draw], samples=3)]
    more = [
        run.fields["training.muon_learning_rate"]
        for run in runs(draws=["training.clip_norm=uniform:0.5:2", draw], samples=6)
    ]
    assert more[:3] == few and len(set(more)) == 6
    assert all(1e-3 <= float(value) <= 3e-2 for value in more)
    other = runs(draws=[draw], samples=3, seed=1)
    assert [run.fields["training.muon_learning_rate"] for run in other] != few


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        ("training.clip_norm=lgo:1:2", "the nearest is 'log'"),
        ("training.clip_norm=log:0:2", "needs 0 < LOW < HIGH"),
        ("training.clip_norm=uniform:2:1", "needs LOW < HIGH"),
        ("model.passes=int:1:2.5", "needs whole numbers"),
        ("model.passes=int:1", "is not SECTION.FIELD=int:LOW:HIGH"),
    ],
)
def test_a_bad_distribution_is_named(draw, expected):
    with pytest.raises(ConfigError) as raised:
        runs(draws=[draw])
    assert expected in str(raised.value)


# How they are brought to their end: by a stand-in for launch.train that writes what it writes.

TRAIN = """
import json, os, pathlib, signal, sys, time
workdir, config, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(workdir / "starts", "a") as file:
    file.write("started" + chr(10))
starts = (workdir / "starts").read_text().count("started")
if behaviour == "refuses":
    print("error: no such thing"); sys.exit(2)
if behaviour == "fails" or (behaviour == "fails once" and starts == 1):
    print("out of memory"); sys.exit(1)
def save(number, _):
    (workdir / "saved").touch(); sys.exit(128 + number)
if behaviour == "waits" and starts == 1:
    signal.signal(signal.SIGTERM, save)
    (workdir / "waiting").touch()
    time.sleep(TOO_LONG)
(workdir / "config.json").write_text(config)
(workdir / "checkpoints" / "4").mkdir(parents=True)
(workdir / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 0.5, "accuracy": 0.75}))
(workdir / "timing.jsonl").write_text(json.dumps({"step": 4, "seconds": 65.0}))
""".replace("TOO_LONG", str(waiting.TOO_LONG))


def work(folder, made, behaviour=None, **options):
    """The rows after one call of the sweep; behaviour by run's name."""
    behaviour = behaviour or {}

    def train(run, workdir):
        config = json.dumps(run.config.to_dict())
        return [sys.executable, "-S", "-c", TRAIN, str(workdir), config,
                behaviour.get(run.name, "trains")]  # fmt: skip

    said = []
    rows = Crew(folder, train=train, say=said.append, **options).work(made)
    return {row.run: row for row in rows}, said


def starts(folder, name):
    path = folder / name / "starts"
    return path.read_text().count("started") if path.exists() else 0


def test_what_is_done_is_not_done_again_and_the_rest_is(tmp_path):
    """Also when the sweep has grown; the table is that of all."""
    rows, _ = work(tmp_path, runs("model.passes=1,2"), parallel=2)
    assert [row.status for row in rows.values()] == [DONE, DONE]
    rows, said = work(tmp_path, runs("model.passes=1,2,4"))
    assert [row.status for row in rows.values()] == [DONE, DONE, DONE]
    assert [starts(tmp_path, f"passes={n}") for n in (1, 2, 4)] == [1, 1, 1]
    assert said[0].startswith("[1/3] passes=1 done before, loss 0.500, accuracy 0.750, 0:01:05")
    stored = [json.loads(line) for line in (tmp_path / book.ROWS).read_text().splitlines()]
    assert [(row["run"], row["loss"], row["seconds"]) for row in stored] == [
        ("passes=1", 0.5, 65.0), ("passes=2", 0.5, 65.0), ("passes=4", 0.5, 65.0),
    ]  # fmt: skip
    assert (
        "|            4 |   done |    4 | 0.500 |    0.750 |" in (tmp_path / book.TABLE).read_text()
    )


def test_another_config_is_not_taken_for_done(tmp_path):
    """The folder's name tells only the swept fields; launch.train then refuses the workdir."""
    work(tmp_path, runs("model.passes=1"))
    changed = runs("model.passes=1", muon_learning_rate=0.5)
    rows, _ = work(tmp_path, changed, {"passes=1": "refuses"})
    assert rows["passes=1"].status == FAILED
    assert "code 2: error: no such thing" in rows["passes=1"].error


def test_one_failure_is_reported_and_the_others_go_on(tmp_path):
    """Tried again, unless it is an error that a retry cannot mend."""
    behaviour = {"passes=1": "fails", "passes=2": "fails once", "passes=3": "refuses"}
    rows, said = work(tmp_path, runs("model.passes=1,2,3,4"), behaviour, parallel=2)
    assert [row.status for row in rows.values()] == [FAILED, DONE, FAILED, DONE]
    assert [starts(tmp_path, f"passes={n}") for n in (1, 2, 3, 4)] == [2, 2, 1, 1]
    assert rows["passes=1"].error.startswith("code 1: out of memory; see ")
    assert "passes=1 ended with code 1; again" in said
    rows, _ = work(tmp_path, runs("model.passes=1,2,3,4"))
    assert {row.status for row in rows.values()} == {DONE}


def test_stopping_lets_runs_save_and_going_on_finishes_them(tmp_path):
    made = runs("model.passes=1,2,4")
    waits = {run.name: "waits" for run in made}
    stop = lambda: (tmp_path / "passes=1" / "waiting").exists()  # noqa: E731
    rows, _ = work(tmp_path, made, waits, should_stop=stop)
    assert [row.status for row in rows.values()] == [STOPPED, WAITING, WAITING]
    assert (tmp_path / "passes=1" / "saved").exists()
    rows, _ = work(tmp_path, made)
    assert {row.status for row in rows.values()} == {DONE}


# The program itself, with real training.


def sweep(folder, *arguments):
    return waiting.Program(
        sys.executable, "-m", "launch.sweep", "--config=experiments/depo_small.py",
        f"--workdir={folder}", "--config.model.pattern=G", "--config.model.d_model=8",
        "--config.training.batch_size=2", "--config.training.warmup_steps=0",
        "--config.training.log_every=1", "--config.evaluation.examples=8",
        "--config.evaluation.passes=(1,)", "--config.evaluation.streaming_examples=0",
        "--grid=model.passes=1,2", "--grid=training.seed=0,1", *arguments,
        env=os.environ | {"NPROC": "1", "XLA_FLAGS": ""}, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(program):
    """Its exit code, and what it said; it may train four runs."""
    done = program.end(4 * waiting.PATIENCE)
    return done.returncode, done.stdout


def test_a_mesh_that_does_not_fit_the_devices_is_named_before_anything_starts(tmp_path):
    """Of each run by name; a run that fits does not begin either. Here there is one device."""
    fields = ("--grid=mesh.data=1,2", "--config.training.steps=10")
    code, output = ended(sweep(tmp_path / "sweep", *fields))
    assert code == 2
    assert "4 of 8 runs cannot be; nothing was started:" in output
    for name in ("passes=1_seed=0_data=2", "passes=2_seed=1_data=2"):
        assert f"{name}: mesh.data=2: with mesh.fsdp=1, 2 are more than the one device" in output
    assert "Traceback" not in output and not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_real_sweep_is_stopped_goes_on_and_ends_in_one_table(tmp_path):
    steps = "--config.training.steps=3000"
    first = sweep(tmp_path, steps, "--parallel=2")
    running = [tmp_path / f"passes=1_seed={seed}" / "metrics.jsonl" for seed in (0, 1)]
    waiting.until(
        lambda: all(path.exists() and path.stat().st_size for path in running),
        "a row of metrics of both", first,
    )  # fmt: skip
    first.send(signal.SIGINT)
    code, output = ended(first)
    assert code == 128 + signal.SIGINT, output
    assert "stopped; the same command goes on" in output
    stopped = [json.loads(line) for line in (tmp_path / book.ROWS).read_text().splitlines()]
    assert [row["status"] for row in stopped] == [STOPPED, STOPPED, WAITING, WAITING]
    for row in stopped[:2]:
        saved = [int(p.name) for p in (tmp_path / row["run"] / "checkpoints").iterdir()]
        assert max(saved) >= row["step"] > 0

    code, output = ended(sweep(tmp_path, steps, "--parallel=2"))
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / book.ROWS).read_text().splitlines()]
    assert [(row["status"], row["step"]) for row in rows] == [(DONE, 3000)] * 4
    assert "resuming from step" in (tmp_path / "passes=1_seed=0" / "train.log").read_text()

    code, output = ended(sweep(tmp_path, steps, "--evaluate"))
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / book.ROWS).read_text().splitlines()]
    assert all(0.0 <= row["test_accuracy"] <= 1.0 for row in rows)
    assert (tmp_path / book.TABLE).read_text().strip() in output


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tmp_path):
    code, output = ended(sweep(tmp_path / "none", "--dry_run", "--config.training.steps=10"))
    assert code == 0, output
    assert output.count("python -m launch.train --config=experiments/depo_small.py") == 4
    assert "4 runs of depo, 10 steps each" in output
    assert not (tmp_path / "none").exists()
