"""Class order and phases."""

import re

import numpy as np
import pytest

from compress.options import fitting_preset
from tests.folders import make_dataset, save_noise, save_picture
from utils.data.classes import DataManager, Item
from utils.data.paths import DatasetPaths
from utils.errors import UserError

LABELS = ["crème brûlée", "apple pie", "b", "d", "e", "f", "g"]


def manager(paths, **changes):
    return DataManager(paths, **{"shuffle": True, "seed": 1993, "init_cls": 3, "increment": 2, **changes})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("train data"), LABELS)


@pytest.mark.parametrize("seed", [0, 1, 1993, 2**32 - 1])
def test_class_order_is_numpys_permutation_of_the_sorted_labels(toy, seed):
    data = manager(toy, seed=seed)
    np.random.seed(seed)
    expected = np.random.permutation(len(LABELS))
    assert data.class_order == expected.tolist()
    assert data.class_names == [sorted(LABELS)[i] for i in expected]
    assert all(type(i) is int for i in data.class_order)


def test_another_order_lists_nothing_again(toy, monkeypatch):
    first, expected = manager(toy, seed=1), manager(toy, seed=2)
    monkeypatch.setattr(DatasetPaths, "images", None)
    other = first.reordered(2)
    assert other.class_names == expected.class_names
    assert [other.train_images(t) for t in range(7)] == [expected.train_images(t) for t in range(7)]
    assert first.class_names != other.class_names


def test_class_order_leaves_numpys_own_generator_alone(toy):
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    manager(toy)
    assert np.random.rand() == expected


def test_without_shuffle_the_order_is_the_sorted_labels(toy):
    data = manager(toy, shuffle=False, seed=3)
    assert data.class_order == list(range(7))
    assert data.class_names == sorted(LABELS)


@pytest.mark.parametrize(
    ("init_cls", "increment", "sizes"),
    [
        (3, 2, [3, 2, 2]),
        (1, 1, [1] * 7),
        (3, 3, [3, 3, 1]),
        (2, 4, [2, 4, 1]),
        (7, 2, [7]),
        (7, 0, [7]),
        (6, 9, [6, 1]),
    ],
)
def test_phases_cover_the_classes_and_the_last_has_what_is_left(toy, init_cls, increment, sizes):
    data = manager(toy, init_cls=init_cls, increment=increment)
    phases = range(data.nb_phases)
    assert [len(data.phase_targets(phase)) for phase in phases] == sizes
    assert [target for phase in phases for target in data.phase_targets(phase)] == list(range(7))
    assert [data.seen_targets(phase) for phase in phases] == [range(total) for total in np.cumsum(sizes)]
    with pytest.raises(IndexError):
        data.phase_targets(data.nb_phases)


def test_images_belong_to_the_target_s_class(toy):
    data = manager(toy)
    assert data.nb_classes == 7
    for target, label in enumerate(data.class_names):
        for mode, images in (("train", data.train_images(target)), ("test", data.test_images(target))):
            assert images == sorted((toy.root / mode / label).iterdir())
    assert data.new_items(1) == [Item(image, t, "new") for t in data.phase_targets(1) for image in data.train_images(t)]


def test_image_kind_and_transforms_fit_the_pictures(toy, tmp_path):
    assert manager(toy).defaults.image_kind == "small"
    assert manager(toy).defaults.test_transform is not None
    large = manager(make_dataset(tmp_path, LABELS, train=1, test=1, size=(100, 80)))
    assert large.defaults.image_kind == "large"


def test_one_thumbnail_does_not_make_the_pictures_small(tmp_path):
    paths = make_dataset(tmp_path, LABELS, train=1, test=1, size=(100, 80))
    save_noise(paths.images(sorted(LABELS)[0])[0], 0, (20, 20))
    for seed in range(5):
        assert manager(paths, seed=seed).defaults.image_kind == "large"


def test_pictures_are_of_one_kind_in_every_class_order(tmp_path):
    labels = [f"{i:02d}" for i in range(43)]
    for i, label in enumerate(labels):  # 30 to 114 pixels: some classes are small, most are large
        for mode in ("train", "test"):
            save_noise(tmp_path / "Signs" / mode / label / "0.png", i, (30 + 2 * i, 30 + 2 * i))
    paths = DatasetPaths(tmp_path, "Signs")
    first = manager(paths, seed=1993)
    orders = [first, *(first.reordered(seed) for seed in range(20)), manager(paths, seed=7)]
    assert {data.picture_size for data in orders} == {(72, 72)}  # of classes 0, 5, 10, 16, 21, 26, 32, 37, 42
    assert {data.defaults.image_kind for data in orders} == {"large"}
    assert {repr(data.defaults.train_transform) for data in orders} == {repr(first.defaults.train_transform)}
    assert {data.resolution for data in orders} == {fitting_preset(paths)}
    assert manager(paths, class_sort="number").picture_size == (72, 72)


@pytest.mark.parametrize("init_cls", [0, -1, 8])
def test_init_cls_must_fit_the_classes(toy, init_cls):
    with pytest.raises(UserError, match=rf"init_cls is {init_cls}.*7 classes"):
        manager(toy, init_cls=init_cls)


def test_no_later_phase(toy):
    data = manager(toy, init_cls=7, increment=0)
    assert (data.nb_phases, len(data.phase_targets(0))) == (1, 7)


@pytest.mark.parametrize("increment", [0, -2])
def test_increment_must_be_positive_while_classes_are_left(toy, increment):
    with pytest.raises(UserError, match=f"increment is {increment}"):
        manager(toy, increment=increment)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_missing_folder_is_named(tmp_path, mode):
    paths = make_dataset(tmp_path, LABELS, train=1, test=1)
    paths.folder(mode).rename(paths.root / "elsewhere")
    with pytest.raises(UserError, match=re.escape(str(paths.folder(mode)))):
        manager(paths)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_class_without_images_is_named(tmp_path, mode):
    paths = make_dataset(tmp_path, LABELS, train=1, test=1)
    (image,) = paths.images("d", mode)
    image.rename(image.with_name("not a picture.txt"))
    with pytest.raises(UserError, match=re.escape(str(paths.folder(mode) / "d"))):
        manager(paths)


@pytest.mark.parametrize(("mode", "other"), [("train", "test"), ("test", "train")])
def test_train_and_test_must_have_the_same_classes(tmp_path, mode, other):
    paths = make_dataset(tmp_path, LABELS, train=1, test=1)
    save_picture(paths.folder(mode) / "zebra" / "0.png")
    with pytest.raises(UserError, match=f"(?s){re.escape(str(paths.folder(other)))}.*'zebra'"):
        manager(paths)


def test_increments_and_orders_as_lists(tmp_path):
    paths = make_dataset(tmp_path, ["10", "2", "1", "33"], train=1, test=1)
    common = {"shuffle": False, "seed": 0, "init_cls": 1}

    def sizes(increment):
        data = DataManager(paths, increment=increment, **common)
        return [len(data.phase_targets(phase)) for phase in range(data.nb_phases)]

    assert sizes([2, 1]) == [1, 2, 1]
    assert sizes([1]) == [1, 1, 1, 1]
    assert sizes([1, 9]) == [1, 1, 2]
    assert DataManager(paths, increment=1, **common).class_names == ["1", "10", "2", "33"]
    assert DataManager(paths, increment=1, class_sort="number", **common).class_names == ["1", "2", "10", "33"]
    order = ["33", "2", "10", "1"]
    assert DataManager(paths, increment=1, class_order=[33, 2, 10, 1], **common).class_names == order
    assert DataManager(paths, increment=1, class_order=[3, 2, 1, 0], **common).class_names == ["33", "2", "10", "1"]
    for wrong in ([33, 2], [33, 2, 10, 5]):
        with pytest.raises(UserError, match="class_order must hold each of the 4 classes once"):
            DataManager(paths, increment=1, class_order=wrong, **common)


def test_validation_images_are_held_out_of_training_the_same_in_all_orders(tmp_path):
    paths = make_dataset(tmp_path, ["a", "b", "c"], train=6, test=2)
    of_all = manager(paths, init_cls=1, increment=1)
    one = manager(paths, init_cls=1, increment=1, val_per_class=2)
    for data in (one, one.reordered(7), manager(paths, seed=7, init_cls=1, increment=1, val_per_class=2)):
        for target, label in enumerate(data.class_names):
            train, held_out = data.train_images(target), data.test_images(target)
            assert sorted(train + held_out) == of_all.train_images(of_all.class_names.index(label))
            assert (len(train), len(held_out)) == (4, 2)
            place = one.class_names.index(label)
            assert held_out == one.test_images(place)
    assert all(item.image in one.train_images(item.target) for phase in range(3) for item in one.new_items(phase))
    with pytest.raises(UserError, match=r"val_per_class is 6, but .* has 6 images: none would be left"):
        manager(paths, init_cls=1, increment=1, val_per_class=6)
