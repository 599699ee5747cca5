"""How long a run will take, and how much it will write: `compress/run.py --dry-run`."""

import io
import math
import time
from dataclasses import dataclass

import numpy as np

from compress import prompt as prompts
from compress.generate import Job
from compress.plan import Plan
from compress.regenerate import Regenerator, save_copy
from ControlNet.ldm.schedule import ddim_timesteps
from utils.data.images import image_bits, read_image

SAMPLE = 64
"""Images looked at."""


@dataclass(frozen=True)
class Estimate:
    """What the missing edge maps and copies will take: bytes on disk, and seconds (NaN where no image can be read)."""

    edge_map_bytes: float
    copy_bytes: float
    seconds: float


def estimate(regenerator: Regenerator, plan: Plan) -> Estimate:
    """Look at a sample of the images, and time one batch at two numbers of steps.  Writes nothing.

    A copy is taken to be as large as its image would be, saved as copies are.
    """
    tasks = [task for task in plan.tasks if task.edge_map is None or task.copy_numbers]
    tasks = [tasks[i] for i in np.unique(np.linspace(0, len(tasks) - 1, min(SAMPLE, len(tasks)), dtype=int))]
    edge_map_bytes, copy_bytes, jobs, quality = [], [], [], regenerator.preset.quality
    for task in tasks:
        try:
            prompt = regenerator.prompt(task)
            image = np.asarray(read_image(task.image))
            greyscale = image_bits(task.image)[2] != 24
            jobs += regenerator.jobs_of(task, prompt)
        except OSError:
            continue  # the run itself will list it
        edge_map_bytes.append(_size(lambda file, prompt=prompt: prompts.write(prompt, file)))
        copy_bytes.append(_size(lambda file, image=image, grey=greyscale: save_copy(image, file, grey, quality)))
    return Estimate(
        plan.edge_maps_missing * _mean(edge_map_bytes) if plan.edge_maps_missing else 0.0,
        plan.copies_missing * _mean(copy_bytes) if plan.copies_missing else 0.0,
        plan.copies_missing * _seconds_per_copy(regenerator, jobs) if plan.copies_missing else 0.0,
    )


def _seconds_per_copy(regenerator: Regenerator, jobs: list[Job]) -> float:
    """The time of one copy on average; it grows with the generated area, which differs between images."""
    if not jobs:
        return math.nan
    areas = [job.hint.size for job in jobs]
    typical = jobs[areas.index(sorted(areas)[len(areas) // 2])]
    alike = [job for job in jobs if job.hint.shape == typical.hint.shape and bool(job.text) == bool(typical.text)]
    # The first time loads kernels, encodes texts, and finds out how many fit the device.
    regenerator.generate(alike[: regenerator.generate.batch_size], steps=1)
    batch = alike[: regenerator.generate.batch_size]

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        regenerator.generate(batch, steps=steps)
        return time.perf_counter() - start

    once, five = seconds(1), seconds(5)
    steps = len(ddim_timesteps(regenerator.preset.sampling_for(typical.text).steps))
    whole = once + max(five - once, 0) / 4 * (steps - 1)
    return whole / regenerator.generate.batch_size * _mean(areas) / typical.hint.size


def _size(write) -> int:
    file = io.BytesIO()
    write(file)
    return file.tell()


def _mean(values) -> float:
    return float(np.mean(values)) if values else math.nan
