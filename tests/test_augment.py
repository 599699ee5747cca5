"""A batch's transforms against torchvision's on the same random numbers, and their random numbers by themselves."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from utils.data.augment import FitSmall, SmallTest, SmallTrain, brightened, brightness_factors, random_bits, uniform
from utils.data.augment_large import LargeTest, LargeTrain, Middle, Whole, random_boxes, resized

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


# --- large pictures ---


def without_autoaugment(monkeypatch):
    monkeypatch.setattr(transforms.AutoAugment, "forward", lambda self, image: image)


@pytest.mark.parametrize("flip", [True, False])
def test_large_training_pictures_are_torchvision_s_resized_crops_flips_and_brightness(monkeypatch, flip):
    without_autoaugment(monkeypatch)
    pictures = [np.asarray(noise((230 + 40 * (i % 4), 200 + 90 * (i % 3)), i)) for i in range(24)]
    numbers = uniform(states(24), 42)
    boxes = random_boxes(np.array([picture.shape[:2] for picture in pictures]), numbers[:, :40])
    images = LargeTrain(flip, Whole())(pictures, states(24)).permute(0, 2, 3, 1).numpy()
    for picture, box, (mirror, brightness), ours in zip(pictures, boxes.tolist(), numbers[:, 40:], images, strict=True):
        expected = functional.resized_crop(Image.fromarray(picture), *box, [224, 224])
        if flip and mirror < 0.5:
            expected = functional.hflip(expected)
        expected = functional.adjust_brightness(expected, 1 + 63 / 255 * (2 * brightness - 1))
        assert np.abs(ours - np.asarray(expected, int)).max() <= 2  # one of resizing, brighter by up to a quarter


def test_autoaugment_is_torchvision_s_with_a_seed_for_each_picture():
    picture = np.asarray(noise((224, 224)))
    transform = LargeTrain(False, Whole(), brightness=0.0)
    numbers, seeds = uniform(states(12), 40), (random_bits(states(12), 1, 42)[:, 0] >> np.uint64(1)).tolist()
    boxes = random_boxes(np.array([[224, 224]] * 12), numbers).tolist()
    images = transform([picture] * 12, states(12))
    policy = transforms.AutoAugment()
    for image, seed, (top, left, height, width) in zip(images, seeds, boxes, strict=True):
        crop = resized(picture[top : top + height, left : left + width], 224, 224)
        torch.manual_seed(seed)
        np.testing.assert_array_equal(image.permute(1, 2, 0), policy(Image.fromarray(crop)))


def test_large_training_leaves_torch_s_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    LargeTrain(True, Whole())([np.asarray(noise((230, 240)))], states(1))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("size", [(400, 300), (224, 224), (60, 500)])
def test_boxes_are_spread_as_torchvision_s(size):
    """Quartiles of area, ratio and place over 4,000 boxes; (60, 500): most tries don't fit, many take the middle."""
    width, height = size
    sizes = np.array([[height, width]] * 4000)
    ours = random_boxes(sizes, uniform(states(4000), 40)).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]

    def measures(boxes):
        top, left, h, w = np.asarray(boxes, float).T
        return h * w / (height * width), np.log(w / h), top / height, left / width, (top + h) / height

    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for a, b in zip(measures(ours), measures(theirs), strict=True):
        np.testing.assert_allclose(np.quantile(a, [0.25, 0.5, 0.75]), np.quantile(b, [0.25, 0.5, 0.75]), atol=0.035)


@pytest.mark.parametrize("size", [(300, 240), (240, 300), (256, 256), (512, 400), (100, 70), (900, 257)])
def test_large_test_pictures_are_torchvision_s(size):
    picture = noise(size)
    expected = functional.center_crop(functional.resize(picture, 256), [224, 224])
    (ours,) = LargeTest(Middle())([Middle()(picture)]).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize(("form", "side", "read"), [(Middle(), 511, 511), (Middle(), 512, 256), (Middle(), 2000, 500)])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_large_jpegs_are_decoded_at_a_reduced_size(tmp_path, monkeypatch, form, side, read, kind):
    sizes = []
    monkeypatch.setattr(Middle, "__call__", lambda self, image: sizes.append(image.size))
    path = tmp_path / f"a.{kind}"
    Image.linear_gradient("L").resize((side, side + 90)).save(path)
    form.read(path)
    assert min(sizes[0]) == (read if kind == "jpg" else side)


@pytest.mark.parametrize(("side", "read"), [(1829, 1829), (1830, 915), (3700, 925)])
def test_training_never_enlarges_a_crop_for_a_smaller_decoding(tmp_path, side, read):
    path = tmp_path / "a.jpg"
    Image.linear_gradient("L").resize((side, side)).save(path)
    assert Whole().read(path).shape == (read, read, 3)
    assert read * np.sqrt(0.08 * 3 / 4) >= 224 - 0.2


@pytest.mark.parametrize("size", [(300, 240), (511, 600)])
def test_test_pictures_may_be_made_of_what_training_keeps(tmp_path, size):
    path = tmp_path / "a.jpg"
    noise(size).save(path)
    np.testing.assert_array_equal(Middle().of(Whole().read(path)), Middle().read(path))


def test_a_picture_that_testing_reads_at_a_reduced_size_is_read_again():
    assert Middle().of(np.zeros((512, 700, 3), np.uint8)) is None
