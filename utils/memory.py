"""The exemplar memory: which images of a class are remembered, what each one costs, and what the whole takes on disk.

A real exemplar costs one unit.  A synthetic exemplar keeps its prompt alone, a 1-bit edge map and the class label, and
costs the edge map's bits over its image's bits: 1/24 for an RGB image of the same size (DESIGN section 6, "Budget").
"""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from utils.data_manager import Item
from utils.errors import UserError
from utils.images import image_bits
from utils.paths import DatasetPaths

log = logging.getLogger(__name__)

_TIE = 1e-10  # scores closer than this are the same: rounding differs between equal rows, and between machines
_ROUNDING = 1e-9  # of a sum of costs, in units


def herding(features: np.ndarray | torch.Tensor, m: int) -> list[int]:
    """Indices of m rows in the order in which iCaRL's herding picks them (Rebuffi et al. 2017, Algorithm 4).

    features: n x d, one row per image of a class; rows are L2-normalised here.  Each time, the row is picked that
    brings the mean of the picked closest to the mean of all; each row at most once; of equals, the first.

    Raises ValueError for m outside 0 ... n, and UserError for features that aren't finite.
    """
    if isinstance(features, torch.Tensor):
        features = features.detach().to("cpu", torch.float64).numpy()
    x = np.asarray(features, dtype=np.float64)
    n = len(x)
    if not 0 <= m <= n:
        raise ValueError(f"can't pick {m} of {n}")
    if not np.isfinite(x).all():
        raise UserError("features are not finite numbers: training has diverged. Lower the learning rate.")
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(norms > 0, norms, 1)
    # |mean - (picked + x_i)/k| is least where 2 x_i.(k mean - picked) - |x_i|^2 is greatest: one product per pick,
    # and nothing larger than the features is ever held.
    twice_along_mean = 2 * (x @ x.mean(axis=0))
    score = -(norms[:, 0] > 0).astype(np.float64)
    chosen = []
    for _ in range(m):
        score += twice_along_mean
        best = int(np.argmax(score >= score.max() - _TIE))
        chosen.append(best)
        score -= 2 * (x @ x[best])
        score[best] = -np.inf
    return chosen


def prompt_cost(image: Path, edge_map: Path | None = None) -> float:
    """Units that an image's prompt costs: bits of its edge map over bits of the image, from the headers of both files.

    An edge map has one bit per pixel, also where an older file spends eight on it.  Without an edge map, the cost is
    that of one as large as the image.
    Raises UserError naming a file that can't be read.
    """
    try:
        width, height, depth = image_bits(image)
        if edge_map is None:
            return 1 / depth
        map_width, map_height, _ = image_bits(edge_map)
    except OSError as error:
        raise UserError(f"cannot read image {error}. Replace the file or take it away.") from error
    return map_width * map_height / (width * height * depth)


def check_budget(real: int, synthetic: int, budget: float | None, cost: float = 1 / 24) -> None:
    """Raises UserError, with the arithmetic, where R + S x cost > B.

    real: R; synthetic: S; budget: B in units per class, None for no limit; cost: units of one synthetic exemplar.
    """
    for name, number in (("real_per_class", real), ("syn_per_class", synthetic)):
        if number < 0:
            raise UserError(f"{name} is {number}: it can't be less than 0.")
    units = real + synthetic * cost
    if budget is None or units <= budget + _ROUNDING:
        return
    asked = f"{real} real + {synthetic} synthetic x {Fraction(cost).limit_denominator(10_000)}"
    raise UserError(
        f"over the memory budget of a class: {asked} = {units:.2f} units > {budget:g}. "
        "Lower real_per_class or syn_per_class, or raise memory_per_class."
    )


def check_class_sizes(sizes: Mapping[str, int], real: int, synthetic: int) -> None:
    """Raises UserError where a class has fewer than R + S train images, so that this shows before any training.

    sizes: number of train images by class label.
    """
    short = sorted((count, label) for label, count in sizes.items() if count < real + synthetic)
    if short:
        count, label = short[0]
        more = f" ({len(short)} classes are too small)" if len(short) > 1 else ""
        raise UserError(
            f"class {label!r} has {count} train images, fewer than {real} real + {synthetic} synthetic exemplars{more}."
            " Lower real_per_class or syn_per_class."
        )


class ExemplarMemory:
    """The exemplars of all classes seen, by target.

    paths: the dataset's folders; real_per_class: R; syn_per_class: S; budget: B in units per class, None for no limit;
    augmentations_per_image: K, the copies of each synthetic exemplar.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        real_per_class: int,
        syn_per_class: int,
        budget: float | None,
        augmentations_per_image: int,
    ):
        check_budget(real_per_class, syn_per_class, budget, cost=0)  # what a prompt costs shows class by class
        self.paths = paths
        self.real_per_class = real_per_class
        self.syn_per_class = syn_per_class
        self.budget = budget
        self.augmentations_per_image = augmentations_per_image
        self._real: dict[int, list[Path]] = {}
        self._synthetic: dict[int, list[Path]] = {}
        self._costs: dict[Path, float] = {}  # of prompts whose edge map is on disk

    def add_class(self, target: int, images: Sequence[Path], features: np.ndarray | torch.Tensor) -> None:
        """Choose a class's exemplars by herding: the first R stay real, the next S are kept as prompts.

        images: the class's real train images, n of them; features: n x d, in the same order.
        Raises UserError where n < R + S.
        """
        if target in self._real:
            raise ValueError(f"class {target} is in memory already")
        if len(images) != len(features):
            raise ValueError(f"{len(images)} images, {len(features)} features")
        label = images[0].parent.name if images else str(target)
        check_class_sizes({label: len(images)}, self.real_per_class, self.syn_per_class)
        chosen = [images[i] for i in herding(features, self.real_per_class + self.syn_per_class)]
        self._real[target] = chosen[: self.real_per_class]
        self._synthetic[target] = chosen[self.real_per_class :]
        self.enforce_budget(target)

    def enforce_budget(self, target: int) -> None:
        """Drop the last prompts of a class, with a warning, until its true cost is within the budget.

        `add_class` does so; call it again where edge maps were made only after the exemplars were chosen.
        """
        kept = self._synthetic[target]
        before, label = len(kept), kept[0].parent.name if kept else ""
        while self.budget is not None and kept and self.units(target) > self.budget + _ROUNDING:
            kept.pop()
        if len(kept) < before:
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

        units_per_class_mean, units_per_class_max, units_total, units_budget (per class, None for no limit); nb_real,
        nb_synthetic; bytes_real: the real exemplars' files; bytes_prompts: edge map files and the label text (UTF-8) of
        every prompt; bytes_total: both; bytes_if_all_real: the files of all exemplars, were they all kept as images;
        edge_maps_missing: prompts without an edge map on disk, whose edge maps therefore add no bytes.
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

    def _cost(self, image: Path) -> float:
        if image not in self._costs:
            edge_map = self.paths.find_edge_map(image)
            cost = prompt_cost(image, edge_map)
            if edge_map is None:
                return cost
            self._costs[image] = cost
        return self._costs[image]
