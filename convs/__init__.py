"""Backbones and classifier heads.  This file is the table of backbones, plain data that does not import torch."""

from typing import NamedTuple


class Backbone(NamedTuple):
    """What `convs.resnet.build_backbone` builds for a name.

    block: "basic" or "bottleneck"; depths: blocks of each stage; widths: channels of each stage's 3x3 convolutions;
    cifar: a 3x3 stem without a pool whatever the images' size; shortcut: how a stage that changes the shape is joined,
    "conv" (1x1 convolution and batch norm) or "pad" (subsampled, zero channels; no parameters); last_relu: whether the
    features are rectified; extra: "attention" (CBAM) or "adapters" (RepConv) in each block; weights: torchvision's name
    of the network whose ImageNet weights fit; stem: the stem for large images where the phases do not decide it.
    """

    block: str
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    cifar: bool = False
    shortcut: str = "conv"
    last_relu: bool = True
    extra: str | None = None
    weights: str | None = None
    stem: str | None = None


def _cifar(depth: int, shortcut: str = "pad") -> Backbone:
    """Section 4.2 of the ResNet paper: 6n + 2 layers in three stages."""
    return Backbone("basic", ((depth - 2) // 6,) * 3, (16, 32, 64), cifar=True, shortcut=shortcut)


_18 = Backbone("basic", (2, 2, 2, 2), weights="resnet18")
_34 = Backbone("basic", (3, 4, 6, 3), weights="resnet34")
_50 = Backbone("bottleneck", (3, 4, 6, 3), weights="resnet50")

BACKBONES: dict[str, Backbone] = {
    "resnet18": _18,
    "resnet34": _34,
    "resnet50": _50,
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 26, 32, 38, 44, 56, 110)},
    "cosine_resnet18": _18._replace(last_relu=False),
    "cosine_resnet32": _cifar(32, shortcut="conv")._replace(last_relu=False),
    "cosine_resnet34": _34._replace(last_relu=False),
    "cosine_resnet50": _50._replace(last_relu=False),
    "resnet18_cbam": _18,
    "resnet34_cbam": _34,
    "resnet50_cbam": _50._replace(extra="attention"),
    "resnet18_rep": _18._replace(extra="adapters", weights=None),
    "memo_resnet18": _18._replace(stem="7x7"),
    "memo_resnet32": _cifar(32),
}
"""The backbones by PyCIL's names.

cosine_: signed features for heads that compare directions (no ReLU at the end); _cbam: attention in each bottleneck
(PyCIL's basic blocks never apply theirs, so that 18 and 34 compute what the plain ResNets do); _rep: 1x1 adapters
beside the 3x3 convolutions; memo_: for MEMO, with a 7x7 stem for large images whatever the phases.
"""

LIBRARIES = ("torchvision/", "timm/")
"""What the name of a library's network begins with (`convs.library`)."""
