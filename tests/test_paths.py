"""Paths on disk and image files (utils/data/paths.py, utils/data/images.py)."""

import errno
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import save_picture
from utils.data.images import image_bits, is_image, read_image
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError
from utils.files import write_atomically


def test_layout_is_the_documented_one(tmp_path):
    image = save_picture(tmp_path / "Food101" / "train" / "apple_pie" / "0001.jpg")
    paths = DatasetPaths(tmp_path, "Food101")
    root = tmp_path / "Food101"
    assert paths.classes() == ["apple_pie"]
    assert paths.images("apple_pie") == [image]
    assert paths.kept(image) == root / "edge_maps" / "apple_pie" / "0001.edges"
    assert paths.copy(image, 0) == root / "exemplars" / "apple_pie" / "0001_seed00.jpg"
    assert paths.copy(image, 12).name == "0001_seed12.jpg"
    assert paths.copy(image, 123).name == "0001_seed123.jpg"
    folder = paths.copies_folder("apple_pie")
    assert [folder / paths.copy_name(image, k) for k in range(3)] == [paths.copy(image, k) for k in range(3)]


@pytest.mark.parametrize("data_folder", ["train", "my train data/train/x", "exemplars", "edge_maps/test"])
def test_a_data_folder_that_contains_a_mode_name_does_no_harm(tmp_path, data_folder):
    data = tmp_path / data_folder
    image = save_picture(data / "train" / "train" / "train" / "train.jpg")  # dataset, mode, class and stem alike
    paths = DatasetPaths(data, "train")
    assert paths.images("train") == [image]
    assert paths.kept(image) == data / "train" / "edge_maps" / "train" / "train.edges"
    assert paths.copy(image, 3) == data / "train" / "exemplars" / "train" / "train_seed03.jpg"


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".png", ".PNG", ".bmp", ".webp", ".tif", ".gif"])
def test_any_ending_that_pillow_reads_in_any_case(tmp_path, ending):
    image = save_picture(tmp_path / "D" / "train" / "a" / f"pic.v2{ending}")
    paths = DatasetPaths(tmp_path, "D")
    assert paths.images("a") == [image]
    assert paths.kept(image).name == "pic.v2.edges"
    assert paths.copy(image, 0).name == "pic.v2_seed00.jpg"
    assert read_image(image).size == (32, 32)


def test_images_are_sorted_and_other_files_are_not_among_them(tmp_path):
    folder = tmp_path / "D" / "train" / "a"
    for name in ("b.png", "a.jpg", "c.JPG"):
        save_picture(folder / name)
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db", "list.csv", "no_ending", ".123-abc.tmp"):
        (folder / name).write_text("x")
    assert [path.name for path in DatasetPaths(tmp_path, "D").images("a")] == ["a.jpg", "b.png", "c.JPG"]


def test_stems_that_collide_stay_apart(tmp_path):
    folder = tmp_path / "D" / "train" / "a"
    jpg, png, other = (save_picture(folder / name) for name in ("x.jpg", "x.png", "y.jpg"))
    elsewhere = save_picture(tmp_path / "D" / "train" / "b" / "x.jpg")  # another class is no collision
    paths = DatasetPaths(tmp_path, "D")
    assert paths.kept(jpg).name == "x.jpg.edges"
    assert paths.kept(png).name == "x.png.edges"
    assert paths.copy(jpg, 1).name == "x.jpg_seed01.jpg"
    assert paths.copy(png, 1).name == "x.png_seed01.jpg"
    assert paths.copy(other, 1).name == "y_seed01.jpg"
    assert paths.copy(elsewhere, 1).name == "x_seed01.jpg"


def test_no_two_images_of_a_class_share_what_is_derived_from_them(tmp_path):
    folder = tmp_path / "D" / "train" / "a"
    names = ["a.jpg", "a.png", "a.jpg.png", "B.jpg", "b.jpg", "c.jpg", "a.jpg.png.webp"]
    images = [save_picture(folder / name) for name in names]
    if len(list(folder.iterdir())) < len(names):
        pytest.skip("this disk does not distinguish case")
    paths = DatasetPaths(tmp_path, "D")
    for derived in ([paths.kept(image).name for image in images], [paths.copy(image, 0).name for image in images]):
        assert len({name.casefold() for name in derived}) == len(names)
    assert paths.kept(images[0]).name == "a.jpg.edges"
    assert paths.kept(images[5]).name == "c.edges"


@pytest.mark.parametrize("name", ["../Z", "a/b", "..", ".", "", "/tmp/x"])
def test_a_dataset_is_one_folder_of_the_data_folder(tmp_path, name):
    with pytest.raises(UserError, match="one folder of the data folder"):
        DatasetPaths(tmp_path, name)


def test_pictures_in_folders_within_a_class_are_mentioned(tmp_path, caplog):
    paths = DatasetPaths(tmp_path, "D")
    save_picture(paths.folder("train") / "a" / "1.png")
    (paths.folder("train") / "a" / "notes").mkdir()
    paths.warn_of_nested(["a"])
    assert not caplog.records
    save_picture(paths.folder("train") / "a" / "more" / "2.png")
    paths.warn_of_nested(["a"])
    assert f"{paths.folder('train') / 'a' / 'more'}: pictures in sub-folders" in caplog.text


def test_class_names_match_however_accents_are_composed_and_what_matches_no_class_is_said(tmp_path, caplog):
    paths = DatasetPaths(tmp_path, "D")
    decomposed, composed = unicodedata.normalize("NFD", "crème"), unicodedata.normalize("NFC", "pâté")
    for label in (decomposed, composed, "tart"):
        (paths.folder("train") / label).mkdir(parents=True)
    texts = {unicodedata.normalize("NFC", decomposed): "cream", unicodedata.normalize("NFD", composed): "pie"}
    texts = json.dumps({**texts, "tartt": "a tart"})
    (paths.root / "class_names.json").write_text(texts, encoding="utf-8-sig")  # with a BOM
    assert paths.class_texts() == {decomposed: "cream", composed: "pie", "tart": "tart"}
    assert "1 of its 3 entries match no class folder, such as 'tartt'" in caplog.text
    paths.class_texts()
    assert len(caplog.records) == 1, "said once"


def test_a_label_that_is_not_utf_8_has_a_text(tmp_path):
    paths = DatasetPaths(tmp_path, "D")
    label = os.fsdecode(b"caf\xe9")
    (paths.folder("train") / label).mkdir(parents=True)
    assert paths.class_texts() == {label: "caf?"}


@pytest.mark.parametrize("label", ["hot dog", "crème brûlée", "寿司", "a.b.c", "50% off [x]", "-dash"])
def test_labels_with_spaces_and_other_alphabets(tmp_path, label):
    image = save_picture(tmp_path / "D" / "train" / label / "bild 1 ü.jpg")
    paths = DatasetPaths(tmp_path, "D")
    assert paths.classes() == [label]
    assert paths.images(label) == [image]
    assert paths.copy(image, 0) == tmp_path / "D" / "exemplars" / label / "bild 1 ü_seed00.jpg"
    assert paths.class_texts() == {label: label}


def test_classes_are_sorted_folders(tmp_path):
    paths = DatasetPaths(tmp_path, "D")
    for label in ("b", "a", "C", ".hidden"):
        (paths.folder("train") / label).mkdir(parents=True)
    (paths.folder("train") / "README.txt").write_text("not a class")
    assert paths.classes() == ["C", "a", "b"]


def test_a_missing_folder_and_one_without_classes_are_named(tmp_path):
    paths = DatasetPaths(tmp_path, "Nope")
    with pytest.raises(UserError, match="Nope") as error:
        paths.classes("test")
    assert str(tmp_path / "Nope" / "test") in str(error.value)
    paths.folder("train").mkdir(parents=True)
    with pytest.raises(UserError, match="no class folders"):
        paths.classes("train")
    assert paths.images("no such class") == []


@pytest.mark.parametrize("name", ["x.jpg", "x.v2.jpg"])
def test_edge_maps_coded_first_then_webp_then_png_then_the_published_bmp(tmp_path, name):
    paths = DatasetPaths(tmp_path, "D")
    image = save_picture(paths.folder("train") / "a" / name)
    assert paths.find_kept(image) is None
    for ending, mode in ((".bmp", "L"), (".png", "1"), (".webp", "RGB")):
        edge_map = save_picture(paths.folder("kept") / "a" / f"{image.stem}{ending}", mode=mode)
        assert paths.find_kept(image) == edge_map
    paths.kept(image).touch()
    assert paths.find_kept(image) == paths.kept(image)


def test_a_name_too_long_for_an_edge_map_has_none(tmp_path):
    paths = DatasetPaths(tmp_path, "D")
    image = save_picture(paths.folder("train") / "a" / f"{'x' * 251}.jpg")
    assert paths.images("a") == [image]
    assert paths.find_kept(image) is None


def test_class_names_json_changes_the_texts_it_names(tmp_path):
    paths = DatasetPaths(tmp_path, "D")
    for label in ("n01440764", "cat"):
        (paths.folder("train") / label).mkdir(parents=True)
    (paths.root / "class_names.json").write_text('{"n01440764": "tench 🐟"}', encoding="utf-8")
    assert paths.class_texts() == {"n01440764": "tench 🐟", "cat": "cat"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ('["tench"]', "one object of texts"),
        ('{"cat": 3}', "one object of texts"),
        ('{"cat": "cat", "cat": "lion"}', "cat is given 2 times; keep one"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_class_names_json_is_named(tmp_path, content, words):
    paths = DatasetPaths(tmp_path, "D")
    (paths.folder("train") / "cat").mkdir(parents=True)
    (paths.root / "class_names.json").write_text(content)
    with pytest.raises(UserError, match=rf"class_names\.json .*{words}"):
        paths.class_texts()


def test_data_dir_chosen_then_environment_then_default(monkeypatch):
    monkeypatch.setenv("ESCORT_DATA_DIR", "/from/environment")
    assert data_dir("/chosen") == Path("/chosen")
    assert data_dir() == Path("/from/environment")
    monkeypatch.delenv("ESCORT_DATA_DIR")
    assert data_dir() == Path("data")
    assert data_dir("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
    ],
)
def test_every_picture_is_read_as_rgb(tmp_path, mode, colour, expected):
    image = read_image(save_picture(tmp_path / "x.png", colour, (5, 3), mode))
    assert image.mode == "RGB"
    assert image.size == (5, 3)
    assert (np.asarray(image) == expected).all()


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "x.png")
    image = np.asarray(read_image(tmp_path / "x.png"))
    np.testing.assert_array_equal(image, np.repeat((levels // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize(("mode", "bits"), [("RGB", 24), ("RGBA", 24), ("L", 8), ("I;16", 16), ("1", 1)])
def test_image_bits_from_the_header_alone(tmp_path, mode, bits):
    path = save_picture(tmp_path / "x.png", 0, (50, 30), mode)
    path.write_bytes(path.read_bytes()[:60])  # the header is there, most of the picture is not
    assert image_bits(path) == (50, 30, bits)


def broken_files(folder: Path) -> dict[str, Path]:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    contents = {
        "truncated": whole.getvalue()[: len(whole.getvalue()) // 2],
        "text": b"these are not the pixels you are looking for",
        "empty": b"",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    (folder / "folder.jpg").mkdir()
    return {name: folder / f"{name}.jpg" for name in (*contents, "folder", "missing")}


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "folder", "missing"])
def test_an_unreadable_picture_is_an_oserror_that_names_it(tmp_path, kind):
    path = broken_files(tmp_path)[kind]
    with pytest.raises(OSError, match=kind) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_is_image_goes_by_the_ending():
    assert is_image(Path("a.JPG"))
    assert not is_image(Path("a.pdf"))
    assert not is_image(Path("a.txt"))
    assert not is_image(Path("jpg"))
    assert not is_image(Path(".a.jpg"))


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new folder" / "x.bin"
    write_atomically(target, lambda file: file.write(b"first"))
    write_atomically(target, lambda file: file.write(b"second"))
    assert target.read_bytes() == b"second"
    assert os.listdir(target.parent) == ["x.bin"]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, failure):
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("step", ["open", "chmod", "replace", "write"])
def test_a_read_only_disk_names_the_file_itself(tmp_path, monkeypatch, step):
    def refuse(*names, **_):
        raise OSError(errno.EROFS, "Read-only file system", *map(str, names[:1]))

    target = tmp_path / "x.bin"
    if step != "write":
        monkeypatch.setattr(Path if step == "open" else os, step, refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_atomically(target, (lambda _: refuse()) if step == "write" else lambda file: file.write(b"content"))
    assert (caught.value.filename, caught.value.filename2) == (str(target), None)
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_source_names_the_source(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "x.bin", lambda file: file.write((tmp_path / "source").read_bytes()))
    assert caught.value.filename == str(tmp_path / "source")


def test_the_target_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "x.jpg"
    seen = []
    write_atomically(target, lambda file: (file.write(b"part"), seen.append(target.exists())))
    assert seen == [False]
    assert target.read_bytes() == b"part"


def test_a_half_written_file_is_never_taken_for_an_image(tmp_path):
    folder = tmp_path / "D" / "train" / "a"
    seen = []
    write_atomically(
        folder / "x.jpg", lambda file: (file.write(b"part"), seen.extend(DatasetPaths(tmp_path, "D").images("a")))
    )
    assert seen == []
