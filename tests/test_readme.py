"""What README shows runs as printed."""

import pathlib
import re

import numpy as np

REPOSITORY = pathlib.Path(__file__).parent.parent
README = REPOSITORY / "README.md"


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_its_results_are_those_of_the_committed_report():
    text = README.read_text()
    (table,) = re.findall(r"(?:^\|.*hops.*\|\n)(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert table in (REPOSITORY / "experiments/results/depo_small/report.md").read_text()


def test_its_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_ten_lines_run_and_leave_a_mind():
    """Three windows, the last half full, sleep into fast weights; the window is empty."""
    scope = {}
    exec(code_blocks("python")[0], scope)
    state, config = scope["state"], scope["config"]
    assert scope["logits"].shape == (2, 60 - 2 * config.window, config.vocab_size)
    assert np.abs(state.fast_weights["core"][1]).max() > 0
    np.testing.assert_array_equal(state.window.length_B, [0, 0])


def test_a_mind_lives_and_an_engine_holds_many(tmp_path, monkeypatch, capsys):
    """The lines go on from the ten, one after another."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in code_blocks("python")[:3]:
        exec(block, scope)
    assert scope["session"].position == 105 and scope["session"].sleeps == 4
    assert scope["other"].position == 105 and scope["other"].sampling.seed == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 51 and lines[-1].startswith("Ended(key=0, reason='length'")


def test_the_example_experiment_is_a_valid_config():
    from launch.common import cli

    scope = {}
    exec(code_blocks("python")[3], scope)
    config = cli.experiment_config(scope["get_config"]())
    assert (config.model.window, config.model.vocab_size) == (8, 12)
