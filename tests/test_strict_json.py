"""Whatever the numbers are, a file of JSON is JSON, and gives them back."""

import json
import math

import pytest

from sleepnet import storage, strict_json
from sleepnet.training.metrics import METRICS, MetricsWriter, read_rows

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
VALUES = [
    None, True, 3, 0.1, "text", [], {}, {"a": [1, {"b": None}]},
    math.inf, [math.inf, -math.inf], {"loss": math.inf, "rows": [{"x": (1.5, -math.inf)}]},
]  # fmt: skip


def strictly(text):
    """As a reader that knows JSON alone."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def lists(value):
    """Tuples come back as lists."""
    if isinstance(value, dict):
        return {key: lists(element) for key, element in value.items()}
    return [lists(element) for element in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_what_is_written_is_json_and_is_read_back(value):
    text = strict_json.dumps(value)
    strictly(text)
    assert strict_json.loads(text) == lists(value)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_are_not_finite_are_written_by_name(name):
    """They are numbers again when read; so is what Python itself writes, and names of no number
    stay text."""
    number = NOT_FINITE[name]
    assert strictly(strict_json.dumps({"x": number})) == {"x": name}
    for text in (strict_json.dumps(number), json.dumps(number)):
        found = strict_json.loads(text)
        assert isinstance(found, float) and (
            found == number or math.isnan(found) == (name == "NaN")
        )
    assert strict_json.loads('["nan", "Infinity War"]') == ["nan", "Infinity War"]


def test_keys_that_are_not_finite_are_written_by_name():
    """As Python writes other numbers that are keys; they are strings when read."""
    text = strict_json.dumps({math.nan: 1, "rows": [{-math.inf: math.inf, 0.5: None}]})
    assert strictly(text) == {"NaN": 1, "rows": [{"-Infinity": "Infinity", "0.5": None}]}
    assert strict_json.loads(text) == {"NaN": 1, "rows": [{"-Infinity": math.inf, "0.5": None}]}


def test_names_of_numbers_may_be_had_as_strings():
    """Where every number is finite."""
    value = {"names": ["NaN", "Infinity"], "loss": 0.5, "-Infinity": "-Infinity"}
    assert strict_json.as_strings(strict_json.loads(strict_json.dumps(value))) == value


def test_finite_values_are_written_as_ever():
    """So that the seals of files that were written before still hold."""
    value = {"b": [1, 2.5], "a": {"c": "é"}}
    for options in ({}, {"sort_keys": True}, {"separators": (",", ":")}, {"indent": 2}):
        assert strict_json.dumps(value, **options) == json.dumps(value, **options)


def test_files_and_seals_hold_any_number(tmp_path):
    value = {"loss": math.inf, "nested": [{"p90": -math.inf}]}
    storage.write_json(tmp_path / "file.json", storage.seal(value))
    strictly((tmp_path / "file.json").read_text())
    assert storage.unseal(storage.read_json(tmp_path / "file.json"), "file") == value
    storage.write_arrays(tmp_path / "arrays", value, {})
    strictly((tmp_path / "arrays").read_bytes())
    assert storage.read_arrays(tmp_path / "arrays")[0] == value


def test_a_row_of_a_bad_step_is_kept_as_it_is_when_a_run_goes_on(tmp_path):
    """Its loss is not a number, to those who read it as before."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf}, {"seconds_left": math.nan})
    writer.close()
    before = (tmp_path / METRICS).read_bytes()
    assert strictly(before) == {"step": 1, "loss": "NaN", "grad_norm": "Infinity"}
    MetricsWriter(tmp_path, 1).close()
    assert (tmp_path / METRICS).read_bytes() == before
    (row,) = read_rows(tmp_path / METRICS)
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf
