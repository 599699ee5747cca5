"""How good a run is: accuracies of a phase, and what several phases amount to.  All accuracies are percentages.

Plain arithmetic on NumPy arrays and on tensors' own methods, so that reading results does not import torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def phase_metrics(scores: "Tensor", targets: "Tensor", phase_ends: Sequence[int]) -> dict[str, Any]:
    """The fields of `utils.results.records.Metrics` on the test images of all C classes seen; per_class as a list.

    scores: N x C on the CPU, higher is likelier; targets: N, in 0 ... C-1; phase_ends: number of classes seen after
    phase 0, 1, ..., the last one C.
    """
    nb_classes = phase_ends[-1]
    pairs = targets.numpy() * nb_classes + scores.argmax(dim=1).numpy()
    confusion = np.bincount(pairs, minlength=nb_classes**2).reshape(nb_classes, nb_classes)
    right, total = confusion.diagonal(), confusion.sum(axis=1)
    best = scores.topk(min(5, nb_classes)).indices
    in_best = int((best == targets.unsqueeze(1)).any(dim=1).sum())

    def accuracy(first: int, end: int) -> float:
        return float(100 * right[first:end].sum() / total[first:end].sum())

    starts = [0, *phase_ends[:-1]]
    return {
        "top1": accuracy(0, nb_classes),
        "top5": 100 * in_best / len(targets),
        "old": accuracy(0, starts[-1]) if len(starts) > 1 else None,
        "new": accuracy(starts[-1], nb_classes),
        "per_class": (100 * right / total).tolist(),
        "per_phase": [accuracy(first, end) for first, end in zip(starts, phase_ends, strict=True)],
        "per_ten": [accuracy(first, min(first + 10, nb_classes)) for first in range(0, nb_classes, 10)],
        "confusion": targets.new_tensor(confusion),
    }


def average_incremental_accuracy(top1: Sequence[float]) -> float:
    """Mean over phases of the top-1 accuracy over all classes seen (Rebuffi et al. 2017, section 4)."""
    return float(np.mean(top1))


def forgetting(per_phase: Sequence[Sequence[float]]) -> float | None:
    """Mean over earlier phases of (best accuracy on their classes before the last phase) - (accuracy after it).

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018.
    per_phase: after each phase, the accuracy on the classes of phase 0, 1, ....  None where there is but one phase.
    """
    *before, final = per_phase
    if not before:
        return None
    return float(np.mean([max(row[j] for row in before[j:]) - final[j] for j in range(len(before))]))


def forgetting_in_tens(per_ten: Sequence[Sequence[float]]) -> float | None:
    """PyCIL's forgetting: mean over groups of (best accuracy after any phase) - (accuracy after the last one), >= 0.

    The groups are of ten classes, whatever the phases are; those that appear in the last phase do not count.  In phases
    of ten classes this is PyCIL's number; in others its table has rows of zeros, or does not hold the groups.
    per_ten: after each phase, the accuracy on each ten classes seen.  None where there is but one phase.
    """
    if len(per_ten) < 2:
        return None
    groups = range(len(per_ten[-2]))
    return float(np.mean([max(row[j] for row in per_ten if j < len(row)) - per_ten[-1][j] for j in groups]))


def backward_transfer(per_phase: Sequence[Sequence[float]]) -> float | None:
    """Mean over earlier phases of (accuracy on their classes after the last phase) - (just after they were learnt).

    Negative where classes are forgotten.  Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning",
    NIPS 2017, section 2.  per_phase: as for `forgetting`.  None where there is but one phase.
    """
    *before, final = per_phase
    return float(np.mean([final[j] - row[j] for j, row in enumerate(before)])) if before else None


def nearest_mean_scores(features: "Tensor", means: "Tensor") -> "Tensor":
    """Scores of the nearest-mean-of-exemplars classifier (iCaRL, Algorithm 1): minus the squared distance to each mean.

    features: N x D, L2-normalised here; means: C x D, of unit length, or zeros for a class without exemplars, whose
    scores are -inf.  Returns N x C.
    """
    import torch

    scores = -torch.cdist(torch.nn.functional.normalize(features), means).square()
    return scores.masked_fill(~means.any(dim=1), -torch.inf)
