"""The cache of decoded pictures (utils/data/cache.py): the same pixels, from any number of processes, never stale."""

import multiprocessing
import os
import pickle
import re

import numpy as np
import pytest

from tests.folders import save_noise
from utils.data.augment import FitSmall
from utils.data.augment_large import FullSize
from utils.data.cache import PixelCache, open_cache
from utils.data.images import UnreadableImage, read_image, read_prepared
from utils.errors import UserError

MIB = 1 << 20


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
    return lambda budget=8 * MIB: PixelCache(budget, tmp_path / "x" / "a.pixels" if request.param == "disk" else None)


def test_pixels_are_read_once_and_are_the_picture_s(make, tmp_path):
    cache, form = make(), Counting()
    paths = [save_noise(tmp_path / f"{i}.png", i, (20 + i, 30)) for i in range(50)]
    for _ in range(3):
        for path in paths:
            pixels, kept = cache.read(path, form)
            assert kept
            np.testing.assert_array_equal(pixels, np.asarray(read_image(path)))
            with pytest.raises(ValueError, match="read-only"):
                pixels[0] = 0
    assert form.reads == len(cache) == 50


def test_forms_of_a_picture_are_kept_apart(make, tmp_path):
    cache, path = make(), save_noise(tmp_path / "a.png", 0, (300, 280))
    for form in (FullSize(), FitSmall(32), FitSmall(48)):
        for _ in range(2):
            np.testing.assert_array_equal(cache.read(path, form)[0], read_prepared(path, form))
    assert len(cache) == 3


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_picture_that_changes_is_read_again(make, tmp_path, change):
    cache, form = make(), Counting()
    path = save_noise(tmp_path / "a.bmp", 0)
    status = path.stat()
    cache.read(path, form)
    save_noise(path, 1, (32, 33) if change == "content" else (32, 32))
    later = status.st_mtime_ns + (0 if change == "content" else 1_000_000)
    os.utime(path, ns=(later, later))
    np.testing.assert_array_equal(cache.read(path, form)[0], np.asarray(read_image(path)))
    assert form.reads == 2


def test_what_is_over_the_budget_is_read_each_time(make, tmp_path):
    cache, form = make(MIB), Counting()
    paths = [save_noise(tmp_path / f"{i}.bmp", i, (300, 300)) for i in range(6)]  # 270,000 bytes each
    for _ in range(2):
        kept = []
        for path in paths:
            pixels, of_path = cache.read(path, form)
            np.testing.assert_array_equal(pixels, np.asarray(read_image(path)))
            kept.append(of_path)
        assert kept == [True] * 3 + [False] * 3
    assert form.reads == 3 + 2 * 3


def read_all(cache, paths, queue):
    queue.put([int(cache.read(path, FullSize())[0].astype(int).sum()) for path in paths])
    queue.close()
    queue.join_thread()
    os._exit(0)


def test_forked_processes_share_one_cache(make, tmp_path):
    paths = [save_noise(tmp_path / f"{i}.png", i) for i in range(40)]
    cache, context = make(), multiprocessing.get_context("fork")
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
    form = Counting()
    for path in paths:
        np.testing.assert_array_equal(cache.read(path, form)[0], np.asarray(read_image(path)))
    assert form.reads == 0


def test_unreadable_and_missing_pictures_are_named(make, tmp_path):
    cache = make()
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "b.png"):
        with pytest.raises(UnreadableImage, match=re.escape(f"cannot read image {tmp_path / name}")):
            cache.read(tmp_path / name, FullSize())
    assert len(cache) == 0


# --- files ---


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.pixels"


def filled(file, folder, count=10):
    paths = [save_noise(folder / f"{i}.png", i) for i in range(count)]
    cache = PixelCache(MIB, file)
    for path in paths:
        cache.read(path, FullSize())
    return paths


def reads(file, paths, budget=MIB):
    """How many of the pictures had to be read; all are right."""
    cache, form = PixelCache(budget, file), Counting()
    for path in paths:
        np.testing.assert_array_equal(cache.read(path, form)[0], np.asarray(read_image(path)))
    return form.reads


def test_a_file_serves_later_runs_and_stays_within_its_budget(file, tmp_path):
    paths = filled(file, tmp_path)
    assert reads(file, paths) == 0
    assert file.stat().st_blocks * 512 <= file.stat().st_size < 2 * MIB
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix not in (".png", ".pixels")] == []


def test_another_budget_starts_anew(file, tmp_path):
    paths = filled(file, tmp_path)
    assert reads(file, paths, 2 * MIB) == 10
    assert reads(file, paths, 2 * MIB) == 0


@pytest.mark.parametrize("content", [b"", b"something else", b"\0" * 300_000])
def test_a_file_of_another_kind_is_replaced(file, tmp_path, content):
    file.write_bytes(content)
    paths = filled(file, tmp_path)
    assert reads(file, paths) == 0


def test_damaged_pixels_are_read_again(file, tmp_path):
    """As after a crash of the machine, which may keep a table and lose the pixels."""
    paths = filled(file, tmp_path)
    content = bytearray(file.read_bytes())
    needle = np.asarray(read_image(paths[4])).tobytes()
    content[content.index(needle) + 1000] ^= 1
    file.write_bytes(content)
    assert reads(file, paths) == 1


def test_a_cut_file_is_replaced(file, tmp_path):
    paths = filled(file, tmp_path)
    os.truncate(file, file.stat().st_size - 4096)
    assert reads(file, paths) == 10


def test_a_cache_travels_to_a_process_by_its_file_alone(file, tmp_path):
    paths = filled(file, tmp_path)
    other = pickle.loads(pickle.dumps(PixelCache(MIB, file)))
    assert len(other) == len(paths)
    assert pickle.loads(pickle.dumps(PixelCache(MIB))) is None


def test_the_kinds_of_cache(tmp_path):
    root, folder = tmp_path / "Toy", tmp_path / "pixel_cache"
    assert open_cache("none", 1, folder, root) is None
    assert open_cache("ram", 0, folder, root) is None
    assert open_cache("ram", 0.25, folder, root).capacity == 1 << 28
    assert open_cache("ram", 0.25, folder, root, processes=4).capacity == 1 << 26
    assert not folder.exists()
    assert open_cache("disk", 0.25, folder, root, processes=4).capacity == 1 << 28
    assert [entry.suffix for entry in folder.iterdir()] == [".pixels"]
    (tmp_path / "in the way").write_text("")
    with pytest.raises(UserError, match=r"cache: .*in the way"):
        open_cache("disk", 0.25, tmp_path / "in the way" / "x", root)
