"""Datasets that are odd but valid, through main.py: names that are not UTF-8, changed files, classes of few images."""

import os
from pathlib import Path

import pytest

import main
from compress import measure, quality
from compress import run as compress
from exps.report import __main__ as report
from exps.report import gallery
from tests.folders import save_noise
from tests.little_config import phases, train_little
from utils.data.paths import DatasetPaths
from utils.memory import __main__ as memory

CONFIG = {
    **{"dataset": "Odd", "increment": 1, "memory_per_class": 2, "real_per_class": 2, "batch_size": 8},
    **{"init_lr": 0.01, "lrate": 0.01},
}


@pytest.fixture
def run(tmp_path, capsys):
    """Calls main.py; -> (exit code, stdout, stderr)."""

    def call(output="out", **changes):
        code = train_little(tmp_path / "data", tmp_path / output, **{**CONFIG, **changes})
        return code, *capsys.readouterr()

    return call


def make(tmp_path, labels, names=("0.png", "1.png", "2.png")):
    paths = DatasetPaths(tmp_path / "data", "Odd")
    for number, label in enumerate(labels):
        for i, name in enumerate(names):
            for mode in ("train", "test"):
                target = paths.folder(mode) / label / name
                made = save_noise(tmp_path / "made.png", 100 * number + i)
                target.parent.mkdir(parents=True, exist_ok=True)
                made.rename(target)
    return paths


def test_names_that_are_not_utf_8_go_through_training_checkpoints_and_reports(run, tmp_path):
    odd = [os.fsdecode(name) for name in (b"caf\xe9", b"$x_", b"two\nlines")]
    try:
        make(tmp_path, odd, [os.fsdecode(b"caf\xe9.png"), "b.png", "c d.png"])
    except OSError:
        pytest.skip("this disk takes no such names")
    code, _, said = run()
    assert code == 0, said
    code, _, said = run()  # from the checkpoint
    assert code == 0, said
    assert len(phases(tmp_path / "out")) == 2


@pytest.mark.long
def test_names_that_are_not_utf_8_go_through_every_tool(run, tmp_path, capsys):
    label, name = os.fsdecode(b"caf\xe9 $x_"), os.fsdecode(b"caf\xe9.png")
    try:
        paths = make(tmp_path, [label, "_b", "c"], [name, "b.png", "_c d.png"])
    except OSError:
        pytest.skip("this disk takes no such names")
    where, file = ["--data-dir", str(tmp_path / "data"), "--dataset", "Odd"], tmp_path / os.fsdecode(b"\xe9")
    model = ["--model", "tiny", "--steps", "1", "--size", "64", "--seeds", "1", "--device", "cpu"]
    for form in ("edges", "webp:10"):
        assert compress.main([*where, "--resolution", "high", "--form", form, *model]) == 0
        assert compress.main([*where, "--resolution", "high", "--form", form, *model, "--verify"]) == 0
    assert quality.main([*where, "--form", "webp:10", "--epochs", "1", f"--json={file}.json"]) == 0
    assert measure.main([*where, "--forms", "real,webp:10"]) == 0
    assert gallery.main([*where, "--copies", "1", f"{file}.png"]) == 0
    out = tmp_path / os.fsdecode(b"out \xe9")
    assert run(out.name, real_per_class=1, syn_per_class=1, augmentations_per_image=1)[0] == 0
    archive = out / "seed1993" / "memory" / "phase01.memory"
    assert memory.main(["show", str(archive)]) == memory.main(["extract", str(archive), f"--to={file}"]) == 0
    assert report.main([str(out), f"--plot={file}.png", f"--html={file}.html"]) == 0
    image = paths.images(label, "test")[0]
    assert main.main(["predict", str(out), f"--images={image.parent}", f"--output={file}.csv", "--device=cpu"]) == 0
    assert main.main(["predict", str(out), f"--images={image}", "--device=cpu"]) == 0
    assert main.main(["evaluate", str(out), f"--output={file}.json", "--device=cpu"]) == 0
    assert main.main(["export", str(out), f"--output={file}.onnx", "--device=cpu"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_phase_0_is_trained_again_where_pixels_have_changed(run, tmp_path):
    """Uncompressed pictures of the same names and sizes."""
    names = ("0.bmp", "1.bmp", "2.bmp")
    paths = DatasetPaths(tmp_path / "data", "Odd")
    for mode in ("train", "test"):
        for number, label in enumerate("abc"):
            for i, name in enumerate(names):
                save_noise(paths.folder(mode) / label / name, 100 * number + i)
    shared = str(tmp_path / "shared")
    assert run("one", phase0_cache=shared)[0] == 0
    assert "not trained again" in run("two", phase0_cache=shared)[1]
    for i, file in enumerate(sorted(paths.folder("train").rglob("*.bmp"))):
        size = file.stat().st_size
        save_noise(file, 5000 + i)
        assert file.stat().st_size == size
    code, said, _ = run("three", phase0_cache=shared)
    assert code == 0
    assert "not trained again" not in said


def test_a_small_class_under_a_fixed_budget_keeps_what_it_has(run, tmp_path, caplog):
    paths = make(tmp_path, "abc")
    for i in range(2):
        Path(paths.folder("train") / "b" / f"{i}.png").unlink()
    code, said, errors = run()
    assert code == 0, errors
    assert "'b' has 1 train images, fewer than 2 real" in said + errors + caplog.text
    assert phases(tmp_path / "out")[-1]["memory"]["nb_real"] == 5
