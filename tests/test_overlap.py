"""Reading and writing in threads while the model samples."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from compress import regenerate
from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH
from compress.regenerate import Budget, Regenerator, map_ahead
from tests.folders import make_dataset
from tests.regenerating import Maker

PATIENCE = 30  # seconds: only a test that fails waits so long


@pytest.fixture
def paths(tmp_path):
    return make_dataset(tmp_path, ["a"], train=40, size=(40, 40))


def test_mapping_keeps_the_order_and_never_runs_further_ahead_than_its_window():
    started, taken = [], []

    def square(n):
        started.append(n)
        time.sleep(0.002 * (n % 3))
        return n * n

    with ThreadPoolExecutor(4) as pool:
        for value in map_ahead(pool, square, range(40), window=6):
            taken.append(value)
            assert len(started) <= len(taken) + 6
    assert taken == [n * n for n in range(40)]


def test_an_error_is_raised_at_its_place():
    with ThreadPoolExecutor(2) as pool:
        values = map_ahead(pool, lambda n: 1 // (n - 2), range(9), window=4)
        assert [next(values), next(values)] == [-1, -1]
        with pytest.raises(ZeroDivisionError):
            next(values)


def test_a_budget_is_kept_and_what_is_larger_goes_alone():
    budget, held, most, together = Budget(10), [], [], []
    lock = threading.Lock()

    def work(amount):
        with budget.hold(amount):
            with lock:
                held.append(amount)
                most.append(sum(held))
                together.append(len(held))
            time.sleep(0.002)
            with lock:
                held.remove(amount)
        return sum(most[-1:])

    amounts = [3, 4, 2, 25, 3, 3, 5, 10, 1, 25, 2] * 3
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, amounts))
    assert max(together) > 1
    assert all(total <= 10 or total == 25 for total in most)


def test_images_are_read_while_the_model_samples(paths, monkeypatch):
    """The first batch's pictures come only when images of later batches have been read."""
    read, enough = [], threading.Event()

    def kept(regenerator, task, of=Regenerator.kept):
        read.append(task.image)
        if len(read) > 2:
            enough.set()
        return of(regenerator, task)

    def generate(generator, batch, steps=None):
        assert enough.wait(PATIENCE)
        return [np.zeros((*request.condition.size, 3), np.uint8) for request in batch]

    monkeypatch.setattr(Regenerator, "kept", kept)
    monkeypatch.setattr(PictureGenerator, "__call__", generate)
    result = Maker(paths, HIGH.changed(size=64), None, batch_size=2)(paths.images("a"), [0])
    assert result.copies_made == 40


def test_copies_are_written_while_the_model_samples(paths, monkeypatch):
    """Each batch's pictures come only when a copy of the batch before is on disk."""
    batches = []

    def generate(generator, batch, steps=None):
        deadline = time.monotonic() + PATIENCE
        while batches and not paths.copy(batches[-1][0].image, 0).exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        batches.append(batch)
        return [np.zeros((*request.condition.size, 3), np.uint8) for request in batch]

    monkeypatch.setattr(PictureGenerator, "__call__", generate)
    result = Maker(paths, HIGH.changed(size=64), None, batch_size=4)(paths.images("a"), [0])
    assert (len(batches), result.copies_made) == (10, 40)


def test_neither_images_nor_pictures_pile_up(paths, monkeypatch):
    """A slow disk holds the model up, and a slow model the reading."""
    read, generated, written = [], [], []
    lock = threading.Lock()

    def kept(regenerator, task, of=Regenerator.kept):
        with lock:
            read.append(task.image)
            assert len(read) <= len(generated) + 2 * (4 + regenerate.THREADS) + 1
        return of(regenerator, task)

    def generate(generator, batch, steps=None):
        with lock:
            generated.extend(batch)
            assert len(generated) <= len(written) + 3 * 4
        return [np.zeros((*request.condition.size, 3), np.uint8) for request in batch]

    def write_copy(regenerator, request, *rest, of=Regenerator._write_copy):
        time.sleep(0.005)
        result = of(regenerator, request, *rest)
        with lock:
            written.append(request)
        return result

    monkeypatch.setattr(Regenerator, "kept", kept)
    monkeypatch.setattr(Regenerator, "_write_copy", write_copy)
    monkeypatch.setattr(PictureGenerator, "__call__", generate)
    result = Maker(paths, HIGH.changed(size=64), None, batch_size=4)(paths.images("a"), [0])
    assert (result.copies_made, len(written), result.failures) == (40, 40, [])


@pytest.mark.parametrize("where", ["kept", "_write_copy"])
def test_what_a_thread_raises_ends_the_run_and_leaves_no_thread(paths, monkeypatch, where):
    class Broken(BaseException):
        pass

    def fail(regenerator, *what):
        raise Broken

    monkeypatch.setattr(Regenerator, where, fail)
    monkeypatch.setattr(
        PictureGenerator,
        "__call__",
        lambda _, batch: [np.zeros((*request.condition.size, 3), np.uint8) for request in batch],
    )
    before = threading.active_count()
    with pytest.raises(Broken):
        Maker(paths, HIGH.changed(size=64), None, batch_size=4)(paths.images("a"), [0])
    assert threading.active_count() == before
