"""Corpora: files of either kind are the same text, and a bad one is named."""

import dataclasses
import sys

import corpora
import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.config import ConfigError
from sleepnet.tasks import corpus, records
from sleepnet.tokenizer import load_tokenizer


def tokenized(config, folder, tokenizer="bytes"):
    """The config with files of tokens in place of text."""
    known = load_tokenizer(tokenizer)
    files = {}
    for what in ("train_files", "test_files"):
        path = folder / f"{what.removesuffix('_files')}.array_record"
        sources = corpus.text_sources(what, getattr(config, what))
        corpus.tokenize(what, sources, path, config.text_field, known)
        files[what] = (str(path),)
    return dataclasses.replace(config, tokenizer=tokenizer, **files)


def assert_same_batches(config, other):
    for split in ("train", "test"):
        drawn = [
            list(tasks.batches(tasks.make(c), split, 5, num_batches=9)) for c in (config, other)
        ]
        for one, two in zip(*drawn, strict=True):
            for a, b in zip(one, two, strict=True):
                np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_text_and_tokens_give_equal_batches(text, tmp_path, tokenizer):
    if tokenizer == "file":
        tokenizer = corpora.write_tokenizer(tmp_path / "tokenizer.json")
    config = dataclasses.replace(text, tokenizer=tokenizer)
    assert_same_batches(config, tokenized(config, tmp_path, tokenizer))


def test_records_of_text_and_lines_give_equal_batches(text, tmp_path):
    """And so does the same text in several files, by a glob or one by one."""
    lengths = [9, 4, 70, 1]
    texts = corpora.documents(3, lengths)
    whole = corpora.write_jsonl(tmp_path / "whole.jsonl", texts)
    corpora.write_jsonl(tmp_path / "part1.jsonl", texts[:1])
    corpora.write_records(tmp_path / "part2.array_record", texts[1:])
    one = dataclasses.replace(text, train_files=(whole,))
    assert_same_batches(one, dataclasses.replace(text, train_files=(str(tmp_path / "part*"),)))


def test_tokens_of_many_blocks_are_found_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(256, size=n).astype(np.uint8) for n in (1, 30, 6, 7, 14, 3)]
    records.write_tokens(
        tmp_path / "x.array_record",
        [records.Document(d, 0) for d in documents],
        tokenizer="t",
        dtype=np.dtype(np.uint8),
    )
    file = records.TokenFile(tmp_path / "x.array_record")
    stream = np.concatenate(documents)
    assert file.lengths_D.tolist() == [1, 30, 6, 7, 14, 3]
    for start in range(len(stream)):
        for stop in range(start + 1, len(stream) + 1):
            np.testing.assert_array_equal(file.read(start, stop), stream[start:stop])


def test_one_file_of_tokens_may_be_written_twice_at_once(tmp_path):
    """The one that ends last is there, whole; one that fails leaves nothing."""
    path = tmp_path / "x.array_record"

    def write(documents):
        records.write_tokens(path, documents, tokenizer="t", dtype=np.dtype(np.uint8))

    def disturbed(then):
        yield records.Document(np.full(9000, 1, np.uint8), 0)
        write([records.Document(np.full(20_000, 2, np.uint8), 0)])
        yield records.Document(np.full(9000, then, np.uint8), 0)

    write(disturbed(3))
    read = records.TokenFile(path).read(0, 18_000)
    np.testing.assert_array_equal(read, np.repeat([1, 3], 9000))
    with pytest.raises(ZeroDivisionError):
        write(records.Document(np.zeros(9000 // size, np.uint8), 0) for size in (1, 0))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_tokenizer_from_a_file_writes_the_text_whole(text, tmp_path):
    """Nothing is cut off, whatever the file asks for; the end of a document is a new token."""
    path = corpora.write_tokenizer(tmp_path / "tokenizer.json")
    import tokenizers

    task = tasks.make(dataclasses.replace(text, tokenizer=path))
    package = tokenizers.Tokenizer.from_file(path)
    end = package.get_vocab_size()
    assert (task.vocab_size, task.token_name(end)) == (end + 1, "<end of document>")
    assert len({task.token_name(token) for token in range(end + 1)}) == end + 1
    examples = [task.example("test", i) for i in range(task.packing("test").rows)]
    found = [piece for example in examples for piece in corpora.read_back(example)]
    package.no_truncation()
    encoded = [package.encode(text).ids for text in corpora.TEXTS["test"]]
    assert sorted(found) == sorted(corpora.cut(encoded, end, size=64))
    assert max(map(len, encoded)) > 64
    assert 0 < task.predicted_per_byte("test") < 0.5


LINES = {
    "no JSON": ('{"text": "a"}\n{"text": "b\n', r"train\.jsonl, line 2, is no JSON"),
    "no field": ('{"txt": "a"}\n', r"line 1: it has no field 'text', but txt; .*nearest is 'txt'"),
    "no object": ('["a"]\n', r"line 1: it must be a JSON object with the field 'text'"),
    "no text": ('\n{"text": 5}\n', r"line 2: 'text' is no text, but 5"),
    "no Unicode": ('{"text": "\\ud800"}\n', r"line 1: 'text' is no Unicode"),
    "nothing": ('{"text": ""}\n\n', r"there is no text in .*train\.jsonl"),
    "empty file": ("", r"there is no text in"),
}


@pytest.mark.parametrize(("content", "message"), LINES.values(), ids=LINES)
def test_a_bad_line_is_named(text, tmp_path, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"task.train_files: .*{message}"):
        tasks.make(dataclasses.replace(text, train_files=(str(tmp_path / "train.jsonl"),)))


def test_a_damaged_file_of_tokens_is_named(text, tmp_path):
    config = tokenized(text, tmp_path)
    path = tmp_path / "train.array_record"
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], b"\0" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"train\.array_record .*damaged"):
            tasks.make(config)


def test_tokens_of_another_tokenizer_are_refused(text, tmp_path):
    config = tokenized(text, tmp_path)
    path = corpora.write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"was tokenised by bytes, and task\.tokenizer is sha256"):
        tasks.make(dataclasses.replace(config, tokenizer=path))


def test_text_that_tokens_do_not_determine_is_counted(text, tmp_path):
    """In text and in files of tokens alike; also of documents of which no token is left."""
    tokenizer = corpora.write_letters(tmp_path / "letters.json", "ab")
    path = corpora.write_jsonl(tmp_path / "x.jsonl", ["aé" * 1000, "ab", "日"])
    other = corpora.write_jsonl(tmp_path / "y.jsonl", ["ab", "ba"])
    config = dataclasses.replace(
        text, tokenizer=tokenizer, train_files=(other,), test_files=(path,)
    )
    for made in map(tasks.make, (config, tokenized(config, tmp_path, tokenizer))):
        assert (made.lost_bytes("train"), made.lost_bytes("test")) == (0, 2003)
        assert made.predicted_per_byte("test") == 1002 / 3005


def test_files_of_tokens_from_before_they_were_counted_do_not_tell(text, tmp_path, monkeypatch):
    """But of bytes nothing is ever lost; and what they were made from is not known."""
    old = records.Index

    def without(**fields):
        return old(**fields | {"lost_bytes": None, "sources": ()})

    monkeypatch.setattr(records, "Index", without)
    path = corpora.write_letters(tmp_path / "letters.json", "ab")
    for tokenizer, known in ((path, None), ("bytes", 0)):
        task = tasks.make(tokenized(text, tmp_path, tokenizer))
        assert task.lost_bytes("test") == known


def test_how_special_tokens_are_read_is_the_tasks_choice(text, tmp_path):
    """In documents; and files of tokens are of one choice."""
    path = corpora.write_tokenizer(tmp_path / "tokenizer.json", special=["<|end|>"])
    file = corpora.write_jsonl(tmp_path / "x.jsonl", ["dreams<|end|> of"])
    config = dataclasses.replace(text, tokenizer=path, test_files=(file,))
    control = dataclasses.replace(config, special_tokens="control")
    held_out = {}
    for how, chosen in (("text", config), ("control", control)):
        task = tasks.make(chosen)
        tokens_WL = task.example("test", 0).tokens_WL
        held_out[how] = "<|end|>" in {task.token_name(token) for token in tokens_WL.flat}
    assert held_out == {"text": False, "control": True}
    of_tokens = tokenized(config, tmp_path, path)
    tasks.make(of_tokens)
    with pytest.raises(
        ConfigError, match=r"tokens as text, and .* set task\.tokenizer and task\.sp"
    ):
        tasks.make(dataclasses.replace(of_tokens, special_tokens="control"))


def test_text_that_is_too_large_for_memory_names_the_command(text, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "MOST_TEXT_BYTES", 100)
    path = corpora.write_jsonl(tmp_path / "large.jsonl", corpora.documents(0, [100]))
    with pytest.raises(ConfigError, match=r"large\.jsonl has .* python -m launch\.tokenize"):
        tasks.make(dataclasses.replace(text, train_files=(path,)))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": {"type": "BPE"'])
def test_a_damaged_tokenizer_is_named(text, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"task\.tokenizer: .*tokenizer\.json is damaged"):
        tasks.make(dataclasses.replace(text, tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_tokenizer_that_is_not_there_is_named(text, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .*allowed: 'bytes', or the path"):
        tasks.make(dataclasses.replace(text, tokenizer=str(tmp_path / "none.json")))


def test_a_missing_package_names_what_to_install(text, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("anything")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'sleepnet\[text\]'"):
        tasks.make(dataclasses.replace(text, tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_token_beyond_the_vocabulary_is_named_in_the_batch(text, tmp_path):
    """As check_batch does for every task."""
    file = tmp_path / "bad.array_record"
    records.write_tokens(
        file,
        [records.Document(np.array([1, 999, 2]), 3)],
        tokenizer="bytes",
        dtype=np.dtype(np.uint16),
    )
    task = tasks.make(dataclasses.replace(text, train_files=(str(file),)))
    with pytest.raises(ValueError, match=r"token 999 at \(0, 0, 1\) lies outside 0\.\.256"):
        next(tasks.batches(task, "train", 1, num_batches=1))
