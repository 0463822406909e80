"""A stream of text never fails, is never late, and is what the tokenizer decodes."""

import functools
import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from sleepnet import tokenizer as module
from sleepnet.tokenizer import CONTEXT, load_tokenizer

CHARACTERS = ["a", " ", "é", "€", "😀", "�", "\x1b"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "a", "▁b", "##c", "d</w>", "é", "▁日", "�", "�</w>", ".", "</s>"]


def byte_level_names() -> list[str]:
    """GPT-2's: printable bytes are themselves, all others follow in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


LLAMA = [
    decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
]  # fmt: skip
STRIPPED = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)])
# Names of the vocabulary, and how they are decoded.
KINDS = {
    "byte level": ([*byte_level_names(), "aÃ", "Ġâ", "ĤŃ", "</s>"], decoders.ByteLevel()),
    "byte fallback": (BYTES + WORDS, decoders.Sequence(LLAMA)),
    "names of bytes": (BYTES + WORDS, decoders.Fuse()),
    "stripped": ([" ", "a", "  ", "b  ", "é", "�"], STRIPPED),
    "stripped one by one": (["]", "a", "]]", "]b]", "é"], decoders.Strip("]", 1, 1)),
    "metaspace": (WORDS, decoders.Metaspace()),
    "word pieces": (WORDS, decoders.WordPiece()),
    "suffixes": (WORDS, decoders.BPEDecoder()),
    "no decoder": (WORDS, None),
    "bytes": (BYTES, None),
}


@functools.cache
def packages(kind) -> tokenizers.Tokenizer:
    """The package's tokenizer."""
    names, decoder = KINDS[kind]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=names[-1]))
    if decoder is not None:
        made.decoder = decoder
    return made


@functools.cache
def ours(kind) -> module.Tokenizer:
    if kind == "bytes":
        return load_tokenizer("bytes")
    return module._FromFile(packages(kind).to_str().encode(), packages(kind), "control")


def decoded(kind, tokens) -> str:
    """The text of all tokens at once."""
    if kind == "bytes":
        return bytes(tokens).decode(errors="replace")
    whole = packages(kind).decode(tokens, skip_special_tokens=False)
    if kind != "byte fallback" or "�" not in whole:
        return whole
    # The package takes valid bytes beside bytes that are not UTF-8 for invalid, too.
    text = ""
    for is_byte, run in itertools.groupby(tokens, lambda token: token < 256):
        if is_byte:
            text += bytes(run).decode(errors="replace")
        else:
            text += "".join(WORDS[token - 256] for token in run).replace("▁", " ")
    return text.removeprefix(" ")


def token_lists(kind):
    """Tokens in any order, among them characters that are whole and others that are cut."""
    size = len(KINDS[kind][0])
    pieces = [st.lists(st.integers(0, size - 1), max_size=2)]
    if size >= 256:
        characters = st.sampled_from([character.encode() for character in CHARACTERS])
        pieces += [characters.map(list), characters.map(lambda content: list(content[:-1]))]
        pieces += [st.lists(st.integers(min(256, size - 1), size - 1), max_size=2)]
    return st.lists(st.one_of(pieces), max_size=8).map(lambda lists: list(itertools.chain(*lists)))


def written(stream, tokens) -> list[str]:
    """All text up to each token, and in the end."""
    return list(itertools.accumulate([*map(stream.add, tokens), stream.end()]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_stream_is_what_the_tokenizer_decodes(kind, data):
    """Up to every token of any sequence, but for one sign where a character may still be completed;
    each byte that is not UTF-8 is a sign, and spoils no character beside it."""
    tokens = data.draw(token_lists(kind))
    texts = written(ours(kind).text_stream(), tokens)
    assert texts[-1] == decoded(kind, tokens)
    for count, text in enumerate(texts[:-1], 1):
        whole = decoded(kind, tokens[:count])
        assert text in (whole, whole.removesuffix("�"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_stream_goes_on_after_any_past(kind, data):
    """The past is not written again, but for a character that it has only begun."""
    tokens = data.draw(token_lists(kind))
    past = data.draw(st.integers(0, len(tokens)))
    before, whole = decoded(kind, tokens[:past]), decoded(kind, tokens)
    if not whole.startswith(before):
        before = before.removesuffix("�")
    assert before + written(ours(kind).text_stream(tokens[:past]), tokens[past:])[-1] == whole


@pytest.mark.parametrize("kind", ["bytes", "byte level", "byte fallback"])
def test_a_token_costs_the_same_after_any_others(kind, monkeypatch):
    """Two decodings of a few tokens, also where no byte of a long stream is UTF-8."""
    lengths, decode = [], type(ours(kind)).decode

    def counted(tokenizer, tokens):
        lengths.append(len(tokens))
        return decode(tokenizer, tokens)

    monkeypatch.setattr(type(ours(kind)), "decode", counted)
    for content in (b"a", b"\x80", b"\xc3\xa9", b"\xf0\x9f\x98"):
        tokens = list(content) * 200
        stream = ours(kind).text_stream(tokens)
        texts = [stream.add(token) for token in tokens]
        assert max(map(len, texts)) <= 1
        assert len(lengths) <= 2 * len(tokens) and max(lengths) <= CONTEXT + 1
        lengths.clear()
