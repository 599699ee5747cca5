"""What a run of compress/run.py has to do, compared with what is on disk, and what it did."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from utils.paths import DatasetPaths


@dataclass(frozen=True)
class Task:
    """A train image, its edge map on disk (None: to be made), and the numbers of the copies that are missing."""

    image: Path
    edge_map: Path | None
    copy_numbers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a run has to do: a task for every image asked for, also where nothing is missing."""

    tasks: tuple[Task, ...]
    copies_per_image: int

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


def plan(paths: DatasetPaths, images: Iterable[Path], copy_numbers: Sequence[int], *, overwrite: bool = False) -> Plan:
    """Compare what is asked for with what is on disk.  overwrite: take nothing as being there."""

    @cache
    def names(folder: Path) -> frozenset[str]:  # one listing a class instead of one question a copy
        return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()

    def is_missing(copy: Path) -> bool:
        return overwrite or copy.name not in names(copy.parent)

    tasks = tuple(
        Task(
            image=image,
            edge_map=None if overwrite else paths.find_edge_map(image),
            copy_numbers=tuple(k for k in copy_numbers if is_missing(paths.copy(image, k))),
        )
        for image in images
    )
    return Plan(tasks, len(copy_numbers))


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
