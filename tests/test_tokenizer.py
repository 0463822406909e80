"""Ids are written as the text that they are, piece by piece and no character in halves; and what
becomes of text that is not, or of special tokens in it."""

import os

import numpy as np
import pytest
import tokenizers
from corpora import documents, write_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sleepnet.config import ConfigError
from sleepnet.tokenizer import load_tokenizer

TEXT = " naïve 夢 dreams,\n" + documents(2, [30])[0]


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request, tmp_path):
    named = request.param == "bytes"
    return load_tokenizer("bytes" if named else write_tokenizer(tmp_path / "tokenizer.json"))


def test_a_stream_is_the_text(tokenizer):
    (ids,) = tokenizer.encode([TEXT])
    stream = tokenizer.text_stream()
    pieces = [stream.add(int(token)) for token in ids]
    assert "".join(pieces) + stream.end() == TEXT
    assert "�" not in "".join(pieces) and "" in pieces  # a character comes with its last token


def test_a_stream_goes_on_behind_its_past(tokenizer):
    """Which it does not write; even where the past ends within a character."""
    (ids,) = tokenizer.encode([TEXT])
    within = 4  # of " naïve", by bytes behind the first half of "ï"
    stream = tokenizer.text_stream(ids[:within].tolist())
    written = "".join(stream.add(int(token)) for token in ids[within:])
    assert written and TEXT.endswith(written)


def test_a_character_that_is_cut_is_shown(tokenizer):
    """At the end, as Python shows what is no UTF-8."""
    (ids,) = tokenizer.encode([" a 夢"])
    stream = tokenizer.text_stream()
    pieces = [stream.add(int(token)) for token in ids[:-1]]
    assert "".join(pieces) == " a " and stream.end() == "�"
    assert stream.end() == ""


def test_text_starts_anew_behind_an_id_that_has_none(tokenizer):
    """In what is written and in the past; a character that it cuts is shown."""
    (ids,) = (each.tolist() for each in tokenizer.encode([" a 夢"]))
    stream = tokenizer.text_stream([*ids[:-1], tokenizer.vocab_size])
    tokens = [*ids[:-1], tokenizer.vocab_size + 1, *ids]
    assert "".join(map(stream.add, tokens)) + stream.end() == " a � a 夢"


def saved(path, model, **parts):
    """A tokenizer of these parts, as sleepnet reads it from its file."""
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path / "made.json"))
    return load_tokenizer(str(path / "made.json"))


def lost(tokenizer, *texts):
    return tokenizer.lost_bytes(texts, tokenizer.encode(texts))


def characters(known, **options):
    """A model whose tokens are these characters."""
    return models.BPE(vocab={c: i for i, c in enumerate(known)}, merges=[], **options)


def words(*known):
    return {word: i for i, word in enumerate(("[UNK]", *known))}


def metaspace(**options):
    pieces = [(piece, 0.0) for piece in ("<unk>", "▁", "a", "b", "▁a")]
    return (
        models.Unigram(pieces, unk_id=0),
        {"pre_tokenizer": pre_tokenizers.Metaspace(**options),
         "decoder": decoders.Metaspace(**options)},
    )  # fmt: skip


def word_piece():
    return (
        models.WordPiece(vocab=words("hello", "##s", ",", "world"), unk_token="[UNK]"),
        {"normalizer": normalizers.BertNormalizer(lowercase=True),
         "pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": decoders.WordPiece()},
    )  # fmt: skip


SPLIT = {"pre_tokenizer": pre_tokenizers.Whitespace()}
COMMAS = SPLIT | {"decoder": decoders.WordPiece()}
# What is lost of a text, counted by hand: a dropped or unknown character whole, one that was
# changed as it stood before; one byte if the tokens are those of another text that lacks none.
LOSSES = {
    "dropped": (characters("ab"), {}, "aé" * 1000, 2000),
    "dropped beside spaces": (characters("ab "), {}, "aé b", 2),
    "nothing dropped": (characters("ab "), {}, "ab ba", 0),
    "all dropped": (characters("ab"), {}, "日本", 6),
    "unknown": (characters("ab?", unk_token="?"), {}, "aéb日", 5),
    "unknown word": (models.WordLevel(words("a"), unk_token="[UNK]"), SPLIT, "a été a", 5),
    "line ends": (models.WordLevel(words("a"), unk_token="[UNK]"), SPLIT, "a\na a", 1),
    "unknown piece": (*metaspace(), "ab é", 2),
    "pieces": (*metaspace(), "ab a", 0),
    "pieces after a space": (*metaspace(), " ab  a", 0),
    "small letters": (*word_piece(), "Hellos, World", 2),
    "pieces of words": (*word_piece(), "hellos, world", 0),
    "composed": (characters("éa"), {"normalizer": normalizers.NFC()}, "ae\u0301", 3),
    "space added": (models.WordPiece(words("a", ",", "b")), COMMAS, "a,b", 1),
    "space kept": (models.WordPiece(words("a", ",", "b")), COMMAS, "a, b", 0),
    "moved": (characters("ab"), {"normalizer": normalizers.Replace("ba", "ab")}, "ba", 1),
    "not moved": (characters("ab"), {"normalizer": normalizers.Replace("ba", "ab")}, "ab", 0),
    "already composed": (characters("éa"), {"normalizer": normalizers.NFC()}, "aé", 0),
}


@pytest.mark.parametrize(("model", "parts", "text", "expected"), LOSSES.values(), ids=LOSSES)
def test_what_tokens_do_not_determine_is_counted(tmp_path, model, parts, text, expected):
    tokenizer = saved(tmp_path, model, **parts)
    assert lost(tokenizer, text, "", text) == [expected, 0, expected]


@pytest.mark.parametrize("decoder", [None, decoders.ByteLevel()])
@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_of_bytes_lose_nothing(tmp_path, decoder, prefix):
    """Whether or not the file can decode them, and whatever stands before the first."""
    alphabet = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    split = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    parts = {"pre_tokenizer": split} | ({"decoder": decoder} if decoder else {})
    tokenizer = saved(tmp_path, models.BPE(vocab=alphabet, merges=[]), **parts)
    assert lost(tokenizer, TEXT, " a\n\tb \0", "夢") == [0, 0, 0]


def test_bytes_lose_nothing():
    assert lost(load_tokenizer("bytes"), TEXT, "\0") == [0, 0]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 1), (1, 3), (0, 9)])
def test_a_decoder_may_strip_all_of_a_text(tmp_path, start, stop):
    """Also of no tokens, as at the start of a stream and of an empty document."""
    strip = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", start, stop)])
    tokenizer = saved(tmp_path, characters("a "), decoder=strip)
    for text in ("", " ", "  ", "    ", " a ", "  a    ", "a", " a a "):
        (ids,) = tokenizer.encode([text])
        left = text[:start].lstrip(" ") + text[start:]
        kept = left[:-stop] + left[-stop:].rstrip(" ")
        assert tokenizer.decode(ids.tolist()) == kept
        assert lost(tokenizer, text) == [0]  # the tokens have what is stripped


@pytest.fixture
def special(tmp_path):
    """A file with a special token, and an added one behind it that is none."""
    path = write_tokenizer(tmp_path / "tokenizer.json", special=["<|end|>"])
    known = tokenizers.Tokenizer.from_file(path)
    known.add_tokens(["<plain>"])
    known.save(path)
    return path


WRITTEN = " dreams<|end|><plain> of"


def test_a_special_token_that_stands_written_is_text(special, tmp_path):
    """Unless it is asked for; and no text is written otherwise for it."""
    end = tokenizers.Tokenizer.from_file(special).token_to_id("<|end|>")
    text, control = (load_tokenizer(special, special_tokens=how) for how in ("text", "control"))
    assert load_tokenizer(special) is text
    for tokenizer, count in ((text, 0), (control, 1)):
        ids, again = (each.tolist() for each in tokenizer.encode([WRITTEN, "<|end|>"]))
        assert ids.count(end) == again.count(end) == count
        assert end + 1 in ids
        stream = tokenizer.text_stream()
        assert "".join(map(stream.add, ids)) + stream.end() == WRITTEN
        assert lost(tokenizer, WRITTEN) == [0]
    without = load_tokenizer(write_tokenizer(tmp_path / "without.json"))
    for one, two in zip(*(t.encode(["dreams<|end|> of"]) for t in (text, without)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_how_special_tokens_are_read_belongs_to_the_identity(special, tmp_path):
    """Only where it changes ids: a mind or a file of tokens is then of another tokenizer."""
    by_choice = {how: load_tokenizer(special, special_tokens=how) for how in ("text", "control")}
    assert by_choice["text"].identity == f"{by_choice['control'].identity}, special tokens as text"
    for name in ("bytes", write_tokenizer(tmp_path / "without.json")):
        one, two = (load_tokenizer(name, special_tokens=how) for how in ("text", "control"))
        assert one.identity == two.identity
    with pytest.raises(ConfigError, match=r"got 'none'; allowed: text, control; the nearest is"):
        load_tokenizer("bytes", special_tokens="none")


def test_a_text_has_the_same_tokens_at_every_start(tmp_path):
    """Even if the file asks for other merges at each, as is done in training a model on words."""
    model = models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5)
    (ids,) = saved(tmp_path, model).encode(["ab" * 100])
    np.testing.assert_array_equal(ids, [2] * 100)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_tokenizer_that_is_no_regular_file_is_named(tmp_path, make):
    make(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json' cannot be read \(it is a "):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_may_lie_in_the_home_and_not_behind_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_tokenizer(tmp_path / "tokenizer.json")
    assert load_tokenizer("~/tokenizer.json") is load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"^tokenizer='gs://b/x\.json': a URL is not a path"):
        load_tokenizer("gs://b/x.json")
