"""PASS: Zhu et al., "Prototype Augmentation and Self-Supervision for Incremental Learning", CVPR 2021.

Each image is learnt in four rotations, each of which is a class of its own.  No exemplars: an old class is learnt again
from its prototype, with Gaussian noise whose width is the mean spread of all classes' features.

As in PyCIL, the logits of evaluation are those of unrotated classes, and a step has as many prototypes as images for
each new class's share of old ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.networks import IncrementalNet, NewBackbone, Outputs
from models.prototypes import PrototypeMethod
from utils.config.schema import Config

ROTATIONS = 4


class RotationNet(IncrementalNet):
    """A head of four rows a class, one for each rotation; in evaluation the logits are those of the first alone."""

    def grow(self, nb_new: int) -> None:
        known = self.nb_classes
        self.nb_classes *= ROTATIONS
        super().grow(ROTATIONS * nb_new)
        self.nb_classes = known + nb_new

    def forward(self, x: Tensor) -> Outputs:
        outputs = super().forward(x)
        return outputs if self.training else outputs._replace(logits=outputs.logits[:, ::ROTATIONS])


class PASS(PrototypeMethod, name="pass"):
    network: RotationNet

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> RotationNet:
        return RotationNet(new_backbone())

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Every image in its four rotations, one after another."""
        images, targets = super().prepare(images, targets)
        turned = torch.stack([images.rot90(k, (2, 3)) for k in range(ROTATIONS)], dim=1)
        labels = ROTATIONS * targets[:, None] + torch.arange(ROTATIONS, device=targets.device)
        return turned.flatten(0, 1).contiguous(memory_format=torch.channels_last), labels.flatten()

    def before_batch(self) -> None:
        super().before_batch()
        if self.phase == 0:
            return
        self.chosen = self.drawn(self.config.batch_size * max(1, self.nb_old // self.nb_new))
        prototypes = self.prototypes[self.chosen]
        self.augmented = prototypes + self.fabric.to_device(self.noise(prototypes)) * self.radius

    def before_training(self) -> None:
        super().before_training()
        if self.phase > 0:
            self.radius = self.state["variances"].mean().sqrt().item()

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE + lambda_fkd |features - old features| + lambda_proto CE of the augmented prototypes."""
        classification = self.classification(outputs.logits, targets)
        if self.old_network is None:
            return classification
        kept = self.distance(outputs.features, self.old_outputs(images).features)
        labels = self.fabric.to_device(ROTATIONS * self.chosen)
        replayed = self.classification(self.network.head(self.augmented), labels)
        return classification + self.settings.lambda_fkd * kept + self.settings.lambda_proto * replayed

    def measure(self, features: Sequence[Tensor]) -> None:
        """The mean variance of each new class's features."""
        # a single image has no spread
        variances = torch.stack([rows.var(dim=0, correction=min(1, len(rows) - 1)).mean() for rows in features])
        self.state["variances"] = torch.cat([self.state.get("variances", variances[:0]), variances])

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers of that shape."""
        return torch.from_numpy(self.random.standard_normal(like.shape)).to(like.dtype)
