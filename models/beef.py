"""BEEF: Wang et al., "BEEF: Bi-Compatible Class-Incremental Learning via Energy-Based Expansion and Fusion", ICLR 2023.

In each phase a new module, a backbone and a head of its own, learns the new classes, one backward prototype for each
earlier phase, and forward prototypes that stand for what is of no class (expansion): images moved towards low energy of
those, by a few noisy gradient steps, are what they learn from.  Then the modules' logits are added up, with a factor
and an offset for each backward prototype, which are learnt on balanced images (fusion).

This is PyCIL's `beefiso`.  As there: phase 0's backbone is where every new one starts; in training the first backbone
is in evaluation mode and later ones are not, so that their running statistics move; earlier heads' biases do not count.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.blocks import FeatureExtractor
from convs.heads import linear_head
from models.networks import GrowingNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Schedule, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, NonNegative, Positive
from utils.data.classes import Item

LANGEVIN_STEPS = 3
LANGEVIN_RATE = 1e-2
LANGEVIN_NOISE = 1e-3


@dataclass
class Settings:
    logits_alignment: Positive = setting(
        1.7, "what backward prototypes' logits are divided by in expansion", source="PyCIL"
    )
    energy_weight: NonNegative = setting(0.01, "weight of the energy loss", source="PyCIL")
    fusion_epochs: Count = setting(60, "epochs of fusion; expansion has epochs", source="PyCIL")
    fusion_lrate: Positive = setting(0.05, "learning rate of fusion", source="PyCIL")
    pycil_only: ClassVar[dict[str, tuple[tuple, str]]] = {
        "is_compress": ((False,), "the network keeps its modules"),
        "reduce_batch_size": ((False,), "batches keep their size"),
    }

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.precision == "16-mixed":
            yield "precision: in 16-mixed beefiso's gradients of images underflow to 0; take bf16-mixed or 32-true"


class EnergyNet(GrowingNet):
    """Backbones and their heads.

    head: what `in_features` is asked of; its rows are the newest backbone's for new classes.  old_weight: all earlier
    modules' heads, fused: old classes x their features.  backward: the newest backbone's rows for earlier phases;
    forward_: its rows for what is of no class, one for each class; factors, offsets: of the backward rows, in fusion.
    """

    head: "_Width"
    forward_: nn.Linear
    old_weight: Tensor

    def __init__(self, backbone: FeatureExtractor):
        super().__init__()
        self.extractors = nn.ModuleList([backbone])
        self.feature_dim = backbone.feature_dim
        self.frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
        self.sizes: list[int] = []
        self.register_buffer("old_weight", torch.zeros(0, 0))
        self.backward_: nn.Linear | None = None

    def grow(self, nb_new: int) -> None:
        if self.nb_classes:
            self.old_weight = self.fused()[0].detach()
            newest = copy.deepcopy(self.extractors[0]).requires_grad_(not self.frozen)
            self.extractors[-1].requires_grad_(False)
            self.extractors.append(newest)
            self.backward_ = linear_head(self.feature_dim, len(self.sizes))
            self.factors = nn.Parameter(torch.zeros(len(self.sizes)))
            self.offsets = nn.Parameter(torch.zeros(len(self.sizes)))
        self.nb_classes += nb_new
        self.forward_ = linear_head(self.feature_dim, self.nb_classes)
        self.new_head = linear_head(self.feature_dim, nb_new)
        self.sizes.append(nb_new)
        self.head = _Width(self.feature_dim * len(self.extractors))

    def train(self, mode: bool = True) -> Self:
        nn.Module.train(self, mode)
        if self.frozen:
            self.extractors.eval()
        elif len(self.extractors) > 1:
            self.extractors[0].eval()
        return self

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.extractors[0], nn.ModuleList([self.new_head, self.forward_])

    def backbones(self) -> list[nn.Module]:
        return [self.extractors]

    def fused(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) over all features and classes."""
        weight: Tensor = self.new_head.weight
        bias: Tensor = self.new_head.bias
        if self.backward_ is not None:
            repeats = torch.tensor(self.sizes[:-1], device=weight.device)
            old = (1 + self.factors[:, None]) * self.backward_.weight
            weight = torch.cat([old.repeat_interleave(repeats, dim=0), weight])
            old = (1 + self.factors) * self.backward_.bias + self.offsets
            bias = torch.cat([old.repeat_interleave(repeats), bias])
            weight = torch.cat([F.pad(self.old_weight, (0, 0, 0, self.sizes[-1])), weight], dim=1)
        return weight, bias

    def module_logits(self, newest: Tensor) -> Tensor:
        """Of the newest module alone, B x (earlier phases + new classes); newest: its features, B x D."""
        new = self.new_head(newest)
        return new if self.backward_ is None else torch.cat([self.backward_(newest), new], dim=1)

    def forward(self, x: Tensor) -> Outputs:
        features = torch.cat([extractor(x) for extractor in self.extractors], dim=1)
        return Outputs(F.linear(features, *self.fused()), features)


class _Width(nn.Module):
    """Tells how many features there are."""

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features


class BEEF(Method, name="beefiso"):
    network: EnergyNet
    defaults = Defaults(epochs=170, weight_decay=5e-4, scheduler="cosine")
    plain_phase_0 = False
    phase_0_keys = ("energy_weight",)

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> EnergyNet:
        return EnergyNet(new_backbone())

    def stages(self) -> Iterator[Stage]:
        """`expansion` of the newest module, then `fusion` of the modules on balanced images."""
        (stage,) = super().stages()
        if self.phase == 0:
            yield stage
            return
        network = self.network
        fused = [network.factors, network.offsets]
        assert network.backward_ is not None
        newest = (network.extractors[-1], network.backward_, network.forward_, network.new_head)
        learning = [parameter for module in newest for parameter in module.parameters()]
        yield stage._replace(name="expansion", parameters=learning)
        s = self.settings
        decay = stage.schedule.weight_decay
        schedule = Schedule(s.fusion_epochs, s.fusion_lrate, None, 1.0, decay, lr_key="fusion_lrate")
        items = self.balanced_items()
        yield Stage("fusion", items, schedule, parameters=fused, loss=self.fusion_loss)

    def balanced_items(self) -> list[Item]:
        """The exemplars, and at random as many images of each new class."""
        exemplars = self.memory.items()
        each = max(Counter(item.target for item in exemplars).values())
        return [*exemplars, *(item for target in range(self.nb_old, self.nb_seen) for item in self.some(target, each))]

    def some(self, target: int, count: int) -> list[Item]:
        """So many of a new class's images, all where there are fewer."""
        items = [Item(image, target, "new") for image in self.data.train_images(target)]
        order = self.run.rng(self.phase, f"fusion, class {target}").permutation(len(items))
        return [items[i] for i in order[:count]]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE of the newest module, to which each earlier phase is one class, + energy_weight energy loss."""
        logits = self.network.module_logits(self.newest(outputs.features))
        labels, earlier = self.module_targets(targets), self.phase
        logits = torch.cat([logits[:, :earlier] / self.settings.logits_alignment, logits[:, earlier:]], dim=1)
        return F.cross_entropy(logits, labels) + self.settings.energy_weight * self.energy_loss(images, targets, labels)

    def fusion_loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    def newest(self, features: Tensor) -> Tensor:
        return features[:, -self.network.feature_dim :]

    def module_targets(self, targets: Tensor) -> Tensor:
        """Phase k for its classes, then the new classes."""
        ends = torch.tensor([self.data.seen_targets(phase).stop for phase in range(self.phase)], device=targets.device)
        phases = torch.bucketize(targets, ends, right=True)
        return torch.where(targets < self.nb_old, phases, targets - self.nb_old + self.phase)

    def energy_loss(self, images: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        """CE of images of low energy, each to the forward prototype of its image's class; the logits of classes that
        the batch has are left out."""
        features = self.newest(self.network(self.low_energy(images)).features)
        logits = torch.cat([self.network.module_logits(features), self.network.forward_(features)], dim=1)
        in_batch = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        in_batch[labels] = True
        nb_classes = logits.shape[1] - self.nb_seen
        return F.cross_entropy(logits.masked_fill(in_batch, 1e-9), nb_classes + targets)

    def low_energy(self, images: Tensor) -> Tensor:
        """The images upside down, after a few steps towards the forward prototypes, with noise.  As in PyCIL a step
        goes against the gradient of the logarithm of their probabilities' sum over the batch."""
        network, extractor = self.network, self.network.extractors[-1]
        x = images.rot90(2, (2, 3)).detach()
        extractor.eval()
        for _ in range(LANGEVIN_STEPS):
            with torch.enable_grad():
                x.requires_grad_(True)
                features = extractor(x)
                logits = torch.cat([network.module_logits(features), network.forward_(features)], dim=1)
                energy = logits.softmax(dim=1)[:, -self.nb_seen :].sum().log()
                (gradient,) = torch.autograd.grad(energy, x)
            x = (x - LANGEVIN_RATE * gradient).detach() + LANGEVIN_NOISE * self.noise(x)
        extractor.train(not network.frozen)
        return x

    def before_batch(self) -> None:
        self.random = self.run.generator(self.phase, self.epoch, self.step)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random, device=like.device, dtype=like.dtype)
