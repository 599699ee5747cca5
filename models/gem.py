"""GEM: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NIPS 2017.

Exemplars are not learnt from; they only forbid steps that would make the loss on an earlier phase's exemplars larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import Learner
from models.losses import projected
from models.networks import Outputs
from models.stages import Stage
from utils.config.schema import Config


@dataclass
class Settings:
    """GEM's own keys."""

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.precision == "16-mixed":
            yield "precision: 16-mixed scales gradients, which gem compares with others; take bf16-mixed or 32-true"
        if config.compile:
            yield (
                "compile: gem takes several gradients of one pass, which a compiled network does not keep; "
                "set it to false"
            )


class GEM(Learner, name="gem"):
    milestones = (30, 50)

    def stages(self) -> list[Stage]:
        """Each batch brings `gem_memory_batch` exemplars of every earlier phase along."""
        phases = [self.data.phase_targets(phase) for phase in range(self.phase)]
        exemplars = [[item for item in self.memory.items() if item.target in targets] for targets in phases]
        new, number = self.data.new_items(self.phase), self.config.gem_memory_batch
        self.rehearsed = [min(number, len(group)) for group in exemplars]
        return [Stage("training", new, self.schedule(), rehearsed=exemplars, nb_rehearsed=number)]

    def before_stage(self, stage: Stage) -> None:
        self.memory_gradients: list[Tensor | float] = [0.0] * self.phase

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over all classes, of the new classes' images: one head, where the paper has one a task."""
        new = self.nb_images - sum(self.rehearsed)
        return mean_of(range(self.nb_old, self.nb_seen), new / self.nb_images, outputs.logits, targets)

    def backward(self, loss: Tensor, outputs: Outputs, targets: Tensor, share: float) -> None:
        """Beside the loss's gradient, that of each earlier phase's exemplars."""
        weights = self.weights()
        for phase, number in enumerate(self.rehearsed):
            classes, rate = self.data.phase_targets(phase), number / self.nb_images
            memory_loss = share * mean_of(classes, rate, outputs.logits, targets)
            self.memory_gradients[phase] += flat(torch.autograd.grad(memory_loss, weights, retain_graph=True))
        super().backward(loss, outputs, targets, share)

    def before_step(self) -> None:
        """Eq. 8-11: the gradient nearest to the loss's that has no negative product with any phase's."""
        if self.phase == 0:
            return
        weights = self.weights()
        memory = self.fabric.all_reduce(torch.stack(self.memory_gradients), reduce_op="mean")
        self.memory_gradients = [0.0] * self.phase
        step = projected(flat([weight.grad for weight in weights]), memory, self.config.gem_margin)
        for weight, part in zip(weights, step.split([weight.numel() for weight in weights]), strict=True):
            weight.grad.copy_(part.view_as(weight))

    def weights(self) -> list[Tensor]:
        """All that is learnt."""
        return [weight for weight in self.network.parameters() if weight.requires_grad]


def mean_of(classes: range, rate: float, logits: Tensor, targets: Tensor) -> Tensor:
    """CE of those images that are of some classes, as they are of the batch's images at this rate (0: of none).

    Scaled so that its mean over all images of a batch, in however many parts, is the mean over those of the classes.
    """
    chosen = (targets >= classes.start) & (targets < classes.stop)
    sum_of_losses = F.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
    return sum_of_losses / (rate * len(targets) or 1.0)


def flat(tensors) -> Tensor:
    """All numbers of several tensors in a row."""
    return torch.cat([tensor.flatten() for tensor in tensors])
