"""The classes of a dataset by their folders' names, and whether a run's phases fit them; torch is not needed."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from utils.data.paths import DatasetPaths
from utils.errors import UserError


def class_labels(paths: DatasetPaths, class_sort: Literal["text", "number"], old_may_be_gone: bool) -> list[str]:
    """The sorted labels of the train classes; of all classes, where train folders may be gone.

    Raises UserError where train and test differ.
    """
    train = [] if old_may_be_gone else paths.classes("train")
    test = paths.classes("test")
    if old_may_be_gone:
        train = test
        with suppress(UserError):  # not one is left
            train = sorted({*test, *paths.classes("train")})
    for mode, own, other, others in (("train", train, "test", test), ("test", test, "train", train)):
        if only := sorted(set(own) - set(others)):
            raise UserError(
                f"{len(only)} classes of {paths.folder(mode)} have no folder in {paths.folder(other)}, the first is "
                f"{only[0]!r}: train and test need the same class folders."
            )
    return sorted(train, key=_by_numbers) if class_sort == "number" else train


def check_phase_sizes(dataset: str, nb_classes: int, init_cls: int, increment: int | Sequence[int]) -> None:
    """Raises UserError for phases that are impossible with so many classes."""
    if not 1 <= init_cls <= nb_classes:
        raise UserError(
            f"init_cls is {init_cls}, but dataset {dataset!r} has {nb_classes} classes: choose 1 to {nb_classes}."
        )
    increments = [increment] if isinstance(increment, int) else increment
    if init_cls < nb_classes and min(increments, default=0) < 1:
        left = nb_classes - init_cls
        raise UserError(f"increment is {increment}, with {left} classes left after phase 0: choose at least 1.")


def indices_of(class_order: Sequence[int | str], labels: Sequence[str]) -> list[int]:
    """A class order as indices of the labels.  Raises UserError unless it has each class once."""
    index = {label: i for i, label in enumerate(labels)}
    texts = [str(entry) for entry in class_order]
    if sorted(texts) == sorted(labels):
        return [index[text] for text in texts]
    if sorted(texts) == sorted(map(str, range(len(labels)))):
        return [int(text) for text in texts]
    unknown = [text for text in texts if text not in index]
    raise UserError(
        f"class_order must hold each of the {len(labels)} classes once, as labels or numbers 0 to {len(labels) - 1}; "
        + (f"{unknown[0]!r} is no label." if unknown else f"it has {len(texts)} entries.")
    )


def _by_numbers(label: str) -> list[tuple[int, str]]:
    """Sorts "2" before "10", and "a2" before "a10"."""
    parts = re.findall(r"\d+|\D+", label)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
