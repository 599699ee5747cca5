"""The cache of trained phase-0 networks: what makes a network another one."""

import os
from pathlib import Path

import pytest
import torch
from torchvision import models

from models.training import phase0
from tests.conftest import long_but
from tests.folders import make_dataset
from tests.little_trainer import after_phase_0


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), "abcd", train=5, test=1, ending=".bmp")


@pytest.fixture
def name(paths, tmp_path):
    """The name of a run's phase-0 network, before it is trained."""

    def call(method="icarl", **values):
        values = {"init_epoch": 9, "init_milestones": [5], "init_weight_decay": 0.0, **values}
        trainer = after_phase_0(paths, tmp_path, method, exemplars=2, **values)
        return phase0.path_of(trainer.run, trainer.method).name

    return call


def test_methods_share_it_where_they_train_alike(name):
    assert name("icarl") == name("bic") == name("der")
    assert name("icarl") != name("icarl", model_seed=2)


def test_a_frozen_backbone_is_the_same_for_every_method_with_plain_phases(name):
    """BiC's too: its batch norm does not follow the pictures, so that either may take the other's network."""
    assert name("bic", freeze_backbone=True) == name("icarl", freeze_backbone=True) != name("icarl")


def test_backbones_of_the_same_layers(name):
    assert name(convnet_type="resnet32") != name(convnet_type="cosine_resnet32")


@pytest.mark.parametrize("pretrained", long_but((True, "file"), True))
def test_pretrained_weights_by_their_content(name, tmp_path, monkeypatch, pretrained):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir()
    value = True if pretrained is True else str(file)
    weights = models.get_model("resnet18", weights=None).state_dict()

    def with_weights():
        torch.save(weights, file)
        os.utime(file, ns=(0, 0))
        return name(convnet_type="torchvision/resnet18", image_size=32, pretrained=value)

    first = with_weights()
    assert with_weights() == first
    weights["layer1.0.bn1.bias"] += 1
    assert with_weights() != first


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def test_class_folders_that_change_places(paths, name):
    images = sorted(paths.folder("train").glob("*/*.bmp"))
    for image in images:
        os.utime(image, ns=(0, 0))
    assert len({image.stat().st_size for image in images}) == 1
    first = name()
    assert name() == first
    swap(paths.folder("train") / "a", paths.folder("train") / "b")
    assert name() != first
    swap(paths.folder("train") / "a", paths.folder("train") / "b")
    assert name() == first
