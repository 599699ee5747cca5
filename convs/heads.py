"""Classifier heads that grow with the classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class BiasLayer(nn.Module):
    """logits -> alpha logits + beta, at first as they are; for the logits of one phase's classes.

    Wu et al., "Large Scale Incremental Learning" (BiC), CVPR 2019, eq. 4.
    """

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return self.alpha * logits + self.beta


class ProxyHead(nn.Module):
    """Local similarity classifier: several proxies a class, compared by cosine; features B x D -> logits B x classes.

    Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020, section
    3.2: with h the feature and theta_c,k the proxies, all of unit length, y_c = sum_k s_c,k <theta_c,k, h>, where
    s_c,k is the softmax of <theta_c,k, h> over k.  The logits are eta y, eta learnt.
    """

    def __init__(self, in_features: int, nb_proxies: int):
        super().__init__()
        self.in_features = in_features
        self.nb_proxies = nb_proxies
        self.proxies = nn.ParameterList()
        self.eta = nn.Parameter(torch.ones(()))

    def grow(self, nb_new: int) -> None:
        """Fresh proxies for `nb_new` more classes, in a parameter of their own: (nb_new x proxies) x D."""
        fresh = torch.empty(nb_new * self.nb_proxies, self.in_features, device=self.eta.device)
        self.proxies.append(nn.Parameter(nn.init.kaiming_uniform_(fresh, nonlinearity="linear")))

    def forward(self, features: Tensor) -> Tensor:
        proxies = F.normalize(torch.cat(list(self.proxies)), dim=1)
        similarities = (F.normalize(features, dim=1) @ proxies.T).unflatten(1, (-1, self.nb_proxies))
        return self.eta * (similarities.softmax(dim=2) * similarities).sum(dim=2)
