"""A person's way from a trained run to text: prompts, a live line, minds that go on."""

import fcntl
import os
import pathlib
import pty
import re
import shlex
import signal
import struct
import sys
import termios

import corpora
import jax
import pytest
import waiting

from launch.common.live_line import LiveLine, printable
from sleepnet import Sampling, Session, UntilStill, tasks
from sleepnet.config import ModelConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.tokenizer import load_tokenizer
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.step import make_init
from sleepnet.training.workdir import claim_workdir, load_config, load_params

PROMPT = "dreams and café"  # a window of 16 bytes
LINE = re.compile(
    r"(\d+) tokens  (\d+) in its life  (\d+) sleeps  [\d.]+ ms per token  ([\d,]+) bytes of state"
)


def command(workdir, *arguments):
    return [sys.executable, "-m", "launch.generate", f"--workdir={workdir}", *arguments]


def run(workdir, *arguments, prompt=PROMPT, env=None, encoding="utf-8"):
    """Its exit code, standard output and standard error."""
    done = waiting.run(
        *command(workdir, *arguments),
        input=prompt, env=os.environ | (env or {}), encoding=encoding,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def workdir_of(folder, task, vocab_size) -> pathlib.Path:
    """A run that was never trained, with a checkpoint of step 0."""
    model = ModelConfig(
        vocab_size=vocab_size, pattern="G", d_model=8, num_heads=1, window=task.window, passes=2
    )
    config = ExperimentConfig(model=model, task=task)
    claim_workdir(config, folder)
    with jax.numpy_dtype_promotion("standard"):
        Checkpoints(folder).save(make_init(config, None)(), wait=True)
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
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_the_output_lacks_are_escaped(of_text, encoding, tmp_path):
    """And the stream goes on to its end; the prompt is not blamed."""
    code, out, told = run(
        of_text, "--max_tokens=40", f"--save={tmp_path / 'mind'}",
        env={"PYTHONIOENCODING": encoding}, encoding=encoding,
    )  # fmt: skip
    one = session_of(of_text, tokenizer="bytes")
    one.feed(PROMPT)
    written = "".join(one.generate_text(40)) + "\n"
    assert "�" in written and code == 0, told
    assert out == written.encode(encoding, "backslashreplace").decode(encoding)
    assert Session.load(tmp_path / "mind", one._params.tree).position == one.position


@pytest.mark.slow
def test_a_terminal_gets_no_control_characters_and_a_file_gets_all(of_text):
    arguments = ("--prompt=a", "--max_tokens=300", "--temperature=3")
    _, raw, _ = run(of_text, *arguments)
    ours, theirs = terminal(rows=20, columns=100)
    mode = termios.tcgetattr(theirs)
    mode[1] &= ~termios.OPOST  # newlines come as they are written
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    shown = waiting.Reader(ours)
    program = waiting.Program(*command(of_text, *arguments), stdout=theirs)
    os.close(theirs)
    assert program.end().returncode == 0
    escaped = shown.to_the_end()
    assert re.search(r"[\x00-\x08\x0b-\x1f]", raw) and escaped == printable(raw)


@pytest.mark.slow
def test_a_prompt_file_has_no_mark_and_no_last_newline(of_text, tmp_path):
    """Standard input neither, also where it is asked for by name."""
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\n")
    _, plain, _ = run(of_text, f"--prompt={PROMPT}", "--max_tokens=20")
    for flag, prompt in ((f"--prompt_file={tmp_path / 'prompt'}", ""), ("--prompt_file=-", PROMPT)):
        assert run(of_text, flag, "--max_tokens=20", prompt=prompt + "\n")[1] == plain


def test_waiting_for_standard_input_is_told(of_numbers):
    """And Ctrl-C ends it."""
    ours, theirs = os.pipe()
    program = waiting.Program(*command(of_numbers, "--load=mind"), stdin=ours)
    told = program.errors.until("\n")
    assert told.startswith("waiting for the end of the prompt on standard input")
    assert "--prompt= goes on without" in told
    program.send(signal.SIGINT)
    assert program.end().returncode == 128 + signal.SIGINT
    os.close(ours)
    os.close(theirs)


@pytest.mark.slow
def test_a_prompt_is_read_by_the_runs_tokenizer_wherever_it_now_lies(tmp_path):
    """Special tokens in it are text, or what a flag says; and no other tokenizer is taken."""
    path = pathlib.Path(corpora.write_tokenizer(tmp_path / "tokenizer.json", special=["<|end|>"]))
    task = tasks.make(corpora.text_config(tmp_path, tokenizer=str(path)))
    workdir = workdir_of(tmp_path / "run", task.config, task.vocab_size)
    moved = path.rename(tmp_path / "moved.json")
    corpora.write_tokenizer(path.with_name("other.json"))
    prompt = ["--max_tokens=0", "--prompt= dreams<|end|>"]
    for arguments, complaint in (
        ([], "if it has moved, name its new path with --tokenizer"),
        ([f"--tokenizer={path.with_name('other.json')}"], "and this run was made with sha256"),
    ):
        code, _, told = run(workdir, *prompt, *arguments)
        assert code == 2 and complaint in told and told.count("\n") == 1
    for how in ("text", "control"):
        given = [f"--tokenizer={moved}"] + ([f"--special_tokens={how}"] if how != "text" else [])
        code, _, told = run(workdir, *prompt, *given)
        assert code == 0, told
        (ids,) = load_tokenizer(str(moved), special_tokens=how).encode([" dreams<|end|>"])
        assert int(LINE.fullmatch(told.strip())[1]) == len(ids)


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


@pytest.mark.parametrize("tokens", [200, 0], ids=["the first token", "the last newline"])
def test_what_cannot_be_written_is_told_and_the_mind_is_kept(of_numbers, tmp_path, tokens):
    """In a line, after the one that says how far it came."""
    with open("/dev/full", "w") as full:
        flags = ("--prompt=3 1 4", f"--save={tmp_path / 'mind'}", f"--max_tokens={tokens}")
        done = waiting.run(*command(of_numbers, *flags), stdout=full)
    assert done.returncode == 2
    line, complaint = done.stderr.splitlines()
    assert LINE.fullmatch(line) and complaint.startswith("error: cannot write to standard output: ")
    assert Session.load(tmp_path / "mind", load_params(of_numbers)[0]).position >= 3


@pytest.mark.slow
def test_streams_that_are_closed_are_no_failure_of_the_program(of_numbers):
    written = shlex.join(command(of_numbers, "--prompt=3 1 4", "--max_tokens=3"))
    for closed, code in (("2>&-", 0), (">&-", 128 + signal.SIGPIPE), ("<&-", 0)):
        done = waiting.run("sh", "-c", f"exec {written} {closed}")
        assert done.returncode == code and "Traceback" not in done.stderr, (closed, done)


@pytest.mark.parametrize("stdin", ["<&-", "0>/dev/null"], ids=["closed", "not to be read"])
def test_standard_input_that_cannot_be_read_is_an_empty_prompt_or_told(of_numbers, tmp_path, stdin):
    """`nohup` opens it for writing alone. A mind that is loaded needs no prompt."""
    one = session_of(of_numbers)
    one.feed([3, 1, 4])
    one.save(tmp_path / "mind")
    for flags, code in (
        ("", 2),
        (f"--load={tmp_path / 'mind'} --prompt_file=-", 2),
        (f"--load={tmp_path / 'mind'} --max_tokens=0", 0),
    ):
        written = f"exec {shlex.join(command(of_numbers))} {flags} {stdin}"
        done = waiting.run("sh", "-c", written)
        assert done.returncode == code and done.stderr.count("\n") == 1, done
        if code:
            assert re.match("error: standard input cannot be read .* --prompt=", done.stderr)
        else:
            assert LINE.fullmatch(done.stderr.strip())[2] == "3"


def terminal(rows: int, columns: int) -> tuple[waiting.Reader, int]:
    """What is shown on it, and the end that programs write to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return waiting.Reader(ours), theirs


def test_the_live_line_has_the_size_of_its_own_terminal(capfd):
    """Whatever standard output is."""
    screen, theirs = terminal(rows=50, columns=132)
    with open(theirs, "w") as stream:
        line = LiveLine(stream)
        line.show("x" * 200)
    shown = screen.to_the_end()
    assert "\x1b[1;49r" in shown and "\x1b[50;1H" + "x" * 132 + "\x1b[K" in shown
    LiveLine(sys.stdout).close("done")
    assert capfd.readouterr().out == "done\n"


def test_a_reader_that_leaves_ends_it(of_numbers, tmp_path):
    """As `| head` does: the mind is saved, the terminal given back, without a complaint."""
    screen, theirs = terminal(rows=20, columns=100)
    path = tmp_path / "mind"
    flags = ("--prompt=3 1 4", "--max_tokens=100000000", "--temperature=5", f"--save={path}")
    written = f"{shlex.join(command(of_numbers, *flags))} | head -c 1; exit ${{PIPESTATUS[0]}}"
    program = waiting.Program("bash", "-c", written, stderr=theirs)
    os.close(theirs)
    assert program.end().returncode == 128 + signal.SIGPIPE
    shown = screen.to_the_end()
    rest = shown[shown.rindex("\x1b[r") + len("\x1b[r\x1b8") :]
    assert LINE.fullmatch(rest.strip()), rest
    assert Session.load(path, load_params(of_numbers)[0]).position > 3


@pytest.mark.slow
def test_a_terminal_has_a_live_line_and_is_given_back(of_numbers, tmp_path):
    """The line keeps the last row, below the text; Ctrl-C ends the stream and saves."""
    screen, theirs = terminal(rows=20, columns=100)
    path = tmp_path / "mind"
    flags = ("--prompt=3 1 4", "--max_tokens=100000000", "--temperature=5", f"--save={path}")
    program = waiting.Program(
        *command(of_numbers, *flags), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    screen.until("(ms per token.*){3}")
    program.send(signal.SIGINT)
    assert program.end().returncode == 128 + signal.SIGINT
    shown = screen.to_the_end()
    assert shown.count("\x1b[1;19r") == 1 and "\x1b[20;1H" in shown
    assert shown.rindex("\x1b[r") > shown.rindex("\x1b[1;19r")
    assert LINE.search(shown[shown.rindex("\x1b[r") :])
    assert Session.load(path, load_params(of_numbers)[0]).position > 5
