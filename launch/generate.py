r"""Write with a trained model: python -m launch.generate --workdir=runs/text --prompt="A mind".

    python -m launch.generate --workdir=runs/text --prompt_file=book.txt --max_tokens=500 \
      --temperature=0.8 --top_p=0.95 --save=runs/reader.snapshot
    echo "And then" | python -m launch.generate --workdir=runs/text --load=runs/reader.snapshot

The prompt comes from --prompt, --prompt_file or standard input, which is read to its end; with
--load a terminal is not asked, it may be closed, and --prompt= goes on without one. A byte-order
mark and one newline at the end of a file or of standard input are not part of the prompt.

What is written goes to standard output; to standard error a line that tells tokens, sleeps,
milliseconds per token and the bytes of the state. Bytes that are not UTF-8 are written as U+FFFD,
characters that the output's encoding lacks as escapes such as \u5922, and on a terminal control
characters as \x1b. It ends at --max_tokens, at the end of a document, with Ctrl-C, or when no one
reads it any more (`| head`), and then saves.

A run on another task than text reads token ids, such as "3 1 4", and writes ids.
"""

import dataclasses
import errno
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from launch.common import cli, moved_files, prompts
from launch.common.live_line import LiveLine, notify, printable, tell
from sleepnet import storage
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle.policies import FixedPasses, Policy, UntilStill, WithinSeconds
from sleepnet.cycle.wake import check_vocabulary
from sleepnet.experiment import ExperimentConfig
from sleepnet.inference.session import Session, SessionError
from sleepnet.tasks import TextConfig
from sleepnet.tasks.text import task_tokenizer
from sleepnet.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from sleepnet.training.workdir import load_config, load_params

_WORKDIR = cli.define_path("workdir", None, "Folder of a trained run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the last by default.")
_PROMPT = flags.DEFINE_string("prompt", None, "What to go on from; may be empty with --load.")
_PROMPT_FILE = cli.define_path(
    "prompt_file", None, "A file with what to go on from; - is standard input."
)
_STDIN = pathlib.Path("-")
_FILES = moved_files.define("tokenizer")
_SPECIAL_TOKENS = flags.DEFINE_enum(
    "special_tokens", None, SPECIAL_TOKENS,
    "How special tokens are read that stand written in the prompt: as the text that they are, or "
    "as control tokens; the run's task.special_tokens.",
)  # fmt: skip
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "At most so many.", lower_bound=0)
_SAMPLING = {
    "temperature": flags.DEFINE_float("temperature", None, "0 takes the likeliest token; 1."),
    "top_k": flags.DEFINE_integer("top_k", None, "Only the so many likeliest tokens; all."),
    "top_p": flags.DEFINE_float("top_p", None, "Only the likeliest that together reach it; 1."),
    "seed": flags.DEFINE_integer("seed", None, "Of all draws; 0, or that of --load."),
}
_POLICY = {
    "passes": flags.DEFINE_integer("passes", None, "N of each sleep; the trained N."),
    "sleep_until_change": flags.DEFINE_float(
        "sleep_until_change", None, "Sleep until a pass moves the fast weights by less; 0.01, say."
    ),
    "sleep_seconds": flags.DEFINE_float("sleep_seconds", None, "Sleep for about so long."),
}
_LOAD = cli.define_path("load", None, "A saved session to continue.")
_SAVE = cli.define_path("save", None, "Where to save the session at the end.")

_SHOWN_EVERY = 0.1  # seconds


def main(_):
    try:
        return _main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # nothing was read or written yet


def _main() -> int | None:
    policy, prompt = _policy(), _prompt()
    if _SAVE.value:
        storage.prepare_file(_SAVE.value)
    config = moved_files.apply(load_config(_WORKDIR.value), _FILES)
    tokenizer = _tokenizer(config.task) if isinstance(config.task, TextConfig) else None
    ids = tokenizer.encode([prompt])[0] if tokenizer else _ids(prompt)
    _check_ids(ids, config.model)
    params, _ = load_params(_WORKDIR.value, _STEP.value)
    session = _session(params, config, tokenizer)
    session.policy = policy or session.policy
    given = {name: flag.value for name, flag in _SAMPLING.items() if flag.value is not None}
    session.sampling = dataclasses.replace(session.sampling, **given)
    try:
        stopped_by = _write(session, ids, text=tokenizer is not None)
    finally:
        if _SAVE.value:
            session.save(_SAVE.value)
    return 128 + stopped_by if stopped_by else None


def _write(session: Session, ids: np.ndarray, *, text: bool) -> int | None:
    """Reads the prompt and writes; the signal that stopped it, or would have."""
    stop, progress = _Stop(), _Progress(session)
    escaped = sys.stdout is not None and sys.stdout.isatty()
    try:
        try:
            for start in range(0, len(ids), session.config.window):
                session.feed(ids[start : start + session.config.window])
                progress.show()
                if stop.signal:
                    return stop.signal
            for piece in _pieces(session, text):
                if not tell(sys.stdout, printable(piece) if escaped else piece):
                    return signal.SIGPIPE
                progress.show()
                progress.count_from_here()
                if stop.signal:
                    return stop.signal
        finally:
            tell(sys.stdout, "\n")
    except SessionError as error:
        raise ConfigError(f"the model of {_WORKDIR.value}: {error}") from None
    except OSError as error:
        raise storage.StorageError(f"cannot write to standard output: {error.strerror}") from None
    finally:
        progress.end()
    return None


def _pieces(session: Session, text: bool) -> Iterator[str]:
    if session.logits is None:
        raise ConfigError("there is nothing to go on from: give a --prompt, or --load a session")
    if text:
        return session.generate_text(_MAX_TOKENS.value)
    return (f"{token} " for token in session.generate(_MAX_TOKENS.value))


def _session(params, config: ExperimentConfig, tokenizer: Tokenizer | None) -> Session:
    model = config.model
    if not cli.has_backend(model):
        model = dataclasses.replace(model, backend="xla")
    if _LOAD.value:
        return Session.load(_LOAD.value, params, config=model, tokenizer=tokenizer)
    return Session(params, config=model, tokenizer=tokenizer)


def _tokenizer(task: TextConfig) -> Tokenizer:
    known = task_tokenizer(task)
    if _SPECIAL_TOKENS.value is None:
        return known
    return load_tokenizer(task.tokenizer, special_tokens=_SPECIAL_TOKENS.value)


def _prompt() -> str:
    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise ConfigError("--prompt and --prompt_file are two prompts: give one")
    if _PROMPT.value is not None:
        return prompts.decode("--prompt", os.fsencode(_PROMPT.value))
    if _PROMPT_FILE.value in (None, _STDIN):
        return _standard_input(asked=_PROMPT_FILE.value == _STDIN)
    try:
        content = _PROMPT_FILE.value.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--prompt_file={_PROMPT_FILE.value} cannot be read: {error.strerror}"
        ) from None
    return prompts.decode_file(f"--prompt_file={_PROMPT_FILE.value}", content)


def _standard_input(*, asked: bool) -> str:
    may_lack = _LOAD.value and not asked
    if may_lack and sys.stdin is not None and sys.stdin.isatty():
        return ""
    instead = "--prompt= goes on without" if _LOAD.value else "--prompt=... gives it at once"
    notice = f"waiting for the end of the prompt on standard input (Ctrl-D); {instead}"
    try:
        if sys.stdin is None:  # closed when the program began
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        content = prompts.read_to_end(
            sys.stdin.buffer, on_waiting=lambda: notify(sys.stderr, notice)
        )
    except OSError as error:
        if may_lack and error.errno == errno.EBADF:
            return ""
        raise ConfigError(
            f"standard input cannot be read ({error.strerror}); give the prompt with --prompt=... "
            f"or --prompt_file=..."
        ) from None
    return prompts.decode_file("standard input", content)


def _ids(prompt: str) -> np.ndarray:
    try:
        return np.array([int(word) for word in prompt.split()], np.int64)
    except (OverflowError, ValueError):
        raise ConfigError(
            f"the prompt of a run that is not on text must be token ids, such as '3 1 4'; got "
            f"{prompt[:40]!r}"
        ) from None


def _check_ids(ids: np.ndarray, config: ModelConfig):
    """All at once: what a prompt's beginning has cost is not lost by its end."""
    try:
        check_vocabulary(config, ids)
    except ValueError as error:
        raise ConfigError(f"the prompt: {error}") from None


def _policy() -> Policy | None:
    given = {name: flag.value for name, flag in _POLICY.items() if flag.value is not None}
    if len(given) > 1:
        raise ConfigError(f"give one of {' and '.join(f'--{name}' for name in given)}")
    if "passes" in given:
        return FixedPasses(given["passes"])
    if "sleep_until_change" in given:
        return UntilStill(change=given["sleep_until_change"])
    if "sleep_seconds" in given:
        return WithinSeconds(seconds=given["sleep_seconds"])
    return None


class _Stop:
    """The first Ctrl-C or SIGTERM asks to stop behind this token; the second ends at once."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Progress:
    """The live line of a session."""

    def __init__(self, session: Session):
        self._session, self._line = session, LiveLine(sys.stderr)
        self._start, self._shown, self._counts = session.position, 0.0, False
        self._since = session.position, time.perf_counter()

    def show(self):
        now = time.perf_counter()
        if now - self._shown >= _SHOWN_EVERY:
            self._shown = now
            self._line.show(self._text())

    def count_from_here(self):
        """The first time it is called: from there on, nothing compiles."""
        if not self._counts:
            self._counts, self._since = True, (self._session.position, time.perf_counter())

    def end(self):
        self._line.close(self._text())

    def _text(self) -> str:
        snapshot = self._session
        tokens = snapshot.position - self._start
        position, began = self._since
        each_ms = 1e3 * (time.perf_counter() - began) / max(snapshot.position - position, 1)
        return (
            f"{tokens} tokens  {snapshot.position} in its life  {snapshot.sleeps} sleeps  "
            f"{each_ms:.2f} ms per token  {snapshot.state_bytes:,} bytes of state"
        )


if __name__ == "__main__":
    cli.run(main)
