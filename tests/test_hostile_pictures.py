"""Picture forms on pictures of odd sizes: made, verified, repaired, archived, and trained from the memory alone."""

import importlib.util
import shutil

import numpy as np
import pytest
from PIL import Image

from compress import run as compress
from compress.forms import form_named, pixels
from compress.presets import HIGH
from models.training.trainer import Trainer
from tests.folders import save_noise
from tests.little_config import phases, train_little
from utils.data.images import read_image
from utils.data.paths import DatasetPaths
from utils.memory import archive

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

NEEDS_JXL = pytest.mark.skipif(importlib.util.find_spec("pillow_jxl") is None, reason="needs pillow-jxl-plugin")
FORMS = ["jpeg:10", "webp:10", "avif:10", "avif:30@16", pytest.param("jxl:10", marks=NEEDS_JXL)]
SIZES = {"dot": (1, 1), "wide": (600, 4), "high": (3, 500), "grey": (28, 28), "small": (33, 47)}


def dataset(folder, form) -> DatasetPaths:
    """Three classes with a picture of each size; the 600 x 4 ones stand for 3000 x 20, which takes AVIF seconds."""
    paths = DatasetPaths(folder, "Odd", files=form_named(form, HIGH).files)
    for c, label in enumerate("abc"):
        for i, (name, size) in enumerate(SIZES.items()):
            file = save_noise(paths.folder("train") / label / f"{name}.png", 10 * c + i, size)
            if name == "grey":
                with Image.open(file) as image:
                    image.convert("L").save(file)
        save_noise(paths.folder("test") / label / "0.png", 100 + c, (32, 32))
    return paths


def command(paths, form, *options):
    return compress.main(["--data-dir", str(paths.data_dir), "--dataset", "Odd", "--form", form, "--seeds", "1",
                          "--device", "cpu", "--resolution", "low", *options])  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_made_verified_repaired(tmp_path, capsys, form):
    paths, kind = dataset(tmp_path, form), form_named(form, HIGH)
    assert command(paths, form) == 0
    assert command(paths, form, "--verify") == 0
    images = [image for label in "abc" for image in paths.images(label)]
    for image in images:
        original = pixels(image)
        decoded = kind.condition(paths.kept(image).read_bytes(), original.shape[:2], original.ndim == 2)
        with Image.open(paths.copy(image, 0)) as copy:
            assert copy.size == read_image(image).size
            if kind.side is None:
                assert np.array_equal(np.asarray(copy.convert("RGB")), as_kind(decoded.start, original))
    broken = paths.kept(images[-1])
    before = broken.read_bytes()
    broken.write_bytes(b"\x80" * len(before))
    capsys.readouterr()
    assert command(paths, form, "--verify") == 1
    assert str(broken) in capsys.readouterr().out
    assert command(paths, form, "--repair") == 0
    assert broken.read_bytes() == before


def as_kind(picture, original):
    """The copy of a greyscale image is greyscale."""
    if original.ndim == 3:
        return picture
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


@pytest.mark.parametrize("form", ["jpeg:10", "webp:10", "avif:10"])
def test_a_picture_of_one_row(tmp_path, capsys, form):
    paths = DatasetPaths(tmp_path, "Odd", files=form_named(form, HIGH).files)
    image = save_noise(paths.folder("train") / "a" / "row.png", 0, (20_000, 1))
    code = command(paths, form)
    said = capsys.readouterr()
    if form == "webp:10":
        assert code == 1
        assert "20000 x 1 pixels can't be written as WebP" in said.out + said.err
        return
    assert code == 0
    with Image.open(paths.copy(image, 0)) as copy:
        assert copy.size == (20_000, 1)


@pytest.mark.parametrize("form", FORMS)
def test_trained_from_the_memory_alone_with_restarts(tmp_path, monkeypatch, form):
    found, save_phase = [], Trainer.save_phase

    def save_and_stop(trainer):
        save_phase(trainer)
        for label in trainer.data.class_names[: trainer.method.nb_seen]:
            for folder in trainer.data.paths.root.iterdir():
                if folder.name != "test":
                    shutil.rmtree(folder / label, ignore_errors=True)
        raise KeyboardInterrupt

    for name in ("ordinary", "alone"):
        paths, out = dataset(tmp_path / name, form), tmp_path / "out" / name
        config = {
            **{"dataset": "Odd", "model_name": "icarl", "init_cls": 1, "increment": 1, "seed": [1], "batch_size": 4},
            **{"budget_in": "bytes", "memory_bytes_per_class": 20_000, "real_per_class": 1, "syn_per_class": 4},
            **{"syn_form": form, "augmentation_scope": "exemplars", "regenerate": "on_demand"},
        }
        if name == "alone":
            config["memory_only"] = True
            monkeypatch.setattr(Trainer, "save_phase", save_and_stop)
        codes = [train_little(paths.data_dir, out, **config) for _ in range(4 if name == "alone" else 1)]
        assert codes == [130] * (len(codes) - 1) + [0]
        found.append([(phase["cnn"], phase["nme"], phase["memory"]) for phase in phases(out)])
    assert found[0] == found[1]
    assert found[0][-1][2]["nb_synthetic"] > 6
    stored = archive.read(tmp_path / "out" / "alone" / "seed1" / "memory" / "phase02.memory")
    assert len({e.row.size for c in stored.classes for e in c.exemplars if e.form == form}) > 2
