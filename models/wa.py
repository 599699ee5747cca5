"""WA: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020.

Distillation maintains discrimination among old classes; aligning the head's weights restores fairness to them.
"""

from torch import Tensor
from torch.nn import functional as F

from convs.heads import align_weights
from models.losses import distillation
from models.networks import IncrementalNet, Outputs
from models.training.method import Method
from models.training.stages import Defaults


class WA(Method, name="wa"):
    network: IncrementalNet
    defaults = Defaults(epochs=170, milestones=(60, 100, 140))
    keeps_old_network = True

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """(1 - l) CE + l KD, with l = old classes / all classes."""
        classification = F.cross_entropy(outputs.logits, targets)
        if self.old_network is None:
            return classification
        l = self.nb_old / self.nb_seen  # noqa: E741  (the paper's lambda)
        old = distillation(outputs.logits[:, : self.nb_old], self.old_logits(images), self.config.T)
        return (1 - l) * classification + l * old

    def after_training(self) -> None:
        if self.phase > 0:
            align_weights(self.network.head, self.nb_new)
