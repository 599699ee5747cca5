"""SimpleCIL: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024.

The backbone learns in phase 0 alone, or not at all where it is pretrained; a class is the mean of its features.
Phase 0 learns a cosine head with a scale.  Its rows then give way to the means, and the scale stays, as in PyCIL.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks import CosineNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config


class SimpleCIL(Method, name="simplecil"):
    network: CosineNet
    defaults = Defaults(epochs=1, init_lr=0.01, scheduler="cosine")
    uses_memory = False
    plain_phase_0 = False

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> CosineNet:
        return CosineNet(new_backbone())

    def stages(self) -> Iterable[Stage]:
        return super().stages() if self.phase == 0 else []

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def after_training(self) -> None:
        """The prototypes of the new classes are the means of all their images' features."""
        means = torch.stack([rows.mean(dim=0) for rows in self.new_features("prototypes")])
        with torch.no_grad():
            self.network.head.proxies[-1].copy_(means)
