"""predict, evaluate and export, called as a user calls them, against results.json and the transforms of evaluation."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from models.use import export
from models.use.learner import Learner
from tests.conftest import long_but
from tests.shapes import SHAPES, make_shapes
from utils.data.augment import Normalise, SmallTest
from utils.data.augment_large import LargeTest
from utils.data.datasets import IMAGENET_STATISTICS

pytestmark = pytest.mark.xdist_group("use")  # its runs are trained once, not once a worker
METHODS = {"icarl": "resnet8", "foster": "resnet8", "podnet": "resnet8"}  # a network of its own each


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
            config = {
                "dataset": "shapes",  # in another case than its folder, as in PyCIL's files
                "data_dir": str(data_dir),
                "output_dir": str(folder / "out"),
                "device": "cpu",
            }
            config |= {"init_cls": 2, "increment": 2, "model_name": method, "convnet_type": METHODS[method]}
            config |= {"init_epoch": 1, "epochs": 1, "init_lr": 0.05, "lrate": 0.05, "batch_size": 8, "num_workers": 0}
            config |= {"memory_per_class": 2, "keep_checkpoints": 2, "logger": ["csv"]}
            own = {"foster": {"compression_epochs": 1}, "podnet": {"ft_epochs": 1}}
            (folder / "config.json").write_text(json.dumps(config | own.get(method, {})))
            assert main.main(["--config", str(folder / "config.json")]) == 0
            made[method] = folder / "out"
        return made[method]

    return call


def phase_of(run: Path, phase: int) -> dict:
    return json.loads((run / "results.json").read_text())["runs"][0]["phases"][phase]


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_gives_the_accuracies_of_results_json(trained, data_dir, tmp_path, method):
    run, file = trained(method), tmp_path / "figures.json"
    asked = [(["--data", str(data_dir / "Shapes"), "--output", str(file)], 2)]
    asked += [(["--phase", "1", "--output", str(file)], 1)]  # the run's own dataset
    for options, phase in asked:
        assert main.main(["evaluate", str(run), "--device", "cpu", *options]) == 0
        figures, expected = json.loads(file.read_text()), phase_of(run, phase)
        for classifier in ("cnn", "nme"):
            assert {key: figures[classifier][key] for key in expected[classifier]} == expected[classifier]


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


def test_predict(trained, data_dir, tmp_path, capsys):
    run, file = trained("icarl"), tmp_path / "predictions.csv"
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


@pytest.mark.parametrize(
    ("method", "kind"),
    long_but((("icarl", "onnx"), ("icarl", "torchscript"), ("foster", "torchscript")), ("foster", "torchscript")),
)
def test_an_exported_file_computes_what_the_network_does(trained, data_dir, tmp_path, capsys, method, kind):
    if kind == "onnx":
        runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")
        pytest.importorskip("onnxscript")
    file, run = tmp_path / f"network.{kind}", str(trained(method))
    capsys.readouterr()  # what training has printed
    assert main.main(["export", run, "--to", kind, "--output", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    learner = Learner(trained(method), device="cpu")
    if kind == "onnx":
        session = runtime.InferenceSession(file)
        class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

        def exported(images):
            return torch.tensor(session.run(None, {"images": images.numpy()})[0])
    else:
        exported = torch.jit.load(file)
        class_names = exported.class_names
    assert class_names == learner.class_names
    pictures = [np.asarray(Image.open(path)) for path in sorted((data_dir / "Shapes" / "test").glob("*/*.png"))]
    with torch.no_grad():
        expected = learner.network(learner.data.normalise(learner.data.test_transform(pictures))).logits.softmax(dim=1)
        images = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2)
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-4)
        odd = torch.randint(0, 256, (3, 3, 45, 70), dtype=torch.uint8)
        torch.testing.assert_close(exported(odd), export.classifier(learner)(odd), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 30), (100, 64), (61, 97), (20, 20)])
def test_the_exported_transform_is_that_of_evaluation(size):
    """To one level of 255 where Pillow and torch round the other way."""
    rng, normalise = np.random.default_rng(0), Normalise(*IMAGENET_STATISTICS)
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    images = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None]
    bicubic = LargeTest(64, 71, "bicubic"), (64, 71, 71, True)
    for test, sizes in ((SmallTest(), (32, 32, 28, False)), (LargeTest(), (224, 256, 256, False)), bicubic):
        transform = export.TestPictures(*sizes, IMAGENET_STATISTICS)
        expected = normalise(test([test.prepare(picture)]))
        levels = ((transform(images) - expected) / transform.scale).abs()
        assert levels.max() < 1.01
        assert (levels > 0.5).float().mean() < 0.02


def test_mistakes_are_one_line(trained, tmp_path, capsys, monkeypatch):
    run = str(trained("icarl"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for arguments, said in (
        (["predict", str(tmp_path), "--images", "."], "is not a run's output folder"),
        (["predict", run, "--images", str(tmp_path / "nowhere")], "nowhere is not there"),
        (["predict", run, "--images", str(tmp_path / "empty")], "has no pictures"),
        (["evaluate", run, "--data", str(tmp_path / "empty")], "no pictures of"),
        (["evaluate", run, "--phase", "0"], "is not kept, only of 1, 2"),
        (["evaluate", run, "--seed", "7"], "only of 1993"),
        (["export", run, "--to", "onnx"], "pip install onnx onnxscript"),
    ):
        assert main.main(arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert said in error[0]
