"""LwF: Li & Hoiem, "Learning without Forgetting", ECCV 2016.

No exemplars: on the new classes' images, the network keeps saying of the old classes what it said before.
"""

from dataclasses import dataclass

from torch import Tensor

from models.losses import among_new, distillation
from models.networks import Outputs
from models.training.method import Method
from models.training.stages import Defaults
from utils.config.schema import setting
from utils.config.types import NonNegative


@dataclass
class Settings:
    lwf_lambda: NonNegative = setting(3.0, "weight of distillation", source="PyCIL")


class LwF(Method, name="lwf"):
    defaults = Defaults(epochs=250, milestones=(60, 120, 180, 220), init_milestones=(60, 120, 160))
    uses_memory = False
    keeps_old_network = True

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over the new classes + lambda KD on the old ones."""
        classification = among_new(outputs.logits, targets, self.nb_old)
        if self.old_network is None:
            return classification
        old = distillation(outputs.logits[:, : self.nb_old], self.old_logits(images), self.config.T)
        return classification + self.settings.lwf_lambda * old
