"""Heads and networks that grow from phase to phase: what is kept, what learns, and the schedule it learns by."""

import numpy as np
import pytest
import torch

from convs.heads import align_weights, grown, linear_head
from models.foster import FosterNet
from models.networks import BiasedNet, CosineNet, IncrementalNet, der_net, memo_net
from models.training.stages import Schedule, learning_only
from tests.test_networks import backbone


def test_fresh_head():
    head = linear_head(64, 10)
    assert head.bias.abs().max() == 0
    assert head.weight.abs().max() <= np.sqrt(3 / 64)  # kaiming uniform, gain 1
    assert head.weight.std().item() == pytest.approx(np.sqrt(1 / 64), rel=0.1)


def test_a_grown_head_keeps_rows_and_columns():
    old = linear_head(4, 3)
    torch.nn.init.normal_(old.bias)
    new = grown(old, 6, 5)
    assert new.weight.shape == (5, 6)
    torch.testing.assert_close(new.weight[:3, :4], old.weight)
    torch.testing.assert_close(new.bias[:3], old.bias)
    assert new.bias[3:].abs().max() == 0
    assert new.weight.requires_grad


def test_weight_alignment_against_numpy():
    head = linear_head(4, 5)
    before, bias = head.weight.detach().numpy().copy(), torch.randn(5)
    head.bias.data.copy_(bias)
    norms = np.sqrt((before**2).sum(axis=1))
    gamma = norms[:3].mean() / norms[3:].mean()
    assert align_weights(head, 2) == pytest.approx(gamma, rel=1e-5)
    after = head.weight.detach().numpy()
    np.testing.assert_array_equal(after[:3], before[:3])
    np.testing.assert_allclose(after[3:], before[3:] * gamma, rtol=1e-5)
    assert torch.equal(head.bias.detach(), bias)


def test_incremental_net_answers_old_classes_as_before():
    net = IncrementalNet(backbone())
    net.grow(2)
    net.eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = net(x).logits
        net.grow(3)
        outputs = net(x)
    assert outputs.logits.shape == (3, 5)
    torch.testing.assert_close(outputs.logits[:, :2], before)
    assert outputs.aux_logits is None


@pytest.mark.parametrize("build", [der_net, memo_net])
def test_expandable_nets(build):
    net = build(backbone())
    net.grow(2)
    assert net(torch.randn(2, 3, 32, 32)).aux_logits is None
    x = torch.randn(3, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        before = net(x)
        net.grow(3)
        after = net.eval()(x)
    old_head = net.head.weight[:2, :64]
    torch.testing.assert_close(after.features[:, :64], before.features)
    torch.testing.assert_close(after.features[:, 64:], before.features)  # starts from the previous one's weights
    torch.testing.assert_close(before.features @ old_head.T, before.logits)
    assert after.logits.shape == (3, 5)
    assert after.aux_logits.shape == (3, 4)


@pytest.mark.parametrize(("build", "shared_learns"), [(der_net, False), (memo_net, True)])
def test_old_extractors_are_frozen_in_every_respect(build, shared_learns):
    net = build(backbone())
    net.grow(2)
    net.grow(2)
    net.train()
    frozen = {key: value.clone() for key, value in net.extractors[0].state_dict().items()}
    newest = {key: value.clone() for key, value in net.extractors[1].state_dict().items()}
    shared = {key: value.clone() for key, value in net.shared.state_dict().items()}
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
    outputs = net(torch.randn(4, 3, 32, 32))
    (outputs.logits.square().sum() + outputs.aux_logits.square().sum()).backward()
    optimizer.step()
    assert all(torch.equal(value, frozen[key]) for key, value in net.extractors[0].state_dict().items())
    assert not all(torch.equal(value, newest[key]) for key, value in net.extractors[1].state_dict().items())
    assert any(not torch.equal(value, shared[key]) for key, value in net.shared.state_dict().items()) == shared_learns


def test_a_biased_net_corrects_the_logits_of_each_later_phase():
    net, x = BiasedNet(backbone()), torch.randn(3, 3, 32, 32)
    for nb_new in (2, 3, 1):
        net.grow(nb_new)
    net.eval()
    with torch.no_grad():
        plain = net.head(net.backbone(x))
        torch.testing.assert_close(net(x).logits, plain)
        for layer, (alpha, beta) in zip(list(net.bias_layers)[1:], [(2.0, -1.0), (0.5, 3.0)], strict=True):
            layer.alpha.fill_(alpha)
            layer.beta.fill_(beta)
        expected = torch.cat([plain[:, :2], 2 * plain[:, 2:5] - 1, 0.5 * plain[:, 5:] + 3], dim=1)
        torch.testing.assert_close(net(x).logits, expected)


def test_a_foster_net_holds_the_old_one_and_learns_beside_it():
    net, x = FosterNet(backbone()), torch.randn(3, 3, 32, 32)
    net.grow(2)
    before = net.eval()(x)
    net.grow(3)
    torch.testing.assert_close(net.student.eval()(x).logits[:, :2], before.logits)
    assert net.student.head.weight.shape == (5, 64)
    net.train()
    weights = {key: value.clone() for key, value in net.pair.old.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.pair.parameters() if p.requires_grad], lr=0.1)
    outputs = net(x)
    assert (outputs.logits.shape, outputs.features.shape, outputs.aux_logits.shape) == ((3, 5), (3, 128), (3, 5))
    torch.testing.assert_close(net.pair.old_logits(outputs.features), before.logits)
    (outputs.logits.square().sum() + outputs.aux_logits.square().sum()).backward()
    optimizer.step()
    assert all(torch.equal(net.pair.old.state_dict()[key], value) for key, value in weights.items())
    torch.testing.assert_close(net.pair.old_logits(net(x).features), before.logits)
    net.compressing = True
    assert net(x).logits.shape == (3, 5)
    assert net(x).features.shape == (3, 64), "the student learns"
    assert net.eval()(x).features.shape == (3, 128), "the pair is evaluated"
    net.grow(1)
    torch.testing.assert_close(net.pair.old(x).logits, net.student.eval()(x).logits[:, :5])


def test_a_cosine_net_shows_every_stage():
    net, x = CosineNet(backbone(), 3), torch.randn(2, 3, 32, 32)
    net.grow(2)
    net.grow(1)
    outputs = net.eval()(x)
    assert outputs.logits.shape == (2, 3)
    assert [m.shape[1:] for m in outputs.maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    torch.testing.assert_close(outputs.features, net.backbone(x))
    assert [tuple(p.shape) for p in net.head.proxies] == [(6, 64), (3, 64)]


def test_what_does_not_learn_in_a_stage_is_left_alone():
    net = BiasedNet(backbone())
    net.grow(2)
    net.grow(2)
    net.bias_layers[0].requires_grad_(False)
    frozen = net.backbone.conv1.weight.requires_grad_(False)
    with learning_only(net, list(net.head.parameters())):
        net.train()
        assert {key for key, p in net.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
        assert not net.backbone.training
        assert not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert net.training
    assert [key for key, p in net.named_parameters() if not p.requires_grad] == ["backbone.conv1.weight"]
    assert not frozen.requires_grad, "frozen before, frozen after"
    net.train()
    assert all(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("milestones", "rates"),
    [((1, 3), [1, 0.1, 0.1, 0.01]), (None, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])],
)
def test_schedules(milestones, rates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, seen = Schedule(4, 1.0, milestones, 0.1, 0.0).scheduler(optimizer), []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize("build", [IncrementalNet, BiasedNet, der_net, memo_net])
def test_phase_0_is_the_same_network_in_all_methods(build):
    torch.manual_seed(0)
    net = build(backbone())
    net.grow(2)
    torch.manual_seed(0)
    plain = IncrementalNet(backbone())
    plain.grow(2)
    for module, expected in zip(net.first_phase_modules(), plain.first_phase_modules(), strict=True):
        assert list(module.state_dict()) == list(expected.state_dict())
        module.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(x).logits, plain.eval()(x).logits)
