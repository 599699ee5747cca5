"""What a training run remembers of the copies that it uses, and that it goes on with no others."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import main
from compress import copies
from compress.copies import CopiesAhead
from compress.presets import LOW
from tests.little_run import command, little_dataset
from tests.regenerating import edges
from tests.shapes import make_shapes
from utils.data.paths import DatasetPaths
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine


@pytest.fixture
def train(tmp_path):
    """Calls main.py with a config of three short phases; returns its exit code."""
    config = {
        **{"dataset": "Shapes", "data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")},
        **{"init_cls": 2, "increment": 2, "model_name": "replay", "convnet_type": "resnet8", "device": "cpu"},
        **{"seed": [1], "memory_per_class": 3, "real_per_class": 1, "syn_per_class": 2, "num_workers": 0},
        **{"augmentations_per_image": 2, "init_epoch": 1, "epochs": 1, "batch_size": 16, "keep_checkpoints": 0},
    }
    file = tmp_path / "config.json"

    def call(*overrides, **values):
        file.write_text(json.dumps({**config, **values}))
        return main.main(["--config", str(file), *overrides])

    return call


@pytest.fixture
def paths(tmp_path) -> DatasetPaths:
    return make_shapes(tmp_path / "data", train=6, test=2)


def back_to_phase(phase: int, out: Path) -> None:
    """As if the run had been killed after this phase."""
    for file in (out / "seed1" / "checkpoints").iterdir():
        if int(file.stem.removeprefix("phase")) > phase:
            file.unlink()


def copies_used(out: Path) -> list[dict]:
    return [phase["copies"] for phase in json.loads((out / "results.json").read_text())["runs"][0]["phases"]]


def blacken(file: Path) -> None:
    with Image.open(file) as image:
        Image.new("RGB", image.size).save(file)


def test_a_run_goes_on_with_the_copies_it_began_with(train, paths, tmp_path, capsys):
    assert train() == 0
    out = tmp_path / "out"
    used = {"made_by": [{"classes": 6, "settings": None}], "generator": None, "files": 72}
    assert copies_used(out) == [{**used, "digest": copies_used(out)[0]["digest"]}] * 3
    back_to_phase(0, out)
    folder = paths.folder("copies")
    kept = Path(shutil.copytree(folder, tmp_path / "kept", copy_function=shutil.copyfile))
    for copy in folder.glob("*/*.jpg"):
        blacken(copy)
    capsys.readouterr()
    assert train() == 2
    said = capsys.readouterr().err
    assert "the copies of 6 of 6 classes are not those that this run began with" in said
    assert "output_dir" in said
    assert "Traceback" not in said
    shutil.rmtree(folder)
    shutil.copytree(kept, folder, copy_function=shutil.copyfile)  # the same pictures, with new times
    assert train() == 0
    assert train() == 0  # a finished run reads no copies


@pytest.mark.long
def test_what_made_the_copies_is_in_the_results_and_in_the_refusal(train, tmp_path, checkpoint, capsys):
    paths = little_dataset(tmp_path / "data")
    compress = command(paths, checkpoint, capsys)
    assert compress()[0] == 0
    values = {"dataset": paths.dataset, "init_cls": 1, "increment": 1, "real_per_class": 1, "syn_per_class": 1}
    assert train(**values) == 0
    assert copies_used(tmp_path / "out")[0]["generator"] == str(checkpoint)
    (made_by,) = copies_used(tmp_path / "out")[0]["made_by"]
    settings = made_by["settings"]
    assert made_by["classes"] == 2
    assert (settings["steps"], settings["guidance"], settings["sampler"]) == (1, 9.0, "ddim")
    assert (settings["precision"], settings["quality"], settings["shorter_side"]) == ("fp32", 75, 64)
    assert len(settings["model"]) == 16
    back_to_phase(0, tmp_path / "out")
    assert compress("--replace", "--precision", "bf16", steps="2")[0] == 0
    assert train(**values) == 2
    said = capsys.readouterr().err
    assert "steps 1 -> 2" in said
    assert "precision 'fp32' -> 'bf16'" in said


def test_a_part_of_a_phase_goes_on_with_the_same_copies_too(train, paths, tmp_path, capsys):
    """Interrupted within phase 0, before any phase is done."""
    assert train("init_epoch=2", "checkpoint_every=1e-9") == 0
    back_to_phase(-1, tmp_path / "out")
    assert train("init_epoch=2", "checkpoint_every=1e-9") == 0
    blacken(paths.copy(paths.images("red disc")[0], 1))
    back_to_phase(1, tmp_path / "out")
    assert train("init_epoch=2", "checkpoint_every=1e-9") == 2
    assert "1 of 6 classes" in capsys.readouterr().err


@pytest.fixture
def images(paths):
    return [image for label in paths.classes() for image in paths.images(label)]


def test_many_copies_are_told_apart_by_size_and_time(paths, images, monkeypatch):
    """Where there are too many to read them all: one file a class is read."""
    monkeypatch.setattr(copies, "MOST_READ", 1)
    began_with = CopiesAhead(paths, edges(LOW), images, 2).state([])

    def check():
        CopiesAhead(paths, edges(LOW), images, 2).check(began_with, [])

    check()
    victim = paths.copy(images[3], 1)
    content = victim.read_bytes()
    victim.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])  # another picture of the same size
    with pytest.raises(UserError, match="1 of 6 classes"):
        check()
    victim.write_bytes(content)
    for copy in paths.folder("copies").glob("*/*.jpg"):  # a copy of the whole folder
        os.utime(copy, ns=(1, 1))
    check()
    blacken(paths.copy(images[0], 0))
    with pytest.raises(UserError, match="1 of 6 classes"):
        check()


def test_copies_on_demand_are_remembered_too(train, tmp_path, checkpoint, capsys):
    paths = little_dataset(tmp_path / "data")
    options = f"--model={shlex.quote(str(checkpoint))} --size 64 --steps 1 --batch-size 4 --quality 80"
    values = {"dataset": paths.dataset, "init_cls": 1, "increment": 1, "real_per_class": 1, "syn_per_class": 1}
    values |= {
        "nme": False,
        "regenerate": "on_demand",
        "augmentation_scope": "exemplars",
        "regenerate_options": options,
    }
    assert train(**values) == 0
    first, last = copies_used(tmp_path / "out")
    assert (first["files"], last["files"]) == (2, 2)  # after the last phase nobody reads copies
    assert first["made_by"][0]["settings"]["quality"] == 80
    assert first["generator"] == str(checkpoint)
    back_to_phase(0, tmp_path / "out")
    (copy, other) = sorted(paths.folder("copies").glob("*/*.jpg"))
    copy.unlink()  # comes back
    assert train(**values) == 0
    phases = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["phases"]
    assert [phase["copies_on_demand"] for phase in phases] == [2, 0]
    back_to_phase(0, tmp_path / "out")
    blacken(other)
    assert train(**values) == 2
    assert "1 of 1 classes are not those that this run began with" in capsys.readouterr().err


def test_copies_that_are_there_are_not_counted_as_made(train, tmp_path, checkpoint, capsys):
    paths = little_dataset(tmp_path / "data")
    options = f"--model {shlex.quote(str(checkpoint))} --size 64 --steps 1 --batch-size 4 --resolution high"
    assert command(paths, checkpoint, capsys)()[0] == 0
    values = {"dataset": paths.dataset, "init_cls": 1, "increment": 1, "real_per_class": 1, "syn_per_class": 1}
    values |= {
        "nme": False,
        "regenerate": "on_demand",
        "augmentation_scope": "exemplars",
        "regenerate_options": options,
    }
    assert train(**values) == 0
    phases = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["phases"]
    assert [phase["copies_on_demand"] for phase in phases] == [0, 0]
    assert "copies on demand: 0 made" in capsys.readouterr().out
