"""What `launch.benchmark` promises: it measures, records, and holds no peer against us unproved."""

import importlib.util
import json
import pathlib
import sys

import jax
import minds
import numpy as np
import pytest
import waiting

import sleepnet
from launch.benchmark import peers
from launch.benchmark.suites import (
    Options,
    devices,
    gradients,
    horizon,
    report,
    rule,
    sleep,
    tpu,
    wake,
)
from sleepnet.config import ConfigError
from sleepnet.nn import flops

ROOT = pathlib.Path(__file__).parent.parent.parent
SHAPE = (1, 24, 2, 8)

# The rule token by token in NumPy, in the orientation of arXiv 2412.06464, eq. 10.
HONEST = """
import numpy as np
VERSIONS = {"numpy": np.__version__}
SCALE = 1.0
def load(arrays):
    global given
    given = arrays
def run(work):
    print("libraries are talkative")
    q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
    B, T, H, K = k.shape
    state, out = np.zeros((B, H, K, v.shape[-1])), np.zeros(v.shape)
    for t in range(T):
        state *= np.exp(g[:, t])[..., None, None]
        wrong = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)
        state += np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
        out[:, t] = SCALE * np.einsum("bhk,bhkv->bhv", q[:, t], state) / np.sqrt(K)
    return lambda: {"out": out, "state": state}
"""
FAKES = {
    "honest": HONEST,
    "wrong": HONEST.replace("SCALE = 1.0", "SCALE = 1.01"),
    "mortal": HONEST.replace('print("libraries are talkative")', 'raise MemoryError("too much")'),
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Starts a peer from one of `FAKES` in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(name):
        (tmp_path / "of_fake.py").write_text(FAKES[name])
        command = [sys.executable, str(ROOT / "launch/benchmark/peers/serve.py"), "of_fake"]
        started.append(peers.Peer(name, command, tmp_path, threads=1))
        return started[-1]

    yield start
    for peer in started:
        peer.close()


def forward(inputs):
    out, state = rule.FORMS["own"](*inputs.values())
    return {"out": np.asarray(out), "state": np.asarray(state)}


@pytest.mark.slow
def test_a_peer_that_computes_the_same_rule_is_timed(fake):
    """On equal inputs, by its own clock; what it prints is not taken for an answer."""
    inputs, peer = rule.rule_inputs(*SHAPE), fake("honest")
    peer.load(inputs)
    peer.check("forward", forward(inputs))
    assert peer.run("forward") > 0
    assert peer.versions == {"numpy": np.__version__}


def test_a_peer_that_computes_something_else_is_refused(fake):
    """One percent in the output is named, with the result and the tolerance."""
    inputs, peer = rule.rule_inputs(*SHAPE), fake("wrong")
    peer.load(inputs)
    with pytest.raises(peers.PeerError, match=r"peer wrong .* out of forward differs by 1.0e-02"):
        peer.check("forward", forward(inputs))


def test_a_peer_that_dies_is_named(fake):
    """With its last word."""
    peer = fake("mortal")
    peer.load(rule.rule_inputs(*SHAPE))
    with pytest.raises(peers.PeerError, match="peer mortal died with exit code 1: MemoryError"):
        peer.run("forward")


def test_the_flops_of_the_rule_are_those_of_the_formula():
    """166.6 kFLOP per token and head at K = V = 128 and C = 64."""
    assert rule.rule_flops(1, 1, 1, 128) == pytest.approx(166.6e3, rel=1e-3)


@pytest.mark.slow
def test_ratios_are_of_calls_in_one_run():
    """Each row holds both works, our chunk choices and the scan within."""
    rows = rule.run(Options(repeats=2, shapes=(SHAPE,), peers=("scan",)))["rows"]
    assert [row["work"] for row in rows] == list(rule.WORKS)
    for row in rows:
        ratio, low, high = row["scan / own"]
        assert ratio == pytest.approx(row["scan ms"] / row["own ms"])
        assert 0 < low <= high


def test_a_sleep_is_held_against_the_prefills_that_it_repeats(monkeypatch):
    """N = 1 against one; slices against the same sleep in one piece, none longer than all."""
    config = sleepnet.ModelConfig(vocab_size=4, pattern="A", d_model=4, num_heads=1, window=6)
    params = minds.params(config)  # quicker than to compile `init_params`
    monkeypatch.setattr(sleepnet, "init_params", lambda config, key: params)
    monkeypatch.setattr(sleep, "MODELS", ((config, (2,)),))
    monkeypatch.setattr(sleep, "PASSES", (1, 4))
    monkeypatch.setattr(sleep, "SLICES", (4, 7))  # the second is longer than the window
    one, four, slices = sleep.run(Options(repeats=2))["rows"]
    for row, prefills in ((one, 1), (four, 3)):
        ratio = row["ms"] / row["prefill ms"] / prefills
        assert row["/ (N-1) prefills"][0] == pytest.approx(ratio)
    assert (one["N"], four["N"], slices["N"], slices["slice"]) == (1, 4, 4, 4)
    assert slices["/ one piece"][0] == pytest.approx(slices["ms"] / four["ms"])
    assert 0 < slices["longest slice ms"] < slices["ms"]


def test_a_token_is_held_against_what_it_must_move(monkeypatch):
    """Parameters but the embedding once, fast weights twice, keys and values once."""
    config = sleepnet.ModelConfig(
        vocab_size=4, pattern="AG", d_model=4, num_heads=1, window=6, param_dtype="float32"
    )
    params, B = minds.params(config), 2
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    moved = wake.token_bytes(params, sleepnet.init_state(config, B))
    assert moved == total - 4 * 4 * 4 + B * 4 * (2 * 4 * 4 + 2 * 6 * 4)
    monkeypatch.setattr(sleepnet, "init_params", lambda config, key: params)
    monkeypatch.setattr(wake, "CONFIG", config)
    monkeypatch.setattr(wake, "AGES", {B: (1, 3)})
    young, old = wake.run(Options(repeats=2))["rows"]
    assert (young["windows lived"], old["windows lived"]) == (1, 3)
    assert old["/ age 1"][0] == pytest.approx(old["decoder ms"] / young["decoder ms"])
    assert young["MB"] == moved / 1e6
    compute_ms = flops.window_flops(config, 1, 1, 1) * B / young["GEMM GFLOP/s"] / 1e6
    for rate in ("copy", "read"):
        bound_ms = max(compute_ms, young["MB"] / young[f"{rate} GB/s"])
        assert young[f"of {rate} bound"] == pytest.approx(bound_ms / young["decoder ms"])
    with pytest.raises(ConfigError, match="--repeats: at most 3 fit into a window; got 4"):
        wake.run(Options(repeats=4))


def test_a_long_context_is_held_against_attention_over_all_of_it(monkeypatch):
    """The mind has one size at every age, and the age is real; the cache grows with the context,
    and one that has no room is not measured; ratios are those of the figures beside them."""
    config = sleepnet.ModelConfig(vocab_size=5, pattern="AG", d_model=8, num_heads=2, window=64)
    monkeypatch.setattr(horizon, "MODELS", ((config, (64, 128), (64, 128)),))
    monkeypatch.setattr(horizon, "ROOM", 2 * 2 * 64 * 8 * 4)
    configs = (config, horizon.with_attention_over(config, 64))
    params = {each: minds.params(each) for each in configs}
    monkeypatch.setattr(sleepnet, "init_params", lambda config, key: params[config])
    young, short, old, long = horizon.run(Options(repeats=3))["rows"]
    for row, mind, context in (
        (young, "sleeps", 64), (short, "attention", 64), (old, "sleeps", 128),
        (long, "attention", 128),
    ):  # fmt: skip
        assert (row["mind"], row["context"]) == (mind, str(context))
    size = sum(x.nbytes for x in jax.tree.leaves(sleepnet.init_state(config, 1))) / 1e6
    assert young["state MB"] == old["state MB"] == size
    for row, context in ((short, 64), (long, 128)):
        assert row["state MB"] == 2 * 2 * context * 8 * 4 / 1e6  # blocks, keys and values
    assert long["ms p50"] == "does not fit"
    assert "tokens/s" not in long
    assert young["/ attention"] == pytest.approx(young["tokens/s"] / short["tokens/s"])
    second = young["ms p50"] / 1e3 + young["sleep ms"] / 1e3 / 64
    assert young["tokens/s"] == pytest.approx(1 / second)
    for row in (young, short, old):
        bound_ms = row["MB moved"] / row["read GB/s"]
        assert row["of read bound"] == pytest.approx(bound_ms / row["ms p50"])
    assert old["/ shortest"][0] == pytest.approx(old["ms p50"] / young["ms p50"])
    assert old["read s"] == pytest.approx(2 * young["read s"])
    with pytest.raises(ConfigError, match="--repeats: 20 rounds do not fit"):
        horizon.run(Options(repeats=20))


def test_the_age_of_a_mind_is_the_windows_that_it_read():
    """Its fast weights are those of reading them one by one."""
    config = sleepnet.ModelConfig(vocab_size=5, pattern="AG", d_model=8, num_heads=2, window=64)
    params = minds.params(config)
    readers = horizon.sleeping(config, params, (64, 192), room=config.window)
    state, expected = sleepnet.init_state(config, 1), {}
    for number in (1, 2, 3):
        tokens = horizon.random_tokens(config, 64, seed=number)
        _, state = sleepnet.wake(params, state, tokens, config=config)
        state = sleepnet.sleep(params, state, config=config, passes=1)
        expected["sleeps", 64 * number] = state
    assert readers.keys() == {("sleeps", 64), ("sleeps", 192)}
    for key, reader in readers.items():
        for ours, theirs in zip(
            jax.tree.leaves(reader.state.fast_weights),
            jax.tree.leaves(expected[key].fast_weights), strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_through_fewer_passes_are_held_against_those_through_all(monkeypatch):
    """In one run: time as a ratio, memory of the compiled steps, and products by the formula."""
    values = gradients.depo_small.get_config()
    values.model.update(pattern="G", d_model=8, passes=2)
    values.training.batch_size = 2
    monkeypatch.setattr(gradients.depo_small, "get_config", lambda: values)
    monkeypatch.setattr(gradients, "VARIANTS", {"all": {}, "last 1": dict(gradient_passes=1)})
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        every, last = gradients.run(Options(repeats=2))["rows"]
    assert every["/ all"] == (1.0, 1.0, 1.0)
    assert last["/ all"][0] == pytest.approx(last["step ms"] / every["step ms"])
    assert last["tokens/s"] == pytest.approx(1e3 * 2 * 4 * 8 / last["step ms"])
    assert 0 < last["temp MB"] < every["temp MB"]
    assert 0 < last["GFLOP"] < every["GFLOP"]


@pytest.mark.slow
def test_devices_share_the_rule():
    """On the tests' eight: less than two fair shares each, the same last state; and one message,
    the affine maps (64, 64 + 64) of all."""
    (row, sleep_row) = devices.run(Options(repeats=1, shapes=((1, 2048, 1, 64),)))["rows"]
    P = jax.local_device_count()
    assert row["P"] == P
    assert 1 < row["device / share"] < 2
    assert row["collectives"] == f"all-gather {P * 4 * 64 * 128 / 1e6:.3g} MB"
    assert sleep_row["device / share"] < 1.1
    for each in (row, sleep_row):
        assert each["largest difference"] < 1e-5
        assert each["same bits"] == "True"
    with pytest.raises(ConfigError, match=r"T of a shape must be a multiple of 512, .*; got 100"):
        devices.run(Options(repeats=1, shapes=((1, 100, 1, 64),)))


def test_without_the_tpu_compiler_its_suite_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"topology v5e:2x2 .* pip install -e '\.\[tpu\]'"):
        tpu.run(Options(repeats=1))


def benchmark(*arguments):
    return waiting.run(sys.executable, "-m", "launch.benchmark", *arguments)


def test_the_command_prints_what_it_writes(tmp_path):
    """A table on the screen, the figures as JSON, and the page of all suites."""
    done = benchmark("--suite=rule", "--shapes=1x8x1x8", "--repeats=1", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "benchmarks" / "rule.json").read_text())
    assert report.section(record).strip() == done.stdout.strip()
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert done.stdout.strip() in page
    assert record["machine"]["jax"] in page


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["--suite=rules"], "rule|"),
        (["--peer=torch"], "transformers|"),
        (["--peer=ejkernel", "--environments=nowhere"], "`make peers` builds it"),
        (["--shapes=4096x8"], "'4096x8' is not BxTxHxD, such as 1x4096x8x128"),
        (["--repeats=0"], "not a positive integer"),
        (["--suite=wake", "--peer=scan"], "--peer: --suite=wake does not take it"),
        (["--suite=train", "--shapes=1x8x1x8"], "--shapes: --suite=train does not take it"),
        (["--suite=tpu", "--repeats=3"], "--repeats: --suite=tpu does not take it"),
    ],
)
def test_a_wrong_flag_is_answered_in_a_line(wrong, expected):
    """Before anything is compiled, and with what is allowed."""
    done = benchmark(*wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
