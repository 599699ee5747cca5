"""Kept files and copies of train images, written where they are missing.

A run is a chain of four stages, each of which knows only its neighbours: tasks into requests (reads images, writes kept
files), requests into batches, batches into pictures (a generator), pictures into files.  The first and the last work in
threads while the model samples.  Where a form is encoded by the generator, that comes between the first two, a batch at
a time.
"""

import errno
import functools
import os
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compress.forms import Request, pixels, resize_back
from compress.generators import Generator, NoPicture, batches
from compress.overlap import Budget, map_ahead
from compress.plan import Part, Plan, Task
from utils.data.images import image_bits
from utils.devices import Fabric, by_all, own_part
from utils.errors import UserError
from utils.files import temporary_files, write_atomically

THREADS = 4
"""That read images ahead, and as many that write copies: enough for a fast GPU, at some 10 ms a photograph."""

MOST_PIXELS = 50_000_000
"""Of images that are held decoded at a time, all threads together (one larger image is held alone)."""

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

Progress = Callable[[int], object]


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

    kept_recoded: kept files of earlier versions that were written as this one writes them, of those skipped;
    image_bytes: of the image files; kept_bytes: of the kept files and their class texts in UTF-8; image_bits, raw_bits:
    of both before any coding (raw_bits 0 where the form has no such count).  All four are sums over the images asked
    for that could be read.  The results of processes that share a plan add up to the whole's.
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
    """The outcome of a task's first stage: the copies to make, and its part of the result.

    to_encode: the picture of a task whose kept file the generator is to make (`Form.prepared`), None of all others.
    """

    task: Task
    requests: list[Request]
    result: Result
    to_encode: np.ndarray | None = None


def regenerate(
    todo: Plan, generator: Generator | None, fabric: Fabric, progress: Progress, recode: Container[str] = ()
) -> Result:
    """Make every n-th task of a plan, which is the same in all n processes.  Returns the result of all, in all of them.

    A process that dies ends the run (torchrun ends the others, srun --kill-on-bad-exit=1 too), and the same command
    makes the rest.  Arguments as `Regenerator` has them; progress counts the process's own copies.
    """
    own = Regenerator(todo, generator, recode).run(progress, own_part(fabric, todo.tasks))
    whole = Result()
    for part in by_all(fabric, lambda: own):
        whole.join(part)
    return whole


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
        self._pixels = Budget(MOST_PIXELS)

    def run(self, progress: Progress = lambda copies: None, tasks: Sequence[Task] | None = None) -> Result:
        """Make what is missing.  An image that can't be read goes into the result's failures.

        progress: called with the number of copies that were just made, or given up; tasks: those of the plan to work
        on, None for all.
        Raises UserError where nothing can be written (full disk, no permission) or the batch does not fit the device.
        """
        plan, records = self.plan, self.plan.records
        folders = {self.paths.kept(task.image).parent for task in plan.tasks}
        folders |= {self.paths.copy(task.image, 0).parent for task in plan.tasks}
        folders |= {folder.parent for folder in folders}
        half_written = [file for folder in folders for file in temporary_files(folder)]
        records.kept.note(task.image.parent.name for task in plan.tasks if not task.is_done or self._is_old(task))
        records.copies.note(task.image.parent.name for task in plan.tasks if task.copy_numbers)
        marks = {label: records.copies.mark(label) for label in self.texts}
        own = plan.tasks if tasks is None else tasks
        result = Result(
            kept_skipped=sum(task.kept is not None for task in own),
            copies_skipped=sum(plan.copies_per_image - len(task.copy_numbers) for task in own),
        )
        readers, writers = ThreadPoolExecutor(THREADS, "reader"), ThreadPoolExecutor(THREADS, "writer")
        being_written: deque[list[Future[Result]]] = deque()

        def collect(most: int) -> None:
            """Wait until at most this many batches are still being written."""
            while len(being_written) > most:
                batch = being_written.popleft()
                for written in batch:
                    result.join(written.result())
                progress(len(batch))

        ahead = map_ahead(readers, self._read, own, THREADS + self._batch_size)
        try:
            for batch in batches(_requests(self._encoded(ahead), result, progress), self._batch_size):
                assert self.generator is not None
                pictures = self.generator(batch)
                collect(most=1)
                being_written.append(
                    [
                        writers.submit(self._write_copy, request, picture, marks[request.image.parent.name])
                        for request, picture in zip(batch, pictures, strict=True)
                    ]
                )
            collect(most=0)
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)
            for file in half_written:
                file.unlink(missing_ok=True)
        return result

    def _read(self, task: Task) -> _Read:
        """Read what is kept of a task's image, or make it from the image."""
        try:
            if task.is_done and not self._is_old(task):
                return self._finished(task, [])
            width, height, _ = image_bits(task.image)
            with self._pixels.hold(width * height):
                if task.kept is None and self.form.encoded_by_generator:
                    return _Read(task, [], Result(), self.form.prepared(pixels(task.image)))
                return self._kept_and_requests(task, self.kept(task))
        except OSError as error:
            return _failed(task, error)

    def _kept_and_requests(self, task: Task, kept: bytes) -> _Read:
        """Save what is kept of a task's image, if it is new or to be recoded, and list the copies to make from it."""
        is_recoded = False
        if task.kept is None:
            self._save_kept(task, kept)
        elif self._is_old(task):
            is_recoded = self._recode(task, task.kept, kept)
        return self._finished(task, self.requests(task, kept) if task.copy_numbers else [], is_recoded)

    def _finished(self, task: Task, requests: list[Request], is_recoded: bool = False) -> _Read:
        """With the task's part of the result, once its kept file is on disk."""
        width, height, bits_per_pixel = image_bits(task.image)
        path = task.kept if task.kept and not is_recoded else self.paths.kept(task.image)
        result = Result(
            kept_made=int(task.kept is None),
            kept_recoded=int(is_recoded),
            image_bytes=task.image.stat().st_size,
            kept_bytes=path.stat().st_size + len(self.text(task.image).encode()),
            image_bits=width * height * bits_per_pixel,
            raw_bits=self.form.raw_bits(height, width, path) or 0,
        )
        return _Read(task, requests, result)

    def _encoded(self, read: Iterable[_Read]) -> Iterator[_Read]:
        """Encode what the generator is to encode, in batches of pictures of one shape; pass on the rest."""
        waiting: dict[tuple[int, ...], list[_Read]] = defaultdict(list)
        for each in read:
            if each.to_encode is None:
                yield each
                continue
            batch = waiting[each.to_encode.shape]
            batch.append(each)
            if len(batch) == self._batch_size:
                yield from self._encode(waiting.pop(each.to_encode.shape))
        for batch in waiting.values():
            yield from self._encode(batch)

    def _encode(self, batch: list[_Read]) -> Iterator[_Read]:
        texts = [self.text(each.task.image) for each in batch]
        codes = self.form.encode_batch(
            [each.to_encode for each in batch if each.to_encode is not None], texts, self.generator
        )
        for each, code in zip(batch, codes, strict=True):
            try:
                yield self._kept_and_requests(each.task, code)
            except OSError as error:
                yield _failed(each.task, error)

    def _is_old(self, task: Task) -> bool:
        """Whether a task's kept file has an ending that is no longer written, and is to be recoded."""
        is_old = task.kept is not None and task.kept.suffix != self.form.files.kept_endings[0]
        return is_old and task.image.parent.name in self.recode

    def _recode(self, task: Task, file: Path, kept: bytes) -> bool:
        """Write a kept file of an earlier version as the form writes it now.  Returns whether that was possible."""
        try:
            recoded = self.form.recoded(kept, pixels(task.image))
        except OSError:  # which --verify tells
            return False
        if recoded is None:
            return False
        _write(self.paths.kept(task.image), lambda written: written.write(recoded))
        file.unlink()
        return True

    def _save_kept(self, task: Task, kept: bytes) -> None:
        """Write a kept file in place of an older one.

        Copies that are to be made again are deleted first: if this run were killed, they would pass for the new file's.
        """
        path, older = self.paths.kept(task.image), self.paths.find_kept(task.image)
        if older is not None:
            for k in task.copy_numbers:
                self.paths.copy(task.image, k).unlink(missing_ok=True)
        _write(path, lambda file: file.write(kept))
        if older is not None and older != path:
            older.unlink()  # of another ending: it would count again if the new file were deleted

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

    def _write_copy(self, request: Request, picture: np.ndarray | NoPicture, mark: str | None) -> Result:
        """Write a picture of the generated size as a copy of its image's size."""
        copy = self.paths.copy(request.image, request.copy_number)
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


def _requests(read: Iterable[_Read], result: Result, progress: Progress) -> Iterator[Request]:
    """The copies to make, image by image, while what was made of the images is counted."""
    for each in read:
        result.join(each.result)
        if each.result.copies_failed:
            progress(each.result.copies_failed)
        yield from each.requests


def _write(path: Path, write: Callable) -> None:
    """`write_atomically`, with a UserError where no other file could be written there either."""
    try:
        write_atomically(path, write)
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise UserError(f"can't write to {path.parent}: {error.strerror}.") from error
        raise


def reason(error: OSError, path: Path) -> str:
    """What an error says, without `path`, which stands before it anyway, but with the path of another file."""
    text = (error.strerror or str(error)).removeprefix(f"{path}: ") or type(error).__name__
    other = error.filename is not None and os.fsdecode(error.filename) != str(path)
    return f"{os.fsdecode(error.filename)}: {text}" if other else text
