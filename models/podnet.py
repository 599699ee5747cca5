"""PODNet: Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020.

The outputs of all stages of the backbone are distilled, pooled along each side; a class has several proxies; at the end
of a phase the network is tuned on as many images of each new class as there are exemplars of an old one.

As PyCIL has it.  `nca: paper` takes the paper's loss, with a margin and a hinge, in place of PyCIL's.  The paper tunes
the classifier alone; PyCIL tunes all but the old classes' proxies.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks import CosineNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Schedule, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, NonNegative, Positive
from utils.data.classes import Item

MARGIN = 0.6  # the paper's delta


@dataclass
class Settings:
    lambda_c_base: NonNegative = setting(5.0, "weight of POD-spatial", source="PyCIL")
    lambda_f_base: NonNegative = setting(1.0, "weight of POD-flat", source="PyCIL")
    nb_proxy: Count = setting(10, "proxies of a class", source="PyCIL")
    nca: Literal["pycil", "paper"] = setting("pycil", "PyCIL's NCA loss, or the paper's (margin and hinge)")
    ft_epochs: Count = setting(20, "epochs of tuning on balanced classes", source="PyCIL")
    ft_lrate: Positive = setting(0.005, "learning rate of that tuning", source="PyCIL")


class PODNet(Method, name="podnet"):
    network: CosineNet
    defaults = Defaults(epochs=160, weight_decay=5e-4, init_epoch=160, scheduler="cosine")
    keeps_old_network = True
    plain_phase_0 = False
    needs_stages = True
    phase_0_keys = ("nca",)

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> CosineNet:
        return CosineNet(new_backbone(), config.settings.nb_proxy)

    def stages(self) -> Iterator[Stage]:
        """`training`, then `balanced`: both of all but the old classes' proxies."""
        (stage,) = super().stages()
        if self.phase == 0:
            yield stage
            return
        s, head = self.settings, self.network.head
        stage = stage._replace(parameters=[*self.network.backbone.parameters(), head.eta, head.proxies[-1]])
        yield stage
        schedule = Schedule(s.ft_epochs, s.ft_lrate, None, 1.0, stage.schedule.weight_decay, lr_key="ft_lrate")
        yield stage._replace(name="balanced", items=self.balanced_items(), schedule=schedule)

    def balanced_items(self) -> list[Item]:
        """The exemplars, and as many images of each new class, chosen like exemplars by the network trained so far."""
        exemplars = self.memory.items()
        each = max(Counter(item.target for item in exemplars).values())
        images = {target: self.data.train_images(target) for target in self.data.phase_targets(self.phase)}
        if "balanced" not in self.within_phase:
            features = self.run.features(self.network, [*images.values()], self.describe("balanced set"))
            self.within_phase["balanced"] = {
                target: self.memory.select(target, rows, min(each, len(rows)))
                for target, rows in zip(images, features, strict=True)
            }
        chosen = self.within_phase["balanced"]
        return [*exemplars, *(Item(images[t][i], t, "new") for t, picked in chosen.items() for i in picked)]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """NCA + f (lambda_c POD-spatial + lambda_f POD-flat), f = sqrt(all classes / new classes)."""
        s = self.settings
        classification = (nca if s.nca == "pycil" else hinged_nca)(outputs.logits, targets)
        if self.old_network is None:
            return classification
        old = self.old_outputs(images)
        spatial = s.lambda_c_base * pod_spatial(outputs.maps, old.maps)
        flat = s.lambda_f_base * pod_flat(outputs.features, old.features)
        return classification + math.sqrt(self.nb_seen / self.nb_new) * (spatial + flat)


def pod_spatial(maps: Sequence[Tensor], old_maps: Sequence[Tensor]) -> Tensor:
    """POD-spatial (section 3.1), the mean over stages and batch.

    maps, old_maps: the output of each stage now and before, B x C x H x W each.  A map's squares are summed over its
    width and over its height; the two sums, B x C(H + W), are scaled to unit length and their distance taken.
    """
    distances = []
    for new, old in zip(maps, old_maps, strict=True):
        pooled = [
            F.normalize(torch.cat([x.sum(dim=3).flatten(1), x.sum(dim=2).flatten(1)], dim=1), dim=1)
            for x in (new.square(), old.square())
        ]
        distances.append((pooled[0] - pooled[1]).norm(dim=1).mean())
    return torch.stack(distances).mean()


def pod_flat(features: Tensor, old_features: Tensor) -> Tensor:
    """POD-flat as the authors' code has it: 1 - cosine of the features now and before, B x D, the mean over the batch.

    At unit length this is half the squared distance.
    """
    return (1 - F.cosine_similarity(features, old_features, dim=1)).mean()


def nca(logits: Tensor, targets: Tensor) -> Tensor:
    """The authors' and PyCIL's NCA loss: m - z_y + log(1 + sum_{i != y} exp(z_i - m)), m = max_i z_i; batch mean.

    Its margin is subtracted from all logits and cancels out, and the right class stays in the sum, as exp(0).
    logits z: B x C; targets y: B.
    """
    shifted = logits - logits.max(dim=1, keepdim=True).values
    right = shifted.gather(1, targets[:, None])
    return (shifted.scatter(1, targets[:, None], 0.0).logsumexp(dim=1) - right[:, 0]).mean()


def hinged_nca(logits: Tensor, targets: Tensor, margin: float = MARGIN) -> Tensor:
    """The paper's NCA loss (section 3.2): [-log(exp(z_y - margin) / sum_{i != y} exp z_i)]_+, the mean over the batch.

    The margin is in units of z: scaled by eta as in the paper's formula, it would drive eta below 0.
    logits z: B x C; targets y: B.
    """
    right = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -1e4)  # finite, so that a single class gives 0 and not NaN
    return (others.logsumexp(dim=1) - right + margin).clamp(min=0).mean()
