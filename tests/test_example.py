"""docs/example.py makes copies of one picture, in few lines and with nothing of the project but ControlNet/."""

import ast
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

EXAMPLE = Path(__file__).parent.parent / "docs" / "example.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_it_is_short_and_stands_on_controlnet_alone():
    source = EXAMPLE.read_text()
    assert source.count("\n") < 80
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    rooms = {module.partition(".")[0] for module in modules}
    assert "ControlNet" in rooms
    assert not rooms & {"main", "compress", "convs", "models", "utils", "exps"}


def test_it_makes_copies_that_follow_the_edges(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--out", tmp_path)
    edges = cv2.imread(str(tmp_path / "edges.png"), cv2.IMREAD_GRAYSCALE)
    copies = [cv2.imread(str(tmp_path / f"copy{i}.png")) for i in range(4)]
    assert edges.shape == (64, 64)
    assert set(np.unique(edges)) == {0, 255}
    inside = cv2.dilate(edges, np.ones((5, 5), np.uint8)) > 0
    for copy in copies:
        assert copy.shape == (64, 64, 3)
        assert copy[inside].mean() > copy[~inside].mean() + 50  # white strokes where the edges are, black elsewhere
    assert not (copies[0] == copies[2]).all()
    assert "4 copies" in capsys.readouterr().out


def test_a_file_that_is_no_picture_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "notes.txt", "digit one", "--out", tmp_path / "out")
    assert ended.value.code == 2
    assert "can't read" in capsys.readouterr().err


@pytest.mark.long
def test_equal_bytes_on_one_page(monkeypatch, capsys):
    page = EXAMPLE.with_name("equal_bytes.py")
    assert page.read_text().count("\n") < 150
    monkeypatch.setattr(sys, "argv", [str(page), "--bytes", "600", "--draws", "1"])
    runpy.run_path(str(page), run_name="__main__")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == {"real", "webp", "webp@14", "threshold", "code", "text"}
    assert float(rows["webp"][1]) > float(rows["real"][1]) + 10
    assert float(rows["code"][1]) > max(float(rows[form][1]) for form in ("webp@14", "text"))
    numbers = [int(rows[form][4].strip("(")) for form in ("real", "webp", "webp@14", "code")]
    assert numbers == sorted(set(numbers))
    assert rows["code"][4] == rows["text"][4]
