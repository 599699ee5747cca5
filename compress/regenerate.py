"""Prompts -> copies: edge maps and copies of train images, written where they are missing.

    todo = plan(paths, images, range(5))                # what is missing on disk
    result = Regenerator(paths, HIGH, model).run(todo)  # makes it

A run is a chain of four stages, each of which knows only its neighbours: tasks into jobs (`jobs`: reads images, writes
edge maps), jobs into batches (`batches`), batches into pictures (`PictureGenerator`), pictures into files
(`_write_copy`).
"""

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from compress import prompt as prompts
from compress.generate import Job, PictureGenerator, batches
from compress.plan import Failure, Plan, Result, Task, plan
from compress.presets import Preset
from compress.prompt import Prompt
from utils.errors import UserError
from utils.images import image_bits, read_image, write_atomically
from utils.paths import DatasetPaths

JPEG_QUALITY = 95
"""What cv2.imwrite uses unasked, and so what the published scripts' copies have."""


class Regenerator:
    """Makes the edge maps and copies of a dataset's train images.

    paths: the dataset; preset: the settings; model: a ControlLDM as `ControlNet.cldm.model.load_model` returns it, or
    None where no copy is missing; batch_size: copies generated together, None to choose it by device and model.
    """

    def __init__(self, paths: DatasetPaths, preset: Preset, model, *, batch_size: int | None = None):
        self.paths = paths
        self.preset = preset
        self.texts = paths.class_texts()
        self.generate = PictureGenerator(preset, model, batch_size=batch_size)

    def __call__(self, images: Iterable[Path], copy_numbers: Sequence[int]) -> Result:
        """Make what is missing of these images' edge maps and copies."""
        return self.run(plan(self.paths, images, copy_numbers))

    def run(self, plan: Plan, progress: Callable[[int], object] = lambda copies: None) -> Result:
        """Make what the plan says is missing.  An image that can't be read goes into the result's failures.

        progress: called with the number of copies that were just made, or given up.
        Raises UserError where nothing can be written (full disk, no permission) or the batch does not fit the device.
        """
        result = Result(edge_maps_skipped=plan.edge_maps_present, copies_skipped=plan.copies_present)
        folders = {self.paths.edge_map(task.image).parent for task in plan.tasks}
        folders |= {self.paths.copy(task.image, 0).parent for task in plan.tasks}
        leftovers = [file for folder in folders for file in temporary_files(folder)]
        try:
            for batch in batches(self.jobs(plan, result, progress), self.generate.batch_size):
                for job, picture in zip(batch, self.generate(batch), strict=True):
                    self._write_copy(job, picture, result)
                progress(len(batch))
        finally:
            for file in leftovers:  # no write takes as long as a run: what is still there, nobody will move into place
                file.unlink(missing_ok=True)
        return result

    def jobs(self, plan: Plan, result: Result, progress: Callable[[int], object]) -> Iterator[Job]:
        """The copies to make, image by image.  Writes the missing edge maps on the way."""
        for task in plan.tasks:
            try:
                jobs = self._jobs(task, result)
            except OSError as error:
                result.failures.append(Failure(task.image, _reason(error, task.image)))
                result.edge_maps_failed += task.edge_map is None
                result.copies_failed += len(task.copy_numbers)
                progress(len(task.copy_numbers))
            else:
                yield from jobs

    def _jobs(self, task: Task, result: Result) -> list[Job]:
        width, height, bits_per_pixel = image_bits(task.image)
        prompt = self.prompt(task) if task.edge_map is None or task.copy_numbers else None
        edge_map = task.edge_map or self.paths.edge_map(task.image)
        if task.edge_map is None:
            _write(edge_map, lambda: prompts.save(prompt, edge_map))
            result.edge_maps_made += 1
        if prompt is not None:
            result.edge_map_bits += prompt.edge_map.size
        else:
            edge_width, edge_height, _ = image_bits(edge_map)
            result.edge_map_bits += edge_width * edge_height
        result.prompt_bytes += edge_map.stat().st_size + len(self.text(task.image).encode())
        result.image_bytes += task.image.stat().st_size
        result.image_bits += width * height * bits_per_pixel
        return self.jobs_of(task, prompt) if task.copy_numbers else []

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

    def _write_copy(self, job: Job, picture: np.ndarray, result: Result) -> None:
        copy = self.paths.copy(job.image, job.copy_number)
        try:
            _write(copy, lambda: write_atomically(copy, lambda file: save_copy(picture, file, job.greyscale)))
            result.copies_made += 1
        except OSError as error:
            result.failures.append(Failure(job.image, _reason(error, copy)))
            result.copies_failed += 1


def save_copy(picture: np.ndarray, file: BinaryIO, greyscale: bool) -> None:
    """Write a copy (HxWx3 uint8) as a JPEG.  The copy of a greyscale image is greyscale: it stands in for its image."""
    image = Image.fromarray(picture)
    (image.convert("L") if greyscale else image).save(file, "JPEG", quality=JPEG_QUALITY)


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
    return str(error).removeprefix(f"{path}: ") or type(error).__name__


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
