"""Flags that say where the files of a run are now."""

import dataclasses
import pathlib
import types

import corpora
import pytest

from launch.common import moved_files
from sleepnet import tasks
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig


def on(task):
    return ExperimentConfig(model=ModelConfig(vocab_size=257, window=task.window), task=task)


def given(**values):
    """As flags are that were parsed."""
    paths = {"tokenizer": pathlib.Path, "test_files": lambda each: [*map(pathlib.Path, each)]}
    read = {field: value and paths[field](value) for field, value in values.items()}
    return {field: types.SimpleNamespace(value=value) for field, value in read.items()}


@pytest.fixture
def config(tmp_path):
    return on(tasks.make(corpora.text_config(tmp_path)).config)


def test_files_that_are_there_need_no_flag(config):
    none = given(tokenizer=None, test_files=None)
    assert moved_files.apply(config, none) == config


def test_a_file_that_has_moved_is_asked_for_and_taken(config, tmp_path):
    moved = (tmp_path / "test.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=r"no .*test\.jsonl; if it has moved, .* --test_files"):
        moved_files.apply(config, given(tokenizer=None, test_files=None))
    assert moved_files.apply(config, given(tokenizer=None)) == config  # whose text is not read
    named = moved_files.apply(config, given(tokenizer=None, test_files=[str(moved)]))
    assert named.task == dataclasses.replace(config.task, test_files=(str(moved),))
    tasks.make(named.task)


def test_a_run_that_reads_no_files_takes_none():
    depo = on(DepoConfig())
    assert moved_files.apply(depo, given(tokenizer=None)) == depo
    with pytest.raises(ConfigError, match="--tokenizer: the run is on depo, which reads no files"):
        moved_files.apply(depo, given(tokenizer="bytes"))
