"""Entries of a training set, and long lists of paths."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NEW, REAL = "new", "real"
"""Roles of items that are read from their own image file."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a phase's training set.

    image: the train image; target: the index of its class in the class order; role: "new" for an image of the phase's
    new classes, else the form in which the exemplar is kept: "real" for the image itself, "edges", ...
    """

    image: Path
    target: int
    role: str

    @property
    def regenerated(self) -> bool:
        """Whether the image itself is not kept, so that training reads its copies only."""
        return self.role not in (NEW, REAL)


class PathTable(Sequence[str]):
    """The texts of paths, kept in two blocks of bytes.

    Worker processes share their parent's memory until it is written to, and reading a Python object writes its
    reference count.  A list of Path objects would thus be copied into each worker: 200 MB for ImageNet.
    They are returned as texts, because a new Path interns its parts, which touches the parent's strings.
    """

    def __init__(self, paths: Iterable[Path]):
        names = [os.fsencode(path) for path in paths]
        self._text = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices are taken
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])
