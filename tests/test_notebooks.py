# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, with STVDM_TINY=1 a few steps of everything, and are stored without outputs."""

import base64
import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"first_tour": 9, "ablation": 2, "own_clips": 3, "export": 2}  # at least so many, of each
SECRET_OR_LOCAL = re.compile(r"""(?<![\w.:/])/(home|work|tmp|root|Users|content|mnt)/|C:\\\\""")


def name(path):
    return path.stem


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS} == PICTURES.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None, "clear all outputs before it is committed"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not SECRET_OR_LOCAL.search(path.read_text("utf-8"))
    assert path.read_text("utf-8").endswith("}\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_says_how_it_opens_in_colab_and_installs_what_it_needs(path):
    """All begin with the same cell; only the name of the file differs in what is said above it."""
    notebook = nbformat.read(path, as_version=4)
    first, second = notebook.cells[:2]
    assert first.source.startswith("# ") and f"notebooks/{path.name}" in first.source
    assert "https://colab.research.google.com/github/" in first.source
    assert second.source == nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert second.source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert "REPOSITORY = " in second.source and "STVDM_TINY" in second.source
    assert "[notebooks]" in second.source and '"notebooks": [' in (ROOT / "setup.py").read_text("utf-8")


def executed(path, folder, monkeypatch):
    """The notebook as it stands after all its cells, run in a folder that holds what a clone of the repository does."""
    for entry in ("configs", "results", "stvdm"):
        (folder / entry).symlink_to(ROOT / entry)
    (folder / "notebooks").mkdir()
    for variable, value in {
        "STVDM_TINY": "1",
        "XLA_FLAGS": "",  # one device, as a reader has
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "notebooks" / ".ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "notebooks" / ".jupyter"),
    }.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder / "notebooks")}}
    # Raises where a cell does, with its traceback.
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=None, startup_timeout=300, resources=where
    ).execute()
    return notebook


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem != "first_tour")) for path in NOTEBOOKS],
)
def test_it_runs(path, tmp_path, monkeypatch):
    notebook = executed(path, tmp_path, monkeypatch)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    pictures = [base64.b64decode(data[kind]) for data in shown for kind in ("image/png", "image/gif") if kind in data]
    drawings = [data["image/svg+xml"] for data in shown if "image/svg+xml" in data]
    assert len(pictures) + len(drawings) >= PICTURES[path.stem]
    assert all(picture[:4] in (b"\x89PNG", b"GIF8") for picture in pictures)
    assert all("</svg>" in drawing for drawing in drawings)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left <= {"configs", "results", "stvdm", "notebooks", "runs", "outputs"}  # what git ignores, or was there
    if path.stem == "first_tour":
        assert any("Click a patch" in data.get("text/html", "") for data in shown)
    if path.stem == "ablation":
        (result,) = tmp_path.glob("runs/notebook/results/positions/tiny/*-*.json")
        assert json.loads(result.read_text())["variant"] == "rotary"
