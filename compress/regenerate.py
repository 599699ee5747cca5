"""Kept files and copies of train images, written where they are missing.

`Regenerator.run` is the loop: tasks become requests (reads images, writes kept files), requests batches, batches
pictures (a generator), pictures files.  The first and the last step work in threads while the model samples.
"""

import errno
import functools
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from compress.forms import Request, pixels, resize_back
from compress.generators import Generator, NoPicture, batches
from compress.plan import Plan, Task
from utils.data.images import image_bits
from utils.devices import Fabric, by_all, own_part
from utils.errors import UserError
from utils.files import temporary_files, write_atomically

THREADS = 4
"""That read images ahead, and as many that write copies: enough for a fast GPU, at some 10 ms a photograph."""

MOST_PIXELS = 50_000_000
"""Of images that are held decoded at a time, all threads together (one larger image is held alone)."""

Progress = Callable[[int], object]


@dataclass
class Part:
    """What is known of a part of the images; each field adds up over the parts."""

    def join(self, other: Self) -> None:
        """Count another part in."""
        for each in fields(self):
            setattr(self, each.name, operator.iadd(getattr(self, each.name), getattr(other, each.name)))


P = TypeVar("P", bound=Part)


def total(parts: Sequence[P]) -> P:
    """The parts of all processes, joined into the first one's."""
    for other in parts[1:]:
        parts[0].join(other)
    return parts[0]


@dataclass(frozen=True)
class Failure:
    """An image of which something could not be made, and why."""

    image: Path
    reason: str

    def __str__(self):
        return f"{self.image}: {self.reason}"


@dataclass
class Result(Part):
    """Numbers of kept files and copies that were made, were there already (skipped), and could not be made.

    kept_recoded: of the kept files skipped, those of earlier versions that were written as this one writes them;
    image_bytes, kept_bytes (with class texts in UTF-8): on disk; image_bits, raw_bits: of both before any coding
    (raw_bits 0 where the form has no such count).  These four are of the images that could be read.
    """

    kept_made: int = 0
    kept_skipped: int = 0
    kept_failed: int = 0
    kept_recoded: int = 0
    copies_made: int = 0
    copies_skipped: int = 0
    copies_failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    image_bytes: int = 0
    kept_bytes: int = 0
    image_bits: int = 0
    raw_bits: int = 0


@dataclass
class _Read:
    """A task that has been read: the copies to make, its part of the result, and the picture (`Form.prepared`) of one
    whose kept file the generator is to make."""

    task: Task
    requests: list[Request]
    result: Result
    to_encode: np.ndarray | None = None


def regenerate(
    todo: Plan, generator: Generator | None, fabric: Fabric, progress: Progress, recode: Container[str] = ()
) -> Result:
    """Make every n-th task of a plan, which is the same in all n processes.  Returns the result of all, in all of them.

    A process that dies ends the run (torchrun ends the others, srun --kill-on-bad-exit=1 too), and the same command
    makes the rest.  Arguments as `Regenerator` has them.
    """
    own = Regenerator(todo, generator, recode).run(progress, own_part(fabric, todo.tasks))
    return total(by_all(fabric, lambda: own))


class Regenerator:
    """Makes the kept files and copies that a plan says are missing.

    generator: of the form's copies (`make_generator`); None where nothing that is missing takes it; recode: class
    labels whose kept files of earlier versions are written as the form writes them now (`Form.recoded`).
    """

    def __init__(self, plan: Plan, generator: Generator | None, recode: Container[str] = ()):
        self.plan = plan
        self.paths = plan.records.paths
        self.form = plan.records.form
        self.generator = generator
        self.recode = recode
        self.texts = self.paths.class_texts()
        self._batch_size = generator.batch_size if generator else 1
        self._marks = {label: plan.records.copies.mark(label) for label in self.texts}
        self._pixels = Budget(MOST_PIXELS)

    def run(self, progress: Progress = lambda copies: None, tasks: Sequence[Task] | None = None) -> Result:
        """Make what is missing.  An image that can't be read goes into the result's failures.

        progress: called with the number of copies that were just made, or given up; tasks: those of the plan to work
        on, None for all.
        Raises UserError where nothing can be written (full disk, no permission) or the batch does not fit the device.
        """
        self._prepare_folders()
        own = self.plan.tasks if tasks is None else tasks
        result = Result(
            kept_skipped=sum(task.kept is not None for task in own),
            copies_skipped=sum(self.plan.copies_per_image - len(task.copy_numbers) for task in own),
        )
        readers, writers = ThreadPoolExecutor(THREADS, "reader"), ThreadPoolExecutor(THREADS, "writer")
        being_written: deque[list[Future[Result]]] = deque()

        def requests() -> Iterator[Request]:
            """The copies to make, image by image; what was made of the images is counted."""
            for each in self._encoded(map_ahead(readers, self._read, own, THREADS + self._batch_size)):
                result.join(each.result)
                if each.result.copies_failed:
                    progress(each.result.copies_failed)
                yield from each.requests

        def collect(most: int) -> None:
            """Wait until at most this many batches are still being written."""
            while len(being_written) > most:
                batch = being_written.popleft()
                for written in batch:
                    result.join(written.result())
                progress(len(batch))

        try:
            for batch in batches(requests(), self._batch_size):
                assert self.generator is not None
                pictures = self.generator(batch)
                collect(most=1)
                pairs = zip(batch, pictures, strict=True)
                being_written.append([writers.submit(self._write_copy, *pair) for pair in pairs])
            collect(most=0)
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)
        return result

    def _prepare_folders(self) -> None:
        """Take away what killed processes have half written, and record the settings of what is to be made."""
        plan, records = self.plan, self.plan.records
        folders = {self.paths.kept(task.image).parent for task in plan.tasks}
        folders |= {self.paths.copy(task.image, 0).parent for task in plan.tasks}
        for folder in folders | {folder.parent for folder in folders}:
            for file in temporary_files(folder):
                file.unlink(missing_ok=True)
        records.kept.note(task.image.parent.name for task in plan.tasks if not task.is_done or self._is_old(task))
        records.copies.note(task.image.parent.name for task in plan.tasks if task.copy_numbers)

    def _read(self, task: Task) -> _Read:
        """Read what is kept of a task's image, or make it from the image."""
        try:
            if task.is_done and not self._is_old(task):
                return self._save(task, b"")
            width, height, _ = image_bits(task.image)
            with self._pixels.hold(width * height):
                if task.kept is None and self.form.encoded_by_generator:
                    return _Read(task, [], Result(), self.form.prepared(pixels(task.image)))
                return self._save(task, self.kept(task))
        except OSError as error:
            return _failed(task, error)

    def _encoded(self, read: Iterable[_Read]) -> Iterator[_Read]:
        """Encode what the generator is to encode, in batches of pictures of one shape; pass on the rest."""
        if not self.form.encoded_by_generator:
            yield from read
            return
        for batch in batches(read, self._batch_size, lambda each: each.to_encode is not None and each.to_encode.shape):
            pictures = [each.to_encode for each in batch if each.to_encode is not None]
            if not pictures:
                yield from batch
                continue
            texts = [self.text(each.task.image) for each in batch]
            for each, code in zip(batch, self.form.encode_batch(pictures, texts, self.generator), strict=True):
                try:
                    yield self._save(each.task, code)
                except OSError as error:
                    yield _failed(each.task, error)

    def _save(self, task: Task, kept: bytes) -> _Read:
        """Save what is kept of a task's image, if it is new or to be recoded, and list the copies to make from it."""
        image, new = task.image, kept if task.kept is None else self._recoded(task, kept)
        if new is not None:
            path, older = self.paths.kept(image), self.paths.find_kept(image)
            if task.kept is None and older is not None:
                for k in task.copy_numbers:  # if this run were killed, they would pass for the new file's
                    self.paths.copy(image, k).unlink(missing_ok=True)
            _write(path, lambda file: file.write(new))
            if older is not None and older != path:
                older.unlink()  # of another ending: it would count again if the new file were deleted
        requests = self.requests(task, kept) if task.copy_numbers else []
        width, height, bits_per_pixel = image_bits(image)
        path = task.kept if task.kept and new is None else self.paths.kept(image)
        result = Result(
            kept_made=int(task.kept is None),
            kept_recoded=int(task.kept is not None and new is not None),
            image_bytes=image.stat().st_size,
            kept_bytes=path.stat().st_size + len(self.text(image).encode()),
            image_bits=width * height * bits_per_pixel,
            raw_bits=self.form.raw_bits(height, width, path) or 0,
        )
        return _Read(task, requests, result)

    def _is_old(self, task: Task) -> bool:
        """Whether a task's kept file has an ending that is no longer written, and is to be recoded."""
        is_old = task.kept is not None and task.kept.suffix != self.form.kept_endings[0]
        return is_old and task.image.parent.name in self.recode

    def _recoded(self, task: Task, kept: bytes) -> bytes | None:
        """A kept file of an earlier version as the form writes it now; None where it stays as it is."""
        if not self._is_old(task):
            return None
        try:
            return self.form.recoded(kept, pixels(task.image))
        except OSError:  # which --verify tells
            return None

    def text(self, image: Path) -> str:
        """The text of an image's class."""
        return self.texts[image.parent.name]

    def kept(self, task: Task) -> bytes:
        """What is kept of a task's image, from disk or else from the image itself."""
        if task.kept is None:
            return self.form.encode(pixels(task.image), self.text(task.image))
        return task.kept.read_bytes()

    def requests(self, task: Task, kept: bytes) -> list[Request]:
        """The copies that a task's image lacks."""
        try:
            return self.form.requests(task.image, kept, self.text(task.image), task.copy_numbers)
        except OSError as error:
            raise OSError(f"{task.kept or task.image}: {error}") from error

    def _write_copy(self, request: Request, picture: np.ndarray | NoPicture) -> Result:
        """Write a picture of the generated size as a copy of its image's size."""
        copy, mark = self.paths.copy(request.image, request.copy_number), self._marks[request.image.parent.name]
        try:
            if isinstance(picture, NoPicture):
                raise picture
            with self._pixels.hold(request.size[0] * request.size[1]):
                picture = resize_back(picture, *request.size)
                _write(copy, functools.partial(self.form.save_copy, picture, greyscale=request.greyscale, mark=mark))
            return Result(copies_made=1)
        except OSError as error:
            return Result(copies_failed=1, failures=[Failure(request.image, reason(error, copy))])


def _failed(task: Task, error: OSError) -> _Read:
    failed = Result(
        kept_failed=int(task.kept is None),
        copies_failed=len(task.copy_numbers),
        failures=[Failure(task.image, reason(error, task.image))],
    )
    return _Read(task, [], failed)


def _write(path: Path, write: Callable) -> None:
    """`write_atomically`, with a UserError where no other file could be written there either."""
    try:
        write_atomically(path, write)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"can't write to {path.parent}: {error.strerror}.") from error
        raise


def reason(error: OSError, path: Path) -> str:
    """What an error says, without `path`, which stands before it anyway, but with the path of another file."""
    text = (error.strerror or str(error)).removeprefix(f"{path}: ") or type(error).__name__
    other = error.filename is not None and os.fsdecode(error.filename) != str(path)
    return f"{os.fsdecode(error.filename)}: {text}" if other else text


def map_ahead(pool: Executor, function: Callable, items: Iterable, window: int) -> Iterator:
    """function(item) for each item, in order; the pool works at most `window` items ahead of who takes the values.

    What a call raises is raised here, at its place.
    """
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Budget:
    """Lets threads hold at most `limit` of something together; what is larger than that is held alone."""

    def __init__(self, limit: int):
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + amount <= self.limit)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()
