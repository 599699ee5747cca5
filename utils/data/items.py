"""One entry of a training set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["new", "real", "synthetic"]


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a phase's training set.

    image: the train image; target: its class's place in the class order; role: "new" for an image of the phase's new
    classes, "real" for a real exemplar, "synthetic" for an exemplar of which only the prompt is kept.
    """

    image: Path
    target: int
    role: Role
