"""FOSTER: Wang et al., "FOSTER: Feature Boosting and Compression for Class-Incremental Learning", ECCV 2022.

A second backbone learns what the frozen old one misses; then both are distilled into one, which is what is kept and
evaluated (the paper's FOSTER; its FOSTER B4 is the pair before compression).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.heads import align_weights
from models.base import Learner
from models.losses import distillation, effective_number_weights
from models.networks import BoostedNet, Outputs
from models.stages import Defaults, Stage


class FOSTER(Learner, name="foster"):
    defaults = Defaults(epochs=170, weight_decay=5e-4, scheduler="cosine")

    def stages(self) -> list[Stage]:
        (stage,) = super().stages()
        if self.phase == 0:
            return [stage]
        self.counts = torch.bincount(torch.tensor([item.target for item in stage.items]), minlength=self.nb_seen)
        schedule = self.schedule()._replace(epochs=self.config.compression_epochs, weight_decay=0.0)
        return [
            stage._replace(name="boosting", loss=self.boosting_loss),
            Stage("compression", stage.items, schedule, loss=self.compression_loss),
        ]

    def before_stage(self, stage: Stage) -> None:
        """The network of before, grown, is the student; while it waits, the pair takes its place."""
        if stage.name == "boosting":
            self.student, self.network = self.network, BoostedNet(self.network, self.nb_old)
            self.network.to(memory_format=torch.channels_last)
            if self.config.oofc == "az":  # old features say nothing of new classes: zeros that get no gradient stay
                weight, width = self.network.head.weight, self.network.old_head.in_features
                learns = torch.ones_like(weight)
                learns[self.nb_old :, :width] = 0
                weight.data.mul_(learns)
                weight.register_hook(lambda gradient: gradient * learns)
        elif stage.name == "compression":
            if self.config.is_teacher_wa:
                self.align(self.network.head)
            self.old_network = self.network.requires_grad_(False).eval()
            self.network = self.student

    def changing(self) -> dict[str, nn.Module]:
        """While the student learns, its teacher is not what the phase began with either."""
        teacher = {} if self.old_network is None else {"teacher": self.old_network}
        return super().changing() | teacher

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def boosting_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Feature boosting: CE of aligned logits + CE of the new backbone alone + lambda KD on the old classes."""
        weights = self.class_weights(self.config.beta1)
        aligned = F.cross_entropy(outputs.logits / weights, targets)
        enhanced = F.cross_entropy(outputs.aux_logits, targets)
        old_logits = self.network.old_logits(outputs.features)
        old = distillation(outputs.logits[:, : self.nb_old], old_logits, self.config.T)
        return aligned + enhanced + self.config.lambda_okd * old

    def compression_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Balanced distillation: the pair's probabilities, reweighted towards classes of few images."""
        weights = self.class_weights(self.config.beta2)
        return distillation(outputs.logits, self.old_logits(images), self.config.T, weights)

    def after_training(self) -> None:
        if self.phase > 0:
            self.old_network = None
            if self.config.is_student_wa:
                self.align(self.network.head)

    def class_weights(self, beta: float) -> Tensor:
        """One a class seen, on the device."""
        return self.fabric.to_device(effective_number_weights(self.counts, beta))

    @torch.no_grad()
    def align(self, head: nn.Linear) -> None:
        """WA's alignment, with the new classes' norms scaled by wa_value^(old classes / new classes)."""
        align_weights(head, self.nb_new)
        head.weight[-self.nb_new :] *= self.config.wa_value ** (self.nb_old / self.nb_new)
