"""Session: one stream of tokens. It reads, scores and writes, and sleeps when its window is full.

A window that is full sleeps when the next token comes, not before: so the last window can still be
rewound, and what follows on a boundary is predicted by logits of before the sleep, as in training.

All that a session holds has the same size after any number of tokens.
"""

import copy
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import cache
from sleepnet.cycle.policies import Policy, Spent, policy_of, sleep_by
from sleepnet.cycle.wake import as_ids
from sleepnet.inference import snapshot as snapshots
from sleepnet.inference.decoder import Decoder, longest_piece
from sleepnet.inference.sampling import Sampling, as_sampling, sample, stack, stop_ids
from sleepnet.inference.snapshot import Snapshot
from sleepnet.integers import as_integer
from sleepnet.nn.fsdp import devices_of
from sleepnet.nn.model import check_params, nll
from sleepnet.tokenizer import CONTEXT, Tokenizer, load_tokenizer
from sleepnet.types import Array, WakeState

P = ParamSpec("P")
R = TypeVar("R")


class SessionError(RuntimeError):
    """A session that cannot do what was asked just now; it is as before."""


def _alone(
    method: Callable[Concatenate["Session", P], R],
) -> Callable[Concatenate["Session", P], R]:
    """Refuses a call that meets another of the same session.

    Python hears Ctrl-C where a call begins or ends. So that a session is always given back, it is
    taken by one call within `try`, and given back by one call that no other precedes.
    """

    @functools.wraps(method)
    def alone(session: "Session", *args: P.args, **kwargs: P.kwargs) -> R:
        me = object()
        try:
            if session._inside.setdefault("call", me) is not me:
                raise SessionError(
                    "another thread is in a call of this session: take turns, or give each thread "
                    "a `fork`"
                )
            result = method(session, *args, **kwargs)
        finally:
            if session._inside == {"call": me}:
                session._inside.clear()
        return result

    return alone


class Session:
    """One stream of tokens, from a fresh state or from a file.

    Tokens are ids below `config.vocab_size`, or text where there is a tokenizer. The same calls
    give the same bits; the same tokens in other calls agree to float32 rounding. One thread at a
    time: a call that meets another raises SessionError. After any error or interrupt the session is
    as it was before the token or the sleep that failed; `position` tells what it has read.

    Attributes:
      config: static.
      sampling: how it draws; may be set anew. The draw behind n tokens of life takes its randomness
        from the seed and n.
    """

    def __init__(
        self,
        params,
        *,
        config: ModelConfig,
        passes: int | Policy | None = None,
        sampling: Sampling | None = None,
        tokenizer: str | Tokenizer | None = None,
    ):
        """Start from a fresh state.

        Args:
          params: from `init_params` or a trained run; must not change while sessions use them.
          passes: N of each sleep, or a policy; `config.passes` by default.
          sampling: by default the model's distribution, with seed 0.
          tokenizer: "bytes", or the path of a JSON file of the `tokenizers` package; or one from
            `load_tokenizer`, which also takes how special tokens are read.

        Raises:
          ConfigError: passes or a tokenizer that cannot be.
          ValueError: parameters of another config.
        """
        policy = policy_of(config.passes if passes is None else passes)
        check_params(params, config)
        self._params, self._tokenizer = _Params(params), _tokenizer_for(config, tokenizer)
        self._live_on(
            Snapshot(
                state=cache.init_state(config, 1), policy=policy, sampling=sampling or Sampling()
            ),
            config,
        )

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        params,
        *,
        config: ModelConfig | None = None,
        tokenizer: str | Tokenizer | None = None,
    ) -> "Session":
        """Load a saved session, which goes on as if it had never stopped, bit for bit.

        Args:
          path: from `save`.
          params: those that it was saved with.
          config: by default the one it was saved with; may differ in what only changes rounding.
          tokenizer: without one the session goes on with ids alone.

        Raises:
          StorageError: no such file, damage, or another model, config or tokenizer.
        """
        known = None if tokenizer is None else _as_tokenizer(tokenizer)
        shared = _Params(params)
        snapshot, config = snapshots.load(
            pathlib.Path(path), config=config, params=shared.fingerprint,
            tokenizer=known.identity if known else None,
        )  # fmt: skip
        return cls._of(shared, snapshot, config, known)

    @classmethod
    def from_snapshot(
        cls,
        params,
        snapshot: Snapshot,
        *,
        config: ModelConfig,
        tokenizer: str | Tokenizer | None = None,
    ) -> "Session":
        """Go on from a snapshot in memory, such as an `Engine` returns.

        Args:
          params, config: those with which it has lived.
          tokenizer: as for a new session.

        Raises:
          ConfigError: a tokenizer that cannot be.
          ValueError: a snapshot or parameters of another config, one whose parts are not of one
            moment, or a tokenizer with which it was not read.
        """
        check_params(params, config)
        known = None if tokenizer is None else _as_tokenizer(tokenizer)
        snapshot.check(config, tokenizer=known.identity if known else None)
        return cls._of(_Params(params), _beside(params, snapshot), config, known)

    @classmethod
    def _of(
        cls, params: "_Params", snapshot: Snapshot, config: ModelConfig, tokenizer
    ) -> "Session":
        session = cls.__new__(cls)
        session._params, session._tokenizer = params, _tokenizer_for(config, tokenizer)
        session._live_on(snapshot, config)
        return session

    @_alone
    def save(self, path: str | pathlib.Path):
        """Writes one file, atomically, that any process can `load`.

        Raises:
          StorageError: it cannot be written; what was there stays whole, and the session goes on.
        """
        snapshots.save(
            pathlib.Path(path), self._snapshot(),
            config=self.config, params=self._params.fingerprint,
        )  # fmt: skip

    @property
    @_alone
    def snapshot(self) -> Snapshot:
        """All that it is now, except the parameters: for `from_snapshot` or `Engine.submit`."""
        return self._snapshot()

    @_alone
    def fork(self, *, seed: int | None = None) -> "Session":
        """Return a second session with the same past and its own future. Parameters are shared.

        Args:
          seed: of its draws; by default it draws the same.
        """
        twin = copy.copy(self)
        twin._life = self._life._replace(decoder=self._decoder.fork(), last_sleep=None)
        twin._inside = {}
        if seed is not None:
            twin.sampling = dataclasses.replace(self.sampling, seed=seed)
        return twin

    @property
    def policy(self) -> Policy:
        """How long it sleeps; may be set anew, to a number too."""
        return self._policy

    @policy.setter
    def policy(self, passes: int | Policy):
        self._policy = policy_of(passes)

    @property
    def position(self) -> int:
        """Tokens read in its life."""
        return self._life.position

    @property
    def sleeps(self) -> int:
        """In its life."""
        return self._life.sleeps

    @property
    def last_sleep(self) -> Spent | None:
        """What it spent; None before the first of this object."""
        return self._life.last_sleep

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling):
        self._sampling = as_sampling(sampling)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of its window: what it has read since its last sleep."""
        return self._life.tokens

    @property
    def logits(self) -> Array | None:
        """float32 logits_Y of the next token; None before the first."""
        logits_BY = self._decoder.logits_BY
        return None if logits_BY is None else logits_BY[0]

    @property
    @_alone
    def state(self) -> WakeState:
        """A copy of fast weights and window cache, of one row, as `sleepnet.wake` takes them."""
        return self._decoder.state

    @property
    def state_bytes(self) -> int:
        """Of all that it remembers: fast weights, window cache, ids and two rows of logits."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: cache.init_state(self.config, 1)))
        arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return arrays + 4 * (self.config.window + CONTEXT) + 2 * 4 * self.config.vocab_size

    @_alone
    def feed(self, tokens: str | Sequence[int] | np.ndarray):
        """Reads any number of tokens, with a sleep at each boundary.

        Raises:
          ValueError: an id outside the vocabulary, or text without a tokenizer; nothing is read.
        """
        ids = self._ids(tokens)
        self._feed(ids)

    @_alone
    def score(self, tokens: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """Reads tokens as `feed` does, and tells how unexpected each was.

        Returns:
          float32 -log p of each token, in nats, given all before it; nan for the first of a life,
          which nothing predicts.

        Raises:
          ValueError: as `feed`.
        """
        ids = self._ids(tokens)
        return np.concatenate([np.zeros(0, np.float32), *map(self._score_piece, self._pieces(ids))])

    def generate(
        self,
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Draws tokens one by one. Each is read before it is given out, so that a stream may be
        left at any point, and other calls may come in between.

        Args:
          max_tokens: None for no end.
          sampling: for this stream; the session's by default.
          stop: ids that end the stream: drawn, but neither read nor given out.

        Raises:
          ValueError: a session that has read nothing; immediately, like bad arguments.
          SessionError: while streaming, logits that are not numbers.
        """
        if max_tokens is not None:
            max_tokens = as_integer("max_tokens", max_tokens, 0, note=", or None for no end")
        self._check_expects()
        samplers = stack([as_sampling(sampling or self.sampling)])
        stop = stop_ids(stop, self.config.vocab_size)
        draw = functools.partial(self._draw, samplers, stop)
        return _Stream(draw, math.inf if max_tokens is None else max_tokens)

    def generate_text(
        self,
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[str]:
        """`generate` as pieces of text; it also stops at a token that is none of the tokenizer's,
        such as the one that ends a document.

        A character of several tokens comes with its last, also where a sleep, a `save` or an
        earlier stream lies within it. One that is not complete when the stream ends is shown as
        U+FFFD, and so are bytes that are not UTF-8.

        Raises:
          ValueError: as `generate`; a session without a tokenizer.
        """
        known = self._needs_tokenizer("generate_text")
        unwritten = range(known.vocab_size, self.config.vocab_size)
        tokens = self.generate(max_tokens, sampling=sampling, stop={*stop, *unwritten})
        return _written(known, self._life.recent, tokens)

    @_alone
    def sleep(self, passes: int | Policy | None = None) -> Spent | None:
        """Sleeps now, wherever the window stands; what it expects next stays.

        Args:
          passes: for this sleep; the session's policy by default.

        Returns:
          What was spent; None if there was nothing to sleep on.
        """
        policy = self.policy if passes is None else policy_of(passes)
        return self._sleep(policy) if self._life.filled else None

    @_alone
    def rewind(self, position: int):
        """Forgets all tokens of the window behind a point, as if they had not been read.

        The tokens before it are read again, so that numbers may differ by float32 rounding.

        Args:
          position: tokens of life that stay; from the last sleep up to now.

        Raises:
          ValueError: a point before the last sleep, which cannot be undone, or in the future.
        """
        _, began, opening_BY, *_ = self._life
        note = " (from the last sleep up to now)"
        position = as_integer("position", position, began, self.position, note=note)
        if position < self.position:
            self._decoder.rewind([position - began], opening_BY=opening_BY)

    def _live_on(self, snapshot: Snapshot, config: ModelConfig):
        self.config, self.policy, self.sampling = config, snapshot.policy, snapshot.sampling
        self._read_with = snapshot.tokenizer
        self._inside: dict[str, object] = {}
        logits_BY, opening_BY = (
            None if logits_Y is None else jnp.array(logits_Y, jnp.float32)[None]
            for logits_Y in (snapshot.logits_Y, snapshot.opening_Y)
        )
        tokens_BL = np.zeros((1, config.window), np.int32)
        tokens_BL[0, : len(snapshot.tokens)] = snapshot.tokens
        decoder = Decoder(
            self._params.tree, snapshot.state,
            config=config, tokens_BL=tokens_BL, logits_BY=logits_BY,
        )  # fmt: skip
        began = snapshot.position - len(snapshot.tokens)
        self._life = _Life(decoder, began, opening_BY, snapshot.sleeps, None, snapshot.preceding)

    @property
    def _decoder(self) -> Decoder:
        return self._life.decoder

    def _snapshot(self) -> Snapshot:
        opening_BY = self._life.opening_BY
        return Snapshot(
            state=self._decoder.state,
            logits_Y=self.logits,
            opening_Y=None if opening_BY is None else opening_BY[0],
            tokens=self.tokens,
            preceding=self._life.preceding,
            position=self.position,
            sleeps=self.sleeps,
            policy=self.policy,
            sampling=self.sampling,
            tokenizer=self._tokenizer.identity if self._tokenizer else self._read_with,
        )

    def _feed(self, ids: np.ndarray):
        for piece in self._pieces(ids):
            self._read(piece)

    def _pieces(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Parts that fit the window as it is when each is taken; sleeps where it is full."""
        start = 0
        while start < len(ids):
            if self._life.filled == self.config.window:
                self._sleep(self.policy)
            room = self.config.window - self._life.filled
            stop = start + min(room, longest_piece(self.config))
            yield ids[start:stop]
            start = stop

    def _read(self, ids: np.ndarray):
        if len(ids) == 1:
            self._decoder.wake(ids)
        else:
            self._decoder.read(ids[None])

    def _score_piece(self, ids: np.ndarray) -> np.ndarray:
        logits_BY = self._decoder.logits_BY
        # On the device NaN would end a program that runs under JAX_DEBUG_NANS.
        unknown_BY = jnp.zeros((1, self.config.vocab_size), jnp.float32)
        expected_BY = unknown_BY if logits_BY is None else logits_BY
        if len(ids) == 1:
            self._decoder.wake(ids)
            nll_T = np.array(_nll(expected_BY, ids))
        else:
            logits_BTY = self._decoder.read(ids[None], logits="all")
            padded_T = np.pad(ids, (0, logits_BTY.shape[1] - len(ids)))
            nll_T = np.array(_nll_of_piece(expected_BY, logits_BTY, padded_T))[: len(ids)]
        if logits_BY is None:
            nll_T[0] = np.nan
        return nll_T

    @_alone
    def _draw(self, samplers, stop: frozenset[int]) -> int | None:
        draw_B = np.array([self.position % 2**32], np.uint32)
        (token,) = np.asarray(sample(self._check_expects(), draw_B, samplers)).tolist()
        if token < 0:
            raise SessionError(
                f"the logits behind token {self.position} are not numbers: parameters or fast "
                f"weights are not finite; `rewind`, or load a saved session"
            )
        if token in stop:
            return None
        self._feed(np.array([token], np.int32))
        return token

    def _sleep(self, policy: Policy) -> Spent:
        decoder, logits_BY = self._decoder, self._decoder.logits_BY
        state, spent = sleep_by(policy, self._params.tree, decoder.state, config=self.config)
        self._life = _Life(
            decoder.with_state(state, logits_BY=logits_BY),
            began=self.position, opening_BY=logits_BY, sleeps=self.sleeps + 1, last_sleep=spent,
            preceding=self._life.recent,
        )  # fmt: skip
        return spent

    def _check_expects(self) -> Array:
        logits_BY = self._decoder.logits_BY
        if logits_BY is None:
            raise ValueError("the session has read nothing yet: `feed` it a token first")
        return logits_BY

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer: make the session with tokenizer='bytes', or with the "
                f"path of a file of the tokenizers package"
            )
        return self._tokenizer

    def _ids(self, tokens) -> np.ndarray:
        if isinstance(tokens, str):
            (tokens,) = self._needs_tokenizer("text").encode([tokens])
        return as_ids(self.config, tokens)


class _Life(NamedTuple):
    """All that happens to a session, in one value: a sleep replaces it at once, and a token changes
    nothing but what the decoder notes at once.

    began: the position where its window was empty.
    opening_BY: what it expected there.
    preceding: the last ids before that, which text that follows may depend on.
    """

    decoder: Decoder
    began: int
    opening_BY: Array | None
    sleeps: int
    last_sleep: Spent | None
    preceding: tuple[int, ...]

    @property
    def filled(self) -> int:
        return int(self.decoder.length_B[0])

    @property
    def position(self) -> int:
        return self.began + self.filled

    @property
    def tokens(self) -> tuple[int, ...]:
        tokens_BL = self.decoder.tokens_BL
        assert tokens_BL is not None
        return tuple(tokens_BL[0, : self.filled].tolist())

    @property
    def recent(self) -> tuple[int, ...]:
        """The last ids, whether a sleep lies between them or not."""
        return (*self.preceding, *self.tokens)[-CONTEXT:]


class _Stream(Iterator[int]):
    """Up to `left` more tokens, until `draw` returns None; an error does not end it."""

    def __init__(self, draw: Callable[[], int | None], left: float):
        self._draw, self._left = draw, left

    def __next__(self) -> int:
        token = self._draw() if self._left > 0 else None
        if token is None:
            self._left = 0
            raise StopIteration
        self._left -= 1
        return token


class _Params:
    """Parameters that sessions share, and their fingerprint once it is asked for."""

    def __init__(self, tree):
        self.tree = tree

    @functools.cached_property
    def fingerprint(self) -> str:
        return snapshots.fingerprint(self.tree)


def _beside(params, snapshot: Snapshot) -> Snapshot:
    """Return the snapshot on the devices of the parameters, wherever an engine left it."""
    if devices_of(snapshot.state) == devices_of(params):
        return snapshot
    names = ("state", "logits_Y", "opening_Y")
    arrays = jax.device_get({name: getattr(snapshot, name) for name in names})
    return dataclasses.replace(snapshot, **arrays)


def _as_tokenizer(tokenizer: str | Tokenizer) -> Tokenizer:
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def _tokenizer_for(config: ModelConfig, tokenizer: str | Tokenizer | None) -> Tokenizer | None:
    if tokenizer is None:
        return None
    known = _as_tokenizer(tokenizer)
    if known.vocab_size > config.vocab_size:
        raise ConfigError(
            f"tokenizer: its {known.vocab_size} tokens are more than vocab_size="
            f"{config.vocab_size} of the config"
        )
    return known


_nll = jax.jit(nll)


@jax.jit
def _nll_of_piece(expected_BY, logits_BTY, tokens_T):
    """-log p of the tokens of one row."""
    return nll(jnp.concatenate([expected_BY, logits_BTY[0, :-1]]), tokens_T)


def _written(tokenizer: Tokenizer, past: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    stream = tokenizer.text_stream(past)
    yield from filter(None, map(stream.add, tokens))
    if rest := stream.end():
        yield rest
