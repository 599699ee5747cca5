"""What a run of compress/run.py has to do, compared with what is on disk, and what it did."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path

import numpy as np

from compress import prompt as prompts
from compress.records import MadeOtherwise, Records, State, edge_map_size, read_mark
from utils.data.images import image_bits, read_image

READERS = 16
"""Threads that look at many small files: the time goes into waiting for the disk, or for the network behind it."""


class Found(Enum):
    """What is known of a file that is asked for."""

    MISSING = "not there"
    GOOD = "made with these settings"
    OTHERWISE = "made with other settings"
    UNKNOWN = "nobody knows how it was made, and so it is kept"


@dataclass(frozen=True)
class Task:
    """A train image, its edge map on disk (None: to be made), and the numbers of the copies that are to be made."""

    image: Path
    edge_map: Path | None
    copy_numbers: tuple[int, ...]

    @property
    def is_done(self) -> bool:
        return self.edge_map is not None and not self.copy_numbers


@dataclass(frozen=True)
class Plan:
    """What a run has to do: a task for every image asked for, also where nothing is missing.

    copies_otherwise, edge_maps_otherwise: of those to be made, the ones that are there, made with other settings;
    without_record: copies and edge maps that are kept, though nothing tells how they were made.
    """

    records: Records
    tasks: tuple[Task, ...]
    copies_per_image: int
    copies_otherwise: int = 0
    edge_maps_otherwise: int = 0
    copies_without_record: int = 0
    edge_maps_without_record: int = 0

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

    def share(self, rank: int, world_size: int) -> "Plan":
        """The part of process `rank` of `world_size`: what is to be made is dealt out evenly, and what is there too."""
        to_do = [task for task in self.tasks if not task.is_done][rank::world_size]
        done = [task for task in self.tasks if task.is_done][rank::world_size]
        return replace(self, tasks=(*to_do, *done))


def plan(
    records: Records,
    images: Iterable[Path],
    copy_numbers: Sequence[int],
    *,
    replaced: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Compare what is asked for with what is on disk.

    replaced: what was made with other settings, or nobody knows how, is to be made again; overwrite: everything is.
    Raises MadeOtherwise where files of these classes were made with other settings, unless either is given.
    """
    images = list(images)
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name].append(image)
    tasks: dict[Path, Task] = {}
    counts: Counter[tuple[str, Found]] = Counter()
    conflicts: dict[str, list[str]] = {"edge maps": [], "copies": []}
    with ThreadPoolExecutor(READERS) as pool:
        for label, of_class in by_label.items():
            edge_maps, copies = {}, {}
            if not overwrite:
                edge_maps = _edge_maps(records, label, of_class, replaced, pool.map)
                copies = _copies(records, label, of_class, copy_numbers, replaced, pool.map)
            for what, record, found in (
                ("edge maps", records.edge_maps, [kind for _, kind in edge_maps.values()]),
                ("copies", records.copies, copies.values()),
            ):
                if not replaced and record.state(label) is not State.MIXED and Found.OTHERWISE in found:
                    conflicts[what].append(label)
            for image in of_class:
                edge_map, kind = edge_maps.get(image, (None, Found.MISSING))
                found = {k: copies.get(records.paths.copy_name(image, k), Found.MISSING) for k in copy_numbers}
                counts.update([("edge map", kind), *(("copy", kind) for kind in found.values())])
                tasks[image] = Task(
                    image,
                    edge_map if kind in (Found.GOOD, Found.UNKNOWN) else None,
                    tuple(k for k in copy_numbers if found[k] in (Found.MISSING, Found.OTHERWISE)),
                )
    if any(conflicts.values()):
        raise MadeOtherwise(_in_words(records, conflicts, len(by_label)))
    return Plan(
        records,
        tuple(tasks[image] for image in images),
        len(copy_numbers),
        copies_otherwise=counts["copy", Found.OTHERWISE],
        edge_maps_otherwise=counts["edge map", Found.OTHERWISE],
        copies_without_record=counts["copy", Found.UNKNOWN],
        edge_maps_without_record=counts["edge map", Found.UNKNOWN],
    )


def _edge_maps(
    records: Records, label: str, images: Sequence[Path], replaced: bool, each: Callable[..., Iterable]
) -> dict[Path, tuple[Path | None, Found]]:
    """Image -> its edge map on disk, and what is known of it.  each: a `map` that may run in threads."""
    state = records.edge_maps.state(label)
    names = _names(records.paths.folder("edge_maps") / label)
    at_once = None  # what holds for all of them, without a look at any
    if state is State.NEW:
        at_once = Found.OTHERWISE if replaced else Found.UNKNOWN
    elif not replaced and state is not State.MIXED:
        at_once = Found.GOOD if state is State.SAME else Found.OTHERWISE

    def judge(image: Path) -> tuple[Path | None, Found]:
        edge_map = records.paths.find_edge_map(image, names)
        if edge_map is None:
            return None, Found.MISSING
        if at_once is not None:
            return edge_map, at_once
        if replaced and edge_map.suffix == ".bmp":
            return edge_map, Found.OTHERWISE
        fits = edge_map_fits(records, image, edge_map, recompute=not records.edge_maps.only_by_size(label))
        return edge_map, Found.GOOD if fits else Found.OTHERWISE

    return dict(zip(images, (map if at_once else each)(judge, images), strict=True))


def edge_map_fits(records: Records, image: Path, edge_map: Path, *, recompute: bool) -> bool:
    """Whether an edge map is what the settings make of its image: by its size, or bit for bit.

    False too where the edge map can't be read; True where the image can't, of which the run itself will tell.
    """
    try:
        width, height, _ = image_bits(image)
        fresh = prompts.extract(np.asarray(read_image(image)), "", records.preset) if recompute else None
    except OSError:
        return True
    try:
        if fresh is not None:
            return np.array_equal(prompts.load(edge_map, "").edge_map, fresh.edge_map)
        map_width, map_height, _ = image_bits(edge_map)
    except OSError:
        return False
    return (map_height, map_width) == edge_map_size(records.preset, height, width)


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
    on_disk = dict.fromkeys((name for name in _names(folder) if name.endswith(".jpg")), Found.GOOD)
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
    """The message for files that were made otherwise."""
    differences, labels = {}, set()
    for what, record in (("edge maps", records.edge_maps), ("copies", records.copies)):
        labels |= set(conflicts[what])
        for label in conflicts[what]:
            differences |= dict.fromkeys(record.differences(label))
    shown = ", ".join(list(differences)[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
    what = " and ".join(what for what in conflicts if conflicts[what])
    where = f"in {len(labels)} of {classes} classes" if len(labels) < classes else "there"
    return (
        f"{what} {where} were made with other settings: {shown or 'of which no record is left'} ({records.paths.root})"
    )


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
    The results of processes that shared a plan add up to the whole's.
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

    def add(self, other: "Result") -> None:
        """Count another's numbers in, and list its failures."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
