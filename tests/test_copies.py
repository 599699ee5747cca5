"""What a training run remembers of the copies that it uses, and that it goes on with no others."""

import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from compress.presets import LOW
from compress.training import copies
from compress.training.copies import CopiesAhead
from models.training import checkpoint as checkpoints
from models.training.trainer import Trainer
from tests.little_config import phases, train_little
from tests.little_run import command, little_dataset, tree
from tests.regenerating import edges
from tests.shapes import make_shapes
from utils.data.paths import DatasetPaths
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine


@pytest.fixture
def train(tmp_path):
    """Calls main.py with a config of three short phases; returns its exit code."""
    values = {"seed": [1], "memory_per_class": 3, "real_per_class": 1, "syn_per_class": 2, "batch_size": 16}
    values |= {"augmentations_per_image": 2, "keep_checkpoints": 0}
    return partial(train_little, tmp_path / "data", tmp_path / "out", **values)


@pytest.fixture
def paths(tmp_path) -> DatasetPaths:
    return make_shapes(tmp_path / "data", train=6, test=2)


def back_to_phase(phase: int, out: Path) -> None:
    """As if the run had been killed after this phase."""
    for file in (out / "seed1" / "checkpoints").iterdir():
        if int(file.stem.removeprefix("phase")) > phase:
            file.unlink()


def copies_used(out: Path) -> list[dict]:
    return [phase["copies"] for phase in phases(out)]


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
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{8}", settings["model"])
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
    assert [phase["copies_on_demand"] for phase in phases(tmp_path / "out")] == [2, 0]
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
    assert [phase["copies_on_demand"] for phase in phases(tmp_path / "out")] == [0, 0]
    assert "copies on demand: 0 made" in capsys.readouterr().out


def accuracies(out: Path) -> list:
    return [(phase["cnn"], phase["memory"]["bytes_total"], phase["training"]["loss"]) for phase in phases(out)]


def test_copies_of_new_images_are_made_before_their_phase(train, tmp_path):
    """With p above 0 and scope "all" a run with copies on demand is the run with copies ahead, also when resumed."""
    paths = make_shapes(tmp_path / "data", train=4, test=2)
    for folder in ("kept", "copies"):
        shutil.rmtree(paths.folder(folder))
    form = "webp:10@16"
    values = {"syn_form": form, "budget_in": "bytes", "memory_bytes_per_class": 2700, "syn_per_class": "fill"}
    values |= {"augmentation_prob": 0.5, "nme": False}
    assert train(**values, regenerate="on_demand", output_dir=str(tmp_path / "demand")) == 0
    made = sorted(paths.root.glob("webp-10@16-copies/*/*.png"))
    assert len(made) == 6 * 4, "one copy of each image: all would be equal"
    assert [phase["copies_on_demand"] for phase in phases(tmp_path / "demand")] == [8, 8, 8]
    assert train(**values, output_dir=str(tmp_path / "ahead")) == 0
    assert accuracies(tmp_path / "demand") == accuracies(tmp_path / "ahead")

    back_to_phase(0, tmp_path / "demand")
    for file in made:
        file.unlink()
    assert train(**values, regenerate="on_demand", output_dir=str(tmp_path / "demand")) == 0
    assert accuracies(tmp_path / "demand") == accuracies(tmp_path / "ahead")


def test_a_run_that_stopped_within_a_phase_goes_on_with_the_copies_of_its_new_images(
    train, paths, tmp_path, monkeypatch
):
    values = {"syn_form": "webp:10@16", "budget_in": "bytes", "memory_bytes_per_class": 2700, "syn_per_class": "fill"}
    values |= {"augmentation_prob": 0.5, "nme": False, "regenerate": "on_demand", "epochs": 2}
    assert train(**values, output_dir=str(tmp_path / "whole")) == 0

    def stop(trainer, choose=Trainer.choose_exemplars):
        if trainer.method.phase == 1:
            raise KeyboardInterrupt
        return choose(trainer)

    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "choose_exemplars", stop)
        assert train(**values, checkpoint_every=1e-9) == 130
    within = checkpoints.load(tmp_path / "out" / "seed1" / "checkpoints" / "unfinished.pt")
    read = [label for label, of_class in within["copies"]["fingerprint"]["classes"].items() if of_class[0]]
    assert len(read) == 4, "exemplars of phase 0 and new images of phase 1"
    shutil.rmtree(paths.root / "webp-10@16-copies")
    assert train(**values) == 0
    assert accuracies(tmp_path / "out") == accuracies(tmp_path / "whole")


@pytest.mark.long
def test_copies_on_demand_are_those_made_ahead_byte_for_byte(train, tmp_path, checkpoint, capsys):
    """With p above 0, by a model: each copy, the memory and all accuracies."""
    ahead, demand = little_dataset(tmp_path / "data"), little_dataset(tmp_path / "other")
    options = f"--model {shlex.quote(str(checkpoint))} --size 64 --steps 1 --batch-size 1 --resolution high"
    assert command(ahead, checkpoint, capsys)("--batch-size", "1")[0] == 0
    values = {"dataset": ahead.dataset, "init_cls": 1, "increment": 1, "real_per_class": 1, "syn_per_class": 1}
    values |= {"augmentation_prob": 0.5, "nme": False}
    assert train(**values) == 0
    values |= {"regenerate": "on_demand", "regenerate_options": options, "data_dir": str(demand.data_dir)}
    assert train(**values, output_dir=str(tmp_path / "demand")) == 0
    copies = [tree(paths.folder("copies")) for paths in (ahead, demand)]
    made = [{name: data for name, data in of.items() if name.endswith(".jpg")} for of in copies]
    assert made[0] == made[1]
    assert len(made[0]) == 2 * 2 * 2
    assert accuracies(tmp_path / "demand") == accuracies(tmp_path / "out")
