"""A person's way from a trained run to text: prompts, a live line, minds that go on."""

import contextlib
import fcntl
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import corpora
import jax
import pytest

from launch.live_line import LiveLine
from sleepnet import Sampling, Session, UntilStill
from sleepnet.config import DepoConfig, ExperimentConfig, ModelConfig
from sleepnet.training import newborn
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.workdir import claim_workdir, load_config, load_params

ROOT = pathlib.Path(__file__).parent.parent.parent
PROMPT = "dreams and café"  # a window of 16 bytes
LINE = re.compile(
    r"(\d+) tokens  (\d+) in its life  (\d+) sleeps  [\d.]+ ms per token  ([\d,]+) bytes of state"
)


def command(workdir, *arguments):
    return [sys.executable, "-m", "launch.generate", f"--workdir={workdir}", *arguments]


def run(workdir, *arguments, prompt=PROMPT):
    """Its exit code, standard output and standard error."""
    done = subprocess.run(
        command(workdir, *arguments), cwd=ROOT, input=prompt.encode(), capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def workdir_of(folder, task, vocab_size) -> pathlib.Path:
    """A run that was never trained, with a checkpoint of step 0."""
    model = ModelConfig(
        vocab_size=vocab_size, pattern="G", d_model=8, num_heads=1, window=task.window, passes=2
    )
    config = ExperimentConfig(model=model, task=task)
    claim_workdir(config, folder)
    with jax.numpy_dtype_promotion("standard"):
        Checkpoints(folder).save(newborn.init(config, None)(), wait=True)
    return folder


@pytest.fixture(scope="module")
def of_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return workdir_of(folder / "run", corpora.text_config(folder), 257)


@pytest.fixture(scope="module")
def of_numbers(tmp_path_factory):
    task = DepoConfig(nodes=8, hops=2, symbols=8, queries=3, window=6)
    return workdir_of(tmp_path_factory.mktemp("numbers") / "run", task, 10)


def session_of(workdir, **options) -> Session:
    model = load_config(workdir).model
    return Session(load_params(workdir)[0], config=model, **options)


def test_what_is_written_is_the_sessions_and_its_mind_goes_on(of_text, tmp_path):
    """From standard input, with flags for sampling and sleep; text alone on standard output, and
    at the end one line on standard error."""
    path = tmp_path / "mind"
    code, out, told = run(
        of_text, "--max_tokens=20", "--top_k=40", "--seed=3", "--passes=3", f"--save={path}"
    )
    assert code == 0, told
    one = session_of(of_text, passes=3, sampling=Sampling(top_k=40, seed=3), tokenizer="bytes")
    one.feed(PROMPT)
    written = "".join(one.generate_text(20))
    assert written and out == written + "\n"
    tokens, life, sleeps, size = LINE.fullmatch(told.strip()).groups()
    assert int(tokens) == int(life) == one.position and int(sleeps) == one.sleeps > 1
    assert int(size.replace(",", "")) == one.state_bytes
    saved = Session.load(path, one._params.tree, tokenizer="bytes")
    assert list(saved.generate(20)) == list(one.generate(20))


@pytest.mark.slow
def test_a_saved_mind_goes_on(of_text, tmp_path):
    """With its own sampling and sleep, and no prompt; or with others where flags say so."""
    path = tmp_path / "mind"
    one = session_of(of_text, passes=1, sampling=Sampling(temperature=0.5), tokenizer="bytes")
    one.feed(PROMPT)
    one.save(path)
    _, out, told = run(of_text, f"--load={path}", "--max_tokens=30", f"--save={path}", prompt="")
    assert out == "".join(one.generate_text(30)) + "\n", told
    flags = ("--max_tokens=30", "--seed=9", "--sleep_until_change=0.1")
    _, out, told = run(of_text, f"--load={path}", *flags)
    one.policy = UntilStill(change=0.1)
    one.feed(PROMPT)
    other = one.generate_text(30, sampling=Sampling(temperature=0.5, seed=9))
    assert out == "".join(other) + "\n", told


@pytest.mark.slow
def test_a_run_on_another_task_reads_and_writes_ids(of_numbers, tmp_path):
    (tmp_path / "prompt").write_text("3 1\n4 1 5 9 2 6")
    _, out, told = run(of_numbers, f"--prompt_file={tmp_path / 'prompt'}", "--max_tokens=9")
    one = session_of(of_numbers)
    one.feed([3, 1, 4, 1, 5, 9, 2, 6])
    assert [int(token) for token in out.split()] == list(one.generate(9)), told


@pytest.mark.slow
def test_what_is_wrong_is_told_in_a_line(of_text, of_numbers, tmp_path):
    """Exit code 2, and nothing is written."""
    (tmp_path / "poem").write_text("a poem\n")
    for workdir, arguments, complaint in (
        (of_text, ["--top_p=2"], "top_p must be above 0, and at most 1 (all tokens); got 2"),
        (of_text, ["--passes=0"], "passes must be an integer of 1 or more; got 0"),
        (of_text, ["--passes=2", "--sleep_seconds=1"], "give one of --passes and --sleep_seconds"),
        (of_text, ["--prompt=a", "--prompt_file=b"], "two prompts"),
        (of_text, ["--prompt_file=nowhere"], "--prompt_file=nowhere cannot be read"),
        (of_text, ["--prompt="], "there is nothing to go on from"),
        (of_text, [f"--load={tmp_path / 'poem'}"], "no file of arrays"),
        (of_text, [f"--load={tmp_path / 'gone'}"], "does not exist"),
        (of_text, ["--prompt=x", f"--save={tmp_path}"], "it is no regular file"),
        (of_text, [f"--save={tmp_path / 'poem'}/mind"], "poem: File exists"),
        (of_numbers, ["--prompt=a b"], "must be token ids, such as '3 1 4'; got 'a b'"),
        (of_numbers, ["--prompt=3 99"], "token id 99 at place 1 is outside"),
        (of_numbers, ["--prompt=" + "3 " * 40 + "99"], "at place 40 is outside"),
        (tmp_path, [], "is no workdir of a run"),
    ):
        code, out, told = run(workdir, *arguments)
        assert code == 2 and not out.strip(), (arguments, told)
        assert complaint in told.splitlines()[-1]


def test_what_cannot_be_written_is_told_and_the_mind_is_kept(of_numbers, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(of_numbers, "--prompt=3 1 4", f"--save={tmp_path / 'mind'}"),
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert b"error: cannot write to standard output: No space left" in done.stderr
    assert Session.load(tmp_path / "mind", load_params(of_numbers)[0]).position >= 3


@pytest.mark.slow
def test_streams_that_are_closed_are_no_failure_of_the_program(of_numbers):
    written = " ".join(command(of_numbers, "'--prompt=3 1 4'", "--max_tokens=3"))
    for closed, code in (("2>&-", 0), (">&-", 128 + signal.SIGPIPE), ("<&-", 0)):
        done = subprocess.run(
            f"exec {written} {closed}", shell=True, cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == code and b"Traceback" not in done.stderr, (closed, done)


def terminal(rows: int, columns: int) -> tuple[int, int]:
    """Our end and theirs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return ours, theirs


def test_the_live_line_has_the_size_of_its_own_terminal(capfd):
    """Whatever standard output is."""
    ours, theirs = terminal(rows=50, columns=132)
    with open(theirs, "w") as stream:
        line = LiveLine(stream)
        line.show("x" * 200)
        shown = os.read(ours, 4096)
    assert b"\x1b[1;49r" in shown and b"\x1b[50;1H" + b"x" * 132 + b"\x1b[K" in shown
    LiveLine(sys.stdout).close("done")
    assert capfd.readouterr().out == "done\n"


def test_a_reader_that_leaves_ends_it(of_numbers, tmp_path):
    """As `| head` does: the mind is saved, the terminal given back, without a complaint."""
    ours, theirs = terminal(rows=20, columns=100)
    path = tmp_path / "mind"
    flags = ("--prompt=3 1 4", "--max_tokens=100000000", "--temperature=5", f"--save={path}")
    process = subprocess.Popen(
        command(of_numbers, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    assert process.stdout.read(1)
    process.stdout.close()
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(ours, 4096):
            shown += piece
    assert process.wait(60) == 128 + signal.SIGPIPE
    rest = shown[shown.rindex(b"\x1b[r") + len(b"\x1b[r\x1b8") :].decode()
    assert LINE.fullmatch(rest.strip()), rest
    assert Session.load(path, load_params(of_numbers)[0]).position > 3


@pytest.mark.slow
def test_a_terminal_has_a_live_line_and_is_given_back(of_numbers, tmp_path):
    """The line keeps the last row, below the text; Ctrl-C ends the stream and saves."""
    ours, theirs = terminal(rows=20, columns=100)
    path = tmp_path / "mind"
    flags = ("--prompt=3 1 4", "--max_tokens=100000000", "--temperature=5", f"--save={path}")
    process = subprocess.Popen(
        command(of_numbers, *flags), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while shown.count(b"ms per token") < 3:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    while process.poll() is None or b"\x1b[r" not in shown:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
    assert process.wait(60) == 128 + signal.SIGINT
    assert shown.count(b"\x1b[1;19r") == 1 and b"\x1b[20;1H" in shown
    assert shown.rindex(b"\x1b[r") > shown.rindex(b"\x1b[1;19r")
    assert LINE.search(shown[shown.rindex(b"\x1b[r") :].decode(errors="replace"))
    assert Session.load(path, load_params(of_numbers)[0]).position > 5
