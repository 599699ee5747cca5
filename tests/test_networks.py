"""Backbones against torchvision's, and what growing keeps."""

import numpy as np
import pytest
import torch

from convs.heads import align_weights, grown, linear_head
from convs.resnet import CONVNETS, build_backbone, joined, nb_parameters, split
from models.networks import IncrementalNet, der_net, memo_net


def backbone(name="resnet8", kind="small", init_cls=2, increment=2):
    return build_backbone(name, kind, init_cls=init_cls, increment=increment)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_equals_torchvision_on_the_same_weights(name):
    from torchvision.models import get_model  # only after convs, whose import mends torchvision beside a CPU torch

    torch.manual_seed(0)
    theirs = get_model(name, weights=None).eval()
    ours = backbone(name, "large").eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    expected_maps = []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        layer.register_forward_hook(lambda module, inputs, output: expected_maps.append(output))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected)
        for ours_map, expected_map in zip(ours.feature_maps(x), expected_maps, strict=True):
            torch.testing.assert_close(ours_map, expected_map)
    assert expected.shape == (2, ours.feature_dim)


@pytest.mark.parametrize(
    ("name", "kind", "increment", "kernel", "stride", "pool"),
    [
        ("resnet18", "large", 2, 7, 2, True),
        ("resnet18", "large", 1, 3, 1, True),
        ("resnet18", "small", 2, 3, 1, False),
        ("resnet32", "small", 2, 3, 1, False),
    ],
)
def test_stems(name, kind, increment, kernel, stride, pool):
    net = backbone(name, kind, init_cls=2, increment=increment)
    assert net.conv1.kernel_size == (kernel, kernel)
    assert net.conv1.stride == (stride, stride)
    assert hasattr(net, "maxpool") == pool


@pytest.mark.parametrize(
    ("name", "depth", "parameters"), [("resnet20", 20, 0.27e6), ("resnet32", 32, 0.46e6), ("resnet56", 56, 0.85e6)]
)
def test_cifar_resnets_have_the_papers_depth_and_size(name, depth, parameters):
    """Table 6 of the ResNet paper, which counts the head as a layer."""
    net = backbone(name)
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in net.modules())
    assert layers + 1 == depth
    assert nb_parameters(net) + 650 == pytest.approx(parameters, rel=0.02)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert [tuple(m.shape[1:]) for m in net.feature_maps(torch.randn(1, 3, 32, 32))] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]


def test_every_name_builds():
    assert {backbone(name).feature_dim for name in CONVNETS} == {64, 512, 2048}
    with pytest.raises(ValueError, match="resnet19"):
        backbone("resnet19")


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_split_halves_compute_what_the_whole_does(name):
    net = backbone(name).eval()
    x = torch.randn(2, 3, 32, 32)
    shared, last = split(net)
    with torch.no_grad():
        torch.testing.assert_close(last(shared(x)), net(x))
    assert list(joined(shared, last).state_dict()) == list(net.state_dict())
    assert all(name.startswith("layer") for name, _ in list(last.named_children())[:1])


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


@pytest.mark.parametrize("build", [IncrementalNet, der_net, memo_net])
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
