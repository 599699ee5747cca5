"""The transforms of a dataset (utils/datasets.py), on pictures whose every pixel is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from tests.conftest import long_but
from utils.data.augment import SmallAutoAugment, random_bits
from utils.data.datasets import (
    CIFAR10_STATISTICS,
    CIFAR100_STATISTICS,
    IMAGENET_STATISTICS,
    KNOWN,
    dataset_defaults,
    default_resolution,
)


def states(count, seed=0):
    return random_bits(np.array([seed], np.uint64), count)[0]


def evaluated(defaults, picture):
    """What the test transform makes of a picture: 3 x S x S, 0 ... 255."""
    return defaults.test_transform([defaults.test_transform.prepare(picture)])[0]


def trained(defaults, picture, draws):
    """What the training transform makes of a picture, time and again: draws x 3 x S x S, 0 ... 255."""
    transform = defaults.train_transform
    return transform([transform.prepare(picture)] * draws, states(draws))


@pytest.mark.parametrize(
    ("size", "kind", "side"),
    [
        ((28, 28), "small", 32),
        ((32, 32), "small", 32),
        ((64, 64), "small", 32),
        ((64, 900), "small", 32),
        ((65, 65), "large", 224),
        ((512, 384), "large", 224),
        ((3000, 70), "large", 224),
    ],
)
@pytest.mark.parametrize("name", ["Unheard Of", *KNOWN])
def test_the_size_of_the_images_picks_the_transforms(name, size, kind, side):
    defaults = dataset_defaults(name, size)
    assert defaults.image_kind == kind
    picture = Image.new("RGB", size, (10, 200, 90))
    for images in (evaluated(defaults, picture)[None], trained(defaults, picture, 2)):
        assert images.shape[1:] == (3, side, side)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        normalised = defaults.normalise(images)
        assert normalised.dtype == torch.float32
        assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "size", "statistics"),
    [
        ("CIFAR10", (32, 32), CIFAR10_STATISTICS),
        ("cifar10", (32, 32), CIFAR10_STATISTICS),
        ("CIFAR100", (32, 32), CIFAR100_STATISTICS),
        ("Unheard Of", (32, 32), CIFAR100_STATISTICS),
        ("Food101", (512, 512), IMAGENET_STATISTICS),
        ("Unheard Of", (300, 200), IMAGENET_STATISTICS),
    ],
)
def test_a_plain_picture_stays_one_and_is_normalised_as_torchvision_does_it(name, size, statistics):
    defaults = dataset_defaults(name, size)
    plain = evaluated(defaults, Image.new("RGB", size, (51, 102, 204)))
    assert (plain == torch.tensor([51, 102, 204])[:, None, None]).all()
    noise = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    expected = functional.normalize(noise / 255, *statistics)
    torch.testing.assert_close(defaults.normalise(noise), expected, atol=2e-6, rtol=0)


def test_small_test_transform_keeps_every_pixel_of_a_32_picture():
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shown = evaluated(dataset_defaults("Toy", (32, 32)), Image.fromarray(array))
    np.testing.assert_array_equal(shown.permute(1, 2, 0).numpy(), array)


def test_a_digit_gets_a_black_margin_of_two_pixels():
    array = np.random.default_rng(0).integers(1, 256, (28, 28), dtype=np.uint8)
    picture = Image.fromarray(array).convert("RGB")
    grey = evaluated(dataset_defaults("MNIST", (28, 28)), picture)
    np.testing.assert_array_equal(grey[0, 2:30, 2:30].numpy(), array)
    np.testing.assert_array_equal(grey, grey[:1].expand(3, -1, -1))
    margin = torch.ones(32, 32, dtype=torch.bool)
    margin[2:30, 2:30] = False
    assert (grey[:, margin] == 0).all()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (48, 60), (60, 48), (20, 31)])
def test_other_small_sizes_fill_the_picture(size):
    assert (evaluated(dataset_defaults("Toy", size), Image.new("RGB", size, (255, 255, 255))) == 255).all()


def test_large_test_transform_is_the_middle_of_the_resized_picture():
    """A 512 x 256 picture: resizing changes nothing, the 224 x 224 in the middle are left."""
    ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (256, 512, 3))
    shown = evaluated(dataset_defaults("Toy", (512, 256)), Image.fromarray(ramp.copy()))
    np.testing.assert_array_equal(shown[0, 100].numpy(), ramp[16 + 100, 144 : 144 + 224, 0])


def brighter_side(name, size, draws=60):
    """How often the left half, white in the picture, is still the brighter one."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    left, right = trained(dataset_defaults(name, size), picture, draws)[:, 0].float().chunk(2, dim=2)
    return int((left.mean(dim=(1, 2)) > right.mean(dim=(1, 2))).sum())


def test_digits_are_never_mirrored_and_other_small_images_are_half_of_the_time():
    assert brighter_side("MNIST", (28, 28)) == 60
    assert brighter_side("mnist", (28, 28)) == 60
    assert 15 <= brighter_side("Toy", (28, 28)) <= 45
    assert 15 <= brighter_side("CIFAR100", (32, 32)) <= 45


def test_small_training_pictures_are_shifted_by_up_to_four_pixels_and_brightened_by_up_to_a_quarter():
    picture = Image.new("RGB", (32, 32))
    picture.putpixel((16, 16), (100, 100, 100))
    shown = trained(dataset_defaults("MNIST", (32, 32)), picture, 400)[:, 0]  # digits: no flip to confuse the position
    assert ((shown > 0).sum(dim=(1, 2)) == 1).all()
    _, rows, columns = shown.nonzero().T.tolist()
    assert set(rows) == set(columns) == set(range(12, 21))
    levels = shown.amax(dim=(1, 2)).tolist()
    assert 75 <= min(levels) < 80
    assert 120 < max(levels) <= 125


def test_large_training_pictures_vary_in_place_scale_and_colour():
    array = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    shown = trained(dataset_defaults("Toy", (400, 300)), Image.fromarray(array), 6)
    assert len({image.sum().item() for image in shown}) == 6


@pytest.mark.parametrize(
    ("name", "size", "resolution"),
    [
        ("Food101", (512, 384), "high"),
        ("Caltech256", (300, 280), "low"),
        ("Unheard Of", (500, 375), "high"),
        ("Unheard Of", (32, 32), "low"),
        ("CIFAR10", (32, 32), "low"),
    ],
)
def test_the_preset_that_fits(name, size, resolution):
    assert default_resolution(name, size) == resolution


@pytest.mark.parametrize(("name", "size"), [("Food101", (300, 240)), ("CIFAR100", (32, 32)), ("MNIST", (28, 28))])
def test_without_augmentation_training_reads_what_evaluation_does(name, size):
    defaults = dataset_defaults(name, size, "none")
    train, test = defaults.train_transform, defaults.test_transform
    assert train.prepare == test.prepare
    assert defaults.normalise == dataset_defaults(name, size).normalise
    rng = np.random.default_rng(0)
    pictures = [train.prepare(Image.fromarray(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8))) for _ in "abc"]
    assert train(pictures, states(3)).equal(test(pictures))
    assert not dataset_defaults(name, size).train_transform(pictures, states(3)).equal(test(pictures))


LARGE = [
    ("Food101", "pescr", 63 / 255, True),
    ("imagenet1000", "pycil", 63 / 255, False),
    ("Unheard Of", "pycil", 0, False),
    ("ImageNet1000", "pescr", 63 / 255, True),
    ("ImageNet100", "pycil", 0, False),
    ("Unheard Of", "autoaugment", 63 / 255, True),
]


@pytest.mark.parametrize(("name", "augmentation", "brightness", "autoaugment"), long_but(LARGE, *LARGE[:3]))
def test_large_images_are_augmented_as_pescr_or_as_pycil(name, augmentation, brightness, autoaugment):
    plain = Image.new("RGB", (300, 240), (100, 120, 140))  # any crop of it is the same
    transform = dataset_defaults(name, plain.size, augmentation).train_transform
    shown = transform([transform.prepare(plain)] * 300, states(300)).float()
    levels = shown.mean(dim=(2, 3))[:, 1] / 120
    assert (shown.std(dim=(2, 3)).max() > 1) == autoaugment  # grey corners of rotated pictures
    if not autoaugment:
        assert levels.min() == pytest.approx(1 - brightness, abs=0.02)
        assert levels.max() == pytest.approx(1 + brightness, abs=0.02)
    small = [dataset_defaults(name, (32, 32), kind).train_transform for kind in ("pescr", "pycil")]
    assert small[0] == small[1], "the transforms of small images are the same in both"
    assert dataset_defaults(name, (32, 32), "autoaugment").train_transform == SmallAutoAugment(small[0].flip)
