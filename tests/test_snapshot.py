"""A saved mind goes on as if it had never stopped; and a file that is not whole is never one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import minds
import numpy as np
import pytest
import tokenizers
from agreement import assert_identical
from disks import full_disk
from minds import HARD, TINY
from test_session import CONFIG, L, Y, everything, life, older, session, write_words

import sleepnet
from sleepnet import FixedPasses, Sampling, Session, UntilStill, WithinSeconds, storage
from sleepnet.inference import snapshot as snapshots
from sleepnet.storage import StorageError
from sleepnet.tokenizer import CONTEXT, load_tokenizer


def load(path, params_of=CONFIG, **options) -> Session:
    return Session.load(path, minds.params(params_of), **options)


def assert_same_life(one, other):
    """Bit for bit: all that they are, dtypes included, and what they do next."""
    assert_identical(everything(one), everything(other))
    kinds = [[leaf.dtype for leaf in jax.tree.leaves(each.state)] for each in (one, other)]
    assert kinds[0] == kinds[1]
    for each in (one, other):
        each.feed([1, 2])
    assert list(one.generate(L)) == list(other.generate(L))
    np.testing.assert_array_equal(one.score([3, 4, 5]), other.score([3, 4, 5]))
    assert_identical(everything(one), everything(other))


def live_on(one: Session, rng) -> None:
    """One of the things that can be done with a mind."""
    deed = rng.integers(6)
    if deed == 0 or one.logits is None:
        one.feed(rng.integers(0, Y, rng.integers(1, 2 * L)))
    elif deed == 1:
        one.score(rng.integers(0, Y, rng.integers(1, 2 * L)))
    elif deed == 2:
        list(one.generate(int(rng.integers(1, L))))
    elif deed == 3:
        one.sleep()
    elif deed == 4:
        one.rewind(one.position - int(rng.integers(len(one.tokens) + 1)))
    else:
        one.sampling = Sampling(temperature=float(rng.uniform(0, 2)), seed=int(rng.integers(99)))


@pytest.mark.parametrize("points", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_stopping_and_going_on_is_never_having_stopped(points, tmp_path):
    """Saved and loaded at random points of a life that reads, scores, writes, naps and rewinds,
    beside one that never was: bit for bit at each."""
    stopped, never = (session(passes=UntilStill(change=0.3, at_most=4)) for _ in range(2))
    randoms = np.random.default_rng(points), np.random.default_rng(points)
    for _ in range(points):
        stopped.save(tmp_path / "mind")
        stopped = load(tmp_path / "mind")
        for one, rng in zip((stopped, never), randoms, strict=True):
            live_on(one, rng)
        assert_identical(everything(stopped), everything(never))
    assert_same_life(stopped, never)
    assert never.sleeps > points // 10


@pytest.mark.parametrize(
    "policy", [FixedPasses(2), UntilStill(change=0.2), WithinSeconds(seconds=3)]
)
def test_a_newborn_mind_and_its_choices_are_saved_too(policy, tmp_path):
    one = session(passes=policy, sampling=Sampling(top_k=3, top_p=0.5, seed=2**40))
    one.save(tmp_path / "mind")
    assert_identical(everything(load(tmp_path / "mind")), everything(one))


def test_every_dtype_and_eviction_comes_back(tmp_path):
    """Numbers of all bits, in bfloat16 and under hard eviction too."""
    rng = np.random.default_rng(0)
    for config in (dataclasses.replace(CONFIG, compute_dtype="bfloat16"), TINY):
        one = session(config)
        one._decoder.state = jax.tree.map(
            lambda x: (
                jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)) if x.dtype != np.int32 else x
            ),
            one.state,
        )
        one.save(tmp_path / "mind")
        state = load(tmp_path / "mind", config).state
        assert_identical(state, one.state)
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, one.state)


def damaged(whole: bytes, other: bytes, rng) -> bytes:
    """In one of the ways in which files are."""
    place, length = rng.integers(len(whole)), rng.integers(1, 200)
    how = rng.integers(6)
    if how == 0:
        return whole[:place]
    if how == 1:
        return whole + rng.bytes(length)
    if how == 2:  # a sector of zeros
        return whole[:place] + bytes(len(whole[place : place + length])) + whole[place + length :]
    if how == 3:  # a piece of another mind
        return whole[:place] + other[place : place + length] + whole[place + length :]
    if how == 4:  # lost
        return whole[:place] + whole[place + length :]
    flipped = bytearray(whole)
    for place in rng.integers(len(whole), size=rng.integers(1, 4)):
        flipped[place] ^= 1 << rng.integers(8)
    return bytes(flipped)


@pytest.mark.parametrize("corruptions", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_is_refused_or_harmless(corruptions, tmp_path):
    """Flipped bits, cut off, overwritten, lost and foreign pieces: no file but the whole one is
    loaded, and the message names it."""
    path, one = tmp_path / "mind", older()
    one.save(path)
    whole = path.read_bytes()
    older(seed=4).save(path)
    other, rng = path.read_bytes(), np.random.default_rng(corruptions)
    for _ in range(corruptions):
        content = damaged(whole, other, rng)
        path.write_bytes(content)
        if content in (whole, other):
            continue
        with pytest.raises(StorageError, match=str(path)):
            load(path)
    path.write_bytes(whole)
    assert_same_life(load(path), one)


def test_every_byte_is_covered(tmp_path):
    """Of the line and of the arrays: in each byte a bit is flipped."""
    path = tmp_path / "arrays"
    arrays = {"a": np.arange(40, dtype=np.float32), "b": np.ones(3, np.int8), "c": np.zeros((0, 4))}
    storage.write_arrays(path, {"note": "1e-5", "number": 1e-06}, arrays)
    whole = path.read_bytes()
    record, back = storage.read_arrays(path)
    assert record == {"note": "1e-5", "number": 1e-06}
    assert_identical(back, arrays)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(StorageError, match=str(path)):
            storage.read_arrays(path)


def test_a_mind_of_another_model_is_refused_by_name(tmp_path):
    """Its window, N, rule or dtype; its parameters; its tokenizer."""
    path, one = tmp_path / "mind", older()
    one.save(path)
    for field, value in (
        ("window", 2 * L), ("passes", 2), ("rule", "delta"), ("compute_dtype", "bfloat16"),
        ("eviction", "hard"),
    ):  # fmt: skip
        was = getattr(CONFIG, field)
        with pytest.raises(
            StorageError,
            match=f"{path} is a snapshot with {field}={was!r}, and the config has {value!r}",
        ):
            load(path, config=dataclasses.replace(CONFIG, **{field: value}))
    others = minds.params(CONFIG) | {"final_norm": np.ones(CONFIG.d_model, np.float32)}
    with pytest.raises(
        StorageError, match=r"a snapshot of other parameters: .* was sha256 .* is sha256"
    ):
        Session.load(path, others)
    with pytest.raises(StorageError, match="a snapshot of other parameters"):
        Session.load(path, minds.params(HARD))
    unrolled = dataclasses.replace(CONFIG, unroll=True, init_scale=2.0)  # of the same numbers
    assert load(path, config=unrolled).config == unrolled

    words = write_words(tmp_path / "words.json")
    session(tokenizer=words).save(path)
    assert load(path, tokenizer=words)._tokenizer is not None
    untold = load(path)
    untold.save(path)  # it still knows what it was read with
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        untold.feed("a mind")
    (tmp_path / "others.json").write_text((tmp_path / "words.json").read_text() + "\n")
    with pytest.raises(
        StorageError, match=r"was read with the tokenizer sha256 .* this one is sha256"
    ):
        load(path, tokenizer=str(tmp_path / "others.json"))
    with pytest.raises(ValueError, match="was read with the tokenizer sha256"):
        Session.from_snapshot(
            minds.params(CONFIG), untold.snapshot,
            config=CONFIG, tokenizer=str(tmp_path / "others.json"),
        )  # fmt: skip


def test_the_way_special_tokens_were_read_is_named(tmp_path):
    """Where nothing else differs: the tokenizer is the right file."""
    name = str(tmp_path / "words.json")
    words = tokenizers.Tokenizer.from_file(write_words(name))
    words.add_special_tokens(["<|end|>"])
    words.save(name)
    by_choice = {how: load_tokenizer(name, special_tokens=how) for how in ("text", "control")}
    for was, now in (("text", "control"), ("control", "text")):
        session(tokenizer=by_choice[was]).save(tmp_path / "mind")
        with pytest.raises(StorageError, match=f"{now!r}; load it with special_tokens={was}$"):
            load(tmp_path / "mind", tokenizer=by_choice[now])


def test_a_mind_whose_parts_do_not_belong_together_is_refused(tmp_path):
    """In memory and from a file, before it lives on: it would rewind and fork into another."""
    path, one = tmp_path / "mind", older()  # 4 of 6 tokens in its second window
    snapshot = one.snapshot
    bf16 = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    saved = (
        ({"tokens": ()}, "tokens must be the 4 ids of the state's window; got 0"),
        ({"tokens": (1, 2, 3)}, "the 4 ids of the state's window; got 3"),
        ({"tokens": (1, 2, 3, Y)}, f"token id {Y} at place 3"),
        ({"position": 3}, "position=3 and sleeps=1 are not of one life"),
        ({"position": 2 * L + 5}, f"position={2 * L + 5} and sleeps=1"),
        ({"preceding": (1, 2, 3, 4, 5)}, f"preceding must be at most {CONTEXT} ids, .*; got 5"),
        ({"preceding": (1, Y)}, f"token id {Y} at place 1"),
        ({"sleeps": 0}, f"position={L + 4} and sleeps=0 are not of one life: with 4 tokens"),
    )
    in_memory = (
        ({"state": sleepnet.init_state(CONFIG, 2)}, r"a state of one row; got .* shape \(2,\)"),
        ({"state": sleepnet.init_state(bf16, 1)}, "and dtype float32; got .* and bfloat16"),
        ({"logits_Y": np.zeros(Y + 1)}, r"logits_Y must have shape \(13,\); got \(14,\)"),
        ({"opening_Y": np.zeros((1, Y))}, r"opening_Y must have shape \(13,\); got \(1, 13\)"),
    )
    for changes, complaint in saved + in_memory:
        wrong = dataclasses.replace(snapshot, **changes)
        with pytest.raises(ValueError, match=complaint):
            Session.from_snapshot(minds.params(CONFIG), wrong, config=CONFIG)
    for changes, complaint in saved:
        wrong = dataclasses.replace(snapshot, **changes)
        snapshots.save(path, wrong, config=CONFIG, params=one._params.fingerprint)
        with pytest.raises(StorageError, match=f"{path}: .*{complaint}"):
            load(path)


def test_what_is_no_mind_is_refused_by_name(tmp_path):
    path = tmp_path / "mind"
    with pytest.raises(StorageError, match=f"{path} does not exist"):
        load(path)
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be read: Is a directory"):
        load(tmp_path)
    for content in (b"", b"\n", b"a poem\n", b'{"a": 1}\n', b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=str(path)):
            load(path)
    older().save(path)
    record, arrays = storage.read_arrays(path)
    for changed, complaint in (
        ({"format": 2}, "is of format 2, and this version reads 1"),
        (
            {"config": record["config"] | {"dreams": 3}},
            "a config that this version lacks: .*dreams",
        ),
        ({"policy": {"name": "naps"}}, "its record is not one of this version: .*naps"),
    ):
        storage.write_arrays(path, record | changed, arrays)
        with pytest.raises(StorageError, match=complaint):
            load(path)
    for changed, complaint in (
        ({"tokens": arrays["tokens"][1:]}, r"array tokens must be int32 of shape \(6,\); got"),
        (
            {"logits": arrays["logits"].astype(np.float16)},
            "array logits must be float32 .* float16",
        ),
        ({"dream": arrays["logits"]}, "array dream has no place"),
    ):
        storage.write_arrays(path, record, arrays | changed)
        with pytest.raises(StorageError, match=complaint):
            load(path)
    del arrays["state.window.kept_B"]
    storage.write_arrays(path, record, arrays)
    with pytest.raises(StorageError, match=r"array state\.window\.kept_B is missing"):
        load(path)


def test_on_a_full_disk_the_old_mind_stays_and_the_session_goes_on(tmp_path):
    path, one = tmp_path / "mind", older()
    one.save(path)
    before, whole = one.fork(), path.read_bytes()
    one.feed([1, 2, 3])
    one.state  # noqa: B018  its program is not compiled on a full disk
    with full_disk(), pytest.raises(StorageError, match=f"cannot write {path}: "):
        one.save(path)
    assert path.read_bytes() == whole and [file.name for file in tmp_path.iterdir()] == ["mind"]
    assert_same_life(load(path), before.fork())
    before.feed([1, 2, 3])
    assert_same_life(one, before)
    with pytest.raises(StorageError, match="nowhere"):
        one.save(tmp_path / "nowhere" / "mind")


def test_minds_of_before_ids_were_carried_over_a_sleep_are_read(tmp_path):
    """They lack the ids before their window, and nothing else."""
    path, one = tmp_path / "mind", older()
    one.save(path)
    record, arrays = storage.read_arrays(path)
    assert record.pop("preceding") == list(life(3, [L])[0][-CONTEXT:])
    storage.write_arrays(path, record, arrays)
    assert_same_life(
        load(path),
        Session.from_snapshot(
            minds.params(CONFIG), dataclasses.replace(one.snapshot, preceding=()), config=CONFIG
        ),
    )


def test_a_file_tells_people_what_it_is(tmp_path):
    """Its first line is JSON: position, phase, sleeps, N, rule, dtypes."""
    one = older()
    one.save(str(tmp_path / "mind"))
    line = (tmp_path / "mind").read_bytes().split(b"\n")[0]
    whole = json.loads(line)["record"]
    record = whole["record"]
    assert (record["position"], record["phase"], record["sleeps"]) == (L + 4, 4, 1)
    assert record["policy"] == {"name": "fixed", "passes": 3}
    assert record["config"]["rule"] == "gated_delta" and record["config"]["window"] == L
    assert whole["arrays"]["logits"] == {"dtype": "float32", "shape": [Y]}
    assert sleepnet.Session.load(str(tmp_path / "mind"), minds.params(CONFIG)).position == L + 4
