"""Tokenises the text of an experiment once, for corpora that are larger than memory.

    python -m launch.tokenize --config=experiments/text_small.py --out=data/tokens

DIR/train.array_record and DIR/test.array_record then take the place of the files of text.
"""

import pathlib
from collections.abc import Iterable

from absl import flags

from launch.common import cli
from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.tasks import TextConfig
from sleepnet.tasks.text import task_tokenizer

_CONFIG = cli.define_config()
_OUT = cli.define_path("out", None, "Folder for the files of tokens.", required=True)
flags.mark_flag_as_required("config")


def main(_):
    task = cli.task_config(_CONFIG.value)
    if not isinstance(task, TextConfig):
        raise ConfigError(f"task.name: {task.name!r} has no text to tokenise; allowed: text")
    from sleepnet.tasks import corpus  # slow to import, and bad values do not need it

    known = task_tokenizer(task)
    files = {
        split: corpus.text_sources(f"{split}_files", patterns)
        for split, patterns in (("train", task.train_files), ("test", task.test_files))
    }
    corpus.check_held_out(files["train"], files["test"])
    out = {split: _OUT.value / f"{split}.array_record" for split in files}
    _check_kept(out.values(), [source.path for sources in files.values() for source in sources])
    for path in out.values():
        storage.prepare_file(path)
    for split, sources in files.items():
        path = out[split]
        index = corpus.tokenize(f"{split}_files", sources, path, task.text_field, known)
        print(
            f"{path}: {index.documents} documents, {index.tokens} tokens of "
            f'{index.text_bytes} bytes\n    --config.task.{split}_files="{(str(path),)}"'
        )
        if index.lost_bytes:
            print(
                f"    {index.lost_bytes} bytes are lost: the tokens do not determine them, so no "
                f"bits per byte will be stated"
            )


def _check_kept(written: Iterable[pathlib.Path], read: Iterable[pathlib.Path]):
    """Raises ConfigError if a file of text would be replaced by one of tokens."""
    for path in read:
        if path.resolve() in {new.resolve() for new in written}:
            raise ConfigError(f"--out={_OUT.value}: {path} is text that would be replaced there")


if __name__ == "__main__":
    cli.run(main)
