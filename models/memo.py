"""MEMO: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning", ICLR 2023.

Early blocks hardly differ between phases, so they are shared; only the last stage is specialised, one a phase.
"""

from dataclasses import dataclass
from typing import ClassVar

from convs.resnet import ResNet
from models.der import DER
from models.networks import ExpandableNet, NewBackbone, memo_net
from utils.config.schema import Config


@dataclass
class Settings:
    pycil_only: ClassVar[dict[str, tuple[tuple, str]]] = {
        "train_base": ((True,), "the shared blocks always learn"),
        "train_adaptive": ((False,), "the specialised blocks of earlier phases stay frozen"),
        "alpha_aux": ((1,), "the auxiliary loss has weight 1"),
    }


class MEMO(DER, name="memo"):
    """DER's loss and alignment, on a network that shares its early blocks."""

    stem = "7x7"
    needs_stages = True

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> ExpandableNet:
        backbone = new_backbone()
        assert isinstance(backbone, ResNet)  # needs_stages
        return memo_net(backbone)
