"""Trainers of small datasets without main.py: before any training, and after a phase 0 without optimisation steps."""

import json
from pathlib import Path

from compress.training.exemplars import Cost
from models import catalogue
from models.training.run import Run
from models.training.trainer import Trainer
from tests.methods import METHODS
from utils.config.read import load_config
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths
from utils.devices import launch
from utils.memory.exemplars import ExemplarMemory

SHORT = {
    **{"init_epoch": 1, "epochs": 1, "compression_epochs": 1, "ft_epochs": 1, "fusion_epochs": 1, "nb_proxy": 2},
    **{"init_lr": 0.01, "lrate": 0.01, "checkpoint_every": 0, "buffer_size": 64, "gem_memory_batch": 4, "svm": False},
    **{"proj_hidden_dim": 16, "proj_output_dim": 16},
}
"""Keys that make a run short, whichever the method."""


def keys_of(method: str) -> dict:
    """What the method needs to run on six little classes."""
    if method == "ssre":
        return {"convnet_type": "resnet18_rep"}
    if method.startswith("rmm"):
        return {"memory_size": 12, "m_rate_list": [0.3], "c_rate_list": [0.5]}
    return {}


def new_trainer(paths: DatasetPaths, folder: Path, method: str, *, exemplars: int = 4, **values) -> Trainer:
    """Two classes a phase; `exemplars`: images of each class in memory; values: further keys of the config."""
    config = {"dataset": paths.dataset, "init_cls": 2, "increment": 2, "model_name": method, "num_workers": 0}
    config |= {"convnet_type": "resnet8", "device": "cpu", "real_per_class": exemplars, "nme": False, **values}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    checked = load_config(folder / "config.json", methods=catalogue.methods(), backbones=catalogue.backbones())
    data = DataManager(paths, shuffle=False, seed=1, init_cls=2, increment=2)
    total = None if checked.fixed_memory else checked.memory_size
    memory = ExemplarMemory(paths, [("real", exemplars)], {"real": Cost(None, paths)}, None, 0, total=total)
    return Trainer(METHODS[method], Run(checked, data, launch("cpu"), memory, folder / "run", folder))


def after_phase_0(paths: DatasetPaths, folder: Path, method: str, **values) -> Trainer:
    """`new_trainer` with the exemplars of phase 0 chosen and no optimisation step taken."""
    trainer = new_trainer(paths, folder, method, **values)
    trainer.start_phase(0)
    trainer.choose_exemplars()
    return trainer
