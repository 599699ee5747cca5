"""DS-AL: Zhuang et al., "DS-AL: A Dual-Stream Analytic Learning for Exemplar-Free Class-Incremental Learning", AAAI
2024.

ACIL, and a second stream of tanh features whose head is regressed on what the first one leaves over of the new classes'
targets.  Settings and schedule are PyCIL's for CIFAR-100; it recommends compensation_ratio 1.5 for ImageNet-1000.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.acil import ACIL, AnalyticNet
from models.networks import NewBackbone
from utils.config.schema import Config, setting
from utils.config.types import NonNegative, Positive


@dataclass
class Settings:
    gamma_comp: Positive = setting(0.1, "weight of the second stream's ridge penalty", source="PyCIL")
    compensation_ratio: NonNegative = setting(0.6, "weight of the second stream's logits", source="PyCIL")


class DSAL(ACIL, name="ds-al"):
    network: AnalyticNet

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> AnalyticNet:
        scales = (1.0, config.settings.compensation_ratio)
        return AnalyticNet(new_backbone(), config.settings.buffer_size, [torch.relu, torch.tanh], scales)

    def add(self, features: Tensor, one_hot: Tensor) -> None:
        """The second stream learns the residual of the first one as it is with these images, on the new classes."""
        super().add(features, one_hot)
        self.solve(0)
        residual = one_hot - self.network.logits(features, 0)
        residual[:, : self.nb_old] = 0  # the paper's "previous label cleansing"
        self.add_to_sums(1, self.network.hidden(features, 1), residual, self.settings.gamma_comp)
