"""Configs that can't be run: the command answers in one line that names the key and what would be right, at once."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
from models.training.trainer import Trainer
from tests.folders import save_noise
from tests.little_config import KEYS
from tests.shapes import make_shapes
from utils import devices
from utils.config.read import read_json

HUGE = 10**400


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Six classes of twelve train images: Shapes with two copies of each, Bare with none, Lopsided without a test."""
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder)
    bare = make_shapes(folder, name="Bare")
    shutil.rmtree(bare.folder("copies"))
    shutil.rmtree(make_shapes(folder, name="Lopsided").folder("test") / "red disc")
    (folder / "a file").touch()
    return folder


@pytest.fixture
def complaint(tmp_path, data_dir, monkeypatch, capsys):
    """Calls main.py with a config that differs from a good one; returns what it prints on stderr."""
    monkeypatch.setattr(Trainer, "__init__", None)  # whoever gets as far as learning fails
    out = tmp_path / "out"
    good = {
        **{**KEYS, "data_dir": str(data_dir), "output_dir": str(out), "model_name": "wa", "batch_size": 16},
        **{"memory_per_class": 3, "real_per_class": 2, "syn_per_class": 4, "augmentations_per_image": 2},
    }

    def call(values, *overrides, drop=()):
        file = tmp_path / "config.json"
        if isinstance(values, bytes):
            file.write_bytes(values)
        else:
            values = {key: value for key, value in {**good, **values}.items() if key not in drop}
            values = {k: v.replace("DATA", str(data_dir)) if isinstance(v, str) else v for k, v in values.items()}
            file.write_text(json.dumps(values), encoding="utf-8")
        before = sorted(tmp_path.iterdir())
        assert main.main(["--config", str(file), *overrides]) == 2
        assert sorted(tmp_path.iterdir()) == before, "something was made"
        written = capsys.readouterr()
        assert written.out == "", "work was begun"
        assert written.err.startswith("error: ")
        return written.err

    return call


@pytest.mark.parametrize(
    ("values", "words"),
    [
        # keys and types
        ({"memory_per_clas": 3}, ["unknown key 'memory_per_clas'", "did you mean 'memory_per_class'"]),
        ({"xyzzy": 3}, ["unknown key 'xyzzy'", "--help-config"]),
        ({"batch_size": "16"}, ["batch_size must be a valid integer", '"16"']),
        ({"batch_size": 16.5}, ["batch_size must be a valid integer", "16.5"]),
        ({"init_cls": True}, ["init_cls must be a valid integer", "true"]),
        ({"increment": None}, ["increment must be a valid integer", "null"]),
        ({"model_name": None}, ["model_name must be a valid string", "null"]),
        ({"shuffle": "no"}, ["shuffle must be a valid boolean", '"no"']),
        ({"milestones": [80.5]}, ["milestones[0] must be a valid integer", "80.5"]),
        ({"dataset": ["Shapes"]}, ["dataset must be a valid string"]),
        ({"data_dir": []}, ["data_dir must be a valid string"]),
        ({"lrate": float("nan")}, ["lrate must be a finite number", "NaN"]),
        ({"init_lr": float("inf")}, ["init_lr must be a finite number", "Infinity"]),
        ({"weight_decay": HUGE}, ["weight_decay must be a valid number"]),
        ({"output_dir": "out/${nope}"}, ["output_dir", "nope"]),
        ({"output_dir": "out/${"}, ["output_dir", "can't be read"]),
        ({"batch_size": "${prefix}", "prefix": "x"}, ["batch_size must be a valid integer, not x"]),
        # ranges
        ({"batch_size": 0}, ["batch_size must be greater than or equal to 1"]),
        ({"accumulate_batches": 17}, ["accumulate_batches", "16 images", "17 parts"]),
        ({"increment": 0}, ["increment is 0, with 4 classes left after phase 0: choose at least 1"]),
        ({"epochs": -3}, ["epochs must be greater than or equal to 1"]),
        ({"batch_size": 10**16}, ["batch_size must be less than or equal to 1000000000000000, not 10000000000000000"]),
        ({"model_seed": 10**16}, ["model_seed must be less than or equal to 1000000000000000"]),
        ({"weight_decay": 1e300}, ["weight_decay must be less than or equal to 1000000"]),
        ({"init_epoch": 0}, ["init_epoch must be at least 1"]),
        ({"lrate": 0}, ["lrate must be greater than 0"]),
        ({"momentum": 1.0}, ["momentum must be less than 1"]),
        ({"augmentation_prob": -0.1}, ["augmentation_prob must be greater than or equal to 0"]),
        ({"T": 0}, ["T must be greater than 0"]),
        ({"seed": []}, ["seed must list one or more different values"]),
        ({"seed": [1, 1]}, ["seed must list one or more different values"]),
        ({"seed": "one"}, ["seed[0] must be a valid integer"]),
        ({"seed": [-1]}, ["seed[0] must be greater than or equal to 0"]),
        ({"seed": [2**32]}, ["seed[0] must be less than 4294967296"]),
        ({"seed": [2**64]}, ["seed[0] must be less than 4294967296"]),
        ({"keep_checkpoints": -1}, ["keep_checkpoints must be greater than or equal to 0"]),
        # choices
        ({"model_name": "icrl"}, ["model_name must be one of", "did you mean 'icarl'"]),
        ({"convnet_type": "resnet20000"}, ["convnet_type must be one of", "resnet18"]),
        ({"exemplar_selection": "best"}, ["exemplar_selection must be 'herding', 'random' or 'closest'"]),
        ({"precision": "fp8"}, ["precision must be '32-true'"]),
        ({"regenerate": "later"}, ["regenerate must be 'ahead' or 'on_demand'"]),
        # the machine
        ({"device": "gpu"}, ["device must be", '"cpu"', '"gpu"']),
        ({"device": []}, ["device must be"]),
        ({"device": ["0", "0"]}, ["device must be", '["0", "0"]']),
        ({"device": ["99"]}, ["no device cuda:99"]),
        ({"precision": "16-mixed"}, ["precision: 16-mixed needs a GPU", "bf16-mixed"]),
        # folders
        ({"dataset": "Nowhere"}, ["Nowhere", "is not a folder. Put images in"]),
        ({"dataset": "shpaes"}, ["is not a folder. Did you mean 'Shapes'? Else put images in"]),
        ({"dataset": "Cifar-100"}, ["Did you mean 'CIFAR100'?"]),
        ({"dataset": "cifar100"}, ["python -m utils.curate CIFAR100 --data-dir", "makes it; or put images in"]),
        ({"dataset": "MNIST"}, ["python -m utils.curate digits --data-dir "]),
        ({"dataset": "ImageNet-R"}, ["python -m utils.curate ImageNet-R --source DIR --data-dir "]),
        ({"dataset": "a file"}, ["is not a folder. Put images in"]),
        ({"syn_form": "webq:10"}, ["error: syn_form: no form 'webq'", "Did you mean 'webp:10'?"]),
        ({"syn_form": "egdes@32"}, ["error: syn_form: no form 'egdes'", "Did you mean 'edges@32'?"]),
        ({"syn_form": "webp:x"}, ["error: syn_form: ", "needs a quality"]),
        ({"dataset": ""}, ["dataset must be the name of a folder"]),
        ({"dataset": ".."}, ["dataset must be the name of a folder"]),
        ({"dataset": "Sha\0pes"}, ["dataset has a zero byte"]),
        ({"dataset": "Lopsided"}, ["red disc", "train and test need the same class folders"]),
        ({"data_dir": "/nowhere"}, ["data_dir", "/nowhere"]),
        ({"output_dir": "DATA/a file"}, ["output_dir", "a file", "can't be written to"]),
        ({"output_dir": ""}, ["output_dir must name a folder"]),
        ({"output_dir": "\ud800"}, ["output_dir has half a character"]),
        ({"phase0_cache": "DATA/a file"}, ["phase0_cache", "a file", "can't be written to"]),
        ({"variant": "a/b"}, ["variant", "'a/b'"]),
        # what does not go together
        ({"init_cls": 7}, ["init_cls is 7", "6 classes", "choose 1 to 6"]),
        ({"real_per_class": 4}, ["real_per_class", "memory_per_class = 3"]),
        ({"real_per_class": 3}, ["budget", "3 real + 4 edges x 1/24 = 3.17 units > 3", "memory_per_class"]),
        ({"real_per_class": 0, "syn_per_class": 0}, ["wa needs exemplars", "real_per_class + syn_per_class"]),
        ({"real_per_class": 1, "syn_per_class": 0, "model_name": "bic"}, ["real_per_class", "at least 2", "bic"]),
        ({"fixed_memory": False}, ["memory_size must be given"]),
        ({"fixed_memory": False, "memory_size": 1}, ["memory_size = 1", "each of 6 classes", "Raise memory_size"]),
        (
            {"model_name": "bic", "fixed_memory": False, "memory_size": 7, "syn_per_class": 0},
            ["memory_size = 7", "the 2 exemplars that the method needs", "Raise memory_size to at least 12."],
        ),
        ({"augmentations_per_image": 0}, ["augmentations_per_image must be at least 1"]),
        ({"val_per_class": 1, "memory_only": True}, ["val_per_class", "memory_only", "set one of them"]),
        ({"val_per_class": 12}, ["val_per_class is 12", "has 12 images: none would be left"]),
        ({"pretrained": True}, ["pretrained", "no weights", "false"]),
        ({"model_name": "gem", "precision": "16-mixed"}, ["precision: 16-mixed", "gem"]),
        ({"regenerate": "on_demand", "regenerate_options": "--stepz 3"}, ["regenerate_options", "--stepz"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_one_line(complaint, values, words):
    said = complaint(values)
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"dataset": "Shapes",}', ["config.json is not valid JSON: line 1, column"]),
        (b"{'dataset': 'Shapes'}", ["config.json is not valid JSON: line 1, column 2"]),
        (b'{"seed": 1, // mine\n "dataset": "Shapes"}', ["config.json is not valid JSON: line 1, column 13"]),
        (b"", ["config.json is not valid JSON"]),
        (b"[1, 2]", ["config.json must hold one JSON object"]),
        (b'{"lrate": 0.1, "lrate": 0.2}', ["config.json", "lrate is given 2 times"]),
        ('{"dataset": "Caf\u00e9"}'.encode("latin-1"), ["config.json is not in UTF-8: byte 16 is 0xe9"]),
        (b'{"batch_size": ' + b"1" * 5000 + b"}", ["config.json", "digit"]),
        (b'{"a": ' + b"[" * 100_000, ["config.json", "nested too deeply"]),
    ],
    ids=["trailing comma", "quotes", "comment", "empty", "list", "twice", "latin-1", "digits", "brackets"],
)
def test_files_that_are_none(complaint, content, words):
    said = complaint(content)
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epochs"], ["'epochs' is not of the form key=value"]),
        (["--lrate"], ["--lrate needs a value"]),
        (["=3"], ["'=3' is not of the form key=value"]),
        (["epochs=[1"], ["epochs must be a valid integer, not [1"]),
        (["epochs=ten"], ["error: epochs=ten: epochs must be a valid integer, not ten"]),
        (["epoch=10"], ["unknown key 'epoch'", "did you mean 'epochs'"]),
    ],
    ids=str,
)
def test_overrides(complaint, overrides, words):
    said = complaint({}, *overrides)
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


def test_a_key_that_is_not_given(complaint):
    said = complaint({}, drop=["convnet_type"])
    assert said.count("\n") == 1
    assert "convnet_type is not given: the backbone" in said


def test_copies_that_are_not_there(complaint):
    """The one answer of two lines: the second is the command that makes them."""
    what, command = complaint({"dataset": "Bare"}).splitlines()
    assert "144 of 144 copies are missing" in what
    assert command.startswith("python compress/run.py --data-dir")


def test_a_class_whose_images_have_no_room(complaint, tmp_path):
    """The others' have: only this class would be refused, in the phase in which it is learnt."""
    paths = make_shapes(tmp_path / "data", train=3)
    for i, image in enumerate(paths.images("red disc")):
        save_noise(image, i, size=(64, 64))
    keys = {"budget_in": "bytes", "syn_per_class": 0, "real_per_class": None, "data_dir": str(tmp_path / "data")}
    said = complaint({**keys, "memory_bytes_per_class": 6000})
    assert said.count("\n") == 1
    assert "red disc: not one image fits in memory_bytes_per_class = 6,000. Raise it to at least " in said
    enough = int(said.rpartition("at least ")[2].partition(",")[0])
    index = 1 + 1 + len("red disc") + 1 + 1 + 1 + 2  # target, label, text; number, flags, length
    assert enough == min(image.stat().st_size for image in paths.images("red disc")) + index


def test_a_class_too_small_for_the_method(complaint, tmp_path):
    make_shapes(tmp_path / "small", train=1)
    said = complaint({"model_name": "bic", "data_dir": str(tmp_path / "small")})
    assert "has 1: bic needs at least 2 train images of each class" in said


def test_all_at_once(complaint):
    said = complaint({"lrate": -1, "momentun": 0.9, "seed": "x", "shuffle": 1}, "epochs", drop=["dataset"])
    first, *lines = said.splitlines()
    assert "6 problems" in first
    for word in ("lrate", "momentun", "seed", "shuffle", "epochs", "dataset"):
        assert sum(word in line.split()[0] + line for line in lines) >= 1, word
    assert len(lines) == 6


def test_more_processes_than_images_of_a_batch(complaint, monkeypatch):
    monkeypatch.setattr(devices, "launch", lambda *_: SimpleNamespace(world_size=17))
    assert "batch_size 16 is less than one image for each of 17 processes" in complaint({})


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    file = Path(tmp_path / "config.json")
    file.write_text('{"datasett": "Shapes"}', encoding="utf-8-sig")
    assert read_json(file) == {"datasett": "Shapes"}
