"""EWC: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.

No exemplars: a quadratic penalty holds each weight to its old value, weighted by its Fisher information.

As in PyCIL, the Fisher matrix is computed in training mode: with each batch's own batch norm statistics, and the
running ones move along.  `fisher_mode: eval` computes it with the network that is evaluated, as the paper describes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.losses import among_new, quadratic_penalty
from models.networks import Outputs
from models.training.epochs import parts
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import NonNegative


@dataclass
class Settings:
    ewc_lambda: NonNegative = setting(1000.0, "weight of the penalty", source="PyCIL")
    fishermax: NonNegative = setting(1e-4, "greatest importance of a weight", source="PyCIL")
    fisher_mode: Literal["train", "eval"] = setting(
        "train", "the network's mode for the Fisher matrix; train as in PyCIL, eval as in the paper"
    )

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.precision == "16-mixed":
            yield "precision: in 16-mixed the gradients that ewc squares underflow to 0; take bf16-mixed or 32-true"


class EWC(Method, name="ewc"):
    defaults = Defaults(epochs=180, milestones=(70, 120, 150))
    uses_memory = False

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """Eq. 3: CE over the new classes + lambda/2 sum_i F_i (theta_i - theta*_i)^2."""
        classification = among_new(outputs.logits, targets, self.nb_old)
        if self.phase == 0:
            return classification
        weights = self.weights()
        held = [weights[name] for name in self.state["fisher"]]
        penalty = quadratic_penalty(held, [*self.state["weights"].values()], [*self.state["fisher"].values()])
        return classification + self.settings.ewc_lambda * penalty

    def before_training(self) -> None:
        for kind, tensors in self.state.items():
            self.state[kind] = {name: tensor.to(self.fabric.device) for name, tensor in tensors.items()}

    def after_training(self) -> None:
        """Online, as PyCIL has it: F = a F_old + (1 - a) F_new with a = old classes / all, one F for all phases."""
        fisher = self.fisher()
        for name, old in self.state.get("fisher", {}).items():
            share, rows = self.nb_old / self.nb_seen, fisher[name][: len(old)] if old.dim() else fisher[name]
            rows.mul_(1 - share).add_(share * old)
        weights = {name: tensor.detach().clone() for name, tensor in self.weights().items()}
        self.state = {"fisher": fisher, "weights": weights}

    def weights(self) -> dict[str, Tensor]:
        """Those that learn, by name."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def fisher(self) -> dict[str, Tensor]:
        """The diagonal of the Fisher matrix by parameter: the squared gradient of a batch's mean log-likelihood over
        all classes, averaged over the batches of the new classes' images, at most `fishermax`."""
        schedule = self.schedule()
        stage = Stage("fisher", self.data.new_items(self.phase), schedule)
        loader, sampler = self.run.training_loader(stage, self.phase)
        sampler.set_epoch(schedule.epochs)
        names, weights = zip(*self.weights().items(), strict=True)
        sums = [torch.zeros_like(weight) for weight in weights]
        self.network.train(self.settings.fisher_mode == "train")
        for step, (_, images, targets) in enumerate(loader):
            images, targets = self.run.to_device(images), self.fabric.to_device(targets)
            gradients = [torch.zeros_like(weight) for weight in weights]
            count, sizes = self.config.accumulate_batches, sampler.sizes(step)
            for part in parts(images, targets, count, sizes, self.fabric.world_size):
                with self.fabric.autocast():
                    loss = part.share * F.cross_entropy(self.network(part.images).logits, part.targets)
                for gradient, more in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                    gradient += more
            for total, gradient in zip(sums, self.fabric.all_reduce(gradients, reduce_op="mean"), strict=True):
                total += gradient.square()
        self.run.broadcast_network(self.network)
        return {
            name: (total / len(sampler)).clamp(max=self.settings.fishermax)
            for name, total in zip(names, sums, strict=True)
        }
