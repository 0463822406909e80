"""What is timed, and in which order."""

import itertools

from sleepnet.evaluation.latency import interleaved, sleep_latency, wake_latency


def test_calls_take_turns_and_none_always_follows_the_same():
    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 30)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 32  # two of them warm up
    assert {*map("".join, itertools.permutations("abc"))} == {*rounds}
    assert all(0 <= t.median_ms <= t.p90_ms for t in timings.values())


def test_every_variant_is_timed(config, params):
    wake = wake_latency(params, config.model, passes=(1, 3), windows=(0, 2), repeats=8)
    assert set(wake) == {(1, 0), (1, 2), (3, 0), (3, 2)}
    sleep = sleep_latency(params, config.model, (1, 3), repeats=2)
    assert set(sleep.sleep) == {1, 3}
    assert sleep.prefill.median_ms > 0
