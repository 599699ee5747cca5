"""Replay: exemplars are trained on beside the new classes' images, and that is all.

Ratcliff, "Connectionist Models of Recognition Memory: Constraints Imposed by Learning and Forgetting Functions",
Psychological Review 1990.
"""

from torch import Tensor
from torch.nn import functional as F

from models.networks import Outputs
from models.training.method import Method
from models.training.stages import Defaults


class Replay(Method, name="replay"):
    defaults = Defaults(epochs=70, milestones=(30, 50))

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over all classes."""
        return F.cross_entropy(outputs.logits, targets)
