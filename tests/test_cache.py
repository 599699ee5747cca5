"""The cache of decoded pictures: the same pixels, from however many processes, and never stale."""

import multiprocessing
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from tests import forks
from tests.folders import save_noise
from utils.data.augment import FitSmall, FullSize, SmallTest
from utils.data.batches import ImageSet
from utils.data.cache import PictureCache, open_cache
from utils.data.images import UnreadableImage, read_image, read_prepared
from utils.errors import UserError

MIB = 1 << 20
REPOSITORY = Path(__file__).parents[1]


class Counting:
    """Counts how often a file is read."""

    def __init__(self):
        self.reads = 0

    def __repr__(self):
        return repr(FullSize())

    def __call__(self, image):
        self.reads += 1
        return FullSize()(image)


@pytest.fixture(params=["ram", "disk"])
def make(request, tmp_path):
    """A function that opens a cache of some bytes; on disk it is always the same file."""

    def call(prepare=None, budget=8 * MIB):
        file = tmp_path / "x" / "a.pixels" if request.param == "disk" else None
        return PictureCache(budget, prepare or FullSize(), file)

    return call


def test_pixels_are_read_once_and_are_the_picture_s(make, tmp_path):
    counting = Counting()
    cache = make(counting)
    paths = [save_noise(tmp_path / f"{i}.png", i, (20 + i, 30)) for i in range(50)]
    for _ in range(3):
        for path in paths:
            pixels, kept = cache.read(path)
            assert kept
            np.testing.assert_array_equal(pixels, np.asarray(read_image(path)))
            with pytest.raises(ValueError, match="read-only"):
                pixels[0] = 0
    assert counting.reads == len(cache) == 50


def test_preparations_of_a_picture_are_kept_apart(make, tmp_path):
    path = save_noise(tmp_path / "a.png", 0, (300, 280))
    for prepare in (FullSize(), FitSmall(32), FitSmall(48)):
        cache = make(prepare)
        for _ in range(2):
            np.testing.assert_array_equal(cache.read(path)[0], read_prepared(path, prepare))


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_picture_that_changes_is_read_again(make, tmp_path, change):
    counting = Counting()
    cache = make(counting)
    path = save_noise(tmp_path / "a.bmp", 0)
    status = path.stat()
    cache.read(path)
    save_noise(path, 1, (32, 33) if change == "content" else (32, 32))
    later = status.st_mtime_ns + (0 if change == "content" else 1_000_000)
    os.utime(path, ns=(later, later))
    np.testing.assert_array_equal(cache.read(path)[0], np.asarray(read_image(path)))
    assert counting.reads == 2


def test_what_is_over_the_budget_is_read_each_time(make, tmp_path):
    counting = Counting()
    cache = make(counting, MIB)
    paths = [save_noise(tmp_path / f"{i}.bmp", i, (300, 300)) for i in range(6)]  # 270,000 bytes each
    for _ in range(2):
        kept = []
        for path in paths:
            pixels, of_path = cache.read(path)
            np.testing.assert_array_equal(pixels, np.asarray(read_image(path)))
            kept.append(of_path)
        assert kept == [True] * 3 + [False] * 3
    assert counting.reads == 3 + 2 * 3


def read_all(cache, paths, queue):
    queue.put([int(cache.read(path)[0].astype(int).sum()) for path in paths])
    queue.close()
    queue.join_thread()
    os._exit(0)


def test_forked_processes_share_one_cache(make, tmp_path):
    paths = [save_noise(tmp_path / f"{i}.png", i) for i in range(40)]
    counting = Counting()
    cache, context = make(counting), multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_all, args=(cache, paths[start:], queue)) for start in (0, 10, 20)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = [int(np.asarray(read_image(path)).astype(int).sum()) for path in paths]
    assert sorted(sums, key=len) == [expected[20:], expected[10:], expected]
    assert len(cache) == 40
    for path in paths:
        np.testing.assert_array_equal(cache.read(path)[0], np.asarray(read_image(path)))
    assert counting.reads == 0


def test_a_cache_travels_to_another_process(make, tmp_path):
    cache = make()
    paths = [save_noise(tmp_path / f"{i}.png", i) for i in range(10)]
    for path in paths:
        cache.read(path)
    other = pickle.loads(pickle.dumps(cache))
    assert len(other) == 10
    other.read(save_noise(tmp_path / "10.png", 10))
    assert len(cache) == 11


def test_a_cache_in_memory_stays_here_where_there_is_no_proc(tmp_path, monkeypatch, caplog):
    """As on macOS, where worker processes are spawned and can't open this one's memory."""
    monkeypatch.setattr("utils.data.cache._OPEN_FILES", tmp_path / "none", raising=False)
    path = save_noise(tmp_path / "a.png", 0)
    with caplog.at_level("INFO"):
        cache = open_cache("ram", 0.01, tmp_path, tmp_path, FullSize())
    assert "cache=disk" in caplog.text
    assert cache.read(path)[1]
    assert pickle.loads(pickle.dumps(cache)) is None
    here = ImageSet([path], [0], SmallTest(), cache)
    there = pickle.loads(pickle.dumps(here))  # as a spawned worker gets it
    assert np.array_equal(there[0][1], here[0][1])


def test_unreadable_and_missing_pictures_are_named(make, tmp_path):
    cache = make()
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "b.png"):
        with pytest.raises(UnreadableImage, match=re.escape(f"cannot read image {tmp_path / name}")):
            cache.read(tmp_path / name)
    assert len(cache) == 0


# --- files ---


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.pixels"


def filled(file, folder, count=10):
    paths = [save_noise(folder / f"{i}.png", i) for i in range(count)]
    cache = PictureCache(MIB, FullSize(), file)
    for path in paths:
        cache.read(path)
    return paths


def reads(file, paths, budget=MIB):
    """How many of the pictures had to be read; all are right."""
    counting = Counting()
    cache = PictureCache(budget, counting, file)
    for path in paths:
        np.testing.assert_array_equal(cache.read(path)[0], np.asarray(read_image(path)))
    return counting.reads


def test_a_file_serves_later_runs_of_any_budget_and_stays_within_the_largest(file, tmp_path):
    paths = filled(file, tmp_path)
    assert reads(file, paths) == 0
    assert reads(file, paths, 2 * MIB) == 0
    assert reads(file, paths, MIB // 2) == 0
    assert file.stat().st_blocks * 512 <= file.stat().st_size <= 2 * MIB + 24


def test_folders_that_change_places_between_runs(tmp_path):
    """As where an archive is unpacked again, with equal sizes and times."""
    folders = [tmp_path / "Toy" / "train" / label for label in "ab"]
    images = [[save_noise(folder / f"{i}.bmp", len(folder.name) * i) for i in range(4)] for folder in folders]
    for seed, image in enumerate(image for of_folder in images for image in of_folder):
        save_noise(image, seed)
        os.utime(image, ns=(0, 0))

    def run() -> int:
        """How many pictures had to be read; all are right."""
        counting = Counting()
        cache = open_cache("disk", 0.01, tmp_path / "cache", tmp_path / "Toy", counting, images=images)
        for image in (image for of_folder in images for image in of_folder):
            np.testing.assert_array_equal(cache.read(image)[0], np.asarray(read_image(image)))
        return counting.reads

    assert [run(), run()] == [8, 0]
    folders[0].rename(tmp_path / "between")
    folders[1].rename(folders[0])
    (tmp_path / "between").rename(folders[1])
    assert [run(), run()] == [8, 0]
    cache = open_cache("disk", 0.01, tmp_path / "cache", tmp_path / "Toy", FullSize(), images=images)
    assert pickle.loads(pickle.dumps(cache)).find(images[0][0]) is not None


@pytest.mark.parametrize("content", [b"something else", b"\0" * 300_000, b"ESCORT pixels 2\n" + b"\xff" * 99])
def test_a_file_of_another_kind_is_replaced(file, tmp_path, content):
    file.write_bytes(content)
    paths = filled(file, tmp_path)
    assert reads(file, paths) == 0


def test_damaged_pixels_are_read_again(file, tmp_path):
    """As after a crash of the machine, which may keep records and lose pixels."""
    paths = filled(file, tmp_path)
    content = bytearray(file.read_bytes())
    needle = np.asarray(read_image(paths[4])).tobytes()
    content[content.index(needle) + 1000] ^= 1
    file.write_bytes(content)
    assert reads(file, paths) == 1


def test_a_cut_file_is_replaced(file, tmp_path):
    paths = filled(file, tmp_path)
    os.truncate(file, 20_000)
    assert reads(file, paths) == 10
    assert reads(file, paths) == 0


def test_the_kinds_of_cache(tmp_path, caplog):
    root, folder = tmp_path / "Toy", tmp_path / "pixel_cache"
    assert open_cache("none", 1, folder, root, FullSize()) is None
    assert open_cache("ram", 0, folder, root, FullSize()) is None
    assert open_cache("ram", 0.25, folder, root, FullSize()).budget == 1 << 28
    assert not folder.exists()
    assert open_cache("disk", 0.25, folder, root, FullSize()).budget == 1 << 28
    assert [entry.suffix for entry in folder.iterdir()] == [".pixels"]
    (tmp_path / "in the way").write_text("")
    with pytest.raises(UserError, match=r"cache: .*in the way"):
        open_cache("disk", 0.25, tmp_path / "in the way" / "x", root, FullSize())
    with caplog.at_level("INFO"):
        open_cache("disk", 0.25, folder, root, FullSize(), expected=1 << 30)
    assert "0.25 GiB hold 25 % of the pictures" in caplog.text


RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from utils.data.augment import FullSize
from utils.data.cache import open_cache
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
cache = open_cache("ram", 0.01, Path("x"), Path("y"), FullSize())
assert cache.read(Path(sys.argv[2]) / f"{rank}.png")[1]
dist.barrier()
print(len(cache))
dist.barrier()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="processes find each other's memory through /proc")
def test_ranks_share_the_cache_in_memory(tmp_path):
    for rank in range(2):
        save_noise(tmp_path / f"{rank}.png", rank)
    ranks = [forks.Command(["-c", RANK, rank, tmp_path]) for rank in range(2)]
    assert [process.communicate()[0].strip() for process in ranks] == ["2", "2"]
