"""What a run of compress/run.py made."""

from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    """An image of which something could not be made, and why."""

    image: Path
    reason: str

    def __str__(self):
        return f"{self.image}: {self.reason}"


@dataclass
class Result:
    """Numbers of kept files and copies that were made, were there already (skipped), and could not be made.

    kept_recoded: kept files of earlier versions that were written as this one writes them, of those skipped;
    image_bytes: of the image files; kept_bytes: of the kept files and their class texts in UTF-8; image_bits, raw_bits:
    of both before any coding (raw_bits 0 where the form has no such count).  All four are sums over the images asked
    for that could be read.  The results of processes that share a plan add up to the whole's.
    """

    kept_made: int = 0
    kept_skipped: int = 0
    kept_failed: int = 0
    kept_recoded: int = 0
    copies_made: int = 0
    copies_skipped: int = 0
    copies_failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    image_bytes: int = 0
    kept_bytes: int = 0
    image_bits: int = 0
    raw_bits: int = 0

    def add(self, other: "Result") -> None:
        """Count another's numbers in, and list its failures."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
