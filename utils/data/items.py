"""The entries of a training set."""

from dataclasses import dataclass
from pathlib import Path

NEW, REAL = "new", "real"
"""Roles of the items that are image files themselves."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a phase's training set.

    image: the train image; target: its class's place in the class order; role: "new" for an image of the phase's new
    classes, otherwise the form in which an exemplar is kept: "real" for the image itself, "edges", ...
    """

    image: Path
    target: int
    role: str

    @property
    def regenerated(self) -> bool:
        """Whether training sees copies alone, as the image itself is not kept."""
        return self.role not in (NEW, REAL)
