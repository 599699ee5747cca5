"""copies_kept: which of an exemplar's copies are read, and that a choice stays what it was."""

import json

import numpy as np
import pytest
import torch

import main
from compress.cost import Cost
from models import copy_choice, run
from tests.little_config import train_little
from tests.shapes import SHAPES, make_shapes, picture
from utils.data.batches import TrainingSet
from utils.data.classes import DataManager
from utils.data.items import Item
from utils.memory.exemplars import ExemplarMemory

GOOD = (1, 3)
"""Numbers of the copies that show their class; the other two show a class of another colour."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    paths = make_shapes(folder, copies=4)
    labels = list(SHAPES)
    rng = np.random.default_rng(0)
    for i, label in enumerate(labels):
        for image in paths.images(label):
            for k in {0, 1, 2, 3} - set(GOOD):
                picture(labels[(i + 2) % len(labels)], rng).save(paths.copy(image, k))
    return folder


@pytest.fixture
def learn(tmp_path, data_dir, monkeypatch):
    """Calls main.py: -> (exit code, the copies that each phase's synthetic exemplars are read as)."""
    config = {
        **{"init_cls": 4, "batch_size": 16, "nme": False, "memory_per_class": 3, "real_per_class": 1},
        **{"syn_per_class": 4, "augmentations_per_image": 2, "init_epoch": 12, "init_lr": 0.05},
    }
    shown = []
    real = run.Run.training_set
    monkeypatch.setattr(run.Run, "training_set", lambda *args: shown.append(args[1]) or real(*args))

    def call(*overrides, folder="out", **values):
        shown.clear()
        code = train_little(data_dir, tmp_path / folder, *overrides, **{**config, **values})
        return code, [[item.copies for item in items if item.regenerated] for items in shown]

    return call


@pytest.mark.long
def test_copies_that_the_classifier_agrees_with(learn):
    code, (_, chosen) = learn(copies_kept="agree")
    assert code == 0
    assert len(chosen) == 16
    assert sum(copies == GOOD for copies in chosen) >= 12
    assert learn(copies_kept="agree", folder="again")[1][1] == chosen
    code, (_, others) = learn(copies_kept="boundary", folder="boundary")
    assert code == 0
    assert others != chosen
    assert all(len(copies) == 2 for copies in others)
    code, (_, every) = learn(folder="all")
    assert set(every) == {()}  # the first two


def test_the_choice_follows_the_logits(data_dir, monkeypatch):
    """Of four candidates of each exemplar, whose logits are given."""
    paths = make_shapes(data_dir, copies=4, name="Four")
    data = DataManager(paths, shuffle=False, seed=0, init_cls=2, increment=2)
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [2, 1.5, 0], [1, 1.5, 0]])  # of a picture of class 0

    class Given:
        config = main.Config(
            dataset="Four", init_cls=2, increment=2, model_name="wa", convnet_type="resnet8",
            augmentations_per_image=2, copy_candidates=4,
        )  # fmt: skip

        def predict(self, network, images, description):
            return run.Outputs(logits.repeat(len(images) // 4, 1), None)

    Given.data = data
    for kept, expected in (("agree", (0, 2)), ("boundary", (2, 3))):
        memory = Given.memory = exemplars(data)
        Given.config.copies_kept = kept
        copy_choice.choose_copies(Given(), None)
        assert {item.copies for item in memory.items() if item.regenerated} == {expected}
        assert {item.copies for item in memory.items() if not item.regenerated} == {()}
        images = memory.evaluation_images(0)
        assert [image for image, _ in images[1:]] == [
            paths.copy(item.image, k) for item in memory.items() if item.regenerated for k in expected
        ]
        restored = exemplars(data, full=False)
        restored.load_state_dict(json.loads(json.dumps(memory.state_dict())))
        assert restored.items() == memory.items()


def exemplars(data, full=True):
    """Class 0 with a real exemplar and two others."""
    from compress.forms import form_named
    from compress.presets import HIGH

    form = Cost(form_named("edges", HIGH), data.paths)
    memory = ExemplarMemory(
        data.paths, [("real", 1), ("edges", 2)], {"real": Cost(None, data.paths), "edges": form}, None, 2
    )
    if full:
        images = data.train_images(0)
        memory.add_class(0, images, np.eye(len(images)))
    return memory


def test_a_training_set_reads_the_chosen_copies_alone(data_dir, monkeypatch):
    paths = make_shapes(data_dir, copies=4, name="Read")
    data = DataManager(paths, shuffle=False, seed=0, init_cls=2, increment=2)
    image, other = data.train_images(0)[:2]
    items = [Item(image, 0, "edges", (1, 3)), Item(other, 0, "edges")]
    read = []
    real = type(paths).copy
    training = TrainingSet(items, paths, data.train_transform, 0.0, 2, "all", 0, 1)
    monkeypatch.setattr(type(paths), "copy", lambda self, image, k: read.append((image, k)) or real(self, image, k))
    training.__getitems__([(epoch, i) for epoch in range(20) for i in range(2)])
    assert set(read) == {(image, 1), (image, 3), (other, 0), (other, 1)}


def test_no_choice_is_refused(learn, capsys):
    code, _ = learn("copies_kept=agree", "copy_candidates=2")
    assert code == 2
    assert "copy_candidates: 2 copies leave no choice for copies_kept=agree, which keeps 2" in capsys.readouterr().err
    code, _ = learn("copies_kept=agree", "augmentations_per_image=3")  # 6 copies
    assert code == 2
    assert "--seeds 6" in capsys.readouterr().err
