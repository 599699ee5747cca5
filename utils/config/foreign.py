"""Keys and names of other projects' configs (PyCIL, PILOT, timm), and what they mean here."""

from utils.data.datasets import Augmentation

PYCIL_ONLY: dict[str, tuple[tuple | None, str]] = {
    "skip": ((False,), "phase 0 is trained, or reused from phase0_cache"),
    "debug": (None, "it only changes what PyCIL prints"),
    "min_lr": ((0,), "the cosine ends at 0"),
    "warmup": ((0,), "the learning rate starts at its full height"),
    "t_max": (None, "the cosine ends with the last epoch"),
    "copies_kept": (("all",), "all copies are read"),
    "copy_candidates": ((None,), "all copies are read"),
}
"""Keys of PyCIL's files, or of earlier versions, that are no keys here: the values that mean what happens anyway
(None: all), and why.

A method's `Settings` may have a class variable `pycil_only` like this."""


PYCIL_SCHEDULE = {"init_epochs": "init_epoch", "milestones": "init_milestones", "decay": "init_lr_decay"}
"""PyCIL's names in a nested schedule, and ours where they differ."""


PYCIL_DATASETS: dict[str, tuple[str, Augmentation]] = {
    "cifar10_aa": ("cifar10", "autoaugment"),
    "cifar100_aa": ("cifar100", "autoaugment"),
    "imagenet100": ("imagenet100", "pycil"),
    "imagenet1000": ("imagenet1000", "pycil"),
}
"""PyCIL's names of datasets, spelt as there, that stand for a dataset and an augmentation."""


PILOTS_BACKBONES = {
    "pretrained_vit_b16_224": "timm/vit_base_patch16_224",
    "pretrained_vit_b16_224_in21k": "timm/vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_in21k": "timm/vit_base_patch16_224.augreg_in21k",
}
"""PILOT's and timm's earlier names of pretrained backbones, and timm's today; with `pretrained: true`."""
