"""RMM: Liu et al., "RMM: Reinforced Memory Management for Class-Incremental Learning", NeurIPS 2021.

The memory is larger than what it is allowed, by images that each phase's new classes give up (level 1), and new classes
that the network finds easy get more exemplars than hard ones (level 2).  The paper learns both rates by reinforcement,
in runs of their own; here they are lists, one number a phase, and those of PyCIL's configs are the default.  The method
beneath is iCaRL or FOSTER.

As in PyCIL: m_rate_list's number for a phase is both how much of the phase's new images is given up, the rest being
drawn with replacement, and how much of a later phase's the memory has beside memory_size after it; the numbers of
phase 0 give up nothing.  Which classes are hard is measured after phase 0 with batch norm in training mode, so that its
running statistics move.  The memory is always one for all classes, of memory_size units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler

from models.foster import FOSTER
from models.icarl import ICaRL
from models.method import Method
from models.run import Run
from utils.config.schema import Config, setting
from utils.config.types import Rates
from utils.data.batches import ImageSet
from utils.data.items import Item


@dataclass
class Settings:
    m_rate_list: Rates | None = setting(
        None,
        "of each phase, the part of new images that is given up for exemplars; the last number repeats; null: PyCIL's "
        "list for 6 phases of CIFAR-100",
        source="PyCIL",
    )
    c_rate_list: Rates = setting(
        [0.0, 0.0, 0.1, 0.1, 0.1, 0.0],
        "of each phase, by how much easy classes get more exemplars and hard ones less; the last number repeats",
        source="PyCIL",
    )

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if not config.memory_size:
            yield "memory_size must be given: rmm has one memory for all classes"
        if config.budget_in == "bytes":
            yield "budget_in: rmm's memory is counted in units"
        for name in ("m_rate_list", "c_rate_list"):
            if getattr(self, name) == []:
                yield f"{name} must have at least one number"


class RMM(Method):
    m_rates: Sequence[float]
    """Where the config has none."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.memory.total = self.config.memory_size
        self.hard: dict[int, bool] = {}

    def m_rate(self, phase: int) -> float:
        return at(self.settings.m_rate_list or self.m_rates, phase)

    def new_items(self) -> list[Item]:
        """Level 1: of each class's images as many as are left, drawn with replacement, in their order."""
        items, rate = super().new_items(), self.m_rate(self.phase)
        if self.phase == 0 or rate == 0:
            return items
        chosen = []
        for target in self.data.phase_targets(self.phase):
            of_class = [item for item in items if item.target == target]
            chosen += [of_class[i] for i in sorted(self.picked(target, len(of_class), int((1 - rate) * len(of_class))))]
        return chosen

    def picked(self, target: int, of: int, count: int) -> list[int]:
        return self.run.rng(self.phase, f"images of class {target}").integers(of, size=count).tolist()

    def after_training(self) -> None:
        super().after_training()
        targets = self.data.phase_targets(self.phase)
        counted = self.state.get("images", [])  # of old classes, whose images may be gone by now
        self.state["images"] = [*counted, *(len(self.data.train_images(target)) for target in targets)]
        self.memory.total = self.units(self.phase)
        losses = [self.mean_loss(self.data.train_images(target), target) for target in targets]
        self.hard = {t: loss > np.median(losses) for t, loss in zip(targets, losses, strict=True)}

    def units(self, phase: int) -> int:
        """The memory after a phase: memory_size and, for what the next one gives up, as many units as images."""
        seen, rate = self.data.seen_targets(phase), self.m_rate(phase)
        if rate == 0:
            return self.config.memory_size
        images = sum(self.state["images"][: seen.stop])
        later = len(self.data.phase_targets(min(1, self.data.nb_phases - 1)))
        return min(images - 1, self.config.memory_size + int(rate * later * self.images_per_class()))

    def images_per_class(self) -> int:
        """Of phase 0's classes."""
        targets = self.data.phase_targets(0)
        return sum(self.state["images"][: targets.stop]) // len(targets)

    def exemplar_units(self, target: int) -> float:
        """Level 2."""
        rate = at(self.settings.c_rate_list, self.phase)
        return float(int(math.floor(self.memory.budget) * (1 + (-rate if self.hard[target] else rate))))

    def mean_loss(self, images: Sequence[Path], target: int) -> float:
        """Cross-entropy of a class's images."""
        logits = self.logits_in_training_mode(images) if self.phase == 0 else None
        if logits is None:
            logits = self.run.predict(self.evaluated, images).logits
        return F.cross_entropy(logits, torch.full((len(images),), target)).item()

    @torch.no_grad()
    def logits_in_training_mode(self, images: Sequence[Path]) -> Tensor:
        dataset = ImageSet(images, [0] * len(images), self.data.test_transform, self.run.pixels)
        batches = BatchSampler(range(len(images)), self.config.batch_size, drop_last=False)
        self.network.train()
        logits = []
        for _, pictures, _ in self.run.loader(dataset, batches):
            with self.fabric.autocast():
                logits.append(self.network(self.run.to_device(pictures)).logits.cpu())
        return torch.cat(logits).to(torch.get_default_dtype())

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        seen = self.data.seen_targets(state["phase"])  # checkpoints of earlier versions have no counts
        self.state.setdefault("images", [len(self.data.train_images(target)) for target in seen])
        self.memory.total = self.units(state["phase"])


class RMMICaRL(RMM, ICaRL, name="rmm-icarl"):
    """RMM on iCaRL."""

    m_rates = (0.8, 0.8, 0.6, 0.6, 0.6, 0.6)


class RMMFOSTER(RMM, FOSTER, name="rmm-foster"):
    """RMM on FOSTER."""

    m_rates = (0.3, 0.3, 0.3, 0.4, 0.4, 0.4)


def at(rates: Sequence[float], phase: int) -> float:
    return rates[min(phase, len(rates) - 1)]
