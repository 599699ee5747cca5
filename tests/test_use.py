"""predict, evaluate and export, called as a user calls them, against results.json and the transforms of evaluation."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import main
from models.use import export
from models.use.learner import Learner
from tests.conftest import long_but
from tests.little_config import phases, train_little
from tests.little_trainer import SHORT, keys_of
from tests.methods import METHODS
from tests.shapes import SHAPES, make_shapes
from utils.data.augment import LargeTest, Normalise, SmallTest
from utils.data.datasets import IMAGENET_STATISTICS

pytestmark = pytest.mark.xdist_group("use")  # its runs are trained once, not once a worker
QUICK = ("icarl", "foster", "rmm-icarl")
NETWORKS = [*{METHODS[name].build_network: name for name in (*METHODS, "icarl", "foster")}.values()]
"""One method for each way to build a network."""
EXPORTED = long_but(
    [(method, "head") for method in NETWORKS] + [("icarl", "nme"), ("der", "nme"), ("ssre", "nme")],
    ("icarl", "nme"),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder, train=4, test=6)
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A function: method -> the output folder of a short run of three phases."""
    made = {}

    def call(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            config = {"dataset": "shapes"}  # in another case than its folder, as in PyCIL's files
            config |= {"model_name": method, **SHORT, "init_lr": 0.05, "lrate": 0.05, "batch_size": 8}
            config |= {"memory_per_class": 2, "keep_checkpoints": 2, "logger": ["csv"], **keys_of(method)}
            assert train_little(data_dir, folder / "out", **config) == 0
            made[method] = folder / "out"
        return made[method]

    return call


def phase_of(run: Path, phase: int) -> dict:
    return phases(run)[phase]


@pytest.mark.parametrize("method", long_but(METHODS, *QUICK))
def test_evaluate_gives_the_accuracies_of_results_json(trained, data_dir, tmp_path, method):
    run, file = trained(method), tmp_path / "figures.json"
    asked = [(["--data", str(data_dir / "Shapes"), "--output", str(file)], 2)]
    asked += [(["--phase", "1", "--output", str(file)], 1)]  # the run's own dataset
    for options, phase in asked:
        assert main.main(["evaluate", str(run), "--device", "cpu", *options]) == 0
        figures, expected = json.loads(file.read_text()), phase_of(run, phase)
        for classifier in ("cnn", "nme"):
            if expected[classifier] is None:
                assert figures[classifier] is None
            else:
                assert {key: figures[classifier][key] for key in expected[classifier]} == expected[classifier]


def test_predict_by_nearest_means(trained, data_dir, tmp_path):
    """Cosines to the class means; the first class is the one that NME counts."""
    run, file, images = trained("icarl"), tmp_path / "p.csv", data_dir / "Shapes" / "test"
    assert main.main(["predict", str(run), f"--images={images}", "--classifier=nme", f"--output={file}"]) == 0
    rows = list(csv.DictReader(file.open(newline="")))
    right = [row["class"] == Path(row["file"]).parent.name for row in rows]
    assert 100 * np.mean(right) == pytest.approx(phase_of(run, 2)["nme"]["top1"])
    assert all(-1 <= float(row["similarity_5"]) <= float(row["similarity"]) <= 1 for row in rows)


def test_evaluate_by_one_classifier(trained, capsys):
    run = str(trained("icarl"))
    capsys.readouterr()
    for classifier, key in (("head", "cnn"), ("nme", "nme")):
        assert main.main(["evaluate", run, "--classifier", classifier]) == 0
        first, _, *classes = capsys.readouterr().out.splitlines()
        expected = phase_of(trained("icarl"), 2)[key]
        assert first.startswith(f"{key.upper()}: top1 {expected['top1']:.2f} %")
        assert {line[10:].strip(): float(line[:7]) for line in classes} == pytest.approx(
            expected["per_class"], abs=5e-3
        )


@pytest.mark.parametrize(
    ("command", "its_own", "others"),
    [("predict", "--images", "--data"), ("evaluate", "--data", "--images"), ("export", "ONNX", "--images")],
)
def test_each_command_has_its_own_help(capsys, command, its_own, others):
    assert main.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert its_own in said
    assert "--classifier {head,nme}" in said
    assert others not in said


def test_a_run_records_its_dataset_s_folder(trained):
    for name in ("config.json", "results.json"):
        record = json.loads((trained("icarl") / name).read_text())
        assert record.get("config", record)["dataset"] == "Shapes"


def test_evaluate_on_some_of_the_classes(trained, data_dir, tmp_path, capsys):
    run = trained("icarl")
    for label in ("red disc", "green disc"):
        shutil.copytree(data_dir / "Shapes" / "test" / label, tmp_path / "some" / label)
    shutil.copytree(tmp_path / "some" / "red disc", tmp_path / "some" / "no class of it")
    assert (
        main.main(["evaluate", str(run), "--data", str(tmp_path / "some"), "--output", str(tmp_path / "f.json")]) == 0
    )
    figures, expected = json.loads((tmp_path / "f.json").read_text()), phase_of(run, 2)["cnn"]["per_class"]
    assert "12 pictures of 2 classes" in capsys.readouterr().out
    assert figures["cnn"]["top1"] == pytest.approx((expected["red disc"] + expected["green disc"]) / 2)
    assert figures["cnn"]["per_class"]["blue disc"] is None


@pytest.mark.parametrize("method", long_but([*NETWORKS, "rmm-icarl"], "rmm-icarl"))
def test_predict(trained, data_dir, tmp_path, capsys, method):
    run, file = trained(method), tmp_path / "predictions.csv"
    images = tmp_path / "images"
    shutil.copytree(data_dir / "Shapes" / "test", images / "by class")
    (images / "broken.jpg").write_bytes(b"no picture")
    assert main.main(["predict", str(run), "--images", str(images), "--output", str(file)]) == 1
    assert "broken.jpg" in capsys.readouterr().err
    rows = list(csv.DictReader(file.open(newline="")))
    assert len(rows) == 6 * len(SHAPES)
    for label, accuracy in phase_of(run, 2)["cnn"]["per_class"].items():
        of_class = [row for row in rows if Path(row["file"]).parent.name == label]
        assert 100 * sum(row["class"] == label for row in of_class) / len(of_class) == pytest.approx(accuracy)
    names = ["", *(f"_{n}" for n in range(2, 6))]
    for row in rows:
        shown = [float(row[f"probability{name}"]) for name in names]
        assert shown == sorted(shown, reverse=True)
        assert sum(shown) <= 1.001
        assert len({row[f"class{name}"] for name in names}) == 5

    assert main.main(["predict", str(run), "--images", rows[0]["file"]]) == 0
    assert list(csv.reader(capsys.readouterr().out.splitlines()))[1] == list(rows[0].values())


@pytest.mark.parametrize(("method", "classifier"), EXPORTED)
def test_an_exported_file_computes_what_the_network_does(trained, data_dir, tmp_path, capsys, method, classifier):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")
    pytest.importorskip("onnxscript")
    file, run = tmp_path / "network.onnx", str(trained(method))
    capsys.readouterr()  # what training has printed
    assert main.main(["export", run, "--classifier", classifier, "--output", str(file)]) == 0
    assert capsys.readouterr().out.split() == [str(file), f"{file}.json"]
    said, learner = json.loads(Path(f"{file}.json").read_text()), Learner(trained(method), device="cpu")
    assert said["class_names"] == learner.class_names
    pictures = sorted((data_dir / "Shapes" / "test").glob("*/*.png"))
    images = np.stack([as_told(Image.open(path), said["transform"]) for path in pictures])
    assert list(images.shape[1:]) == said["input"]["shape"][1:]
    session = runtime.InferenceSession(file)
    (found,) = session.run([said["output"]["name"]], {said["input"]["name"]: images})
    with torch.no_grad():
        outputs = learner.network(torch.from_numpy(images))
    expected = outputs.logits.float().softmax(dim=1)
    if classifier == "nme":
        expected = F.cosine_similarity(outputs.features[:, None], learner.class_means[None], dim=2)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    right = [said["class_names"][i] == path.parent.name for i, path in zip(found.argmax(1), pictures, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(
        phase_of(trained(method), 2)["cnn" if classifier == "head" else "nme"]["top1"]
    )


def as_told(picture: Image.Image, transform: dict) -> np.ndarray:
    """What docs/use.md tells people to do with a picture, by the JSON alone."""
    shorter, side = min(picture.size), transform["crop"]
    if not transform["not_resized_from"] <= shorter <= transform["resize"]:
        sizes = [length * transform["resize"] // shorter for length in picture.size]
        picture = picture.resize(sizes, getattr(Image.Resampling, transform["interpolation"].upper()))
    left, top = (round((length - side) / 2) if length >= side else -((side - length) // 2) for length in picture.size)
    pixels = np.asarray(picture.convert("RGB").crop((left, top, left + side, top + side)))
    return ((pixels / 255 - transform["mean"]) / transform["std"]).astype(np.float32).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 30), (100, 64), (61, 97), (20, 20)])
@pytest.mark.parametrize("test", [SmallTest(), LargeTest(), LargeTest(64, 71, "bicubic")])
def test_the_transform_is_told_as_it_is(size, test):
    """To one level of 255 where Pillow and torch round the other way."""
    rng, normalise = np.random.default_rng(0), Normalise(*IMAGENET_STATISTICS)
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    defaults = SimpleNamespace(test_transform=test, normalise=normalise)
    learner = SimpleNamespace(data=SimpleNamespace(defaults=defaults))
    told = as_told(picture, export.transform(learner))
    expected = normalise(test([test.prepare(picture)]))[0].numpy()
    levels = np.abs(told - expected) * 255 * np.array(normalise.std)[:, None, None]
    assert levels.max() < 1.01
    assert (levels > 0.5).mean() < 0.02


def test_mistakes_are_one_line(trained, tmp_path, capsys, monkeypatch):
    run, without = str(trained("icarl")), str(trained("finetune"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for arguments, said in (
        (["predict", str(tmp_path), "--images", "."], "is not a run's output folder"),
        (["predict", run, "--images", str(tmp_path / "nowhere")], "nowhere is not there"),
        (["predict", run, "--images", str(tmp_path / "empty")], "has no pictures"),
        (["evaluate", run, "--data", str(tmp_path / "empty")], "no pictures of"),
        (["evaluate", run, "--phase", "0"], "is not kept, only of 1, 2"),
        (["evaluate", run, "--seed", "7"], "only of 1993"),
        (["export", run], "pip install onnx onnxscript"),
        (["predict", without, "--classifier", "nme", "--images", "."], "has no class means (finetune"),
    ):
        assert main.main(arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert said in error[0]
