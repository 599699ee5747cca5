"""Files as train folders hold them: each is processed right or listed with a reason, and none stops the rest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from compress import presets, run
from compress.coding.edge_maps import encode
from compress.forms.edges import read as edges_of
from compress.presets import HIGH
from compress.records import Recipe, Records
from compress.training.exemplars import Cost
from compress.verify import verify
from tests import hostile_images
from tests.folders import make_dataset
from tests.little_model import little_model
from tests.regenerating import Maker, edges
from utils.data.augment import FullSize
from utils.data.batches import ImageSet
from utils.data.images import MAX_PIXELS, UnreadableImage, image_bits, is_image, read_image
from utils.data.paths import DatasetPaths

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # as utils.data.images does, whose filters pytest resets
REPOSITORY = Path(__file__).parents[1]
LEVELS = 3
"""How far a JPEG at quality 95 without colour subsampling is from its picture, in levels of 255."""


class AsTheyAre:
    """Stands for a transform."""

    prepare = FullSize()

    def __call__(self, pictures):
        return torch.stack([torch.tensor(picture) for picture in pictures])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path)).astype(int)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return hostile_images.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return hostile_images.write_broken(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    return hostile_images.write_bombs(tmp_path_factory.mktemp("bombs"))


def test_there_are_many_kinds(pictures, broken, bombs):
    assert len(pictures) > 60
    assert len(broken) > 25
    assert len(bombs) > 10
    assert all(is_image(path) for path in [*pictures, *broken, *bombs])


def test_every_picture_is_read_as_it_is_shown(pictures):
    wrong = {
        path.name: pixels(path).shape
        for path, shown in pictures.items()
        if pixels(path).shape != shown.shape or abs(pixels(path) - shown).max() > LEVELS
    }
    assert not wrong


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "cmyk of adobe.jpg", "ycck.jpg", "turned 6.jpg"])
def test_opencv_sees_the_same_picture(pictures, name):
    path = next(path for path in pictures if path.name == name)
    assert abs(cv2.imread(str(path))[..., ::-1] - pixels(path)).max() <= LEVELS


def test_the_header_tells_the_size_and_depth_that_the_picture_is_read_with(pictures):
    for path, shown in pictures.items():
        width, height, bits = image_bits(path)
        assert (height, width) == shown.shape[:2], path.name
        assert (bits != 24) == ("grey" in path.name or "one bit" in path.name), path.name
    assert {image_bits(path)[2] for path in pictures} == {1, 8, 16, 24}


def test_training_sees_the_same_pixels(pictures):
    paths = [path for path in pictures if "turned" in path.name or "alpha" in path.name]
    data = ImageSet(paths, [0] * len(paths), AsTheyAre())
    for index, path in enumerate(paths):
        assert np.array_equal(data[index][1], np.asarray(read_image(path)))


def test_a_turned_picture_costs_its_edge_map_at_the_shown_size(pictures, tmp_path):
    turned = next(path for path in pictures if path.name == "turned 8.jpg")
    edge_map = edges(HIGH).edges(np.asarray(read_image(turned)))
    assert edge_map.shape == (hostile_images.HEIGHT, hostile_images.WIDTH)
    paths = DatasetPaths(tmp_path, "Toy")
    (paths.folder("train") / "a").mkdir(parents=True)
    image = Path(shutil.copy(turned, paths.folder("train") / "a" / "x.jpg"))
    assert Cost(edges(HIGH), paths).units(image) == pytest.approx(1 / 24, rel=1e-12)
    paths.kept(image).parent.mkdir(parents=True)
    paths.kept(image).write_bytes(encode(edge_map))
    assert Cost(edges(HIGH), paths).units(image) == pytest.approx(1 / 24, rel=1e-12)


def test_a_broken_file_is_an_oserror_with_a_reason(broken):
    for path, reason in broken.items():
        if reason == "too long":
            continue  # only what is made of it is
        with pytest.raises(OSError, match=r"\S") as error:
            read_image(path)
        message = str(error.value)
        assert message.startswith(f"{path}: "), message
        assert re.search(reason, message.removeprefix(f"{path}: ")), message
        assert message.count(str(path)) == 1, message
        with pytest.raises(UnreadableImage):
            ImageSet([path], [0], AsTheyAre())[0]


@pytest.mark.parametrize("size", [(20_000, 1), (2, 9_000)])
def test_a_picture_too_elongated_to_be_resized_is_named(tmp_path, size):
    Image.new("1", size).save(tmp_path / "thin.png")
    with pytest.raises(UnreadableImage, match=r"thin\.png: \d+ x \d+ pixels are too elongated"):
        ImageSet([tmp_path / "thin.png"], [0], AsTheyAre())[0]


@pytest.mark.parametrize(
    ("form", "size"), [("webp:10", (20_000, 1)), ("jpeg:10", (1, 70_000)), ("avif:10", (1, 70_000))]
)
def test_a_picture_too_long_for_a_codec_is_listed_and_the_others_are_made(tmp_path, capsys, form, size):
    paths = make_dataset(tmp_path, "a", train=2, test=0)
    Image.new("RGB", size).save(paths.folder("train") / "a" / "long.png")
    options = ["--data-dir", str(tmp_path), "--dataset", paths.dataset, "--resolution", "high", "--form", form]
    assert run.main([*options, "--dry-run"]) == 0
    assert run.main(options) == 1
    said = capsys.readouterr().out
    assert "copies: 2 made, 0 skipped, 1 failed" in said
    assert f"long.png: {size[0]} x {size[1]} pixels can't be written as" in said
    assert run.main([*options, "--verify"]) == 1


def test_a_file_cut_anywhere_shows_its_picture_or_is_refused(tmp_path):
    refused = 0
    for name, (content, shown) in hostile_images.pictures().items():
        for share in (0, 3, 20, 45, 70, 90):
            (tmp_path / "cut").write_bytes(content[: len(content) * share // 100])
            try:
                image = pixels(tmp_path / "cut")
            except OSError:
                refused += 1
            else:
                assert image.shape == shown.shape, (name, share)
                assert abs(image - shown).max() <= LEVELS, (name, share)
    assert refused > 200


def test_a_picture_of_the_largest_size_is_read_and_one_more_row_is_not(tmp_path):
    width = 9_000
    for name, height in (("largest", MAX_PIXELS // width), ("larger", MAX_PIXELS // width + 1)):
        Image.new("1", (width, height)).save(tmp_path / f"{name}.png")
    assert image_bits(tmp_path / "largest.png") == (width, MAX_PIXELS // width, 1)
    for read in (image_bits, read_image):
        with pytest.raises(OSError, match=r"larger\.png: more than 90,000,000 pixels"):
            read(tmp_path / "larger.png")


READ_ALL = """
import resource, sys
from pathlib import Path
from utils.data.images import image_bits, read_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB, where the system counts in KiB
read_image(Path(sys.argv[1]))
before = peak()
for name in sys.argv[2:]:
    for read in (image_bits, read_image):
        try:
            read(Path(name))
        except OSError as error:
            if read is read_image:
                print(error)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units here")
def test_bombs_take_no_memory_and_make_no_noise(bombs, pictures):
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", READ_ALL, str(next(iter(pictures))), *map(str, bombs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    *reasons, grown = run.stdout.splitlines()
    assert len(reasons) == len(bombs)
    assert all("more than 90,000,000 pixels" in reason or "too large" in reason for reason in reasons)
    assert int(grown) < 30  # a single one decoded takes 50 at least
    assert run.stderr == ""


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from utils.errors import UserError
from utils.data.images import read_image
from utils.data.paths import DatasetPaths
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    except PermissionError:
        sys.exit(77)
read_image(Path("open.png"))
for attempt in (
    lambda: read_image(Path("closed.png")),
    lambda: DatasetPaths(Path("."), "Toy").images("closed"),
):
    try:
        attempt()
    except (OSError, UserError) as error:
        print(error)
"""


def test_files_and_folders_that_may_not_be_read_are_refused(tmp_path):
    for name, mode in (("open.png", 0o644), ("closed.png", 0o000)):
        (tmp_path / name).write_bytes(hostile_images.png())
        (tmp_path / name).chmod(mode)
    tmp_path.chmod(0o755)
    (tmp_path / "Toy" / "train" / "closed").mkdir(parents=True, mode=0o000)
    run = subprocess.run(
        [sys.executable, "-c", READ_AS_NOBODY, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    if run.returncode == 77:
        pytest.skip("root reads every file, and may not become another user here")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "closed.png: Permission denied",
        "cannot list Toy/train/closed: Permission denied.",
    ]


@pytest.mark.long
def test_one_run_makes_what_can_be_made_and_lists_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "MAX_PIXELS", 64 * 512)  # 1x3000 pixels make 64x512 in place of 64x12288
    paths = DatasetPaths(tmp_path / "data", "Hostile")
    folder = paths.folder("train") / "a class"
    shown = hostile_images.write_pictures(folder)
    bad = hostile_images.write_broken(folder)
    bad |= dict.fromkeys(hostile_images.write_bombs(folder), ".")
    (folder / ".hidden.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    images = paths.images("a class")
    assert set(images) == set(shown) | set(bad)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = Maker(paths, HIGH.changed(size=64, steps=1), little_model(), batch_size=4)(images, [0])
    finally:
        torch.set_num_threads(threads)

    reasons = {failure.image: failure.reason for failure in result.failures}
    assert set(reasons) == set(bad)
    assert all(reasons.values())
    assert reasons[folder / "loop.jpg"] == "Too many levels of symbolic links"
    assert reasons[folder / "valid.png"] == "more than 90,000,000 pixels"
    assert "too long" in reasons[folder / ("x" * 251 + ".jpg")]
    assert (result.kept_made, result.copies_made) == (len(shown), len(shown))
    for image, picture in shown.items():
        edge_map = edges_of(paths.kept(image).read_bytes(), picture.shape[:2])
        assert np.array_equal(edge_map, cv2.Canny(np.asarray(read_image(image)), 100, 200)), image.name
        with Image.open(paths.copy(image, 0)) as copy:
            assert (copy.height, copy.width) == picture.shape[:2], image.name
            assert (copy.mode == "L") == (image_bits(image)[2] != 24), image.name
    left = [file for kind in ("kept", "copies") for file in os.listdir(paths.folder(kind) / "a class")]
    assert not [name for name in left if name.endswith(".tmp")]
    lossless = [image for image in shown if image.name.startswith("turned") and image.suffix == ".png"]
    size = hostile_images.PICTURE.shape[:2]
    maps = {edges_of(paths.kept(image).read_bytes(), size).tobytes() for image in lossless}
    assert maps == {cv2.Canny(hostile_images.PICTURE, 100, 200).tobytes()}  # however they are stored


@pytest.mark.long
def test_the_command_prints_names_that_are_no_text(tmp_path):
    folder = tmp_path / "Toy" / "train" / "a"
    folder.mkdir(parents=True)
    for name in (b"\xff.jpg", b"two\nlines.jpg", b"100 % \xe2\x82\xac.jpg"):
        (folder / os.fsdecode(name)).write_bytes(b"")
    command = ["compress/run.py", "--data-dir", tmp_path, "--dataset", "Toy", "--resolution", "high"]
    run = subprocess.run(
        [sys.executable, *map(str, command), "--seeds", "1", "--model", "tiny"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.count("the file is empty") == 3
    assert r"\udcff.jpg: the file is empty" in run.stdout


def test_a_name_in_two_lines_belongs_to_its_image(tmp_path):
    paths = DatasetPaths(tmp_path, "Toy")
    image = paths.folder("train") / "a" / "two\nlines.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(hostile_images.png())
    Maker(paths, HIGH.changed(size=64, steps=1), None)([image], [])
    findings = verify(Records(paths, Recipe(edges(HIGH.changed(size=64, steps=1)))), [image], [])
    assert not findings.orphans
