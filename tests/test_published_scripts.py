"""Edge maps, copies and folders as the published scripts make them, with their calls written out here."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH, LOW, MAX_PIXELS, generated_size
from compress.training.copies import check_copies
from tests.folders import make_dataset
from tests.little_run import LABELS, tree
from tests.regenerating import Maker, edges

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

# height and width of an image -> the published sizes of its copies, high and low resolution
SIZES = """
512,512,512,512,512,512    384,512,512,704,256,320    512,384,704,512,320,256    480,640,512,704,256,320
213,160,704,512,320,256    28,28,512,512,256,256      100,300,512,1536,256,768   333,500,512,768,256,384
1200,1600,512,704,512,704  2000,3000,512,768,512,768  511,512,512,512,256,256    97,131,512,704,256,320
150,400,512,1344,256,704   1080,1920,512,896,512,896  512,2048,256,1024,256,1024 50,400,256,2048,256,2048
"""


@pytest.mark.parametrize("row", SIZES.split())
def test_generated_sizes(row):
    height, width, *expected = map(int, row.split(","))
    assert [*HIGH.generated_size(height, width), *LOW.generated_size(height, width)] == expected
    assert [*HIGH.generated_size(width, height), *LOW.generated_size(width, height)][::-1] == [
        *expected[2:],
        *expected[:2],
    ]


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1, 100_000), (2, 390)])
def test_a_very_narrow_image_stays_within_the_limit(height, width):
    """Where the published formula rounds a side to 0."""
    for preset in (HIGH, LOW):
        generated = preset.generated_size(height, width)
        assert generated[0] == 64
        assert generated[0] * generated[1] <= MAX_PIXELS


def test_every_generated_size_is_one_that_the_network_takes():
    for shorter_side in (64, 100, 256, 500, 512, 880):
        for height in (1, 28, 511, 4000):
            for width in (1, 30, 512, 20_000):
                sides = generated_size(height, width, shorter_side)
                assert all(side >= 64 and side % 64 == 0 for side in sides)
                assert sides[0] * sides[1] <= MAX_PIXELS


def photograph(width: int, height: int) -> Image.Image:
    """Blobs under noise: edges at every scale."""
    noise = np.random.default_rng(width).normal(0, 1, (height, width, 3))
    blobs = cv2.GaussianBlur(noise, (0, 0), 6) * 600 + 20 * noise + 128
    return Image.fromarray(blobs.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "size", "resized"),
    [(64, 80, 64, cv2.INTER_LANCZOS4), (512, 683, 512, cv2.INTER_LANCZOS4), (500, 400, 512, cv2.INTER_AREA)],
)
def test_a_copy_is_resized_back_and_saved_as_published(tmp_path, monkeypatch, width, height, size, resized):
    paths = make_dataset(tmp_path, ["a"], train=1, size=(width, height), ending=".jpg")
    generated = []

    def generate(generator, batch, steps=None):
        shapes = [(*request.condition.size, 3) for request in batch]
        generated.extend(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
        return generated

    monkeypatch.setattr(PictureGenerator, "__call__", generate)
    Maker(paths, HIGH.changed(size=size), None, batch_size=1)(paths.images("a"), [0])
    expected = cv2.resize(generated[0], (width, height), interpolation=resized)
    Image.fromarray(expected).save(tmp_path / "published.jpg")
    with Image.open(paths.copy(paths.images("a")[0], 0)) as copy, Image.open(tmp_path / "published.jpg") as published:
        assert np.array_equal(np.asarray(copy), np.asarray(published))
        assert (copy.quantization, copy.layer) == (published.quantization, published.layer)  # quality 75, 4:2:0


@pytest.mark.parametrize(
    ("width", "height", "generated", "resized"),
    [
        (250, 333, (256, 320), cv2.INTER_AREA),
        (333, 250, (320, 256), cv2.INTER_AREA),
        (256, 370, (256, 384), cv2.INTER_LANCZOS4),
        (32, 32, (256, 256), cv2.INTER_LANCZOS4),
    ],
)
def test_the_low_preset_resizes_before_canny_as_published(width, height, generated, resized):
    image = np.asarray(photograph(width, height))
    expected = cv2.Canny(cv2.resize(image, generated, interpolation=resized), 100, 200)
    assert expected.any()
    assert np.array_equal(edges(LOW).edges(image), expected)


def published_names(paths, seed: int) -> dict[Path, tuple[str, str]]:
    """Train image -> (copy, edge map) as the published scripts derive them."""
    images = [str(path) for path in sorted(paths.folder("train").glob("*/*"))]
    return {
        image: (
            image.replace("/train/", "/exemplars/").replace(".jpg", f"_seed{seed:02}.jpg"),
            image.replace("/train/", "/edge_maps/").replace(".jpg", ".bmp"),
        )
        for image in images
    }


def test_a_tree_of_the_published_scripts_is_taken_as_it_is(paths, compress):
    for seed in range(2):
        for image, names in published_names(paths, seed).items():
            for name in names:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
            with Image.open(image) as picture:
                picture.rotate(180).save(names[0])
                edge_map = cv2.Canny(np.array(picture.convert("RGB")), 100, 200)
            Image.fromarray(edge_map).save(names[1])
    before = tree(paths.root)
    code, out, _ = compress()
    assert code == 0
    assert "edge maps: 0 made, 4 skipped" in out
    assert "copies: 0 made, 8 skipped" in out
    code, out, _ = compress("--verify")
    assert (code, "nothing is wrong" in out) == (0, True)
    images = [image for label in LABELS for image in paths.images(label)]
    check_copies(paths, edges(HIGH), images, 2)  # the trainer takes them
    assert tree(paths.root) == before
    code, out, _ = compress("--repair")
    assert "edge maps: 0 made, 4 skipped (4 of them recoded), 0 failed" in out
    assert "copies: 0 made, 8 skipped" in out
    assert compress("--verify")[0] == 0
    assert not list(paths.folder("kept").rglob("*.bmp"))


def test_the_published_trainer_finds_our_copies(paths, made):
    for seed in range(2):
        for image, (copy, _) in published_names(paths, seed).items():
            with Image.open(copy) as picture, Image.open(image) as original:
                assert (picture.convert("RGB").size, picture.format) == (original.size, "JPEG")
