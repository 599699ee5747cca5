"""Backbones of torchvision and timm by name: their features, their input, their weights, and training them."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import main
from convs.library import library_backbone, library_input
from tests.conftest import long_but
from tests.little_config import train_little
from tests.shapes import make_shapes
from utils.data.augment import LargeTest

from torchvision import models, transforms  # isort: skip

VIT = "timm/vit_tiny_patch16_224"


def theirs(convnet_type, **options):
    """The library's network, and its features by its own means."""
    library, _, name = convnet_type.partition("/")
    if library == "timm":
        timm = pytest.importorskip("timm", reason="pip install timm")
        network = timm.create_model(name, **options).eval()
        return network, lambda x: network.forward_head(network.forward_features(x), pre_logits=True)
    network = models.get_model(name, weights=None, **options).eval()
    seen = {}
    last = network.heads.head if hasattr(network, "heads") else network.fc
    last.register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0]))
    return network, lambda x: (network(x), seen["features"])[1]


@pytest.mark.parametrize(
    ("convnet_type", "size", "options", "feature_dim"),
    [
        ("torchvision/resnet18", None, {}, 512),
        pytest.param("torchvision/vit_b_16", 32, {"image_size": 32}, 768, marks=pytest.mark.long),
        (VIT, 32, {"img_size": 32}, 192),
        ("timm/resnet18", 32, {}, 512),
    ],
)
def test_features_are_the_library_s_on_the_same_weights(convnet_type, size, options, feature_dim, tmp_path):
    network, features = theirs(convnet_type, **options)
    torch.save(network.state_dict(), tmp_path / "weights.pth")  # with the classifier
    ours = library_backbone(convnet_type, size, pretrained=str(tmp_path / "weights.pth")).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert ours.feature_dim == feature_dim
        torch.testing.assert_close(ours(x), features(x))


def test_the_input_is_the_library_s():
    resnet50 = library_input("torchvision/resnet50")
    weights = models.get_model_weights("resnet50").DEFAULT.transforms()
    assert (resnet50.side, resnet50.resize, list(resnet50.mean)) == (224, 232, weights.mean)
    timm = pytest.importorskip("timm", reason="pip install timm")
    vit = library_input("timm/vit_tiny_patch16_224")
    assert (vit.side, vit.resize, vit.mean, vit.mode) == (224, 248, (0.5, 0.5, 0.5), "bicubic")
    assert library_input("timm/vit_tiny_patch16_224", 112)[:2] == (112, 124)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    steps = timm.data.create_transform(**config).transforms
    expected = np.asarray(
        transforms.Compose([s for s in steps if "Normalize" not in str(s) and "Tensor" not in str(s)])(picture)
    )
    ours = LargeTest(vit.side, vit.resize, vit.mode)([np.asarray(picture)])[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 1  # Pillow and torch round differently


def test_weights_that_do_not_fit_or_are_not_there(tmp_path):
    other = models.get_model("resnet34", weights=None)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torchvision/resnet18"):
        library_backbone("torchvision/resnet18", pretrained=str(tmp_path / "other.pth"))
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="or one that holds code, which is never run") as caught:
        library_backbone("torchvision/resnet18", pretrained=str(tmp_path / "code.pth"))
    assert "weights_only" not in str(caught.value)
    assert "arbitrary" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        library_backbone("torchvision/resnet18", pretrained=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="did you mean resnet18"):
        library_backbone("torchvision/resnet-18")


@pytest.fixture
def train(tmp_path):
    make_shapes(tmp_path / "data", train=4, test=2)
    values = {"init_cls": 3, "increment": 3, "model_name": "icarl", "convnet_type": VIT, "image_size": 32}
    values |= {"batch_size": 12, "memory_per_class": 2}
    return partial(train_little, tmp_path / "data", tmp_path / "out", **values)


def weights_of(folder):
    return torch.load(folder / "seed1993" / "checkpoints" / "phase01.pt", weights_only=True)["network"]


@pytest.mark.parametrize("method", long_but(("simplecil", "der", "icarl"), "der"))
def test_a_vit_trains_two_phases_and_is_evaluated(train, tmp_path, method):
    pytest.importorskip("timm", reason="pip install timm")
    assert train(model_name=method) == 0
    phases = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["phases"]
    assert [phase["classes_seen"] for phase in phases] == [3, 6]
    assert main.main(["evaluate", str(tmp_path / "out"), "--output", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["cnn"]["per_class"] == phases[1]["cnn"]["per_class"]


@pytest.mark.long
def test_a_frozen_backbone_and_one_with_a_rate_of_its_own(train, tmp_path):
    pytest.importorskip("timm", reason="pip install timm")
    file = tmp_path / "weights.pth"
    torch.save(library_backbone(VIT, 32).network.state_dict(), file)
    before = torch.load(file, weights_only=True)
    moved = {}
    for name, values in {"frozen": {"freeze_backbone": True}, "slow": {"backbone_lrate": 1e-7}, "free": {}}.items():
        assert train(pretrained=str(file), output_dir=str(tmp_path / name), increment=3, **values) == 0
        after = weights_of(tmp_path / name)
        change = [(after[f"backbone.network.{key}"] - value).abs().max().item() for key, value in before.items()]
        moved[name] = max(change)
    assert moved["frozen"] == 0
    assert 0 < moved["slow"] < 1e-3 * moved["free"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_name": "podnet"}, "podnet needs the stages of a ResNet"),
        ({"model_name": "memo"}, "memo needs the stages of a ResNet"),
        ({"convnet_type": "torchvision/vit_b_61"}, "did you mean vit_b_16"),
        ({"convnet_type": "timm/"}, "timm/NAME"),
        ({"convnet_type": "resnet8"}, "image_size is for"),
        ({"convnet_type": "torchvision/resnet18", "pretrained": "nowhere.pth"}, "pretrained: there is no file nowhere"),
    ],
)
def test_mistakes_are_told_before_any_work(train, tmp_path, capsys, values, said):
    assert train(**values) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_timm_the_message_says_what_to_install(train, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert train() == 2
    assert "pip install timm" in capsys.readouterr().err
