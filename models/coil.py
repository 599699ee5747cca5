"""Coil: Zhou et al., "Co-Transport for Class-Incremental Learning", ACM Multimedia 2021.

Old and new classes are related by optimal transport between their mean features, and classifiers are carried along it:
old ones to start the new ones from (prospective), new ones to remind of the old ones (retrospective).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import Learner
from models.losses import distillation, sinkhorn
from models.networks import Outputs
from models.stages import Defaults


class Coil(Learner, name="coil"):
    defaults = Defaults(epochs=160, milestones=(80, 120), weight_decay=5e-4, init_epoch=160, init_milestones=(80, 120))
    keeps_old_network = True

    def before_training(self) -> None:
        """The plan between old and new class means in the old embedding, and the new classes' start.

        The masses are uniform and the cost is symmetric, so one plan serves both directions.
        """
        if self.phase == 0:
            return
        c, head = self.config, self.network.head
        images = [self.data.train_images(target) for target in range(self.nb_old, self.nb_seen)]
        new = [F.normalize(self.predict(of_class, "class means").features) for of_class in images]
        new_means = F.normalize(torch.stack([rows.mean(dim=0) for rows in new]))
        cost = torch.cdist(self.class_means(range(self.nb_old)), new_means, p=c.norm_term)
        self.plan = self.fabric.to_device(sinkhorn(cost, c.sinkhorn))
        with torch.no_grad():
            old = head.weight[: self.nb_old]
            carried = self.nb_old * self.plan.T @ F.normalize(old)
            self.carried = carried * old.norm(dim=1).mean() / carried.norm(dim=1).mean()
            head.weight[self.nb_old :] = c.calibration_term * self.carried

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """(1 - l) CE + l KD + r (prospective + retrospective KD), with l = old classes / all classes."""
        classification = F.cross_entropy(outputs.logits, targets)
        if self.old_network is None:
            return classification
        l, c = self.nb_old / self.nb_seen, self.config  # noqa: E741  (the paper's lambda)
        old_logits, new_logits = outputs.logits.split([self.nb_old, self.nb_new], dim=1)
        old = distillation(old_logits, self.old_logits(images), c.T)
        with torch.no_grad():
            features = F.normalize(outputs.features)
            new_from_old = features @ F.normalize(self.carried).T
            old_from_new = features @ F.normalize(self.plan @ F.normalize(self.network.head.weight[self.nb_old :])).T
        prospective = distillation(new_logits, new_from_old, c.T)
        retrospective = distillation(old_logits, old_from_new, c.T)
        return (1 - l) * classification + l * old + c.reg_term * (prospective + retrospective)
