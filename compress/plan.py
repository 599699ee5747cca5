"""What a run of compress/run.py has to do: what is asked for, compared with what is on disk."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Self

from compress.forms import pixels, plural
from compress.records import MadeOtherwise, Record, Records, State, read_mark
from utils.data.images import image_bits
from utils.devices import Fabric, by_all, own_part

READERS = 16
"""Threads that look at many small files: most of the time is spent waiting for the disk or the network."""


class FileState(Enum):
    """What is known of a file that a run is to make."""

    MISSING = "not there"
    GOOD = "made with these settings"
    OTHERWISE = "made with other settings"
    UNRECORDED = "settings not recorded: kept unless --replace"


TO_MAKE = (FileState.MISSING, FileState.OTHERWISE)


@dataclass(frozen=True)
class Task:
    """A train image, its kept file on disk (None: to be made), and the numbers of the copies that are to be made."""

    image: Path
    kept: Path | None
    copy_numbers: tuple[int, ...]

    @property
    def is_done(self) -> bool:
        return self.kept is not None and not self.copy_numbers


@dataclass(frozen=True)
class Plan:
    """What a run has to do: a task for every image asked for, also where nothing is missing.

    kept, copies: numbers of files that were in each state when the plan was made.
    """

    records: Records
    tasks: tuple[Task, ...]
    copies_per_image: int
    kept: Counter[FileState]
    copies: Counter[FileState]

    @property
    def kept_missing(self) -> int:
        return sum(task.kept is None for task in self.tasks)

    @property
    def kept_present(self) -> int:
        return len(self.tasks) - self.kept_missing

    @property
    def copies_missing(self) -> int:
        return sum(len(task.copy_numbers) for task in self.tasks)

    @property
    def copies_present(self) -> int:
        return len(self.tasks) * self.copies_per_image - self.copies_missing

    @property
    def needs_generator(self) -> bool:
        """Whether what is missing takes the form's generator, or a model to encode, which is freed with it."""
        encodes = self.kept_missing > 0 and self.records.form.needs_weights
        return encodes or self.copies_missing > 0


@dataclass
class Part:
    """What is known of a part of the images; each field adds up over the parts."""

    def join(self, other: Self) -> None:
        """Count another part in."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass
class Survey(Part):
    """A part of the images asked for, compared with what is on disk.

    tasks: one for each image; kept, copies: numbers of files in each state; kept_conflicts, copies_conflicts: the
    labels of classes with files of other settings; classes: number of classes.
    """

    tasks: list[Task] = field(default_factory=list)
    kept: Counter[FileState] = field(default_factory=Counter)
    copies: Counter[FileState] = field(default_factory=Counter)
    kept_conflicts: list[str] = field(default_factory=list)
    copies_conflicts: list[str] = field(default_factory=list)
    classes: int = 0


def plan(
    records: Records,
    images: Sequence[Path],
    copy_numbers: Sequence[int],
    existing: str = "refuse",
    fabric: Fabric | None = None,
) -> Plan:
    """Compare what is asked for with what is on disk.

    existing: "refuse" files of other settings; "replace": these, and those whose settings are not recorded, are to be
    made again; "overwrite": all files are; fabric: the processes, each of which looks at its part of the classes.
    Raises MadeOtherwise where files of these classes were made with other settings, and are refused.
    """
    if fabric is None:
        surveyed = survey(records, images, copy_numbers, existing)
    else:
        labels = set(own_part(fabric, list(dict.fromkeys(image.parent.name for image in images))))
        own, surveyed = [image for image in images if image.parent.name in labels], Survey()
        for part in by_all(fabric, lambda: survey(records, own, copy_numbers, existing)):
            surveyed.join(part)
    if surveyed.kept_conflicts or surveyed.copies_conflicts:
        raise MadeOtherwise(_conflicts_in_words(records, surveyed))
    tasks = {task.image: task for task in surveyed.tasks}
    return Plan(records, tuple(map(tasks.__getitem__, images)), len(copy_numbers), surveyed.kept, surveyed.copies)


def survey(records: Records, images: Iterable[Path], copy_numbers: Sequence[int], existing: str) -> Survey:
    """Compare these images' files on disk with the settings, class by class; arguments as `plan` has them."""
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name].append(image)
    surveyed = Survey(classes=len(by_label))
    with ThreadPoolExecutor(READERS) as pool:
        for label, class_images in by_label.items():
            kept: dict[Path, tuple[Path, FileState]] = {}
            copies: dict[str, FileState] = {}
            if existing != "overwrite":
                kept = _kept_states(records, label, class_images, existing, pool)
                copies = _copy_states(records, label, class_images, copy_numbers, existing, pool)
            if existing == "refuse":
                if _conflicts(records.kept, label, (state for _, state in kept.values())):
                    surveyed.kept_conflicts.append(label)
                if _conflicts(records.copies, label, copies.values()):
                    surveyed.copies_conflicts.append(label)
            for image in class_images:
                file, state = kept.get(image, (None, FileState.MISSING))
                names = {k: records.paths.copy_name(image, k) for k in copy_numbers}
                states = {k: copies.get(name, FileState.MISSING) for k, name in names.items()}
                surveyed.kept[state] += 1
                surveyed.copies.update(states.values())
                to_make = tuple(k for k in copy_numbers if states[k] in TO_MAKE)
                surveyed.tasks.append(Task(image, None if state in TO_MAKE else file, to_make))
    return surveyed


def _conflicts(record: Record, label: str, states: Iterable[FileState]) -> bool:
    """Whether files of other settings are there that nobody has decided to make again."""
    return record.state(label) is not State.MIXED and FileState.OTHERWISE in states


def _kept_states(
    records: Records, label: str, images: Sequence[Path], existing: str, pool: ThreadPoolExecutor
) -> dict[Path, tuple[Path, FileState]]:
    """Image -> its kept file, where it is on disk, and what is known of it."""
    names = _names(records.paths.folder("kept") / label)
    files = {image: file for image in images if (file := records.paths.find_kept(image, names)) is not None}
    state = records.kept.state(label)
    if state is State.NEW:
        unrecorded = FileState.OTHERWISE if existing == "replace" else FileState.UNRECORDED
        return {image: (file, unrecorded) for image, file in files.items()}
    if existing == "refuse" and state is not State.MIXED:
        recorded = FileState.GOOD if state is State.SAME else FileState.OTHERWISE
        return {image: (file, recorded) for image, file in files.items()}

    def judge(image: Path) -> FileState:
        of_published_scripts = existing == "replace" and files[image].suffix == ".bmp"
        fits = not of_published_scripts and _fits(records, label, image, files[image])
        return FileState.GOOD if fits else FileState.OTHERWISE

    return {image: (files[image], state) for image, state in zip(files, pool.map(judge, files), strict=True)}


def _fits(records: Records, label: str, image: Path, kept: Path) -> bool:
    """Whether a kept file is what the settings make of its image.

    False too where it can't be read; True where the image can't, which the run itself will report.
    """
    form = records.form
    try:
        width, height, _ = image_bits(image)
        by_size = form.fits_by_size(kept, (height, width), records.kept.kinds(label))
        if by_size is not None:
            return by_size
        picture = pixels(image)
    except OSError as error:
        return not str(error).startswith(f"{kept}: ")
    try:
        return form.check(kept.read_bytes(), picture) is None
    except OSError:
        return False


def _copy_states(
    records: Records, label: str, images: Sequence[Path], copy_numbers: Sequence[int], existing: str,
    pool: ThreadPoolExecutor,
) -> dict[str, FileState]:  # fmt: skip
    """File name -> what is known of it, of a class's copies on disk, at least of those asked for."""
    folder, ending = records.paths.copies_folder(label), records.form.files.copy_ending
    on_disk = {name for name in _names(folder) if name.endswith(ending)}
    state, marks = records.copies.state(label), records.copies.marks(label)
    if existing == "refuse" and state in (State.SAME, State.OTHER):  # no need to look at any
        return dict.fromkeys(on_disk, FileState.GOOD if state is State.SAME else FileState.OTHERWISE)
    unmarked = FileState.UNRECORDED if existing == "refuse" and state is State.NEW else FileState.OTHERWISE
    names = [name for image in images for k in copy_numbers if (name := records.paths.copy_name(image, k)) in on_disk]
    states = {}
    for name, mark in zip(names, pool.map(read_mark, map(folder.joinpath, names)), strict=True):
        if mark is None:
            states[name] = unmarked
        else:
            states[name] = FileState.GOOD if mark in marks else FileState.OTHERWISE
    return states


def _names(folder: Path) -> frozenset[str]:
    """What a folder holds: one listing instead of one question a file."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _conflicts_in_words(records: Records, surveyed: Survey) -> str:
    """The message for files of other settings."""
    kept, copies = surveyed.kept_conflicts, surveyed.copies_conflicts
    nouns = ([plural(records.form.noun)] if kept else []) + (["copies"] if copies else [])
    differences = [difference for label in kept for difference in records.kept.differences(label)]
    differences += [difference for label in copies for difference in records.copies.differences(label)]
    differences = list(dict.fromkeys(differences))
    listed = ", ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
    count = len({*kept, *copies})
    where = f"in {count} of {surveyed.classes} classes" if count < surveyed.classes else "there"
    return (
        f"{' and '.join(nouns)} {where} were made with other settings: {listed or 'of which no record is left'} "
        f"({records.paths.root})"
    )
