"""Every method over three phases of two handwritten digits each, as a user runs it."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from convs.heads import linear_head
from convs.resnet import build_backbone
from models import METHODS
from models.networks import IncrementalNet, Outputs
from models.stages import Schedule, Stage
from tests.digits import make_digits
from utils.data.datasets import dataset_defaults
from utils.data.images import read_prepared
from utils.data.items import Item
from utils.errors import UserError

CHANCE = 100 / 6

OPTIONS = {
    "ewc": {"ewc_lambda": 10000.0},  # what 1000 holds on to over thousands of steps, it does not within so few
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
    defaults = dataset_defaults("MNIST", (28, 28))
    for target, label in enumerate(state["class_names"][:2]):
        images = sorted((folders / "data" / "MNIST" / "test" / label).iterdir())
        pictures = [read_prepared(image, defaults.test_transform.prepare) for image in images]
        with torch.no_grad():
            logits = network(defaults.normalise(defaults.test_transform(pictures))).logits
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
    assert min(within["lwf"], within["ewc"]) > 50 + 25, within


SCHEDULE = Schedule(2, 0.1, None, 1.0, 0.0)
ONE_DEVICE = SimpleNamespace(
    device=torch.device("cpu"),
    autocast=nullcontext,
    to_device=lambda x: x,
    all_reduce=lambda x, reduce_op: x,
    world_size=1,
)


def test_ewc_s_fisher_is_the_mean_squared_gradient_and_merges_by_classes(monkeypatch):
    torch.manual_seed(0)
    head = linear_head(3, 4)
    network = torch.nn.Sequential(head)
    monkeypatch.setattr(network, "forward", lambda x: Outputs(head(x), x))
    batches = [(torch.arange(2), torch.randn(2, 3), torch.tensor([2, 3])) for _ in range(3)]

    class Sampler(list):
        def set_epoch(self, epoch):
            assert epoch == 2, "after those of training"

        def sizes(self, step):
            return 2, 2

    old = {"0.weight": torch.rand(2, 3), "0.bias": torch.rand(2)}
    learner = SimpleNamespace(
        network=network,
        fabric=ONE_DEVICE,
        config=SimpleNamespace(fishermax=0.02, accumulate_batches=1),
        data=SimpleNamespace(new_items=lambda phase: []),
        phase=1,
        nb_old=2,
        nb_seen=4,
        schedule=lambda: SCHEDULE,
        training_loader=lambda stage: (batches, Sampler(range(3))),
        to_device=lambda x: x,
        state={"fisher": {key: value.clone() for key, value in old.items()}, "weights": {}},
    )
    expected = {"0.weight": np.zeros((4, 3)), "0.bias": np.zeros(4)}
    for _, x, y in batches:
        z = head(x).detach().double().numpy()
        error = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(4)[y]  # d CE / d z
        expected["0.weight"] += (error.T @ x.double().numpy() / 2) ** 2 / 3
        expected["0.bias"] += error.mean(axis=0) ** 2 / 3
    learner.fisher = lambda: METHODS["ewc"].fisher(learner)
    METHODS["ewc"].after_training(learner)
    for key, value in expected.items():
        value = np.minimum(value, 0.02)
        value[:2] = 0.5 * old[key].numpy() + 0.5 * value[:2]
        np.testing.assert_allclose(learner.state["fisher"][key], value, rtol=1e-4)
    assert torch.equal(learner.state["weights"]["0.bias"], head.bias)


def test_bic_holds_out_the_same_number_of_every_class():
    items = [Item(Path(f"{target}/{i}"), target, "real") for target in (0, 1) for i in range(20)]
    items += [Item(Path(f"{target}/{i}"), target, "new") for target in (2, 3) for i in range(90)]
    learner = SimpleNamespace(config=SimpleNamespace(split_ratio=0.1), rng=lambda purpose: np.random.default_rng(0))
    trained, held_out = METHODS["bic"].split(learner, items)
    assert Counter(item.target for item in held_out) == dict.fromkeys(range(4), 2)
    assert sorted([*trained, *held_out], key=str) == sorted(items, key=str)
    learner.config.split_ratio = 0.0
    assert len(METHODS["bic"].split(learner, items)[1]) == 4, "one of each at least"
    with pytest.raises(UserError, match="at least 2 a class"):
        METHODS["bic"].split(learner, items[19:])


def boosting(**config):
    """A FOSTER learner's stand-in, with its pair of networks built."""
    net = IncrementalNet(build_backbone("resnet8", "small", init_cls=2, increment=2))
    net.grow(2)
    net.grow(3)
    config = {"oofc": "ft", "is_teacher_wa": False, "wa_value": 1.0, **config}
    learner = SimpleNamespace(network=net, nb_old=2, nb_new=3, config=SimpleNamespace(**config))
    learner.align = lambda head: METHODS["foster"].align(learner, head)
    METHODS["foster"].before_stage(learner, Stage("boosting", [], SCHEDULE))
    return learner


@pytest.mark.parametrize("oofc", ["ft", "az"])
def test_foster_s_new_classes_may_be_kept_from_old_features(oofc):
    learner = boosting(oofc=oofc)
    weight = learner.network.head.weight
    learner.network(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    torch.optim.SGD([weight], lr=0.1, weight_decay=0.1).step()
    assert bool((weight[2:, :64] == 0).all()) == (oofc == "az")
    assert (weight[2:, 64:] != 0).all()
    assert (weight[:2] != 0).all()


def test_foster_s_compression_teaches_the_network_of_before():
    learner = boosting(is_teacher_wa=True, wa_value=1.1)
    student, pair = learner.student, learner.network
    METHODS["foster"].before_stage(learner, Stage("compression", [], SCHEDULE))
    assert learner.network is student
    assert learner.old_network is pair
    assert not any(parameter.requires_grad for parameter in pair.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    norms = pair.head.weight.norm(dim=1)
    assert norms[2:].mean().item() == pytest.approx(norms[:2].mean().item() * 1.1 ** (2 / 3), rel=1e-5)


def test_coil_starts_new_classes_from_the_old_ones_that_are_near():
    """Two old and two new classes whose means agree pairwise: each new classifier points where its old one does."""
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    head = linear_head(3, 4)
    learner = SimpleNamespace(
        phase=1,
        nb_old=2,
        nb_seen=4,
        config=SimpleNamespace(sinkhorn=0.01, norm_term=3.0, calibration_term=1.5),
        fabric=ONE_DEVICE,
        network=SimpleNamespace(head=head),
        data=SimpleNamespace(train_images=lambda target: target),
        predict=lambda target, purpose: Outputs(torch.zeros(4, 4), means[3 - target].repeat(4, 1)),
        class_means=lambda targets: means,
    )
    METHODS["coil"].before_training(learner)
    old, new = head.weight.detach()[:2], head.weight.detach()[2:]
    torch.testing.assert_close(learner.plan, torch.tensor([[0.0, 0.5], [0.5, 0.0]]), atol=1e-4, rtol=0)
    cosines = torch.cosine_similarity(new, old.flip(0))
    torch.testing.assert_close(cosines, torch.ones(2), atol=1e-4, rtol=0)
    assert new.norm(dim=1).mean().item() == pytest.approx(1.5 * old.norm(dim=1).mean().item(), rel=1e-4)
