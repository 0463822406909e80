"""What is timed, and in which order."""

from sleepnet.evaluation.latency import interleaved, sleep_latency, wake_latency


def test_calls_take_turns():
    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 5  # two rounds warm up
    assert all(0 <= t.median_ms <= t.p90_ms for t in timings.values())


def test_every_variant_is_timed(config, params):
    wake = wake_latency(params, config.model, passes=(1, 3), windows=(0, 2), repeats=8)
    assert set(wake) == {(1, 0), (1, 2), (3, 0), (3, 2)}
    sleep = sleep_latency(params, config.model, (1, 3), repeats=2)
    assert set(sleep.sleep) == {1, 3}
    assert sleep.prefill.median_ms > 0
