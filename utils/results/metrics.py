"""How good a run is: accuracies of a phase, and what several phases amount to.  All accuracies are percentages."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix


def phase_metrics(scores: Tensor, targets: Tensor, phase_ends: Sequence[int]) -> dict:
    """What a classifier's scores on the test images of all classes seen are worth.

    scores: N x C, the higher the likelier; targets: N, in 0 ... C-1; phase_ends: number of classes seen after phase 0,
    1, ..., the last one C.  Returns
        top1, top5 (top-C where C < 5), old, new: accuracy over all, over earlier phases' (None in phase 0), and over
        the newest phase's images; per_class: C accuracies; per_phase: over the images of each phase's classes;
        confusion: C x C counts, rows are true classes.
    """
    nb_classes = phase_ends[-1]
    predictions = scores.argmax(dim=1)
    at_least_two = max(nb_classes, 2)  # torchmetrics refuses a single class, which init_cls = 1 begins with
    confusion = multiclass_confusion_matrix(predictions, targets, at_least_two).numpy()[:nb_classes, :nb_classes]
    right, total = confusion.diagonal(), confusion.sum(axis=1)

    def accuracy(first: int, end: int) -> float:
        return float(100 * right[first:end].sum() / total[first:end].sum())

    starts = [0, *phase_ends[:-1]]
    top5 = torch.tensor(1.0)
    if nb_classes > 5:
        top5 = multiclass_accuracy(scores, targets, nb_classes, average="micro", top_k=5)
    return {
        "top1": accuracy(0, nb_classes),
        "top5": 100 * top5.item(),
        "old": accuracy(0, starts[-1]) if len(starts) > 1 else None,
        "new": accuracy(starts[-1], nb_classes),
        "per_class": (100 * right / total).tolist(),
        "per_phase": [accuracy(first, end) for first, end in zip(starts, phase_ends, strict=True)],
        "confusion": confusion.tolist(),
    }


def average_incremental_accuracy(top1: Sequence[float]) -> float:
    """Mean over phases of the top-1 accuracy over all classes seen (Rebuffi et al. 2017, section 4)."""
    return float(np.mean(top1))


def forgetting(per_phase: Sequence[Sequence[float]]) -> float | None:
    """Mean over earlier phases of (best accuracy on their classes before the last phase) - (accuracy after it).

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018.
    per_phase: after each phase, the accuracy on the classes of phase 0, 1, ....  None where there is but one phase.
    """
    last = len(per_phase) - 1
    if last < 1:
        return None
    return float(np.mean([max(row[j] for row in per_phase[j:last]) - per_phase[last][j] for j in range(last)]))


def backward_transfer(per_phase: Sequence[Sequence[float]]) -> float | None:
    """Mean over earlier phases of (accuracy on their classes after the last phase) - (just after they were learnt).

    Negative where classes are forgotten.  Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning",
    NIPS 2017, section 2.  per_phase: as for `forgetting`.  None where there is but one phase.
    """
    last = len(per_phase) - 1
    if last < 1:
        return None
    return float(np.mean([per_phase[last][j] - per_phase[j][j] for j in range(last)]))


def nearest_mean_scores(features: Tensor, means: Tensor) -> Tensor:
    """Scores of the nearest-mean-of-exemplars classifier (iCaRL, Algorithm 1): minus the squared distance to each mean.

    features: N x D, L2-normalised here; means: C x D, of unit length.  Returns N x C.
    """
    return -torch.cdist(torch.nn.functional.normalize(features), means).square()
