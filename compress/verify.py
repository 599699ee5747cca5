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
from compress.overlap import Budget, map_ahead
from compress.plan import Part, Plan, Task
from compress.records import Records, State, read_mark
from compress.regenerate import MOST_PIXELS, reason
from utils.cli import nb_cores
from utils.data.images import image_bits, read_image
from utils.files import temporary_files

MISSING, UNREADABLE = "missing", "unreadable"
ENDS = {".jpg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}
"""The last bytes of a whole copy, by its ending: decoders take a tail of zeros for a picture."""


@dataclass(frozen=True)
class Fault:
    """A file that is not as it should be.

    what: "image", "copy", or the form's noun; why: MISSING, UNREADABLE, WRONG_SIZE or OTHERWISE.
    """

    path: Path
    what: str
    why: str
    details: str = ""

    def __str__(self):
        return f"{self.path}: {self.why}" + (f" ({self.details})" if self.details else "")


@dataclass
class Findings(Part):
    """What `verify` found, image by image.

    tasks: for each image what there is to make again; unmarked: copies without recorded settings, which are kept;
    half_written: temporary files of killed processes; orphans: files that belong to no train image.
    """

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
    findings = Findings()
    check = _Check(records, copy_numbers)
    threads = nb_cores()
    pool = ThreadPoolExecutor(threads)
    try:
        for task, faults, unmarked in map_ahead(pool, check, images, window=4 * threads):
            findings.tasks.append(task)
            findings.faults += faults
            findings.unmarked += unmarked
            findings.checked.update({"image": 1, records.form.noun: 1, "copy": len(copy_numbers)})
            progress(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return findings


def look_around(records: Records, labels: Iterable[str]) -> Findings:
    """Half-written files, and files of these classes that belong to no train image."""
    findings, labels = Findings(), list(labels)
    for mode in ("kept", "copies"):
        findings.half_written += temporary_files(records.paths.folder(mode))
        for label in labels:
            findings.half_written += temporary_files(records.paths.folder(mode) / label)
            findings.orphans += _orphans(records, mode, label)
        findings.orphans += _orphaned_folders(records, mode)
    return findings


class _Check:
    """Called with an image -> what to make again, the faults, the number of copies without a mark."""

    def __init__(self, records: Records, copy_numbers: Sequence[int]):
        self.records = records
        self.copy_numbers = copy_numbers
        self.states = {label: records.copies.state(label) for label in records.copies.texts}
        self.marks = {label: records.copies.marks(label) for label in records.copies.texts}
        self.pixels = Budget(MOST_PIXELS)

    def __call__(self, image: Path) -> tuple[Task, list[Fault], int]:
        try:
            width, height, _ = image_bits(image)
            with self.pixels.hold(width * height):
                kept, kept_fault = self._kept(image, pixels(image))
                bad_copies, unmarked = self._copies(image, (width, height))
        except OSError as error:
            fault = Fault(image, "image", UNREADABLE, reason(error, image))
            return Task(image, None, ()), [fault], 0  # a repair will try it, and list it
        bad = tuple(bad_copies)
        if kept_fault and kept_fault.why in (WRONG_SIZE, OTHERWISE):
            bad = tuple(self.copy_numbers)  # they came from this file
        faults = [kept_fault] if kept_fault else []
        faults += bad_copies.values()
        return Task(image, None if kept_fault else kept, bad), faults, unmarked

    def _kept(self, image: Path, picture: np.ndarray) -> tuple[Path | None, Fault | None]:
        path, form = self.records.paths.find_kept(image), self.records.form
        if path is None:
            return None, Fault(self.records.paths.kept(image), form.noun, MISSING)
        try:
            wrong = form.check(path.read_bytes(), picture)
        except OSError as error:
            return path, Fault(path, form.noun, UNREADABLE, reason(error, path))
        return path, Fault(path, form.noun, *wrong) if wrong else None

    def _copies(self, image: Path, size: tuple[int, int]) -> tuple[dict[int, Fault], int]:
        """Number of each bad copy -> what is wrong with it; and how many good ones have no mark."""
        label = image.parent.name
        state, wanted, unmarked = self.states[label], self.marks[label], 0
        faults: dict[int, Fault] = {}
        for k in self.copy_numbers:
            path = self.records.paths.copy(image, k)
            try:
                with path.open("rb") as file:
                    end = ENDS[path.suffix]
                    file.seek(max(0, os.fstat(file.fileno()).st_size - len(end)))
                    if file.read() != end:
                        raise OSError("the file is truncated")
                copy_size = read_image(path).size
            except FileNotFoundError:
                faults[k] = Fault(path, "copy", MISSING)
                continue
            except OSError as error:
                faults[k] = Fault(path, "copy", UNREADABLE, reason(error, path))
                continue
            mark = read_mark(path)
            if copy_size != size:
                sizes = "{} x {} instead of {} x {} pixels".format(*copy_size, *size)
                faults[k] = Fault(path, "copy", WRONG_SIZE, sizes)
            elif mark is None and state is not State.MIXED:
                unmarked += 1
            elif mark not in wanted:
                faults[k] = Fault(path, "copy", OTHERWISE, ", ".join(self.records.copies.differences(label)))
        return faults, unmarked


def _orphans(records: Records, mode: str, label: str) -> list[Path]:
    """Files of a class that belong to none of its train images."""
    folder, files = records.paths.folder(mode) / label, records.form.files
    if not folder.is_dir():
        return []
    stems = {records.paths.kept(image).stem for image in records.paths.images(label)}
    endings = "|".join(re.escape(ending) for ending in files.kept_endings)
    form = rf"(?s)(.+)_seed\d{{2,}}{re.escape(files.copy_ending)}" if mode == "copies" else rf"(?s)(.+)(?:{endings})"
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [folder / name for name in names if not (match := re.fullmatch(form, name)) or match[1] not in stems]


def _orphaned_folders(records: Records, mode: str) -> list[Path]:
    folder = records.paths.folder(mode)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    unknown = (folder / name for name in names if not name.startswith(".") and name not in records.copies.texts)
    return [path for path in unknown if path.is_dir()]
