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
    """A larger head: rows (classes) and columns (features) of `head` are copied, the others are freshly initialised.

    head: None for a fresh one.
    """
    larger = linear_head(in_features, out_features)
    if head is not None:
        larger.to(head.weight.device)
        larger.weight[: head.out_features, : head.in_features] = head.weight
        larger.bias[: head.out_features] = head.bias
    return larger


@torch.no_grad()
def align_weights(head: nn.Linear, nb_new: int) -> float:
    """Scale the rows of the `nb_new` newest classes to the old rows' mean norm (in place); the bias stays.

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (WA), CVPR 2020:
    gamma = mean norm of old rows / mean norm of new rows.  Returns gamma.
    """
    norms = head.weight.norm(dim=1)
    gamma = norms[:-nb_new].mean() / norms[-nb_new:].mean()
    head.weight[-nb_new:] *= gamma
    return gamma.item()


class BiasLayer(nn.Module):
    """logits of one phase's classes -> alpha logits + beta; alpha starts at 1, beta at 0.

    Wu et al., "Large Scale Incremental Learning" (BiC), CVPR 2019, eq. 4.
    """

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return self.alpha * logits + self.beta


class CosineHead(nn.Module):
    """Logits by cosine similarity to one or several proxies a class; features B x D -> logits B x classes.

    With h the feature and theta_c,k the proxies of class c, all of unit length, the logits are eta sum_k s_c,k
    <theta_c,k, h>, where s_c,k is the softmax of <theta_c,k, h> over k, and eta is learnt.  With one proxy a class:
    Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019, eq. 4; with several: Douillard
    et al., "PODNet", ECCV 2020, section 3.2.

    proxies: a parameter a phase, (its classes x nb_proxies) x D, the proxies of a class next to each other.
    """

    def __init__(self, in_features: int, nb_proxies: int = 1):
        super().__init__()
        self.in_features = in_features
        self.nb_proxies = nb_proxies
        self.proxies = nn.ParameterList()
        self.eta = nn.Parameter(torch.ones(()))

    def grow(self, nb_new: int) -> None:
        """Add a parameter of proxies for `nb_new` more classes, uniform in +-1/sqrt(D).

        They are drawn on the CPU, so that they are the same numbers on all devices.
        """
        bound = self.in_features**-0.5
        fresh = torch.empty(nb_new * self.nb_proxies, self.in_features).uniform_(-bound, bound)
        self.proxies.append(nn.Parameter(fresh.to(self.eta.device)))

    def forward(self, features: Tensor) -> Tensor:
        proxies = F.normalize(torch.cat(list(self.proxies)), dim=1)
        similarities = F.linear(F.normalize(features, dim=1), proxies).unflatten(1, (-1, self.nb_proxies))
        return self.eta * (similarities.softmax(dim=2) * similarities).sum(dim=2)
