"""The two commands on real photographs: folders in the project's layout, named by $ESCORT_PHOTOGRAPHS.

ESCORT_PHOTOGRAPHS=<data-dir> pytest tests/test_photographs.py      # with Imagenette224/ and CIFAR10/ in it
"""

import os
import shutil
from pathlib import Path

import pytest

import main as experiment
from compress import run as compress
from utils.data.paths import DatasetPaths

pytestmark = pytest.mark.shared_data


@pytest.fixture(params=[("Imagenette224", "resnet18"), ("CIFAR10", "resnet32")], ids=lambda case: case[0])
def subset(request, tmp_path):
    """Two classes of 6 train and 3 test photographs: (paths, backbone)."""
    name, convnet = request.param
    root = os.environ.get("ESCORT_PHOTOGRAPHS")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"$ESCORT_PHOTOGRAPHS names no folder with {name} in it")
    source, paths = DatasetPaths(Path(root), name), DatasetPaths(tmp_path, name)
    for label in source.classes()[:2]:
        for mode, count in (("train", 6), ("test", 3)):
            (paths.folder(mode) / label).mkdir(parents=True)
            for image in source.images(label, mode)[:count]:
                shutil.copy(image, paths.folder(mode) / label)
    return paths, convnet


@pytest.mark.parametrize("resolution", ["high", "low"])
def test_both_commands(subset, resolution, tmp_path, capsys):
    paths, convnet = subset
    command = ["--data-dir", str(paths.data_dir), "--dataset", paths.dataset, "--resolution", resolution]
    quick = ["--seeds", "1", "--steps", "2", "--size", "64", "--model", "tiny", "--device", "cpu"]
    assert compress.main([*command, *quick]) == 0
    assert len(list(paths.folder("copies").glob("*/*_seed00.jpg"))) == 12
    config = ["--config", "exps/config.json", f"dataset={paths.dataset}", f"data_dir={paths.data_dir}", "device=cpu"]
    schedule = ["init_cls=1", "increment=1", "init_epoch=1", "epochs=1", "batch_size=4", "num_workers=0"]
    memory = ["memory_per_class=60", "real_per_class=1", "syn_per_class=2", "augmentations_per_image=1"]
    output = [f"output_dir={tmp_path / 'out'}", f"phase0_cache={tmp_path / 'cache'}", f"convnet_type={convnet}"]
    assert experiment.main([*config, *schedule, *memory, *output]) == 0
    assert "average" in capsys.readouterr().out + (tmp_path / "out" / "log.txt").read_text()
