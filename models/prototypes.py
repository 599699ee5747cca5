"""What methods with prototypes share: no exemplars, but the mean feature of each class's images, from its phase on.

Old classes are learnt again from features made of their prototypes, and features are held to the old network's.  The
values are those of PyCIL's PASS, IL2A and SSRE, which train all phases alike, by Adam.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks import IncrementalNet
from models.training.method import Method
from models.training.stages import Defaults, Schedule
from utils.config.schema import setting
from utils.config.types import Count, NonNegative, Positive


@dataclass
class Settings:
    lambda_fkd: NonNegative = setting(10.0, "weight of the features' distillation", source="PyCIL")
    lambda_proto: NonNegative = setting(10.0, "weight of the prototypes' cross-entropy", source="PyCIL")
    temp: Positive = setting(0.1, "what logits are divided by in training", source="PyCIL")
    step_size: Count = setting(
        45, "epochs between decays of the learning rate, where no milestones are given", source="PyCIL"
    )
    gamma: Positive = setting(0.1, "factor of each of these decays", source="PyCIL")


INITIAL = {
    "epochs": "init_epoch",
    "lrate": "init_lr",
    "milestones": "init_milestones",
    "weight_decay": "init_weight_decay",
}
"""Keys of later phases, and the same of phase 0."""


class PrototypeMethod(Method):
    network: IncrementalNet
    defaults = Defaults(
        epochs=101,
        milestones=(45, 90),
        lrate=0.001,
        weight_decay=2e-4,
        init_epoch=101,
        init_milestones=(45, 90),
        init_lr=0.001,
        init_weight_decay=2e-4,
    )
    uses_memory = False
    keeps_old_network = True
    plain_phase_0 = False
    phase_0_keys = ("temp",)

    def schedule(self, *, as_phase_0: bool = False) -> Schedule:
        """Adam.  PyCIL has one schedule for all phases; what the config says of phase 0 replaces it there."""
        c, s, lr_key = self.config, self.settings, "lrate"
        if as_phase_0 or self.phase == 0:
            initial = {key: value for key, name in INITIAL.items() if (value := getattr(c, name)) is not None}
            if "milestones" in initial:
                initial["lrate_decay"] = c.init_lr_decay
            if "lrate" in initial:
                lr_key = "init_lr"
            c = replace(c, **initial)
        schedule = self.defaults.schedule(c, phase_0=False)
        if c.milestones is None and c.scheduler != "cosine":
            schedule = schedule._replace(milestones=(*range(s.step_size, schedule.epochs, s.step_size),), decay=s.gamma)
        return schedule._replace(optimizer="adam", lr_key=lr_key)

    def before_training(self) -> None:
        """From phase 1 on PyCIL passes each batch through the network twice, which moves the running statistics of
        batch norm twice; here it is done once, with the momentum of both steps."""
        if self.phase == 0:
            return
        self.prototypes = self.fabric.to_device(self.state["prototypes"])
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1 - (1 - 0.1) ** 2

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.share = len(images) / self.images_in_step
        return images, targets

    def before_batch(self) -> None:
        """The same numbers in all parts and processes: what they draw is of the whole step."""
        self.random = self.run.rng(self.phase, f"prototypes, epoch {self.epoch}, step {self.step}")

    def after_training(self) -> None:
        """Keep the new classes' prototypes, and what else is measured of their features."""
        features = self.new_features("prototypes")
        new = torch.stack([rows.mean(dim=0) for rows in features])
        self.state["prototypes"] = torch.cat([self.state.get("prototypes", new[:0]), new])
        self.measure(features)

    def measure(self, features: Sequence[Tensor]) -> None:
        """Keep more than the means in `state`.  features: N x D of each new class's images."""

    def class_means(self) -> Tensor:
        return F.normalize(self.state["prototypes"])

    # For the losses

    def classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.settings.temp, targets)

    def distance(self, features: Tensor, old: Tensor) -> Tensor:
        """The norm of how all features of a step differ from the old network's; a part stands for the whole step."""
        return torch.dist(features, old) / math.sqrt(self.share)

    def drawn(self, count: int) -> Tensor:
        """Old classes, uniformly: count."""
        return torch.from_numpy(self.random.integers(self.nb_old, size=count))
