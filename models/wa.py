"""WA: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020.

Distillation maintains discrimination among old classes; aligning the head's weights restores fairness to them.
"""

from torch import Tensor

from convs.heads import align_weights
from models.losses import balanced
from models.networks import IncrementalNet, Outputs
from models.training.method import Method
from models.training.stages import Defaults


class WA(Method, name="wa"):
    network: IncrementalNet
    defaults = Defaults(epochs=170, milestones=(60, 100, 140))
    keeps_old_network = True

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        old = None if self.old_network is None else self.old_logits(images)
        return balanced(outputs.logits, targets, old, self.config.T)

    def after_training(self) -> None:
        if self.phase > 0:
            align_weights(self.network.head, self.nb_new)
