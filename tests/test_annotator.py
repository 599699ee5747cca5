"""Edges, channels and sizes."""

import cv2
import numpy as np
import pytest

from compress.presets import HIGH, LOW
from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3, MAX_PIXELS, generated_size, resize, resize_image

# image height and width -> generated height and width, high and low resolution: the published implementation's figures
SIZES = """
512,512,512,512,512,512
384,512,512,704,256,320
512,384,704,512,320,256
480,640,512,704,256,320
160,213,512,704,256,320
213,160,704,512,320,256
256,256,512,512,256,256
32,32,512,512,256,256
28,28,512,512,256,256
100,300,512,1536,256,768
300,100,1536,512,768,256
333,500,512,768,256,384
500,333,768,512,384,256
375,500,512,704,256,320
600,800,512,704,512,704
1200,1600,512,704,512,704
768,1024,512,704,512,704
1024,1024,512,512,512,512
2000,3000,512,768,512,768
511,512,512,512,256,256
224,224,512,512,256,256
64,64,512,512,256,256
97,131,512,704,256,320
640,427,768,512,384,256
150,400,512,1344,256,704
400,150,1344,512,704,256
96,96,512,512,256,256
720,1280,512,896,512,896
1080,1920,512,896,512,896
120,200,512,832,256,448
512,2048,256,1024,256,1024
50,400,256,2048,256,2048
1,1,512,512,256,256
10,1000,64,6400,64,6400
1000,10,6400,64,6400,64
"""


@pytest.mark.parametrize("row", SIZES.split())
def test_generated_sizes_as_published(row):
    height, width, *expected = map(int, row.split(","))
    assert [*HIGH.generated_size(height, width), *LOW.generated_size(height, width)] == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1, 3000), (1, 100_000), (2, 390)])
def test_a_very_narrow_picture_stays_within_the_limit(height, width):
    for preset in (HIGH, LOW):
        generated = preset.generated_size(height, width)
        assert generated == preset.generated_size(width, height)[::-1]
        assert generated[0] == 64
        assert generated[0] * generated[1] <= MAX_PIXELS
    assert HIGH.generated_size(1, 1000) == (64, 12_288)


@pytest.mark.parametrize("shorter_side", [64, 100, 256, 320, 500, 512, 768, 880])
def test_every_generated_size_is_one_that_the_network_takes(shorter_side):
    for height in (1, 3, 28, 100, 511, 513, 4000):
        for width in (1, 2, 30, 224, 512, 700, 20_000):
            sides = generated_size(height, width, shorter_side)
            assert all(side >= 64 and side % 64 == 0 for side in sides)
            assert sides[0] * sides[1] <= MAX_PIXELS


def test_canny():
    picture = np.zeros((40, 50, 3), np.uint8)
    picture[10:30, 10:40] = (200, 10, 90)
    edges = CannyDetector()(picture, 100, 200)
    assert edges.shape == (40, 50)
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[15:25, 15:35].any()
    assert not edges[:8].any()
    assert edges[9:11, 15:35].any(axis=0).all()
    assert (edges == cv2.Canny(picture, 100, 200)).all()
    assert (edges == CannyDetector()(np.asfortranarray(picture), 100, 200)).all()


def test_thresholds_of_canny_matter():
    ramp = np.repeat(np.linspace(0, 255, 60).astype(np.uint8)[None], 60, axis=0)
    ramp[:, 30:] = np.minimum(ramp[:, 30:].astype(int) + 30, 255)
    assert CannyDetector()(ramp, 10, 20).any()
    assert not CannyDetector()(ramp, 400, 500).any()


def test_hwc3():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.stack([grey, grey + 1, grey + 2], axis=2)
    assert (HWC3(grey) == np.stack([grey] * 3, axis=2)).all()
    assert (HWC3(grey[:, :, None]) == np.stack([grey] * 3, axis=2)).all()
    assert (HWC3(colour) == colour).all()
    opaque = np.full((3, 4, 1), 255, np.uint8)
    assert (HWC3(np.concatenate([colour, opaque], axis=2)) == colour).all()
    assert (HWC3(np.concatenate([colour, 0 * opaque], axis=2)) == 255).all()
    half = HWC3(np.concatenate([0 * colour, opaque // 2], axis=2))
    assert (abs(half.astype(int) - 128) <= 1).all()
    with pytest.raises(TypeError, match="float64"):
        HWC3(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="not 2"):
        HWC3(np.zeros((3, 4, 2), np.uint8))


def test_resizing_takes_lanczos_to_grow_and_area_to_shrink():
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    assert (resize(picture, 192, 256) == cv2.resize(picture, (256, 192), interpolation=cv2.INTER_LANCZOS4)).all()
    assert (resize(picture, 45, 60) == cv2.resize(picture, (60, 45), interpolation=cv2.INTER_AREA)).all()
    assert resize(picture, 90, 120) is picture


@pytest.mark.parametrize(
    ("shape", "resolution", "expected"),
    [
        ((1000, 1500), 768, (768, 1152)),
        ((1080, 1920), 768, (768, 1344)),
        ((600, 1400), 640, (640, 1472)),
        ((200, 900), 512, (512, 2304)),
        ((90, 120), 256, (256, 320)),
        ((300, 310), 300, (320, 320)),
    ],
)
def test_resize_image_is_the_published_function(shape, resolution, expected):
    """Shapes measured from the published code; interpolation goes by the scale, not by the rounded size."""
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    interpolation = cv2.INTER_LANCZOS4 if resolution > min(shape) else cv2.INTER_AREA
    resized = resize_image(picture, resolution)
    assert resized.shape == (*expected, 3)
    assert (resized == cv2.resize(picture, expected[::-1], interpolation=interpolation)).all()
    assert resize_image(picture[:, :, 0], resolution).shape == expected
