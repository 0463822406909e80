"""A small corpus, written once."""

import corpora
import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The config of a text task whose files are there."""
    return corpora.text_config(tmp_path_factory.mktemp("corpus"))
