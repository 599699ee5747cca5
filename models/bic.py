"""BiC: Wu et al., "Large Scale Incremental Learning", CVPR 2019.

A phase is trained with distillation; then two numbers, trained on held-out images of all classes, correct the bias of
the newest logits.

As in PyCIL, this second stage takes the softmax twice and leaves batch norm in training mode, so that its running
statistics move to the held-out images.  `bias_stage: paper` takes it once, with the network in evaluation mode.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from models.losses import balanced
from models.networks import BiasedNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import Fraction
from utils.data.classes import Item
from utils.errors import UserError


@dataclass
class Settings:
    bias_stage: Literal["pycil", "paper"] = setting(
        "pycil", "second stage as in PyCIL (softmax twice, batch norm in training mode), or the paper's"
    )
    split_ratio: Fraction = setting(0.1, "share of the exemplars that is held out for the bias layers", source="PyCIL")


class BiC(Method, name="bic"):
    network: BiasedNet
    defaults = Defaults(
        epochs=170,
        milestones=(60, 100, 140),
        init_epoch=170,
        init_milestones=(60, 100, 140),
        init_weight_decay=2e-4,
    )
    keeps_old_network = True
    least_exemplars = 2  # of each class, one is held out

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> BiasedNet:
        network = BiasedNet(new_backbone())
        # PyCIL's second stage trains the bias layers alone and leaves the rest in training mode
        network.frozen_in_eval = config.settings.bias_stage == "paper" or config.freeze_backbone
        return network

    def stages(self) -> list[Stage]:
        """Section 3: `training` of all but the bias layers, then `bias` of the newest one on held-out items."""
        (stage,) = super().stages()
        if self.phase == 0:
            return [stage]
        trained, held_out = self.split(stage.items)
        parameters = [*self.network.backbone.parameters(), *self.network.head.parameters()]
        return [
            stage._replace(items=trained, parameters=parameters),
            Stage(
                "bias",
                held_out,
                self.schedule(),
                parameters=list(self.network.bias_layers[-1].parameters()),
                loss=self.bias_loss,
            ),
        ]

    def split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """(trained on, held out): of every class as many, split_ratio of the exemplars of the smallest one."""
        fewest = min(Counter(item.target for item in items).values())
        if fewest < 2:
            raise UserError("bic holds images of each class out: it needs at least 2 a class. Raise the budget.")
        share = max(1, int(self.settings.split_ratio * fewest))
        held: set[int] = set()
        taken: Counter[int] = Counter()
        for index in self.run.rng(self.phase, "held out").permutation(len(items)).tolist():
            if taken[items[index].target] < share:
                held.add(index)
                taken[items[index].target] += 1
        return (
            [item for index, item in enumerate(items) if index not in held],
            [item for index, item in enumerate(items) if index in held],
        )

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Eq. 3, on logits as the bias layers leave them."""
        old = None if self.old_network is None else self.old_logits(images)
        return balanced(outputs.logits, targets, old, self.config.T)

    def bias_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Eq. 5: CE of the corrected logits; of their softmax as in PyCIL."""
        paper = self.settings.bias_stage == "paper"
        return F.cross_entropy(outputs.logits if paper else outputs.logits.softmax(dim=1), targets)
