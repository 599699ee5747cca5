"""APER with finetuning: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024.

A class is the mean of its features, as in SimpleCIL.  The features are those of two backbones side by side: that of
phase 0, and a copy of it that is tuned on phase 1's classes (the paper's "adapt and merge").  Then nothing learns.

The paper starts from a pretrained backbone and tunes in the first phase.  As in PyCIL, phase 0 trains one from scratch,
with a cosine head that has a scale, and the copy is tuned in phase 1.  There the logits have no scale.  PyCIL has a
weight decay of 0.05 in its config and 1e-8 for the end of the cosine.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.blocks import FeatureExtractor
from convs.heads import CosineHead
from models.networks import GrowingNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Schedule, Stage
from utils.config.schema import Config, setting


@dataclass
class Settings:
    optimizer: Literal["sgd", "adam"] = setting("sgd", "adam: AdamW, as in PyCIL", source="PyCIL")


class ClassMeans(nn.Module):
    """Logits by cosine similarity to class means, which are kept as a buffer; features B x D -> B x classes."""

    means: Tensor

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features
        self.register_buffer("means", torch.zeros(0, in_features))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features), F.normalize(self.means))


class AperNet(GrowingNet):
    """One backbone in phase 0, two from phase 1 on, of which the first is frozen.

    In training mode the logits are those of the newest backbone and a cosine head over the present phase's classes,
    -inf for others.
    """

    head: ClassMeans

    def __init__(self, backbone: FeatureExtractor):
        super().__init__()
        self.width = backbone.feature_dim
        self.extractors = nn.ModuleList([backbone])
        self.head = ClassMeans(self.width)
        self.learner: CosineHead | None = None

    def grow(self, nb_new: int) -> None:
        if self.nb_classes and len(self.extractors) == 1:
            self.extractors.append(copy.deepcopy(self.extractors[0]))
            self.extractors[0].requires_grad_(False).eval()
            means, self.head = self.head.means, ClassMeans(2 * self.width)
            self.head.means = means.repeat(1, 2)  # the copy still has the same features
            self.learner = None
        if self.learner is None:
            self.learner = CosineHead(self.width)
            self.learner.grow(nb_new)
        self.nb_classes += nb_new
        self.head.means = F.pad(self.head.means, (0, 0, 0, nb_new))

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        assert self.learner is not None
        return self.extractors[0], self.learner

    def backbones(self) -> list[nn.Module]:
        return [self.extractors]

    def forward(self, x: Tensor) -> Outputs:
        if self.training and self.learner is not None:
            features = self.extractors[-1](x)
            logits = self.learner(features)
            old = self.nb_classes - logits.shape[1]
            return Outputs(F.pad(logits, (old, 0), value=-torch.inf), features)
        features = torch.cat([extractor(x) for extractor in self.extractors], dim=1)
        return Outputs(self.head(features), features)


class APERFinetune(Method, name="aper_finetune"):
    network: AperNet
    defaults = Defaults(
        epochs=20, lrate=0.005, weight_decay=0.05, init_lr=0.01, init_weight_decay=0.05, scheduler="cosine"
    )
    uses_memory = False
    plain_phase_0 = False

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> AperNet:
        return AperNet(new_backbone())

    def schedule(self, *, as_phase_0: bool = False) -> Schedule:
        schedule = super().schedule(as_phase_0=as_phase_0)._replace(floor=1e-8)
        return schedule._replace(optimizer="adamw") if self.settings.optimizer == "adam" else schedule

    def stages(self) -> Iterable[Stage]:
        """In phase 1 the copy is tuned on the new classes alone."""
        return super().stages() if self.phase <= 1 else []

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def after_training(self) -> None:
        """The new classes' means, of all their images' features."""
        means = torch.stack([rows.mean(dim=0) for rows in self.new_features("class means")])
        self.network.head.means[self.nb_old :] = means.to(self.network.head.means)
