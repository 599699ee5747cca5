"""Prompts -> copies: edge maps and copies of train images, written where they are missing.

    regenerator = Regenerator(paths, HIGH, model)
    todo = regenerator.plan(images, range(5))   # what is missing on disk
    result = regenerator.run(todo)              # makes it

A run is a chain of four stages, each of which knows only its neighbours: tasks into jobs (`jobs`: reads images, writes
edge maps), jobs into batches (`batches`), batches into pictures (`PictureGenerator`), pictures into files
(`_write_copy`).  The first and the last work in threads while the model samples.
"""

import errno
import functools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from compress import prompt as prompts
from compress.generate import Job, PictureGenerator, batches, precision_of
from compress.overlap import Budget, map_ahead
from compress.plan import Failure, Plan, Result, Task, plan
from compress.presets import Preset
from compress.prompt import Prompt
from compress.records import Records
from utils.data.images import image_bits, read_image, write_atomically
from utils.data.paths import DatasetPaths
from utils.errors import UserError

THREADS = 4
"""That read images ahead, and as many that write copies: enough for a fast GPU, at some 10 ms a photograph."""

MOST_PIXELS = 50_000_000
"""Of images that are held decoded at a time, all threads together (one larger image is held alone)."""


@dataclass
class _Read:
    """What came of a task's image: the copies to make, and its part of the result."""

    jobs: list[Job]
    result: Result


class Regenerator:
    """Makes the edge maps and copies of a dataset's train images.

    paths: the dataset; preset: the settings; model: a ControlLDM as `ControlNet.cldm.model.load_model` returns it, or
    None where no copy is missing; batch_size and how: as `PictureGenerator` takes them.
    """

    def __init__(self, paths: DatasetPaths, preset: Preset, model, *, batch_size: int | None = None, **how):
        self.paths = paths
        self.preset = preset
        self.texts = paths.class_texts()
        self.generate = PictureGenerator(preset, model, batch_size=batch_size, **how)
        self._model = (None, None) if model is None else (getattr(model, "fingerprint", ""), precision_of(model))
        self._pixels = Budget(MOST_PIXELS)

    def __call__(self, images: Iterable[Path], copy_numbers: Sequence[int]) -> Result:
        """Make what is missing of these images' edge maps and copies.  Raises MadeOtherwise as `plan` does."""
        return self.run(self.plan(images, copy_numbers))

    def plan(self, images: Iterable[Path], copy_numbers: Sequence[int], **how) -> Plan:
        """`compress.plan.plan` with this regenerator's settings and model."""
        return plan(Records(self.paths, self.preset, *self._model), images, copy_numbers, **how)

    def run(self, plan: Plan, progress: Callable[[int], object] = lambda copies: None) -> Result:
        """Make what the plan says is missing.  An image that can't be read goes into the result's failures.

        progress: called with the number of copies that were just made, or given up.
        Raises UserError where nothing can be written (full disk, no permission) or the batch does not fit the device.
        """
        result = Result(edge_maps_skipped=plan.edge_maps_present, copies_skipped=plan.copies_present)
        folders = {self.paths.edge_map(task.image).parent for task in plan.tasks}
        folders |= {self.paths.copy(task.image, 0).parent for task in plan.tasks}
        folders |= {folder.parent for folder in folders}
        leftovers = [file for folder in folders for file in temporary_files(folder)]
        plan.records.edge_maps.note(task.image.parent.name for task in plan.tasks if not task.is_done)
        plan.records.copies.note(task.image.parent.name for task in plan.tasks if task.copy_numbers)
        readers, writers = ThreadPoolExecutor(THREADS, "reader"), ThreadPoolExecutor(THREADS, "writer")
        marks = {label: plan.records.copies.mark(label) for label in self.texts}
        being_written: deque[list[Future[Result]]] = deque()

        def collect(most: int) -> None:
            """Wait until at most this many batches are still being written."""
            while len(being_written) > most:
                batch = being_written.popleft()
                for written in batch:
                    result.add(written.result())
                progress(len(batch))

        try:
            for batch in batches(self._jobs(plan, readers, result, progress), self.generate.batch_size):
                pictures = self.generate(batch)
                collect(most=1)
                being_written.append(
                    [
                        writers.submit(self._write_copy, job, picture, marks[job.image.parent.name])
                        for job, picture in zip(batch, pictures, strict=True)
                    ]
                )
            collect(most=0)
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)
            for file in leftovers:  # no write takes as long as a run: what is still there, nobody will move into place
                file.unlink(missing_ok=True)
        return result

    def _jobs(
        self, plan: Plan, readers: ThreadPoolExecutor, result: Result, progress: Callable[[int], object]
    ) -> Iterator[Job]:
        """The copies to make, image by image.  Writes the missing edge maps on the way, and reads ahead."""
        window = THREADS + self.generate.batch_size
        for read in map_ahead(readers, self._read, plan.tasks, window):
            result.add(read.result)
            if read.result.copies_failed:
                progress(read.result.copies_failed)
            yield from read.jobs

    def _read(self, task: Task) -> _Read:
        """Read a task's image or edge map, and write the edge map where there is none."""
        try:
            return self._read_whole(task)
        except OSError as error:
            failed = Result(
                edge_maps_failed=int(task.edge_map is None),
                copies_failed=len(task.copy_numbers),
                failures=[Failure(task.image, _reason(error, task.image))],
            )
            return _Read([], failed)

    def _read_whole(self, task: Task) -> _Read:
        width, height, bits_per_pixel = image_bits(task.image)
        edge_map = task.edge_map or self.paths.edge_map(task.image)
        jobs = []
        if task.is_done:
            edge_width, edge_height, _ = image_bits(edge_map)
        else:
            with self._pixels.hold(width * height):
                prompt = self.prompt(task)
                if task.edge_map is None:
                    self._save_edge_map(task, prompt)
                edge_height, edge_width = prompt.edge_map.shape
                jobs = self.jobs_of(task, prompt) if task.copy_numbers else []
        return _Read(
            jobs,
            Result(
                edge_maps_made=int(task.edge_map is None),
                image_bytes=task.image.stat().st_size,
                prompt_bytes=edge_map.stat().st_size + len(self.text(task.image).encode()),
                image_bits=width * height * bits_per_pixel,
                edge_map_bits=edge_width * edge_height,
            ),
        )

    def _save_edge_map(self, task: Task, prompt: Prompt) -> None:
        """Write an edge map in the place of what may be there.

        Copies that are to be made again go first: were this run killed, they would look like the new edge map's.
        """
        edge_map, older = self.paths.edge_map(task.image), self.paths.find_edge_map(task.image)
        if older is not None:
            for k in task.copy_numbers:
                self.paths.copy(task.image, k).unlink(missing_ok=True)
        _write(edge_map, lambda: prompts.save(prompt, edge_map))
        if older not in (None, edge_map):  # in another form, which would come back if the new file went away
            older.unlink()

    def text(self, image: Path) -> str:
        """What an image's class is called."""
        return self.texts[image.parent.name]

    def prompt(self, task: Task) -> Prompt:
        """The prompt of an image, from its edge map on disk or else from the image itself."""
        if task.edge_map is None:
            return prompts.extract(np.asarray(read_image(task.image)), self.text(task.image), self.preset)
        return prompts.load(task.edge_map, self.text(task.image))

    def jobs_of(self, task: Task, prompt: Prompt) -> list[Job]:
        """The copies that an image lacks."""
        width, height, bits_per_pixel = image_bits(task.image)
        hint = prompts.hint(prompt, *self.preset.generated_size(height, width))
        greyscale = bits_per_pixel != 24
        return [Job(task.image, k, prompt.text, hint, (height, width), greyscale) for k in task.copy_numbers]

    def _write_copy(self, job: Job, picture: np.ndarray, mark: str | None) -> Result:
        """Write a picture of the generated size as a copy of its image's size."""
        copy = self.paths.copy(job.image, job.copy_number)
        height, width = job.original
        try:
            with self._pixels.hold(height * width):
                picture = resize_back(picture, height, width)
                save = functools.partial(save_copy, picture, greyscale=job.greyscale, quality=self.preset.quality)
                _write(copy, lambda: write_atomically(copy, functools.partial(save, mark=mark)))
            return Result(copies_made=1)
        except OSError as error:
            return Result(copies_failed=1, failures=[Failure(job.image, _reason(error, copy))])


def resize_back(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A generated picture (HxWx3 uint8) at its image's size, height x width.

    The published rule: Lanczos where the generated picture's shorter side is at most the image's, else by area.
    """
    enlarge = min(picture.shape[:2]) <= min(height, width)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarge else cv2.INTER_AREA)


def save_copy(picture: np.ndarray, file: BinaryIO, greyscale: bool, quality: int, mark: str | None = None) -> None:
    """Write a copy (HxWx3 uint8) as a JPEG (4:2:0), with its mark (see `compress.records`) as the comment.

    The copy of a greyscale image is greyscale: it stands in for its image.
    """
    image = Image.fromarray(picture)
    image = image.convert("L") if greyscale else image
    image.save(file, "JPEG", quality=quality, **({"comment": mark.encode()} if mark else {}))


_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _write(path: Path, write: Callable[[], object]) -> None:
    """write(), with a UserError where no other file could be written there either."""
    try:
        write()
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise UserError(f"can't write to {path.parent}: {error.strerror}.") from error
        raise


def _reason(error: OSError, path: Path) -> str:
    return (error.strerror or str(error)).removeprefix(f"{path}: ") or type(error).__name__


def temporary_files(folder: Path) -> list[Path]:
    """The half-written files (as `write_atomically` names them) of processes that are gone from this machine."""
    if not folder.is_dir():
        return []
    found = [(file, re.match(r"\.(\d+)-", file.name)) for file in folder.glob(".*.tmp")]
    return [file for file, process in found if process and not _is_running(int(process[1]))]


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # nothing of ours is half written yet: another machine or container had the same number
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
