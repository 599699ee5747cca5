"""What PyCIL's modules do around their losses: augmentation by phase, FeTrIL's SVM, RMM's memory, keys left out."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from convs import BACKBONES, Backbone
from models import catalogue
from models.foster import effective_number_weights
from models.training import phase0
from tests.little_trainer import SHORT, new_trainer
from tests.shapes import make_shapes
from utils.config.read import load_config


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"), train=10, test=3, copies=0)


@pytest.fixture
def trainer(paths, tmp_path):
    return partial(new_trainer, paths, tmp_path / "run", **SHORT)


def load(folder, **values):
    given = {"dataset": "CIFAR100", "init_cls": 10, "increment": 10, "model_name": "icarl", "convnet_type": "resnet32"}
    (folder / "config.json").write_text(json.dumps(given | values))
    known = {"methods": catalogue.methods(), "backbones": catalogue.backbones()}
    return load_config(folder / "config.json", **known)


@pytest.mark.parametrize("augmentation", ["pescr", "pycil", "autoaugment"])
def test_ssre_augments_phase_1_alone(trainer, augmentation, monkeypatch):
    """PyCIL asks for its phase before it counts it up: what it means for phase 0 comes in phase 1."""
    monkeypatch.setitem(BACKBONES, "little_rep", Backbone("basic", depths=(1, 1), widths=(8, 16), extra="adapters"))
    run = trainer("ssre", convnet_type="little_rep", augmentation=augmentation)
    stages = []
    for phase in range(3):
        run.start_phase(phase)
        stages += run.method.stages()
        run.method.after_training()
    expected = None if augmentation == "pycil" else "autoaugment"
    assert [stage.augmentation for stage in stages] == [None, expected, None]
    assert [stage.batch_size for stage in stages] == [64, None, None]


@pytest.mark.parametrize(("augmentation", "name"), [("pescr", "SmallAutoAugment"), ("pycil", "SmallTrain")])
def test_fetril_augments_phase_0(trainer, augmentation, name):
    run = trainer("fetril", augmentation=augmentation)
    run.start_phase(0)
    (stage,) = run.method.stages()
    loader, _ = run.run.training_loader(stage, 0)
    assert type(loader.dataset.transform).__name__ == name


def test_fetril_s_first_network_is_its_own(trainer):
    """And another one where it is not augmented."""
    files = []
    for method, augmentation in (("fetril", "pescr"), ("fetril", "pycil"), ("finetune", "pescr")):
        run = trainer(method, augmentation=augmentation, scheduler="cosine")
        run.start_phase(0)
        files.append(phase0.path_of(run.run, run.method))
    assert files[0] != files[1] == files[2]


def test_fetril_s_svm_is_scikit_learn_s_on_pycil_s_features(trainer):
    """As PyCIL computes it: features of new classes, and for each old class those of the new one most alike, moved."""
    run = trainer("fetril", svm=True)
    records = run.fit()
    train = [run.run.predict(run.method.network, run.data.train_images(t)).features.numpy() for t in range(6)]
    test = [run.run.predict(run.method.network, run.data.test_images(t)).features.numpy() for t in range(6)]
    test_rows, test_targets = np.concatenate(test), np.repeat(np.arange(6), 3)

    def score(rows, targets, phase):
        rows, seen = np.concatenate(rows), test_targets < 2 * (phase + 1)
        svm = LinearSVC(random_state=42).fit(rows / np.linalg.norm(rows, axis=1)[:, None], np.concatenate(targets))
        those = test_rows[seen] / np.linalg.norm(test_rows[seen], axis=1)[:, None]
        return 100 * svm.score(those, test_targets[seen])

    means = [rows.mean(axis=0) for rows in train]
    unit = [mean / np.linalg.norm(mean) for mean in means]
    for phase in range(3):
        new = range(2 * phase, 2 * phase + 2)
        rows, targets = [train[t] for t in new], [np.full(10, t) for t in new]
        for old in range(2 * phase):
            near = max(new, key=lambda t: unit[t] @ unit[old])
            rows.append(train[near] - means[near] + means[old])
            targets.append(np.full(10, old))
        assert records[phase].svm.top1 == pytest.approx(score(rows, targets, phase))


def test_rmm_keeps_its_memory_after_a_rate_of_0(trainer):
    """PyCIL's: min(images - 1, memory_size + rate x increment x images a class), anew where the rate is not 0."""
    run = trainer("rmm-icarl", memory_size=12, m_rate_list=[0.3, 0.0, 0.8])
    totals = []
    for phase in range(3):
        run.start_phase(phase)
        run.method.after_training()
        totals.append(run.run.memory.total)
    assert totals == [min(19, 12 + 6), 18, min(59, 12 + 16)]


def test_rmm_counts_an_equal_share_of_each_old_class_in_foster_s_weights(trainer):
    """As PyCIL's samples_old_class, where easy classes have more exemplars than hard ones."""
    run = trainer("rmm-foster", memory_size=8, m_rate_list=[0.0], c_rate_list=[0.5], beta1=0.9)
    run.do_phase(0)
    assert sorted(len(run.run.memory.of(target)) for target in (0, 1)) == [2, 6]
    run.start_phase(1)
    [*run.method.stages()]
    expected = effective_number_weights(torch.tensor([4, 4, 10, 10]), 0.9)
    torch.testing.assert_close(run.method.weights["boosting"], expected)


def test_memory_size_is_shared_where_fixed_memory_is_left_out(tmp_path):
    config = load(tmp_path, memory_size=2000, memory_per_class=20)
    assert not config.fixed_memory
    assert any("fixed_memory is not given" in note for note in config.notes)
    assert load(tmp_path, memory_size=2000, memory_per_class=20, fixed_memory=True).fixed_memory
    assert load(tmp_path, memory_per_class=20).fixed_memory


@pytest.mark.parametrize(
    ("dataset", "given", "augmentation"),
    [
        ("imagenet100", {}, "pycil"),
        ("imagenet1000", {}, "pycil"),
        ("imagenet100", {"augmentation": "pescr"}, "pescr"),
        ("ImageNet100", {}, "pescr"),
    ],
)
def test_pycil_s_names_of_imagenet_bring_pycil_s_augmentation(tmp_path, dataset, given, augmentation):
    config = load(tmp_path, dataset=dataset, **given)
    assert (config.dataset, config.augmentation) == (dataset, augmentation)
    assert any("augmentation: pycil" in note for note in config.notes) == (augmentation == "pycil")
