"""Every method over three phases of two handwritten digits each, as a user runs it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from convs import BACKBONES, Backbone
from convs.resnet import build_backbone
from models.networks import IncrementalNet
from models.training.epochs import seconds_left
from tests.digits import make_digits
from tests.little_config import phases, train_little
from tests.little_trainer import after_phase_0
from tests.methods import METHODS
from utils.data.datasets import dataset_defaults
from utils.data.images import read_prepared
from utils.data.paths import DatasetPaths

CHANCE = 100 / 6
ANALYTIC = {"init_epoch": 15, "init_milestones": [8, 12], "buffer_size": 200, "IL_batch_size": 50}
ADAM = {"init_lr": 0.003, "lrate": 0.001, "temp": 0.5, "lambda_proto": 3}

OPTIONS = {
    "ewc": {"ewc_lambda": 10000.0},  # what 1000 holds on to over thousands of steps, it does not within so few
    "gem": {"gem_memory_batch": 8},
    # a cosine head starts with logits within [-1, 1]: its scale has to grow before old classes are told apart
    "coil": {"epochs": 30, "milestones": [20], "lrate": 0.1},
    "podnet": {"nb_proxy": 2, "ft_epochs": 10, "ft_lrate": 0.1},
    "acil": ANALYTIC,
    "ds-al": ANALYTIC,
    "pass": ADAM,
    "il2a": ADAM,
    "ssre": {"init_lr": 0.003, "lrate": 0.003, "temp": 0.5, "lambda_proto": 3, "convnet_type": "little_rep"},
    "rmm-icarl": {"memory_size": 24, "m_rate_list": [0.2], "c_rate_list": [0, 0.2]},
    "rmm-foster": {"memory_size": 24, "m_rate_list": [0.2], "c_rate_list": [0, 0.2]},
    "tagfex": {"proj_hidden_dim": 32, "proj_output_dim": 16},
    "beefiso": {"fusion_epochs": 5},
    "foster": {"epochs": 12, "milestones": [], "compression_epochs": 20, "beta2": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder / "data")
    return folder


@pytest.fixture
def train(folders, tmp_path, monkeypatch):
    """Calls main.py with a small config; returns the phases of its one run."""

    adapters = Backbone("basic", depths=(1, 1), widths=(16, 32), extra="adapters")
    monkeypatch.setitem(BACKBONES, "little_rep", adapters)

    def call(method, **values):
        config = {
            **{"dataset": "MNIST", "phase0_cache": str(folders / "cache")},  # one phase 0 for all that share it
            **{"model_name": method, "memory_per_class": 4, "real_per_class": 2, "syn_per_class": 8, "batch_size": 12},
            **{"augmentations_per_image": 2, "augmentation_prob": 0.2, "init_lr": 0.05, "lrate": 0.05},
            **{"init_epoch": 15, "init_milestones": [8, 12], "epochs": 15, "milestones": [8, 12]},
            **{**OPTIONS.get(method, {}), **values},
        }
        assert train_little(folders / "data", tmp_path / "out", **config) == 0
        return phases(Path(config.get("output_dir", tmp_path / "out")))

    return call


@pytest.mark.long
@pytest.mark.parametrize(
    "method", ["replay", "gem", "bic", "podnet", "foster", "coil", "simplecil", "joint", "beefiso", "tagfex"]
)
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
        "beefiso": ["expansion", "fusion"],
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


@pytest.mark.long
@pytest.mark.parametrize("method", ["acil", "ds-al", "fetril", "aper_finetune"])
def test_methods_that_remember_without_exemplars(train, method):
    phases = train(method)
    assert [phase["classes_seen"] for phase in phases] == [2, 4, 6]
    last = phases[-1]
    assert last["memory"]["nb_real"] == last["memory"]["nb_synthetic"] == last["memory"]["bytes_total"] == 0
    assert last["cnn"]["old"] > CHANCE + 5
    assert last["cnn"]["top1"] > CHANCE + 10
    assert last["nme"] is None
    trained = [len(phase["training"]["stages"]) for phase in phases]
    assert trained == ([1, 1, 0] if method == "aper_finetune" else [1, 0, 0])


@pytest.mark.long
@pytest.mark.parametrize("method", ["pass", "il2a", "ssre"])
def test_methods_that_remember_prototypes(train, method):
    phases = train(method)
    assert [phase["classes_seen"] for phase in phases] == [2, 4, 6]
    last = phases[-1]
    assert last["memory"]["nb_real"] == last["memory"]["bytes_total"] == 0
    for kind in ("cnn", "nme"):
        assert last[kind]["old"] > CHANCE + 5, kind
        assert last[kind]["top1"] > CHANCE + 15, kind
    assert [len(phase["training"]["stages"]) for phase in phases] == [1, 1, 1]


def test_features_by_class(folders, tmp_path):
    """Whichever images a batch has beside them."""
    trainer = after_phase_0(DatasetPaths(folders / "data", "MNIST"), tmp_path / "run", "icarl", batch_size=8)
    groups = [trainer.data.train_images(target)[:number] for target, number in ((0, 5), (1, 0), (2, 6))]
    features = trainer.run.features(trainer.method.network, groups)
    for rows, images in zip(features, groups, strict=True):
        torch.testing.assert_close(rows, trainer.run.predict(trainer.method.network, images).features)


def test_the_time_left_is_that_of_the_whole_run(folders, tmp_path):
    """At 1 s an image: those left in this phase, then new images and 2 x 4 exemplars in each epoch of the others."""
    trainer = after_phase_0(DatasetPaths(folders / "data", "MNIST"), tmp_path / "run", "icarl", epochs=5)
    phases, new = trainer.data.nb_phases - 1, sum(map(len, trainer.data._train[2:]))
    assert seconds_left(trainer.run, trainer.method, 1.0, 100) == 100 + 5 * (new + phases * 8)


def test_acil_is_one_ridge_regression_of_all_images(folders, tmp_path):
    """What three phases add up to, batch by batch, is what all images at once give."""
    trainer = after_phase_0(
        DatasetPaths(folders / "data", "MNIST"), tmp_path / "run", "acil", buffer_size=40, IL_batch_size=7, gamma=0.5
    )
    method = trainer.method
    method.after_training()
    for phase in (1, 2):
        trainer.start_phase(phase)
        method.after_training()
    images = [method.data.train_images(target) for target in range(6)]
    features = torch.cat(list(trainer.run.features(method.network, images))).double()
    hidden = torch.relu(features @ method.network.projection.T)
    wanted = F.one_hot(torch.arange(6).repeat_interleave(torch.tensor([len(rows) for rows in images]))).double()
    penalty = 0.5**0.5 * torch.eye(40, dtype=torch.float64)  # as further rows of the least squares problem
    stacked = torch.cat([hidden, penalty]), torch.cat([wanted, torch.zeros(40, 6, dtype=torch.float64)])
    torch.testing.assert_close(method.network.weight0, torch.linalg.lstsq(*stacked).solution)


def accuracy_within_phase_0(folder, folders):
    """Percent of phase 0's test digits that the last network tells right, had it to choose among phase 0's classes.

    The question that LwF's and EWC's papers ask: they know which task an image is of.
    """
    state = torch.load(folder / "seed1993" / "checkpoints" / "phase02.pt", weights_only=True)
    network = IncrementalNet(build_backbone("resnet8", "small"))
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


@pytest.mark.long
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
        "acil": (None, [], None, 160, [120, 140], 5e-4),
        "ds-al": (None, [], None, 160, [120, 140], 5e-4),
        "fetril": (50, [], 5e-4, 200, *cosine),
        "aper_finetune": (20, [], 0.05, 200, [], 0.05),
        "pass": (101, [45, 90], 2e-4, 101, [45, 90], 2e-4),
        "il2a": (101, [45, 90], 2e-4, 101, [45, 90], 2e-4),
        "ssre": (101, [45, 90], 5e-4, 101, [45, 90], 5e-4),
        "rmm-icarl": (170, [80, 120], 2e-4, 200, *steps),
        "rmm-foster": (170, [], 5e-4, 200, *cosine),
        "beefiso": (170, [], 5e-4, 200, *cosine),
        "tagfex": (170, [80, 120, 150], 2e-4, 200, *steps),
    }
    assert set(expected) == set(METHODS)
    for name, numbers in expected.items():
        own = METHODS[name].defaults
        falls = own.scheduler == "steps"
        found = (own.epochs, [*own.milestones] if falls else [], own.weight_decay, own.init_epoch)
        found = (*found, [*own.init_milestones] if falls else [], own.init_weight_decay)
        assert all(b is None or a == b for a, b in zip(found, numbers, strict=True)), (name, found, numbers)
        rates = {
            "simplecil": (0.01, 0.1),
            "fetril": (0.1, 0.05),
            "aper_finetune": (0.01, 0.005),
            "pass": (0.001, 0.001),
            "il2a": (0.001, 0.001),
            "ssre": (0.001, 0.001),
        }
        assert (own.init_lr, own.lrate) == rates.get(name, (0.1, 0.1))


@pytest.fixture
def phase_1(folders, tmp_path):
    """A method that is ready to train phase 1: two old classes of a few exemplars, two new ones of 30 images."""

    def call(name, **values):
        trainer = after_phase_0(DatasetPaths(folders / "data", "MNIST"), tmp_path / "run", name, **values)
        trainer.start_phase(1)
        return trainer.method

    return call


@pytest.mark.parametrize(("ratio", "of_each"), [(0.3, 3), (0.0, 1)])
def test_bic_holds_out_the_same_number_of_every_class(phase_1, ratio, of_each):
    """A share of the smallest class, one image at least, for the bias layers; the others are trained on."""
    method = phase_1("bic", exemplars=10, split_ratio=ratio)
    trained, held_out = method.stages()
    assert Counter(item.target for item in held_out.items) == dict.fromkeys(range(4), of_each)
    assert Counter(item.target for item in trained.items) == {
        0: 10 - of_each,
        1: 10 - of_each,
        2: 30 - of_each,
        3: 30 - of_each,
    }
    assert not {item.image for item in held_out.items} & {item.image for item in trained.items}
    learning = {id(parameter) for parameter in held_out.parameters}
    assert learning == {id(parameter) for parameter in method.network.bias_layers[-1].parameters()}


@pytest.mark.parametrize("oofc", ["ft", "az"])
def test_foster_s_new_classes_may_be_kept_from_old_features(phase_1, oofc):
    method = phase_1("foster", oofc=oofc)
    boosting, _ = method.stages()
    method.before_stage(boosting)
    weight, width = method.network.head.weight, method.network.student.head.in_features
    method.network.train()(torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
    torch.optim.SGD([weight], lr=0.1, weight_decay=0.1).step()
    assert bool((weight[2:, :width] == 0).all()) == (oofc == "az")
    assert (weight[2:, width:] != 0).all()
    assert (weight[:2] != 0).all()


def test_foster_s_teacher_may_be_aligned_before_compression(phase_1):
    method = phase_1("foster", is_teacher_wa=True, wa_value=1.1)
    _, compression = method.stages()
    method.before_stage(compression)
    norms = method.network.pair.head.weight.norm(dim=1)
    assert norms[2:].mean().item() == pytest.approx(norms[:2].mean().item() * 1.1 ** (2 / 2), rel=1e-5)
    student = method.network.train()(torch.randn(4, 3, 32, 32))
    assert student.features.shape[1] == method.network.student.head.in_features, "the student learns, not the pair"


@pytest.mark.parametrize("source", ["images", "exemplars"])
def test_coil_starts_new_classes_from_the_old_ones_that_are_near(tmp_path, source):
    """With next to no regularisation, each new classifier points where that of the nearest old class does."""
    paths = make_digits(tmp_path / "data", train=6, test=1, classes=4, copies=0)
    trainer = after_phase_0(paths, tmp_path / "run", "coil", exemplars=3, sinkhorn=1e-5, old_class_means=source)
    method, kept = trainer.method, [item.image for item in trainer.run.memory.items()]
    old_images = [method.data.train_images(target) for target in range(2)]
    if source == "exemplars":
        old_images = [[image for image in of_class if image in kept] for of_class in old_images]
        for image in {*method.data.train_images(0), *method.data.train_images(1)} - {*kept}:
            image.unlink()  # what is no exemplar is not looked at
    trainer.start_phase(1)
    images = [*old_images, *(method.data.train_images(target) for target in (2, 3))]
    features = [F.normalize(method.run.predict(method.old_network, of_class).features) for of_class in images]
    means = F.normalize(torch.stack([of_class.mean(dim=0) for of_class in features])).double()
    cost = (means[:2, None] - means[None, 2:]).abs().pow(3).sum(dim=2).pow(1 / 3)
    nearest = [0, 1] if cost.trace() < cost.flip(1).trace() else [1, 0]
    old, new = (proxies.detach() for proxies in method.network.head.proxies)
    torch.testing.assert_close(torch.cosine_similarity(new[nearest], old), torch.ones(2), atol=1e-4, rtol=0)
    assert new.norm(dim=1).mean().item() == pytest.approx(old.norm(dim=1).mean().item(), rel=1e-4)
