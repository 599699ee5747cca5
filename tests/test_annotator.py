"""Edge detection and image shapes."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from ControlNet.annotator import util
from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3, resize_image


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


def test_published_annotators_find_the_folder_of_their_weights():
    """hed, midas and others, copied beside ours, import this name."""
    assert util.annotator_ckpts_path == str(Path(util.__file__).parent / "ckpts")
