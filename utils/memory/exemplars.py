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
from utils.memory.selection import SELECTIONS, select

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

    chosen_copies: image -> the numbers of the K copies that are read, where these are not 0 ... K-1.  They take a few
    bits, which are not counted.

    With a budget in bytes, a quota's number is the most that a class keeps in that form: in order of choice, exemplars
    are kept until the next one no longer fits.  Its true bytes count, and those of the class's text where a form
    needs it.
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
        self._file_bytes: dict[tuple[str, str], int] = {}  # of images by class and name, which may be gone by now
        self.chosen_copies: dict[Path, tuple[int, ...]] = {}

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
        counts = self._share(images, units)
        chosen = [images[i] for i in self.select(target, features, min(sum(counts), len(images)))]
        self._file_bytes |= {_name(image): image.stat().st_size for image in chosen}
        self._keep(
            target,
            chosen,
            counts if self.bytes_budget is None else fitting(chosen, self.quotas, self.forms, self.bytes_budget),
        )

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
                before, after = np.cumsum(self._counts[target]), np.cumsum(self._share(images))
                self._keep(target, images, np.diff(np.minimum(before, after), prepend=0).tolist())

    def move(self, train: Path) -> None:
        """From now on the exemplars' images are those of the same names in another `train` folder."""
        self._images = {
            target: [train / image.parent.name / image.name for image in images]
            for target, images in self._images.items()
        }
        self.chosen_copies = {train.joinpath(*_name(image)): numbers for image, numbers in self.chosen_copies.items()}
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
        budget = self._own.get(target, self.budget)
        while (
            self.bytes(target) > self.bytes_budget
            if self.bytes_budget is not None
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
        kept = [(image, target, form) for target in self.targets for form, image in self._of(target)]
        return [Item(image, target, form, self.chosen_copies.get(image, ())) for image, target, form in kept]

    def nb_exemplars(self, target: int) -> int:
        """Number of a class's exemplars in all forms."""
        return len(self._images[target])

    def evaluation_images(self, target: int) -> list[tuple[Path, float]]:
        """The pictures that represent a class's exemplars, with their weights in the class mean of NME.

        A real exemplar weighs 1, each of another exemplar's K copies 1/K.
        """
        pictures = []
        for form, image in self._of(target):
            if form == REAL:
                pictures.append((image, 1.0))
            else:
                numbers = self.chosen_copies.get(image, range(self.copies))
                pictures += [(self.paths.copy(image, k), 1 / self.copies) for k in numbers]
        return pictures

    def units(self, target: int) -> float:
        """What a class's exemplars cost; what has not been made yet is estimated by its form.

        Raises UserError for a form that has no count in units.
        """
        units = 0.0
        for form, image in self._of(target):
            cost = self._cost(form, image)
            if cost is None:
                raise UserError(f"the form {form!r} has no count in units: set budget_in to bytes.")
            units += cost
        return units

    def bytes(self, target: int) -> int:
        """Bytes that a class's exemplars take, its text included; what has not been made yet is encoded in memory."""
        kept = self._of(target)
        of_files = sum(self.forms[form].expected_bytes(image) for form, image in kept)
        label = {image.parent.name for _, image in kept}
        return of_files + sum(self.forms[form].text_bytes(label) for form in {form for form, _ in kept})

    def report(self) -> dict[str, Any]:
        """What the memory takes, in units and in bytes on disk.

        units_per_class_mean, units_per_class_max, units_total (all None where a form has no such count), units_budget
        (per class at present, None for no limit), units_budget_total (of all classes in memory), bytes_per_class_max,
        bytes_budget (of a class, None for a budget in units); forms: for each form its name, number of exemplars,
        units, bytes and how many are missing on disk, which therefore add no bytes; bytes_total; bytes_if_all_real:
        were all kept as image files.  As sums over the forms: nb_real, bytes_real, and of all others nb_synthetic,
        bytes_prompts, edge_maps_missing.
        """
        kept = [(form, image) for target in self.targets for form, image in self._of(target)]
        counted = all(self._cost(form, image) is not None for form, image in kept)
        units = [self.units(target) for target in self.targets] if counted else None
        rows = [_row(self, form) for form in dict.fromkeys(form for form, _ in self.quotas)]
        real, other = ([row for row in rows if (row["form"] == REAL) == is_real] for is_real in (True, False))

        def total(of_forms: list[dict[str, Any]], key: str) -> int:
            return sum(row[key] for row in of_forms)

        return {
            "units_per_class_mean": (sum(units) / len(units) if units else 0.0) if counted else None,
            "units_per_class_max": max(units, default=0.0) if counted else None,
            "units_total": float(sum(units)) if counted else None,
            "units_budget": self.budget,
            "units_budget_total": self.budget * len(self._images) if self.total is None and self.budget else self.total,
            "bytes_per_class_max": max((self.bytes(target) for target in self.targets), default=0),
            "bytes_budget": self.bytes_budget,
            "forms": rows,
            "nb_real": total(real, "exemplars"),
            "nb_synthetic": total(other, "exemplars"),
            "bytes_real": total(real, "bytes"),
            "bytes_prompts": total(other, "bytes"),
            "bytes_total": total(rows, "bytes"),
            "bytes_if_all_real": sum(
                self._file_bytes[_name(image)] for images in self._images.values() for image in images
            ),
            "edge_maps_missing": total(other, "missing"),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for `torch.load(weights_only=True)`.

        forms: their names in the order of the quotas; classes: for each target, as a string, its images in order of
        choice ("<class>/<file>", undecodable bytes escaped as Python does in paths), their bytes as files, how many
        each form holds, its units where they are not its share, and each image's chosen copies ([]: all are read).
        """
        return {
            "forms": [form for form, _ in self.quotas],
            "classes": {
                str(target): {
                    "images": ["/".join(_name(image)) for image in self._images[target]],
                    "file_bytes": [self._file_bytes[_name(image)] for image in self._images[target]],
                    "counts": list(self._counts[target]),
                    **({"units": self._own[target]} if target in self._own else {}),
                    "copies": [list(self.chosen_copies.get(image, ())) for image in self._images[target]],
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
        self._units, self._file_bytes = {}, {}
        for of_class in state["classes"].values():
            names = of_class["images"]  # checkpoints of earlier versions have no bytes
            sizes = of_class.get("file_bytes") or [(train / name).stat().st_size for name in names]
            self._file_bytes |= {tuple(name.split("/")): size for name, size in zip(names, sizes, strict=True)}
        self._own = {int(t): of_class["units"] for t, of_class in state["classes"].items() if "units" in of_class}
        self.chosen_copies = {
            self._images[int(target)][i]: tuple(numbers)
            for target, of_class in state["classes"].items()
            for i, numbers in enumerate(of_class.get("copies", []))
            if numbers
        }
        self._nb_classes = max(len(self._images), 1)

    def _of(self, target: int) -> list[tuple[str, Path]]:
        """(form, image) of a class's exemplars in order of choice."""
        forms = [form for (form, _), count in zip(self.quotas, self._counts[target], strict=True) for _ in range(count)]
        return list(zip(forms, self._images[target], strict=True))

    def _share(self, images: Sequence[Path], units: float | None = None) -> list[int]:
        """How many exemplars of each form a class has at present; the first image tells what each form costs."""
        if self.total is None or not images:
            return [number for _, number in self.quotas]
        costs = {form: self._cost(form, images[0]) for form, number in self.quotas if number}
        return share(self.budget if units is None else units, self.quotas, costs)

    def _keep(self, target: int, images: Sequence[Path], counts: Sequence[int]) -> None:
        """Keep the start of `images`, cut into forms by `counts` as far as there are images."""
        ends = np.minimum(np.cumsum(counts), len(images))
        self._images[target] = list(images[: ends[-1] if len(ends) else 0])
        self._counts[target] = np.diff(ends, prepend=0).tolist()
        self.enforce_budget(target)

    def _cost(self, form: str, image: Path) -> float | None:
        """Units of an exemplar, None where its form has no such count; asked of the form once the exemplar has been
        made, and each time before."""
        if (form, image) not in self._units:
            units = self.forms[form].units(image)
            if form != REAL and self.forms[form].kept_bytes(image) is None:
                return units
            self._units[form, image] = units
        return self._units[form, image]


def _name(image: Path) -> tuple[str, str]:
    """(class, file)."""
    return image.parent.name, image.name


def _row(memory: ExemplarMemory, form: str) -> dict[str, Any]:
    """A form's row of the report."""
    images = [image for target in memory.targets for its_form, image in memory._of(target) if its_form == form]
    sizes = [memory.forms[form].kept_bytes(image) for image in images]
    texts = memory.forms[form].text_bytes({image.parent.name for image in images})
    units = [memory._cost(form, image) for image in images]
    return {
        "form": form,
        "exemplars": len(images),
        "units": None if None in units else float(sum(units)),
        "bytes": sum(size for size in sizes if size is not None) + texts,
        "missing": sizes.count(None),
    }
