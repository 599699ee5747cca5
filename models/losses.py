"""Losses that several methods share."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation(logits: Tensor, old_logits: Tensor, T: float) -> Tensor:
    """Knowledge distillation: KD(z, z') = -sum(softmax(z'/T) * log_softmax(z/T)) / batch.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, as PyCIL writes it (no factor T^2).
    logits z: B x C, of the network that learns; old_logits z': B x C, of the frozen one; T: temperature, above 0.
    """
    return F.cross_entropy(logits / T, torch.softmax(old_logits / T, dim=1))


def newest_or_old(targets: Tensor, nb_old: int) -> Tensor:
    """Targets of an auxiliary head: 0 for every old class, 1, 2, ... for the new ones.

    targets: B, of 0 ... nb_old + nb_new - 1.
    """
    return (targets - nb_old + 1).clamp(min=0)
