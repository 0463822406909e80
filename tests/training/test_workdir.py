"""A run on text and its files: they may move, and others may not take their place."""

import dataclasses
import json
import pathlib
import shutil

import corpora
import numpy as np
import pytest

from sleepnet import storage, tasks
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.evaluation import record
from sleepnet.experiment import ExperimentConfig
from sleepnet.storage import StorageError
from sleepnet.tasks.text import task_tokenizer
from sleepnet.training.workdir import CONFIG, claim_workdir, differences, load_config


def run_on(task) -> ExperimentConfig:
    made = tasks.make(task)
    model = ModelConfig(vocab_size=made.vocab_size, d_model=8, num_heads=1, window=task.window)
    return ExperimentConfig(model=model, task=made.config)


@pytest.fixture
def relative(tmp_path, monkeypatch):
    """A task whose files are named from the folder where the run began, as people do."""
    monkeypatch.chdir(tmp_path)
    task = corpora.text_config(pathlib.Path("data [1]"))
    shutil.move("data [1]/train.jsonl", "data [1]/a.jsonl")
    special = corpora.write_tokenizer(pathlib.Path("data [1]/tokenizer.json"), special=["<|end|>"])
    return dataclasses.replace(task, train_files=("data ?1?/a*",), tokenizer=str(special))


def moved(folder, tmp_path):
    """The task with all files in another folder, and the old ones gone."""
    shutil.move(tmp_path / "data [1]", tmp_path / folder)
    return {
        "tokenizer": f"{folder}/tokenizer.json",
        "train_files": (f"{folder}/a.jsonl",), "test_files": (f"{folder}/test.jsonl",),
    }  # fmt: skip


def test_a_run_finds_its_files_from_any_folder(relative, tmp_path, monkeypatch):
    """And goes on from there, however they are named."""
    began = run_on(relative)
    first = tasks.make(relative).example("train", 3)
    claim_workdir(began, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stored = load_config(tmp_path / "run").task
    task = tasks.make(stored)
    assert task.config == stored
    np.testing.assert_array_equal(task.example("train", 3).tokens_WL, first.tokens_WL)
    assert task_tokenizer(stored).identity in stored.fingerprints[0]
    data = "../data [1]"
    spelled = dataclasses.replace(
        relative, tokenizer=f"{data}/tokenizer.json",
        train_files=(f"{data}/a.jsonl",), test_files=(f"{data}/test.jsonl",),
    )  # fmt: skip
    claim_workdir(run_on(spelled), tmp_path / "run")


@pytest.mark.parametrize("field", ["NaN", "Infinity", "-Infinity"])
def test_a_field_may_be_called_like_a_number(tmp_path, field):
    """Its run goes on, and finds what was measured of it."""
    rows = [json.dumps({field: f"{text} {'dream ' * 9}"}) + "\n" for text in ("a", "b")]
    for split, row in zip(("train", "test"), rows, strict=True):
        (tmp_path / f"{split}.jsonl").write_text(row)
    files = {f"{split}_files": (str(tmp_path / f"{split}.jsonl"),) for split in ("train", "test")}
    config = run_on(tasks.TextConfig(text_field=field, window=16, windows=4, **files))
    claim_workdir(config, tmp_path / "run")
    claim_workdir(config, tmp_path / "run")
    assert load_config(tmp_path / "run") == config
    measured = record.identity({}, config)
    storage.write_json(tmp_path / "measured.json", measured)
    assert record.is_of(storage.read_json(tmp_path / "measured.json"), {}, config)


def test_files_that_have_moved_are_named_anew(relative, tmp_path):
    """Their content proves that it is them; the run then finds them there."""
    claim_workdir(run_on(relative), tmp_path / "run")
    task = load_config(tmp_path / "run").task
    there = moved("there", tmp_path)
    with pytest.raises(ConfigError, match=r"data \[1\]/tokenizer\.json' cannot be read"):
        tasks.make(task)
    tasks.make(dataclasses.replace(task, **there))
    claim_workdir(run_on(dataclasses.replace(relative, **there)), tmp_path / "run")
    tasks.make(load_config(tmp_path / "run").task)


@pytest.mark.parametrize("field", ["tokenizer", "train_files", "test_files"])
def test_other_content_is_refused_wherever_it_lies(relative, tmp_path, field):
    claim_workdir(run_on(relative), tmp_path / "run")
    task = load_config(tmp_path / "run").task
    there = moved("there", tmp_path)
    value = there[field]
    path = tmp_path / (value if isinstance(value, str) else value[0])
    if field == "tokenizer":
        corpora.write_tokenizer(path, special=["<|other|>"])
    else:
        corpora.write_jsonl(path, ["another text"])
    with pytest.raises(ConfigError, match="this run was made with"):
        tasks.make(dataclasses.replace(task, **there))
    with pytest.raises(
        StorageError,
        match=rf"holds a run with task\.fingerprints='.*/{path.name}: .*, or put its files back",
    ):
        claim_workdir(run_on(dataclasses.replace(relative, **there)), tmp_path / "run")


def test_how_special_tokens_are_read_is_the_runs(relative, tmp_path):
    """Where it matters; a run from before there was a choice had read control tokens."""
    control = dataclasses.replace(relative, special_tokens="control")
    claim_workdir(run_on(control), tmp_path / "run")
    with pytest.raises(
        StorageError,
        match=r"task\.special_tokens='control', and this one has 'text': take another --workdir, "
        r"or set task\.special_tokens back",
    ):
        claim_workdir(run_on(relative), tmp_path / "run")
    for one, other in ((control, "text"), (relative, "control")):
        made = dataclasses.replace(run_on(one).task, special_tokens=other)
        with pytest.raises(
            ConfigError, match=rf"made with .*; set task\.special_tokens={one.special_tokens}, or"
        ):
            task_tokenizer(made)
    values = json.loads((tmp_path / "run" / CONFIG).read_text())
    del values["task"]["special_tokens"]
    (tmp_path / "run" / CONFIG).write_text(json.dumps(values))
    stored = load_config(tmp_path / "run")
    tasks.make(stored.task)
    assert not list(differences(stored.to_dict(), run_on(control).to_dict()))
    of_bytes = dataclasses.replace(relative, tokenizer="bytes")
    stored, now = (run_on(dataclasses.replace(of_bytes, special_tokens=how)).to_dict()
                   for how in ("control", "text"))  # fmt: skip
    assert not list(differences(stored, now))
