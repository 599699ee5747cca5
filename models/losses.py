"""Losses that several methods share, and those that are an equation of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation(logits: Tensor, old_logits: Tensor, T: float, weights: Tensor | None = None) -> Tensor:
    """Knowledge distillation: KD(z, z') = -sum(softmax(z'/T) * log_softmax(z/T)) / batch.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, as PyCIL writes it (no factor T^2).
    logits z: B x C, of the network that learns; old_logits z': B x C, of the frozen one; T: temperature, above 0;
    weights: C, by which the frozen one's probabilities are multiplied before they are made to sum to 1 again (FOSTER's
    balanced distillation).
    """
    taught = torch.softmax(old_logits / T, dim=1)
    if weights is not None:
        taught = F.normalize(taught * weights, p=1, dim=1)
    return F.cross_entropy(logits / T, taught)


def balanced(logits: Tensor, targets: Tensor, old_logits: Tensor | None, T: float) -> Tensor:
    """(1 - l) CE + l KD, with l = old classes / all classes; CE where there are no old ones (Wu et al. 2019, eq. 3)."""
    classification = F.cross_entropy(logits, targets)
    if old_logits is None:
        return classification
    nb_old = old_logits.shape[1]
    l = nb_old / logits.shape[1]  # noqa: E741  (the paper's lambda)
    return (1 - l) * classification + l * distillation(logits[:, :nb_old], old_logits, T)


def newest_or_old(targets: Tensor, nb_old: int) -> Tensor:
    """Targets of an auxiliary head: 0 for every old class, 1, 2, ... for the new ones.

    targets: B, of 0 ... nb_old + nb_new - 1.
    """
    return (targets - nb_old + 1).clamp(min=0)


def among_new(logits: Tensor, targets: Tensor, nb_old: int) -> Tensor:
    """Cross-entropy over the new classes alone, for images of new classes: the old rows of the head are left alone."""
    return F.cross_entropy(logits[:, nb_old:], targets - nb_old)


def quadratic_penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]) -> Tensor:
    """1/2 sum_i F_i (theta_i - theta*_i)^2 (Kirkpatrick et al. 2017, eq. 3, without its lambda).

    A parameter that has grown at its end along the first dimension is held by its old rows.
    """
    terms = [
        (importance * (parameter[: len(anchor)] if anchor.dim() else parameter).sub(anchor).square()).sum()
        for parameter, anchor, importance in zip(parameters, anchors, importances, strict=True)
    ]
    return torch.stack(terms).sum() / 2
