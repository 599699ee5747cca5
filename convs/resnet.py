"""ResNets by PyCIL's names, all from the table in `convs`.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: sections 4.1 (ImageNet) and 4.2 (CIFAR).
A backbone is an `nn.Sequential` from images to features, with torchvision's names of layers and weights, so that its
layers can be walked through, cut apart (MEMO) and loaded with torchvision's weights.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs import BACKBONES, Backbone
from convs.blocks import BLOCKS, EXTRAS, FeatureExtractor
from convs.pretrained import load_pretrained


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A of the paper): subsample, then pad with zero channels."""

    def __init__(self, extra_channels: int):
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x (C + extra_channels) x H/2 x W/2."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra_channels))


class ResNet(FeatureExtractor):
    """B x 3 x H x W, normalised -> features B x `feature_dim`.

    row: its description; stem: "7x7" (stride 2, then a pool), "3x3" (stride 1, then a pool) or "small" (3x3, stride 1,
    no pool).  The children are conv1, bn1, relu, [maxpool,] layer1, ..., layerN, avgpool, flatten.
    """

    def __init__(self, row: Backbone, stem: str):
        size, stride = (7, 2) if stem == "7x7" else (3, 1)
        channels = row.widths[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, channels, size, stride, padding=size // 2, bias=False),
            bn1=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
        )
        if stem != "small":
            layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        for number in range(len(row.depths)):
            layers[f"layer{number + 1}"], channels = _stage(row, number, channels)
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        super().__init__(layers)
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The output of each stage (layer1, layer2, ...), B x C x H x W each."""
        maps = []
        for name, layer in self.named_children():
            if name == "avgpool":
                break
            x = layer(x)
            if name.startswith("layer"):
                maps.append(x)
        return maps


def _stage(row: Backbone, number: int, channels: int) -> tuple[nn.Sequential, int]:
    """A stage's blocks, and the number of channels that come out of it."""
    block, linear = BLOCKS[row.block]
    width, stride = row.widths[number], 1 if number == 0 else 2
    outgoing = width * block.expansion
    shortcut: nn.Module | None = None
    if stride != 1 or channels != outgoing:
        if row.shortcut == "pad":
            shortcut = PadShortcut(outgoing - channels)
        else:
            shortcut = nn.Sequential(nn.Conv2d(channels, outgoing, 1, stride, bias=False), nn.BatchNorm2d(outgoing))
    kinds = [block] * row.depths[number]
    if not row.last_relu and number == len(row.depths) - 1:
        kinds[-1] = linear
    blocks = [kinds[0](channels, width, stride, shortcut), *(kind(outgoing, width) for kind in kinds[1:])]
    for made in blocks:
        EXTRAS[row.extra](made)
    return nn.Sequential(*blocks), outgoing


def build_backbone(
    convnet_type: str,
    image_kind: str,
    stem: str = "3x3",
    pretrained: bool | str = False,
    weights: bool = True,
) -> ResNet:
    """A run's backbone, freshly initialised from torch's random state, or with torchvision's weights.

    convnet_type: a name of `BACKBONES`; image_kind: "small" (32x32) or "large"; stem: for large images, "7x7" or "3x3",
    where the backbone's row has none.  torchvision's weights are for 7x7; pretrained: true for those in torch's cache,
    or a file; weights: false builds the network that they fit and leaves them out.
    Raises ValueError for an unknown name or where no weights fit, FileNotFoundError where they are not on disk.
    """
    if convnet_type not in BACKBONES:
        raise ValueError(f"unknown convnet_type {convnet_type!r}; known: {', '.join(BACKBONES)}")
    row = BACKBONES[convnet_type]
    stem = "7x7" if pretrained else row.stem or stem
    backbone = ResNet(row, "small" if row.cifar or image_kind == "small" else stem)
    if pretrained:
        if row.weights is None:
            raise ValueError(f"torchvision has no weights for {convnet_type}; set pretrained to false")
        if image_kind == "small":
            raise ValueError("torchvision's weights are for large images, these are small; set pretrained to false")
        if weights:
            load_pretrained(backbone, row.weights, Path(pretrained) if isinstance(pretrained, str) else None)
    return backbone


def split(backbone: ResNet) -> tuple[nn.Sequential, nn.Sequential]:
    """A backbone as (shared blocks, specialised last stage), as MEMO cuts it.

    Both use the backbone's own modules and names; one after the other they compute what the backbone does.
    """
    children = list(backbone.named_children())
    last = max(number for number, (name, _) in enumerate(children) if name.startswith("layer"))
    return nn.Sequential(OrderedDict(children[:last])), nn.Sequential(OrderedDict(children[last:]))


def joined(shared: nn.Sequential, last_stage: nn.Sequential) -> nn.Sequential:
    """The inverse of `split`: one module over the same tensors, with the backbone's names."""
    return nn.Sequential(OrderedDict([*shared.named_children(), *last_stage.named_children()]))


@torch.no_grad()
def nb_parameters(module: nn.Module) -> int:
    """The number of a module's parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in module.parameters())
