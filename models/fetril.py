"""FeTrIL: Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning", WACV 2023.

The backbone learns in phase 0 and is fixed afterwards.  A later phase trains the head on features alone: those of the
new classes' images, and for each old class those of the new class whose mean is most alike (by cosine), moved by the
difference of the two means.

As in PyCIL, the head is linear and trained by SGD (the paper's "FeTrIL fc"); phase 0 has AutoAugment with Cutout,
whatever the dataset (`augmentation: pycil` leaves that out); and the paper's classifier, a linear support vector
machine on features of unit length, is trained beside the head in each phase and reported as `svm`.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks import IncrementalNet, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage, divergence
from utils.config.schema import setting
from utils.data.datasets import Augmentation


@dataclass
class Settings:
    svm: bool = setting(True, "train and report PyCIL's second classifier too, a linear SVM; slow for many images")


class FeTrIL(Method, name="fetril"):
    network: IncrementalNet
    defaults = Defaults(epochs=50, lrate=0.05, weight_decay=5e-4, scheduler="cosine")
    uses_memory = False

    @property
    def augmentation(self) -> Augmentation | None:
        return "autoaugment" if self.config.augmentation not in ("pycil", "none") else None

    def stages(self) -> Iterable[Stage]:
        return super().stages() if self.phase == 0 else []

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def after_training(self) -> None:
        """Keep the new classes' means; from phase 1 on train the head."""
        features = self.new_features("features")
        new = torch.stack([rows.mean(dim=0) for rows in features])
        if self.phase == 0:
            self.state["means"] = new
            labels = [torch.full((len(rows),), target) for target, rows in enumerate(features)]
            self.svm = linear_svm(torch.cat(features), torch.cat(labels)) if self.settings.svm else None
            return
        old = self.state["means"]
        nearest = (F.normalize(old) @ F.normalize(new).T).argmax(dim=1).tolist()
        moved = [features[near] - new[near] + mean for near, mean in zip(nearest, old, strict=True)]
        self.state["means"] = torch.cat([old, new])
        targets = [*range(self.nb_old, self.nb_seen), *range(self.nb_old)]
        everything = [*features, *moved]
        labels = [torch.full((len(rows),), t) for t, rows in zip(targets, everything, strict=True)]
        self.train_head(torch.cat(everything), torch.cat(labels))
        self.svm = linear_svm(torch.cat(everything), torch.cat(labels)) if self.settings.svm else None

    def further_scores(self, images: Sequence[Path], outputs: Outputs) -> dict[str, Tensor]:
        if self.svm is None:
            return {}
        weight, bias = self.svm
        return {"svm": F.linear(F.normalize(outputs.features).to(weight), weight, bias)}

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
        if not head.weight.isfinite().all():
            raise divergence(
                "a weight of the head is not finite at the end", self.phase, {schedule.lr_key: schedule.lr}
            )

    def feature_batches(self, epoch: int, count: int) -> Iterator[Tensor]:
        """An epoch's batches of rows of `count` features, shuffled, the same in all processes."""
        order = self.run.rng(self.phase, f"head, epoch {epoch}").permutation(count)
        return iter(self.fabric.to_device(torch.from_numpy(order)).split(self.config.batch_size))


def linear_svm(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """(weight: C x D, bias: C) of a linear SVM, one class against the rest, on features of unit length; None for C = 1.

    features: N x D; targets: N, of 0 ... C-1.  PyCIL's: scikit-learn's LinearSVC with its defaults.
    """
    if targets.max() == 0:
        return None
    from sklearn.svm import LinearSVC  # takes a second to import

    svm = LinearSVC(random_state=42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 1,000 passes are not enough, as with PyCIL
        svm.fit(F.normalize(features).numpy(), targets.numpy())
    weight, bias = torch.from_numpy(svm.coef_), torch.from_numpy(svm.intercept_)
    if len(weight) == 1:  # two classes: one row, positive for the second
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    return weight, bias
