"""TagFex: Zheng et al., "Task-Agnostic Guided Feature Expansion for Class-Incremental Learning", CVPR 2025.

DER, with one more backbone that goes on learning in all phases, from two views of each image and without labels
(InfoNCE), held by distillation of the same kind.  What it sees is merged by attention into the newest extractor's
features, and a classifier of the new classes on those teaches the newest extractor.

As in PyCIL: both backbones are of one type; a new extractor is mostly the last one and in part the task-agnostic one,
with fresh running statistics; the classifier teaches only in steps in which its loss is the smaller one; and images are
augmented by AutoAugment and Cutout where the dataset is PyCIL's cifar100_aa (`augmentation: autoaugment`).

InfoNCE compares the images that a process has in a step: with several processes, each compares its own share.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.blocks import FeatureExtractor
from convs.heads import align_weights, linear_head
from convs.resnet import ResNet
from models.losses import newest_or_old
from models.networks import ExpandableNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, NonNegative, Positive, Probability


@dataclass
class Settings:
    init_interpolation_factor: Probability = setting(
        0.95, "part of the last extractor in a new one; the rest is the task-agnostic backbone's", source="PyCIL"
    )
    infonce_temp: Positive = setting(0.2, "temperature of InfoNCE", source="PyCIL")
    infonce_kd_temp: Positive = setting(0.2, "temperature of InfoNCE with the old backbone", source="PyCIL")
    kd_temp: Positive = setting(2.0, "temperature of the transfer to the newest extractor", source="PyCIL")
    proj_hidden_dim: Count = setting(2048, "hidden features of the projector", source="PyCIL")
    proj_output_dim: Count = setting(1024, "features that InfoNCE compares", source="PyCIL")
    attn_num_heads: Count = setting(8, "heads of the attention that merges features", source="PyCIL")
    contrast_factor: NonNegative = setting(1.0, "weight of InfoNCE and its distillation", source="PyCIL")
    contrast_kd_factor: NonNegative = setting(2.0, "weight of the latter in this", source="PyCIL")
    aux_factor: NonNegative = setting(2.0, "weight of the auxiliary loss", source="PyCIL")
    trans_cls_factor: NonNegative = setting(1.0, "weight of the merged features' classifier", source="PyCIL")
    transfer_factor: NonNegative = setting(1.0, "weight of what that teaches", source="PyCIL")
    pycil_only: ClassVar[dict[str, tuple[tuple | None, str]]] = {
        "ta_convnet_type": (None, "as in PyCIL, both backbones are of convnet_type"),
        "aug": ((2,), "InfoNCE compares two views"),
    }

    def check(self, config: Config) -> Iterator[str]:
        """What does not go together with other keys, each message beginning with one."""
        if config.accumulate_batches > 1:
            yield "accumulate_batches: tagfex compares the images of a whole batch; set it to 1"


class Merge(nn.Module):
    """Attention from a place of the newest extractor's map to all places of its and the task-agnostic map."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_ts, self.norm_ta = nn.LayerNorm(width), nn.LayerNorm(width)
        for name in ("query", "key_ts", "key_ta", "value_ts", "value_ta"):
            setattr(self, name, nn.Parameter(nn.init.xavier_normal_(torch.empty(width, width))))

    def forward(self, agnostic: Tensor, specific: Tensor) -> Tensor:
        """Both B x C x H x W -> B x C, the mean over places."""
        ta = self.norm_ta(agnostic.flatten(2).transpose(1, 2))
        ts = self.norm_ts(specific.flatten(2).transpose(1, 2))

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

        keys = torch.cat([split(ta @ self.key_ta), split(ts @ self.key_ts)], dim=2)
        values = torch.cat([split(ta @ self.value_ta), split(ts @ self.value_ts)], dim=2)
        merged = F.scaled_dot_product_attention(split(ts @ self.query), keys, values)
        return merged.transpose(1, 2).flatten(2).mean(dim=1)


class TagFexNet(ExpandableNet):
    """In training mode `maps` are the last ones of the task-agnostic backbone and of the newest extractor."""

    def __init__(self, backbone: FeatureExtractor, agnostic: FeatureExtractor, settings: Settings):
        super().__init__(nn.Sequential(), backbone, backbone.feature_dim)
        width, s = backbone.feature_dim, settings
        self.agnostic, self.settings = agnostic, settings
        hidden = linear_head(width, s.proj_hidden_dim)
        self.projector = nn.Sequential(hidden, nn.ReLU(), linear_head(s.proj_hidden_dim, s.proj_output_dim))
        self.predictor = linear_head(width, width)

    def grow(self, nb_new: int) -> None:
        later = self.nb_classes > 0
        super().grow(nb_new)
        if later:
            self.start_from_both(self.extractors[-1])
        self.merge = Merge(self.feature_dim, self.settings.attn_num_heads)
        self.merged_head = linear_head(self.feature_dim, nb_new)

    @torch.no_grad()
    def start_from_both(self, newest: nn.Module) -> None:
        """newest: a copy of the last extractor, which stays one where backbones are frozen."""
        if not any(parameter.requires_grad for parameter in newest.parameters()):
            return
        for parameter, other in zip(newest.parameters(), self.agnostic.parameters(), strict=True):
            parameter.lerp_(other, 1 - self.settings.init_interpolation_factor)
        for module in newest.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.extractors[0], nn.ModuleList([self.head, self.agnostic, self.projector])

    def backbones(self) -> list[nn.Module]:
        return [self.extractors, self.agnostic]

    def forward(self, x: Tensor) -> Outputs:
        if not self.training:
            return super().forward(x)
        newest_extractor, agnostic = self.extractors[-1], self.agnostic
        assert isinstance(newest_extractor, ResNet)  # needs_stages
        assert isinstance(agnostic, ResNet)
        specific = newest_extractor.feature_maps(x)[-1]
        newest = specific.mean(dim=(2, 3))
        features = torch.cat([*(extractor(x) for extractor in self.extractors[:-1]), newest], dim=1)
        aux_logits = None if self.aux_head is None else self.aux_head(newest)
        maps = (agnostic.feature_maps(x)[-1], specific)
        return Outputs(self.head(features), features, aux_logits, maps)


class TagFex(Method, name="tagfex"):
    network: TagFexNet
    old_network: TagFexNet | None
    defaults = Defaults(epochs=170, milestones=(80, 120, 150))
    keeps_old_network = True
    plain_phase_0 = False
    needs_stages = True
    phase_0_keys = ("infonce_temp", "contrast_factor")

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> TagFexNet:
        return TagFexNet(new_backbone(), new_backbone(), copy.copy(config.settings))

    def stages(self) -> list[Stage]:
        """In phase 0 what distils and merges has nothing to do, and several processes wait for unused gradients."""
        (stage,) = super().stages()
        network, parameters = self.network, None
        if self.phase == 0:
            learning = (network.extractors, network.head, network.agnostic, network.projector)
            parameters = [parameter for module in learning for parameter in module.parameters()]
        return [stage._replace(views=2, parameters=parameters)]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """images: the first views of all images, then the second ones."""
        s, network = self.settings, self.network
        agnostic, specific = outputs.maps
        features = agnostic.mean(dim=(2, 3))
        embedding = network.projector(features)
        classification = F.cross_entropy(outputs.logits, targets)
        contrast = info_nce(embedding, embedding, s.infonce_temp)
        if self.old_network is None:
            return classification + s.contrast_factor * contrast
        assert outputs.aux_logits is not None
        auxiliary = F.cross_entropy(outputs.aux_logits, newest_or_old(targets, self.nb_old))
        kept = self.old_network.projector(network.predictor(features))
        with torch.no_grad():
            old = self.old_network.projector(self.old_network.agnostic(images))
        distilled = info_nce(kept, old, s.infonce_kd_temp)
        part = self.nb_old / self.nb_seen
        contrast = (1 - part) * contrast + part * s.contrast_kd_factor * distilled
        merged = network.merged_head(network.merge(agnostic.detach(), specific))
        merged_loss, transfer = self.transfer(merged, outputs.logits, targets, classification)
        return (
            classification
            + s.aux_factor * auxiliary
            + s.contrast_factor * contrast
            + s.trans_cls_factor * merged_loss
            + s.transfer_factor * transfer
        )

    def transfer(
        self, merged: Tensor, logits: Tensor, targets: Tensor, classification: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The merged features' CE on images of new classes, and KL from there to the head's logits of new classes where
        that CE is below the head's."""
        new = targets >= self.nb_old
        if not new.any():
            return merged.sum() * 0, logits.new_zeros(())
        merged, T = merged[new], self.settings.kd_temp
        loss = F.cross_entropy(merged, targets[new] - self.nb_old)
        if loss >= classification:
            return loss, logits.new_zeros(())
        learns = (logits[new][:, self.nb_old :] / T).log_softmax(dim=1)
        return loss, F.kl_div(learns, (merged.detach() / T).softmax(dim=1), reduction="batchmean")

    def after_training(self) -> None:
        if self.phase > 0:
            align_weights(self.network.head, self.nb_new)


def info_nce(features: Tensor, others: Tensor, temperature: float) -> Tensor:
    """InfoNCE of the first views (the first half of the rows) and the second ones, both 2B x D.

    A row of `features` is to be nearer to its other view's row of `others` than to all but its own, by cosine.
    """
    similarities = F.normalize(features) @ F.normalize(others).T / temperature
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    other_views = torch.arange(len(features), device=features.device).roll(len(features) // 2)
    return F.cross_entropy(similarities.masked_fill(own, -torch.inf), other_views)
