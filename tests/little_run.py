"""compress/run.py called in process on a small dataset, and what came of it on disk."""

import os
from pathlib import Path

from compress import run
from compress.generators import build
from ControlNet.cldm.model import ModelError
from tests.folders import make_dataset
from utils.data.paths import DatasetPaths

LABELS = ("apple pie", "sushi")


def little_dataset(folder: Path) -> DatasetPaths:
    """Two classes of two images, 48 x 40 pixels."""
    return make_dataset(folder, LABELS, train=2, size=(48, 40), ending=".jpg")


def arguments(paths: DatasetPaths, checkpoint: Path, *, resolution="high", size="64", steps="1") -> list[str]:
    """What the tests' commands have in common."""
    where = ["--data-dir", str(paths.data_dir), "--dataset", paths.dataset, "--model", str(checkpoint)]
    small = ["--size", size, "--steps", steps, "--batch-size", "4", "--device", "cpu", "--seeds", "2"]
    return [*where, "--resolution", resolution, *small]


def command(paths: DatasetPaths, checkpoint: Path, capsys):
    """A function that runs the command with `arguments` and more options: -> (exit code, stdout, stderr)."""

    def call(*options, data=paths, **common):
        try:
            code = run.main([*arguments(data, checkpoint, **common), *options])
        except SystemExit as leave:
            code = leave.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return call


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def copies(paths: DatasetPaths, label: str = "*") -> dict[str, bytes]:
    files = paths.folder("copies").glob(f"{label}/*.jpg")
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def without_weights(monkeypatch) -> None:
    """From now on a model that is loaded fails the test, and weights that are looked for are not there."""

    def gone(*_):
        raise ModelError("no checkpoint: it has gone")

    monkeypatch.setattr(build, "load_model", None)
    monkeypatch.setattr(build, "weights_fingerprint", gone)


class Killed(BaseException):
    pass


def kill_at(moment: int, monkeypatch) -> None:
    moved = []

    def replace_until_killed(source, target, move=os.replace):
        if Path(target).name.startswith("settings"):  # what was decided, before the first file
            return move(source, target)
        if len(moved) >= moment:
            raise Killed
        moved.append(target)
        return move(source, target)

    monkeypatch.setattr(os, "replace", replace_until_killed)
