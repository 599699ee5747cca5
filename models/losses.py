"""Losses that several methods share, and those that are an equation of their own."""

import math
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


def pod_spatial(maps: Sequence[Tensor], old_maps: Sequence[Tensor]) -> Tensor:
    """PODNet's POD-spatial (Douillard et al. 2020, section 3.1), the mean over stages and batch.

    maps, old_maps: what each stage puts out now and did before, B x C x H x W each.  A map's squares are summed over
    its width and over its height; the two sums, B x C(H + W), are brought to unit length and their distance taken.
    """
    distances = []
    for new, old in zip(maps, old_maps, strict=True):
        pooled = [
            F.normalize(torch.cat([x.sum(dim=3).flatten(1), x.sum(dim=2).flatten(1)], dim=1), dim=1)
            for x in (new.square(), old.square())
        ]
        distances.append((pooled[0] - pooled[1]).norm(dim=1).mean())
    return torch.stack(distances).mean()


def pod_flat(features: Tensor, old_features: Tensor) -> Tensor:
    """PODNet's POD-flat as its code has it: 1 - cosine of features now and before, B x D, the mean over the batch.

    At unit length this is half the squared distance.
    """
    return (1 - F.cosine_similarity(features, old_features, dim=1)).mean()


def nca(logits: Tensor, targets: Tensor, margin: float) -> Tensor:
    """PODNet's NCA loss (section 3.2): [-log(exp(z_y - margin) / sum_{i != y} exp z_i)]_+, the mean over the batch.

    The margin is in units of z, as the authors' code has it: scaled by eta as in the paper's formula, it would teach
    eta to turn negative.  logits z, eta times the similarities: B x C; targets y: B.
    """
    right = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -1e4)  # finite, so that a single class gives 0 and not NaN
    return (others.logsumexp(dim=1) - right + margin).clamp(min=0).mean()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """(1 - beta) / (1 - beta^n), scaled to a mean of 1: large for classes of few images.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as FOSTER uses it.
    counts n: C, images of each class; beta: in 0 ... 1, 1 excluded.
    """
    weights = (1 - beta) / (1 - beta ** counts.double().clamp(min=1))
    return (weights / weights.mean()).to(torch.get_default_dtype())


def sinkhorn(cost: Tensor, regularisation: float, iterations: int = 1000, tolerance: float = 1e-9) -> Tensor:
    """The entropic transport plan between uniform masses: n x m, rows sum to 1/n and columns to 1/m.

    Cuturi, "Sinkhorn Distances", NIPS 2013: argmin <T, cost> - regularisation * entropy(T), in logarithms.
    cost: n x m; regularisation: above 0.
    """
    n, m = cost.shape
    scaled = -cost.double() / regularisation
    f, g = cost.new_zeros(n, 1, dtype=torch.float64), cost.new_zeros(1, m, dtype=torch.float64)
    for _ in range(iterations):
        f = -math.log(n) - (scaled + g).logsumexp(dim=1, keepdim=True)
        g_new = -math.log(m) - (scaled + f).logsumexp(dim=0, keepdim=True)
        moved, g = (g_new - g).abs().max(), g_new
        if moved < tolerance:
            break
    return (scaled + f + g).exp().to(cost.dtype)
