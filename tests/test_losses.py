"""Each method's loss against a few lines of plain NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import METHODS
from models.losses import distillation, newest_or_old
from models.networks import Outputs

RNG = np.random.default_rng(0)
B, OLD, NEW, T = 6, 3, 2, 2.0
LOGITS = RNG.normal(size=(B, OLD + NEW))
OLD_LOGITS = RNG.normal(size=(B, OLD))
AUX_LOGITS = RNG.normal(size=(B, NEW + 1))
TARGETS = np.array([0, 4, 3, 2, 3, 1])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y].mean()


def kd(z, old):
    return -(np.exp(log_softmax(old / T)) * log_softmax(z / T)).sum() / len(z)


def loss_of(name, phase):
    """The method's loss, called on a stand-in for its learner."""
    method = METHODS[name]
    learner = SimpleNamespace(
        config=SimpleNamespace(T=T),
        phase=phase,
        nb_old=OLD,
        nb_new=NEW,
        nb_seen=OLD + NEW,
        old_network=object() if phase and method.keeps_old_network else None,
        old_logits=lambda images: torch.tensor(OLD_LOGITS),
    )
    aux = torch.tensor(AUX_LOGITS) if phase and name in ("der", "memo") else None
    outputs = Outputs(torch.tensor(LOGITS), torch.zeros(B, 4), aux)
    return method.loss(learner, outputs, torch.zeros(B, 3, 4, 4), torch.tensor(TARGETS)).item()


def test_distillation():
    ours = distillation(torch.tensor(LOGITS[:, :OLD]), torch.tensor(OLD_LOGITS), T).item()
    assert ours == pytest.approx(kd(LOGITS[:, :OLD], OLD_LOGITS))


def test_auxiliary_targets():
    assert newest_or_old(torch.tensor(TARGETS), OLD).tolist() == [0, 2, 1, 0, 1, 0]


@pytest.mark.parametrize("name", METHODS)
def test_phase_0_is_cross_entropy(name):
    assert loss_of(name, 0) == pytest.approx(cross_entropy(LOGITS, TARGETS))


def test_icarl():
    assert loss_of("icarl", 1) == pytest.approx(cross_entropy(LOGITS, TARGETS) + kd(LOGITS[:, :OLD], OLD_LOGITS))


def test_wa():
    part = OLD / (OLD + NEW)
    expected = (1 - part) * cross_entropy(LOGITS, TARGETS) + part * kd(LOGITS[:, :OLD], OLD_LOGITS)
    assert loss_of("wa", 1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["der", "memo"])
def test_der_and_memo(name):
    auxiliary = np.where(TARGETS < OLD, 0, TARGETS - OLD + 1)
    expected = cross_entropy(LOGITS, TARGETS) + cross_entropy(AUX_LOGITS, auxiliary)
    assert loss_of(name, 1) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "aligned"), [("icarl", False), ("wa", True), ("der", True), ("memo", True)])
def test_which_methods_align_the_head_and_when(name, aligned):
    for phase in (0, 1):
        head = torch.nn.Linear(4, OLD + NEW)
        before = head.weight.detach().clone()
        learner = SimpleNamespace(phase=phase, nb_new=NEW, network=SimpleNamespace(head=head))
        METHODS[name].after_training(learner)
        assert torch.equal(head.weight.detach(), before) != (aligned and phase > 0)
        if aligned and phase > 0:
            norms = head.weight.detach().norm(dim=1)
            assert norms[:OLD].mean() == pytest.approx(norms[OLD:].mean().item(), rel=1e-5)


def test_the_papers_milestones():
    assert {name: method.milestones for name, method in METHODS.items()} == {
        "icarl": (80, 120),
        "wa": (60, 100, 140),
        "der": (80, 120, 150),
        "memo": (80, 120, 150),
    }
