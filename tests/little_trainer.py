"""A trainer after phase 0 of a small dataset, with exemplars chosen and no optimisation step taken."""

import json
from pathlib import Path

from compress.cost import Cost
from models import METHODS, catalogue
from models.run import Run
from models.trainer import Trainer
from utils.config.read import load_config
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths
from utils.devices import launch
from utils.memory.exemplars import ExemplarMemory


def after_phase_0(paths: DatasetPaths, folder: Path, method: str, *, exemplars: int = 4, **values) -> Trainer:
    """Two classes a phase; `exemplars`: images of each class in memory; values: further keys of the config."""
    config = {"dataset": paths.dataset, "init_cls": 2, "increment": 2, "model_name": method, "num_workers": 0}
    config |= {"convnet_type": "resnet8", "device": "cpu", "real_per_class": exemplars, "nme": False, **values}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    checked = load_config(folder / "config.json", methods=catalogue.methods(), backbones=catalogue.backbones())
    data = DataManager(paths, shuffle=False, seed=1, init_cls=2, increment=2)
    memory = ExemplarMemory(paths, [("real", exemplars)], {"real": Cost(None, paths)}, None, 0)
    trainer = Trainer(METHODS[method], Run(checked, data, memory, launch("cpu", 1), folder, folder))
    trainer.start_phase(0)
    trainer.choose_exemplars()
    return trainer
