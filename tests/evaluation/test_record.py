"""evaluation.json: what is asked for, measured, stored and found again."""

import json

from sleepnet.evaluation import record


def test_the_trained_n_is_always_measured(config):
    assert record.widen(config, (4, 1)).evaluation.passes == (1, 3, 4)
    assert record.widen(config).evaluation.passes == (1, 2, 3, 4)
    assert record.widen(config, examples=7).evaluation.examples == 7


def test_a_record_is_plain_json_and_found_only_by_an_equal_request(config, params, tmp_path):
    asked = record.widen(config, (1,))
    measured = record.measure(params, asked, step=5, latency=False)
    record.save(tmp_path, measured)
    assert record.load(tmp_path) == json.loads(json.dumps(measured)) == measured
    assert [(r["passes"], r["depth"]) for r in measured["results"]] == [
        (N, depth) for N in (1, 3) for depth in (1, 2, None)
    ]
    assert measured["agreement"]["passes"] == config.model.passes

    assert record.find(tmp_path, asked, 5, latency=False) == measured
    assert record.find(tmp_path, asked, 5, latency=True) is None
    assert record.find(tmp_path, asked, 6, latency=False) is None
    assert record.find(tmp_path, record.widen(config, (1,), 151), 5, latency=False) is None
    assert record.find(tmp_path, record.widen(config), 5, latency=False) is None
