"""A person's way from text to a held-out loss, and what is said when the text is not right."""

import json
import os
import sys

import corpora
import pytest
import waiting

from experiments import stdlib_corpus


def run(program, *arguments, cwd=waiting.ROOT):
    return waiting.run(
        sys.executable, "-m", program, *arguments, cwd=cwd, env=os.environ | {"XLA_FLAGS": ""}
    )


@pytest.fixture
def flags(tmp_path):
    """A tiny run on a tiny corpus."""
    corpora.text_config(tmp_path)
    return [
        "--config=experiments/text_small.py",
        f"--config.task.train_files=('{tmp_path}/train.jsonl',)",
        f"--config.task.test_files=('{tmp_path}/test.jsonl',)",
        *("--config.task.window=16", "--config.task.windows=2", "--config.model.pattern=G"),
        *("--config.model.d_model=8", "--config.model.passes=1", "--config.training.steps=4"),
        *("--config.training.warmup_steps=1", "--config.training.batch_size=2"),
        *("--config.evaluation.passes=(1,)", "--config.evaluation.streaming_examples=2"),
    ]


def test_a_bad_corpus_is_named_before_anything_compiles(flags, tmp_path):
    """Exit code 2, one line, and no workdir is made."""
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "cut sho')
    done = run("launch.train", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "task.train_files: " in done.stderr and "line 33, is no JSON" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_text_that_is_trained_on_is_refused_before_it_is_tokenised(flags, tmp_path):
    """Exit code 2, one line, and nothing is written."""
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "test.jsonl").read_bytes())
    more = f"--config.task.train_files=('{tmp_path}/c*.jsonl',)"
    done = run("launch.tokenize", *flags, more, f"--out={tmp_path / 'tokens'}")
    assert done.returncode == 2
    assert "error: task.test_files: " in done.stderr and "so it is not held out" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "tokens").exists()


@pytest.mark.slow
def test_text_is_not_replaced_by_its_tokens(flags, tmp_path):
    path = tmp_path / "train.array_record"
    corpora.write_records(path, corpora.TEXTS["train"])
    content = path.read_bytes()
    given = f"--config.task.train_files=('{path}',)"
    done = run("launch.tokenize", *flags, given, f"--out={tmp_path}")
    assert done.returncode == 2 and "is text that would be replaced there" in done.stderr
    assert path.read_bytes() == content


@pytest.mark.slow
def test_from_text_to_a_held_out_loss(flags, tmp_path):
    """Tokenise, train, evaluate; tokens and text train alike, bit for bit; and a run does not go
    on with other text."""
    text, tokens = tmp_path / "of_text", tmp_path / "of_tokens"
    done = run("launch.train", *flags, f"--workdir={text}")
    assert done.returncode == 0, done.stderr
    done = run("launch.tokenize", *flags, f"--out={tmp_path / 'tokens'}")
    assert done.returncode == 0, done.stderr
    printed = [line.strip().replace('"', "") for line in done.stdout.splitlines()]
    of_tokens = [line for line in printed if line.startswith("--config.task.")]
    others = [flag for flag in flags if "_files=" not in flag]
    done = run("launch.train", *others, *of_tokens, f"--workdir={tokens}")
    assert done.returncode == 0, done.stderr
    assert (text / "metrics.jsonl").read_bytes() == (tokens / "metrics.jsonl").read_bytes()

    moved = (tmp_path / "test.jsonl").rename(tmp_path / "moved.jsonl")
    done = run("launch.evaluate", f"--workdir={text}", "--nolatency")
    assert done.returncode == 2 and "name its new path with --test_files" in done.stderr
    assert done.stderr.count("\n") == 1
    named = f"--test_files={moved}"
    done = run("launch.evaluate", f"--workdir={text}", "--nolatency", named)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "100.00% equal predictions" in done.stdout
    done = run("launch.report", f"--workdir={text}", f"--out={tmp_path / 'report'}")
    assert done.returncode == 2
    assert "is a run on text: the report tells of answers by depth" in done.stderr

    moved.rename(tmp_path / "test.jsonl")
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    done = run("launch.train", *flags, f"--workdir={text}")
    assert done.returncode == 2
    assert "holds a run with task.fingerprints='" in done.stderr and "test.jsonl: " in done.stderr
    done = run("launch.evaluate", f"--workdir={text}", "--again")
    assert done.returncode == 2
    assert "the text is not what this run was made with" in done.stderr


def test_only_text_is_tokenised(tmp_path):
    done = run("launch.tokenize", "--config=experiments/depo_small.py", f"--out={tmp_path}")
    assert done.returncode == 2
    assert "task.name: 'depo' has no text to tokenise" in done.stderr


def test_the_corpus_of_a_library_is_its_docstrings(tmp_path):
    """In the order of the modules' names; what is short or not the library's own is left out."""
    long = "Long words. " * 40
    for name in ("b", "a", "site-packages/c", "short"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        doc = "Short." if name == "short" else f"Module. {long.strip()}"
        path.write_text(f'"""{doc}"""\n\n\ndef f():\n    """What f does."""\n')
    found = list(stdlib_corpus.documents(tmp_path))
    assert found == [(name, f"Module. {long.strip()}\n\nf: What f does.") for name in ("a", "b")]


@pytest.mark.slow
def test_the_standard_library_makes_a_corpus(tmp_path):
    done = run("experiments.stdlib_corpus", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        split: list(map(json.loads, (tmp_path / f"{split}.jsonl").read_text().splitlines()))
        for split in ("train", "test")
    }
    modules = {split: {row["module"] for row in rows[split]} for split in rows}
    assert len(modules["train"]) > 200 and 10 < len(modules["test"]) < 60
    assert not modules["train"] & modules["test"]
