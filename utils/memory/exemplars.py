"""The exemplar memory: which images of a class are kept, in which form, and what they cost."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data.items import REAL, Item
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import ROUNDING, Quotas, fitting, share
from utils.memory.forms import ExemplarForm
from utils.memory.report import report
from utils.memory.selection import SELECTIONS, select
from utils.memory.share import ClassShare, row_of

log = logging.getLogger(__name__)


class ExemplarMemory:
    """The exemplars of all classes seen.  Each class has one list of images in order of choice, cut by quotas.

    paths: the dataset's folders; quotas: (form, exemplars of a class) in order, such as [("real", 18), ("edges", 48)];
    forms: what each form costs and keeps, by name; budget: units per class, None for no limit; copies: K, the pictures
    that come back from an exemplar that is not real; total: units of all classes together, None if each class has its
    own budget; bytes_budget: bytes per class, in place of units; selection: one of `SELECTIONS`; seed: for selection
    "random".

    With a total, n classes have total / n units each, and the quotas are but a ratio (`share`).  As classes arrive,
    each keeps the start of its list and the boundaries between forms move towards the start: an exemplar that no longer
    fits in its form passes to the next one, and the last are dropped.  A class thus holds what it would hold had it
    been given its present share at once.

    With a budget in bytes, a quota's number is the most that a class keeps in that form: in order of choice, exemplars
    are kept until the next one no longer fits.  What counts is the class's part of the memory's file
    (`utils.memory.share`), with its text where a form needs it.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        quotas: Quotas,
        forms: Mapping[str, ExemplarForm],
        budget: float | None,
        copies: int,
        *,
        total: float | None = None,
        bytes_budget: int | None = None,
        selection: str = "herding",
        seed: int = 0,
    ):
        if selection not in SELECTIONS:
            raise ValueError(f"selection {selection!r} is none of {', '.join(SELECTIONS)}")
        for form, number in quotas:
            if number < 0:
                raise UserError(f"{number} exemplars of form {form!r}: the number can't be negative.")
        self.paths = paths
        self.quotas = list(quotas)
        self.forms = forms
        self.forms_in_use = list(dict.fromkeys(form for form, number in quotas if number))
        self.copies = copies
        self.total = total
        self.bytes_budget = bytes_budget
        self.selection = selection
        self.seed = seed
        self._class_budget = budget
        self._nb_classes = 1  # that share the total
        self._own: dict[int, float] = {}  # units of classes that were given other than their share
        self._images: dict[int, list[Path]] = {}  # in order of choice
        self._counts: dict[int, list[int]] = {}  # how many of them each quota holds
        self._units: dict[tuple[str, Path], float | None] = {}  # of exemplars that have been made
        self.empty_shares: dict[int, ClassShare] = {}  # of each class without its exemplars
        self.file_bytes: dict[tuple[str, str], int] = {}  # of images by class and name, which may be gone by now

    def add_class(
        self,
        target: int,
        images: Sequence[Path],
        features: np.ndarray | torch.Tensor,
        units: float | None = None,
    ) -> None:
        """Choose a class's exemplars.

        images: the class's train images, n of them; features: n x d, in the same order.  A class of fewer images than
        the quotas ask for keeps all.  With a total, call `make_room` first; units: in place of the class's share of
        it, until room is made again.
        """
        if target in self._images:
            raise ValueError(f"class {target} is in memory already")
        if len(images) != len(features):
            raise ValueError(f"{len(images)} images, {len(features)} features")
        if units is not None:
            self._own[target] = units
        counts = self._numbers(images, units)
        chosen = [images[i] for i in self.select(target, features, min(sum(counts), len(images)))]
        self.file_bytes |= {name_of(image): image.stat().st_size for image in chosen}
        label = images[0].parent.name if images else ""
        self.empty_shares[target] = ClassShare.empty(
            target, label, self.paths.class_texts([label])[label], self.forms_in_use
        )
        if self.bytes_budget is not None:
            counts = fitting(chosen, self.quotas, self.forms, self.empty_shares[target], self.bytes_budget)
        self._keep(target, chosen, counts)

    def select(self, target: int, features: np.ndarray | torch.Tensor, m: int) -> list[int]:
        """m indices of a class's rows of features in order of choice; the first m - 1 are the choice of m - 1."""
        return select(self.selection, features, m, seed=(self.seed, target))

    def make_room(self, nb_classes: int) -> None:
        """With a total, share it among `nb_classes` from now on; classes in memory drop what no longer fits."""
        self._nb_classes = max(nb_classes, 1)
        if self.total is None:
            return
        self._own.clear()
        for target in self.targets:
            if images := self._images[target]:
                before, after = np.cumsum(self._counts[target]), np.cumsum(self._numbers(images))
                self._keep(target, images, np.diff(np.minimum(before, after), prepend=0).tolist())

    def move(self, train: Path) -> None:
        """From now on the exemplars' images are those of the same names in another `train` folder."""
        self._images = {
            target: [train / image.parent.name / image.name for image in images]
            for target, images in self._images.items()
        }
        self._units = {}

    @property
    def budget(self) -> float | None:
        """Units of a class at present; None for no limit and for a budget in bytes."""
        if self.bytes_budget is not None:
            return None
        return self._class_budget if self.total is None else self.total / self._nb_classes

    def enforce_budget(self, target: int) -> None:
        """Drop the last exemplars of a class that are not real until its true cost is within the budget.

        `add_class` does so; call it again after making what was only estimated then.  Warns if the class has a budget
        of its own.
        """
        images, counts, before = self._images[target], self._counts[target], len(self._images[target])
        budget, in_bytes = self._own.get(target, self.budget), self.bytes_budget is not None
        shares = self.shares(target, expected=True) if in_bytes else []
        while (
            shares[len(images)].bytes > self.bytes_budget
            if in_bytes
            else budget is not None and self.units(target) > budget + ROUNDING
        ):
            last = max((i for i, count in enumerate(counts) if count), default=0)
            if self.quotas[last][0] == REAL or not images:
                break
            images.pop()
            counts[last] -= 1
        if len(images) < before and self.total is None:
            log.warning(
                "class %r: the last %d of %d exemplars are dropped, with them it takes more than its %s",
                images[0].parent.name if images else target,
                before - len(images),
                before,
                f"{self.budget:g} units" if self.bytes_budget is None else f"{self.bytes_budget:,} bytes",
            )

    @property
    def targets(self) -> list[int]:
        """The classes in memory, in target order."""
        return sorted(self._images)

    def items(self) -> list[Item]:
        """The exemplars as items of a training set, by target, in order of choice; an item's role is its form."""
        return [Item(image, target, form) for target in self.targets for form, image in self.of(target)]

    def of(self, target: int) -> list[tuple[str, Path]]:
        """(form, image) of a class's exemplars in order of choice."""
        forms = [form for (form, _), count in zip(self.quotas, self._counts[target], strict=True) for _ in range(count)]
        return list(zip(forms, self._images[target], strict=True))

    def evaluation_images(self, target: int) -> list[tuple[Path, float]]:
        """The pictures that represent a class's exemplars, with their weights in the class mean of NME.

        A real exemplar weighs 1, each of another exemplar's K copies 1/K.
        """
        pictures = []
        for form, image in self.of(target):
            if form == REAL:
                pictures.append((image, 1.0))
            else:
                pictures += [(self.paths.copy(image, k), 1 / self.copies) for k in range(self.copies)]
        return pictures

    def units(self, target: int) -> float:
        """What a class's exemplars cost; what has not been made yet is estimated by its form.

        Raises UserError for a form that has no count in units.
        """
        units = 0.0
        for form, image in self.of(target):
            cost = self.cost(form, image)
            if cost is None:
                raise UserError(f"the form {form!r} has no count in units: set budget_in to bytes.")
            units += cost
        return units

    def cost(self, form: str, image: Path) -> float | None:
        """Units of an exemplar, None where its form has no such count; asked of the form once the exemplar has been
        made, and each time before."""
        if (form, image) not in self._units:
            units = self.forms[form].units(image)
            if form != REAL and self.forms[form].kept_bytes(image) is None:
                return units
            self._units[form, image] = units
        return self._units[form, image]

    def shares(self, target: int, *, expected: bool = False) -> list[ClassShare]:
        """What a class takes in the memory's file with none of its exemplars, with the first one, with two, ...

        expected: with what has not been made yet, encoded in memory.
        """
        shares = [self.empty_shares[target]]
        for form, image in self.of(target):
            length = (self.forms[form].expected_bytes if expected else self.forms[form].kept_bytes)(image)
            shares.append(shares[-1].plus(form, row_of(form, image, length)))
        return shares

    def bytes(self, target: int) -> int:
        """Those that a class takes in the memory's file; what has not been made yet is encoded in memory."""
        return self.shares(target, expected=True)[-1].bytes

    def report(self) -> dict[str, Any]:
        """What the memory takes (`utils.memory.report.report`)."""
        return report(self)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for `torch.load(weights_only=True)`.

        forms: their names in the order of the quotas; classes: for each target, as a string, its images in order of
        choice ("<class>/<file>", undecodable bytes escaped as Python does in paths), their bytes as files, how many
        each form holds, its units where they are not its share, and its text.
        """
        return {
            "forms": [form for form, _ in self.quotas],
            "classes": {
                str(target): {
                    "images": ["/".join(name_of(image)) for image in self._images[target]],
                    "file_bytes": [self.file_bytes[name_of(image)] for image in self._images[target]],
                    "counts": list(self._counts[target]),
                    **({"units": self._own[target]} if target in self._own else {}),
                    "text": self.empty_shares[target].text,
                }
                for target in self.targets
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the present content is dropped.

        Raises UserError for exemplars of other forms than the quotas have.
        """
        forms = [form for form, _ in self.quotas]
        if state["forms"] != forms:
            kept, asked = (", ".join(names) for names in (state["forms"], forms))
            raise UserError(f"the checkpoint's exemplars have the forms {kept}, this run's {asked}.")
        train = self.paths.folder("train")
        self._images = {
            int(target): [train / image for image in of_class["images"]]
            for target, of_class in state["classes"].items()
        }
        self._counts = {int(target): list(of_class["counts"]) for target, of_class in state["classes"].items()}
        self._units, self.file_bytes = {}, {}
        for of_class in state["classes"].values():
            names = of_class["images"]  # checkpoints of earlier versions have no bytes
            sizes = of_class.get("file_bytes") or [(train / name).stat().st_size for name in names]
            self.file_bytes |= {tuple(name.split("/")): size for name, size in zip(names, sizes, strict=True)}
        self._own = {int(t): of_class["units"] for t, of_class in state["classes"].items() if "units" in of_class}
        for target, of_class in state["classes"].items():
            labels = {name.partition("/")[0] for name in of_class["images"]}  # earlier versions kept no text
            label = next(iter(labels), "")
            text = of_class.get("text") or self.paths.class_texts([label])[label]
            self.empty_shares[int(target)] = ClassShare.empty(int(target), label, text, self.forms_in_use)
        self._nb_classes = max(len(self._images), 1)

    def _numbers(self, images: Sequence[Path], units: float | None = None) -> list[int]:
        """How many exemplars of each form a class has at present; the first image tells what each form costs."""
        if self.total is None or not images:
            return [number for _, number in self.quotas]
        costs = {form: self.cost(form, images[0]) for form, number in self.quotas if number}
        return share(self.budget if units is None else units, self.quotas, costs)

    def _keep(self, target: int, images: Sequence[Path], counts: Sequence[int]) -> None:
        """Keep the start of `images`, cut into forms by `counts` as far as there are images."""
        ends = np.minimum(np.cumsum(counts), len(images))
        self._images[target] = list(images[: ends[-1] if len(ends) else 0])
        self._counts[target] = np.diff(ends, prepend=0).tolist()
        self.enforce_budget(target)


def name_of(image: Path) -> tuple[str, str]:
    """(class, file)."""
    return image.parent.name, image.name
