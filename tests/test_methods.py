"""Every method over three phases of two handwritten digits each, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

import main
from convs.resnet import build_backbone
from models import METHODS
from models.networks import IncrementalNet
from tests.digits import make_digits
from utils.datasets import dataset_defaults
from utils.images import read_image

CHANCE = 100 / 6

OPTIONS = {
    "gem": {"gem_memory_batch": 8},
    "podnet": {"nb_proxy": 2, "ft_epochs": 10, "ft_lrate": 0.1},
    "foster": {"epochs": 12, "milestones": [], "compression_epochs": 20, "beta2": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder / "data")
    return folder


@pytest.fixture
def train(folders, tmp_path):
    """Calls main.py with a small config; returns the phases of its one run."""

    def call(method, **values):
        config = {
            "dataset": "MNIST",
            "data_dir": str(folders / "data"),
            "output_dir": str(tmp_path / "out"),
            "phase0_cache": str(folders / "cache"),  # one phase 0 for all methods that share it
            "init_cls": 2,
            "increment": 2,
            "model_name": method,
            "convnet_type": "resnet8",
            "device": "cpu",
            "memory_per_class": 4,
            "real_per_class": 2,
            "syn_per_class": 8,
            "augmentations_per_image": 2,
            "augmentation_prob": 0.2,
            "init_epoch": 15,
            "init_milestones": [8, 12],
            "epochs": 15,
            "milestones": [8, 12],
            "init_lr": 0.05,
            "lrate": 0.05,
            "batch_size": 12,
            "num_workers": 0,
            **OPTIONS.get(method, {}),
            **values,
        }
        output = Path(config["output_dir"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main.main(["--config", str(tmp_path / "config.json")]) == 0
        return json.loads((output / "results.json").read_text())["runs"][0]["phases"]

    return call


@pytest.mark.parametrize("method", ["replay", "gem", "bic", "podnet", "foster", "coil", "simplecil", "joint"])
def test_methods_that_remember(train, method):
    phases = train(method)
    assert [phase["classes_seen"] for phase in phases] == [2, 4, 6]
    last = phases[-1]
    assert last["cnn"]["old"] > CHANCE + 5
    assert last["cnn"]["top1"] > CHANCE + 15
    assert (last["nme"] is not None) == METHODS[method].uses_nme
    remembers = METHODS[method].uses_memory
    assert last["memory"]["nb_real"] == (12 if remembers else 0)
    assert last["memory"]["nb_synthetic"] == (48 if remembers else 0)
    assert last["memory"]["units_total"] == pytest.approx(6 * (2 + 8 / 8) if remembers else 0)
    names = [stage["stage"] for stage in last["training"]["stages"]]
    expected = {
        "bic": ["training", "bias"],
        "podnet": ["training", "balanced"],
        "foster": ["boosting", "compression"],
        "simplecil": [],
    }
    assert names == expected.get(method, ["training"])
    if method == "joint":
        assert last["cnn"]["old"] > 60, "the upper bound does not forget"
    if method in ("simplecil", "foster"):
        assert last["parameters"] == pytest.approx(phases[0]["parameters"], rel=0.01), "one backbone is what is kept"


def accuracy_within_phase_0(folder, folders):
    """Percent of phase 0's test digits that the last network tells right, had it to choose among phase 0's classes.

    The question that LwF's and EWC's papers ask: they know which task an image is of.
    """
    state = torch.load(folder / "seed1993" / "checkpoints" / "phase02.pt", weights_only=True)
    network = IncrementalNet(build_backbone("resnet8", "small", init_cls=2, increment=2))
    network.grow(6)
    network.load_state_dict(state["network"])
    network.eval()
    right = []
    transform = dataset_defaults("MNIST", (28, 28)).test_transform
    for target, label in enumerate(state["class_names"][:2]):
        images = sorted((folders / "data" / "MNIST" / "test" / label).iterdir())
        with torch.no_grad():
            logits = network(torch.stack([transform(read_image(image)) for image in images])).logits
        right += (logits[:, :2].argmax(dim=1) == target).tolist()
    return 100 * sum(right) / len(right)


def test_methods_without_exemplars(train, folders, tmp_path):
    within = {}
    for method in ("finetune", "lwf", "ewc"):
        phases = train(method, output_dir=str(tmp_path / method))
        assert phases[-1]["memory"]["nb_real"] == phases[-1]["memory"]["bytes_total"] == 0
        assert phases[-1]["cnn"]["new"] > CHANCE + 15
        within[method] = accuracy_within_phase_0(tmp_path / method, folders)
    assert within["finetune"] < min(within["lwf"], within["ewc"]), within
    assert min(within["lwf"], within["ewc"]) > 50 + 25
