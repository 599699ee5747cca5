"""Every exemplar form through the commands: made, resumed, verified, repaired, shared, and trained with."""

import json
import re

import pytest
from PIL import Image

import main
from compress.forms import Cost, form_named
from compress.generators import build
from compress.job import Machine
from compress.presets import HIGH
from tests.conftest import long_but
from tests.folders import save_noise
from tests.little_run import command, little_dataset, tree
from utils.data.paths import DatasetPaths

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

PICTURES = ["webp:10@20", "jpeg:30", "latent:4@32"]
FORMS = [*PICTURES, "text", "edges@20", "edges:1.5", "edges+webp:10@16", "edges+colour@8"]
QUICK = ("webp:10@20", "text", "edges@20")  # a codec, copies without control, and with it
EACH = long_but(FORMS, *QUICK)


@pytest.fixture
def paths(tmp_path):
    return little_dataset(tmp_path)


@pytest.fixture
def compress(paths, checkpoint, capsys):
    return command(paths, checkpoint, capsys)


def of_form(paths: DatasetPaths, form: str) -> DatasetPaths:
    return DatasetPaths(paths.data_dir, paths.dataset, files=form_named(form, HIGH).files)


@pytest.mark.parametrize("form", EACH)
def test_a_form_is_made_resumed_verified_and_repaired(paths, compress, form, monkeypatch):
    """Copies of pictures are one each: all would be equal.  They need no model."""
    if form in PICTURES:
        monkeypatch.setattr(build, "load_model", None)
        monkeypatch.setattr(build, "weights_fingerprint", None)
    copies = 4 if form in PICTURES else 8
    before = tree(paths.root)
    code, out, err = compress("--form", form, "--dry-run")
    assert code == 0, err
    assert f"copies: {copies} to make" in out
    assert tree(paths.root) == before
    assert compress("--form", form, "--shard", "1/2")[0] == 0
    code, out, err = compress("--form", form)
    assert code == 0, err
    assert f"copies: {copies // 2} made, {copies // 2} skipped, 0 failed" in out
    whole = tree(paths.root)
    code, out, err = compress("--form", form)
    assert re.search(r": 0 made, 4 skipped, 0 failed\ncopies: 0 made", out)
    assert "0copy" not in err
    code, out, _ = compress("--form", form, "--verify")
    assert (code, "nothing is wrong" in out) == (0, True)

    ours = of_form(paths, form)
    first, second, third = (ours.images("apple pie") + ours.images("sushi"))[:3]
    ours.kept(first).write_bytes(b"broken")
    ours.kept(second).unlink()
    ours.copy(third, 0).unlink()
    code, out, _ = compress("--form", form, "--verify")
    assert code == 1
    assert all(str(file) in out for file in (ours.kept(first), ours.kept(second), ours.copy(third, 0)))
    assert compress("--form", form, "--repair")[0] == 0
    assert tree(paths.root) == whole
    for image in (first, third):
        with Image.open(ours.copy(image, 0)) as copy, Image.open(image) as original:
            assert copy.size == original.size
    assert compress("--form", form, "--quality", "50", "--steps", "2", "--dry-run")[0] == (0 if form in PICTURES else 2)


def test_forms_lie_side_by_side(paths, compress):
    for form in ("edges", *FORMS[:2]):
        assert compress("--form", form)[0] == 0
    names = {file.name for file in paths.root.iterdir()}
    assert names == {"train", "test", "edge_maps", "exemplars", "webp-10@20", "webp-10@20-copies", "jpeg-30",
                     "jpeg-30-copies"}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_costs(paths, compress, checkpoint, form):
    image = paths.images("sushi")[0]
    cost = Cost(form_named(form, HIGH).using(Machine(model=str(checkpoint))), of_form(paths, form))
    assert cost.kept_bytes(image) is None
    expected = cost.expected_bytes(image)
    assert compress("--form", form)[0] == 0
    assert cost.kept_bytes(image) == cost.expected_bytes(image) == expected
    assert cost.text_bytes(["sushi", "apple pie"]) == 14
    if form == "edges@20":
        assert cost.units(image) == pytest.approx(20 * 24 / (40 * 48 * 24))


def train(paths, out, capsys, **values):
    config = {
        **{"dataset": paths.dataset, "data_dir": str(paths.data_dir), "output_dir": str(out), "model_name": "replay"},
        **{"convnet_type": "resnet8", "device": "cpu", "init_cls": 1, "increment": 1, "seed": [1], "num_workers": 0},
        **{"memory_per_class": 2, "real_per_class": 1, "syn_per_class": 1, "augmentations_per_image": 2},
        **{"init_epoch": 1, "epochs": 1, "augmentation_scope": "exemplars", **values},
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config))
    return main.main(["--config", str(file)]), capsys.readouterr()


@pytest.mark.parametrize("regenerate", long_but(("ahead", "on_demand"), "on_demand"))
def test_training_on_text(paths, compress, checkpoint, tmp_path, capsys, regenerate):
    options = f"--model {checkpoint} --size 64 --steps 1 --batch-size 4 --resolution high"
    if regenerate == "ahead":
        assert compress("--form", "text")[0] == 0
    code, said = train(
        paths, tmp_path / "out", capsys, syn_form="text", regenerate=regenerate, regenerate_options=options
    )
    assert code == 0, said.err
    phase = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["phases"][0]
    assert phase["copies"]["made_by"][0]["settings"]["form"] == "text"
    assert phase["memory"]["units_total"] == 1  # the real exemplar: a text costs nothing


def test_a_form_without_a_cost_in_units_is_refused_by_a_budget_in_units(paths, compress, tmp_path, capsys):
    code, said = train(paths, tmp_path / "out", capsys, syn_form="webp:10")
    assert code == 2
    assert "syn_form: webp:10 has no count in units. Set budget_in=bytes" in said.err
    assert "Traceback" not in said.err


BUDGETS = [(form, regenerate) for form in FORMS for regenerate in ("ahead", "on_demand")]


@pytest.mark.parametrize(
    ("form", "regenerate"), long_but(BUDGETS, ("webp:10@20", "ahead"), ("edges@20", "ahead"), ("text", "on_demand"))
)
def test_training_under_a_budget_in_bytes(paths, compress, checkpoint, tmp_path, capsys, form, regenerate):
    """The bytes of results.json are those of the files, counted here, and every class is within its budget."""
    if regenerate == "ahead":
        assert compress("--form", form)[0] == 0
    real = max(image.stat().st_size for label in ("apple pie", "sushi") for image in paths.images(label))
    options = f"--model {checkpoint} --size 64 --steps 1 --batch-size 4 --resolution high"
    values = {"budget_in": "bytes", "memory_bytes_per_class": real + 3000, "syn_per_class": "fill", "syn_form": form}
    code, said = train(paths, tmp_path / "out", capsys, regenerate=regenerate, regenerate_options=options, **values)
    assert code == 0, said.err
    phases = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["phases"]
    memory = phases[-1]["memory"]
    assert memory["bytes_budget"] == real + 3000
    assert 0 < memory["bytes_per_class_max"] <= memory["bytes_budget"]
    assert memory["nb_real"] == 2
    assert memory["nb_synthetic"] > 0
    assert memory["bytes_total"] <= 2 * memory["bytes_budget"]
    (archive,) = (tmp_path / "out").rglob("memory/phase01.zip")
    assert memory["bytes_total"] < memory["archive_bytes"] == archive.stat().st_size
    assert (memory["units_total"] is None) == any(word in form for word in ("webp", "jpeg", "colour"))
    ours, texts = of_form(paths, form), len("apple pie") + len("sushi")
    if regenerate == "on_demand":  # what is on disk is what is kept
        kept = ours.root / ours.files.kept
        assert (
            memory["bytes_prompts"]
            == sum(file.stat().st_size for file in kept.rglob("*") if file.suffix in ours.files.kept_endings) + texts
        )


def test_a_budget_in_bytes_is_refused_with_its_arithmetic(paths, compress, tmp_path, capsys):
    values = {"budget_in": "bytes", "syn_form": "webp:10@20"}
    for change, words in (
        ({"memory_bytes_per_class": 2000, "real_per_class": 9}, ["9 real x ", "bytes > 2,000"]),
        ({"memory_bytes_per_class": 30, "real_per_class": 0, "syn_per_class": "fill"}, ["1 webp:10@20 x ", "> 30"]),
        ({"real_per_class": 1}, ["budget_in: bytes needs memory_bytes_per_class"]),
        ({"memory_bytes_per_class": 999, "real_per_class": None}, ["real_per_class must be given"]),
    ):
        code, said = train(paths, tmp_path / "out", capsys, **values, **change)
        assert code == 2
        assert all(word in said.err for word in words), said.err
        assert "Traceback" not in said.err


def test_the_answer_to_missing_copies_is_the_command_that_made_the_others(
    paths, checkpoint, compress, tmp_path, capsys
):
    assert compress("--guidance", "7", "--quality", "80")[0] == 0
    save_noise(paths.folder("train") / "sushi" / "new.jpg", 9, (48, 40))
    code, said = train(paths, tmp_path / "out", capsys)
    assert code == 2
    made_by = f"--resolution high --size 64 --steps 1 --guidance 7.0 --quality 80 --model {checkpoint}"
    (line,) = [line for line in said.err.splitlines() if line.startswith("python compress/run.py")]
    assert set(made_by.split()) <= set(line.split())
    assert "--seeds 2" in line
    code, out, _ = compress(*line.split()[2:])
    assert (code, "copies: 2 made, 8 skipped" in out) == (0, True)
