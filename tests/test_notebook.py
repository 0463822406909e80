"""The quickstart notebook runs from top to bottom, and as committed it shows its results."""

import pathlib
import re

import nbformat
import pytest
import waiting

REPOSITORY = pathlib.Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "experiments" / "notebooks" / "quickstart.ipynb"
# A home, a temporary folder or a drive: somebody's machine.
MACHINE_PATH = re.compile(r"/(home|root|Users|tmp|work|content|mnt|opt|usr|var)/|\b[A-Z]:\\")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(monkeypatch, tmp_path):
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    class ThisInterpreter(AsyncKernelManager):
        """Without folders to search, "python3" is the kernel of this very interpreter."""

        def __init__(self, **kwargs):
            super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **kwargs)

    monkeypatch.setenv("SLEEPNET_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("XLA_FLAGS", "")  # the tests' eight virtual devices only cost time here
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile of the user's
    notebook = read()
    NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        kernel_name="python3",
        timeout=waiting.PATIENCE,
        startup_timeout=waiting.PATIENCE,
        resources={"metadata": {"path": str(REPOSITORY)}},
    ).execute()  # raises what a cell raises

    assert len(figures(notebook)) == len(figures(read())) == 4
    assert not [o for cell in code_cells(notebook) for o in cell.outputs if "error" in o.values()]
    assert "stderr" not in [o.get("name") for cell in code_cells(notebook) for o in cell.outputs]


def test_the_committed_notebook_was_executed_in_order():
    counts = [cell.execution_count for cell in code_cells(read())]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for cell in code_cells(read()) for output in cell.outputs}
    assert kinds == {"stream", "display_data"}


def test_the_committed_notebook_names_no_machine():
    notebook = read()
    assert set(notebook.metadata) == {"kernelspec"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        shown = [cell.source, *map(str, cell.get("outputs", []))]
        text = re.sub(r"https?://\S+", "", " ".join(shown))
        text = re.sub(r"'image/png': '[^']*'", "", text)
        assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)


def test_the_committed_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 600_000


def test_the_badge_opens_this_file():
    path = NOTEBOOK.relative_to(REPOSITORY).as_posix()
    address = f"https://colab.research.google.com/github/sleepnet/sleepnet/blob/main/{path}"
    assert f"({address})" in read().cells[0].source
