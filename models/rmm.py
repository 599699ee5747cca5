"""RMM: Liu et al., "RMM: Reinforced Memory Management for Class-Incremental Learning", NeurIPS 2021.

The memory is larger than what it is allowed, by images that each phase's new classes give up (level 1), and new classes
that the network finds easy get more exemplars than hard ones (level 2).  The paper learns both rates by reinforcement,
in runs of their own; here they are lists, one number a phase, and those of PyCIL's configs are the default.  The method
beneath is iCaRL or FOSTER.

As in PyCIL: m_rate_list's number for a phase is both how much of the phase's new images is given up, the rest being
drawn with replacement, and how much of a later phase's the memory has beside memory_size after it; the numbers of
phase 0 give up nothing.  After a phase whose number is 0 the memory is as large as after the phase before.  Which
classes are hard is measured after phase 0 with batch norm in training mode, so that its
running statistics move.  The memory is always one for all classes, of memory_size units.
"""

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
from models.training.method import Method
from models.training.run import Run
from utils.config.schema import Config, setting
from utils.config.types import Rates
from utils.data.batches import ImageSet
from utils.data.classes import Item
from utils.errors import UserError


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
        if not config.memory_size or config.fixed_memory:
            yield "memory_size must be given, and fixed_memory be false: rmm has one memory for all classes"
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
        self.hard: dict[int, bool] = {}

    def m_rate(self, phase: int) -> float:
        return at(self.settings.m_rate_list or self.m_rates, phase)

    def before_training(self) -> None:
        super().before_training()
        if self.phase == 0:  # before any training
            self.check_images()

    def check_images(self) -> None:
        """Raises UserError where a later phase would give up all new images of a class."""
        for phase in range(1, self.data.nb_phases):
            for target in self.data.phase_targets(phase):
                images, rate = len(self.data.train_images(target)), self.m_rate(phase)
                if images and self.nb_left(phase, images) == 0:
                    raise UserError(
                        f"m_rate_list: class {self.data.class_names[target]!r} has {images} train images, of which "
                        f"phase {phase} gives up {rate:.0%}: int({1 - rate:g} x {images}) = 0 are left to train on. "
                        "Lower the rate, or add images."
                    )

    def nb_left(self, phase: int, images: int) -> int:
        """How many of a new class's images are trained on."""
        rate = self.m_rate(phase)
        return images if phase == 0 or rate == 0 else int((1 - rate) * images)

    def new_items(self) -> list[Item]:
        """Level 1: of each class's images as many as are left, drawn with replacement, in their order."""
        items = super().new_items()
        if self.phase == 0 or self.m_rate(self.phase) == 0:
            return items
        chosen = []
        for target in self.data.phase_targets(self.phase):
            class_items = [item for item in items if item.target == target]
            number = self.nb_left(self.phase, len(class_items))
            chosen += [class_items[i] for i in sorted(self.picked(target, len(class_items), number))]
        return chosen

    def picked(self, target: int, of: int, count: int) -> list[int]:
        return self.run.rng(self.phase, f"images of class {target}").integers(of, size=count).tolist()

    def after_training(self) -> None:
        super().after_training()
        targets = self.data.phase_targets(self.phase)
        # kept, since the images of old classes may be gone when a run goes on
        self.state["images"] = [*self.state.get("images", []), *(len(self.data.train_images(t)) for t in targets)]
        self.memory.total = self.units(self.phase)
        losses = [self.mean_loss(self.data.train_images(target), target) for target in targets]
        self.hard = {t: bool(loss > np.median(losses)) for t, loss in zip(targets, losses, strict=True)}

    def units(self, phase: int) -> int:
        """The memory after a phase: memory_size and, for what the next one gives up, as many units as images.

        One less than there are images, as in PyCIL, but at least one for each class.
        """
        seen, rate, size = len(self.data.seen_targets(phase)), self.m_rate(phase), self.config.memory_size
        assert size is not None  # Settings.check
        if rate == 0:
            return self.units(phase - 1) if phase else size
        later = len(self.data.phase_targets(min(1, self.data.nb_phases - 1)))
        wanted = size + int(rate * later * self.images_per_class())
        return min(max(sum(self.state["images"][:seen]) - 1, seen), wanted)

    def images_per_class(self) -> int:
        """Of phase 0's classes."""
        first = self.data.phase_targets(0).stop
        return sum(self.state["images"][:first]) // first

    def exemplar_units(self, target: int) -> float:
        """Level 2.  At least a unit, so that no class is without exemplars."""
        rate = at(self.settings.c_rate_list, self.phase)
        more = -rate if self.hard[target] else rate
        return float(max(1, int(self.equal_share() * (1 + more))))

    def equal_share(self) -> int:
        """Whole units of a class, were all equal."""
        assert self.memory.budget is not None  # the memory has a total
        return int(self.memory.budget)

    def mean_loss(self, images: Sequence[Path], target: int) -> float:
        """Cross-entropy of a class's images."""
        logits = self.logits_in_training_mode(images) if self.phase == 0 else None
        if logits is None:
            logits = self.run.predict(self.evaluated, images).logits
        return F.cross_entropy(logits, torch.full((len(images),), target)).item()

    @torch.no_grad()
    def logits_in_training_mode(self, images: Sequence[Path]) -> Tensor:
        dataset = ImageSet(images, [0] * len(images), self.data.defaults.test_transform, self.run.pixels)
        batches = BatchSampler(range(len(images)), self.config.batch_size, drop_last=False)
        self.network.train()
        logits = []
        for _, pictures, _ in self.run.loader(dataset, batches):
            with self.fabric.autocast():
                logits.append(self.network(self.run.to_device(pictures)).logits.cpu())
        return torch.cat(logits).to(torch.get_default_dtype())

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if "images" not in self.state:  # a checkpoint of an earlier version
            seen = self.data.seen_targets(state["phase"])
            self.state["images"] = [len(self.data.train_images(target)) for target in seen]
        self.memory.total = self.units(state["phase"])


class RMMICaRL(RMM, ICaRL, name="rmm-icarl"):
    """RMM on iCaRL."""

    m_rates = (0.8, 0.8, 0.6, 0.6, 0.6, 0.6)


class RMMFOSTER(RMM, FOSTER, name="rmm-foster"):
    """RMM on FOSTER."""

    m_rates = (0.3, 0.3, 0.3, 0.4, 0.4, 0.4)

    def image_counts(self, items: Sequence[Item]) -> Tensor:
        """As in PyCIL, each old class counts its equal share of the memory, whatever level 2 has given it."""
        counts = super().image_counts(items)
        if self.config.syn_per_class == 0:
            counts[: self.nb_old] = self.equal_share()
        return counts


def at(rates: Sequence[float], phase: int) -> float:
    return rates[min(phase, len(rates) - 1)]
