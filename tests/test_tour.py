"""docs/tour.ipynb runs from top to bottom, and shows what it says.  Its cells run as they are, in one process."""

import json
import os
import re
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
TOUR = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs():
    assert len(CODE) > 5
    assert all(not cell["outputs"] for cell in TOUR["cells"] if cell["cell_type"] == "code")
    for source in CODE:
        compile(source, "tour.ipynb", "exec")


@pytest.mark.long
def test_it_runs(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setattr(
        pyplot,
        "show",
        lambda: shown.append([axis.title.get_text() or axis.get_title("left") for axis in pyplot.gcf().axes]),
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(ROOT / "docs")
    names: dict = {}
    try:
        for source in CODE:
            exec(compile(source, "tour.ipynb", "exec"), names)
    finally:
        pyplot.close("all")
        os.chdir(ROOT)
    titles = [title for figure in shown for title in figure if title]
    assert len(shown) == 4
    assert any(re.match(r"edge maps: \d\d bytes", title) for title in titles)
    assert any(title.startswith("from 15 bytes each") for title in titles)
    assert len({picture.tobytes() for picture in names["copies"]}) == 16
    accuracies = [phase["cnn"]["top1"] for phase in names["run"]["phases"]]
    assert len(accuracies) == 5
    assert accuracies[0] > 60
    assert "edges: 40 exemplars" in capsys.readouterr().out
