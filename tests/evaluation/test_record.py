"""evaluation.json: what is asked for, measured, stored and found again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sleepnet import storage
from sleepnet.evaluation import record
from sleepnet.evaluation.machine import describe_machine
from sleepnet.storage import StorageError


def test_the_trained_n_is_always_measured(config):
    assert record.widen(config, (4, 1)).evaluation.passes == (1, 3, 4)
    assert record.widen(config).evaluation.passes == (1, 2, 3, 4)
    assert record.widen(config, examples=7).evaluation.examples == 7


def test_a_record_is_plain_json_and_found_only_by_an_equal_request(config, params, tmp_path):
    asked = record.widen(config, (1,))
    measured = record.measure(params, asked, step=5, latency=False)
    record.save(tmp_path, measured)
    assert record.load(tmp_path, config) == (stored := json.loads(json.dumps(measured)))
    assert [(r["passes"], r["depth"]) for r in measured["results"]] == [
        (N, depth) for N in (1, 3) for depth in (1, 2, None)
    ]
    assert measured["agreement"]["passes"] == config.model.passes

    def find(asked, step=5, latency=False):
        return record.find(tmp_path, params, asked, step, latency=latency)

    assert find(asked) == stored
    assert find(asked, latency=True) is None
    assert find(asked, step=6) is None
    assert find(record.widen(config, (1,), 151)) is None
    assert find(record.widen(config)) is None


@pytest.fixture
def evaluated(config, params, tmp_path, monkeypatch):
    """A workdir whose evaluation.json was written without measuring anything."""
    nothing = {"evaluate": lambda *_, **__: [], "agreement": lambda *_: Agreement(1, 1.0)}
    for name, stand_in in nothing.items():
        monkeypatch.setattr(record, name, stand_in)
    monkeypatch.setattr(record, "_latency", lambda *_: {"batch_size": 1})
    record.save(tmp_path, record.measure(params, record.widen(config), step=5))
    return tmp_path


@dataclasses.dataclass
class Agreement:
    passes: int
    max_nll: float


def change(config, section, **fields):
    section_of = getattr(config, section)
    return dataclasses.replace(config, **{section: dataclasses.replace(section_of, **fields)})


OTHERS = {
    "training.seed": dict(section="training", seed=1),
    "task.seed": dict(section="task", seed=7),
    "model.rope_base": dict(section="model", rope_base=9.0),
    "training.adam_b2": dict(section="training", adam_b2=0.9),
}


@pytest.mark.parametrize("field", OTHERS)
def test_what_was_measured_on_another_run_is_not_found(evaluated, config, params, field):
    """As in a folder that was copied; who asks to read it is told which field differs."""
    other = record.widen(change(config, **OTHERS[field]))
    assert record.find(evaluated, params, record.widen(config), 5, latency=True)
    assert record.find(evaluated, params, other, 5, latency=False) is None
    with pytest.raises(
        StorageError, match=rf"another run \({field} was .* and is .*launch.evaluate"
    ):
        record.load(evaluated, other)


def test_other_parameters_of_the_same_step_are_measured_anew(evaluated, config, params):
    other = jax.tree.map(np.array, params)
    other["final_norm"][3] += 1e-6
    assert record.find(evaluated, other, record.widen(config), 5, latency=False) is None


def test_what_a_run_may_change_does_not_tell_it_from_itself(evaluated, config, params):
    """How often it is saved, its mesh and its kernel, and fields that came after it was stored."""
    same = change(change(config, "training", checkpoint_every=7), "model", backend="pallas")
    same = record.widen(change(same, "mesh", fsdp=2))
    assert record.find(evaluated, params, same, 5, latency=True)
    stored = storage.read_json(evaluated / record.FILE)
    del stored["measured"]["config"]["model"]["norm_eps"]
    record.save(evaluated, stored)
    assert record.find(evaluated, params, same, 5, latency=True)


def test_times_count_only_where_they_were_taken(evaluated, config, params, monkeypatch):
    elsewhere = describe_machine() | {"cpu": "abacus"}
    monkeypatch.setattr(record, "describe_machine", lambda: elsewhere)
    asked = record.widen(config)
    assert record.find(evaluated, params, asked, 5, latency=True) is None
    assert record.find(evaluated, params, asked, 5, latency=False)
