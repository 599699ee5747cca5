"""Backbones and classifier heads."""

import torchvision_compat  # noqa: F401  (before torchvision: lets a CUDA wheel load beside a CPU build of torch)
