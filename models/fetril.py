"""FeTrIL: Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning", WACV 2023.

The backbone learns in phase 0 and is fixed afterwards.  A later phase trains the head on features alone: those of the
new classes' images, and for each old class those of the new class whose mean is most alike (by cosine), moved by the
difference of the two means.

As in PyCIL, the head is linear and trained by SGD.  The paper takes a linear support vector machine, or a head of this
kind (its "FeTrIL fc").  PyCIL adds AutoAugment and Cutout to the images; here that is the dataset's matter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from models.method import Method
from models.networks import Outputs
from models.stages import Defaults, Stage


class FeTrIL(Method, name="fetril"):
    defaults = Defaults(epochs=50, lrate=0.05, weight_decay=5e-4, scheduler="cosine")
    uses_memory = False

    def stages(self) -> list[Stage]:
        return super().stages() if self.phase == 0 else []

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def after_training(self) -> None:
        """Keep the new classes' means; from phase 1 on train the head."""
        images = [self.data.train_images(target) for target in self.data.phase_targets(self.phase)]
        features = list(self.run.features(self.network, images, self.describe("features")))
        new = torch.stack([rows.mean(dim=0) for rows in features])
        if self.phase == 0:
            self.state["means"] = new
            return
        old = self.state["means"]
        nearest = (F.normalize(old) @ F.normalize(new).T).argmax(dim=1).tolist()
        moved = [features[near] - new[near] + mean for near, mean in zip(nearest, old, strict=True)]
        self.state["means"] = torch.cat([old, new])
        targets = [*range(self.nb_old, self.nb_seen), *range(self.nb_old)]
        labels = [torch.full((len(rows),), t) for t, rows in zip(targets, [*features, *moved], strict=True)]
        self.train_head(torch.cat([*features, *moved]), torch.cat(labels))

    def train_head(self, features: Tensor, targets: Tensor) -> None:
        """CE over all classes.  features: N x D, new classes first; targets: N."""
        features, targets = self.fabric.to_device((features, targets))
        schedule, head = self.schedule(), self.network.head
        optimizer = schedule.build_optimizer([*head.parameters()], self.config.momentum)
        scheduler = schedule.scheduler(optimizer)
        for epoch in range(schedule.epochs):
            for rows in self.feature_batches(epoch, len(features)):
                optimizer.zero_grad()
                self.loss(Outputs(head(features[rows]), features[rows]), features[rows], targets[rows]).backward()
                optimizer.step()
            scheduler.step()
        self.network.zero_grad()

    def feature_batches(self, epoch: int, count: int) -> Iterator[Tensor]:
        """An epoch's batches of rows of `count` features, shuffled, the same in all processes."""
        order = self.run.rng(self.phase, f"head, epoch {epoch}").permutation(count)
        return iter(self.fabric.to_device(torch.from_numpy(order)).split(self.config.batch_size))
