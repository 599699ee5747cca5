"""Phases with too little in them, keys that name what went wrong, and lists that are given but empty."""

import pytest
import torch

from tests.conftest import long_but
from tests.little_config import phases, train_little
from tests.little_trainer import SHORT, after_phase_0, new_trainer
from tests.methods import METHODS
from tests.shapes import make_shapes
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.results.metrics import nearest_mean_scores


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder, train=6, test=2, copies=0)
    make_shapes(folder, name="Single", train=1, test=1, copies=0)
    return folder


@pytest.fixture
def command(data_dir, tmp_path, capsys):
    """main.py on six classes in three phases; -> (exit code, what was said)."""

    def call(method, dataset="Shapes", **values):
        config = {"dataset": dataset, "model_name": method, "memory_per_class": 2, "batch_size": 4, "cache": "none"}
        config |= {"logger": ["csv"], **SHORT, **values}
        code = train_little(data_dir, tmp_path / "out", **config)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return call


def drop_exemplars(trainer, *targets):
    for target in targets:
        trainer.run.memory.classes[target].images, trainer.run.memory.classes[target].counts = [], [0]


def test_nearest_means_never_choose_a_class_without_exemplars():
    """The nearest of the others is chosen as if that class were not there."""
    means = torch.nn.functional.normalize(torch.randn(5, 8))
    means[3] = 0
    features = torch.randn(40, 8)
    scores = nearest_mean_scores(features, means)
    assert (scores[:, 3] == -torch.inf).all()
    others = nearest_mean_scores(features, means[[0, 1, 2, 4]])
    torch.testing.assert_close(scores[:, [0, 1, 2, 4]], others)


def test_a_class_without_exemplars_has_no_mean(data_dir, tmp_path):
    trainer = after_phase_0(DatasetPaths(data_dir, "Shapes"), tmp_path / "run", "icarl")
    before = trainer.run.class_means(trainer.method.network, range(2))
    drop_exemplars(trainer, 1)
    means = trainer.run.class_means(trainer.method.network, range(2))
    torch.testing.assert_close(means[0], before[0])
    assert not means[1].any()


@pytest.mark.parametrize("method", long_but(["gem", "podnet", "beefiso", "coil", "bic", "icarl"], "gem"))
def test_a_phase_with_exemplars_of_some_old_classes(data_dir, tmp_path, method):
    """Of phase 0's two classes one has lost its exemplars; in phase 2 all of phase 0 have."""
    keys = {**SHORT, "batch_size": 4, "nme": True}
    trainer = new_trainer(DatasetPaths(data_dir, "Shapes"), tmp_path / "run", method, **keys)
    trainer.do_phase(0)
    drop_exemplars(trainer, 0)
    trainer.do_phase(1)
    drop_exemplars(trainer, 1)
    record = trainer.do_phase(2)
    assert all(parameter.isfinite().all() for parameter in trainer.method.network.parameters())
    assert list(record.nme.per_class.values())[:2] == [0, 0]
    assert trainer.class_means.isfinite().all()


def test_a_phase_without_exemplars_is_refused(data_dir, tmp_path):
    trainer = after_phase_0(DatasetPaths(data_dir, "Shapes"), tmp_path / "run", "gem", **SHORT)
    drop_exemplars(trainer, 0, 1)
    with pytest.raises(UserError, match=r"phase 1 .*there is not one exemplar\. Raise memory_per_class"):
        trainer.do_phase(1)


@pytest.mark.parametrize(("method", "images"), [("rmm-icarl", 1), ("rmm-foster", 1), ("rmm-icarl", 6)])
def test_rmm_says_before_training_that_it_gives_up_all_new_images(command, method, images):
    rates = {"m_rate_list": [0.2] if images == 1 else [0.0, 1.0]}
    code, said = command(method, "Single" if images == 1 else "Shapes", memory_size=6, **rates)
    assert code == 2
    assert f"has {images} train images, of which phase 1 gives up {'20%' if images == 1 else '100%'}" in said
    assert "epoch 1" not in said


@pytest.mark.parametrize("method", long_but(["rmm-icarl", "rmm-foster"], "rmm-icarl"))
def test_rmm_with_one_image_a_class(command, tmp_path, method):
    code, said = command(method, "Single", memory_size=6, m_rate_list=[0.0], c_rate_list=[0.9])
    assert code == 0, said
    assert [phase["memory"]["nb_real"] for phase in phases(tmp_path / "out")] == [2, 4, 6]


@pytest.mark.long
def test_rmm_leaves_every_class_an_exemplar(command, tmp_path):
    """One unit a class, of which hard classes would get int(1 x 0.5) = 0."""
    code, said = command("rmm-icarl", memory_size=6, m_rate_list=[0.0], c_rate_list=[0.0, 0.0, 0.5])
    assert code == 0, said
    assert phases(tmp_path / "out")[-1]["memory"]["nb_real"] >= 6


@pytest.mark.parametrize("method", long_but(METHODS, "il2a", "pass"))
def test_one_image_a_class(command, tmp_path, method):
    """A mean of one image, a covariance of one, a batch of one: what can't be done is said in one line."""
    keys = {"memory_per_class": 1}
    if method.startswith("rmm"):
        keys = {"memory_size": 6, "m_rate_list": [0.0]}
    if method == "ssre":
        keys["convnet_type"] = "resnet18_rep"
    code, said = command(method, "Single", **keys)
    assert code == (2 if method == "bic" else 0), said
    if method == "bic":
        assert "bic needs at least 2 train images of each class" in said
    else:
        assert "nan" not in (tmp_path / "out" / "results.json").read_text().lower()


@pytest.mark.parametrize("method", ["ewc", "beefiso", "gem"])
def test_16_mixed_is_refused_where_gradients_are_compared(command, method):
    code, said = command(method, precision="16-mixed")
    assert code == 2
    assert "take bf16-mixed or 32-true" in said


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("podnet", {"ft_lrate": 1e30}, "Lower ft_lrate (1e+30 now) and choose another"),
        ("beefiso", {"fusion_lrate": 1e30, "fusion_epochs": 8}, "Lower fusion_lrate (1e+30 now) and choose another"),
        ("icarl", {"backbone_lrate": 1e30}, "or backbone_lrate (1e+30 now)."),
        ("joint", {"init_lr": 1e30}, "Lower init_lr (1e+30 now)."),
        ("pass", {"init_lr": None, "lrate": 1e30}, "Lower lrate (1e+30 now)."),
        ("fetril", {"lrate": 1e30, "epochs": 8}, "Lower lrate (1e+30 now) and choose another"),
    ],
)
def test_divergence_names_the_key_of_the_stage_s_rate(command, method, keys, said):
    code, output = command(method, **keys)
    assert code == 2
    assert "training diverged" in output
    assert said in output


@pytest.mark.parametrize("method", ["pass", "il2a", "ssre"])
def test_no_milestones_are_no_milestones(data_dir, tmp_path, method):
    paths, later = DatasetPaths(data_dir, "Shapes"), {"milestones": [3]}
    if method == "ssre":
        later["convnet_type"] = "resnet18_rep"
    method = new_trainer(paths, tmp_path / "run", method, init_milestones=[], **later).method
    method.phase = 0
    assert method.schedule().milestones == []
    method.phase = 1
    assert method.schedule().milestones == [3]
