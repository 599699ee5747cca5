"""GEM: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NIPS 2017.

The network is trained on the new classes alone.  A step that would increase the loss on an earlier phase's exemplars is
replaced by the nearest one that does not.

As in PyCIL: one head, of which each loss uses the rows of its own phase's classes; the exemplars are augmented once a
phase; all exemplars of a phase make one forward pass, in training mode, before each step (so batch norm uses, and
keeps, their statistics too).  `gem_memory_batch` draws some of them for each step instead, as large images need.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.losses import among_new
from models.networks import Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, NonNegative
from utils.data.batches import seed_sequence
from utils.devices import all_reduce

_MEMORY = 2
"""The stream of random numbers that draws exemplars."""


@dataclass
class Settings:
    gem_margin: NonNegative = setting(
        0.0, "least weight of an earlier phase in a corrected step; the authors' code has 0.5"
    )
    gem_memory_batch: Count | None = setting(
        None, "exemplars of each earlier phase in a step; null: all of them, as in PyCIL"
    )

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.precision == "16-mixed":
            yield "precision: 16-mixed scales gradients, which gem compares with others; take bf16-mixed or 32-true"


class GEM(Method, name="gem"):
    defaults = Defaults(epochs=100, milestones=(30, 60, 80))

    def stages(self) -> list[Stage]:
        return [Stage("training", self.data.new_items(self.phase), self.schedule())]

    def before_stage(self, stage: Stage) -> None:
        """Augment the exemplars of each earlier phase that has some: (its classes, images: N x 3 x H x W of uint8,
        targets: N) each."""
        earlier = [self.data.phase_targets(phase) for phase in range(self.phase)]
        in_memory = {item.target for item in self.memory.items()}
        self.memories = [(targets, *self.pictures(targets)) for targets in earlier if not in_memory.isdisjoint(targets)]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over the new classes."""
        return among_new(outputs.logits, targets, self.nb_old)

    def before_batch(self) -> None:
        """The gradient of each earlier phase's exemplars, P numbers each; of this process's share of them."""
        rank, world_size, weights = self.fabric.global_rank, self.fabric.world_size, self.weights()
        self.memory_gradients = []
        for phase, (classes, images, targets) in enumerate(self.memories):
            chosen = self.exemplars_of_step(phase, len(targets))
            own = chosen[rank::world_size]
            share = world_size * len(own) / len(chosen)
            if not len(own):  # batch norm needs an image; it does not count
                own = chosen[:1]
            x, y = self.run.to_device(images[own]), self.fabric.to_device(targets[own] - classes.start)
            with self.fabric.autocast():
                loss = share * F.cross_entropy(self.network(x).logits[:, classes.start : classes.stop], y)
            self.memory_gradients.append(flat(torch.autograd.grad(loss, weights)))

    def before_step(self) -> None:
        """Eq. 8-11: the gradient nearest to the loss's that has no negative product with any phase's."""
        if not self.memory_gradients:
            return
        weights = self.weights()
        memory = all_reduce(self.fabric, torch.stack(self.memory_gradients), "mean")
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        step = projected(flat(gradients), memory, self.settings.gem_margin)
        for gradient, part in zip(gradients, step.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def pictures(self, targets: range) -> tuple[Tensor, Tensor]:
        """The exemplars of some classes as a training set shows them in its first epoch."""
        items = [item for item in self.memory.items() if item.target in targets]
        dataset, size = self.run.training_set(items, self.phase), self.config.batch_size
        keys = [(0, index) for index in range(len(items))]
        batches = self.run.loader(dataset, [keys[i : i + size] for i in range(0, len(keys), size)])
        images, labels = zip(*((images, labels) for _, images, labels in batches), strict=True)
        return torch.cat(images), torch.cat(labels)

    def exemplars_of_step(self, phase: int, number: int) -> Tensor:
        """Indices of the exemplars of a phase that this step uses, of `number`: the same in every process."""
        wanted = self.settings.gem_memory_batch
        if wanted is None or wanted >= number:
            return torch.arange(number)
        seeds = seed_sequence(self.config.model_seed, self.phase, self.epoch, _MEMORY, self.step, phase)
        return torch.from_numpy(np.random.default_rng(seeds).permutation(number)[:wanted])

    def weights(self) -> list[Tensor]:
        return [weight for weight in self.network.parameters() if weight.requires_grad]


def projected(gradient: Tensor, memory_gradients: Tensor, margin: float = 0.0) -> Tensor:
    """The gradient nearest to `gradient` that increases no memory's loss: GEM's quadratic program.

    Lopez-Paz & Ranzato 2017, eq. 11: g' = G^T v + g, v = argmin 1/2 v^T G G^T v + g^T G^T v, v >= margin.  The paper
    and PyCIL have margin 0; the authors' code has 0.5, which favours the memories.
    gradient g: P; memory_gradients G: K x P.  Where no memory's loss would increase (G g >= 0), g is returned as it is.
    """
    along = memory_gradients @ gradient
    if (along >= 0).all():
        return gradient
    P, q = (memory_gradients @ memory_gradients.T).double().cpu(), along.double().cpu()
    v = torch.full_like(q, margin)
    active = P.diagonal() > 0  # a zero gradient constrains nothing
    for _ in range(10_000):  # cyclic coordinate descent: K is the number of phases, so a sweep costs next to nothing
        before = v.clone()
        for k in active.nonzero()[:, 0].tolist():
            v[k] = max(margin, float(v[k] - (P[k] @ v + q[k]) / P[k, k]))
        if (v - before).abs().max() <= 1e-10 * (1 + v.abs().max()):
            break
    return gradient + memory_gradients.T @ v.to(gradient)


def flat(tensors) -> Tensor:
    """All numbers of several tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])
