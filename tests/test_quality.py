"""What python -m compress.quality says of good copies and of bad ones."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from compress import quality
from tests.bench.bench_tiny_model import edges_found
from utils.data.paths import DatasetPaths

LABELS = ("disc", "square")


def drawn(label, place, size=48):
    """A light disc or square on a dark ground."""
    picture = np.full((size, size, 3), 30, np.uint8)
    if label == "disc":
        cv2.circle(picture, (place, place), 11, (220, 220, 220), -1)
    else:
        cv2.rectangle(picture, (place - 11, place - 11), (place + 11, place + 11), (220, 220, 220), -1)
    return picture


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@pytest.fixture
def paths(tmp_path):
    """The copies of discs are themselves, with some noise; those of squares are discs elsewhere."""
    paths, rng = DatasetPaths(tmp_path, "Shapes"), np.random.default_rng(0)
    for label in LABELS:
        for i in range(12):
            save(paths.folder("train") / label / f"{i:02d}.png", drawn(label, 16 + i))
        for i, image in enumerate(paths.images(label)):
            for k in range(2 if i < 4 else 0):
                copy = drawn("disc", 16 + i if label == "disc" else 32 - i).astype(int)
                copy = copy + rng.integers(-5, 6, copy.shape) * (label == "disc")
                save(paths.copy(image, k), copy.clip(0, 255).astype(np.uint8))
    return paths


def call(paths, capsys, *options):
    code = quality.main(["--data-dir", str(paths.data_dir), "--dataset", paths.dataset, *options])
    return code, capsys.readouterr()


@pytest.mark.usefixtures("one_thread")
def test_good_copies_and_bad_ones(paths, capsys, tmp_path):
    file = tmp_path / "quality.json"
    code, said = call(paths, capsys, "--resolution", "high", "--images", "4", "--epochs", "100", "--json", str(file))
    assert code == 0, said.err
    measures = json.loads(file.read_text())
    good, bad = measures["classes"]["disc"], measures["classes"]["square"]
    assert (good["images"], good["copies"], measures["all"]["copies"]) == (4, 8, 16)
    assert good["edges %"] > 95
    assert bad["edges %"] < 60
    assert good["other %"] < 60
    assert good["class %"] == good["real %"] == bad["real %"] == 100
    assert bad["class %"] == 0
    assert 1 < good["variety"] < 4  # two draws from -5 to 5
    assert bad["variety"] == 0
    assert re.search(r"^all +8 +16 ", said.out, re.M)
    assert "- variety: standard deviation" in said.out
    assert measures["made_by"] == {"disc": None, "square": None}


def test_without_copies_the_command_that_makes_them_is_named(paths, capsys):
    code, said = call(paths, capsys, "--form", "webp:10")
    assert code == 2
    assert "compress/run.py --dataset Shapes --form webp:10" in said.err


def test_edges_found_counts_pixels_near_an_edge():
    prompt = np.zeros((40, 40), np.uint8)
    prompt[:, 10] = prompt[:, 25] = 255
    picture = np.zeros((40, 40), np.uint8)
    picture[:, 11:] = 200  # one edge, near the first column
    assert edges_found([prompt], [picture]) == pytest.approx(0.5)
    assert np.isnan(edges_found([prompt * 0], [picture]))
