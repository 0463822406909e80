"""Which files a corpus reads: those that were meant, each once, and none that cannot be read."""

import dataclasses
import json
import os
import pathlib
import socket

import corpora
import grain
import pytest

from sleepnet import tasks
from sleepnet.config import ConfigError
from sleepnet.tasks import corpus, records
from sleepnet.tasks.text_files import find_files
from sleepnet.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with files of text."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.jsonl", "b.jsonl", "d/test.jsonl", "d/train.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        corpora.write_jsonl(tmp_path / name, corpora.documents(10 + i, [30, 40]))
    return tmp_path


def make(text, **files):
    return tasks.make(dataclasses.replace(text, **files))


def bytes_of(*paths):
    """A corpus of some files of text."""
    return corpus.open_corpus("train_files", paths, "text", load_tokenizer("bytes"))


def tokens_of(*paths, name="tokens.array_record"):
    """A file of the bytes of some files of text."""
    sources = corpus.text_sources("files", paths)
    corpus.tokenize("files", sources, pathlib.Path(name), "text", load_tokenizer("bytes"))
    return name


def test_files_that_are_not_there_or_of_another_kind_are_named(text, folder):
    (folder / "train.txt").write_text("a")
    for files, message in (
        ((), "task.test_files: it names no file"),
        (("c.jsonl",), r"no file matches 'c\.jsonl'; the nearest is [ab]\.jsonl"),
        (("none/x.jsonl",), r"there is no folder none"),
        (("train.txt",), r"train\.txt is of an unknown kind; allowed: \.jsonl, \.array_record"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(text, test_files=files)


@pytest.mark.parametrize("name", ["what?.jsonl", "[ab].jsonl", "*.jsonl"])
def test_a_path_that_exists_is_no_pattern(folder, name):
    """And one that does not exist is."""
    corpora.write_jsonl(folder / "whats.jsonl", ["another file"])
    pattern = [str(path) for path in find_files([name])]
    assert pattern and name not in pattern
    corpora.write_jsonl(folder / name, ["this file"])
    assert find_files([name]) == [pathlib.Path(name)]


@pytest.mark.parametrize(
    "other", ["a.jsonl", "*.jsonl", "d/../a.jsonl", "./a.jsonl", "link.jsonl", "hard.jsonl"]
)
def test_a_file_is_named_once_however_it_is_spelled(folder, other):
    (folder / "link.jsonl").symlink_to("a.jsonl")
    os.link("a.jsonl", "hard.jsonl")
    with pytest.raises(ConfigError, match=r"a\.jsonl.* named twice, by 'a\.jsonl' and"):
        find_files(["a.jsonl", other])


def test_a_copy_counts_twice_in_training(text, folder):
    (folder / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    once, twice = bytes_of("a.jsonl"), bytes_of("a.jsonl", "b.jsonl")
    assert twice.text_bytes == 2 * once.text_bytes
    make(text, train_files=("a.jsonl", "b.jsonl"))


def copied(folder):
    (folder / "copy.jsonl").write_bytes((folder / "d/test.jsonl").read_bytes())
    return "copy.jsonl"


def linked(folder):
    (folder / "link.jsonl").symlink_to("d/test.jsonl")
    return "link.jsonl"


def rewritten(folder):
    """The same documents in other bytes."""
    rows = map(json.loads, (folder / "d/test.jsonl").read_text().splitlines())
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": r["text"]}) + "\n" for r in rows)
    )
    return "rows.jsonl"


SAME_TEXT = {
    "a pattern": lambda _: "d/te*.jsonl",
    "another spelling": lambda _: "d/../d/test.jsonl",
    "absolute": lambda folder: str(folder / "d/test.jsonl"),
    "a link": linked,
    "a copy": copied,
    "other bytes": rewritten,
    "tokens": lambda _: tokens_of("d/test.jsonl"),
    "tokens of several files": lambda _: tokens_of("a.jsonl", "d/test.jsonl"),
}


@pytest.mark.parametrize("name_it", SAME_TEXT.values(), ids=SAME_TEXT)
def test_test_text_that_is_trained_on_is_refused(text, folder, name_it):
    """Whichever way round, with the names of both files."""
    other = name_it(folder)
    shown = "d/test.jsonl" if "*" in other else other
    for train, test in (("d/test.jsonl", other), (other, "d/test.jsonl")):
        with pytest.raises(ConfigError, match=r"task\.test_files: \S+ holds text of") as raised:
            make(text, train_files=("d/train.jsonl", train), test_files=("b.jsonl", test))
        assert "d/test.jsonl" in str(raised.value) and shown in str(raised.value)
    make(text, train_files=("d/train.jsonl",), test_files=("b.jsonl",))


def test_files_of_tokens_share_what_they_were_made_from(text, folder):
    """Also two of them, and before anything is tokenised."""
    train = tokens_of("a.jsonl", "b.jsonl", name="train.array_record")
    test = tokens_of("d/test.jsonl", "b.jsonl", name="test.array_record")
    with pytest.raises(ConfigError, match=r"test\.array_record holds text of train\.array_record"):
        make(text, train_files=(train,), test_files=(test,))
    sources = [corpus.text_sources("files", names) for names in (["a.jsonl"], ["?.jsonl"])]
    with pytest.raises(ConfigError, match=r"a\.jsonl holds text of a\.jsonl"):
        corpus.check_held_out(*sources)


def test_empty_files_are_no_text_that_is_shared(text, folder):
    for name in ("none.jsonl", "nothing.jsonl"):
        (folder / name).touch()
    make(text, train_files=("a.jsonl", "none.jsonl"), test_files=("b.jsonl", "nothing.jsonl"))
    train, test = (tokens_of(f"{x}.jsonl", f"no{y}.jsonl", name=f"{x}.array_record")
                   for x, y in (("a", "ne"), ("b", "thing")))  # fmt: skip
    make(text, train_files=(train,), test_files=(test,))


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


BAD = {
    "folder": ("x.jsonl", lambda path: path.mkdir(), r"is a folder; name .*x\.jsonl/\*\.jsonl"),
    "dangling link": ("x.jsonl", lambda path: path.symlink_to("gone"), "No such file"),
    "circular link": ("x.jsonl", lambda path: path.symlink_to(path.name), "symbolic links"),
    "pipe": ("x.jsonl", os.mkfifo, "it is a pipe"),
    "pipe of records": ("x.array_record", os.mkfifo, "it is a pipe"),
    "socket": ("x.jsonl", a_socket, "it is a socket"),
    "device": ("x.jsonl", lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "no UTF-8": ("x.jsonl", lambda p: p.write_bytes(b'{"text": "\xff"}\n'), "line 1, is no JSON"),
    "NUL bytes": ("x.jsonl", lambda p: p.write_bytes(b"\0" * 64), "line 1, is no JSON"),
    "UTF-16": ("x.jsonl", lambda p: p.write_text("{}\n", "utf-16"), "line 1, is no JSON"),
    "deep JSON": ("x.jsonl", lambda p: p.write_text("[" * 10**5), "is no JSON: .* too deeply"),
    "long number": ("x.jsonl", lambda p: p.write_text("9" * 10**4), "is no JSON"),
    "no records": ("x.array_record", lambda p: p.write_bytes(b"\0" * 70000), "is damaged"),
}


@pytest.mark.parametrize(("name", "write", "message"), BAD.values(), ids=BAD)
def test_whatever_a_file_is_it_is_named(text, folder, name, write, message):
    """To those who read text, at once, and to those who tokenise it once and for all."""
    write(folder / name)
    expected = rf"task\.train_files: x\.{name[2:]}.*{message}"
    with pytest.raises(ConfigError, match=expected):
        make(text, train_files=(name,))
    with pytest.raises(ConfigError, match=expected):
        sources = corpus.text_sources("train_files", (name,))
        corpus.tokenize(
            "train_files", sources, folder / "out.array_record", "text", load_tokenizer("bytes")
        )


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   FileNotFoundError(2, "No such file")])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.array_record"])
def test_a_file_that_cannot_be_opened_is_named(text, folder, monkeypatch, error, name):
    """As one whose reader may not, or one that goes between being found and being opened."""
    tokens_of("a.jsonl", name="a.array_record")

    def refuse(path, *_, **__):
        raise error

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    monkeypatch.setattr(grain.sources, "ArrayRecordDataSource", refuse)
    with pytest.raises(ConfigError, match=rf"task\.train_files: {name}.*{error.strerror}"):
        make(text, train_files=(name,))


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match="the folder d cannot be read: Permission denied"):
        find_files(["d/none.jsonl"])


def test_a_mark_of_byte_order_is_no_text(folder):
    """Some programs begin a file with it; joined files have it in their middle."""
    marked = [b"\xef\xbb\xbf" + line for line in (folder / "a.jsonl").read_bytes().splitlines(True)]
    (folder / "marked.jsonl").write_bytes(b"".join([*marked, b"\xef\xbb\xbf\n"]))
    plain, other = map(bytes_of, ("a.jsonl", "marked.jsonl"))
    assert other.text_bytes == plain.text_bytes
    assert (other.read(0, 90) == plain.read(0, 90)).all()


@pytest.mark.parametrize("of", ["text", "tokens"])
def test_damage_within_a_file_of_records_is_named(text, folder, of, monkeypatch):
    """Of text where it is opened, of tokens where the block is read."""
    path = folder / "x.array_record"
    monkeypatch.setattr(records, "_BLOCK", 50)
    tokens_of("a.jsonl", name=path.name)
    if of == "text":
        corpora.write_records(path, corpora.documents(1, [30] * 4))
    whole = bytearray(path.read_bytes())
    whole[150] ^= 0xFF  # within the first of several records
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"x\.array_record is damaged, .*hash mismatch"):
        task = make(text, train_files=(path.name,))
        for index in range(task.packing("train").rows):
            task.example("train", index)
