"""What compress/run.py tells a person: what there is to do, how long it will take, and what was done."""

import io
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.forms import Form, Request
from compress.generators import Generator, group
from compress.plan import FileState, Plan, plural
from compress.regenerate import Regenerator, Result
from compress.verify import Findings
from ControlNet.ldm.schedule import ddim_timesteps
from utils.data.images import image_bits, read_image

MOST_MEASURED = 1000
"""Images whose generated sizes a plan looks up."""


def report_plan(todo: Plan, title: str) -> None:
    """Print what there is to do, and how many files are kept although their settings are not recorded."""
    print(f"{title}: {len(todo.tasks):,} images{generated_sizes(todo)}")
    unrecorded = []
    for noun, missing, files in (
        (plural(todo.records.form.noun), todo.kept_missing, todo.kept),
        ("copies", todo.copies_missing, todo.copies),
    ):
        otherwise = files[FileState.OTHERWISE]
        note = f"; {otherwise:,} of those to make are there, made otherwise" if otherwise else ""
        print(f"{noun}: {missing:,} to make, {files.total() - missing:,} there already{note}")
        if files[FileState.UNRECORDED]:
            unrecorded.append(f"{files[FileState.UNRECORDED]:,} {noun}")
    if unrecorded:
        print(
            f"{' and '.join(unrecorded)} without a record of how they were made are kept (--replace makes them again)"
        )


def generated_sizes(todo: Plan) -> str:
    """The smallest and the largest size at which copies are generated, height x width, of MOST_MEASURED images."""
    form, step = todo.records.form, -(-len(todo.tasks) // MOST_MEASURED)
    sizes = Counter[tuple[int, int]]()
    for task in todo.tasks[::step] if form.needs_model else ():
        with suppress(OSError):  # the run itself will list it
            width, height, _ = image_bits(task.image)
            sizes[form.preset.generated_size(height, width)] += 1
    if not sizes:
        return ""
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    text = f", generated at {smallest[0]} x {smallest[1]}"
    text += f" to {largest[0]} x {largest[1]} pixels" if len(sizes) > 1 else " pixels"
    short = sum(count for size, count in sizes.items() if min(size) < form.preset.small_shorter_side)
    of = f" of the {sizes.total():,} looked at" if step > 1 else ""
    limit = f"of {form.preset.max_pixels:,} pixels"
    return text + (f"; {short:,}{of} are so long that the limit {limit} makes them smaller" if short else "")


def report_findings(findings: Findings, noun: str) -> None:
    """Print what --verify found.  noun: of the form."""
    checked, faults = findings.checked, findings.faults
    print(f"checked: {checked[noun]:,} {plural(noun)} and {checked['copy']:,} copies of {checked['image']:,} images")
    for (what, why), count in Counter((fault.what, fault.why) for fault in faults).items():
        print(f"  {_count(count, what)} {why}")
    if findings.half_written:
        print(f"  {_count(len(findings.half_written), 'half-written file')} (the next run takes them away)")
    if findings.unmarked:
        print(f"  {_count(findings.unmarked, 'copy')} without a record of how they were made (kept)")
    if findings.is_well:
        print("nothing is wrong")
    else:
        _list("wrong:", [*map(str, faults), *map(str, findings.half_written)])
    if findings.orphans:
        _list(f"{_count(len(findings.orphans), 'file')} of no train image (kept):", list(map(str, findings.orphans)))


MOST_LISTED = 50
"""Lines of a list on the screen."""


def _list(title: str, lines: list[str]) -> None:
    more = [f"... and {len(lines) - MOST_LISTED:,} more"] if len(lines) > MOST_LISTED else []
    print(title, *lines[:MOST_LISTED], *more, sep="\n  ")


def _count(count: int, noun: str) -> str:
    """1 copy, 2,000 copies."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def report_estimate(regenerator: Regenerator, processes: int = 1) -> None:
    """Print what --dry-run tells: bytes, and the time of so many processes like this one."""
    if regenerator.generator:
        print("measuring one batch ...", flush=True)
    expected = estimate(regenerator)
    if math.isnan(expected.kept_bytes + expected.copy_bytes + expected.seconds):
        print("expected: unknown, none of the sampled images could be read")
        return
    seconds = f", about {duration(expected.seconds / processes)} for the copies" if regenerator.generator else ""
    seconds += f" in {processes} processes" if seconds and processes > 1 else ""
    kept = f"{size(expected.kept_bytes)} of {plural(regenerator.form.noun)}"
    print(f"expected: {kept}, {size(expected.copy_bytes)} of copies{seconds}\ndry run: nothing was written")


def report(result: Result, noun: str, empty: list[Path], seconds: float) -> None:
    """Print what a run did.  noun: of the form."""
    speed = f" ({result.copies_made / seconds:.3g} copies/s)" if result.copies_made else ""
    recoded = f" ({result.kept_recoded:,} of them recoded)" if result.kept_recoded else ""
    print(
        f"{plural(noun)}: {result.kept_made:,} made, {result.kept_skipped:,} skipped{recoded}, "
        f"{result.kept_failed:,} failed\n"
        f"copies: {result.copies_made:,} made, {result.copies_skipped:,} skipped, {result.copies_failed:,} failed"
        f" in {duration(seconds)}{speed}"
    )
    if result.image_bytes:
        print(
            f"on disk: images {size(result.image_bytes)}, {plural(noun)} and class texts {size(result.kept_bytes)} "
            f"({ratio(result.kept_bytes, result.image_bytes)})"
        )
    if result.raw_bits:
        print(
            f"raw bits: images {result.image_bits:,}, {plural(noun)} {result.raw_bits:,} "
            f"({ratio(result.raw_bits, result.image_bits)})"
        )
    if problems := [*(f"{folder}: no images" for folder in empty), *dict.fromkeys(map(str, result.failures))]:
        _list("failed:", problems)


def size(count: float) -> str:
    """Bytes for a person: 1,234 -> "1.2 kB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    unit = "kB"
    for larger in ("MB", "GB", "TB"):
        if count < 1e6:
            break
        count, unit = count / 1000, larger
    return f"{count / 1000:.1f} {unit}"


def ratio(part: float, whole: float) -> str:
    """part / whole: "1/24.0", or "2.67 times" where it is more than 1; "none" of nothing."""
    if not part:
        return "none"
    return f"1/{whole / part:.1f}" if part <= whole else f"{part / whole:.2f} times"


def duration(seconds: float) -> str:
    """Seconds for a person: "1:02:03" or "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{seconds:02d}"


SAMPLE = 64
"""Images looked at."""


class Estimate(NamedTuple):
    """What the missing files will take: bytes, and seconds of one process, 0 without a generator.  NaN where no image
    can be read."""

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

    def made(steps: int) -> int:
        """The steps that the sampler makes: DDIM may make more than it is asked for."""
        return len(ddim_timesteps(steps)) if sampling.sampler == "ddim" else steps

    # A whole cycle of steps that reuse features, or one step; then at least four steps more.
    few = sampling.reuse_every
    more = few * (1 + -(-4 // few))
    if more >= sampling.steps:
        whole = seconds(sampling.steps)
    else:
        first = seconds(few)
        each = max(seconds(more) - first, 0) / (made(more) - made(few))
        whole = first + each * (made(sampling.steps) - made(few))
    return whole / generator.batch_size * _mean(areas) / math.prod(typical.condition.size)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
