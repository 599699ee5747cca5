"""The forms in which exemplars are kept, and their copies: what memory and trainer need of them.

The forms themselves are in compress/forms/, and what makes copies in compress/training/: main.py hands them over.
"""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from utils.errors import UserError


class ExemplarForm(Protocol):
    """What one form of exemplar costs and keeps (`compress.training.exemplars.Cost`)."""

    def settings(self) -> dict[str, Any]:
        """What a kept file depends on beside its image: plain values."""

    def units(self, image: Path) -> float | None:
        """What a train image's exemplar costs, or will cost, in units of a real image; None for a form without such a
        count.  Raises UserError naming a file that can't be read."""

    def kept(self, image: Path) -> bytes | None:
        """What is kept of a train image, as it goes into the memory's file; None while it has not been made."""

    def kept_bytes(self, image: Path) -> int | None:
        """Its number of bytes."""

    def expected_bytes(self, image: Path) -> int:
        """The same, of what has not been made yet too.  Raises UserError naming a file that can't be read."""


class Copies(abc.ABC):
    """Copies of train images: how to get them, and what identifies those in use.

    exemplars: the train images whose copies are read at present.
    """

    made_by: list[dict[str, Any]]
    """See `compress.records.by_settings`."""
    generator: str | None = None
    """The model that made them, by its name or file; None where none did or it is not recorded."""

    @abc.abstractmethod
    def make(self, images: Sequence[Path], with_copies: bool) -> int | None:
        """Make what is missing of these images' kept files and, with_copies, copies; all processes share the work.

        Returns the number of copies that all of them made, None where copies are made ahead.
        """

    @abc.abstractmethod
    def digests(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """See `compress.training.copies.digests_of`."""

    def state(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {"made_by": self.made_by, "fingerprint": self.digests(exemplars)}

    def summary(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """For results.json: made_by, generator, files (the number of copies) and digest."""
        digests = self.digests(exemplars)
        about = {"made_by": self.made_by, "generator": self.generator}
        return {**about, "files": digests["files"], "digest": digests["digest"]}

    def check(self, state: Mapping[str, Any], exemplars: Sequence[Path]) -> None:
        """Raises UserError, naming what differs, where the copies are not those of a checkpoint's `state`.

        Files whose names, sizes and sampled contents agree may have other times where all of them have: the folder was
        copied.
        """
        old, new = state["fingerprint"]["classes"], self.digests(exemplars)["classes"]
        changed = [label for label in old if label not in new or old[label][:2] != new[label][:2]]
        touched = [label for label in old if label in new and old[label][2] != new[label][2]]
        if len(touched) < len(old):
            changed = [label for label in old if label in changed or label in touched]
        changed += [label for label in new if label not in old]
        if changed:
            details = ", ".join([f"the first is {changed[0]!r}", *_differences(state["made_by"], self.made_by)])
            raise UserError(
                f"the copies of {len(changed)} of {len(new | old)} classes are not those that this run began with "
                f"({details}). Put the old ones back, or choose another output_dir."
            )


def _differences(before: Sequence[Mapping], now: Sequence[Mapping]) -> list[str]:
    """Such as "steps 20 -> 50", between the settings of most classes."""
    if not before or not now or None in (old := before[0]["settings"], new := now[0]["settings"]):
        return []
    names = dict.fromkeys([*old, *new])
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return [f"{name.replace('_', ' ')} {one!r} -> {other!r}" for name, (one, other) in pairs.items() if one != other]
