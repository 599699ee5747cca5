"""MEMO: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning", ICLR 2023.

Early blocks hardly differ between phases, so they are shared; only the last stage is specialised, one a phase.
"""

from dataclasses import dataclass
from typing import ClassVar

from convs.resnet import ResNet
from models.der import DER
from models.networks import ExpandableNet, memo_net


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

    def build_network(self, backbone: ResNet) -> ExpandableNet:
        return memo_net(backbone)
