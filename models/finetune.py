"""Finetune: the lower bound.  Each phase trains on its new classes and nothing holds the old ones."""

from torch import Tensor

from models.losses import among_new
from models.networks import Outputs
from models.training.method import Method
from models.training.stages import Defaults


class Finetune(Method, name="finetune"):
    defaults = Defaults(epochs=80, milestones=(40, 70))
    uses_memory = False

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over the new classes."""
        return among_new(outputs.logits, targets, self.nb_old)
