"""Tokenises the text of an experiment once, for corpora that are larger than memory.

    python -m launch.tokenize --config=experiments/text_small.py --out=data/tokens

DIR/train.array_record and DIR/test.array_record then take the place of the files of text.
"""

from absl import flags

from launch import cli
from sleepnet import storage
from sleepnet.config import ConfigError, TextConfig
from sleepnet.tokenizer import load_tokenizer

_CONFIG = cli.define_config()
_OUT = cli.define_path("out", None, "Folder for the files of tokens.", required=True)
flags.mark_flag_as_required("config")


def main(_):
    task = cli.task_config(_CONFIG.value)
    if not isinstance(task, TextConfig):
        raise ConfigError(f"task.name: {task.name!r} has no text to tokenise; allowed: text")
    from sleepnet.tasks import corpus  # slow to import, and bad values do not need it

    known = load_tokenizer(task.tokenizer, field="task.tokenizer")
    files = {
        split: corpus.find_files(f"{split}_files", patterns)
        for split, patterns in (("train", task.train_files), ("test", task.test_files))
    }
    out = _OUT.value
    storage.prepare_folder(out)
    for split, paths in files.items():
        path = out / f"{split}.array_record"
        index = corpus.tokenize(paths, path, task.text_field, known)
        print(
            f"{path}: {index.documents} documents, {index.tokens} tokens of "
            f"{index.text_bytes} bytes\n    --config.task.{split}_files=\"('{path}',)\""
        )


if __name__ == "__main__":
    cli.run(main)
