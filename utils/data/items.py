"""Entries of a training set."""

from dataclasses import dataclass
from pathlib import Path

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
