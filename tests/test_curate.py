"""`python -m utils.curate` on small sources in the forms that torchvision and ImageNet's users keep on disk."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from tests.folders import save_noise
from tests.little_run import Killed, kill_at, tree
from utils.curate.command import main
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths


@pytest.fixture
def curate(tmp_path, capsys):
    """Runs the command on tmp_path/source into tmp_path/data; -> (exit code, stdout, stderr)."""

    def call(what, *options):
        where = ["--data-dir", str(tmp_path / "data"), "--source", str(tmp_path / "source")]
        code = main([what, *where, *options])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def files(folder):
    return {name: content for name, content in tree(folder).items() if name != "class_names.json"}


def texts(tmp_path, dataset):
    return json.loads((tmp_path / "data" / dataset / "class_names.json").read_text(encoding="utf-8"))


# torchvision's datasets

BATCHES = {
    "CIFAR10": ("cifar-10-batches-py", ["data_batch_1", "data_batch_2"], ["test_batch"], "labels", "batches.meta"),
    "CIFAR100": ("cifar-100-python", ["train"], ["test"], "fine_labels", "meta"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_cifar_keeps_every_pixel(curate, tmp_path, monkeypatch, name):
    folder, train, test, key, meta = BATCHES[name]
    from torchvision import datasets

    known = getattr(datasets, name)
    monkeypatch.setattr(known, "train_list", [[file, None] for file in train])  # None: no checksum
    monkeypatch.setattr(known, "test_list", [[file, None] for file in test])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": None})
    rng, made, classes = np.random.default_rng(0), {}, ["maple_tree", "cup", "road"]
    (tmp_path / "source" / folder).mkdir(parents=True)
    for file in (*train, *test):
        made[file] = rng.integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8)
        batch = {"data": made[file], key: [0, 1, 2, 2, 1, 0]}
        (tmp_path / "source" / folder / file).write_bytes(pickle.dumps(batch))
    names = {"label_names" if name == "CIFAR10" else "fine_label_names": classes}
    (tmp_path / "source" / folder / meta).write_bytes(pickle.dumps(names))

    code, said, _ = curate(name)
    assert code == 0
    root = tmp_path / "data" / name
    assert f"{root / 'train'}: {6 * len(train)} images of 3 classes" in said
    assert texts(tmp_path, name) == {"cup": "cup", "maple_tree": "maple tree", "road": "road"}
    for mode, batches in (("train", train), ("test", test)):
        rows = np.concatenate([made[file] for file in batches])
        assert len(list((root / mode).glob("*/*"))) == len(rows)
        for i, row in enumerate(rows):
            file = root / mode / classes[[0, 1, 2, 2, 1, 0][i % 6]] / f"{i:05d}.png"
            with Image.open(file) as image:
                assert image.format == "PNG"
                np.testing.assert_array_equal(np.asarray(image), row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_food101_by_its_own_lists(curate, tmp_path):
    folder = tmp_path / "source" / "food-101"
    listed = {"train": {}, "test": {}}
    for label in ("apple_pie", "baby_back_ribs"):
        for i in range(5):
            save_noise(folder / "images" / label / f"{i}.jpg", i)
            listed["train" if i < 3 else "test"].setdefault(label, []).append(f"{label}/{i}")
    (folder / "meta").mkdir()
    for mode, names in listed.items():
        (folder / "meta" / f"{mode}.json").write_text(json.dumps(names))
    assert curate("Food101")[0] == 0
    root = tmp_path / "data" / "Food101"
    assert files(root) == {
        f"{mode}/{name}.jpg": (folder / "images" / f"{name}.jpg").read_bytes()
        for mode, names in listed.items()
        for of_class in names.values()
        for name in of_class
    }
    assert texts(tmp_path, "Food101") == {"apple_pie": "apple pie", "baby_back_ribs": "baby back ribs"}

    # One class of a list; and an archive that was unpacked only in part.
    (tmp_path / "list.txt").write_text("baby_back_ribs\tpork ribs, grilled\n")
    (folder / "images" / "baby_back_ribs" / "4.jpg").unlink()
    code, _, said = curate("Food101", "--classes", str(tmp_path / "list.txt"), "--dataset", "Ribs")
    assert code == 2
    assert "baby_back_ribs/4.jpg can't be read" in said
    save_noise(folder / "images" / "baby_back_ribs" / "4.jpg", 4)
    assert curate("Food101", "--classes", str(tmp_path / "list.txt"), "--dataset", "Ribs")[0] == 0
    assert DatasetPaths(tmp_path / "data", "Ribs").class_texts() == {"baby_back_ribs": "pork ribs"}


def make_caltech(tmp_path):
    folder = tmp_path / "source" / "caltech256" / "256_ObjectCategories"
    for label in ("001.ak47", "002.american-flag", "232.t-shirt", "253.faces-easy-101", "257.clutter"):
        for i in range(10):
            save_noise(folder / label / f"{label[:3]}_{i + 1:04d}.jpg", i)
    save_noise(folder / "001.ak47" / "greg" / "stray.jpg", 0)  # the archive has the like of both
    (folder / "002.american-flag" / "RENAME2").write_text("#!/bin/sh")
    return folder


def test_caltech256_is_divided(curate, tmp_path):
    make_caltech(tmp_path)
    code, said, _ = curate("Caltech256")
    assert code == 0
    root = tmp_path / "data" / "Caltech256"
    assert texts(tmp_path, "Caltech256") == {
        "001.ak47": "ak47",
        "002.american-flag": "american flag",
        "232.t-shirt": "t-shirt",
        "253.faces-easy-101": "faces easy",
    }
    train, test = ({file.name for file in (root / mode).glob("*/*")} for mode in ("train", "test"))
    assert not train & test
    assert train | test == {f"{number}_{i:04d}.jpg" for number in ("001", "002", "232", "253") for i in range(1, 11)}
    assert {len(list(of_class.iterdir())) for of_class in (root / "test").iterdir()} == {2}
    assert f"{root / 'train'}: 32 images of 4 classes" in said

    # The trainer takes it as it is.
    data = DataManager(DatasetPaths(tmp_path / "data", "Caltech256"), shuffle=False, seed=0, init_cls=2, increment=2)
    assert [len(data.train_images(target)) for target in range(data.nb_classes)] == [8] * 4

    # The same again is the same; another seed would test on what this one trains on.
    before = tree(root)
    code, said, _ = curate("Caltech256")
    assert (code, "0 of 40 images were written now" in said, tree(root)) == (0, True, before)
    code, _, said = curate("Caltech256", "--split-seed", "1")
    assert code == 2
    assert "source or split" in said
    assert tree(root) == before
    assert curate("Caltech256", "--split-seed", "1", "--dataset", "Other", "--test-share", "0.5")[0] == 0
    other = {file.name for file in (tmp_path / "data" / "Other" / "test").glob("*/*")}
    assert len(other) == 20
    assert not test <= other

    (tmp_path / "list.txt").write_text("001.ak47\n257.clutter\n")
    assert curate("Caltech256", "--classes", str(tmp_path / "list.txt"), "--dataset", "Two")[0] == 0
    assert set(texts(tmp_path, "Two")) == {"001.ak47", "257.clutter"}


def test_a_killed_command_goes_on(curate, tmp_path, monkeypatch):
    make_caltech(tmp_path)
    assert curate("Caltech256", "--dataset", "Whole")[0] == 0
    with monkeypatch.context() as patch:
        kill_at(17, patch)
        with pytest.raises(Killed):
            curate("Caltech256")
    root = tmp_path / "data" / "Caltech256"
    assert len(list(root.rglob("*.jpg"))) == 17
    first = next(root.rglob("*.jpg"))
    os.utime(first, (1, 1))
    code, said, _ = curate("Caltech256")
    assert code == 0
    assert "23 of 40 images were written now" in said
    assert first.stat().st_mtime == 1  # what was there was not written again
    assert tree(root) == tree(tmp_path / "data" / "Whole")


def test_class_names_are_the_users(curate, tmp_path):
    make_caltech(tmp_path)
    assert curate("Caltech256")[0] == 0
    file = tmp_path / "data" / "Caltech256" / "class_names.json"
    file.write_text('{"001.ak47": "assault rifle"}')
    assert curate("Caltech256")[0] == 0
    assert file.read_text() == '{"001.ak47": "assault rifle"}'


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Food101", "Caltech256"])
def test_no_network(curate, name):
    code, _, said = curate(name)
    assert code == 2
    assert said.startswith(f"error: {name} is not in ")
    assert "no network here" in said
    assert "--source" in said


@pytest.mark.long
@pytest.mark.parametrize("name", ["CIFAR10", "Food101"])
def test_torchvisions_datasets_in_a_process_of_their_own(tmp_path, name):
    """Where nothing has imported torch before, and torchvision may have been built for another one."""
    closed = {f"{protocol}_proxy": "http://127.0.0.1:9" for protocol in ("http", "https")}
    done = subprocess.run(
        [sys.executable, "-m", "utils.curate", name, "--data-dir", str(tmp_path)],
        cwd=Path(__file__).parent.parent, env={**os.environ, **closed}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} is not in {tmp_path / 'downloads'} and can't be downloaded")


# Folders of class folders

WORDNET = ("n01440764", "n01491361", "n02102040")


@pytest.fixture
def imagenet(tmp_path):
    for label in WORDNET:
        for i in range(3):
            save_noise(tmp_path / "source" / "train" / label / f"{label}_{i}.JPEG", i)
        save_noise(tmp_path / "source" / "val" / label / f"ILSVRC2012_val_{label}.JPEG", 9)
    (tmp_path / "source" / "train" / WORDNET[0] / "notes.txt").write_text("no picture")
    (tmp_path / "source" / "test").mkdir()  # ImageNet's has no labels
    save_noise(tmp_path / "source" / "test" / "ILSVRC2012_test_1.JPEG", 1)
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("synsets.txt", "n01440764 tench, Tinca tinca\n\nn01491361 tiger shark, Galeocerdo cuvieri\n"),
        ("tabs.txt", "n01440764\ttench\nn01491361\ttiger shark\n"),
        ("texts.json", '{"n01440764": "tench", "n01491361": "tiger_shark"}'),
        ("index.json", '{"0": ["n01440764", "tench"], "3": ["n01491361", "tiger_shark"]}'),
    ],
)
def test_an_image_folder_with_a_class_list(curate, tmp_path, imagenet, name, content):
    (tmp_path / name).write_text(content)
    assert curate("folder", "--dataset", "Fish", "--classes", str(tmp_path / name))[0] == 0
    root = tmp_path / "data" / "Fish"
    assert texts(tmp_path, "Fish") == {"n01440764": "tench", "n01491361": "tiger shark"}
    assert files(root) == {
        f"{mode}/{file.parent.name}/{file.name}": file.read_bytes()
        for mode, place in (("train", "train"), ("test", "val"))
        for label in WORDNET[:2]
        for file in (imagenet / place / label).glob("*.JPEG")
    }


def test_numbers_without_texts(curate, tmp_path, imagenet):
    for name, content in (("some.txt", "\n".join(WORDNET[:2])), ("some.json", json.dumps(WORDNET[:2]))):
        (tmp_path / name).write_text(content)
        code, said, _ = curate("folder", "--dataset", "Fish", "--classes", str(tmp_path / name))
        assert code == 0
        assert "2 classes have no text" in said
        assert not (tmp_path / "data" / "Fish" / "class_names.json").exists()
    index = {
        str(i): [label, text] for i, (label, text) in enumerate(zip(WORDNET, ("tench", "shark", "dog"), strict=True))
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    options = ("--classes", str(tmp_path / "some.txt"), "--texts", str(tmp_path / "index.json"))
    assert curate("folder", "--dataset", "Fish", *options)[0] == 0
    assert texts(tmp_path, "Fish") == {"n01440764": "tench", "n01491361": "shark"}


def test_a_folder_without_a_split(curate, tmp_path):
    """Labels with spaces, a class that is called train, and folders within a class's."""
    for i in range(6):
        save_noise(tmp_path / "source" / "red_disc 2" / f"{i}.png", i)
        save_noise(tmp_path / "source" / "train" / f"{i}.png", i)
        save_noise(tmp_path / "source" / "déjà vu" / "part" / f"{i}.png", i)
        save_noise(tmp_path / "source" / "déjà vu" / f"{i}.png", i + 10)
    assert curate("folder", "--dataset", "Mine", "--test-share", "0.5")[0] == 0
    root = tmp_path / "data" / "Mine"
    assert texts(tmp_path, "Mine") == {"déjà vu": "déjà vu", "red_disc 2": "red disc 2", "train": "train"}
    assert {path.parent.name: len(list(path.parent.iterdir())) for path in (root / "test").glob("*/*")} == {
        "déjà vu": 6,
        "red_disc 2": 3,
        "train": 3,
    }
    assert sorted(files(root).values()) == sorted(files(tmp_path / "source").values())


def test_parts_share_no_picture(curate, tmp_path, imagenet):
    for name, train, test in (("A", ":2", ":1"), ("B", "2:", "0:0")):
        assert curate("folder", "--dataset", name, "--train-part", train, "--test-part", test)[0] == 0
    a, b = files(tmp_path / "data" / "A"), files(tmp_path / "data" / "B")
    assert sorted(b) == [f"train/{label}/{label}_2.JPEG" for label in WORDNET]
    assert sorted(a) == sorted(
        [f"train/{label}/{label}_{i}.JPEG" for label in WORDNET for i in range(2)]
        + [f"test/{label}/ILSVRC2012_val_{label}.JPEG" for label in WORDNET]
    )
    assert all(content == (imagenet / name).read_bytes() for name, content in b.items())
    code, _, said = curate("folder", "--dataset", "C", "--train-part", "3:")
    assert code == 2
    assert f"class '{WORDNET[0]}' has 3 train pictures, none of them in 3:." in said
    code, _, said = curate("folder", "--dataset", "C", "--test-part", "x")
    assert code == 2
    assert "'x' is not of the form 0:200" in said


def test_a_source_that_is_not_there(curate, tmp_path):
    code, _, said = curate("folder", "--dataset", "X")
    assert (code, said) == (2, f"error: --source: {tmp_path / 'source'} is not a folder.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["folder"], ["--dataset NAME"]),
        (["folder", "--dataset", "X"], ["no class folders"]),
        (["folder", "--dataset", "X", "--test-share", "1.5"], ["--test-share", "1.5"]),
        (["folder", "--dataset", "X", "--split-seed", "-1"], ["'-1' is not a whole number of at least 0"]),
        (["folder", "--dataset", "X", "--classes", "LIST"], ["2 of 2 classes", "not in", "cat, dog"]),
        (["folder", "--dataset", "X", "--classes", "none.txt"], ["none.txt", "no list of classes"]),
        (["folder", "--dataset", "X", "--texts", "BROKEN"], ["broken.json", "no list of classes"]),
    ],
)
def test_mistakes(curate, tmp_path, options, words):
    (tmp_path / "source").mkdir()
    (tmp_path / "list.txt").write_text("dog\ncat\n")
    (tmp_path / "broken.json").write_text('{"a": 3}')
    places = {"LIST": str(tmp_path / "list.txt"), "BROKEN": str(tmp_path / "broken.json")}
    code, _, said = curate(*(places.get(option, option) for option in options))
    assert code == 2
    for word in words:
        assert word in said
    assert not (tmp_path / "data" / "X").exists()


def test_classes_that_lack_pictures(curate, tmp_path, imagenet):
    (imagenet / "val" / WORDNET[2] / f"ILSVRC2012_val_{WORDNET[2]}.JPEG").unlink()
    code, _, said = curate("folder", "--dataset", "X")
    assert code == 2
    assert f"class '{WORDNET[2]}' has no pictures in {imagenet / 'val'}" in said
    save_noise(tmp_path / "source" / "alone" / "1.png", 0)
    for folder in ("train", "val", "test"):
        (imagenet / folder).rename(tmp_path / folder)
    code, _, said = curate("folder", "--dataset", "X")
    assert code == 2
    assert "too few to divide" in said


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        # Kaggle's ImageNet-100
        (
            ("train.X1/a", "train.X1/b", "train.X2/c", "val.X/a"),
            "train.X1, train.X2, val.X hold class folders (such as train.X1/a)",
        ),
        (("train1/a", "train2/b", "val/a", "other"), "train1, train2, val hold class folders (such as train1/a)"),
        (("birds/crow", "birds/owl", "fish/shark"), "birds, fish hold class folders (such as birds/crow)"),
        (("train/birds/crow", "train/fish/shark"), "birds, fish hold class folders (such as birds/crow)"),
    ],
)
def test_folders_one_level_too_high_are_no_classes(curate, tmp_path, folders, words):
    for folder in folders:
        for i in range(3):
            save_noise(tmp_path / "source" / folder / f"{i}.png", i)
    code, _, said = curate("folder", "--dataset", "X")
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "data" / "X").exists()


def test_a_folder_within_each_class_folder(curate, tmp_path):
    """As Tiny ImageNet has it; groups of classes are taken as classes where a list names them."""
    for folder in ("a/images", "b/images", "c/one", "c/two"):
        for i in range(3):
            save_noise(tmp_path / "source" / folder / f"{i}.png", i)
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "all.txt").write_text("a\nb\nc\n")
    assert curate("folder", "--dataset", "All")[0] == 2
    assert curate("folder", "--dataset", "All", "--classes", str(tmp_path / "all.txt"))[0] == 0
    names = {file.name for file in (tmp_path / "data" / "All").glob("*/c/*.png")}
    assert names == {f"{folder}_{i}.png" for folder in ("one", "two") for i in range(3)}
    shutil.rmtree(tmp_path / "source" / "c")
    assert curate("folder", "--dataset", "Two")[0] == 0
    assert {file.name for file in (tmp_path / "data" / "Two").glob("*/a/*")} == {f"images_{i}.png" for i in range(3)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("twice.json", '{"a": "one", "b": "two", "a": "three"}', "a is given 2 times; keep one"),
        ("index.json", '{"0": ["a", "one"], "1": ["a", "two"]}', "a has two texts, 'one' and 'two'; keep one"),
        ("lines.txt", "a\tone\nb\na\ttwo\n", "a has two texts, 'one' and 'two'; keep one"),
    ],
)
def test_a_class_that_a_list_names_twice(curate, tmp_path, name, content, words):
    for label in "ab":
        for i in range(2):
            save_noise(tmp_path / "source" / label / f"{i}.png", i)
    (tmp_path / name).write_text(content)
    for option in ("--classes", "--texts"):
        code, _, said = curate("folder", "--dataset", "X", option, str(tmp_path / name))
        assert code == 2
        assert words in said
    (tmp_path / "again.txt").write_text("a\tone\na\tone\n")
    assert curate("folder", "--dataset", "X", "--classes", str(tmp_path / "again.txt"))[0] == 0
    assert texts(tmp_path, "X") == {"a": "one"}


def test_a_flat_val_beside_train_is_said(curate, tmp_path):
    for label in "ab":
        for i in range(3):
            save_noise(tmp_path / "source" / "train" / label / f"{i}.png", i)
    save_noise(tmp_path / "source" / "val" / "ILSVRC2012_val_00000001.png", 9)
    code, _, said = curate("folder", "--dataset", "X")
    assert code == 2
    assert f"{tmp_path / 'source' / 'val'} holds pictures without class folders" in said
    assert not (tmp_path / "data" / "X").exists()


def test_a_dataset_outside_the_data_folder_is_refused(curate, tmp_path):
    save_noise(tmp_path / "source" / "a" / "1.png", 1)
    code, _, said = curate("folder", "--dataset", "../Z")
    assert code == 2
    assert "one folder of the data folder, not '../Z'" in said
    assert not (tmp_path / "Z").exists()


def test_a_failed_download_leaves_no_folder(curate, tmp_path):
    assert curate("Caltech256")[0] == 2
    assert not (tmp_path / "source").exists()


def test_links_in_place_of_copies(curate, tmp_path):
    for label in ("a", "b"):
        for i in range(4):
            save_noise(tmp_path / "source" / label / f"{i}.png", seed=i)
    assert curate("folder", "--dataset", "Copied")[0] == 0
    for _ in range(2):  # a rerun finds them there
        code, said, _ = curate("folder", "--dataset", "Linked", "--link")
        assert code == 0
    assert "0 of 8 images were written now" in said
    assert files(tmp_path / "data" / "Linked") == files(tmp_path / "data" / "Copied")
    linked = [file for file in (tmp_path / "data" / "Linked").rglob("*.png") if file.is_symlink()]
    assert len(linked) == 8
    assert {file.resolve().parent.parent for file in linked} == {tmp_path / "source"}


def test_links_to_a_source_that_has_moved_are_made_anew(curate, tmp_path):
    for label in ("a", "b"):
        for i in range(4):
            save_noise(tmp_path / "source" / label / f"{i}.png", seed=i)
    assert curate("folder", "--dataset", "Linked", "--link")[0] == 0
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    moved = ("--source", str(tmp_path / "elsewhere"))
    code, said, _ = curate("folder", "--dataset", "Linked", "--link", *moved)
    assert code == 0
    assert "8 of 8 images were written now" in said
    assert sorted(files(tmp_path / "data" / "Linked").values()) == sorted(files(tmp_path / "elsewhere").values())

    (tmp_path / "elsewhere").rename(tmp_path / "source")
    code, said, _ = curate("folder", "--dataset", "Linked")  # copies now
    assert code == 0
    assert "8 of 8 images were written now" in said
    assert not [file for file in (tmp_path / "data" / "Linked").rglob("*.png") if file.is_symlink()]
