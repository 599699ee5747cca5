"""How long a run will take, and how much it will write: `compress/run.py --dry-run`."""

import io
import math
import time
from dataclasses import dataclass, replace

import numpy as np

from compress.forms import Form, Request
from compress.generators import Generator, group
from compress.presets import Sampling
from compress.regenerate import Regenerator
from ControlNet.ldm.schedule import ddim_timesteps
from utils.data.images import image_bits, read_image

SAMPLE = 64
"""Images looked at."""


@dataclass(frozen=True)
class Estimate:
    """What the missing files will take: bytes on disk, and seconds of one process, 0 without a generator.  NaN where no
    image can be read."""

    kept_bytes: float
    copy_bytes: float
    seconds: float


def estimate(regenerator: Regenerator) -> Estimate:
    """Look at a sample of the images, and time one batch, at two numbers of steps if it has many.  Writes nothing.

    A copy is taken to be as large as its image would be, saved as copies are.
    """
    form, plan = regenerator.form, regenerator.plan
    tasks = [task for task in plan.tasks if not task.is_done]
    tasks = [tasks[i] for i in np.unique(np.linspace(0, len(tasks) - 1, min(SAMPLE, len(tasks)), dtype=int))]
    kept_bytes, copy_bytes, requests = [], [], []
    for task in tasks:
        try:
            if task.kept is None:
                kept = form.stand_in(task.image, regenerator.text(task.image))
            else:
                kept = regenerator.kept(task)
            image = np.asarray(read_image(task.image))
            file, greyscale = io.BytesIO(), image_bits(task.image)[2] != 24
            requests += regenerator.requests(replace(task, copy_numbers=task.copy_numbers or (0,)), kept)
        except OSError:
            continue  # the run itself will list it
        form.save_copy(image, file, greyscale)
        kept_bytes.append(len(kept))
        copy_bytes.append(file.tell())
    walks = plan.copies_missing + plan.kept_missing * form.encoded_by_generator  # encoding takes as long as a copy
    return Estimate(
        plan.kept_missing * _mean(kept_bytes) if plan.kept_missing else 0.0,
        plan.copies_missing * _mean(copy_bytes) if plan.copies_missing else 0.0,
        walks * seconds_per_copy(form, regenerator.generator, requests) if regenerator.generator else 0.0,
    )


def seconds_per_copy(form: Form, generator: Generator, requests: list[Request]) -> float:
    """The time of one copy on average; it grows with the generated area, which differs between images."""
    if not requests:
        return math.nan
    areas = [math.prod(request.condition.size) for request in requests]
    typical = requests[areas.index(sorted(areas)[len(areas) // 2])]
    alike = [request for request in requests if group(request) == group(typical)]
    # The first time loads kernels, encodes texts, and finds out how many fit the device.
    generator(alike[: generator.batch_size], steps=1)
    batch = alike[: generator.batch_size]

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        generator(batch, steps=steps)
        return time.perf_counter() - start

    sampling = form.preset.sampling_for(typical.text)
    # A whole cycle of steps that reuse features, or one step; then at least four steps more.
    few = sampling.reuse_every
    more = few * (1 + -(-4 // few))
    if more >= sampling.steps:
        whole = seconds(sampling.steps)
    else:
        first = seconds(few)
        each = max(seconds(more) - first, 0) / (_steps(sampling, more) - _steps(sampling, few))
        whole = first + each * (_steps(sampling, sampling.steps) - _steps(sampling, few))
    return whole / generator.batch_size * _mean(areas) / math.prod(typical.condition.size)


def _steps(sampling: Sampling, asked: int) -> int:
    """The steps that a sampler makes: DDIM may make more than it is asked for."""
    return len(ddim_timesteps(asked)) if sampling.sampler == "ddim" else asked


def _mean(values) -> float:
    return float(np.mean(values)) if values else math.nan
