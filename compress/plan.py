"""What a run of compress/run.py has to do: what is asked for, compared with what is on disk."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from compress.forms import pixels, plural
from compress.records import MadeOtherwise, Records, State, read_mark
from utils.data.images import image_bits

READERS = 16
"""Threads that look at many small files: most of the time is spent waiting for the disk or the network."""


class Found(Enum):
    """What is known of a file that is asked for."""

    MISSING = "not there"
    GOOD = "made with these settings"
    OTHERWISE = "made with other settings"
    UNKNOWN = "settings not recorded: kept unless --replace"


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

    copies_otherwise, kept_otherwise: of those to be made, the ones that are there, made with other settings;
    copies_without_record, kept_without_record: files that are kept although their settings are not recorded.
    """

    records: Records
    tasks: tuple[Task, ...]
    copies_per_image: int
    copies_otherwise: int = 0
    kept_otherwise: int = 0
    copies_without_record: int = 0
    kept_without_record: int = 0

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
    def needs_generator(self) -> bool:
        """Whether what is missing takes the form's generator, or a model to encode, which is freed with it."""
        encodes = self.kept_missing > 0 and self.records.form.needs_weights
        return encodes or self.copies_missing > 0

    @property
    def copies_present(self) -> int:
        return len(self.tasks) * self.copies_per_image - self.copies_missing


@dataclass
class Survey:
    """A part of the images asked for, compared with what is on disk.

    tasks: by image; counts: of ("kept" or "copy", Found); conflicts: for "kept" and "copies", the labels of classes
    with files of other settings; classes: number of classes.
    """

    tasks: dict[Path, Task] = field(default_factory=dict)
    counts: Counter[tuple[str, Found]] = field(default_factory=Counter)
    conflicts: dict[str, list[str]] = field(default_factory=lambda: {"kept": [], "copies": []})
    classes: int = 0

    def add(self, other: "Survey") -> None:
        """Join another part."""
        self.tasks |= other.tasks
        self.counts += other.counts
        self.conflicts = {what: labels + other.conflicts[what] for what, labels in self.conflicts.items()}
        self.classes += other.classes


def plan(
    records: Records,
    images: Iterable[Path],
    copy_numbers: Sequence[int],
    *,
    replaced: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Compare what is asked for with what is on disk.

    replaced: files of other settings, or of none that are recorded, are to be made again; overwrite: all files are.
    Raises MadeOtherwise where files of these classes were made with other settings, unless either is given.
    """
    images = list(images)
    found = survey(records, images, copy_numbers, replaced=replaced, overwrite=overwrite)
    return to_plan(records, images, copy_numbers, found)


def to_plan(records: Records, images: Sequence[Path], copy_numbers: Sequence[int], found: Survey) -> Plan:
    """The plan for images that have been surveyed.  Raises MadeOtherwise as `plan` does."""
    if any(found.conflicts.values()):
        raise MadeOtherwise(_in_words(records, found.conflicts, found.classes))
    return Plan(
        records,
        tuple(found.tasks[image] for image in images),
        len(copy_numbers),
        copies_otherwise=found.counts["copy", Found.OTHERWISE],
        kept_otherwise=found.counts["kept", Found.OTHERWISE],
        copies_without_record=found.counts["copy", Found.UNKNOWN],
        kept_without_record=found.counts["kept", Found.UNKNOWN],
    )


def survey(
    records: Records,
    images: Iterable[Path],
    copy_numbers: Sequence[int],
    *,
    replaced: bool = False,
    overwrite: bool = False,
) -> Survey:
    """Compare these images' files on disk with the settings, class by class; arguments as `plan` has them."""
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name].append(image)
    whole = Survey(classes=len(by_label))
    with ThreadPoolExecutor(READERS) as pool:
        for label, of_class in by_label.items():
            kept, copies = {}, {}
            if not overwrite:
                kept = _kept(records, label, of_class, replaced, pool.map)
                copies = _copies(records, label, of_class, copy_numbers, replaced, pool.map)
            for what, record, found in (
                ("kept", records.kept, [kind for _, kind in kept.values()]),
                ("copies", records.copies, copies.values()),
            ):
                if not replaced and record.state(label) is not State.MIXED and Found.OTHERWISE in found:
                    whole.conflicts[what].append(label)
            for image in of_class:
                file, kind = kept.get(image, (None, Found.MISSING))
                found = {k: copies.get(records.paths.copy_name(image, k), Found.MISSING) for k in copy_numbers}
                whole.counts.update([("kept", kind), *(("copy", kind) for kind in found.values())])
                whole.tasks[image] = Task(
                    image,
                    file if kind in (Found.GOOD, Found.UNKNOWN) else None,
                    tuple(k for k in copy_numbers if found[k] in (Found.MISSING, Found.OTHERWISE)),
                )
    return whole


def _kept(
    records: Records, label: str, images: Sequence[Path], replaced: bool, each: Callable[..., Iterable]
) -> dict[Path, tuple[Path | None, Found]]:
    """Image -> its kept file on disk, and what is known of it.  each: a `map` that may run in threads."""
    state = records.kept.state(label)
    names = _names(records.paths.folder("kept") / label)
    at_once = None  # what holds for all of them, without a look at any
    if state is State.NEW:
        at_once = Found.OTHERWISE if replaced else Found.UNKNOWN
    elif not replaced and state is not State.MIXED:
        at_once = Found.GOOD if state is State.SAME else Found.OTHERWISE

    def judge(image: Path) -> tuple[Path | None, Found]:
        kept = records.paths.find_kept(image, names)
        if kept is None:
            return None, Found.MISSING
        if at_once is not None:
            return kept, at_once
        if replaced and kept.suffix == ".bmp":  # of the published scripts
            return kept, Found.OTHERWISE
        return kept, Found.GOOD if _fits(records, label, image, kept) else Found.OTHERWISE

    return dict(zip(images, (map if at_once else each)(judge, images), strict=True))


def _fits(records: Records, label: str, image: Path, kept: Path) -> bool:
    """Whether a kept file is what the settings make of its image.

    False too where it can't be read; True where the image can't, which the run itself will report.
    """
    form = records.form
    try:
        width, height, _ = image_bits(image)
        by_size = form.fits_by_size(kept, (height, width), records.kept.kinds(label))
        picture = pixels(image) if by_size is None else None
    except OSError as error:
        return not str(error).startswith(f"{kept}: ")
    try:
        return by_size if picture is None else form.check(kept.read_bytes(), picture) is None
    except OSError:
        return False


def _copies(
    records: Records,
    label: str,
    images: Sequence[Path],
    copy_numbers: Sequence[int],
    replaced: bool,
    each: Callable[..., Iterable],
) -> dict[str, Found]:
    """File name -> what is known of it, of a class's copies on disk, at least of those asked for."""
    folder = records.paths.copies_folder(label)
    ending = records.form.files.copy_ending
    on_disk = dict.fromkeys((name for name in _names(folder) if name.endswith(ending)), Found.GOOD)
    state, marks = records.copies.state(label), records.copies.marks(label)
    if state is State.SAME and not replaced:
        return on_disk
    if state is State.OTHER and not replaced:
        return dict.fromkeys(on_disk, Found.OTHERWISE)
    if not marks:
        return dict.fromkeys(on_disk, Found.UNKNOWN)
    asked = [name for image in images for k in copy_numbers if (name := records.paths.copy_name(image, k)) in on_disk]
    unmarked = Found.UNKNOWN if state is State.NEW and not replaced else Found.OTHERWISE
    return {
        name: Found.GOOD if found in marks else unmarked if found is None else Found.OTHERWISE
        for name, found in zip(asked, each(read_mark, map(folder.joinpath, asked)), strict=True)
    }


def _names(folder: Path) -> frozenset[str]:
    """What a folder holds: one listing instead of one question a file."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _in_words(records: Records, conflicts: Mapping[str, Sequence[str]], classes: int) -> str:
    """The message for files of other settings."""
    differences, labels = {}, set()
    for what, record in (("kept", records.kept), ("copies", records.copies)):
        labels |= set(conflicts[what])
        for label in conflicts[what]:
            differences |= dict.fromkeys(record.differences(label))
    shown = ", ".join(list(differences)[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
    nouns = {"kept": plural(records.form.noun), "copies": "copies"}
    what = " and ".join(nouns[what] for what in conflicts if conflicts[what])
    where = f"in {len(labels)} of {classes} classes" if len(labels) < classes else "there"
    return (
        f"{what} {where} were made with other settings: {shown or 'of which no record is left'} ({records.paths.root})"
    )
