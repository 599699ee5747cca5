"""GEM: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NIPS 2017.

Exemplars are not learnt from; they only forbid steps that would make the loss on an earlier phase's exemplars larger.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import Learner
from models.losses import projected
from models.networks import Outputs
from models.stages import Stage


class GEM(Learner):
    milestones = (30, 50)

    def stages(self) -> list[Stage]:
        """Each batch brings `gem_memory_batch` exemplars of every earlier phase along."""
        phases = [self.data.phase_targets(phase) for phase in range(self.phase)]
        exemplars = [[item for item in self.memory.items() if item.target in targets] for targets in phases]
        new, number = self.data.new_items(self.phase), self.config.gem_memory_batch
        return [Stage("training", new, self.schedule(), rehearsed=exemplars, nb_rehearsed=number)]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over all classes, of the new classes' images: one head, where the paper has one a task."""
        return loss_of(outputs.logits, targets, targets >= self.nb_old)

    def backward(self, loss: Tensor, outputs: Outputs, targets: Tensor) -> None:
        """Eq. 8-11: the gradient nearest to the loss's that has no negative product with any phase's."""
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        rows = []
        for phase in range(self.phase):
            classes = self.data.phase_targets(phase)
            memory_loss = loss_of(outputs.logits, targets, (targets >= classes.start) & (targets < classes.stop))
            rows.append(flat(torch.autograd.grad(memory_loss, weights, retain_graph=True)))
        super().backward(loss, outputs, targets)
        if rows:
            memory = self.fabric.all_reduce(torch.stack(rows), reduce_op="mean")
            step = projected(flat([weight.grad for weight in weights]), memory, self.config.gem_margin)
            for weight, part in zip(weights, step.split([weight.numel() for weight in weights]), strict=True):
                weight.grad.copy_(part.view_as(weight))


def loss_of(logits: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    """Cross-entropy of the chosen rows of a batch; 0 where there are none."""
    return F.cross_entropy(logits[chosen], targets[chosen], reduction="sum") / chosen.sum().clamp(min=1)


def flat(tensors) -> Tensor:
    """All numbers of several tensors in a row."""
    return torch.cat([tensor.flatten() for tensor in tensors])
