"""The exemplar memory: which images of a class are remembered, what each one costs, and what the whole takes on disk.

A real exemplar costs one unit.  A synthetic exemplar keeps its prompt alone, a 1-bit edge map and the class label, and
costs the edge map's bits over its image's bits: 1/24 for an RGB image of the same size (DESIGN section 6, "Budget").
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from utils.data.items import Item
from utils.data.paths import DatasetPaths
from utils.memory.budget import ROUNDING, check_budget, check_class_sizes, prompt_cost, share
from utils.memory.selection import SELECTIONS, closest_to_mean, herding

log = logging.getLogger(__name__)


class ExemplarMemory:
    """The exemplars of all classes seen, by target.

    paths: the dataset's folders; real_per_class: R; syn_per_class: S; budget: B in units per class, None for no limit;
    augmentations_per_image: K, the copies of each synthetic exemplar; total: units of all classes together, None where
    each has its own budget; selection: one of `SELECTIONS`; seed: of the random one; cost: tells the units of an
    image's prompt before its edge map is made.

    With a total, n classes have total / n units each and R : S is but a ratio (`share`).  As classes come, each keeps
    the first of its exemplars in the order of choice: real ones that no longer fit become the first of the prompts, and
    the last prompts are forgotten, so that a class holds what it would had it been given its present share at once.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        real_per_class: int,
        syn_per_class: int,
        budget: float | None,
        augmentations_per_image: int,
        *,
        total: float | None = None,
        selection: str = "herding",
        seed: int = 0,
        cost: Callable[[Path], float] | None = None,
    ):
        if selection not in SELECTIONS:
            raise ValueError(f"selection {selection!r} is none of {', '.join(SELECTIONS)}")
        if total is None:
            check_budget(real_per_class, syn_per_class, budget, cost=0)  # what a prompt costs shows class by class
        self.paths = paths
        self.real_per_class = real_per_class
        self.syn_per_class = syn_per_class
        self.total = total
        self.selection = selection
        self.seed = seed
        self._class_budget = budget
        self._nb_classes = 1  # that share the total
        self._cost_to_come = cost
        self.augmentations_per_image = augmentations_per_image
        self._real: dict[int, list[Path]] = {}
        self._synthetic: dict[int, list[Path]] = {}
        self._costs: dict[Path, float] = {}  # of prompts whose edge map is on disk

    def add_class(self, target: int, images: Sequence[Path], features: np.ndarray | torch.Tensor) -> None:
        """Choose a class's exemplars: the first R stay real, the next S are kept as prompts.

        images: the class's real train images, n of them; features: n x d, in the same order.  With a total, call
        `make_room` first; R and S are the class's share, of which a small class has as much as there are images.
        Raises UserError where n < R + S without a total.
        """
        if target in self._real:
            raise ValueError(f"class {target} is in memory already")
        if len(images) != len(features):
            raise ValueError(f"{len(images)} images, {len(features)} features")
        label = images[0].parent.name if images else str(target)
        real, synthetic = self._share(images)
        if self.total is None:
            check_class_sizes({label: len(images)}, real, synthetic)
        chosen = self._select(target, features, min(real + synthetic, len(images)))
        self._keep(target, [images[i] for i in chosen], real)

    def make_room(self, nb_classes: int) -> None:
        """With a total, share it among `nb_classes` from now on; the classes in memory give up what is too much."""
        self._nb_classes = max(nb_classes, 1)
        if self.total is None:
            return
        for target in self.targets:
            chosen = [*self._real[target], *self._synthetic[target]]
            if chosen:
                real, synthetic = self._share(chosen)
                self._keep(target, chosen[: real + synthetic], min(real, len(self._real[target])))

    @property
    def budget(self) -> float | None:
        """Units that a class may take at present; None for no limit."""
        return self._class_budget if self.total is None else self.total / self._nb_classes

    def enforce_budget(self, target: int) -> None:
        """Drop the last prompts of a class until its true cost is within the budget; a warning where it is its own.

        `add_class` does so; call it again where edge maps were made only after the exemplars were chosen.
        """
        kept = self._synthetic[target]
        before, label = len(kept), kept[0].parent.name if kept else ""
        while self.budget is not None and kept and self.units(target) > self.budget + ROUNDING:
            kept.pop()
        if len(kept) < before and self.total is None:
            log.warning(
                "class %r: the last %d of %d prompts are dropped, with them it takes more than its %g units",
                label,
                before - len(kept),
                before,
                self.budget,
            )

    @property
    def targets(self) -> list[int]:
        """The classes in memory, in target order."""
        return sorted(self._real)

    def items(self) -> list[Item]:
        """The exemplars as items of a training set, by target, real ones first."""
        return [
            Item(image, target, role)
            for target in self.targets
            for role, images in (("real", self._real[target]), ("synthetic", self._synthetic[target]))
            for image in images
        ]

    def nb_exemplars(self, target: int) -> int:
        """Number of a class's exemplars, real and synthetic."""
        return len(self._real[target]) + len(self._synthetic[target])

    def evaluation_images(self, target: int) -> list[tuple[Path, float]]:
        """The pictures that stand for a class's exemplars, with their weights in the mean of NME.

        A real exemplar weighs 1, each of a synthetic exemplar's K copies 1/K.
        """
        copies = self.augmentations_per_image
        return [(image, 1.0) for image in self._real[target]] + [
            (self.paths.copy(image, k), 1 / copies) for image in self._synthetic[target] for k in range(copies)
        ]

    def units(self, target: int) -> float:
        """What a class's exemplars cost.  A prompt whose edge map isn't on disk yet counts as large as its image."""
        return len(self._real[target]) + sum(self._cost(image) for image in self._synthetic[target])

    def report(self) -> dict[str, int | float | None]:
        """What the memory takes, in units and in bytes on disk.

        units_per_class_mean, units_per_class_max, units_total, units_budget (per class at present, None for no limit),
        units_budget_total (of all classes in memory); nb_real, nb_synthetic; bytes_real: the real exemplars' files;
        bytes_prompts: edge map files and the label text (UTF-8) of every prompt; bytes_total: both; bytes_if_all_real:
        the files of all exemplars, were they all kept as images; edge_maps_missing: prompts without an edge map on
        disk, whose edge maps therefore add no bytes.
        """
        units = [self.units(target) for target in self.targets]
        real = [image for images in self._real.values() for image in images]
        prompts = [image for images in self._synthetic.values() for image in images]
        edge_maps = [self.paths.find_edge_map(image) for image in prompts]
        texts = self.paths.class_texts()
        bytes_real = sum(image.stat().st_size for image in real)
        bytes_prompts = sum(len(texts[image.parent.name].encode()) for image in prompts)
        bytes_prompts += sum(edge_map.stat().st_size for edge_map in edge_maps if edge_map)
        return {
            "units_per_class_mean": sum(units) / len(units) if units else 0.0,
            "units_per_class_max": max(units, default=0.0),
            "units_total": float(sum(units)),
            "units_budget": self.budget,
            "units_budget_total": self.budget * len(units) if self.total is None and self.budget else self.total,
            "nb_real": len(real),
            "nb_synthetic": len(prompts),
            "bytes_real": bytes_real,
            "bytes_prompts": bytes_prompts,
            "bytes_total": bytes_real + bytes_prompts,
            "bytes_if_all_real": bytes_real + sum(image.stat().st_size for image in prompts),
            "edge_maps_missing": edge_maps.count(None),
        }

    def state_dict(self) -> dict[str, dict[str, list[str]]]:
        """Plain lists of paths relative to the train folder, in order of choice, under "real" and "synthetic" and the
        target as a string: fit for JSON and for `torch.load(weights_only=True)`."""
        train = self.paths.folder("train")
        return {
            kind: {
                str(target): [image.relative_to(train).as_posix() for image in chosen[target]]
                for target in self.targets
            }
            for kind, chosen in (("real", self._real), ("synthetic", self._synthetic))
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Put the memory back as `state_dict` described it; what it held before is forgotten."""
        train = self.paths.folder("train")
        self._real, self._synthetic = (
            {int(target): [train / image for image in images] for target, images in state[kind].items()}
            for kind in ("real", "synthetic")
        )
        self._nb_classes = max(len(self._real), 1)

    def _share(self, images: Sequence[Path]) -> tuple[int, int]:
        """(R, S) of a class at present; images: of the class, the first of which tells what a prompt costs."""
        if self.total is None or not images:
            return self.real_per_class, self.syn_per_class
        return share(self.budget, self.real_per_class, self.syn_per_class, self._cost(images[0]))

    def _select(self, target: int, features: np.ndarray | torch.Tensor, m: int) -> list[int]:
        """m indices in the order of choice; the first m - 1 are the choice of m - 1."""
        if self.selection == "random":
            return np.random.default_rng([self.seed, target]).permutation(len(features))[:m].tolist()
        return (herding if self.selection == "herding" else closest_to_mean)(features, m)

    def _keep(self, target: int, chosen: Sequence[Path], real: int) -> None:
        self._real[target], self._synthetic[target] = list(chosen[:real]), list(chosen[real:])
        self.enforce_budget(target)

    def _cost(self, image: Path) -> float:
        if image not in self._costs:
            edge_map = self.paths.find_edge_map(image)
            cost = prompt_cost(image, edge_map)
            if edge_map is None:
                return self._cost_to_come(image) if self._cost_to_come else cost
            self._costs[image] = cost
        return self._costs[image]
