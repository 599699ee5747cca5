"""The JSON files that PyCIL and PESCR ship, as they are."""

import json
from pathlib import Path

import pytest

import main
from models import catalogue
from tests.conftest import long_but
from tests.little_config import phases
from tests.shapes import make_shapes
from utils.config.read import load_config

CONFIGS = json.loads((Path(__file__).parent / "reference" / "published_configs.json").read_text())
SHORT = ["init_epoch=1", "epochs=1", "compression_epochs=1", "ft_epochs=1", "batch_size=16", "num_workers=0"]
SHORT += ["buffer_size=64", "fusion_epochs=1", "proj_hidden_dim=16", "proj_output_dim=16"]
SMALL = ["device=cpu", "init_cls=2", "increment=2", "memory_per_class=2", "real_per_class=null", "cache=none"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("CIFAR100", "Food101"):
        make_shapes(folder, name=name, train=6, test=1, copies=0)
    return folder


@pytest.fixture
def file(tmp_path):
    def write(name):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIGS[name]))
        return path

    return write


LONG = (
    "tagfex.json",
    "pass.json",
    "il2a.json",
    "ssre.json",
    "pescr/config.json",
    "podnet.json",
    "coil.json",
    "beef.json",
)


@pytest.mark.parametrize("name", long_but(CONFIGS, *(name for name in CONFIGS if name not in LONG)))
def test_it_loads_and_trains_three_phases(file, data_dir, tmp_path, capsys, name):
    where = [f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}"]
    if CONFIGS[name]["convnet_type"] == "resnet32":  # test_networks builds it; a quarter of its layers will do here
        where.append("convnet_type=resnet8")
    assert main.main(["--config", str(file(name)), *SMALL, *SHORT, *where]) == 0
    assert [phase["classes_seen"] for phase in phases(tmp_path / "out")] == [2, 4, 6]


def test_what_keys_mean(file):
    known = {"methods": catalogue.methods(), "backbones": catalogue.backbones()}
    foster = load_config(file("foster.json"), **known)
    assert (foster.init_epoch, foster.epochs, foster.lrate, foster.real_per_class) == (200, 170, 0.1, 20)
    memo = load_config(file("memo.json"), **known)
    assert (memo.scheduler, memo.milestones, memo.memory_size) == ("steps", [80, 120, 150], 2000)
    assert sum("changes nothing here" in note for note in memo.notes) >= 4
    simplecil = load_config(file("simplecil.json"), **known)
    assert (simplecil.init_lr, simplecil.weight_decay, simplecil.memory_size) == (0.01, 0.05, 0)
    acil = load_config(file("acil.json"), **known)
    assert (acil.init_epoch, acil.init_milestones, acil.init_lr, acil.scheduler) == (160, [120, 140], 0.1, "steps")
    assert (acil.settings.buffer_size, acil.settings.IL_batch_size, acil.init_weight_decay) == (8192, 4096, 0.0005)
    aper = load_config(file("aper_finetune.json"), **known)
    assert (aper.init_epoch, aper.epochs, aper.lrate, aper.settings.optimizer) == (200, 20, 0.005, "sgd")
    pescr = load_config(file("pescr/config.json"), **known)
    assert (pescr.dataset, pescr.real_per_class, pescr.device, pescr.model_seed) == ("Food101", 20, [0, 1], 1)


def test_a_pycil_key_that_would_mean_something_else_here(file, capsys):
    assert main.main(["--config", str(file("memo.json")), "train_base=false", "data_dir=/nowhere"]) == 2
    assert "train_base can only be true here" in capsys.readouterr().err
