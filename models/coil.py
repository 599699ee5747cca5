"""Coil: Zhou et al., "Co-Transport for Class-Incremental Learning", ACM Multimedia 2021.

Old and new classes are related by optimal transport between their mean features, and classifiers are carried along the
plan: old ones to initialise and guide the new ones (prospective), new ones to recall the old ones (retrospective).

As PyCIL has it: the carried classifiers have the old ones' mean length (its `calibration_term` has no effect), the
prospective term is there in a phase's first epoch only and the retrospective term grows from the second epoch on.
PyCIL's first plan of a phase uses all train images of the old classes, which a class-incremental learner no longer has.
So does `old_class_means: images`, the default; `exemplars` takes those of the memory alone.
PyCIL makes that plan at the end of the phase before, with masses that fit phases of equal size only.  Here it is made
when the new images are there, by the same network, and its masses are uniform; the carried classifiers are the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from models.losses import distillation
from models.networks import CosineNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults
from utils.config.schema import Config, setting
from utils.config.types import NonNegative, Number, Positive

PROSPECTIVE_WEIGHT = 0.001
STEPS_A_PLAN = 30  # how long a plan of the retrospective term is kept


@dataclass
class Settings:
    sinkhorn: Positive = setting(0.464, "regularisation of optimal transport", source="PyCIL")
    norm_term: Annotated[Number, Ge(1)] = setting(3.0, "p of the norm between class means", source="PyCIL")
    calibration_term: Positive = setting(1.5, "no effect, as in PyCIL, whose own code overwrites it", source="PyCIL")
    reg_term: NonNegative = setting(1e-3, "weight of the retrospective transport", source="PyCIL")
    old_class_means: Literal["images", "exemplars"] = setting(
        "images", "a phase's first plan takes means of all old images, as in PyCIL, or of the exemplars"
    )

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.memory_only and self.old_class_means == "images":
            yield "old_class_means: memory_only leaves no old images but the exemplars; set it to exemplars"


class Coil(Method, name="coil"):
    network: CosineNet
    defaults = Defaults(epochs=160, milestones=(80, 120), weight_decay=5e-4, init_epoch=160, init_milestones=(80, 120))
    keeps_old_network = True
    plain_phase_0 = False

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> CosineNet:
        return CosineNet(new_backbone())

    def before_training(self) -> None:
        """Initialise the new classifiers by those of the old classes, carried along the plan."""
        if self.phase == 0:
            return
        exemplars = [image for target in range(self.nb_old) for image, _ in self.memory.evaluation_images(target)]
        self.exemplar_loader = self.run.test_loader(exemplars)
        self.new_loader = self.run.test_loader([item.image for item in self.data.new_items(self.phase)])
        if self.settings.old_class_means == "images":
            old_means = self.image_means(range(self.nb_old))
        else:
            old_means = self.exemplar_means()
        plan = self.plan(old_means)
        *earlier, new = self.network.head.proxies
        with torch.no_grad():
            old = torch.cat(earlier)
            carried = plan.T @ F.normalize(old)
            self.carried = carried * old.norm(dim=1).mean() / carried.norm(dim=1).mean()
            new.copy_(self.carried)

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """(1 - l) CE + l KD + prospective or retrospective KD, with l = old classes / all classes."""
        classification = F.cross_entropy(outputs.logits, targets)
        if self.old_network is None:
            return classification
        T, l = self.config.T, self.nb_old / self.nb_seen  # noqa: E741  (the paper's lambda)
        old_logits, features = self.old_logits(images), F.normalize(outputs.features)
        kept = distillation(outputs.logits[:, : self.nb_old], old_logits, T)
        if self.epoch == 0:
            weight, guide = PROSPECTIVE_WEIGHT, features @ F.normalize(self.carried).T
            transported = distillation(outputs.logits[:, self.nb_old :], guide, T)
        else:
            weight = self.settings.reg_term * (self.epoch / self.schedule().epochs) ** 2
            transported = distillation(features @ F.normalize(self.carried_back()).T, old_logits, T)
        return (1 - l) * classification + l * kept + weight * transported

    def carried_back(self) -> Tensor:
        """The new classifiers carried to the old classes: nb_old x D, by a plan in the present embedding that is made
        anew every 30 steps of an epoch."""
        now, kept = [self.epoch, self.step], self.within_phase
        if self.step % STEPS_A_PLAN == 0 and kept.get("planned") != now:
            plan = self.plan(self.exemplar_means())
            self.network.train()
            with torch.no_grad():
                kept.update(planned=now, carried_back=plan @ F.normalize(self.network.head.proxies[-1]))
        return self.fabric.to_device(kept["carried_back"])

    def plan(self, old_means: Tensor) -> Tensor:
        """The transport plan between old and new classes, nb_old x nb_new; old_means: nb_old x D."""
        s, new_means = self.settings, self.image_means(range(self.nb_old, self.nb_seen), self.new_loader)
        return self.fabric.to_device(sinkhorn(torch.cdist(old_means, new_means, p=s.norm_term), s.sinkhorn))

    def exemplar_means(self) -> Tensor:
        """The mean feature of each old class's exemplars, of unit length: nb_old x D."""
        return self.run.class_means(self.network, range(self.nb_old), loader=self.exemplar_loader)

    def image_means(self, targets: Sequence[int], loader: DataLoader | None = None) -> Tensor:
        """The mean feature of all train images of each class, of unit length: classes x D."""
        images = [self.data.train_images(target) for target in targets]
        features = self.run.features(self.network, images, loader=loader)
        return F.normalize(torch.stack([F.normalize(rows).mean(dim=0) for rows in features]))


def sinkhorn(cost: Tensor, regularisation: float, iterations: int = 1000, tolerance: float = 1e-12) -> Tensor:
    """The entropic transport plan between uniform masses: n x m, rows sum to 1/n and columns to 1/m.

    Cuturi, "Sinkhorn Distances", NIPS 2013: argmin <T, cost> - regularisation * entropy(T), in logarithms.
    cost: n x m; regularisation: above 0.
    """
    n, m = cost.shape
    scaled = -cost.double() / regularisation
    f, g = cost.new_zeros(n, 1, dtype=torch.float64), cost.new_zeros(1, m, dtype=torch.float64)
    for _ in range(iterations):
        f = -math.log(n) - (scaled + g).logsumexp(dim=1, keepdim=True)
        g_new = -math.log(m) - (scaled + f).logsumexp(dim=0, keepdim=True)
        moved, g = (g_new - g).abs().max(), g_new
        if moved < tolerance:
            break
    return (scaled + f + g).exp().to(cost.dtype)
