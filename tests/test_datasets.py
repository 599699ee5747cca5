"""The transforms of a dataset (utils/datasets.py), on pictures whose every pixel is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.datasets import CIFAR10_STATISTICS, CIFAR100_STATISTICS, IMAGENET_STATISTICS, KNOWN, dataset_defaults


def pixels(tensor, statistics):
    """C x H x W in 0..1, the normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return tensor * std + mean


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
    for transform in (defaults.train_transform, defaults.test_transform):
        tensor = transform(picture)
        assert tensor.shape == (3, side, side)
        assert tensor.dtype == torch.float32


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
def test_the_test_transform_only_normalises_a_plain_picture(name, size, statistics):
    tensor = dataset_defaults(name, size).test_transform(Image.new("RGB", size, (51, 102, 204)))
    expected = torch.tensor([0.2, 0.4, 0.8])[:, None, None].expand_as(tensor)
    torch.testing.assert_close(pixels(tensor, statistics), expected, atol=1e-5, rtol=0)


def test_small_test_transform_keeps_every_pixel_of_a_32_picture():
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = dataset_defaults("Toy", (32, 32)).test_transform(Image.fromarray(array))
    np.testing.assert_array_equal(pixels(tensor, CIFAR100_STATISTICS).mul(255).round().permute(1, 2, 0).numpy(), array)


def test_a_digit_gets_a_black_margin_of_two_pixels():
    array = np.random.default_rng(0).integers(1, 256, (28, 28), dtype=np.uint8)
    picture = Image.fromarray(array).convert("RGB")
    tensor = pixels(dataset_defaults("MNIST", (28, 28)).test_transform(picture), CIFAR100_STATISTICS)
    grey = tensor.mul(255).round()
    np.testing.assert_array_equal(grey[0, 2:30, 2:30].numpy(), array)
    np.testing.assert_array_equal(grey, grey[:1].expand(3, -1, -1))
    margin = torch.ones(32, 32, dtype=torch.bool)
    margin[2:30, 2:30] = False
    assert (grey[:, margin] == 0).all()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (48, 60), (60, 48), (20, 31)])
def test_other_small_sizes_fill_the_picture(size):
    tensor = dataset_defaults("Toy", size).test_transform(Image.new("RGB", size, (255, 255, 255)))
    torch.testing.assert_close(pixels(tensor, CIFAR100_STATISTICS), torch.ones(3, 32, 32), atol=1e-5, rtol=0)


def test_large_test_transform_is_the_middle_of_the_resized_picture():
    """A 512 x 256 picture: resizing changes nothing, the 224 x 224 in the middle are left."""
    ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (256, 512, 3))
    tensor = pixels(
        dataset_defaults("Toy", (512, 256)).test_transform(Image.fromarray(ramp.copy())), IMAGENET_STATISTICS
    )
    np.testing.assert_array_equal(tensor.mul(255).round()[0, 100].numpy(), ramp[16 + 100, 144 : 144 + 224, 0])


def brighter_side(name, size, draws=60):
    """How often the left half, white in the picture, is still the brighter one."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    transform = dataset_defaults(name, size).train_transform
    torch.manual_seed(0)
    tensors = (transform(picture)[0] for _ in range(draws))
    return sum(bool(t[:, : t.shape[1] // 2].mean() > t[:, t.shape[1] // 2 :].mean()) for t in tensors)


def test_digits_are_never_mirrored_and_other_small_images_are_half_of_the_time():
    assert brighter_side("MNIST", (28, 28)) == 60
    assert brighter_side("mnist", (28, 28)) == 60
    assert 15 <= brighter_side("Toy", (28, 28)) <= 45
    assert 15 <= brighter_side("CIFAR100", (32, 32)) <= 45


def test_small_training_pictures_are_shifted_by_up_to_four_pixels_and_brightened_by_up_to_a_quarter():
    picture = Image.new("RGB", (32, 32))
    picture.putpixel((16, 16), (100, 100, 100))
    transform = dataset_defaults("MNIST", (32, 32)).train_transform  # digits: no flip to confuse the position
    torch.manual_seed(0)
    places, levels = set(), []
    for _ in range(400):
        level = pixels(transform(picture), CIFAR100_STATISTICS)[0].mul(255).round()
        assert (level > 0).sum() == 1
        places.add(tuple(level.nonzero()[0].tolist()))
        levels.append(level.max().item())
    rows, columns = ({place[i] for place in places} for i in (0, 1))
    assert rows == columns == set(range(12, 21))
    assert 75 <= min(levels) < 80
    assert 120 < max(levels) <= 125


def test_large_training_pictures_vary_in_place_scale_and_colour():
    array = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    transform = dataset_defaults("Toy", (400, 300)).train_transform
    torch.manual_seed(0)
    tensors = [transform(Image.fromarray(array)) for _ in range(6)]
    assert len({tensor.sum().item() for tensor in tensors}) == 6
    text = repr(transform)
    order = [text.index(name) for name in ("RandomResizedCrop", "HorizontalFlip", "ColorJitter", "AutoAugment", "Norm")]
    assert order == sorted(order)
    assert "IMAGENET" in text


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
    assert dataset_defaults(name, size).resolution == resolution
