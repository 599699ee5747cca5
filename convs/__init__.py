"""Backbones and classifier heads.  This file has the names of the backbones and does not import torch."""

_LARGE = ("resnet18", "resnet34", "resnet50")
_CIFAR = ("resnet8", "resnet14", "resnet20", "resnet26", "resnet32", "resnet38", "resnet44", "resnet56", "resnet110")
_VARIANTS = (
    *("cosine_resnet18", "cosine_resnet32", "cosine_resnet34", "cosine_resnet50"),
    *("resnet18_cbam", "resnet34_cbam", "resnet50_cbam", "resnet18_rep", "memo_resnet18", "memo_resnet32"),
)

BACKBONES = (*_LARGE, *_CIFAR, *_VARIANTS)
"""The backbones that `convs.resnet.build_backbone` knows.

cosine_: no ReLU at the end, for heads that compare directions; _cbam: attention in every block; _rep: 1x1 branches
beside the 3x3 convolutions; memo_: PyCIL's name for a backbone that MEMO cuts, which every backbone here can be.
"""
