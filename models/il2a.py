"""IL2A: Zhu et al., "Class-Incremental Learning via Dual Augmentation", NeurIPS 2021.

Class augmentation: mixtures of two images of different new classes are further classes, one a pair, for as long as the
phase is trained.  Semantic augmentation: old classes are learnt again from their prototypes as if features were drawn
around them with the class's covariance, which is a term in the logits (section 3.2).

No exemplars; a class leaves its mean feature and their covariance, D^2 numbers.  As in PyCIL the features are held to
the old network's by the norm of the difference over the whole batch.  An image's partners are of those that a process
has at a time: of its share of the batch, or of a part (`accumulate_batches`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convs.heads import linear_head
from models.networks import IncrementalNet, NewBackbone, Outputs
from models.prototypes import PrototypeMethod
from utils.config.schema import Config, setting
from utils.config.types import NonNegative

MIXTURES = 4
"""How often a batch is mixed with itself."""
BETA = 20.0
"""Parts of a mixture are drawn from Beta(BETA, BETA); those outside [0.4, 0.6] become halves."""


@dataclass
class Settings:
    ratio: NonNegative = setting(2.5, "width of the semantic augmentation, in covariances", source="PyCIL")


class PairsNet(IncrementalNet):
    """A head with rows for pairs of new classes behind those of all classes; evaluation shows the latter alone."""

    def grow(self, nb_new: int) -> None:
        """The rows of classes stay; those of the last phase's pairs give way to the present one's."""
        known, old = self.nb_classes, self.head if self.nb_classes else None
        self.nb_classes += nb_new
        self.head = linear_head(self.backbone.feature_dim, self.nb_classes + nb_new * (nb_new - 1) // 2)
        if old is not None:
            self.head.to(old.weight.device)
            with torch.no_grad():
                self.head.weight[:known] = old.weight[:known]
                self.head.bias[:known] = old.bias[:known]

    def forward(self, x: Tensor) -> Outputs:
        outputs = super().forward(x)
        return outputs if self.training else outputs._replace(logits=outputs.logits[:, : self.nb_classes])


class IL2A(PrototypeMethod, name="il2a"):
    network: PairsNet

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> PairsNet:
        return PairsNet(new_backbone())

    def before_training(self) -> None:
        super().before_training()
        if self.phase > 0:
            self.covariances = self.fabric.to_device(self.state["covariances"])

    def before_batch(self) -> None:
        super().before_batch()
        if self.phase > 0:
            self.chosen = self.fabric.to_device(self.drawn(self.config.batch_size))

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The images, and mixtures of those whose partners in a permutation are of another class."""
        images, targets = super().prepare(images, targets)
        inputs, labels = [images], [targets]
        for _ in range(MIXTURES):
            partners = self.fabric.to_device(self.permutation(len(images)))
            mixed = targets != targets[partners]
            first, second = images[mixed], images[partners][mixed]
            part = self.fabric.to_device(self.parts(len(first))).to(images.dtype)[:, None, None, None]
            inputs.append(part * first + (1 - part) * second)
            labels.append(self.pairs(targets[mixed], targets[partners][mixed]))
        return torch.cat(inputs).contiguous(memory_format=torch.channels_last), torch.cat(labels)

    def pairs(self, targets: Tensor, others: Tensor) -> Tensor:
        """The labels of pairs of new classes: (0, 1), (0, 2), (1, 2), (0, 3), ... from nb_seen on."""
        larger, smaller = (pick(targets, others) - self.nb_old for pick in (torch.maximum, torch.minimum))
        return self.nb_seen + larger * (larger - 1) // 2 + smaller

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE + lambda_fkd |features - old features| + lambda_proto CE of the prototypes' augmented logits."""
        classification = self.classification(outputs.logits, targets)
        if self.old_network is None:
            return classification
        kept = self.distance(outputs.features, self.old_outputs(images).features)
        replayed = self.classification(self.augmented_logits(), self.chosen)
        return classification + self.settings.lambda_fkd * kept + self.settings.lambda_proto * replayed

    def augmented_logits(self) -> Tensor:
        """Logits of the drawn classes' prototypes, each with ratio/2 (w - w_y)^T Sigma_y (w - w_y) added."""
        head, chosen = self.network.head, self.chosen
        weight = head.weight[: self.nb_seen]
        logits = F.linear(self.prototypes[chosen], weight, head.bias[: self.nb_seen])
        apart = weight - weight[chosen][:, None]  # draws x classes x D
        spread = (apart @ self.covariances[chosen] * apart).sum(dim=2)
        return logits + self.settings.ratio / 2 * spread

    def measure(self, features: Sequence[Tensor]) -> None:
        # a single image has no spread
        covariances = torch.stack([rows.T.cov(correction=min(1, len(rows) - 1)) for rows in features])
        self.state["covariances"] = torch.cat([self.state.get("covariances", covariances[:0]), covariances])

    # What is drawn

    def permutation(self, count: int) -> Tensor:
        return torch.from_numpy(self.random.permutation(count))

    def parts(self, count: int) -> Tensor:
        """The first images' parts in mixtures: count, of [0.4, 0.6]."""
        drawn = self.beta(count)
        return drawn.where((drawn >= 0.4) & (drawn <= 0.6), torch.tensor(0.5, dtype=drawn.dtype))

    def beta(self, count: int) -> Tensor:
        return torch.from_numpy(self.random.beta(BETA, BETA, count))
