"""README's commands for one's own photographs; and the two commands on real ones: folders named by $ESCORT_PHOTOGRAPHS.

ESCORT_PHOTOGRAPHS=<data-dir> pytest tests/test_photographs.py      # with Imagenette224/ and CIFAR10/ in it
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main as experiment
from compress import run as compress
from utils.data.paths import DatasetPaths

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["init_epoch=1", "epochs=1", "init_milestones=[]", "milestones=[]"]


@pytest.mark.long
def test_readmes_commands_for_ones_own_photographs(tmp_path):
    """As they stand there, on eight small pictures for each of four classes, and with one epoch a phase."""
    rng = np.random.default_rng(0)
    for label in ("golf ball", "church", "tench", "Döner"):
        (tmp_path / "PHOTOS" / label).mkdir(parents=True)
        for number in range(8):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            small.resize((96, 72)).save(tmp_path / "PHOTOS" / label / f"IMG {number}.JPEG")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own photographs")[2]
    lines = section.partition("```\n")[2].partition("```")[0].splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ["-m", "utils.curate"],
        ["-m", "exps.pareto"],
        ["main.py", "--config"],
    ]
    environment = {key: value for key, value in os.environ.items() if key != "ESCORT_DATA_DIR"}
    said = []
    for line in lines:
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in shlex.split(line, comments=True)[1:]]
        command = [sys.executable, *words, *SHORT * (words[0] != "-m")]
        environment["PYTHONPATH"] = str(ROOT)
        said.append(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True))
    assert "32 of 32 images were written now" in said[0].stdout
    assert "Mine: 4 classes" in said[1].stdout
    assert {line.split()[0] for line in said[1].stdout.splitlines() if line} >= {"real", "webp:10", "edges"}
    assert "average" in said[2].stdout
    assert (tmp_path / "outputs" / "photographs" / "report.html").is_file()


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


@pytest.mark.shared_data
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
