"""What compress/run.py tells a person: what there is to do, what was done, and figures that can be read."""

import math
from collections import Counter
from pathlib import Path

from compress.estimate import estimate
from compress.forms import plural
from compress.plan import FileState, Plan
from compress.regenerate import Regenerator, Result
from compress.verify import Findings
from utils.data.images import image_bits

UNRECORDED = FileState.UNRECORDED

MOST_MEASURED = 1000
"""Images whose generated sizes a plan looks up."""


def report_plan(todo: Plan, title: str) -> None:
    """Print what there is to do, and how many files are kept although their settings are not recorded."""
    noun = plural(todo.records.form.noun)
    print(
        f"{title}: {len(todo.tasks):,} images{generated_sizes(todo)}\n"
        f"{noun}: {todo.kept_missing:,} to make, {todo.kept_present:,} there already"
        f"{_otherwise(todo.kept)}\n"
        f"copies: {todo.copies_missing:,} to make, {todo.copies_present:,} there already"
        f"{_otherwise(todo.copies)}"
    )
    states = ((todo.kept[UNRECORDED], noun), (todo.copies[UNRECORDED], "copies"))
    unrecorded = [f"{count:,} {what}" for count, what in states if count]
    if unrecorded:
        print(
            f"{' and '.join(unrecorded)} without a record of how they were made are kept (--replace makes them again)"
        )


def generated_sizes(todo: Plan) -> str:
    """The smallest and the largest size at which copies are generated, height x width, of MOST_MEASURED images."""
    form, step = todo.records.form, -(-len(todo.tasks) // MOST_MEASURED)
    sizes, short = Counter[tuple[int, int]](), 0
    for task in todo.tasks[::step] if form.needs_model else ():
        try:
            width, height, _ = image_bits(task.image)
        except OSError:
            continue  # the run itself will list it
        size = form.preset.generated_size(height, width)
        short += min(size) < form.preset.small_shorter_side
        sizes[size] += 1
    if not sizes:
        return ""
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    text = f", generated at {smallest[0]} x {smallest[1]}"
    text += f" to {largest[0]} x {largest[1]} pixels" if len(sizes) > 1 else " pixels"
    of = f" of the {sizes.total():,} looked at" if step > 1 else ""
    limit = f"of {form.preset.max_pixels:,} pixels"
    return text + (f"; {short:,}{of} are so long that the limit {limit} makes them smaller" if short else "")


def _otherwise(files: Counter[FileState]) -> str:
    count = files[FileState.OTHERWISE]
    return f"; {count:,} of those to make are there, made otherwise" if count else ""


def report_findings(findings: Findings, noun: str) -> None:
    """Print what --verify found.  noun: of the form."""
    checked, faults = findings.checked, findings.faults
    print(f"checked: {checked[noun]:,} {plural(noun)} and {checked['copy']:,} copies of {checked['image']:,} images")
    kinds = Counter((fault.what, fault.why) for fault in faults)
    for (what, why), count in kinds.items():
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
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


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
