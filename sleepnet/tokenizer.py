"""Text into token ids and back, and ids into names for people."""

import abc
import collections
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sleepnet.config import ConfigError
from sleepnet.config.checks import choices, local_path
from sleepnet.input_files import regular_status

BYTES = "bytes"
SPECIAL_TOKENS = ("text", "control")
_AS_TEXT = ", special tokens as text"  # ends the identity
CONTEXT = 3  # tokens on which the text of the next may depend: of four bytes, the first three

_CUT = "\N{REPLACEMENT CHARACTER}"
_BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")  # of byte fallback


class Tokenizer(abc.ABC):
    """Attributes:
    identity: equal for two tokenizers only if they give the same tokens. It holds no ": ".
    vocab_size: every id lies below it.
    """

    identity: str
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest that takes every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, with nothing added before or after."""

    @abc.abstractmethod
    def lost_bytes(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> list[int]:
        """Count the bytes of each text, in UTF-8, that its tokens do not determine.

        Bits per byte are only comparable where nothing is lost: a model of the tokens need not
        predict the rest.

        Args:
          texts: the texts.
          encoded: what `encode` returned for them.
        """

    @abc.abstractmethod
    def token_name(self, token: int) -> str:
        """How to show a token to people; no two have the same name."""

    @abc.abstractmethod
    def has(self, token: int) -> bool:
        """Whether the id is one of the tokenizer's."""

    @abc.abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Decode ids that it has; bytes that are not UTF-8 become U+FFFD, each by itself."""

    def text_stream(self, past: Sequence[int] = ()) -> "TextStream":
        """Write the tokens that follow on `past`, which is not written itself.

        Only the last `CONTEXT` tokens of the past matter.
        """
        return TextStream(self, past)


class TextStream:
    """Tokens one by one as text; a character of several tokens comes with its last.

    Bytes that are not UTF-8 come as U+FFFD, at the latest with the token after them. Each token
    costs the same, however many came before. After an id that is none of the tokenizer's, such as
    the end of a document, text starts anew.

    A token is written as what it adds to the text of the `CONTEXT` tokens before it. These hold the
    beginning of a character that it may complete, and they tell it from the first token of a text,
    which many decoders treat differently.
    """

    def __init__(self, tokenizer: Tokenizer, past: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._recent: list[int] = []
        self._held = False  # whether their text ends in a sign that is not written
        for token in past[-CONTEXT:]:
            self._recent = [*self._recent, token] if tokenizer.has(token) else []

    def add(self, token: int) -> str:
        """The text that is certain with this token; often none."""
        if not self._tokenizer.has(token):
            return self.end()
        written = self._tokenizer.decode(self._recent)
        self._recent.append(token)
        text = self._tokenizer.decode(self._recent)
        if self._held or not text.startswith(written):
            written = written.removesuffix(_CUT)  # now the sign is certain, or a character
        certain = text.removesuffix(_CUT)
        self._held = text != certain and len(text) > len(written)
        del self._recent[:-CONTEXT]
        return certain[len(written) :]

    def end(self) -> str:
        """What is left: for a character that was cut, a sign that says so."""
        rest = _CUT if self._held else ""
        self._recent, self._held = [], False
        return rest


class _Bytes(Tokenizer):
    """UTF-8: every text can be written, and nothing is learnt."""

    identity = BYTES
    vocab_size = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def lost_bytes(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> list[int]:
        return [0] * len(texts)

    def token_name(self, token: int) -> str:
        return chr(token) if 0x21 <= token <= 0x7E else f"<0x{token:02X}>"

    def has(self, token: int) -> bool:
        return token < self.vocab_size

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


_BYTES = _Bytes()


class _FromFile(Tokenizer):
    """A JSON file of the `tokenizers` package."""

    def __init__(self, content: bytes, tokenizer: Any, special_tokens: str):
        self.identity = f"sha256 {hashlib.sha256(content).hexdigest()}"
        if tokenizer.decoder is not None:
            tokenizer.decoder = _without_panics(tokenizer.decoder)
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._bytes = self._decoder is not None and self._decoder.decode(["<0x41>"]) == "A"
        tokenizer.no_truncation()  # a file may ask for these, and none is for a corpus
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # draws other tokens at every start
            tokenizer.model.dropout = None
        self._unknown = _unknown_token(content, tokenizer)
        has_special = any(t.special for t in tokenizer.get_added_tokens_decoder().values())
        if special_tokens == "text" and has_special:
            tokenizer.encode_special_tokens = True  # "encode" here means: like any other text
            self.identity += _AS_TEXT
        # Ids may have holes, so that there are fewer of them than the largest tells.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    def lost_bytes(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> list[int]:
        """See `Tokenizer.lost_bytes`.

        Decoders are often no exact inverse, so that they give other text is not enough to speak of
        loss. Two things are: another text with the same tokens, where the characters that it lacks
        are lost, and at least one byte even if it lacks none; and characters within no token, or
        within the token of unknown text. Tokens are written in two ways, always in the same order,
        so that texts with the same tokens are compared with the same text.
        """
        ids = [each.tolist() for each in encoded]
        lost: dict[int, int] = {}
        writers = (self._decode, self._join)
        for write in writers if self._decoder is not None else reversed(writers):
            left = [i for i in range(len(ids)) if i not in lost and self._unknown not in ids[i]]
            others = dict(zip(left, write([ids[i] for i in left]), strict=True))
            lost |= {i: 0 for i, other in others.items() if _body(other) == _body(texts[i])}
            differ = [i for i in left if i not in lost]
            again = self.encode([others[i] for i in differ])
            lost |= {
                i: max(1, _missing_bytes(texts[i], others[i]))  # others only add or move characters
                for i, other_ids in zip(differ, again, strict=True)
                if np.array_equal(other_ids, encoded[i])
            }
        return [
            lost[i] if i in lost else self._uncovered_bytes(text) for i, text in enumerate(texts)
        ]

    def _decode(self, ids: Sequence[list[int]]) -> list[str]:
        return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def _join(self, ids: Sequence[list[int]]) -> list[str]:
        """Write tokens one after another, as is right for some files without a decoder."""
        return ["".join(map(self._tokenizer.id_to_token, each)) for each in ids]

    def _uncovered_bytes(self, text: str) -> int:
        """Count bytes outside all known tokens; but white space, which offsets often leave out."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        covered = np.zeros(len(text), bool)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            covered[start:stop] |= token != self._unknown
        left = (text[i] for i in np.flatnonzero(~covered))
        return sum(len(character.encode()) for character in left if not character.isspace())

    def token_name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def has(self, token: int) -> bool:
        return self._tokenizer.id_to_token(token) is not None

    def decode(self, tokens: Sequence[int]) -> str:
        names: Iterable[str] = map(self._tokenizer.id_to_token, tokens)
        if self._decoder is None:
            return " ".join(names)
        return self._decoder.decode(list(_without_invalid_bytes(names) if self._bytes else names))


def special_tokens_of(identity: str, other: str) -> tuple[str, str] | None:
    """Return the `special_tokens` of two identities that differ in nothing else; None: they do."""
    if identity == other or identity.removesuffix(_AS_TEXT) != other.removesuffix(_AS_TEXT):
        return None
    return ("text", "control") if identity.endswith(_AS_TEXT) else ("control", "text")


def _unknown_token(content: bytes, tokenizer: Any) -> int | None:
    """The id that stands for any text outside the vocabulary, if there is one."""
    model = json.loads(content)["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)


def _without_panics(decoder: Any) -> Any:
    """Return the decoder with patterns in place of `Strip` where it strips the end of a token.

    The package's panics if all of the token goes, or if there is none.
    """

    def mended(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "Sequence":
            return part | {"decoders": [mended(each) for each in part["decoders"]]}
        if part["type"] != "Strip" or not part["stop"]:
            return part
        character = rf"\x{{{ord(part['content']):x}}}"
        start = rf"\A{character}{{1,{part['start']}}}|" if part["start"] else ""
        pattern = rf"{start}{character}{{1,{part['stop']}}}\z"
        return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}

    state = json.dumps(mended(json.loads(decoder.__getstate__())), allow_nan=False)
    decoder.__setstate__(state.encode())
    return decoder


def _body(text: str) -> str:
    """A text but for one space at its start, where many tokenizers put one if there is none."""
    return text.removeprefix(" ")


def _missing_bytes(text: str, other: str) -> int:
    """Count the bytes of the characters of a text that another has less often."""
    missing = collections.Counter(_body(text)) - collections.Counter(_body(other))
    return sum(len(character.encode()) * count for character, count in missing.items())


def _without_invalid_bytes(names: Iterable[str]) -> Iterator[str]:
    """Put U+FFFD in place of bytes that are not UTF-8: one would spoil all bytes beside it."""
    for is_byte, run in itertools.groupby(names, lambda name: bool(_BYTE_NAME.fullmatch(name))):
        if not is_byte:
            yield from run
            continue
        content = bytes(int(name[3:5], 16) for name in run)
        for character in content.decode(errors="replace"):
            if character == _CUT:
                yield character
            else:
                yield from (f"<0x{byte:02X}>" for byte in character.encode())


def load_tokenizer(name: str, field: str = "tokenizer", special_tokens: str = "text") -> Tokenizer:
    """Bytes, or a JSON file of the `tokenizers` package.

    Args:
      name: "bytes", or the path of the file; it may begin with ~.
      field: which setting named it, for errors.
      special_tokens: what becomes of a special token that is written out in text, such as
        "<|endoftext|>": "text", the tokens of its characters; or "control", the special token. Text
        from others should not be able to write control tokens.

    Raises:
      ConfigError: no such file, a URL, a damaged file, or the `tokenizers` package is missing.
    """
    if special_tokens not in SPECIAL_TOKENS:
        raise ConfigError(choices("special_tokens", special_tokens, SPECIAL_TOKENS))
    if name == BYTES:
        return _BYTES
    try:
        name = local_path(str(name))
    except ConfigError as error:
        raise ConfigError(f"{field}={name!r}: {error}") from None
    try:
        regular_status(name)
        content = pathlib.Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: {name!r} cannot be read ({error.strerror}); allowed: 'bytes', or the "
            f"path of a JSON file of the tokenizers package"
        ) from None
    return _parse(name, content, field, special_tokens)


@functools.lru_cache(maxsize=4)
def _parse(name: str, content: bytes, field: str, special_tokens: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"{field}={name!r} needs the tokenizers package: pip install 'sleepnet[text]'"
        ) from None
    try:
        parsed = tokenizers.Tokenizer.from_buffer(content)
        tokenizer = _FromFile(content, parsed, special_tokens)
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(
            f"{field}: {name} is damaged, or no JSON file of the tokenizers package: {error}"
        ) from None
    if not tokenizer.vocab_size:
        raise ConfigError(f"{field}: {name} has no tokens")
    return tokenizer
