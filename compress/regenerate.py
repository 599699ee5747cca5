"""Prompts -> pictures: edge maps and copies of train images, written where they are missing.

    todo = plan(paths, images, range(5))                # what is missing on disk
    result = Regenerator(paths, HIGH, model).run(todo)  # makes it

A run is a chain of four stages, each of which knows only its neighbours: tasks into jobs (`jobs`: reads images, writes
edge maps), jobs into batches (`batches`), batches into pictures (`generate`), pictures into files (`_write_copy`).
"""

import errno
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from compress import prompt as prompts
from compress.presets import Preset
from compress.prompt import Prompt
from ControlNet.annotator.util import resize
from ControlNet.cldm.ddim import DDIMSampler
from utils.errors import UserError
from utils.images import image_bits, read_image, write_atomically
from utils.paths import DatasetPaths

JPEG_QUALITY = 95
"""What cv2.imwrite uses unasked, and so what the published scripts' copies have."""

FULL_SIZE = 300_000_000
"""A model of more parameters than this keeps a CPU busy with one picture at a time."""


# ------------------------------------------------------------------------------------------------ what there is to do


@dataclass(frozen=True)
class Task:
    """A train image, its edge map on disk (None: to be made), and the numbers of the copies that are missing."""

    image: Path
    edge_map: Path | None
    copy_numbers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a run has to do: a task for every image asked for, also where nothing is missing."""

    tasks: tuple[Task, ...]
    copies_per_image: int

    @property
    def edge_maps_missing(self) -> int:
        return sum(task.edge_map is None for task in self.tasks)

    @property
    def edge_maps_present(self) -> int:
        return len(self.tasks) - self.edge_maps_missing

    @property
    def copies_missing(self) -> int:
        return sum(len(task.copy_numbers) for task in self.tasks)

    @property
    def copies_present(self) -> int:
        return len(self.tasks) * self.copies_per_image - self.copies_missing


def plan(paths: DatasetPaths, images: Iterable[Path], copy_numbers: Sequence[int], *, overwrite: bool = False) -> Plan:
    """Compare what is asked for with what is on disk.  overwrite: take nothing as being there."""

    @cache
    def names(folder: Path) -> frozenset[str]:  # one listing a class instead of one question a copy
        return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()

    def is_missing(copy: Path) -> bool:
        return overwrite or copy.name not in names(copy.parent)

    tasks = tuple(
        Task(
            image=image,
            edge_map=None if overwrite else paths.find_edge_map(image),
            copy_numbers=tuple(k for k in copy_numbers if is_missing(paths.copy(image, k))),
        )
        for image in images
    )
    return Plan(tasks, len(copy_numbers))


# ----------------------------------------------------------------------------------------------------- what was done


@dataclass(frozen=True)
class Failure:
    """An image of which something could not be made, and why."""

    image: Path
    reason: str

    def __str__(self):
        return f"{self.image}: {self.reason}"


@dataclass
class Result:
    """What a run made, what was there already, what could not be made; and how large images and prompts are.

    image_bytes, prompt_bytes: on disk, a prompt's being its edge map file and its text in UTF-8; image_bits,
    edge_map_bits: as raw pixels.  All four are sums over the images asked for that could be read.
    """

    edge_maps_made: int = 0
    edge_maps_skipped: int = 0
    edge_maps_failed: int = 0
    copies_made: int = 0
    copies_skipped: int = 0
    copies_failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    image_bytes: int = 0
    prompt_bytes: int = 0
    image_bits: int = 0
    edge_map_bits: int = 0


# ------------------------------------------------------------------------------------------------------ how it is done


@dataclass(frozen=True)
class Job:
    """One copy to make.

    text: what the class is called; hint: the edge map at the generated size, HxW uint8, 0 or 255; original: (height,
    width) of the image, and so of the copy; greyscale: whether the image is, and so the copy.
    """

    image: Path
    copy_number: int
    text: str
    hint: np.ndarray
    original: tuple[int, int]
    greyscale: bool


class Regenerator:
    """Makes the edge maps and copies of a dataset's train images.

    paths: the dataset; preset: the settings; model: a ControlLDM as `ControlNet.cldm.model.load_model` returns it, or
    None where no copy is missing; batch_size: copies generated together, None to choose it by device and model.

    A copy depends on its prompt, its number, the settings and the model alone.  It starts from noise of its own
    (`initial_noise`).  As kernels may round differently at another batch size, a batch that is not full is filled up:
    which copies are missing, and which share a batch, then does not show in a single byte.  Measured, this holds on a
    CPU where the number of threads divides the batch size (an odd share changes how the work is split).  Elsewhere,
    and between batch sizes, a few pixels in ten thousand differ by one level of 255.
    """

    def __init__(self, paths: DatasetPaths, preset: Preset, model, *, batch_size: int | None = None):
        self.paths = paths
        self.preset = preset
        self.model = model
        self.batch_size = batch_size or default_batch_size(model)
        self.texts = paths.class_texts()
        self._contexts: dict[str, torch.Tensor] = {}

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
            for batch in batches(self.jobs(plan, result, progress), self.batch_size):
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

    @torch.inference_mode()
    def generate(self, batch: Sequence[Job], steps: int | None = None) -> list[np.ndarray]:
        """The pictures of jobs that share their generated size and sampling, each HxWx3 uint8 at the original size.

        steps: DDIM steps, the preset's if None.
        """
        model, sampling = self.model, self.preset.sampling_for(batch[0].text)
        filled = list(batch) + [batch[-1]] * (self.batch_size - len(batch))
        height, width = batch[0].hint.shape
        hints = torch.from_numpy(np.stack([job.hint for job in filled])).to(model.device)
        hints = (hints.to(model.dtype) / 255)[:, None].expand(-1, 3, -1, -1)
        noise = torch.cat([initial_noise(job.copy_number, height, width) for job in filled])
        texts = torch.cat([self._context(self.preset.prompt_text(job.text)) for job in filled])
        negative = self._context(self.preset.negative_prompt).expand(len(filled), -1, -1)
        model.control_scales = sampling.control_scales(len(model.control_scales))
        try:
            latents, _ = DDIMSampler(model).sample(
                steps or sampling.steps,
                len(filled),
                tuple(noise.shape[1:]),
                {"c_concat": [hints], "c_crossattn": [texts]},
                eta=sampling.eta,
                unconditional_guidance_scale=sampling.guidance,
                unconditional_conditioning={
                    "c_concat": [hints] if sampling.unconditional_control else None,
                    "c_crossattn": [negative],
                },
                x_T=noise.to(model.device),
                verbose=False,
            )
            decoded = model.decode_first_stage(latents.to(model.dtype))[: len(batch)].float()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(filled)} pictures of {height} x {width} pixels don't fit on {model.device}: "
                "use a smaller --batch-size, or --precision bf16."
            ) from error
        if not decoded.isfinite().all():
            raise UserError(
                f"in {model.dtype} the model's pictures hold values that are no numbers: use --precision fp32."
            )
        pictures = (decoded * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [resize(picture, *job.original) for job, picture in zip(batch, pictures, strict=True)]

    def _context(self, text: str) -> torch.Tensor:
        """1 x 77 x D; each text is encoded once."""
        if text not in self._contexts:
            self._contexts[text] = self.model.get_learned_conditioning([text])
        return self._contexts[text]

    def _write_copy(self, job: Job, picture: np.ndarray, result: Result) -> None:
        copy = self.paths.copy(job.image, job.copy_number)
        try:
            _write(copy, lambda: write_atomically(copy, lambda file: save_copy(picture, file, job.greyscale)))
            result.copies_made += 1
        except OSError as error:
            result.failures.append(Failure(job.image, _reason(error, copy)))
            result.copies_failed += 1


def batches(jobs: Iterable[Job], batch_size: int) -> Iterator[list[Job]]:
    """Jobs of one generated size, and alike in having a text or none, in groups of batch_size; the rest at the end."""
    waiting: dict[tuple, list[Job]] = defaultdict(list)
    for job in jobs:
        group = waiting[job.hint.shape, bool(job.text)]
        group.append(job)
        if len(group) == batch_size:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


def initial_noise(copy_number: int, height: int, width: int) -> torch.Tensor:
    """The noise that copy number k of a picture of this generated size starts from: 1 x 4 x height/8 x width/8.

    Drawn on the CPU by a generator of its own, so that it is the same in every batch, process and device.
    """
    generator = torch.Generator().manual_seed(copy_number)
    return torch.randn((1, 4, height // 8, width // 8), generator=generator)


def save_copy(picture: np.ndarray, file: BinaryIO, greyscale: bool) -> None:
    """Write a copy (HxWx3 uint8) as a JPEG.  The copy of a greyscale image is greyscale: it stands in for its image."""
    image = Image.fromarray(picture)
    (image.convert("L") if greyscale else image).save(file, "JPEG", quality=JPEG_QUALITY)


def default_batch_size(model) -> int:
    """Copies to generate together, where nobody said: 8 on a GPU; on a CPU 1 with the full-size model, else 8."""
    if model is None or model.device.type != "cpu":
        return 8
    return 1 if sum(parameter.numel() for parameter in model.parameters()) > FULL_SIZE else 8


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
