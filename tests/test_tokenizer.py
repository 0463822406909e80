"""Ids are written as the text that they are, piece by piece and no character in halves."""

import pytest
from corpora import documents, write_tokenizer

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
