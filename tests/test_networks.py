"""Backbones against torchvision's, and against the published ones' equations."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convs import BACKBONES
from convs.blocks import AttendedBatchNorm, RepConv, fold_adapters
from convs.resnet import build_backbone, joined, nb_parameters, split
from models.training.method import fresh_backbone
from tests.conftest import long_but


def backbone(name="resnet8", kind="small", stem="7x7", pretrained=False):
    return build_backbone(name, kind, stem, pretrained)


def torchvision_model(name):
    from torchvision.models import get_model  # only after convs, whose import mends torchvision beside a CPU torch

    return get_model(name, weights=None).eval()


RESNETS = long_but(("resnet18", "resnet34", "resnet50"), "resnet18", "resnet50")  # of both kinds of blocks


@pytest.mark.parametrize("name", RESNETS)
def test_equals_torchvision_on_the_same_weights(name):
    torch.manual_seed(0)
    theirs = torchvision_model(name)
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


@pytest.mark.parametrize("name", RESNETS)
def test_large_cosine_backbones_lack_the_last_relu_alone(name):
    plain, cosine = backbone(name, "large").eval(), backbone(f"cosine_{name}", "large").eval()
    cosine.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        *expected, last = plain.feature_maps(x)
        *maps, signed = cosine.feature_maps(x)
        torch.testing.assert_close(maps, expected)
        torch.testing.assert_close(signed.relu(), last)
        torch.testing.assert_close(cosine(x), signed.mean(dim=(2, 3)))
    assert signed.min() < 0


def published_block(x, weights, prefix, *, last_relu=True):
    """A basic block of PyCIL's CIFAR ResNets in eval mode: its shortcut is the identity, a padded subsample or, where
    there are weights for it, a 1x1 convolution and a batch norm."""

    def conv(x, name, stride, padding):
        return F.conv2d(x, weights[f"{prefix}.{name}.weight"], stride=stride, padding=padding)

    def norm(x, name):
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{prefix}.{name}.{kind}"] for kind in kinds))

    out_channels, in_channels = weights[f"{prefix}.conv1.weight"].shape[:2]
    stride = 1 if in_channels == out_channels else 2
    out = norm(conv(norm(conv(x, "conv1", stride, 1), "bn1").relu(), "conv2", 1, 1), "bn2")
    if f"{prefix}.downsample.0.weight" in weights:
        x = norm(conv(x, "downsample.0", 2, 0), "downsample.1")
    elif stride == 2:
        x = torch.cat([F.avg_pool2d(x, 1, 2), 0 * F.avg_pool2d(x, 1, 2)], dim=1)
    return (x + out).relu() if last_relu else x + out


@pytest.mark.parametrize(("name", "parameters"), [("resnet32", 463_504), ("cosine_resnet32", 466_256)])
def test_cifar_resnets_compute_what_the_published_ones_do(name, parameters):
    """PyCIL's counts (without its unused `fc`) and function."""
    torch.manual_seed(0)
    net = backbone(name)
    assert nb_parameters(net) == parameters
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_(std=0.1)
    weights, x = net.eval().state_dict(), torch.randn(2, 3, 32, 32)
    expected = F.conv2d(x, weights["conv1.weight"], padding=1)
    norm = (weights[f"bn1.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
    expected = F.batch_norm(expected, *norm).relu()
    for stage in (1, 2, 3):
        for block in range(5):
            signed = name.startswith("cosine") and (stage, block) == (3, 4)
            expected = published_block(expected, weights, f"layer{stage}.{block}", last_relu=not signed)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    assert (net(x).min() < 0) == name.startswith("cosine")


def test_cbam_against_its_equations():
    torch.manual_seed(0)
    norm = AttendedBatchNorm(32).eval()
    f = torch.randn(2, 32, 5, 6)
    x = f.double().numpy() / np.sqrt(1 + 1e-5)  # a fresh batch norm in eval mode
    w0, w1 = (norm.mlp[i].weight.detach().double().numpy()[:, :, 0, 0] for i in (0, 2))
    assert w0.shape == (2, 32)
    pooled = [np.maximum(p @ w0.T, 0) @ w1.T for p in (x.mean(axis=(2, 3)), x.max(axis=(2, 3)))]
    x = x / (1 + np.exp(-sum(pooled)))[:, :, None, None]
    stacked = np.pad(np.stack([x.mean(axis=1), x.max(axis=1)], axis=1), ((0, 0), (0, 0), (3, 3), (3, 3)))
    kernel = norm.spatial.weight.detach().double().numpy()[0]
    attention = np.array(
        [[[(b[:, i : i + 7, j : j + 7] * kernel).sum() for j in range(6)] for i in range(5)] for b in stacked]
    )
    expected = x / (1 + np.exp(-attention))[:, None]
    np.testing.assert_allclose(norm(f).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_cbam_sits_at_the_end_of_every_bottleneck():
    plain, cbam = backbone("resnet50"), backbone("resnet50_cbam")
    missing, surplus = cbam.load_state_dict(plain.state_dict(), strict=False)
    norms = {key for key, module in cbam.named_modules() if isinstance(module, AttendedBatchNorm)}
    assert not surplus
    assert len(norms) == 16
    assert all(re.fullmatch(r"layer[1-4]\.\d+\.bn3", key) for key in norms)
    assert {re.sub(r"\.(mlp\.[02]|spatial)\.weight$", "", key) for key in missing} == norms


@pytest.mark.parametrize("name", long_but(("resnet18", "resnet34"), "resnet18"))
def test_published_basic_blocks_never_apply_their_attention(name):
    plain, cbam, x = backbone(name).eval(), backbone(f"{name}_cbam").eval(), torch.randn(2, 3, 32, 32)
    cbam.load_state_dict(plain.state_dict())
    torch.testing.assert_close(cbam(x), plain(x))


def test_rep_blocks_have_adapters_that_fold_into_the_convolutions():
    """Zhu et al. 2022 as published: 3x3 + 1x1, both with bias, one batch norm after the sum; a shortcut without one."""
    torch.manual_seed(0)
    net = backbone("resnet18_rep")
    block = net.layer2[0]
    for parameter in net.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
    net.eval()
    x = torch.randn(2, 64, 8, 8)
    expected, weights = x, block.state_dict()
    for number, stride in ((1, 2), (2, 1)):
        w = {key.removeprefix(f"conv{number}."): value for key, value in weights.items()}
        dense = F.conv2d(expected, w["weight"], w["bias"], stride, padding=1)
        point = F.conv2d(expected, w["adapter.weight"], w["adapter.bias"], stride)
        expected = getattr(block, f"bn{number}")(dense + point)
        expected = expected.relu() if number == 1 else expected
    shortcut = F.conv2d(x, weights["downsample.0.weight"], weights["downsample.0.bias"], stride=2)
    with torch.no_grad():
        torch.testing.assert_close(block(x), (expected + shortcut).relu(), rtol=1e-4, atol=1e-4)
        pictures = torch.randn(4, 3, 32, 32)
        before = net(pictures)
        fold_adapters(net)
        torch.testing.assert_close(net(pictures), before, rtol=1e-4, atol=1e-4)
    adapters = [module.adapter for module in net.modules() if isinstance(module, RepConv)]
    assert len(adapters) == 16
    assert not any(parameter.any() for adapter in adapters for parameter in adapter.parameters())
    plain = backbone("resnet18")
    convs = [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)][1:]
    extra = sum(m.in_channels * m.out_channels + 2 * m.out_channels for m in convs)  # adapters, and two biases each
    shortcuts = 128 + 256 + 512  # a bias each in place of a batch norm's weight and bias
    assert nb_parameters(net) == nb_parameters(plain) + extra - shortcuts == 12_396_224  # PyCIL's


@pytest.mark.parametrize("name", ["resnet18", "resnet32"])
def test_memo_s_names_are_backbones_like_any_other(name):
    assert list(backbone(f"memo_{name}").state_dict()) == list(backbone(name).state_dict())


@pytest.mark.parametrize(
    ("name", "base", "file"),
    [
        ("resnet18", "resnet18", "resnet18-f37072fd.pth"),
        ("cosine_resnet18", "resnet18", "resnet18-f37072fd.pth"),
        ("memo_resnet18", "resnet18", "resnet18-5c106cde.pth"),  # the file of torchvision's older releases
        ("resnet18_cbam", "resnet18", "resnet18-f37072fd.pth"),
    ],
)
def test_pretrained_weights_come_from_torch_s_cache(name, base, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    theirs = torchvision_model(base)
    torch.save(theirs.state_dict(), folder / file)
    ours = backbone(name, "large", "3x3", pretrained=True).state_dict()
    assert ours["conv1.weight"].shape == (64, 3, 7, 7), "torchvision's stem, though phase 0 is the largest"
    expected = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert expected.keys() <= ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_pretrained_weights_that_are_not_there_or_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"resnet18 in .*checkpoints; save https://.*resnet18-f37072fd\.pth"):
        backbone("resnet18", "large", pretrained=True)
    for name in ("resnet32", "cosine_resnet32", "resnet18_rep"):
        with pytest.raises(ValueError, match=f"no weights for {name}"):
            backbone(name, "large", pretrained=True)
    with pytest.raises(ValueError, match="large images"):
        backbone("resnet18", "small", pretrained=True)
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    for content in (torchvision_model("resnet34").state_dict(), {"a": torch.zeros(1)}, [1]):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth does not hold the weights of resnet18"):
            backbone("resnet18", "large", pretrained=True)
    file.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="does not hold the weights"):
        backbone("resnet18", "large", pretrained=True)


@pytest.mark.parametrize(
    ("name", "kind", "increment", "kernel", "stride", "pool"),
    [
        ("resnet18", "large", 2, 7, 2, True),
        ("resnet18", "large", 1, 3, 1, True),
        ("memo_resnet18", "large", 1, 7, 2, True),
        ("resnet18", "small", 2, 3, 1, False),
        ("resnet32", "small", 2, 3, 1, False),
    ],
)
def test_stems(name, kind, increment, kernel, stride, pool):
    config = SimpleNamespace(
        convnet_type=name, init_cls=2, increment=increment, pretrained=False, freeze_backbone=False
    )
    net = fresh_backbone(config, SimpleNamespace(defaults=SimpleNamespace(image_kind=kind)))
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
    assert {backbone(name).feature_dim for name in BACKBONES} == {64, 512, 2048}
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
