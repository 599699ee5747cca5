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
from convs.heads import CosineHead
from convs.resnet import build_backbone
from models import METHODS
from models.foster import FosterNet
from models.networks import IncrementalNet
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
    # a cosine head starts with logits within [-1, 1]: its scale has to grow before old classes are told apart
    "coil": {"epochs": 30, "milestones": [20], "lrate": 0.1},
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
    remembers = METHODS[method].uses_memory
    assert (last["nme"] is not None) == remembers
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
    if method == "simplecil":
        assert last["parameters"] == pytest.approx(phases[0]["parameters"], rel=0.01), "one backbone is what is kept"
    assert ("student" in last) == (method == "foster")
    if method == "foster":
        assert last["parameters"] == pytest.approx(2 * phases[0]["parameters"], rel=0.02), "the pair"
        assert last["student"]["top1"] > CHANCE + 15


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


def test_the_schedule_is_the_methods_own_where_the_config_is_silent():
    """PyCIL's values: of its module's constants, or of its exps/*.json."""
    steps, cosine = ([60, 120, 170], 5e-4), ([], 5e-4)
    expected = {  # (epochs, milestones, weight decay) of later phases; (epochs, milestones, weight decay) of phase 0
        "finetune": (80, [40, 70], 2e-4, 200, *steps),
        "replay": (70, [30, 50], 2e-4, 200, *steps),
        "lwf": (250, [60, 120, 180, 220], 2e-4, 200, [60, 120, 160], 5e-4),
        "ewc": (180, [70, 120, 150], 2e-4, 200, *steps),
        "gem": (100, [30, 60, 80], 2e-4, 200, *steps),
        "icarl": (170, [80, 120], 2e-4, 200, *steps),
        "bic": (170, [60, 100, 140], 2e-4, 170, [60, 100, 140], 2e-4),
        "wa": (170, [60, 100, 140], 2e-4, 200, *steps),
        "der": (170, [80, 120, 150], 2e-4, 200, *steps),
        "memo": (170, [80, 120, 150], 2e-4, 200, *steps),
        "podnet": (160, [], 5e-4, 160, *cosine),
        "foster": (170, [], 5e-4, 200, *cosine),
        "coil": (160, [80, 120], 5e-4, 160, [80, 120], 5e-4),
        "simplecil": (None, [], None, 200, *cosine),
        "joint": (None, [], None, 200, *steps),
    }
    assert set(expected) == set(METHODS)
    for name, numbers in expected.items():
        own = METHODS[name].defaults
        falls = own.scheduler == "steps"
        found = (own.epochs, [*own.milestones] if falls else [], own.weight_decay, own.init_epoch)
        found = (*found, [*own.init_milestones] if falls else [], own.init_weight_decay)
        assert all(b is None or a == b for a, b in zip(found, numbers, strict=True)), (name, found, numbers)
        assert (own.init_lr, own.lrate) == (0.01 if name == "simplecil" else 0.1, 0.1)


SCHEDULE = Schedule(2, 0.1, None, 1.0, 0.0)
ONE_DEVICE = SimpleNamespace(
    device=torch.device("cpu"),
    autocast=nullcontext,
    to_device=lambda x: x,
    all_reduce=lambda x, reduce_op: x,
    world_size=1,
)


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
    net = FosterNet(build_backbone("resnet8", "small", init_cls=2, increment=2))
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


def test_foster_s_teacher_may_be_aligned_before_compression():
    learner = boosting(is_teacher_wa=True, wa_value=1.1)
    METHODS["foster"].before_stage(learner, Stage("compression", [], SCHEDULE))
    assert learner.network.compressing
    norms = learner.network.pair.head.weight.norm(dim=1)
    assert norms[2:].mean().item() == pytest.approx(norms[:2].mean().item() * 1.1 ** (2 / 3), rel=1e-5)


@pytest.mark.parametrize("old_class_means", ["images", "exemplars"])
def test_coil_starts_new_classes_from_the_old_ones_that_are_near(old_class_means):
    """Two old and two new classes whose means agree pairwise: each new classifier points where its old one does."""
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    head = CosineHead(3)
    head.grow(2)
    head.grow(2)
    asked = []

    def of_targets(targets):
        asked.append(targets)
        return means if 0 in targets else means.flip(0)

    learner = SimpleNamespace(
        phase=1,
        nb_old=2,
        nb_seen=4,
        config=SimpleNamespace(sinkhorn=0.01, norm_term=3.0, old_class_means=old_class_means),
        fabric=ONE_DEVICE,
        network=SimpleNamespace(head=head),
        image_means=of_targets,
        class_means=lambda targets: means,
    )
    learner.plan = lambda old_means: METHODS["coil"].plan(learner, old_means)
    METHODS["coil"].before_training(learner)
    assert (range(2) in asked) == (old_class_means == "images"), "whether images of old classes are looked at"
    old, new = (proxies.detach() for proxies in head.proxies)
    cosines = torch.cosine_similarity(new, old.flip(0))
    torch.testing.assert_close(cosines, torch.ones(2), atol=1e-4, rtol=0)
    assert new.norm(dim=1).mean().item() == pytest.approx(old.norm(dim=1).mean().item(), rel=1e-4)
