"""Training from the memory's file alone (memory_only): the numbers of an ordinary run, with the old classes deleted."""

import json
import shutil

import pytest
import torch
from PIL import Image

from compress import run as compress
from compress.forms import form_named
from compress.presets import HIGH
from compress.training.exemplars import Cost
from models import catalogue
from models.training.trainer import Trainer
from tests.conftest import long_but
from tests.folders import save_noise
from tests.little_config import results, train_little, without
from utils.data.images import image_bits, read_image
from utils.data.paths import DatasetPaths
from utils.memory import archive
from utils.memory.budget import FILL
from utils.memory.exemplars import ExemplarMemory

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

LABELS = ("apple pie", "crème", "pho", "sushi")
TEXTS = {"apple pie": "a pie of apples", "pho": "a soup"}
FORMS = ["real", "webp:10@20", "edges+webp:10@16", "text", "codebook:4@2", "codebook:4@3/2"]


def dataset(folder) -> DatasetPaths:
    """Four classes.  Of one, two images differ in nothing but the ending, and of another one is greyscale."""
    paths = DatasetPaths(folder, "Toy")
    for c, label in enumerate(LABELS):
        for i in range(5):
            save_noise(paths.folder("train") / label / f"{i}.jpg", 10 * c + i, (48, 40))
            save_noise(paths.folder("test") / label / f"{i}.png", 500 + 10 * c + i, (48, 40))
    save_noise(paths.folder("train") / "pho" / "3.png", 99, (48, 40))
    for name in ("1.jpg", "2.jpg"):
        with Image.open(paths.folder("train") / "sushi" / name) as image:
            image.convert("L").save(paths.folder("train") / "sushi" / name)
    (paths.root / "class_names.json").write_text(json.dumps(TEXTS))
    return paths


def options(checkpoint):
    return f"--model {checkpoint} --size 64 --steps 1 --batch-size 4 --resolution high"


def train(paths, out, checkpoint, form, **values):
    config = {
        **{"dataset": paths.dataset, "model_name": "icarl", "increment": 1, "seed": [1], "batch_size": 4, "epochs": 2},
        **{"budget_in": "bytes", "memory_bytes_per_class": 6000, "real_per_class": 1, "syn_per_class": "fill"},
        **{"syn_form": form, "augmentations_per_image": 2, "augmentation_scope": "exemplars"},
        **{"regenerate": "on_demand", "regenerate_options": options(checkpoint)},
        **({"syn_form": "edges", "real_per_class": 2, "syn_per_class": 0} if form == "real" else {}),
        **values,
    }
    return train_little(paths.data_dir, out, **config)


def numbers(out):
    """What a run measured: everything but times, and the number of copies that were there already."""
    runs = without(results(out)["runs"], "seconds", "seconds_reused", "copies_on_demand", "made_by")
    epochs = (out / "seed1" / "epochs.csv").read_text().splitlines()
    return runs, [row.rpartition(",")[0] for row in epochs]  # the last cell is seconds


def forget(paths, labels):
    """Delete all that the dataset's folder has of some classes but test images: their texts too."""
    texts = paths.root / "class_names.json"
    left = {label: text for label, text in json.loads(texts.read_text()).items() if label not in labels}
    texts.write_text(json.dumps(left))
    for folder in paths.root.iterdir():
        for label in labels:
            if folder.name != "test" and (folder / label).is_dir():
                shutil.rmtree(folder / label)


@pytest.fixture
def forgetful(monkeypatch):
    """Old classes are deleted when a phase is done; with `dies`, the run is then interrupted too."""

    def begin(paths, dies):
        original = Trainer.save_phase

        def save_phase(trainer):
            original(trainer)
            forget(paths, trainer.data.class_names[: trainer.method.nb_seen])
            if dies:
                raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "save_phase", save_phase)

    return begin


def ordinary_and_forgetful(tmp_path, checkpoint, forgetful, form, *, dies, ahead=False, **values):
    """The numbers of an ordinary run and of one from the memory alone."""
    found = []
    for name, changes in (("ordinary", {}), ("memory", {"memory_only": True})):
        paths = dataset(tmp_path / name)
        if ahead:
            where = ["--data-dir", str(paths.data_dir), "--dataset", "Toy", "--form", form, "--seeds", "2"]
            assert compress.main([*where, "--device", "cpu", *options(checkpoint).split()]) == 0
        if changes:
            forgetful(paths, dies)
        out = tmp_path / "out" / name
        codes = [train(paths, out, checkpoint, form, **values, **changes) for _ in range(4 if changes and dies else 1)]
        assert codes == [130] * (len(codes) - 1) + [0]
        found.append(numbers(out))
    assert not list((paths.folder("train")).iterdir())  # all is gone
    return found


@pytest.mark.long  # a quicker one is killed, too
@pytest.mark.parametrize("form", FORMS)
def test_a_run_from_the_memory_alone_is_the_ordinary_one(tmp_path, checkpoint, forgetful, form):
    ordinary, from_memory = ordinary_and_forgetful(tmp_path, checkpoint, forgetful, form, dies=False)
    assert from_memory == ordinary
    memory = ordinary[0][0]["phases"][-1]["memory"]
    assert (memory["nb_synthetic"] > 0) == (form != "real")


@pytest.mark.long
@pytest.mark.parametrize("form", ["webp:10@20", "edges", "codebook:4@3/2"])
def test_a_killed_run_goes_on_from_the_memory_alone(tmp_path, checkpoint, forgetful, form):
    """A shared budget in units moves exemplars from one form to the next; real ones are replaced by copies too."""
    values = {"augmentation_prob": 0.5}
    if form == "edges":
        units = {"memory_bytes_per_class": None, "fixed_memory": False, "memory_size": 12, "syn_per_class": 2}
        values |= {"budget_in": "units", "real_per_class": 2, **units}
    ordinary, from_memory = ordinary_and_forgetful(tmp_path, checkpoint, forgetful, form, dies=True, **values)
    assert from_memory == ordinary


@pytest.mark.long
@pytest.mark.parametrize("form", ["webp:10@20", "edges"])
def test_copies_that_were_made_ahead_are_made_again(tmp_path, checkpoint, forgetful, form):
    values = {"regenerate": "ahead", "regenerate_options": ""}
    runs = ordinary_and_forgetful(tmp_path, checkpoint, forgetful, form, dies=True, ahead=True, **values)
    for phases in (run[0]["phases"] for runs, _ in runs for run in [runs]):
        for phase in phases:
            del phase["copies"]  # of all images there, of the exemplars here
    assert runs[0] == runs[1]


TINY = {
    "coil": {"old_class_means": "exemplars"},
    "podnet": {"nb_proxy": 2, "ft_epochs": 1},
    "foster": {"compression_epochs": 1},
    "beefiso": {"fusion_epochs": 1},
    "tagfex": {"proj_hidden_dim": 8, "proj_output_dim": 4},
    "bic": {"memory_bytes_per_class": 9000, "real_per_class": 2},
}
SHARED = {
    **{"budget_in": "units", "memory_bytes_per_class": None, "fixed_memory": False, "memory_size": 7},
    **{"real_per_class": 2, "syn_per_class": 0, "m_rate_list": [0.4], "c_rate_list": [0, 0.2]},
}
"""RMM's memory: all classes share it, and it grows by what a later phase gives up."""
METHODS = [name for name, about in catalogue.methods().items() if about.uses_memory]


@pytest.mark.parametrize("method", long_but(METHODS, "rmm-icarl"))
def test_every_method_goes_on_from_the_memory_alone(tmp_path, checkpoint, forgetful, method):
    """After each phase its classes are deleted, with their texts, and the run is stopped and started again."""
    values = {"model_name": method, "epochs": 1, **TINY.get(method, {})}
    if method.startswith("rmm"):
        values |= SHARED | TINY.get(method.removeprefix("rmm-"), {})
    runs = ordinary_and_forgetful(tmp_path, checkpoint, forgetful, "webp:10@20", dies=True, **values)
    assert runs[0] == runs[1]
    memory = runs[0][0][0]["phases"][-1]["memory"]
    assert memory["nb_synthetic"] > 0 or method.startswith("rmm")


def test_coil_without_old_images_needs_the_means_of_exemplars(tmp_path, checkpoint, capsys):
    paths, out = dataset(tmp_path / "data"), tmp_path / "out" / "run"
    assert train(paths, out, checkpoint, "real", model_name="coil", memory_only=True) == 2
    assert "old_class_means: memory_only leaves no old images" in capsys.readouterr().err
    assert not out.exists()


def test_what_can_not_be_is_said_before_any_work(tmp_path, checkpoint, capsys):
    paths, out = dataset(tmp_path / "data"), tmp_path / "out" / "run"
    compress.main([*options(checkpoint).split(), "--data-dir", str(paths.data_dir), "--dataset", "Toy", "--seeds", "2",
                   "--device", "cpu"])  # fmt: skip
    for settings in paths.root.rglob("settings*.json"):
        settings.unlink()
    ahead = {"memory_only": True, "regenerate": "ahead", "regenerate_options": ""}
    capsys.readouterr()
    assert train(paths, out, checkpoint, "edges", **ahead) == 2
    said = capsys.readouterr().err
    assert "is not recorded" in said
    assert "Set regenerate=on_demand" in said
    assert train(paths, out, checkpoint, "real", model_name="joint", memory_only=True) == 2
    assert "memory_only: joint trains on all images of old classes" in capsys.readouterr().err
    forget(paths, ["sushi"])
    assert train(paths, out, checkpoint, "real", memory_only=True) == 2
    assert "no images in" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("form", long_but(("edges", "webp:10"), "webp:10"))
def test_an_unpacked_memory_has_the_images_sizes_and_no_pixels_of_them(tmp_path, checkpoint, form):
    paths = dataset(tmp_path / "data")
    out = tmp_path / "out" / "run" / "seed1"
    assert train(paths, out.parent, checkpoint, form) == 0
    kind = form_named(form, HIGH)
    ours = DatasetPaths(paths.data_dir, "Toy", files=kind.files)
    costs = {"real": Cost(None, ours), form: Cost(kind, ours)}
    memory = ExemplarMemory(ours, [("real", 1), (form, FILL)], costs, None, 2, bytes_budget=6000)
    memory.load_state_dict(torch.load(out / "checkpoints" / "phase02.pt", weights_only=True)["memory"])
    target = archive.unpack(out / "memory" / "phase02.memory", memory, tmp_path / "unpacked")
    there = {(image.parent.name, image.name) for image in target.folder("train").glob("*/*")}
    assert {(item.image.parent.name, item.image.name) for item in memory.items()} == there
    for item in memory.items():
        image = target.folder("train") / item.image.parent.name / item.image.name
        if item.role == "real":
            assert image.read_bytes() == item.image.read_bytes()
            continue
        assert image_bits(image) == image_bits(item.image)
        with pytest.raises(OSError, match="truncated"):
            read_image(image)
        assert target.find_kept(image).read_bytes() == ours.find_kept(item.image).read_bytes()
    assert json.loads((target.root / "class_names.json").read_text()).items() >= TEXTS.items()
