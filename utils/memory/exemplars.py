"""The exemplar memory: which images of a class are kept, in which form, and what they cost."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.classes import REAL, Item
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import ROUNDING, Quotas, counts_within, fitting, moved_boundaries
from utils.memory.forms import ExemplarForm
from utils.memory.packed import ClassShare, row_of
from utils.memory.selection import SELECTIONS, Features, select

log = logging.getLogger(__name__)


@dataclass
class ClassExemplars:
    """Of a class.  images: in order of choice; counts: how many of them each quota holds; empty_share: what the class
    takes in the memory's file without them; units: its budget, where that is not its share of the total."""

    images: list[Path]
    counts: list[int]
    empty_share: ClassShare
    units: float | None = None

    def cut(self, counts: Sequence[int]) -> None:
        """Keep the start of the images, `counts` of them in each form as far as there are images."""
        ends = np.minimum(np.cumsum(counts), len(self.images))
        self.counts = np.diff(ends, prepend=0).tolist()
        del self.images[sum(self.counts) :]


@dataclass
class ExemplarMemory:
    """The exemplars of all classes seen: of each class a list of images in order of choice, cut by quotas.

    `update` adds classes; all else reads what there is.

    paths: the dataset's folders; quotas: (form, exemplars of a class) in order, such as [("real", 18), ("edges", 48)];
    forms: what each form costs and keeps, by name; class_budget: units per class, None for no limit; copies: K, the
    pictures that come back from an exemplar that is not real; total: units of all classes together, None if each class
    has its own budget; bytes_budget: bytes per class, in place of units; selection: one of `SELECTIONS`; seed: for
    selection "random".

    With a total, n classes have total / n units each, and the quotas are but a ratio (`counts_within`).  As classes
    arrive, each keeps the start of its list and the boundaries between forms move towards the start: an exemplar that
    no longer fits in its form passes to the next one, and the last are dropped.  A class thus holds what it would hold
    had it been given its present share at once.

    With a budget in bytes, a quota's number is the most that a class keeps in that form: in order of choice, exemplars
    are kept until the next one no longer fits.  What counts is the class's part of the memory's file
    (`utils.memory.packed`), with its text where a form needs it.
    """

    paths: DatasetPaths
    quotas: Quotas
    forms: Mapping[str, ExemplarForm]
    class_budget: float | None
    copies: int
    _: KW_ONLY
    total: float | None = None
    bytes_budget: int | None = None
    selection: str = "herding"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection {self.selection!r} is none of {', '.join(SELECTIONS)}")
        for form, number in self.quotas:
            if number < 0:
                raise UserError(f"{number} exemplars of form {form!r}: the number can't be negative.")
        self.forms_in_use = list(dict.fromkeys(form for form, number in self.quotas if number))
        self.classes: dict[int, ClassExemplars] = {}  # by target
        self.file_bytes: dict[tuple[str, str], int] = {}  # of images by class and name, which may be gone by now
        self._nb_classes = 1  # that share the total
        self._units: dict[tuple[str, Path], float | None] = {}  # of exemplars that have been made

    def update(
        self,
        classes: Mapping[int, Sequence[Path]],
        features: Sequence[Features],
        units: Callable[[int], float | None] = lambda target: None,
    ) -> None:
        """Choose the exemplars of new classes, for which the classes in memory make room where all share a total.

        classes: target -> its train images, n of them; features: of each class, n x d, in the same order; units: of a
        target, its budget in place of its share of the total until the next update, None for the share.
        A class of fewer images than the quotas ask for keeps all.  What has not been made of an exemplar is estimated.
        Raises UserError where not one exemplar of a class fits its budget in bytes.
        """
        if known := classes.keys() & self.classes.keys():
            raise ValueError(f"class {min(known)} is in memory already")
        self._nb_classes = max(len(self.classes) + len(classes), 1)
        if self.total is not None:
            for target, exemplars in self.classes.items():
                exemplars.units = None
                exemplars.cut(moved_boundaries(exemplars.counts, self._share(exemplars.images)))
                self._drop_excess(target)
        for (target, images), rows in zip(classes.items(), features, strict=True):
            if len(images) != len(rows):
                raise ValueError(f"{len(images)} images, {len(rows)} features")
            own_units = units(target)
            counts = self._share(images, own_units)
            chosen = [images[i] for i in self.select(target, rows, min(sum(counts), len(images)))]
            self.file_bytes |= {name_of(image): image.stat().st_size for image in chosen}
            label = images[0].parent.name if images else ""
            empty = ClassShare.empty(target, label, self.paths.class_texts([label])[label], self.forms_in_use)
            if self.bytes_budget is not None:
                counts = fitting(chosen, self.quotas, self.forms, empty, self.bytes_budget)
            self.classes[target] = ClassExemplars(chosen, counts, empty, own_units)
            self.classes[target].cut(counts)
            self._drop_excess(target)

    def enforce_budget(self) -> None:
        """Drop the last exemplars of each class that are not real until its true cost is within its budget.

        To be called when what `update` had to estimate has been made.
        """
        for target in self.targets:
            self._drop_excess(target)

    def move(self, train: Path) -> None:
        """From now on the exemplars' images are those of the same names in another `train` folder."""
        for exemplars in self.classes.values():
            exemplars.images = [train.joinpath(*name_of(image)) for image in exemplars.images]
        self._units = {}

    def _share(self, images: Sequence[Path], units: float | None = None) -> list[int]:
        """How many exemplars of each form a class has at present; the first image tells what each form costs."""
        if self.total is None or not images:
            return [number for _, number in self.quotas]
        costs = {form: self._costs([(form, images[0])])[0] for form in self.forms_in_use}
        return counts_within(self.total / self._nb_classes if units is None else units, self.quotas, costs)

    def _drop_excess(self, target: int) -> None:
        """Drop a class's last exemplars that are not real until it is within its budget; warn where it is its own."""
        exemplars = self.classes[target]
        taken: list[float]  # by none of the exemplars, by the first one, by two, ...
        if self.bytes_budget is not None:
            limit, words = float(self.bytes_budget), f"{self.bytes_budget:,} bytes"
            taken = [share.bytes for share in self.shares(target, expected=True)]
        else:
            budget = self.budget if exemplars.units is None else exemplars.units
            if budget is None:
                return
            limit, words = budget + ROUNDING, f"{budget:g} units"
            taken = list(accumulate(self._costs(self.of(target)), initial=0.0))
        forms = [form for form, _ in self.of(target)]
        fits = len(forms)
        while fits and taken[fits] > limit and forms[fits - 1] != REAL:
            fits -= 1
        if fits == len(forms):
            return
        label = exemplars.images[0].parent.name
        del exemplars.images[fits:]
        exemplars.cut(exemplars.counts)
        if self.total is None:
            log.warning(
                "class %r: the last %d of %d exemplars are dropped, with them it takes more than its %s",
                *(label, len(forms) - fits, len(forms), words),
            )

    def select(self, target: int, features: Features, m: int) -> list[int]:
        """m indices of a class's rows of features in order of choice; the first m - 1 are the choice of m - 1."""
        return select(self.selection, features, m, seed=(self.seed, target))

    @property
    def budget(self) -> float | None:
        """Units of a class at present; None for no limit and for a budget in bytes."""
        if self.bytes_budget is not None:
            return None
        return self.class_budget if self.total is None else self.total / self._nb_classes

    @property
    def targets(self) -> list[int]:
        """The classes in memory, in target order."""
        return sorted(self.classes)

    def items(self) -> list[Item]:
        """The exemplars as items of a training set, by target, in order of choice; an item's role is its form."""
        return [Item(image, target, form) for target in self.targets for form, image in self.of(target)]

    def of(self, target: int) -> list[tuple[str, Path]]:
        """(form, image) of a class's exemplars in order of choice."""
        exemplars = self.classes[target]
        forms = [form for (form, _), count in zip(self.quotas, exemplars.counts, strict=True) for _ in range(count)]
        return list(zip(forms, exemplars.images, strict=True))

    def evaluation_images(self, target: int) -> list[tuple[Path, float]]:
        """(picture, its weight in the class mean): a real exemplar weighs 1, each of another one's K copies 1/K."""
        pictures = []
        for form, image in self.of(target):
            if form == REAL:
                pictures.append((image, 1.0))
            else:
                pictures += [(self.paths.copy(image, k), 1 / self.copies) for k in range(self.copies)]
        return pictures

    def units(self, target: int) -> float:
        """What a class's exemplars cost, or will cost.  Raises UserError for a form that has no count in units."""
        return sum(self._costs(self.of(target)), start=0.0)

    def _costs(self, exemplars: Sequence[tuple[str, Path]]) -> list[float]:
        """Units of each (form, image)."""
        costs = []
        for form, image in exemplars:
            if (cost := self.cost(form, image)) is None:
                raise UserError(f"the form {form!r} has no count in units: set budget_in to bytes.")
            costs.append(cost)
        return costs

    def cost(self, form: str, image: Path) -> float | None:
        """Units of an exemplar, None where its form has no such count.  They are kept once it has been made."""
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
        shares = [self.classes[target].empty_share]
        for form, image in self.of(target):
            length = (self.forms[form].expected_bytes if expected else self.forms[form].kept_bytes)(image)
            shares.append(shares[-1].plus(form, row_of(form, image, length)))
        return shares

    def bytes(self, target: int) -> int:
        """Those that a class takes in the memory's file, with what has not been made yet."""
        return self.shares(target, expected=True)[-1].bytes

    def report(self) -> dict[str, Any]:
        """What the memory takes, as results.json has it (`utils.results.records.Memory`).

        bytes_total is the memory's file without its header, bytes_names its labels and texts; exemplars that are
        missing have no file on disk, and add no bytes.
        """
        exemplars = [exemplar for target in self.targets for exemplar in self.of(target)]
        shares = [self.shares(target)[-1] for target in self.targets if self.of(target)]
        forms: list[dict[str, Any]] = []
        for form in dict(self.quotas):
            costs = [self.cost(form, image) for own_form, image in exemplars if own_form == form]
            units = None if None in costs else float(sum(cost or 0.0 for cost in costs))
            parts = [part for share in shares for part in share.forms if part.form == form]
            sums = {"bytes": sum(part.bytes for part in parts), "missing": sum(part.missing for part in parts)}
            forms.append({"form": form, "exemplars": len(costs), "units": units, **sums})
        counted = all(form["units"] is not None for form in forms)
        class_units = [self.units(target) for target in self.targets] if counted else []
        names = sum(share.names for share in shares)

        def total(key: str, *, real: bool) -> int:
            return sum(form[key] for form in forms if (form["form"] == REAL) == real)

        budget, nb_classes = self.budget, len(self.targets)
        return {
            "units_per_class_mean": sum(class_units) / max(nb_classes, 1) if counted else None,
            "units_per_class_max": max(class_units, default=0.0) if counted else None,
            "units_total": float(sum(class_units)) if counted else None,
            "units_budget": budget,
            "units_budget_total": budget * nb_classes if self.total is None and budget else self.total,
            "bytes_per_class_max": max(map(self.bytes, self.targets), default=0),
            "bytes_budget": self.bytes_budget,
            "forms": forms,
            "nb_real": total("exemplars", real=True),
            "nb_synthetic": total("exemplars", real=False),
            "bytes_real": total("bytes", real=True),
            "bytes_prompts": total("bytes", real=False),
            "bytes_names": names,
            "bytes_total": sum(form["bytes"] for form in forms) + names,
            "bytes_if_all_real": sum(self.file_bytes[name_of(image)] for _, image in exemplars),
            "edge_maps_missing": total("missing", real=False),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for `torch.load(weights_only=True)`.

        forms: their names in the order of the quotas; classes: for each target, as a string, its images in order of
        choice ("<class>/<file>", undecodable bytes escaped as Python does in paths), their bytes as files, how many
        each form holds, its units where they are not its share, and its text.
        """
        classes: dict[str, dict[str, Any]] = {}
        for target in self.targets:
            exemplars = self.classes[target]
            names = [name_of(image) for image in exemplars.images]
            classes[str(target)] = {
                "images": ["/".join(name) for name in names],
                "file_bytes": [self.file_bytes[name] for name in names],
                "counts": exemplars.counts,
                "text": exemplars.empty_share.text,
            }
            if exemplars.units is not None:
                classes[str(target)]["units"] = exemplars.units
        return {"forms": [form for form, _ in self.quotas], "classes": classes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.  Raises UserError for exemplars of other forms than the quotas have."""
        if state["forms"] != (forms := [form for form, _ in self.quotas]):
            theirs, ours = ", ".join(state["forms"]), ", ".join(forms)
            raise UserError(f"the checkpoint's exemplars have the forms {theirs}, this run's {ours}.")
        train = self.paths.folder("train")
        self.classes, self._units, self.file_bytes = {}, {}, {}
        for target, record in state["classes"].items():
            images = [train / name for name in record["images"]]
            self.file_bytes |= dict(zip(map(name_of, images), record["file_bytes"], strict=True))
            label = images[0].parent.name if images else ""
            empty = ClassShare.empty(int(target), label, record["text"], self.forms_in_use)
            self.classes[int(target)] = ClassExemplars(images, list(record["counts"]), empty, record.get("units"))
        self._nb_classes = max(len(self.classes), 1)


def name_of(image: Path) -> tuple[str, str]:
    """(class, file)."""
    return image.parent.name, image.name
