"""Published class lists, and folders made from them."""

import json
import re

import numpy as np
import pytest

import main
from tests.folders import save_noise
from utils.curate import command
from utils.curate.sources import SOURCES
from utils.data.datasets import FETCHED, FOLDER, class_lists, find_list
from utils.data.datasets import published_labels as labels

PUBLISHED = {  # count, first, last
    "ImageNet1000": (1000, "n01440764", "n15075141"),
    "ImageNet100": (100, "n01729322", "n01689811"),
    "ImageNet100-first": (100, "n01440764", "n01855672"),
    "ImageNet-R": (200, "n01443537", "n12267677"),
    "ImageNet-A": (200, "n01498041", "n12267677"),
}


def test_all_lists_are_here():
    assert set(class_lists()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_ends(name):
    count, first, last = PUBLISHED[name]
    listed = labels(name)
    assert (len(listed), listed[0], listed[-1]) == (count, first, last)
    assert len(set(listed)) == count
    assert set(listed) <= set(labels("ImageNet1000"))
    comments = "\n".join(line for line in find_list(name).read_text().splitlines() if line.startswith("# "))
    assert re.search(rf"\b{count:,}\b(?=[ \n#]+(\w+ )?classes)", comments), "the count is not at its top"
    assert "# Source: " in comments


def test_imagenet100_is_the_start_of_the_order_of_seed_1993():
    order = np.random.RandomState(1993).permutation(1000)[:100]
    assert labels("ImageNet100") == [labels("ImageNet1000")[place] for place in order]
    # FOSTER's imagenet-sub and the CIL survey: sorted, the first three and the last three
    ends = sorted(labels("ImageNet100"))
    assert ends[:3] + ends[-3:] == ["n01514668", "n01531178", "n01537544", "n12620546", "n12768682", "n15075141"]


def test_names_are_found_in_any_spelling():
    assert find_list("imagenet_r") == find_list("ImageNet-R") == FOLDER / "ImageNet-R.txt"
    assert find_list("ImageNet-S") is None
    assert labels("ImageNet-S") is None


@pytest.fixture
def curate(tmp_path, capsys):
    def call(*words):
        code = command.main([*words, "--data-dir", str(tmp_path / "data"), "--source", str(tmp_path / "source")])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet-100's classes and one more, a train and a val picture each."""
    for label in [*labels("ImageNet100"), "n99999999"]:
        for mode in ("train", "val"):
            save_noise(tmp_path / "source" / mode / label / f"{label}_{mode}.JPEG", 0, size=(8, 8))
    return tmp_path / "source"


def test_a_folder_with_the_classes_of_a_list(curate, imagenet, tmp_path, capsys):
    code, said, _ = curate("ImageNet100", "--link")
    assert code == 0
    made = tmp_path / "data" / "ImageNet100"
    assert f"{made / 'train'}: 100 images of 100 classes" in said
    assert sorted(path.name for path in (made / "train").iterdir()) == sorted(labels("ImageNet100"))
    one = made / "test" / "n01514668" / "n01514668_val.JPEG"
    assert one.resolve() == imagenet / "val" / "n01514668" / "n01514668_val.JPEG"
    texts = json.loads((made / "class_names.json").read_text())
    assert (len(texts), texts["n01514668"], texts["n01729322"]) == (100, "cock", "hognose snake")

    code, _, _ = curate("folder", "--dataset", "Mine", "--classes", "imagenet100")
    assert code == 0
    assert len(list((tmp_path / "data" / "Mine" / "test").iterdir())) == 100

    assert main.main(["--list", "datasets", f"data_dir={tmp_path / 'data'}"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[:2] == ["ImageNet100", "Mine"]
    assert "ImageNet-R: 200 classes, not there; python -m utils.curate ImageNet-R --source DIR makes it" in listed
    assert not [line for line in listed if line.startswith("ImageNet100:")]
    for dataset, what in FETCHED.items():
        assert f"{dataset}: not there; python -m utils.curate {what} makes it" in listed
    assert set(FETCHED.values()) == {"digits", *SOURCES} - {"folder"}


def test_a_class_of_the_list_that_the_source_lacks(curate, imagenet, tmp_path):
    (imagenet / "train" / "n01514668").rename(imagenet / "train" / "elsewhere")
    code, _, said = curate("ImageNet100")
    assert code == 2
    assert said == f"error: 1 of 100 classes of the list are not in {imagenet / 'train'}: n01514668.\n"
    assert not (tmp_path / "data").exists()


def test_mistakes_in_names(curate, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    code, _, said = curate("folder", "--dataset", "X", "--classes", "ImageNet10")
    assert code == 2
    assert said == "error: --classes: ImageNet10 is neither a file nor a published list. Did you mean ImageNet100?\n"
    assert command.main(["ImageNet100"]) == 2
    assert "ImageNet100 needs --source DIR" in capsys.readouterr().err
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"dataset": "imagenet-r", "init_cls": 2, "increment": 2, "model_name": "der"}))
    assert main.main(["--config", str(config), "convnet_type=resnet18", f"data_dir={tmp_path}"]) == 2
    made_by = f"python -m utils.curate ImageNet-R --source DIR --data-dir {tmp_path} makes it"
    assert made_by in capsys.readouterr().err


def test_a_list_is_a_class_order(tmp_path, capsys):
    values = {"dataset": "ImageNet100", "init_cls": 10, "increment": 10, "model_name": "der"}
    (tmp_path / "c.json").write_text(json.dumps({**values, "convnet_type": "resnet18", "class_order": "ImageNet100"}))
    assert main.main(["--config", str(tmp_path / "c.json"), "--show-config"]) == 0
    assert json.loads(capsys.readouterr().out)["class_order"] == labels("ImageNet100")
    file = find_list("ImageNet100")
    assert main.main(["--config", str(tmp_path / "c.json"), "--show-config", "class_order=[b,a]"]) == 0
    assert json.loads(capsys.readouterr().out)["class_order"] == ["b", "a"]
    (tmp_path / "own.txt").write_text(file.read_text().replace("\thognose snake", ""))
    assert (
        main.main(["--config", str(tmp_path / "c.json"), "--show-config", f"class_order={tmp_path / 'own.txt'}"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["class_order"][0] == "n01729322"


SPLITS = {
    "paths": ("a/1.jpg\nb c/2.jpg\n", "test/a/3.jpg\nb c/1.jpg\n"),
    "with class numbers": ("train/a/1.jpg 0\ntrain/b c/2.jpg 1\n", "val/a/3.jpg 0\nval/b c/1.jpg 1\n"),
    "yaml": (
        "data:\n- data/X/train/a/1.jpg\n- data/X/test/b c/2.jpg\ntargets:\n- 0\n- 1\n",
        "data:\n- data/X/test/a/3.jpg\n- 'data/X/train/b c/1.jpg'\ntargets:\n- 0\n- 1\n",
    ),
}


@pytest.mark.parametrize("form", SPLITS)
def test_a_split_that_is_two_lists(curate, tmp_path, form):
    for label in ("a", "b c", "unlisted"):
        for number in (1, 2, 3):
            save_noise(tmp_path / "source" / label / f"{number}.jpg", number, size=(8, 8))
    for mode, text in zip(("train", "test"), SPLITS[form], strict=True):
        (tmp_path / f"{mode}.txt").write_text(text)
    lists = ["--train-list", str(tmp_path / "train.txt"), "--test-list", str(tmp_path / "test.txt")]
    assert curate("folder", "--dataset", "X", *lists)[0] == 0
    made = tmp_path / "data" / "X"
    assert sorted(path.relative_to(made).as_posix() for path in made.glob("*/*/*")) == [
        "test/a/3.jpg", "test/b c/1.jpg", "train/a/1.jpg", "train/b c/2.jpg",
    ]  # fmt: skip
    (tmp_path / "source" / "b c" / "2.jpg").unlink()
    code, _, said = curate("folder", "--dataset", "Y", *lists)
    assert code == 2
    assert said.startswith(f"error: 1 of 4 listed pictures are not in {tmp_path / 'source'}, such as ")
    assert said.endswith("b c/2.jpg.\n")
    for options, words in (
        (lists[:2], "--train-list and --test-list go together, with folder"),
        ([*lists[:3], lists[1]], "2 pictures are in both lists, such as a/1.jpg"),
        ([*lists[:3], str(tmp_path / "no.txt")], "no.txt can't be read"),
        ([*lists[:3], str(find_list("ImageNet-R"))], "is no list of pictures"),
    ):
        code, _, said = curate("folder", "--dataset", "Y", *options)
        assert code == 2
        assert words in said


def test_pictures_of_a_split_that_have_the_same_name(curate, tmp_path):
    """train/a/2.jpg and test/a/2.jpg are two pictures; each list means the one of its folder."""
    for i, folder in enumerate(("train/a", "test/a", "train/b", "test/b")):
        for number in (1, 2):
            save_noise(tmp_path / "source" / folder / f"{number}.jpg", 10 * i + number, size=(8, 8))
    for dataset, train, test in (
        ("Named", "train/a/1.jpg\ntrain/b/1.jpg\n", "test/a/2.jpg\ntest/b/1.jpg\n"),
        ("Bare", "a/1.jpg\nb/1.jpg\n", "a/2.jpg\nb/1.jpg\n"),
    ):
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "test.txt").write_text(test)
        lists = ["--train-list", str(tmp_path / "train.txt"), "--test-list", str(tmp_path / "test.txt")]
        assert curate("folder", "--dataset", dataset, *lists)[0] == 0
        made = tmp_path / "data" / dataset
        written = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.glob("*/*/*.jpg")}
        places = ("train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "test/b/1.jpg")
        assert written == {place: (tmp_path / "source" / place).read_bytes() for place in places}

    # a picture that a list names in a folder is not taken from another one; test pictures may be some of train/
    (tmp_path / "source" / "test" / "a" / "2.jpg").unlink()
    (tmp_path / "test.txt").write_text("test/a/2.jpg\n")
    code, _, said = curate("folder", "--dataset", "Gone", *lists)
    assert (code, said) == (
        2,
        f"error: 1 of 3 listed pictures are not in {tmp_path / 'source'}, such as test/a/2.jpg.\n",
    )
    (tmp_path / "test.txt").write_text("train/a/2.jpg\ntrain/b/2.jpg\n")
    assert curate("folder", "--dataset", "Held", *lists)[0] == 0
    held = tmp_path / "data" / "Held" / "test" / "a" / "2.jpg"
    assert held.read_bytes() == (tmp_path / "source" / "train" / "a" / "2.jpg").read_bytes()
