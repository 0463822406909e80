"""A session lives the life of Algorithm 1 however it is used, and may be forked and rewound."""

import dataclasses
import dis
import functools
import gc
import importlib
import itertools
import pathlib
import signal
import sys
import threading

import jax
import minds
import numpy as np
import pytest
import waiting
from agreement import assert_agree, assert_identical
from minds import CONFIGS, HARD, SLIDING
from reference import Mind, fast_weights

from sleepnet import ConfigError, Decoder, FixedPasses, Sampling, Session, SessionError
from sleepnet import tokenizer as tokenizer_module
from sleepnet.inference import decoder as decoding
from sleepnet.inference.sampling import sample, stack
from sleepnet.tokenizer import CONTEXT, Tokenizer

session_module = importlib.import_module("sleepnet.inference.session")
# Sliding keys, carried tails, learned positions and a coda; few blocks, to compile in seconds.
CONFIG = dataclasses.replace(SLIDING, pattern="[AG]G")
L, Y = CONFIG.window, CONFIG.vocab_size
GREEDY = Sampling(temperature=0)


def session(config=CONFIG, **options) -> Session:
    return Session(minds.params(config), config=config, **options)


def life(seed, lengths):
    """Random tokens of windows of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, Y, length) for length in lengths]


def older(seed=3, config=CONFIG, **options) -> Session:
    """With a window behind it and 4 of 6 tokens in the present one."""
    one = session(config, **options)
    one.feed(np.concatenate(life(seed, [L, 4])))
    return one


def everything(one: Session):
    """All that a session is, for comparison bit by bit."""
    return dataclasses.asdict(one._snapshot())


def log_p(logits_TY):
    logits_TY = logits_TY - logits_TY.max(-1, keepdims=True)
    return logits_TY - np.log(np.exp(logits_TY).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "config",
    [CONFIG, *(pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS.values())],
    ids=["small", *CONFIGS],
)
def test_a_life_is_that_of_algorithm_1(config):
    """Windows that fill, and naps in the midst of others, read and scored in pieces of any size:
    what is expected behind every piece, the score of every token, on a boundary by what was
    expected before the sleep, and in the end every fast weight, against the float64 model."""
    windows = life(1, [L, 3, L, L, 1, 5])
    snapshot = Mind(minds.params(config), config)
    expected_TY = np.concatenate([snapshot.live(tokens, config.passes) for tokens in windows])
    tokens = np.concatenate(windows)
    nll_T = -log_p(expected_TY[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
    one, rng, ends, position = session(config), np.random.default_rng(2), [], 0
    for length in map(len, windows):
        position += length
        ends.append(position)
    for end in ends:
        while one.position < end:
            start = one.position
            stop = min(start + rng.integers(1, L + 1), end)
            if rng.integers(2):
                one.feed(tokens[start:stop])
            else:
                found = one.score(tokens[start:stop])
                assert np.isnan(found[0]) == (start == 0)
                first = max(start, 1)
                assert_agree(found[first - start :], nll_T[first - 1 : stop - 1])
            assert one.position == stop
            assert_agree(one.logits, expected_TY[stop - 1])
        one.sleep()
    assert one.sleeps == len(windows) and one.tokens == ()
    assert_agree(one.state.fast_weights, fast_weights([snapshot]))


def test_a_window_that_is_full_sleeps_when_the_next_token_comes():
    """By itself, with the passes it was told; until then all of it can be rewound."""
    one = session(passes=1)
    one.feed(life(5, [L])[0])
    assert (one.sleeps, len(one.tokens), one.last_sleep) == (0, L, None)
    expected = one.logits
    one.sleep()
    assert one.last_sleep is not None and one.last_sleep.passes == 1
    assert_identical(one.logits, expected)
    one.feed(np.concatenate(life(6, [L, L, 1])))
    assert (one.position, one.sleeps, len(one.tokens)) == (3 * L + 1, 3, 1)
    assert one.sleep(passes=3).passes == 3 and one.sleep() is None


def test_a_stream_draws_what_the_mind_expects():
    """Every token is the draw of its place in life from the logits before it; and what was given
    out has been read, across boundaries too."""
    one = older(sampling=Sampling(temperature=2.0, top_k=9, top_p=0.9, seed=11))
    other = one.fork()
    for token in one.generate(2 * L):
        draw_B = np.array([other.position], np.uint32)
        (drawn,) = sample(other.logits[None], draw_B, stack([one.sampling]))
        assert token == drawn
        other.feed([token])
        assert_identical(everything(one), everything(other))


def test_streams_repeat_with_their_seed_and_may_be_left():
    whole = list(older().generate(3 * L))
    one = older()
    parts = [token for _, token in zip(range(5), one.generate(), strict=False)]  # without an end
    parts += list(one.generate(3 * L - 5))
    assert parts == whole
    assert list(older().fork(seed=1).generate(3 * L)) != whole
    assert list(older().generate(0)) == []
    for_once = list(older().generate(8, sampling=GREEDY))
    assert for_once == list(older(sampling=GREEDY).generate(8)) != whole[:8]


def test_a_stream_stops_before_a_token_that_ends_it():
    """It is not read: the mind still expects it."""
    whole = list(older().generate(10))
    end = whole[4]
    one = older()
    given = list(one.generate(10, stop=[end]))
    assert given == whole[: whole.index(end)]
    assert one.position == L + 4 + len(given)
    assert list(one.generate(10, stop=[end])) == []
    assert next(one.generate()) == end


def test_a_fork_has_the_same_past_and_its_own_future():
    one, alone = older(), older()
    twin = one.fork()
    assert_identical(everything(twin), everything(one))
    twin.feed(life(7, [9])[0])
    twin.sleep()
    assert list(one.generate(L)) == list(alone.generate(L))
    assert_identical(everything(one), everything(alone))
    assert twin._params is one._params and twin._decoder._params is one._decoder._params


@pytest.mark.parametrize("kept", range(5))
def test_rewinding_is_not_having_read(kept):
    """To every point of a window that has 4 tokens, of which 0 is the boundary itself."""
    windows = life(3, [L, 4])  # of `older`
    one, straight = older(), session()
    one.rewind(L + kept)
    straight.feed(np.concatenate([windows[0], windows[1][:kept]]))
    if kept == 0:
        straight.sleep()  # a window that is full would sleep only with the next token
    assert one.tokens == straight.tokens == tuple(windows[1][:kept])
    assert (one.position, one.sleeps) == (straight.position, straight.sleeps)
    assert_agree(one.logits, straight.logits)
    assert_agree(one.state, straight.state)
    assert list(one.generate(L)) == list(straight.generate(L))


def test_only_the_present_window_can_be_rewound():
    one = older()
    before = everything(one)
    for position, near in ((L - 1, L), (L + 5, L + 4)):
        with pytest.raises(
            ValueError,
            match=rf"in {L}\.\.{L + 4} \(from the last .* now\); got {position}; .* {near}$",
        ):
            one.rewind(position)
    for wrong in (6.5, "0", None, True):
        with pytest.raises(ValueError, match=f"position must be an integer in .*; got {wrong!r}"):
            one.rewind(wrong)  # pyright: ignore[reportArgumentType]
    assert_identical(everything(one), before)
    newborn = session()
    newborn.feed([1, 2, 3])
    newborn.rewind(0)
    assert newborn.logits is None and newborn.position == 0


def test_a_mind_has_one_size():
    """Its arrays and what it is saved in, from birth on."""
    one = session()
    empty = dataclasses.replace(one._snapshot(), logits_Y=np.zeros(Y), opening_Y=np.zeros(Y))
    size = one.state_bytes
    for _ in range(3):
        one.feed(life(8, [50])[0])
        snapshot = one._snapshot()
        leaves = jax.tree.leaves((snapshot.state, snapshot.logits_Y, snapshot.opening_Y))
        assert len(leaves) == len(jax.tree.leaves((empty.state, 1, 1)))
        assert sum(leaf.nbytes for leaf in leaves) + 4 * (L + CONTEXT) == one.state_bytes == size


def test_pieces_of_all_sizes_share_few_programs():
    """Here one for one token and one for more; of long windows one for each of four sizes, at least
    a quarter of which is used."""
    one = older()
    one.sleep()
    for size in (1, 2):
        one.feed(np.zeros(size, int))
    before = decoding.read._cache_size(), decoding.step._cache_size()
    for size in range(1, L + 1):
        one.feed(np.zeros(size, int))
    assert (decoding.read._cache_size(), decoding.step._cache_size()) == before
    for window in (24, 512, 5000):
        config = dataclasses.replace(CONFIG, window=window)
        sizes = {
            tokens: decoding.piece_size(config, tokens) for tokens in range(2, min(window, 512) + 1)
        }
        assert set(sizes.values()) <= {8, 32, 128, 512, window} and len(set(sizes.values())) <= 4
        assert all(tokens <= size <= 4 * tokens for tokens, size in sizes.items())


def test_the_host_does_not_wait_for_what_it_reads(monkeypatch):
    """Pieces and tokens follow each other without a look at the device."""
    one, straight = older(), older()
    tokens = life(2, [2])[0]
    straight.feed(tokens)
    with monkeypatch.context() as during:
        for name in ("array", "asarray"):
            during.setattr(np, name, functools.partial(_of_the_host, getattr(np, name)))
        one.feed(tokens)
    assert_identical(everything(one), everything(straight))


def _of_the_host(call, x, *arguments, **options):
    assert not isinstance(x, jax.Array), "the host looks at an array of the device"
    return call(x, *arguments, **options)


def test_sessions_of_the_same_parameters_hold_them_once(no_garbage):
    """Besides the caller's own one copy, in the form that reads a token; it goes with the last."""
    config = dataclasses.replace(CONFIG, vocab_size=Y + 1)
    params = jax.tree.map(jax.numpy.asarray, minds.params(config))

    def held():
        return sum(x.nbytes for x in jax.live_arrays())

    none = held()
    sessions = [Session(params, config=config)]
    one = held()
    sessions += [Session(params, config=config) for _ in range(3)]
    states = one - none - sum(x.nbytes for x in jax.tree.leaves(params))
    assert held() <= one + 3 * states
    sessions.clear()
    assert held() == none


def test_bad_input_is_named_and_changes_nothing():
    one = older()
    before = everything(one)
    for wrong, complaint in (
        ([1, 2, Y], rf"token id {Y} at place 2 .* ids lie in 0\.\.{Y - 1}"),
        (np.array([3, -1]), "token id -1 at place 1"),
        ([1.0], "tokens must be integers; got float64"),
        ([[1]], r"got int64 of shape \(1, 1\)"),
        ("text", "text needs a tokenizer: make the session with tokenizer='bytes'"),
    ):
        for read in (one.feed, one.score):
            with pytest.raises(ValueError, match=complaint):
                read(wrong)
    with pytest.raises(ConfigError, match=r"top_p must be .*; got 2"):
        one.generate(5, sampling=Sampling(top_p=2))
    for call in (
        lambda: one.generate(5, sampling={"temperature": 0}),
        lambda: setattr(one, "sampling", 0.7),
    ):
        with pytest.raises(ValueError, match=r"must be a Sampling, such as .*; got (\{|0\.7)"):
            call()
    with pytest.raises(ValueError, match=rf"each id of stop must be .* 0\.\.{Y - 1}; got {Y}"):
        one.generate(5, stop=[Y])
    with pytest.raises(ValueError, match=r"max_tokens must be .* 0 or more, or None .*; got -1"):
        one.generate(-1)
    with pytest.raises(ConfigError, match="passes must be an integer of 1 or more; got 0"):
        one.sleep(passes=0)
    with pytest.raises(ValueError, match="generate_text needs a tokenizer"):
        one.generate_text()
    with pytest.raises(ValueError, match="the session has read nothing yet"):
        session().generate(1)
    one.feed([])
    assert one.score([]).shape == (0,)
    assert_identical(everything(one), before)


def test_what_does_not_belong_together_is_told_before_anything_compiles():
    with pytest.raises(ConfigError, match=r"passes must be .* got 0"):
        session(passes=0)
    with pytest.raises(ConfigError, match="its 256 tokens are more than vocab_size=13"):
        session(tokenizer="bytes")
    with pytest.raises(ValueError, match="of another config than one of pattern"):
        Session(minds.params(HARD), config=CONFIG)
    narrower = dataclasses.replace(CONFIG, mlp_ratio=2.0)
    with pytest.raises(ValueError, match=r"mlp_gate must have shape \(1, 16, 32\)"):
        Session(minds.params(CONFIG), config=narrower)


def test_two_threads_in_one_session_are_told_apart(monkeypatch):
    """The second is refused while the first is inside; the first, and the session, go on."""
    one, alone = older(), older()
    inside, go_on, read = threading.Event(), threading.Event(), Decoder.wake

    def slow(decoder, tokens_B):
        inside.set()
        assert go_on.wait(waiting.PATIENCE)
        return read(decoder, tokens_B)

    monkeypatch.setattr(Decoder, "wake", slow)
    stream = one.generate(5)
    first = threading.Thread(target=lambda: one.feed([1]), daemon=True)
    first.start()
    assert inside.wait(waiting.PATIENCE)
    for call in (
        lambda: one.feed([2]), lambda: one.score([2]), lambda: next(stream), lambda: one.sleep(),
        lambda: one.fork(), lambda: one.rewind(L), lambda: one.save("nowhere"), lambda: one.state,
    ):  # fmt: skip
        with pytest.raises(SessionError, match=r"another thread .* give each thread a `fork`"):
            call()
    go_on.set()
    waiting.join(first)
    alone.feed([1])
    assert list(stream) == list(alone.generate(5))  # an error does not end a stream


def test_logits_that_are_no_numbers_are_told_and_not_read():
    snapshot = older().snapshot
    snapshot = dataclasses.replace(snapshot, logits_Y=snapshot.logits_Y * np.float32(np.nan))
    one = Session.from_snapshot(minds.params(CONFIG), snapshot, config=CONFIG)
    position = one.position
    with pytest.raises(SessionError, match=f"behind token {position} are not numbers"):
        next(one.generate())
    one.rewind(L + 1)
    assert next(one.generate()) in range(Y)


@functools.cache
def hearing(code) -> set[int]:
    """Before which bytecodes Python looks for signals: behind calls, and where loops and functions
    begin."""
    found, last = set(), ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if last.startswith("CALL") or name in ("RESUME", "JUMP_BACKWARD"):
            found.add(instruction.offset)
        last = name
    return found


def interrupted(deed, chance: int) -> bool:
    """Does it, with Ctrl-C at one of the chances to hear it; whether there was that one."""
    left = itertools.count(chance, -1)

    def ring(frame, event, _):
        code = frame.f_code
        frame.f_trace_opcodes = code.co_filename in (decoding.__file__, session_module.__file__)
        if event == "opcode" and frame.f_lasti in hearing(code) and next(left) == 0:
            raise KeyboardInterrupt
        return ring

    # Python 3.12 traces bytecodes only if a frame has asked for it before tracing begins.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(ring)
    try:
        deed()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


DEEDS = {
    "feed": lambda one: one.feed([7]),
    "sleep": lambda one: one.feed([7, 1, 2]),
    "score": lambda one: one.score([7, 1]),
    "early sleep": lambda one: one.sleep(),
    "rewind": lambda one: one.rewind(L + 2),
    "generate": lambda one: next(one.generate(sampling=GREEDY)),
    "fork": lambda one: one.fork(),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_an_interrupt_costs_nothing(deed):
    """Wherever it is heard in what a session does: that is then one that was never interrupted, as
    far as it came, and lives on like it. Only numbers of a window that was read again may differ,
    by rounding."""
    one = older()
    stages = [one.fork()]
    if deed == "generate":
        stages.append(older())
        list(stages[-1].generate(1, sampling=GREEDY))
    elif deed == "sleep":
        for tokens in ([7, 1], [], [2]):
            stages.append(stages[-1].fork())
            if not tokens:
                stages[-1].sleep()
            stages[-1].feed(tokens)
    else:
        stages.append(one.fork())
        DEEDS[deed](stages[-1])
    known = {(each.position, each.sleeps): each for each in stages}
    reached = set()
    for chance in itertools.count():
        twin = one.fork()
        came = interrupted(functools.partial(DEEDS[deed], twin), chance)
        alike = known[twin.position, twin.sleeps].fork()
        reached.add((twin.position, twin.sleeps))
        assert (twin.tokens, twin.policy) == (alike.tokens, alike.policy)
        assert_agree([twin.state, twin.logits], [alike.state, alike.logits])
        if not came:
            break
        assert list(twin.generate(2)) == list(alike.generate(2))
    assert reached == set(known)


def test_ctrl_c_costs_nothing():
    """As a signal, at any moment of a life; also while a window is read again."""
    whole = list(older().generate(60, sampling=GREEDY))
    rng, old = np.random.default_rng(0), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    one, rings, longest = older(), 0, 4e-3
    try:
        while one.position < L + 4 + len(whole):
            longest *= 1.01  # however slow the machine, some time a token is written in between
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-4, longest)))
                list(one.generate(L + 4 + len(whole) - one.position, sampling=GREEDY))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                rings += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rings
    straight = older()
    straight.feed(whole)
    assert one.tokens == straight.tokens
    assert_agree([one.state, one.logits], [straight.state, straight.logits])


WORDS = ["a", "mind", "that", "sleeps", "folds", "its", "window", "into", "fast", "weights", "."]


def write_words(path):
    """A tokenizer of eleven words; CONFIG has two tokens more."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.save(str(path))
    return str(path)


def test_text_goes_in_and_comes_out(tmp_path):
    """As its ids do; and a token that is no text ends the stream."""
    name = write_words(tmp_path / "words.json")
    one, other = session(tokenizer=name), session()
    one.feed("a mind that sleeps")
    other.feed([0, 1, 2, 3])
    assert_agree(one.score("folds its window"), other.score([4, 5, 6]))
    assert one.tokens == other.tokens == (6,)
    for seed in range(5):
        hot = Sampling(temperature=4.0, seed=seed)
        ids = list(other.fork().generate(100, sampling=hot, stop=[11, 12]))
        written = "".join(one.fork().generate_text(100, sampling=hot))
        assert written == "".join(f" {WORDS[token]}" for token in ids)  # behind the word before
        assert len(ids) < 100
    assert ids


# All bytes and a token more.
OF_BYTES = dataclasses.replace(CONFIG, vocab_size=257)


def draw_next(monkeypatch, content: bytes, start: int):
    """Have sessions draw the bytes in their order, the first at position `start`."""

    def draw(logits_BY, draw_B, samplers):
        return np.array([content[draw_B[0] - start]])

    monkeypatch.setattr(session_module, "sample", draw)


def byte_fallback() -> Tokenizer:
    """As of Llama: a token for each byte, besides words."""
    import tokenizers
    from tokenizers import decoders, models

    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "word"]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="word"))
    made.decoder = decoders.ByteFallback()
    return tokenizer_module._FromFile(made.to_str().encode(), made, "control")


@pytest.mark.parametrize("tokenizer", ["bytes", byte_fallback()], ids=["bytes", "byte fallback"])
def test_bytes_that_are_not_utf_8_do_not_end_a_stream(tokenizer, monkeypatch):
    """Each is shown as U+FFFD, in one window and across sleeps."""
    content = b"\xc3\xa9\xc3a" + b"\x80" * L + b"\xf0\x9f\xc3\xa9 \xff\xe6\x97"
    one = session(OF_BYTES, tokenizer=tokenizer)
    one.feed([ord("a")])
    draw_next(monkeypatch, content, 1)
    assert "".join(one.generate_text(len(content))) == content.decode(errors="replace")


def saved_and_loaded(one: Session, path: pathlib.Path) -> Session:
    one.save(path / "mind")
    return Session.load(path / "mind", one._params.tree, tokenizer=one._tokenizer)


@pytest.mark.parametrize("goes_on", [lambda one, _: one, saved_and_loaded], ids=["itself", "saved"])
@pytest.mark.parametrize("before", range(1, 4))
def test_a_character_survives_a_sleep(before, goes_on, monkeypatch, tmp_path):
    """And a stream's end and a save, all after any of its bytes: what follows has it whole."""
    text = "aé日😀b"
    content = text.encode()
    one = session(OF_BYTES, tokenizer="bytes")
    one.feed([ord("a")] * before)
    draw_next(monkeypatch, content, before)
    pieces = []
    for _ in content:
        pieces.append("".join(one.generate_text(1)))
        one = goes_on(one, tmp_path)
        if one.position == before + len("aé日".encode()) + 2:
            one.sleep()
            one = goes_on(one, tmp_path)
    assert one.sleeps > 1
    assert "".join(pieces) == "a�é�日�😀b"  # a stream that ends within a character shows it


def test_text_goes_on_behind_an_id_that_has_none():
    """Such as the end of a document, which belongs to the model alone."""
    one = session(OF_BYTES, tokenizer="bytes")
    one.feed([ord("a"), 256])
    other = one.fork()
    ids = list(other.generate(20, sampling=GREEDY, stop=[256]))
    written = "".join(one.generate_text(20, sampling=GREEDY))
    assert ids and written == bytes(ids).decode(errors="replace")


def test_a_number_of_passes_is_a_policy():
    assert session(passes=np.int64(3)).policy == FixedPasses(3) == session().policy


@pytest.mark.slow
def test_a_million_tokens_leave_nothing_behind():
    """From a thousand tokens of life to a million: the same bytes of state, the same bytes held by
    all arrays of the process, and a process that does not grow once it has warmed up."""
    config = dataclasses.replace(minds.TINY, window=512)
    one, rng = session(config), np.random.default_rng(0)

    def held():
        gc.collect()  # also what earlier tests have left
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return sum(x.nbytes for x in jax.live_arrays()), one.state_bytes, pages * 4096 / 2**20

    one.feed(rng.integers(0, Y, 1_000))
    list(one.generate(10))
    found = {one.position: held()}
    for position in (10_000, 200_000, 1_000_000):
        while one.position < position:
            one.feed(rng.integers(0, Y, min(10_000, position - one.position)))
        found[one.position] = held()
    arrays, states, resident_mib = zip(*found.values(), strict=True)
    assert len(set(states)) == len(set(arrays)) == 1, found
    assert resident_mib[-1] - resident_mib[-2] < 16, found


def test_a_mind_goes_on_where_its_parameters_lie():
    """Wherever it has lived before, such as on the device of an engine."""
    snapshot, here, there = older().snapshot, *jax.devices()[:2]
    snapshot = dataclasses.replace(snapshot, state=jax.device_put(snapshot.state, there))
    params = jax.device_put(minds.params(CONFIG), here)
    moved = Session.from_snapshot(params, snapshot, config=CONFIG)
    assert {device for x in jax.tree.leaves(moved.state) for device in x.devices()} == {here}
    assert_identical(everything(moved), everything(older()))
