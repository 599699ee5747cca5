"""A batch's transforms against torchvision's on the same random numbers, and their random numbers by themselves."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

# import ImageEnhance, ImageOps
from torchvision import transforms
from torchvision.transforms import functional

from tests.conftest import long_but
from utils.data.augment import (
    CIFAR10_POLICY,
    IMAGENET_POLICY,
    FitSmall,
    FullSize,
    LargeTest,
    LargeTrain,
    SmallAutoAugment,
    SmallTest,
    SmallTrain,
    auto_augment,
    brightened,
    brightness_factors,
    random_bits,
    random_boxes,
    uniform,
)
from utils.data.images import read_prepared

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
    transform = SmallTrain(flip)
    pictures = [transform.prepare(noise(SIZES[i % len(SIZES)], i)) for i in range(60)]
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
    transform = SmallTrain(True)
    pictures = [np.asarray(noise((32, 32), i)) for i in range(9)]
    together = transform(pictures, states(9))
    alone = transform([pictures[7]], states(9)[7:8])
    assert (together[7] == alone[0]).all()


@pytest.mark.parametrize("size", SIZES)
def test_small_test_pictures_are_torchvision_s_middle(size):
    fitted = FitSmall()(noise(size))
    ours = SmallTest()([fitted])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, functional.center_crop(Image.fromarray(fitted), [32, 32]))


def test_brightness_of_every_level_by_many_factors_is_pillow_s():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    factors = np.array([*brightness_factors(uniform(states(1000), 1)[:, 0], 63 / 255), 1.0], np.float32)
    assert factors.min() < 0.76
    assert factors.max() > 1.24
    for ours, factor in zip(brightened(levels.repeat(len(factors), 0), factors), factors, strict=True):
        np.testing.assert_array_equal(ours, functional.adjust_brightness(Image.fromarray(levels[0]), factor))


def test_small_autoaugment_is_the_plain_transform_the_policy_and_a_black_square():
    transform = SmallAutoAugment(True)
    pictures = [transform.prepare(noise(SIZES[i % len(SIZES)], i)) for i in range(60)]
    images = transform(pictures, states(60)).permute(0, 2, 3, 1).numpy()
    plain = SmallTrain(True)(pictures, states(60)).permute(0, 2, 3, 1).numpy()
    black = []
    for before, numbers, ours in zip(plain, uniform(states(60), 11), images, strict=True):
        expected = np.array(auto_augment(Image.fromarray(before), numbers[4:9], CIFAR10_POLICY))
        y, x = (int(number * 32) for number in numbers[9:])  # Cutout of PyCIL: np.clip(y - 8, 0, 32) and so on
        y1, y2, x1, x2 = np.clip([y - 8, y + 8, x - 8, x + 8], 0, 32)
        expected[y1:y2, x1:x2] = 0
        np.testing.assert_array_equal(ours, expected)
        black.append((y2 - y1) * (x2 - x1))
    assert min(black) < 150
    assert max(black) == 256
    assert repr(transform) != repr(SmallTrain(True)), "phase-0 networks are told apart by it"


# --- large pictures ---


@pytest.mark.parametrize("flip", [True, False])
def test_large_training_pictures_are_torchvision_s_resized_crops_flips_and_brightness(flip):
    pictures = [np.asarray(noise((230 + 40 * (i % 4), 200 + 90 * (i % 3)), i)) for i in range(24)]
    numbers = uniform(states(24), 42)
    boxes = random_boxes(np.array([picture.shape[:2] for picture in pictures]), numbers[:, :40])
    images = LargeTrain(flip, autoaugment=False)(pictures, states(24)).permute(0, 2, 3, 1).numpy()
    for picture, box, (mirror, brightness), ours in zip(pictures, boxes.tolist(), numbers[:, 40:], images, strict=True):
        expected = functional.resized_crop(Image.fromarray(picture), *box, [224, 224])
        if flip and mirror < 0.5:
            expected = functional.hflip(expected)
        expected = functional.adjust_brightness(expected, 1 + 63 / 255 * (2 * brightness - 1))
        assert np.abs(ours - np.asarray(expected, int)).max() <= 2  # one of resizing, brighter by up to a quarter


def test_autoaugment_comes_last_with_numbers_of_each_picture_s_own():
    pictures = [np.asarray(noise((240, 224), i)) for i in range(12)]
    before = LargeTrain(True, autoaugment=False)(pictures, states(12)).permute(0, 2, 3, 1)
    after = LargeTrain(True)(pictures, states(12)).permute(0, 2, 3, 1)
    for plain, augmented, numbers in zip(before, after, uniform(states(12), 47)[:, 42:], strict=True):
        np.testing.assert_array_equal(augmented, auto_augment(Image.fromarray(plain.numpy()), numbers))


def photograph():
    """Smooth areas, edges and noise, and every level of each channel."""
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (80, 1)), np.tile(ramp[::-1], (80, 1)), np.tile(ramp[:80, None], (1, 96))], 2)
    picture[20:40, 30:60] = (250, 10, 90)
    picture[50:] = np.asarray(noise((96, 30)))
    return Image.fromarray(picture)


class Drawn(transforms.AutoAugment):
    """torchvision's AutoAugment with given choices in place of random ones."""

    def __init__(self, policy, probabilities, signs, kind):
        super().__init__(kind)
        self.drawn = policy, torch.tensor(probabilities), torch.tensor(signs)

    def get_params(self, _):
        return self.drawn


DIFFERENT = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Solarize"}
POLICIES = {"imagenet": IMAGENET_POLICY, "cifar10": CIFAR10_POLICY}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("policy", range(25))
@pytest.mark.parametrize("sign", [1, -1])
def test_autoaugment_is_torchvision_s_but_for_what_moves_pixels_and_solarize(kind, policy, sign):
    """Solarize: its thresholds count down from 255 there; of the policy's levels, 3 and 4 then differ in one level."""
    numbers, policies = [(policy + 0.5) / 25, 0.0, 0.0, *[0.4 if sign > 0 else 0.6] * 2], POLICIES[kind]
    names = [name for name, *_ in policies[policy]]
    ours = auto_augment(photograph(), numbers, policies)
    drawn = Drawn(policy, [0.0, 0.0], [int(sign > 0)] * 2, transforms.AutoAugmentPolicy(kind))
    theirs = drawn(photograph())
    if DIFFERENT & set(names):
        assert ours.size == theirs.size
    elif 0.0 in [probability for _, probability, _ in policies[policy]]:
        assert policy == 12  # torchvision applies an operation of probability 0 where it draws 0.0
    else:  # torchvision's factors are float32, in one operation after the other
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


def operation(name, level, sign):
    """One operation alone: the policy's number in which it stands, with only that operation applied."""
    for policies in POLICIES.values():
        for policy, pair in enumerate(policies):
            for place, (its_name, probability, its_level) in enumerate(pair):
                if (its_name, its_level) == (name, level) and probability > 0:
                    numbers = [(policy + 0.5) / 25, 1.0, 1.0, *[0.4 if sign > 0 else 0.6] * 2]
                    numbers[1 + place] = 0.0
                    return auto_augment(photograph(), numbers, policies)
    raise AssertionError(f"no policy has {name} at level {level}")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [3, 8, 9])
def test_rotations_fill_with_grey(level, sign):
    """The published call: rotate with an alpha channel, then paste over grey."""
    rotated = photograph().convert("RGBA").rotate(sign * np.linspace(0, 30, 10)[level])
    over_grey = Image.composite(rotated, Image.new("RGBA", rotated.size, (128,) * 4), rotated).convert("RGB")
    ours = operation("Rotate", level, sign)
    np.testing.assert_array_equal(ours, over_grey)
    assert ours.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("sign", [1, -1])
def test_shears_are_bicubic_and_fill_with_grey(sign):
    picture = photograph()
    matrix = (1, sign * np.linspace(0, 0.3, 10)[5], 0, 0, 1, 0)
    expected = picture.transform(picture.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=(128, 128, 128))
    np.testing.assert_array_equal(operation("ShearX", 5, sign), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_upright_shears_are_bicubic_too(sign):
    picture, magnitude = photograph(), sign * np.linspace(0, 0.3, 10)[8]
    expected = picture.transform(
        picture.size, Image.AFFINE, (1, 0, 0, magnitude, 1, 0), Image.BICUBIC, fillcolor=(128, 128, 128)
    )
    np.testing.assert_array_equal(operation("ShearY", 8, sign), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "level"), [("TranslateX", 9), ("TranslateX", 8), ("TranslateY", 9), ("TranslateY", 3)]
)
def test_translations_are_parts_of_a_side_and_fill_with_grey(name, level, sign):
    picture, part = photograph(), sign * np.linspace(0, 150 / 331, 10)[level]
    x, y = (part * picture.width, 0) if name == "TranslateX" else (0, part * picture.height)
    expected = picture.transform(picture.size, Image.AFFINE, (1, 0, x, 0, 1, y), fillcolor=(128, 128, 128))
    ours = operation(name, level, sign)
    np.testing.assert_array_equal(ours, expected)
    corner = (-1, -1) if sign > 0 else (0, 0)
    assert ours.getpixel((corner[0] % picture.width, corner[1] % picture.height)) == (128, 128, 128)


@pytest.mark.parametrize("level", [3, 4, 5, 7, 8])
def test_solarize_has_the_published_thresholds(level):
    np.testing.assert_array_equal(
        operation("Solarize", level, 1), ImageOps.solarize(photograph(), np.linspace(256, 0, 10)[level])
    )


@pytest.mark.parametrize(
    ("name", "level"), [("Color", 0), ("Color", 4), ("Contrast", 8), ("Sharpness", 7), ("Brightness", 9)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_go_both_ways(name, level, sign):
    factor = 1 + sign * np.linspace(0, 0.9, 10)[level]
    np.testing.assert_array_equal(
        operation(name, level, sign), getattr(ImageEnhance, name)(photograph()).enhance(factor)
    )


@pytest.mark.parametrize("level", [5, 6, 7, 8])
def test_posterize_keeps_the_published_bits(level):
    bits = int(np.round(np.linspace(8, 4, 10), 0)[level])
    np.testing.assert_array_equal(operation("Posterize", level, 1), ImageOps.posterize(photograph(), bits))


@pytest.mark.parametrize("kind", long_but(POLICIES, "imagenet"))
def test_sub_policies_and_operations_are_as_likely_as_published(kind):
    """Of 25 sub-policies, which pictures change is the sum of their probabilities; 1.8 standard errors and more."""
    numbers, policies = np.random.default_rng(0).random((4000, 5)), POLICIES[kind]
    picture = photograph().resize((16, 16))
    unchanged = np.mean([np.array_equal(auto_augment(picture, row, policies), picture) for row in numbers])
    idle = [np.prod([1 - probability for _, probability, _ in pair]) for pair in policies]
    assert unchanged >= np.mean(idle) - 0.02  # some operations change nothing in some pictures
    assert unchanged <= np.mean(idle) + 0.12


def test_large_training_leaves_torch_s_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    LargeTrain(True)([np.asarray(noise((230, 240)))], states(1))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("size", [(400, 300), (224, 224), pytest.param((60, 500), marks=pytest.mark.long)])
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
    (ours,) = LargeTest()([np.asarray(picture)]).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("side", [512, 1900])
def test_large_jpegs_are_decoded_in_full(tmp_path, side):
    """Decoding at half the size moves pixels by up to 43 levels, so the centre must come from all of them."""
    noise((side // 8, side // 8)).resize((side, side), Image.BICUBIC).save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as whole:
        expected = functional.center_crop(functional.resize(whole, 256), [224, 224])
    for transform in (LargeTest(), LargeTrain(True)):
        assert read_prepared(tmp_path / "a.jpg", transform.prepare).shape == (side, side, 3)
    (ours,) = LargeTest()([read_prepared(tmp_path / "a.jpg", FullSize())]).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.asarray(expected, int)).max() <= 1
