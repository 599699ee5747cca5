"""FOSTER: Wang et al., "FOSTER: Feature Boosting and Compression for Class-Incremental Learning", ECCV 2022.

In each phase a second backbone learns what the frozen old network misses (boosting); then the pair is distilled into a
student of one backbone (compression), which is the next phase's old network.

As in PyCIL, the pair is what is evaluated (the paper's FOSTER B4) and what exemplars are chosen by; a phase's record
holds the student's metrics as `student` (the paper's FOSTER).  The weights of boosting and compression count the images
of each class.  PyCIL takes 500 for new classes of "cifar100", where that is their number, and elsewhere the sum of the
images' indices, which is a slip.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.blocks import FeatureExtractor
from convs.heads import align_weights, grown, linear_head
from models.losses import distillation
from models.networks import ClassifierNet, GrowingNet, IncrementalNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, Fraction, NonNegative, Positive
from utils.data.classes import Item


class Pair(ClassifierNet):
    """A frozen network and a second backbone that starts from its weights.

    `head` reads the features of both, old ones first; `aux_head` reads the second backbone's alone.
    """

    head: nn.Linear

    def __init__(self, old: IncrementalNet, nb_new: int):
        super().__init__()
        self.nb_classes, width = old.nb_classes + nb_new, old.head.in_features
        self.old = copy.deepcopy(old).requires_grad_(False)
        self.backbone = copy.deepcopy(old.backbone)
        self.head = grown(old.head, 2 * width, self.nb_classes)
        self.aux_head = linear_head(width, self.nb_classes).to(self.head.weight.device)

    def forward(self, x: Tensor) -> Outputs:
        newest = self.backbone(x)
        features = torch.cat([self.old.backbone(x), newest], dim=1)
        return Outputs(self.head(features), features, self.aux_head(newest))

    def old_logits(self, features: Tensor) -> Tensor:
        """The old network's logits, from the features of both: B x 2D -> B x nb_old."""
        return self.old.head(features[:, : self.old.head.in_features])


class FosterNet(GrowingNet):
    """The student, and from phase 1 on the pair, which is the network that is evaluated.

    compressing: in training mode, whether the student learns, and not the pair.
    """

    def __init__(self, backbone: FeatureExtractor):
        super().__init__()
        self.student = IncrementalNet(backbone)
        self.pair: Pair | None = None
        self.compressing = False

    @property
    def evaluated(self) -> IncrementalNet | Pair:
        """The pair, or phase 0's network."""
        return self.student if self.pair is None else self.pair

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        return self.evaluated.head

    def grow(self, nb_new: int) -> None:
        if self.nb_classes:
            self.pair = Pair(self.student, nb_new)
        self.student.grow(nb_new)
        self.nb_classes = self.student.nb_classes

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.student.first_phase_modules()

    def backbones(self) -> list[nn.Module]:
        return [self.student.backbone] if self.pair is None else [self.student.backbone, self.pair.backbone]

    def forward(self, x: Tensor) -> Outputs:
        return (self.student if self.training and self.compressing else self.evaluated)(x)


@dataclass
class Settings:
    beta1: Fraction = setting(0.96, "how strongly boosting favours classes of few images, 0 to below 1", source="PyCIL")
    beta2: Fraction = setting(0.97, "the same of compression", source="PyCIL")
    lambda_okd: NonNegative = setting(1.0, "weight of distillation while boosting", source="PyCIL")
    oofc: Literal["ft", "az"] = setting(
        "ft", "the new classes' weights on old features: tuned, or all zero", source="PyCIL"
    )
    compression_epochs: Count = setting(130, "epochs of compression; boosting has epochs", source="PyCIL")
    is_teacher_wa: bool = setting(False, "align the head's weights before compression", source="PyCIL")
    is_student_wa: bool = setting(False, "align the head's weights after compression", source="PyCIL")
    wa_value: Positive = setting(
        1.0, "of those alignments, new norms over old ones for each old class a new one", source="PyCIL"
    )


class FOSTER(Method, name="foster"):
    network: FosterNet
    defaults = Defaults(epochs=170, weight_decay=5e-4, scheduler="cosine")

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> FosterNet:
        return FosterNet(new_backbone())

    @property
    def pair(self) -> Pair:
        """From phase 1 on."""
        assert self.network.pair is not None
        return self.network.pair

    def stages(self) -> list[Stage]:
        (stage,) = super().stages()
        if self.phase == 0:
            return [stage]
        counts, pair = self.image_counts(stage.items), self.pair
        s = self.settings
        self.weights = {
            name: self.fabric.to_device(effective_number_weights(counts, beta))
            for name, beta in (("boosting", s.beta1), ("compression", s.beta2))
        }
        boosted = [*pair.backbone.parameters(), *pair.head.parameters(), *pair.aux_head.parameters()]
        return [
            stage._replace(name="boosting", loss=self.boosting_loss, parameters=boosted),
            stage._replace(
                name="compression",
                loss=self.compression_loss,
                parameters=list(self.network.student.parameters()),
                schedule=stage.schedule._replace(epochs=s.compression_epochs, weight_decay=0.0),
            ),
        ]

    def image_counts(self, items: Sequence[Item]) -> Tensor:
        """Train images of each class seen, exemplars for old ones."""
        return torch.bincount(torch.tensor([item.target for item in items]), minlength=self.nb_seen)

    def before_stage(self, stage: Stage) -> None:
        self.network.compressing = stage.name == "compression"
        if stage.name == "boosting" and self.settings.oofc == "az":
            # The new classes' weights on old features are zero; without gradients they stay so.
            weight = self.pair.head.weight
            learns = torch.ones_like(weight)
            learns[self.nb_old :, : self.pair.old.head.in_features] = 0
            weight.data.mul_(learns)
            weight.register_hook(lambda gradient: gradient * learns)
        elif stage.name == "compression" and self.settings.is_teacher_wa:
            self.align(self.pair.head)

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def boosting_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Feature boosting: CE of aligned logits + CE of the new backbone alone + lambda KD on the old classes."""
        aligned = F.cross_entropy(outputs.logits / self.weights["boosting"], targets)
        assert outputs.aux_logits is not None
        enhanced = F.cross_entropy(outputs.aux_logits, targets)
        old_logits = self.pair.old_logits(outputs.features)
        old = distillation(outputs.logits[:, : self.nb_old], old_logits, self.config.T)
        return aligned + enhanced + self.settings.lambda_okd * old

    def compression_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Balanced distillation: the pair's probabilities, reweighted towards classes of few images."""
        with torch.no_grad():
            taught = self.pair(images).logits
        return distillation(outputs.logits, taught, self.config.T, self.weights["compression"])

    def after_training(self) -> None:
        if self.phase > 0 and self.settings.is_student_wa:
            self.align(self.network.student.head)

    def further_scores(self, images: Sequence[Path], outputs: Outputs) -> dict[str, Tensor]:
        if self.phase == 0:
            return {}
        student = self.run.predict(self.network.student, images, self.describe("evaluating the student"))
        return {"student": student.logits}

    @torch.no_grad()
    def align(self, head: nn.Linear) -> None:
        """WA's alignment, with the new classes' norms scaled by wa_value^(old classes / new classes)."""
        align_weights(head, self.nb_new)
        head.weight[-self.nb_new :] *= self.settings.wa_value ** (self.nb_old / self.nb_new)


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """(1 - beta) / (1 - beta^n), scaled to a mean of 1: large for classes of few images.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.
    counts n: C, images of each class; beta: in [0, 1).
    """
    weights = (1 - beta) / (1 - beta ** counts.double().clamp(min=1))
    return (weights / weights.mean()).to(torch.get_default_dtype())
