"""The forms in which exemplars are kept, as far as the memory must know them.

The forms themselves are in compress/forms/; main.py hands them to the memory, by name.
"""

from pathlib import Path
from typing import Any, Protocol


class ExemplarForm(Protocol):
    """What one form of exemplar costs and keeps (`compress.training.cost.Cost`)."""

    def settings(self) -> dict[str, Any]:
        """What a kept file depends on beside its image: plain values."""

    def units(self, image: Path) -> float | None:
        """Cost of a train image's exemplar, in units of one real image; before it is made, what it will cost.

        None for a form that has no such count.  Raises UserError naming a file that can't be read.
        """

    def kept(self, image: Path) -> bytes | None:
        """What is kept of a train image, as it goes into the memory's file; None while it has not been made."""

    def kept_bytes(self, image: Path) -> int | None:
        """Its number of bytes."""

    def expected_bytes(self, image: Path) -> int:
        """The same, of what has not been made yet too.  Raises UserError naming a file that can't be read."""
