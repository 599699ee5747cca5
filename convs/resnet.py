"""ResNets by the names that PyCIL gives them, all from one description.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: sections 4.1 (ImageNet) and 4.2 (CIFAR, depth
6n + 2).  A backbone is an `nn.Sequential` from pictures to features, so that its layers can be walked through, cut
apart (MEMO) and loaded with torchvision's weights: their names are torchvision's.
"""

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import re
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from convs import BACKBONES
from convs.blocks import LINEAR, attend, branch
from convs.pretrained import load_pretrained

_LARGE = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
CONVNETS = BACKBONES


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A of the paper): subsample, then pad with zero channels."""

    def __init__(self, extra_channels: int):
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x (C + extra_channels) x H/2 x W/2."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra_channels))


class ResNet(nn.Sequential):
    """B x 3 x H x W, normalised -> features B x `feature_dim`.

    block: torchvision's BasicBlock or Bottleneck; depths, widths: how many blocks each stage has, and how wide;
    stem: "7x7" (stride 2, then a pool), "3x3" (stride 1, then a pool) or "small" (3x3, stride 1, no pool);
    pad_shortcuts: stages are joined by zero padding (CIFAR) rather than by a 1x1 convolution; last_relu: whether the
    features are rectified; dress: what is done to each block once it is built.

    The children are conv1, bn1, relu, [maxpool,] layer1, ..., layerN, avgpool, flatten.
    """

    def __init__(
        self,
        block,
        depths,
        widths,
        stem: str,
        *,
        pad_shortcuts: bool = False,
        last_relu: bool = True,
        dress: Callable[[nn.Module], None] | None = None,
    ):
        size, stride = (7, 2) if stem == "7x7" else (3, 1)
        channels = widths[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, channels, size, stride, padding=size // 2, bias=False),
            bn1=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
        )
        if stem != "small":
            layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stride = 1 if number == 1 else 2
            last = block if last_relu or number < len(depths) else LINEAR[block]
            layers[f"layer{number}"] = _stage(block, last, channels, width, depth, stride, pad_shortcuts)
            channels = width * block.expansion
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        super().__init__(layers)
        self.feature_dim = channels
        if dress is not None:
            for module in list(self.modules()):
                if isinstance(module, block):
                    dress(module)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """What each stage (layer1, layer2, ...) puts out, B x C x H x W each."""
        maps = []
        for name, layer in self.named_children():
            if name == "avgpool":
                break
            x = layer(x)
            if name.startswith("layer"):
                maps.append(x)
        return maps


def _stage(block, last, channels: int, width: int, depth: int, stride: int, pad_shortcuts: bool) -> nn.Sequential:
    outgoing = width * block.expansion
    shortcut = None
    if stride != 1 or channels != outgoing:
        if pad_shortcuts:
            shortcut = PadShortcut(outgoing - channels)
        else:
            shortcut = nn.Sequential(nn.Conv2d(channels, outgoing, 1, stride, bias=False), nn.BatchNorm2d(outgoing))
    kinds = [block] * (depth - 1) + [last]
    first = kinds[0](channels, width, stride, shortcut)
    return nn.Sequential(first, *(kind(outgoing, width) for kind in kinds[1:]))


def build_backbone(
    convnet_type: str, image_kind: str, *, init_cls: int, increment: int, pretrained: bool = False
) -> ResNet:
    """The backbone of a run, freshly initialised from torch's random state, or with torchvision's weights.

    convnet_type: one of `CONVNETS`; image_kind: "small" (32x32 pictures) or "large".
    Large pictures enter through 7x7 where all phases are equally large and through 3x3 where phase 0 is larger, as the
    class-incremental literature does; torchvision's weights are for 7x7, whatever the phases.
    Raises ValueError for an unknown name or where no such weights fit, FileNotFoundError where they are not there.
    """
    if convnet_type not in CONVNETS:
        raise ValueError(f"unknown convnet_type {convnet_type!r}; known: {', '.join(CONVNETS)}")
    name = convnet_type.removeprefix("memo_")
    last_relu = not name.startswith("cosine_")
    base, _, variant = name.removeprefix("cosine_").partition("_")
    dress = {"cbam": attend, "rep": branch, "": None}[variant]
    if base in _LARGE:
        block, depths = _LARGE[base]
        stem = "7x7" if init_cls == increment or pretrained else "3x3"
        stem = "small" if image_kind == "small" else stem
        backbone = ResNet(block, depths, (64, 128, 256, 512), stem, last_relu=last_relu, dress=dress)
    else:
        depths = [(int(re.sub(r"\D", "", base)) - 2) // 6] * 3
        backbone = ResNet(BasicBlock, depths, (16, 32, 64), "small", pad_shortcuts=True, last_relu=last_relu)
    if pretrained:
        if image_kind == "small":
            raise ValueError("torchvision's weights are for large images, these are small; set pretrained to false")
        load_pretrained(backbone, convnet_type)
    return backbone


def split(backbone: ResNet) -> tuple[nn.Sequential, nn.Sequential]:
    """A backbone as (shared blocks, specialised last stage), as MEMO cuts it.

    The two share the backbone's modules and keep their names; one after the other they compute what the backbone does.
    """
    names = [name for name, _ in backbone.named_children()]
    last = max(number for number, name in enumerate(names) if name.startswith("layer"))
    children = list(backbone.named_children())
    return nn.Sequential(OrderedDict(children[:last])), nn.Sequential(OrderedDict(children[last:]))


def joined(shared: nn.Sequential, last_stage: nn.Sequential) -> nn.Sequential:
    """The inverse of `split`: one module again, over the same tensors and with the backbone's names."""
    return nn.Sequential(OrderedDict([*shared.named_children(), *last_stage.named_children()]))


@torch.no_grad()
def nb_parameters(module: nn.Module) -> int:
    """How many numbers a module has learnt or will learn, frozen ones too."""
    return sum(parameter.numel() for parameter in module.parameters())
