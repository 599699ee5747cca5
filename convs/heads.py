"""Classifier heads that grow with the classes."""

import torch
from torch import nn


def linear_head(in_features: int, out_features: int) -> nn.Linear:
    """A fresh head: weights kaiming-uniform (linear), bias 0."""
    head = nn.Linear(in_features, out_features)
    nn.init.kaiming_uniform_(head.weight, nonlinearity="linear")
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def grown(head: nn.Linear | None, in_features: int, out_features: int) -> nn.Linear:
    """A larger head that answers as `head` did for its classes and its features.

    The old rows (classes) and columns (features) are kept; what is new is fresh.  `None` gives a fresh head.
    """
    larger = linear_head(in_features, out_features)
    if head is not None:
        larger.to(head.weight.device)
        larger.weight[: head.out_features, : head.in_features] = head.weight
        larger.bias[: head.out_features] = head.bias
    return larger


@torch.no_grad()
def align_weights(head: nn.Linear, nb_new: int) -> float:
    """Scale the rows of the `nb_new` newest classes so that their mean norm is the old classes' (in place).

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (WA), CVPR 2020:
    gamma = mean norm of old rows / mean norm of new rows.  The bias is left alone.  Returns gamma.
    """
    norms = head.weight.norm(dim=1)
    gamma = norms[:-nb_new].mean() / norms[-nb_new:].mean()
    head.weight[-nb_new:] *= gamma
    return gamma.item()
