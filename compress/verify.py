"""Reading every kept file and copy: `compress/run.py --verify`, and what `--repair` has to make again."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from compress.forms import OTHERWISE, WRONG_SIZE, pixels
from compress.plan import Plan, Task
from compress.records import Records, State, names_in, read_mark
from compress.regenerate import MOST_PIXELS, Budget, Part, map_ahead, reason
from utils.cli import nb_cores
from utils.data.images import image_bits, read_image
from utils.files import temporary_files

MISSING, UNREADABLE = "missing", "unreadable"
ENDS = {".jpg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}
"""The last bytes of a whole copy, by its ending: decoders take a tail of zeros for a picture."""


@dataclass(frozen=True)
class Fault:
    """A file that is not as it should be.  what: "image", "copy", or the form's noun; why: MISSING, UNREADABLE,
    WRONG_SIZE or OTHERWISE."""

    path: Path
    what: str
    why: str
    details: str = ""

    def __str__(self):
        return f"{self.path}: {self.why}" + (f" ({self.details})" if self.details else "")


@dataclass
class Findings(Part):
    """tasks: for each image what there is to make again; unmarked: copies without recorded settings, which are kept;
    half_written: temporary files of killed processes; orphans: files that belong to no train image."""

    tasks: list[Task] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    checked: Counter = field(default_factory=Counter)
    unmarked: int = 0
    half_written: list[Path] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not self.faults and not self.half_written

    def repairs(self, todo: Plan) -> Plan:
        """That plan, and what was found to make again beside it."""
        to_repair = {task.image: task for task in self.tasks}
        tasks = []
        for task in todo.tasks:
            bad = to_repair.get(task.image, task)
            numbers = tuple(sorted({*task.copy_numbers, *bad.copy_numbers}))
            tasks.append(Task(task.image, task.kept and bad.kept, numbers))
        return replace(todo, tasks=tuple(tasks))


def verify(
    records: Records,
    images: Iterable[Path],
    copy_numbers: Sequence[int],
    progress: Callable[[int], object] = lambda images: None,
) -> Findings:
    """Read the kept files and copies of these images, whole, and compare them with their image and the settings.

    progress: called with the number of images just finished.
    """
    findings, threads = Findings(), nb_cores()
    pool = ThreadPoolExecutor(threads)
    try:
        for each in map_ahead(pool, _Check(records, copy_numbers), images, window=4 * threads):
            findings.join(each)
            progress(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return findings


class _Check:
    """Called with an image -> its findings."""

    def __init__(self, records: Records, copy_numbers: Sequence[int]):
        self.records = records
        self.copy_numbers = copy_numbers
        self.states = {label: records.copies.state(label) for label in records.copies.texts}
        self.marks = {label: records.copies.marks(label) for label in records.copies.texts}
        self.pixels = Budget(MOST_PIXELS)

    def __call__(self, image: Path) -> Findings:
        findings = Findings()
        findings.checked.update({"image": 1, self.records.form.noun: 1, "copy": len(self.copy_numbers)})
        try:
            width, height, _ = image_bits(image)
            with self.pixels.hold(width * height):
                kept, fault = self._kept(image, pixels(image))
                bad = [k for k in self.copy_numbers if not self._is_good(image, k, (width, height), findings)]
        except OSError as error:
            findings = Findings(checked=findings.checked)
            findings.faults.append(Fault(image, "image", UNREADABLE, reason(error, image)))
            findings.tasks.append(Task(image, None, ()))  # a repair will try it, and list it
            return findings
        if fault:
            findings.faults.insert(0, fault)
            if fault.why in (WRONG_SIZE, OTHERWISE):
                bad = list(self.copy_numbers)  # they came from this file
        findings.tasks.append(Task(image, None if fault else kept, tuple(bad)))
        return findings

    def _kept(self, image: Path, picture: np.ndarray) -> tuple[Path | None, Fault | None]:
        path, form = self.records.paths.find_kept(image), self.records.form
        if path is None:
            return None, Fault(self.records.paths.kept(image), form.noun, MISSING)
        try:
            wrong = form.check(path.read_bytes(), picture)
        except OSError as error:
            return path, Fault(path, form.noun, UNREADABLE, reason(error, path))
        return path, Fault(path, form.noun, *wrong) if wrong else None

    def _is_good(self, image: Path, k: int, size: tuple[int, int], findings: Findings) -> bool:
        """Whether a copy is as its image of that (width, height) and the settings ask; adds what is known of it."""
        path, label = self.records.paths.copy(image, k), image.parent.name
        fault = None
        try:
            with path.open("rb") as file:
                end = ENDS[path.suffix]
                file.seek(max(0, os.fstat(file.fileno()).st_size - len(end)))
                if file.read() != end:
                    raise OSError("the file is truncated")
            width, height = read_image(path).size
            mark = read_mark(path)
            if (width, height) != size:
                sizes = f"{width} x {height} instead of {size[0]} x {size[1]} pixels"
                fault = Fault(path, "copy", WRONG_SIZE, sizes)
            elif mark is None and self.states[label] is not State.MIXED:
                findings.unmarked += 1
            elif mark not in self.marks[label]:
                fault = Fault(path, "copy", OTHERWISE, ", ".join(self.records.copies.differences(label)))
        except FileNotFoundError:
            fault = Fault(path, "copy", MISSING)
        except OSError as error:
            fault = Fault(path, "copy", UNREADABLE, reason(error, path))
        findings.faults += [fault] if fault else []
        return fault is None


def look_around(records: Records, labels: Iterable[str]) -> Findings:
    """Half-written files, and files of these classes that belong to no train image."""
    findings, labels, files = Findings(), list(labels), records.form.files
    endings = "|".join(map(re.escape, files.kept_endings))
    patterns = {"kept": rf"(?s)(.+)(?:{endings})", "copies": rf"(?s)(.+)_seed\d{{2,}}{re.escape(files.copy_ending)}"}
    for mode, pattern in patterns.items():
        folder = records.paths.folder(mode)
        findings.half_written += temporary_files(folder)
        for label in labels:
            findings.half_written += temporary_files(folder / label)
            stems = {records.paths.kept(image).stem for image in records.paths.images(label)}
            for name in names_in(folder / label):
                match = re.fullmatch(pattern, name)
                if not name.startswith(".") and (match is None or match[1] not in stems):
                    findings.orphans.append(folder / label / name)
        unknown = [folder / name for name in names_in(folder) if name not in records.copies.texts]
        findings.orphans += [path for path in unknown if path.is_dir() and not path.name.startswith(".")]
    return findings
