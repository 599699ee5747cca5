"""The training set: which picture an item shows, what its randomness depends on, broken and missing pictures."""

import gc
import multiprocessing
import os
import pickle
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler

from compress.forms import form_named
from compress.presets import HIGH
from compress.training.copies import check_copies
from tests.chance import CHI2_999, chi2
from tests.conftest import long_but
from tests.folders import make_dataset, save_noise, save_picture
from utils.data import batches as batches_module
from utils.data import cache as cache_module
from utils.data.augment import FullSize
from utils.data.batches import EpochBatchSampler, ImageSet, TrainingSet, batch_loader, path_table
from utils.data.cache import PictureCache, open_cache
from utils.data.classes import DataManager, Item
from utils.data.datasets import dataset_defaults
from utils.data.paths import DatasetPaths
from utils.errors import UserError

DEFAULTS = dataset_defaults("Toy", (32, 32))
TRANSFORM = DEFAULTS.train_transform
EDGES = form_named("edges", HIGH)


def manager(paths, init_cls):
    return DataManager(paths, shuffle=True, seed=1993, init_cls=init_cls, increment=2)


# --- which picture an item shows ---

K = 5
REAL, COPIES = 250, [20, 60, 100, 140, 180]  # grey levels, told apart after JPEG


class Level:
    """Stands for a transform: the grey level of a picture of one colour."""

    prepare = FullSize()

    def __call__(self, pictures, states):
        return torch.tensor([float(picture[0, 0, 0]) for picture in pictures])


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 images of one class and their copies, each of one grey level that says which it is."""
    paths = DatasetPaths(tmp_path_factory.mktemp("greys"), "Greys")
    for i in range(24):
        image = save_picture(paths.folder("train") / "a" / f"{i}.png", (REAL,) * 3, (8, 8))
        for k, grey in enumerate(COPIES):
            save_picture(paths.copy(image, k), (grey,) * 3, (8, 8))
    return paths


def training_set(paths, role, p, *, scope="all", model_seed=1, phase=0, copies=K):
    items = [Item(image, 0, role) for image in paths.images("a")]
    return TrainingSet(items, paths, Level(), p, copies, scope, model_seed, phase)


def shown(dataset, epochs):
    """What each item shows in each epoch: items x epochs; -1 the real image, else the copy's number."""
    levels = np.array([[dataset[epoch, i][1].item() for epoch in range(epochs)] for i in range(len(dataset))])
    choices = np.array([REAL, *COPIES])
    nearest = np.abs(levels[..., None] - choices).argmin(-1)
    assert (np.abs(levels - choices[nearest]) < 5).all()
    return nearest - 1


def test_a_synthetic_exemplar_is_always_a_copy_and_each_is_as_likely(greys):
    numbers = shown(training_set(greys, "edges", 0.0), 80)
    assert numbers.min() == 0
    assert chi2(np.bincount(numbers.ravel(), minlength=K), [numbers.size / K] * K) < CHI2_999[K - 1]
    # An epoch's choice says nothing about the next one's, nor an item's about its neighbour's.
    for first, second in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        pairs = np.bincount((K * first + second).ravel(), minlength=K * K)
        assert chi2(pairs, [first.size / K**2] * K**2) < CHI2_999[K * K - 1]


REPLACED = [(role, p) for role in ("new", "real") for p in (0.2, 0.7)]


@pytest.mark.parametrize(("role", "p"), long_but(REPLACED, ("new", 0.7), ("real", 0.2)))
def test_a_real_image_is_replaced_with_probability_p_by_any_of_its_copies(greys, role, p):
    numbers = shown(training_set(greys, role, p), 60)
    replaced = numbers[numbers >= 0]
    n = numbers.size
    assert chi2([len(replaced), n - len(replaced)], [n * p, n * (1 - p)]) < CHI2_999[1]
    assert chi2(np.bincount(replaced, minlength=K), [len(replaced) / K] * K) < CHI2_999[K - 1]
    assert (numbers >= 0).any(1).all(), "every item is replaced at some time"


@pytest.mark.parametrize(
    ("scope", "role", "p", "replaced"),
    [
        ("exemplars", "new", 1.0, False),
        ("exemplars", "real", 1.0, True),
        ("exemplars", "edges", 0.0, True),
        ("all", "new", 1.0, True),
        ("all", "new", 0.0, False),
        ("all", "real", 0.0, False),
    ],
)
def test_scope_says_which_images_are_replaced(greys, scope, role, p, replaced):
    assert set((shown(training_set(greys, role, p, scope=scope), 5) >= 0).ravel()) == {replaced}


def test_copies_beyond_k_are_never_shown(greys):
    assert set(shown(training_set(greys, "edges", 0.0, copies=2), 10).ravel()) == {0, 1}


@pytest.mark.parametrize("change", [{"model_seed": 2}, {"phase": 1}])
def test_seed_and_phase_change_the_choices(greys, change):
    numbers = shown(training_set(greys, "edges", 0.0), 5)
    others = shown(training_set(greys, "edges", 0.0, **change), 5)
    assert 0.02 < (numbers == others).mean() < 0.45  # one in five by chance


def test_without_copies_unreplaced_images_can_be_trained_on(greys):
    assert len(training_set(greys, "new", 0.0, copies=0)) == 24


# --- randomness depends on (model_seed, phase, epoch, item) alone ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    paths = make_dataset(tmp_path_factory.mktemp("photos"), ["a", "b"], train=7, test=1)
    for label in "ab":
        for i, image in enumerate(paths.images(label)):
            for k in range(2):
                save_noise(paths.copy(image, k), seed=50_000 + 10 * i + k)
    return paths


def photo_set(paths, model_seed=7, phase=2, pixels=None):
    data = manager(paths, init_cls=2)
    items = [
        Item(image, target, role) for target, role in ((0, "new"), (1, "edges")) for image in data.train_images(target)
    ]
    return TrainingSet(items, paths, data.defaults.train_transform, 0.5, 2, "all", model_seed, phase, pixels)


def epoch_of(dataset, epoch):
    """Every item of an epoch, by index."""
    sampler = EpochBatchSampler(len(dataset), 4, 7, 2)
    sampler.set_epoch(epoch)
    found = {}
    for indices, images, targets in batch_loader(dataset, sampler):
        found.update({i: (image, target) for i, image, target in zip(indices.tolist(), images, targets, strict=True)})
    return found


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[i][0], right[i][0]) and left[i][1] == right[i][1] for i in left
    )


def test_workers_change_nothing_also_when_they_stay(photos):
    dataset = photo_set(photos)
    sampler = EpochBatchSampler(len(dataset), 4, 7, 2)
    loaders = [batch_loader(dataset, sampler, workers) for workers in (0, 2)]
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        ours, theirs = (list(loader) for loader in loaders)
        assert len(ours) == len(theirs) == 4
        for batch, other in zip(ours, theirs, strict=True):
            for tensor, other_tensor in zip(batch, other, strict=True):
                assert torch.equal(tensor, other_tensor)
        seen.append(torch.cat([batch[0] for batch in ours]))
    assert not torch.equal(seen[0], seen[1])


def test_the_order_of_epochs_and_the_state_of_torch_change_nothing(photos):
    torch.manual_seed(0)
    forwards = [epoch_of(photo_set(photos), epoch) for epoch in (0, 1, 2)]
    torch.manual_seed(99)
    dataset = photo_set(photos)
    backwards = [epoch_of(dataset, epoch) for epoch in (2, 1, 0)]
    assert all(same(a, b) for a, b in zip(forwards, backwards[::-1], strict=True))
    assert not same(forwards[0], forwards[1])


CACHES = [(kind, workers) for kind in ("ram", "disk") for workers in (0, 2)]


@pytest.mark.parametrize(("kind", "workers"), long_but(CACHES, *CACHES[:3]))
def test_a_cache_changes_nothing(photos, tmp_path, kind, workers):
    cache = open_cache(kind, 0.01, tmp_path, photos.root, TRANSFORM.prepare)
    plain, cached = photo_set(photos), photo_set(photos, pixels=cache)
    sampler = EpochBatchSampler(len(plain), 4, 7, 2)
    ours, theirs = batch_loader(cached, sampler, workers), batch_loader(plain, sampler)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for batch, other in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, batch, other))
    assert 14 < len(cache) <= 28 + 7
    images = [*photos.images("a"), *photos.images("b")]
    tests = [ImageSet(images, range(14), DEFAULTS.test_transform, pixels) for pixels in (None, cache, cache)]
    batches = [next(iter(batch_loader(dataset, [range(14)], workers))) for dataset in tests]
    assert all(map(torch.equal, batches[0], batches[1]))
    assert all(map(torch.equal, batches[0], batches[2]))


@pytest.mark.parametrize(("side", "reads"), [(32, 6), (300, 18)])
def test_small_test_pictures_are_decoded_once(tmp_path, monkeypatch, side, reads):
    """Large ones are decoded in each evaluation, and leave the cache to training."""
    paths = make_dataset(tmp_path, ["a", "b"], test=3, size=(side, side))
    data = DataManager(paths, shuffle=False, seed=0, init_cls=1, increment=1)
    images = [image for target in range(2) for image in data.test_images(target)]
    cache = PictureCache(8 << 20, data.defaults.train_transform.prepare)
    plain = ImageSet(images, [0] * 6, data.defaults.test_transform).__getitems__(range(6))
    counted = []
    for module in (batches_module, cache_module):
        read = module.read_prepared
        monkeypatch.setattr(
            module, "read_prepared", lambda path, how, read=read: counted.append(path) or read(path, how)
        )
    for _ in range(3):
        batch = ImageSet(images, [0] * 6, data.defaults.test_transform, cache).__getitems__(range(6))
        assert all(map(torch.equal, batch, plain))
    assert len(counted) == reads


def test_an_item_does_not_depend_on_the_other_items_read(photos):
    dataset = photo_set(photos)
    alone = dataset[3, 9][1]
    for i in range(len(dataset)):
        dataset[3, i]
    assert torch.equal(alone, dataset[3, 9][1])


@pytest.mark.parametrize("change", [{"model_seed": 8}, {"phase": 3}])
def test_seed_and_phase_change_the_pictures(photos, change):
    assert not same(epoch_of(photo_set(photos), 0), epoch_of(photo_set(photos, **change), 0))


def test_equal_pictures_are_augmented_differently(tmp_path):
    paths = DatasetPaths(tmp_path, "Same")
    items = [Item(save_noise(paths.folder("train") / "a" / f"{i}.png", 0), 0, "new") for i in range(6)]
    dataset = TrainingSet(items, paths, TRANSFORM, 0.0, 0, "all", 1, 0)
    assert len({dataset[0, i][1].sum().item() for i in range(6)}) == 6


def test_reading_an_item_leaves_the_generators_alone(photos):
    dataset = photo_set(photos)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    dataset[0, 0]
    assert (torch.rand(1), np.random.rand()) == expected


def test_a_training_set_travels_to_a_process(photos):
    dataset = photo_set(photos)
    other = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[1, 8][1], other[1, 8][1])


def test_image_set_gives_pictures_in_order(photos):
    data = manager(photos, init_cls=2)
    images = data.train_images(1)
    dataset = ImageSet(images, [1] * len(images), data.defaults.test_transform)
    indices, tensors, targets = next(iter(batch_loader(dataset, BatchSampler(range(7), 10, drop_last=False))))
    assert indices.tolist() == list(range(7))
    assert targets.tolist() == [1] * 7
    assert tensors.shape == (7, 3, 32, 32)
    assert torch.equal(tensors[3], dataset[3][1])
    with pytest.raises(ValueError, match="7 images, 6 targets"):
        ImageSet(images, [1] * 6, data.defaults.test_transform)


def test_a_small_shared_memory_is_noticed_before_workers_die_of_it(photos, monkeypatch, caplog):
    dataset = photo_set(photos)
    sampler = EpochBatchSampler(len(dataset), 4, 7, 2)
    expected = list(batch_loader(dataset, sampler))
    for free, workers, words in ((200_000, 2, 0), (50_000, 0, 1)):  # 2 workers, 3 batches of 4 x 3072 bytes each
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        loader = batch_loader(dataset, sampler, 2)
        assert loader.num_workers == workers
        assert len(caplog.records) == words
    assert "--shm-size" in caplog.text
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(loader, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


# --- unreadable pictures ---


def complaint(loader):
    try:
        list(loader)
    except UserError as error:
        error.with_traceback(None)  # it would keep the loader's processes in a cycle, which ends only seconds later
        return str(error)
    return "none"


UNREADABLE = [(kind, workers) for kind in ("truncated", "text") for workers in (0, 1)]


@pytest.mark.parametrize(("kind", "workers"), long_but(UNREADABLE, *UNREADABLE[:3]))
def test_an_unreadable_picture_is_named_in_one_line(tmp_path, kind, workers):
    paths = DatasetPaths(tmp_path, "Broken")
    image = save_noise(paths.folder("train") / "a" / "bad picture.jpg", 0, (64, 64))
    image.write_bytes(image.read_bytes()[:900] if kind == "truncated" else b"not a picture")
    training = TrainingSet([Item(image, 0, "new")], paths, TRANSFORM, 0.0, 0, "all", 1, 0)
    for loader in (
        batch_loader(training, EpochBatchSampler(1, 1, 1, 0), workers),
        batch_loader(ImageSet([image], [0], DEFAULTS.test_transform), [[0]], workers),
    ):
        message = complaint(loader)
        assert message.startswith(f"cannot read image {image}")
        assert "\n" not in message
        assert "Traceback" not in message


def test_a_copy_that_went_missing_is_named(greys, tmp_path):
    paths = DatasetPaths(tmp_path, "Gone")
    image = save_picture(paths.folder("train") / "a" / "0.png")
    dataset = TrainingSet([Item(image, 0, "edges")], paths, Level(), 0.0, 1, "all", 1, 0)
    with pytest.raises(UserError, match=re.escape(str(paths.copy(image, 0)))):
        dataset[0, 0]


def test_a_header_that_does_not_decode_is_named(tmp_path):
    paths = make_dataset(tmp_path, ["a"], train=1, test=1)
    (image,) = paths.images("a")
    image.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=re.escape(str(image))):
        _ = manager(paths, init_cls=1).defaults.image_kind


# --- copies made ahead ---


def test_complete_copies_pass_and_missing_ones_are_counted_with_the_command(photos, tmp_path):
    images = photos.images("a") + photos.images("b")
    check_copies(photos, EDGES, images, 2)
    check_copies(photos, EDGES, images, 0)
    with pytest.raises(UserError) as error:
        check_copies(photos, EDGES, images, 3)
    message = str(error.value)
    assert message.startswith("14 of 42 copies are missing")
    assert str(photos.copy(images[0], 2)) in message
    command = shlex.split(message.splitlines()[-1])
    assert command[:2] == ["python", "compress/run.py"]
    arguments = dict(zip(command[2::2], command[3::2], strict=True))
    assert arguments == {
        "--data-dir": str(photos.data_dir),
        "--dataset": "Toy",
        "--resolution": "high",
        "--seeds": "3",
    }


def test_the_first_missing_copy_is_the_one_that_is_gone(tmp_path):
    paths = make_dataset(tmp_path / "my data", ["a b", "ü"], train=3, test=1, size=(300, 300))
    images = paths.images("a b") + paths.images("ü")
    for image in images:
        for k in range(2):
            save_picture(paths.copy(image, k))
    check_copies(paths, EDGES, images, 2)
    gone = paths.copy(images[4], 1)
    gone.unlink()
    with pytest.raises(UserError, match=f"^1 of 12 .*{re.escape(str(gone))}") as error:
        check_copies(paths, EDGES, images, 2)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[command.index("--data-dir") + 1] == str(paths.data_dir)
    assert command[command.index("--resolution") + 1] == "high"
    check_copies(paths, EDGES, images[:4], 2)
    paths.copies_folder("ü").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^6 of 12 .*{re.escape(str(paths.copy(images[3], 0)))}"):
        check_copies(paths, EDGES, images, 2)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")
def test_workers_do_not_copy_the_paths():
    """A forked process that reads all of them writes to next to no memory."""
    paths = [Path(f"/data/Many/train/class {i // 1000}/{i:08d}.jpg") for i in range(50_000)]
    table = path_table(paths)
    assert list(map(os.fsdecode, table)) == list(map(str, paths))

    def private_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private"))

    def grown_by_reading(of: Sequence) -> int:
        receiver, sender = multiprocessing.Pipe(duplex=False)

        def read() -> None:
            gc.freeze()
            before = private_kib()
            for i in range(len(of)):
                str(of[i])
            sender.send(private_kib() - before)

        child = multiprocessing.get_context("fork").Process(target=read)
        child.start()
        grown = receiver.recv()
        child.join()
        return grown

    as_list, as_table = grown_by_reading(paths), grown_by_reading(table)
    assert as_list > 5000
    assert as_table < 1000
