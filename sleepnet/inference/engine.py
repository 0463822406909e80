"""Engine: many sessions at once, which come and go, and each sleeps when its window is full.

    engine = Engine(params, config=config, slots=64)
    key = engine.submit(prompt, max_new_tokens=100, sampling=Sampling(seed=1))
    while engine.busy:
        for event in engine.step():
            ...  # Drawn(key, token), or Ended(key, ..)

A scheduling step does a bounded amount of work, in programs of fixed shapes: one token for every
decoding row, one piece of the prompts of some prefilling rows, and one slice of the sleep of a
group of rows with full windows. So a row that is awake waits for another row's sleep no longer than
one slice takes. A row whose own window is full waits for the group that is asleep and for those
before it: decoding rows go before prefilling rows, except in one group of `slots` + 1.

A row draws, bit for bit, what it would draw alone in the same engine. An engine of other sizes
differs by rounding, since XLA sums in another order: after ten sleeps by less than 5e-6 of the
state's largest entry.

The engine survives errors. A session that causes one ends as failed; an error that loses the memory
of all slots ends all sessions in them. An interrupt while a step waits for the device changes
nothing; any other interrupt ends, at the next step, the sessions that the step was working on.
"""

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import cache, parallel
from sleepnet.cycle.policies import FixedPasses
from sleepnet.cycle.slices import begin_own_sleep, continue_sleep, finish_sleep
from sleepnet.cycle.wake import as_ids
from sleepnet.inference.sampling import Sampling, as_sampling, stack, stop_ids
from sleepnet.inference.slots import Slots
from sleepnet.inference.snapshot import Snapshot
from sleepnet.integers import as_integer
from sleepnet.nn.fsdp import on_one_device
from sleepnet.nn.model import check_params
from sleepnet.tokenizer import CONTEXT
from sleepnet.types import WakeState

LENGTH, STOP, CANCELLED, FAILED = REASONS = ("length", "stop", "cancelled", "failed")
GREEDY = Sampling(temperature=0)
INTERRUPTED = "a step was interrupted while it was seen to"


class EngineFull(RuntimeError):  # noqa: N818, it is no error of the engine's
    """As many sessions wait as may; try again after a `step`."""


class Drawn(NamedTuple):
    """A session has drawn a token."""

    key: int
    token: int


class Ended(NamedTuple):
    """A session has left its slot.

    reason: "length", "stop", "cancelled", or "failed", which `error` explains.
    snapshot: if `keep` was set and it ended by length or stop: it has read all that it was given
      and all that it drew. `submit` takes it, to go on.
    """

    key: int
    reason: str
    error: str | None = None
    snapshot: Snapshot | None = None


class Load(NamedTuple):
    """How many sessions there are, by what they do."""

    waiting: int
    prefilling: int
    decoding: int
    asleep: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is taken in.

    waiting: sessions without a slot.
    prompt: tokens of one submission.
    new_tokens: to draw, for one submission.
    """

    waiting: int = 1024
    prompt: int = 1 << 24
    new_tokens: int = 1 << 24

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _count(field.name, getattr(self, field.name)))


@dataclasses.dataclass(eq=False)
class _Session:
    key: int
    unread: np.ndarray
    to_draw: int
    stop: frozenset[int]
    keep: bool
    snapshot: Snapshot  # as it came
    tokens: list[int]  # of its window
    position: int  # tokens read in its life
    sleeps: int  # in its life
    logits_Y: Any = None  # behind the last token of a window or of all, if it is kept
    opening_Y: Any = None
    row: int = -1
    preceding: tuple[int, ...] = ()  # the last tokens before its window
    decoding: bool = False  # all that it has to read is the token that it drew last
    cancelled: bool = False


class _Read(NamedTuple):
    """What a program reads that is under way.

    rows: the place of each session in its results, and how many tokens it reads.
    """

    rows: dict[_Session, tuple[int, int]]
    drawn_Q: Any
    logits_QY: Any


class Engine:
    """Batch sessions continuously, each of which sleeps when its window is full.

    Compiles all that it will ever run when it is made.

    Args:
      params: from `init_params`. Those that are split over devices, such as a run's that was
        trained with `mesh.fsdp`, are gathered on the first of them, once.
      config: static.
      slots: B, how many sessions are in memory at once; others wait for one, first come, first
        served.
      passes: N of each sleep; `config.passes` by default.
      work: the bound on what a scheduling step does besides waking: so many tokens are read at
        most, and so many slept on (each once for every pass). By default `slots` * N: all rows
        together need `slots` * (N - 1) a step, if each draws a token.
      group: how many rows sleep, or read a piece, in one program. One wastes nothing where few
        have to; more keep an accelerator busy where windows are short.
      devices: which of `jax.local_devices()` sleep, or how many: groups then sleep there whole,
        under `pmap`, and those awake wait for nothing (if their device is not among them). By
        default they sleep in slices on the device that wakes.
      limits: of what is taken in.

    Raises:
      ConfigError: a size that is none.
      ValueError: devices that are not there, or parameters of another config or of which this
        process holds a part.
    """

    def __init__(
        self,
        params,
        *,
        config: ModelConfig,
        slots: int,
        passes: int | None = None,
        work: int | None = None,
        group: int = 1,
        devices: int | Sequence[Any] | None = None,
        limits: Limits | None = None,
    ):
        passes = config.passes if passes is None else passes
        slots, passes = _count("slots", slots), _count("passes", passes)
        group = _count("group", group)
        work = slots * passes if work is None else _count("work", work)
        if not isinstance(limits, Limits | None):
            raise ConfigError(f"limits must be Limits(...); got {limits!r}")
        check_params(params, config)
        params = on_one_device(params)
        self._params, self._config, self._passes = params, config, passes
        self._limits = limits or Limits()
        self._slots = Slots(params, config=config, count=slots)
        self._rows = min(group, slots, work)  # of a piece or a slice
        self._tokens = min(work // self._rows, config.window)  # of each of them
        self._at_once = work // (self._rows * self._tokens)  # pieces or slices of a step
        self._devices = devices
        self._params_to_sleep = params
        if devices is not None and passes > 1:
            self._params_to_sleep = parallel.send(
                params, config=config, rows=self._rows, devices=devices
            )
        self._fresh = Snapshot(
            state=cache.init_state(config, 1), policy=FixedPasses(passes), sampling=GREEDY
        )
        self._samplers = stack([GREEDY] * slots)
        self._keys = 0
        self._by_key: dict[int, _Session] = {}
        self._waiting: collections.deque[_Session] = collections.deque()
        self._in_slot: dict[int, _Session] = {}
        self._prefill_queue: collections.deque[_Session] = collections.deque()
        self._sleep_queue: collections.deque[_Session] = collections.deque()
        self._sleeping: list[_Session | None] = []  # by their place in the group
        self._sleep: Any = None
        self._passed_over = 0  # groups in a row while readers were tired
        self._in_flight: collections.deque[_Read] = collections.deque()
        self._failed: dict[_Session, str] = {}  # why those must end, in whom books and slots differ
        self._events: collections.deque[Drawn | Ended] = collections.deque()
        # Reentrant: an interrupt between taking and holding one must not shut its thread out.
        self._stepping, self._lock = threading.RLock(), threading.RLock()
        self._compile()

    # What callers do, from any thread.

    def submit(
        self,
        tokens,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        snapshot: Snapshot | None = None,
        keep: bool = False,
    ) -> int:
        """A new session, which will read the tokens and then draw others.

        Args:
          tokens: int ids, at least one.
          max_new_tokens: how many to draw; 0 to read alone.
          sampling: how; by default the snapshot's, or the likeliest token. As in a `Session`, the
            draw after n tokens takes its randomness from the seed and n.
          stop: ids that end it: drawn, but neither read nor given out.
          snapshot: to go on from; a fresh state by default.
          keep: whether `Ended` should have the snapshot.

        Returns:
          The session's key.

        Raises:
          ValueError: ids outside the vocabulary, too many of them, or a snapshot of another shape
            or that sleeps in another way.
          EngineFull: the waiting queue is full.
        """
        tokens = self._checked(tokens)
        most = self._limits.new_tokens
        max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 0, most)
        snapshot = self._fresh if snapshot is None else snapshot
        if not isinstance(snapshot, Snapshot):
            raise ValueError(
                f"snapshot must be a Snapshot, such as Session.snapshot or Ended.snapshot; got "
                f"{snapshot!r}"
            )
        snapshot.check(self._config)
        if snapshot.policy != self._fresh.policy:
            raise ValueError(
                f"the snapshot sleeps by {snapshot.policy}, and this engine by "
                f"{self._fresh.policy}: submit dataclasses.replace(snapshot, "
                f"policy={self._fresh.policy}), or make an engine of its passes"
            )
        snapshot = dataclasses.replace(
            snapshot, sampling=as_sampling(sampling or snapshot.sampling)
        )
        stop = stop_ids(stop, self._config.vocab_size)
        with self._lock:
            if len(self._waiting) >= self._limits.waiting:
                raise EngineFull(
                    f"{len(self._waiting)} sessions wait for one of {self._slots.count} slots, and "
                    f"no more may (limits.waiting): submit again after a step"
                )
            session = _Session(
                self._keys, tokens, max_new_tokens, stop, keep, snapshot,
                list(snapshot.tokens), snapshot.position, snapshot.sleeps,
            )  # fmt: skip
            self._keys += 1
            self._waiting.append(session)
            self._by_key[session.key] = session
        return session.key

    def cancel(self, key: int):
        """Ends a session at the next step, whatever it does.

        Raises:
          KeyError: no such session, or it has ended.
        """
        with self._lock:
            if key not in self._by_key:
                raise KeyError(f"no session {key}: it has ended, or never was")
            self._by_key[key].cancelled = True

    @property
    def busy(self) -> bool:
        """Whether there are sessions, or events of an interrupted step."""
        return bool(self._by_key or self._events)

    @property
    def load(self) -> Load:
        """What the sessions do."""
        in_group = sum(session is not None for session in self._sleeping)
        asleep, prefilling = in_group + len(self._sleep_queue), len(self._prefill_queue)
        return Load(
            waiting=len(self._waiting), prefilling=prefilling,
            decoding=len(self._in_slot) - asleep - prefilling, asleep=asleep,
        )  # fmt: skip

    def run(self) -> Iterator[Drawn | Ended]:
        """Steps until no session is left; what is not taken, the next step gives.

        Where all sleep on devices of their own, it waits until they wake.
        """
        while self.busy:
            if self._failed or not self._events:
                self._step(patient=True)
            while self._events:
                yield self._events.popleft()

    def step(self) -> list[Drawn | Ended]:
        """One scheduling step: bounded work for everybody.

        Raises:
          RuntimeError: another thread is in a step.
        """
        self._step()
        events, self._events = self._events, collections.deque()
        return list(events)

    # A scheduling step, in its order.

    def _step(self, *, patient: bool = False):
        with self._alone():
            for phase in (
                self._collect,  # what an interrupted step left
                self._end_cancelled,
                self._admit,
                self._continue_sleep,
                self._dispatch,
                self._collect,
            ):
                phase()
                self._handle_failures()
            if patient and not self._events and self._all_asleep:
                with self._errors_end(self._group):
                    self._sleep.wait()

    def _end_cancelled(self):
        with self._lock:
            cancelled = [session for session in self._by_key.values() if session.cancelled]
        for session in cancelled:
            with self._interrupts_end([session]):
                self._end(session, CANCELLED)

    def _admit(self):
        free = (row for row in range(self._slots.count) if row not in self._in_slot)
        with self._lock:
            pairs = list(zip(free, list(self._waiting), strict=False))
        for row, session in pairs:
            with self._interrupts_end([session]):
                self._assign(row, session)

    def _assign(self, row: int, session: _Session):
        """The slot to a session that waits."""
        with self._lock:
            self._waiting.remove(session)
        self._slots.put([row], session.snapshot.state)
        session.row, session.opening_Y = row, session.snapshot.opening_Y
        session.logits_Y, session.preceding = session.snapshot.logits_Y, session.snapshot.preceding
        # What was put is not held twice.
        session.snapshot = dataclasses.replace(session.snapshot, state=self._fresh.state)
        self._in_slot[row] = session
        own = jax.tree.leaves(stack([session.snapshot.sampling]))
        for of_all, of_one in zip(jax.tree.leaves(self._samplers), own, strict=True):
            of_all[row] = of_one[0]
        self._enqueue(session)

    def _continue_sleep(self):
        """Slices of the sleep of a group; a group may end, and the next begin."""
        for _ in range(self._at_once):
            if self._sleep is None:
                self._start_sleep()
            if self._sleep is None or self._failed:
                return
            state = None
            with self._errors_end(self._group):
                state = self._sleep.go_on()
            if state is not None:
                self._finish_sleep(state)

    def _start_sleep(self):
        """The next group, if anybody is tired."""
        asleep = self._next_group()
        if not asleep:
            return
        with self._interrupts_end(asleep):
            for session in asleep:
                self._sleep_queue.remove(session)
            state = self._slots.take([session.row for session in asleep], self._rows)
            self._sleeping, self._sleep = [*asleep], self._begin(state)

    def _next_group(self) -> list[_Session]:
        """Those who speak, then those who read; but these first where they waited long."""
        readers_first = self._passed_over >= self._slots.count
        in_order = sorted(self._sleep_queue, key=lambda session: session.decoding == readers_first)
        chosen, left = in_order[: self._rows], in_order[self._rows :]
        passed_over = all(s.decoding for s in chosen) and not all(s.decoding for s in left)
        self._passed_over = self._passed_over + 1 if passed_over else 0
        return chosen

    def _finish_sleep(self, state: WakeState):
        with self._interrupts_end(self._group):
            self._slots.put([session and session.row for session in self._sleeping], state)
            for session in self._group:
                session.preceding = (*session.preceding, *session.tokens)[-CONTEXT:]
                session.tokens, session.opening_Y = [], session.logits_Y
                session.sleeps += 1
                self._enqueue(session)
            self._sleeping, self._sleep = [], None

    @property
    def _all_asleep(self) -> bool:
        return self._sleep is not None and self.load[:3] == (0, 0, 0)

    @property
    def _group(self) -> list[_Session]:
        """Of the group asleep."""
        return [session for session in self._sleeping if session is not None]

    def _begin(self, state: WakeState):
        # All windows are full: known without waiting for the device.
        full_B = np.full(self._rows, self._config.window, np.int32)
        window = dataclasses.replace(state.window, length_B=full_B)
        state = dataclasses.replace(state, window=window)
        if self._devices is None:
            return _Incremental(self._params, state, self._config, self._passes, self._tokens)
        return _OnDevices(self._params_to_sleep, state, self._config, self._passes, self._devices)

    def _dispatch(self):
        """All that is to be read, before the first is waited for."""
        self._decode()
        for _ in range(self._at_once):
            self._read()

    def _decode(self):
        """Read a token in every decoding row, and draw the next."""
        rows = {
            s: (s.row, 1) for s in self._in_slot.values() if s.decoding and not self._is_full(s)
        }
        if not rows:
            return
        tokens_B = np.zeros(self._slots.count, np.int32)
        draw_B = np.zeros(self._slots.count, np.uint32)
        reads_B = np.zeros(self._slots.count, bool)
        for session, (row, _) in rows.items():
            (tokens_B[row],) = session.unread
            draw_B[row], reads_B[row] = _draw_of(session, 1), True
        with self._interrupts_end(rows):
            read = self._slots.read_one(tokens_B, reads_B, draw_B, self._samplers)
            self._in_flight.append(_Read(rows, *read))

    def _read(self):
        """A piece of a window in some of the rows that have more to read; they take turns."""
        sessions = list(itertools.islice(self._prefill_queue, self._rows))
        if not sessions:
            return
        tokens_QT = np.zeros((self._rows, self._tokens), np.int32)
        length_Q, draw_Q = np.zeros(self._rows, np.int32), np.zeros(self._rows, np.uint32)
        padding = [GREEDY] * (self._rows - len(sessions))
        samplers = stack([session.snapshot.sampling for session in sessions] + padding)
        for i, session in enumerate(sessions):
            piece = session.unread[: self._piece_of(session)]
            tokens_QT[i, : len(piece)], length_Q[i] = piece, len(piece)
            draw_Q[i] = _draw_of(session, len(piece))
        rows = {session: (i, int(length_Q[i])) for i, session in enumerate(sessions)}
        with self._interrupts_end(sessions):
            for session in sessions:
                self._prefill_queue.remove(session)
            read = self._slots.read_piece(
                [session.row for session in sessions], tokens_QT, length_Q, draw_Q, samplers
            )
            self._in_flight.append(_Read(rows, *read))

    def _collect(self):
        """Waits for what is under way, and writes it into the books."""
        while self._in_flight:
            read = self._in_flight[0]
            with self._errors_end(read.rows):
                drawn_Q = np.asarray(read.drawn_Q)  # whoever interrupts the waiting loses nothing
                for session in list(read.rows):
                    with self._interrupts_end([session]):
                        place, count = read.rows.pop(session)
                        self._has_read(session, count, read.logits_QY, place)
                        self._draws(session, int(drawn_Q[place]))
            self._in_flight.popleft()

    def _has_read(self, session: _Session, count: int, logits_QY, place: int):
        tokens, session.unread = session.unread[:count], session.unread[count:]
        session.tokens += tokens.tolist()
        session.position += count
        if session.keep and (self._is_full(session) or not len(session.unread)):
            session.logits_Y = np.asarray(logits_QY)[place].copy()

    def _draws(self, session: _Session, token: int):
        """What follows from the token that it would draw now."""
        if token < 0:
            error = "its logits are not numbers: its state or the parameters are damaged"
            self._end(session, FAILED, error)
        elif len(session.unread):
            self._enqueue(session)
        elif not session.to_draw:
            self._end(session, LENGTH)
        elif token in session.stop:
            self._end(session, STOP)
        else:
            session.to_draw -= 1
            self._events.append(Drawn(session.key, token))
            session.unread, session.decoding = np.array([token], np.int32), True
            if session.to_draw or session.keep:
                self._enqueue(session)
            else:
                self._end(session, LENGTH)

    # What becomes of those whom something befalls.

    @contextlib.contextmanager
    def _errors_end(self, sessions: Iterable[_Session]):
        """An error within ends them, and is not raised."""
        sessions = list(sessions)
        try:
            yield
        except Exception as error:
            self._failed |= dict.fromkeys(sessions, f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def _interrupts_end(self, sessions: Iterable[_Session]):
        """An error ends them, and so does an interrupt: books and slots may differ then."""
        sessions = list(sessions)
        self._failed |= dict.fromkeys(sessions, INTERRUPTED)
        with self._errors_end(sessions):
            yield
            for session in sessions:
                del self._failed[session]

    def _handle_failures(self):
        """Ends the broken; if they took the slots with them, everybody in one."""
        if not self._failed:
            return
        if not self._slots.intact():
            (why, *_) = self._failed.values()
            why = f"the states in all slots were lost: {why}"
            self._failed |= dict.fromkeys(self._in_slot.values(), why)
            self._in_flight.clear()
            self._slots.renew()
        ended = {event.key for event in self._events if isinstance(event, Ended)}
        for session, error in self._failed.items():
            if session.key in ended:  # an interrupt met it as it ended
                self._forget(session)
            else:
                self._end(session, FAILED, error)
        self._failed.clear()

    # What becomes of a session.

    def _enqueue(self, session: _Session):
        """Into the queue of what it does next; it has something to read."""
        if self._is_full(session):
            self._sleep_queue.append(session)
        elif not session.decoding:
            self._prefill_queue.append(session)

    def _is_full(self, session: _Session) -> bool:
        return len(session.tokens) == self._config.window

    def _piece_of(self, session: _Session) -> int:
        """Pieces lie alike in every window, whatever the neighbours do."""
        filled = len(session.tokens)
        end = (filled // self._tokens + 1) * self._tokens
        return min(end, self._config.window) - filled

    def _end(self, session: _Session, reason: str, error: str | None = None):
        snapshot = None
        if session.keep and reason in (LENGTH, STOP):
            snapshot = dataclasses.replace(
                session.snapshot, state=self._slots.take([session.row], 1),
                logits_Y=session.logits_Y, opening_Y=session.opening_Y,
                tokens=tuple(session.tokens), preceding=session.preceding,
                position=session.position, sleeps=session.sleeps,
            )  # fmt: skip
        self._events.append(Ended(session.key, reason, error, snapshot))
        self._forget(session)

    def _forget(self, session: _Session):
        """Wherever it is; an interrupt may have it done again."""
        for queue in (self._prefill_queue, self._sleep_queue):
            if session in queue:
                queue.remove(session)
        for read in self._in_flight:
            read.rows.pop(session, None)
        self._sleeping = [None if other is session else other for other in self._sleeping]
        if not self._group:  # nobody is left in the group
            self._sleeping, self._sleep = [], None
        if self._in_slot.get(session.row) is session:
            del self._in_slot[session.row]
        with self._lock:
            if session in self._waiting:
                self._waiting.remove(session)
            self._by_key.pop(session.key, None)

    # Beside the work.

    def _checked(self, tokens) -> np.ndarray:
        tokens = as_ids(self._config, tokens)
        if not 1 <= tokens.size <= self._limits.prompt:
            raise ValueError(
                f"a submission has 1 to {self._limits.prompt} tokens (limits.prompt); "
                f"got {tokens.size}"
            )
        return tokens

    @contextlib.contextmanager
    def _alone(self):
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is in a step of this engine: one at a time")
        try:
            yield
        finally:
            self._stepping.release()

    def _compile(self):
        """Runs every program once, on nobody."""
        B, Q = self._slots.count, self._rows
        zero_B, draw_B = np.zeros(B, np.int32), np.zeros(B, np.uint32)
        zero_QT, draw_Q = np.zeros((Q, self._tokens), np.int32), np.zeros(Q, np.uint32)
        self._slots.read_one(zero_B, zero_B > 0, draw_B, self._samplers)
        self._slots.read_piece([], zero_QT, zero_QT[:, 0], draw_Q, stack([GREEDY] * Q))
        self._slots.put([], self._slots.take([], 1))
        sleep = self._begin(self._slots.take([], Q))
        while (state := sleep.go_on()) is None:
            pass
        self._slots.put([], state)


class _Incremental:
    """A group asleep on the device that wakes, a slice for each scheduling step."""

    def __init__(self, params, state: WakeState, config, passes, tokens):
        self._params, self._state, self._tokens = params, state, tokens
        self._progress = begin_own_sleep(state, config=config, passes=passes)

    def go_on(self) -> WakeState | None:
        """Run a slice; return the group's state once its sleep is done."""
        if not self._progress.done:
            self._progress = continue_sleep(self._params, self._progress, tokens=self._tokens)
        return finish_sleep(self._progress, self._state) if self._progress.done else None

    def wait(self):
        """There is nothing to wait for: the caller does the work."""


class _OnDevices:
    """A group asleep on devices of its own, all of its sleep at once."""

    def __init__(self, params, state: WakeState, config, passes, devices):
        self._state = parallel.sleep(params, state, config=config, passes=passes, devices=devices)

    def go_on(self) -> WakeState | None:
        """As `_Incremental.go_on`; waits for nothing."""
        done = all(x.is_ready() for x in jax.tree.leaves(self._state))
        return self._state if done else None

    def wait(self):
        """Until it is done."""
        jax.block_until_ready(self._state)


def _draw_of(session: _Session, count: int) -> int:
    """The number of the draw behind `count` more tokens."""
    return (session.position + count) % 2**32


def _count(name: str, value) -> int:
    return as_integer(name, value, 1, error=ConfigError)
