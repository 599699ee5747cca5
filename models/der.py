"""DER: Yan et al., "DER: Dynamically Expandable Representation for Class Incremental Learning", CVPR 2021.

A new extractor for each phase beside the old ones, which are frozen; without the pruning masks, as PyCIL has it.
"""

from torch import Tensor
from torch.nn import functional as F

from convs.heads import align_weights
from models.losses import newest_or_old
from models.networks import ExpandableNet, NewBackbone, Outputs, der_net
from models.training.method import Method
from models.training.stages import Defaults
from utils.config.schema import Config


class DER(Method, name="der"):
    network: ExpandableNet
    defaults = Defaults(epochs=170, milestones=(80, 120, 150))

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> ExpandableNet:
        return der_net(new_backbone())

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over all classes + CE of the auxiliary head, whose class 0 is every old class."""
        classification = F.cross_entropy(outputs.logits, targets)
        if outputs.aux_logits is None:
            return classification
        return classification + F.cross_entropy(outputs.aux_logits, newest_or_old(targets, self.nb_old))

    def after_training(self) -> None:
        """The new classes' bias is taken out as WA does, in place of the paper's second stage."""
        if self.phase > 0:
            align_weights(self.network.head, self.nb_new)
