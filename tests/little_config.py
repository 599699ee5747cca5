"""One short run of main.py for all tests: its config, the command, what it wrote; and how close two tensors are."""

import json
from pathlib import Path

import torch

import main

KEYS = {
    **{"dataset": "Shapes", "init_cls": 2, "increment": 2, "model_name": "replay", "convnet_type": "resnet8"},
    **{"device": "cpu", "num_workers": 0, "init_epoch": 1, "epochs": 1},
}


def write_config(data_dir: Path, out: Path, /, **values) -> Path:
    """A config with `KEYS` and `values`, as a file beside the output folder; returns the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / "config.json"
    file.write_text(json.dumps({**KEYS, "data_dir": str(data_dir), "output_dir": str(out), **values}))
    return file


def train_little(data_dir: Path, out: Path, /, *overrides: str, **values) -> int:
    """Call main.py with `KEYS` and `values`; returns its exit code."""
    return main.main(["--config", str(write_config(data_dir, out, **values)), *overrides])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def phases(out: Path) -> list[dict]:
    """The phases' records of a run of one class order."""
    (run,) = results(out)["runs"]
    return run["phases"]


def without(content, *keys: str):
    """A JSON value without some keys, at any depth."""
    if isinstance(content, dict):
        return {key: without(value, *keys) for key, value in content.items() if key not in keys}
    return [without(value, *keys) for value in content] if isinstance(content, list) else content


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
