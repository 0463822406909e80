"""Text into token ids and back, and ids into names for people."""

import abc
import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sleepnet.config import ConfigError

BYTES = "bytes"
CONTEXT = 3  # tokens on which the text of the next may depend: of four bytes, the first three

_CUT = "\N{REPLACEMENT CHARACTER}"
_BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")  # of byte fallback


class Tokenizer(abc.ABC):
    """Attributes:
    identity: equal for two tokenizers only if they give the same tokens.
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

    def token_name(self, token: int) -> str:
        return chr(token) if 0x21 <= token <= 0x7E else f"<0x{token:02X}>"

    def has(self, token: int) -> bool:
        return token < self.vocab_size

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


_BYTES = _Bytes()


class _FromFile(Tokenizer):
    """A JSON file of the `tokenizers` package."""

    def __init__(self, content: bytes, tokenizer: Any):
        self.identity = f"sha256 {hashlib.sha256(content).hexdigest()}"
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._bytes = self._decoder is not None and self._decoder.decode(["<0x41>"]) == "A"
        tokenizer.no_truncation()  # a file may ask for either, and neither is for a corpus
        tokenizer.no_padding()
        # Ids may have holes, so that there are fewer of them than the largest tells.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    def token_name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def has(self, token: int) -> bool:
        return self._tokenizer.id_to_token(token) is not None

    def decode(self, tokens: Sequence[int]) -> str:
        names: Iterable[str] = map(self._tokenizer.id_to_token, tokens)
        if self._decoder is None:
            return " ".join(names)
        return self._decoder.decode(list(_without_invalid_bytes(names) if self._bytes else names))


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


def load_tokenizer(name: str, field: str = "tokenizer") -> Tokenizer:
    """Bytes, or a JSON file of the `tokenizers` package.

    Args:
      name: "bytes", or the path of the file.
      field: which setting named it, for errors.

    Raises:
      ConfigError: no such file, a damaged one, or the `tokenizers` package is missing.
    """
    if name == BYTES:
        return _BYTES
    try:
        content = pathlib.Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: {name!r} cannot be read ({error.strerror}); allowed: 'bytes', or the "
            f"path of a JSON file of the tokenizers package"
        ) from None
    return _parse(name, content, field)


@functools.lru_cache(maxsize=4)
def _parse(name: str, content: bytes, field: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"{field}={name!r} needs the tokenizers package: pip install 'sleepnet[text]'"
        ) from None
    try:
        tokenizer = _FromFile(content, tokenizers.Tokenizer.from_buffer(content))
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(
            f"{field}: {name} is damaged, or no JSON file of the tokenizers package: {error}"
        ) from None
    if not tokenizer.vocab_size:
        raise ConfigError(f"{field}: {name} has no tokens")
    return tokenizer
