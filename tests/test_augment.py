"""A batch's transforms against torchvision's on the same random numbers, and their random numbers by themselves."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from utils.augment import FitSmall, SmallTest, SmallTrain, brightened, brightness_factors, random_bits, uniform

SIZES = [(32, 32), (28, 28), (32, 47), (47, 32), (64, 64), (17, 29)]


def states(count, seed=0):
    return random_bits(np.array([seed], np.uint64), count)[0]


def noise(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- random numbers ---


def test_random_bits_are_splitmix64_s():
    """Its published first outputs for the seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(np.array([1234567], np.uint64), 5)[0].tolist() == expected
    assert random_bits(np.array([1234567], np.uint64), 2, first=3)[0].tolist() == expected[3:]


def test_random_numbers_of_an_item_know_nothing_of_the_others():
    many = uniform(states(50), 7)
    assert (many >= 0).all()
    assert (many < 1).all()
    np.testing.assert_array_equal(uniform(states(50)[[9, 3]], 7), many[[9, 3]])


def test_random_numbers_are_uniform_and_neighbours_unrelated():
    numbers = uniform(np.arange(20_000, dtype=np.uint64), 4)
    for column in numbers.T:
        counts = np.histogram(column, 50, (0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 85.4  # exceeded once in a thousand, 49 degrees of freedom
    pairs = [(numbers[:, 0], numbers[:, 1]), (numbers[:-1, 0], numbers[1:, 0]), (numbers[:, 2], numbers[:, 3])]
    for first, second in pairs:
        assert abs(np.corrcoef(first, second)[0, 1]) < 3.3 / np.sqrt(len(numbers))


# --- small pictures ---


@pytest.mark.parametrize("flip", [True, False])
def test_small_training_pictures_are_torchvision_s_crops_flips_and_brightness(flip):
    form = FitSmall(32)
    transform = SmallTrain(flip, form)
    pictures = [form(noise(SIZES[i % len(SIZES)], i)) for i in range(60)]
    numbers = uniform(states(60), 4)
    images = transform(pictures, states(60)).permute(0, 2, 3, 1).numpy()
    for picture, (vertical, horizontal, mirror, brightness), ours in zip(pictures, numbers, images, strict=True):
        expected = functional.pad(Image.fromarray(picture), 4)
        width, height = expected.size
        expected = functional.crop(
            expected, int(vertical * (height - 31)), int(horizontal * (width - 31)), height=32, width=32
        )
        if flip and mirror < 0.5:
            expected = functional.hflip(expected)
        factor = 1 - 63 / 255 + 2 * 63 / 255 * brightness
        np.testing.assert_array_equal(ours, functional.adjust_brightness(expected, np.float32(factor)))


def test_a_small_picture_s_fate_does_not_depend_on_its_batch():
    transform = SmallTrain(True, FitSmall(32))
    pictures = [np.asarray(noise((32, 32), i)) for i in range(9)]
    together = transform(pictures, states(9))
    alone = transform([pictures[7]], states(9)[7:8])
    assert (together[7] == alone[0]).all()


@pytest.mark.parametrize("size", SIZES)
def test_small_test_pictures_are_torchvision_s_middle(size):
    form = FitSmall(32)
    ours = SmallTest(form)([form(noise(size))])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, functional.center_crop(Image.fromarray(form(noise(size))), [32, 32]))


def test_brightness_of_every_level_by_many_factors_is_pillow_s():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    factors = np.array([*brightness_factors(uniform(states(1000), 1)[:, 0], 63 / 255), 1.0], np.float32)
    assert factors.min() < 0.76
    assert factors.max() > 1.24
    for ours, factor in zip(brightened(levels.repeat(len(factors), 0), factors), factors, strict=True):
        np.testing.assert_array_equal(ours, functional.adjust_brightness(Image.fromarray(levels[0]), factor))
