"""SSRE: Zhu et al., "Self-Sustaining Representation Expansion for Non-Exemplar Class-Incremental Learning", CVPR 2022.

Every 3x3 convolution has a 1x1 adapter beside it.  From phase 1 on only the adapters and the head learn, and after each
phase the adapters are folded into the convolutions.  Images that are like an old class's prototype are held to the old
network's features; the others learn the new classes (prototype selection).

As in PyCIL, an image's likeness is the largest cosine to a prototype, which weighs both losses; the frozen network
stays in evaluation mode; phase 0 has batches of 64; and phase 1 alone has AutoAugment with Cutout (`augmentation:
pycil` leaves that out).  PyCIL means phase 0, but asks for it before it counts the phase up.  Prototypes have no noise,
and the adapters learn in phase 0 too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from convs.blocks import RepConv
from models.networks import IncrementalNet, Outputs
from models.prototypes import PrototypeMethod
from models.training.stages import Stage
from utils.config.schema import Config, setting
from utils.config.types import NonNegative
from utils.data.datasets import Augmentation

FIRST_BATCH_SIZE = 64
"""Of phase 0, where the config's is larger."""


@dataclass
class Settings:
    lambda_fkd: NonNegative = setting(1.0, "weight of the features' distillation", source="PyCIL")
    pycil_only: ClassVar[dict[str, tuple[tuple | None, str]]] = {
        "mode": (("parallel_adapters",), "the backbone has adapters"),
        "threshold": (None, "PyCIL weighs by likeness and does not cut it"),
    }

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if not config.convnet_type.endswith("_rep"):
            yield "convnet_type: ssre needs a backbone with adapters; set it to resnet18_rep"


class SSRE(PrototypeMethod, name="ssre"):
    network: IncrementalNet
    defaults = PrototypeMethod.defaults._replace(weight_decay=5e-4, init_weight_decay=5e-4)

    def stages(self) -> list[Stage]:
        (stage,) = super().stages()
        if self.phase == 0:
            return [stage._replace(batch_size=min(FIRST_BATCH_SIZE, self.config.batch_size))]
        adapters = [module.adapter for module in self.network.modules() if isinstance(module, RepConv)]
        learning = [parameter for adapter in adapters for parameter in adapter.parameters()]
        return [stage._replace(parameters=[*learning, *self.network.head.parameters()])]

    @property
    def augmentation(self) -> Augmentation | None:
        return "autoaugment" if self.phase == 1 and self.config.augmentation not in ("pycil", "none") else None

    def before_batch(self) -> None:
        super().before_batch()
        if self.phase > 0:
            self.chosen = self.fabric.to_device(self.drawn(self.config.batch_size))

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE (1 - s) + lambda_fkd s |features - old features| + lambda_proto CE of prototypes, with s the likeness.

        The first is a mean over images and the second a sum over all of a step, as in PyCIL.
        """
        s = self.settings
        if self.old_network is None:
            return self.classification(outputs.logits, targets)
        old = self.old_outputs(images).features
        with torch.no_grad():
            likeness = F.normalize(outputs.features) @ F.normalize(self.prototypes).T
            likeness = likeness.amax(dim=1)
        each = F.cross_entropy(outputs.logits / s.temp, targets, reduction="none")
        kept = ((outputs.features - old).norm(dim=1) * likeness).sum() / self.share
        replayed = self.classification(self.network.head(self.prototypes[self.chosen]), self.chosen)
        return ((1 - likeness) * each).mean() + s.lambda_fkd * kept + s.lambda_proto * replayed
