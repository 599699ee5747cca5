"""Networks that grow from phase to phase.  Each maps B x 3 x H x W to `Outputs`; `grow` readies it for new classes."""

import abc
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from convs.blocks import FeatureExtractor
from convs.heads import BiasLayer, CosineHead, grown, linear_head
from convs.resnet import ResNet, joined, split

NewBackbone = Callable[[], FeatureExtractor]
"""Returns a fresh backbone at each call."""


class Outputs(NamedTuple):
    """logits: B x classes seen; features: B x D, what the head reads; aux_logits: of the newest extractor alone, or
    None; maps: what each stage of the backbone puts out, B x C x H x W, where a method looks at it."""

    logits: Tensor
    features: Tensor
    aux_logits: Tensor | None = None
    maps: Sequence[Tensor] = ()


class Head(Protocol):
    """Features B x in_features -> logits."""

    in_features: int

    def __call__(self, features: Tensor) -> Tensor: ...


class ClassifierNet(nn.Module):
    """B x 3 x H x W -> `Outputs`.  Parts may be frozen, by `requires_grad`."""

    nb_classes: int = 0
    head: Head
    backbone: FeatureExtractor
    frozen_in_eval: bool = True
    """Whether frozen parts stay in evaluation mode, with their batch norm statistics, while others are trained."""

    @property
    def nb_features(self) -> int:
        """D of the features."""
        return self.head.in_features

    def backbones(self) -> list[nn.Module]:
        """The modules with what `freeze_backbone` and `backbone_lrate` are about: all but heads and the like."""
        return [self.backbone]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self.frozen_in_eval:
            return self
        for module in itertools.islice(self.modules(), 1, None):  # the first is the network itself
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self


class GrowingNet(ClassifierNet, abc.ABC):
    """A network that learns more classes from phase to phase."""

    @property
    def evaluated(self) -> ClassifierNet:
        """The network that predicts, chooses exemplars, and whose parameters are counted."""
        return self

    @abc.abstractmethod
    def grow(self, nb_new: int) -> None:
        """Make room for `nb_new` more classes, before a phase.  Draws fresh weights from torch's random state."""

    @abc.abstractmethod
    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        """(backbone, head) after phase 0, with the names that the backbone had before it became part of a method."""


class IncrementalNet(GrowingNet):
    """One backbone and one linear head that grows: what most methods learn."""

    head: nn.Linear

    def __init__(self, backbone: FeatureExtractor):
        super().__init__()
        self.backbone = backbone

    def grow(self, nb_new: int) -> None:
        before = self.head if self.nb_classes else None
        self.nb_classes += nb_new
        self.head = grown(before, self.backbone.feature_dim, self.nb_classes)

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.backbone, self.head

    def forward(self, x: Tensor) -> Outputs:
        features = self.backbone(x)
        return Outputs(self.head(features), features)


class BiasedNet(IncrementalNet):
    """An IncrementalNet whose logits pass through one bias layer for each later phase's classes (BiC)."""

    def __init__(self, backbone: FeatureExtractor):
        super().__init__(backbone)
        self.bias_layers = nn.ModuleList()
        self.sizes: list[int] = []

    def grow(self, nb_new: int) -> None:
        super().grow(nb_new)
        self.bias_layers.append(BiasLayer() if self.sizes else nn.Identity())
        self.sizes.append(nb_new)

    def forward(self, x: Tensor) -> Outputs:
        outputs = super().forward(x)
        parts = zip(self.bias_layers, outputs.logits.split(self.sizes, dim=1), strict=True)
        return outputs._replace(logits=torch.cat([layer(part) for layer, part in parts], dim=1))


class CosineNet(GrowingNet):
    """One backbone, whose stages' outputs are shown, and a cosine head with one or several proxies a class."""

    head: CosineHead

    def __init__(self, backbone: FeatureExtractor, nb_proxies: int = 1):
        super().__init__()
        self.backbone = backbone
        self.head = CosineHead(backbone.feature_dim, nb_proxies)

    def grow(self, nb_new: int) -> None:
        self.nb_classes += nb_new
        self.head.grow(nb_new)

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.backbone, self.head

    def forward(self, x: Tensor) -> Outputs:
        if not isinstance(self.backbone, ResNet):  # a library's
            features = self.backbone(x)
            return Outputs(self.head(features), features)
        maps = self.backbone.feature_maps(x)
        features = maps[-1].mean(dim=(2, 3))
        return Outputs(self.head(features), features, maps=maps)


class ExpandableNet(GrowingNet):
    """Shared blocks, one more extractor in each phase, and a head over the features of all of them.

    shared: what every extractor reads the output of; extractor: phase 0's, from there to B x feature_dim.  A later
    phase's extractor starts from the previous one's weights, and the previous ones are frozen.  From phase 1 on
    `aux_head` tells the new classes and one "old" class apart by the newest extractor's features alone.
    """

    head: nn.Linear

    def __init__(self, shared: nn.Sequential, extractor: nn.Sequential, feature_dim: int):
        super().__init__()
        self.shared = shared
        self.extractors = nn.ModuleList([extractor])
        self.feature_dim = feature_dim
        self.aux_head: nn.Linear | None = None

    def grow(self, nb_new: int) -> None:
        before = self.head if self.nb_classes else None
        if before is not None:
            newest = copy.deepcopy(self.extractors[-1])
            self.extractors[-1].requires_grad_(False).eval()
            self.extractors.append(newest)
            self.aux_head = linear_head(self.feature_dim, nb_new + 1)
        self.nb_classes += nb_new
        self.head = grown(before, self.feature_dim * len(self.extractors), self.nb_classes)

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return joined(self.shared, cast(nn.Sequential, self.extractors[0])), self.head

    def backbones(self) -> list[nn.Module]:
        return [self.shared, self.extractors]

    def forward(self, x: Tensor) -> Outputs:
        # Frozen extractors pass gradients on to trained shared blocks; where nothing is shared, none are computed.
        x = self.shared(x)
        parts = [extractor(x) for extractor in self.extractors]
        features = torch.cat(parts, dim=1)
        return Outputs(self.head(features), features, self.aux_head(parts[-1]) if self.aux_head is not None else None)


def der_net(backbone: FeatureExtractor) -> ExpandableNet:
    """A whole backbone a phase, nothing shared."""
    return ExpandableNet(nn.Sequential(), backbone, backbone.feature_dim)


def memo_net(backbone: ResNet) -> ExpandableNet:
    """Shared early blocks and one specialised last stage a phase."""
    return ExpandableNet(*split(backbone), backbone.feature_dim)
