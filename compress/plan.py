"""What a run of compress/run.py has to do: what is asked for, compared with what is on disk."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

from compress.forms import pixels
from compress.records import MadeOtherwise, Record, Records, State, names_in, read_mark
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
    def copies_missing(self) -> int:
        return sum(len(task.copy_numbers) for task in self.tasks)

    @property
    def needs_generator(self) -> bool:
        """Whether what is missing takes the form's generator, or a model to encode, which is freed with it."""
        encodes = self.kept_missing > 0 and self.records.form.needs_weights
        return encodes or self.copies_missing > 0


@dataclass
class ClassSurvey:
    """A class's files on disk, compared with the settings: a task for each image asked for, numbers of files in each
    state, and whether files of other settings are there that nobody has decided to make again."""

    tasks: list[Task] = field(default_factory=list)
    kept: Counter[FileState] = field(default_factory=Counter)
    copies: Counter[FileState] = field(default_factory=Counter)
    kept_conflicts: bool = False
    copies_conflicts: bool = False


def plan(
    records: Records,
    images: Sequence[Path],
    copy_numbers: Sequence[int],
    existing: str = "refuse",
    fabric: Fabric | None = None,
) -> Plan:
    """Compare what is asked for with what is on disk.

    existing: "refuse" files of other settings, which raises MadeOtherwise; "replace": these, and those whose settings
    are not recorded, are to be made again; "overwrite": all files are; fabric: the processes, each of which looks at
    its part of the classes.
    """
    if fabric is None:
        surveys = survey(records, images, copy_numbers, existing)
    else:
        labels = set(own_part(fabric, list(dict.fromkeys(image.parent.name for image in images))))
        own = [image for image in images if image.parent.name in labels]
        parts = by_all(fabric, lambda: survey(records, own, copy_numbers, existing))
        surveys = {label: each for part in parts for label, each in part.items()}
    _check_conflicts(records, surveys)
    tasks = {task.image: task for each in surveys.values() for task in each.tasks}
    kept = sum((each.kept for each in surveys.values()), Counter[FileState]())
    copies = sum((each.copies for each in surveys.values()), Counter[FileState]())
    return Plan(records, tuple(tasks[image] for image in images), len(copy_numbers), kept, copies)


def survey(
    records: Records, images: Iterable[Path], copy_numbers: Sequence[int], existing: str
) -> dict[str, ClassSurvey]:
    """Compare these images' files on disk with the settings, by class; arguments as `plan` has them."""
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name].append(image)
    surveys = {label: ClassSurvey() for label in by_label}
    with ThreadPoolExecutor(READERS) as pool:
        for label, class_images in by_label.items():
            kept: dict[Path, tuple[Path, FileState]] = {}
            copies: dict[str, FileState] = {}
            if existing != "overwrite":
                kept = _kept_states(records, label, class_images, existing, pool)
                copies = _copy_states(records, label, class_images, copy_numbers, existing, pool)
            surveyed = surveys[label]
            if existing == "refuse":
                surveyed.kept_conflicts = _has_conflicts(records.kept, label, (state for _, state in kept.values()))
                surveyed.copies_conflicts = _has_conflicts(records.copies, label, copies.values())
            for image in class_images:
                file, state = kept.get(image, (None, FileState.MISSING))
                states = [copies.get(records.paths.copy_name(image, k), FileState.MISSING) for k in copy_numbers]
                surveyed.kept[state] += 1
                surveyed.copies.update(states)
                to_make = tuple(k for k, copy in zip(copy_numbers, states, strict=True) if copy in TO_MAKE)
                surveyed.tasks.append(Task(image, None if state in TO_MAKE else file, to_make))
    return surveys


def _has_conflicts(record: Record, label: str, states: Iterable[FileState]) -> bool:
    return record.state(label) is not State.MIXED and FileState.OTHERWISE in states


def _kept_states(
    records: Records, label: str, images: Sequence[Path], existing: str, pool: ThreadPoolExecutor
) -> dict[Path, tuple[Path, FileState]]:
    """Image -> its kept file, where it is on disk, and what is known of it."""
    names = frozenset(names_in(records.paths.folder("kept") / label))
    files = {image: file for image in images if (file := records.paths.find_kept(image, names)) is not None}
    state = records.kept.state(label)
    if state is State.NEW:
        states = [FileState.OTHERWISE if existing == "replace" else FileState.UNRECORDED] * len(files)
    elif existing == "refuse" and state is not State.MIXED:
        states = [FileState.GOOD if state is State.SAME else FileState.OTHERWISE] * len(files)
    else:
        states = list(pool.map(partial(_kept_state, records, existing), files, files.values()))
    return {image: (file, state) for (image, file), state in zip(files.items(), states, strict=True)}


def _kept_state(records: Records, existing: str, image: Path, kept: Path) -> FileState:
    """Whether a kept file is what the settings make of its image.

    It is not where it can't be read; it is where the image can't, which the run itself will report.
    """
    if existing == "replace" and kept.suffix == ".bmp":  # of the published scripts
        return FileState.OTHERWISE
    try:
        picture = pixels(image)
    except OSError:
        return FileState.GOOD
    try:
        fits = records.form.check(kept.read_bytes(), picture) is None
    except OSError:
        fits = False
    return FileState.GOOD if fits else FileState.OTHERWISE


def _copy_states(
    records: Records, label: str, images: Sequence[Path], copy_numbers: Sequence[int], existing: str,
    pool: ThreadPoolExecutor,
) -> dict[str, FileState]:  # fmt: skip
    """File name -> what is known of it, of a class's copies on disk, at least of those asked for."""
    folder, ending = records.paths.copies_folder(label), records.form.files.copy_ending
    on_disk = {name for name in names_in(folder) if name.endswith(ending)}
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


def plural(noun: str) -> str:
    """Of a word or a number of words: copy -> copies, edge map -> edge maps."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def _check_conflicts(records: Records, surveys: dict[str, ClassSurvey]) -> None:
    """Raises MadeOtherwise, with what differs, where classes have files of other settings."""
    kept = [label for label, each in surveys.items() if each.kept_conflicts]
    copies = [label for label, each in surveys.items() if each.copies_conflicts]
    if not kept and not copies:
        return
    nouns = ([plural(records.form.noun)] if kept else []) + (["copies"] if copies else [])
    differences = [difference for label in kept for difference in records.kept.differences(label)]
    differences += [difference for label in copies for difference in records.copies.differences(label)]
    differences = list(dict.fromkeys(differences))
    listed = ", ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
    count = len({*kept, *copies})
    where = f"in {count} of {len(surveys)} classes" if count < len(surveys) else "there"
    raise MadeOtherwise(
        f"{' and '.join(nouns)} {where} were made with other settings: {listed or 'of which no record is left'} "
        f"({records.paths.root})"
    )
