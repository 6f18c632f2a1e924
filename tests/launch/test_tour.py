"""The notebook ``examples/tour.ipynb``: what it stores of an earlier run, and a run of it from first to last."""

import json
from pathlib import Path

import pytest
from launches import ROOT

NOTEBOOK = ROOT / "examples/tour.ipynb"
MAX_BYTES = 30_000  # it is read on the forge, and every change of it is a diff


def outputs(cell) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def code_cells(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_with_small_outputs_and_without_errors():
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    shown = [output for cell in cells for output in cell["outputs"]]
    assert not [each for each in shown if each["output_type"] == "error" or each.get("name") == "stderr"]
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages
def test_it_runs_and_prints_what_it_stores(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in code_cells(notebook):
        cell["outputs"] = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    now, before = ([outputs(cell) for cell in code_cells(each)] for each in (notebook, stored))
    # Cells whose output is the same on every machine: describe, before and after convert and revert; the proof.
    same = [place for place, text in enumerate(before) if text.startswith(("layer", "equal to", "Writing"))]
    assert len(same) == 5
    assert [now[place] for place in same] == [before[place] for place in same]
    assert "operators of syncnorm: 0" in now[-1]
    local, synced = ([line.partition(": ")[2] for line in text.splitlines()] for text in now if "rank 0" in text)
    assert len(local) == len(synced) == 2
    assert local[0] != local[1]
    assert synced[0] == synced[1]
    assert "SyncBN is correct here" in " ".join(now)
    assert "<title>" in (tmp_path / "tour.html").read_text()
