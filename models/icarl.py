"""iCaRL: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017.

One network; what it knew is distilled into what it learns; classes are told by the nearest mean of their exemplars.
"""

from torch import Tensor
from torch.nn import functional as F

from models.losses import distillation
from models.networks import Outputs
from models.training.method import Method
from models.training.stages import Defaults


class ICaRL(Method, name="icarl"):
    defaults = Defaults(epochs=170, milestones=(80, 120))
    keeps_old_network = True

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Algorithm 3, with softmax for the paper's sigmoids as later work does: CE + KD on the old classes."""
        classification = F.cross_entropy(outputs.logits, targets)
        if self.old_network is None:
            return classification
        return classification + distillation(outputs.logits[:, : self.nb_old], self.old_logits(images), self.config.T)
