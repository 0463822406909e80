"""Text into token ids and back, and ids into names for people."""

import abc
import codecs
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sleepnet.config import ConfigError

BYTES = "bytes"


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
    def text_stream(self, past: Sequence[int] = ()) -> "TextStream":
        """Writes the tokens that follow on `past`, which is not written itself."""


class TextStream(abc.ABC):
    """Tokens one by one as text; a character of several tokens comes with its last.

    Behind an id that is none of the tokenizer's, such as the end of a document, text starts anew.
    """

    @abc.abstractmethod
    def add(self, token: int) -> str:
        """The text that is certain with this token; often none."""

    @abc.abstractmethod
    def end(self) -> str:
        """What is left: for a character that was cut, a sign that says so."""


class _Bytes(Tokenizer):
    """UTF-8: every text can be written, and nothing is learnt."""

    identity = BYTES
    vocab_size = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def token_name(self, token: int) -> str:
        return chr(token) if 0x21 <= token <= 0x7E else f"<0x{token:02X}>"

    def text_stream(self, past: Sequence[int] = ()) -> TextStream:
        return _primed(_ByteStream(), past)


class _ByteStream(TextStream):
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if token >= _Bytes.vocab_size:
            return self.end()
        return self._decoder.decode(bytes((token,)))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


_BYTES = _Bytes()


class _FromFile(Tokenizer):
    """A JSON file of the `tokenizers` package."""

    def __init__(self, content: bytes, tokenizer: Any):
        self.identity = f"sha256 {hashlib.sha256(content).hexdigest()}"
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a file may ask for either, and neither is for a corpus
        tokenizer.no_padding()
        # Ids may have holes, so that there are fewer of them than the largest tells.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    def token_name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def text_stream(self, past: Sequence[int] = ()) -> TextStream:
        return _primed(_FileStream(self._tokenizer), past)


class _FileStream(TextStream):
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._start()

    def add(self, token: int) -> str:
        if self._tokenizer.id_to_token(token) is None:
            return self.end()
        text = self._stream.step(self._tokenizer, token)
        self._held = [*self._held, token] if text is None else []
        return text or ""

    def end(self) -> str:
        rest = self._tokenizer.decode(self._held, skip_special_tokens=False)
        self._start()
        return rest

    def _start(self):
        from tokenizers.decoders import DecodeStream

        self._stream, self._held = DecodeStream(skip_special_tokens=False), []


def _primed(stream: TextStream, past: Sequence[int]) -> TextStream:
    for token in past:
        stream.add(token)
    return stream


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
