"""Every exemplar form through the commands: made, resumed, verified, repaired, shared, and trained with."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from compress.forms import form_named
from compress.generators import build
from compress.options import Machine
from compress.presets import HIGH
from compress.training.exemplars import Cost
from tests.conftest import long_but
from tests.folders import save_noise
from tests.little_config import phases, train_little
from tests.little_run import tree
from utils.data import codecs
from utils.data.images import read_image
from utils.data.paths import DatasetPaths

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

PICTURES = ["webp:10@20", "jpeg:30", "colour@8", "latent:4@32"]
CODES = ["codebook:4@3", "codebook:3x2@3/1"]
FORMS = [*PICTURES, "text", "edges@20", "edges:1.5", "edges+webp:10@16", "edges+colour@8", "thumb:40@8", *CODES]
ONE_COPY = [*PICTURES, "codebook:4@3"]
EACH = long_but(FORMS, "webp:10@20", "edges@20", "codebook:4@3")  # a codec, copies under control, copies of a code


def of_form(paths: DatasetPaths, form: str) -> DatasetPaths:
    return DatasetPaths(paths.data_dir, paths.dataset, files=form_named(form, HIGH).files)


@pytest.mark.parametrize("form", EACH)
def test_a_form_is_made_resumed_verified_and_repaired(paths, compress, form, monkeypatch):
    """Copies of pictures and of whole codes are one each: all would be equal.  Pictures need no model."""
    if form in PICTURES:
        monkeypatch.setattr(build, "load_model", None)
        monkeypatch.setattr(build, "weights_fingerprint", None)
    copies = 4 if form in ONE_COPY else 8
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


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_one_image_and_what_it_costs(paths, compress, checkpoint, form):
    ours = of_form(paths, form)
    cost = Cost(form_named(form, HIGH).using(Machine(model=str(checkpoint))), ours)
    image = ours.images("sushi")[0]
    assert cost.kept_bytes(image) is None
    expected = cost.expected_bytes(image)
    one = ("--form", form, "--classes", "sushi", "--limit", "1")
    code, out, err = compress(*one)
    assert (code, "0 failed" in out) == (0, True), err
    assert ours.kept(image).stat().st_size > 0 or form == "text"
    assert cost.kept_bytes(image) == cost.expected_bytes(image) == expected
    assert len(cost.kept(image)) == expected
    if form == "edges@20":
        assert cost.units(image) == pytest.approx(20 * 24 / (40 * 48 * 24))
    with Image.open(ours.copy(image, 0)) as copy, Image.open(image) as original:
        assert copy.size == original.size
    before = tree(paths.root)
    code, out, _ = compress(*one)
    assert (code, "copies: 0 made" in out) == (0, True)
    assert tree(paths.root) == before


def test_auto_is_bf16_where_the_cpu_computes_in_it(paths, compress, checkpoint, tmp_path, capsys, monkeypatch):
    """The default of recent server CPUs: recorded, other than float32's, and what main.py trains with."""
    capable = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    options = f"--model {checkpoint} --size 64 --steps 1 --batch-size 1 --resolution high"
    values = {"syn_form": "text", "regenerate": "on_demand", "augmentations_per_image": 1, "nme": False}
    code, said = train(paths, tmp_path / "out", capsys, regenerate_options=options, **values)
    assert code == 0, said.err
    assert phases(tmp_path / "out")[1]["copies"]["made_by"][0]["settings"]["precision"] == "bf16"
    (copy,) = of_form(paths, "text").folder("copies").rglob("*.jpg")  # of phase 0's class, which phase 1 reads
    in_bf16, capable = copy.read_bytes(), {}
    code, _, err = compress("--form", "text")
    assert (code, "precision 'bf16' -> 'fp32'" in err) == (2, True), err
    options = ("--classes", copy.parent.name, "--replace", "--precision", "fp32")
    assert compress("--form", "text", *options)[0] == 0
    assert copy.read_bytes() != in_bf16


def test_what_a_code_depends_on_is_recorded(paths, compress, checkpoint):
    """Model, precision, the class's text and the generated size; a code of others is refused, --replace makes it."""
    form, ours = "codebook:4@3", of_form(paths, "codebook:4@3")
    assert compress("--form", form)[0] == 0
    before = tree(ours.folder("kept"))
    (record,) = [json.loads(text) for name, text in before.items() if name.startswith("settings")]
    assert record["settings"]["model"] == build.model_fingerprint(Machine(model=str(checkpoint)))
    assert (record["settings"]["precision"], record["settings"]["shorter_side"]) == ("fp32", 64)
    assert record["class_texts"] == {"apple pie": "apple pie", "sushi": "sushi"}
    for change, words in (
        (("--precision", "bf16"), "precision 'fp32' -> 'bf16'"),
        (("--prompt-template", "a {label}"), "prompt template"),
        (("--size", "128"), "shorter side 64 -> 128"),
    ):
        code, _, err = compress("--form", form, *change)
        assert (code, words in err, "codes and copies there were made" in err) == (2, True, True), err
    assert tree(ours.folder("kept")) == before
    (paths.root / "class_names.json").write_text(json.dumps({"sushi": "raw fish"}))
    code, _, err = compress("--form", form)
    assert (code, "text of class 'sushi': 'sushi' -> 'raw fish'" in err, "in 1 of 2 classes" in err) == (2, True, True)
    assert compress("--form", form, "--replace")[0] == 0
    after = tree(ours.folder("kept"))
    assert {name for name in before if before[name] != after[name]} <= {"sushi/0.bin", "sushi/1.bin"}
    (record,) = [json.loads(after[name]) for name in after.keys() - before.keys() if name.startswith("settings")]
    assert record["number"] == 2
    assert record["class_texts"] == {"sushi": "raw fish"}


@pytest.mark.parametrize(("width", "height"), long_but([(1, 1), (1, 20000)], (1, 1)))
def test_a_code_of_any_size(paths, compress, width, height):
    for label in ("apple pie", "sushi"):
        for image in paths.images(label):
            image.unlink()
    save_noise(paths.folder("train") / "sushi" / "odd.png", 1, (width, height))
    code, _, err = compress("--form", "codebook:4@2", "--classes", "sushi", "--batch-size", "1")
    assert code == 0, err
    ours = of_form(paths, "codebook:4@2")
    (image,) = ours.images("sushi")
    assert len(ours.kept(image).read_bytes()) == 1
    with Image.open(ours.copy(image, 0)) as copy:
        assert copy.size == (width, height)
    assert compress("--form", "codebook:4@2", "--classes", "sushi", "--verify")[0] == 0


def test_a_code_that_is_broken_is_one_line(paths, compress):
    form, ours = "codebook:3@3", of_form(paths, "codebook:3@3")  # 9 bits in 2 bytes
    assert compress("--form", form)[0] == 0
    damage = {b"": "the file is empty", b"1": "a code of 1 bytes instead of 2", b"\xff\xff": "no code"}
    images = [*ours.images("sushi"), *ours.images("apple pie")][:3]
    for image, content in zip(images, damage, strict=True):
        ours.kept(image).write_bytes(content)
        ours.copy(image, 0).unlink()
    code, out, err = compress("--form", form)
    assert code == 1
    for image, words in zip(images, damage.values(), strict=True):
        (line,) = [line for line in out.splitlines() if str(ours.kept(image)) in line]
        assert words in line
    assert "Traceback" not in out + err
    assert compress("--form", form, "--repair")[0] == 0


def test_nothing_of_a_code_is_text_alone(paths, compress):
    """codebook:...@S/0 is the form text, with the sampler of codes, S + 1 steps and no guidance."""
    assert compress("--form", "codebook:4@3/0")[0] == 0
    assert compress("--form", "text", "--sampler", "ancestral", "--guidance", "1", steps="4")[0] == 0
    code, text = of_form(paths, "codebook:4@3/0"), of_form(paths, "text")
    pictures = []
    for ours in (code, text):
        pictures.append([read_image(ours.copy(image, k)).tobytes() for image in ours.images("sushi") for k in (0, 1)])
        assert {ours.kept(image).stat().st_size for image in ours.images("sushi")} == {0}
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) == 4


def test_pictures_that_earlier_versions_kept_as_files_are_not_made_again(paths, compress):
    form = form_named("webp:10@20", HIGH)
    assert compress("--form", form.name)[0] == 0
    ours = of_form(paths, form.name)
    images = [image for label in ("apple pie", "sushi") for image in ours.images(label)]
    cost = Cost(form, ours)
    before = [cost.kept(image) for image in images]
    for image, payload in zip(images, before, strict=True):
        size = codecs.reduced(*np.asarray(read_image(image)).shape[:2], 20)
        ours.kept(image).with_suffix(".webp").write_bytes(codecs.file_of(payload, "webp", 10, size, False))
        ours.kept(image).unlink()
    whole = tree(paths.root)
    code, out, _ = compress("--form", form.name)
    assert (code, "0 made, 4 skipped" in out) == (0, True)
    assert compress("--form", form.name, "--verify")[0] == 0
    assert [cost.kept(image) for image in images] == before
    assert [cost.kept_bytes(image) for image in images] == [len(payload) for payload in before]
    ours.find_kept(images[0]).write_bytes(b"RIFF")
    assert compress("--form", form.name, "--verify")[0] == 1
    assert compress("--form", form.name, "--repair")[0] == 0
    assert [cost.kept(image) for image in images] == before
    assert tree(paths.root).keys() - whole.keys() == {ours.kept(images[0]).relative_to(paths.root).as_posix()}


def test_forms_lie_side_by_side(paths, compress):
    for form in ("edges", *FORMS[:2]):
        assert compress("--form", form)[0] == 0
    names = {file.name for file in paths.root.iterdir()}
    assert names == {"train", "test", "edge_maps", "exemplars", "webp-10@20", "webp-10@20-copies", "jpeg-30",
                     "jpeg-30-copies"}  # fmt: skip


def train(paths, out, capsys, **values):
    config = {
        **{"dataset": paths.dataset, "init_cls": 1, "increment": 1, "seed": [1], "augmentations_per_image": 2},
        **{"memory_per_class": 2, "real_per_class": 1, "syn_per_class": 1, "augmentation_scope": "exemplars"},
    }
    return train_little(paths.data_dir, out, **{**config, **values}), capsys.readouterr()


@pytest.mark.parametrize("regenerate", long_but(("ahead", "on_demand"), "on_demand"))
def test_training_on_text(paths, compress, checkpoint, tmp_path, capsys, regenerate):
    options = f"--model {checkpoint} --size 64 --steps 1 --batch-size 4 --resolution high"
    if regenerate == "ahead":
        assert compress("--form", "text")[0] == 0
    code, said = train(
        paths, tmp_path / "out", capsys, syn_form="text", regenerate=regenerate, regenerate_options=options
    )
    assert code == 0, said.err
    phase = phases(tmp_path / "out")[0]
    assert phase["copies"]["made_by"][0]["settings"]["form"] == "text"
    assert phase["memory"]["units_total"] == 1  # the real exemplar: a text costs nothing


def test_a_form_without_a_cost_in_units_is_refused_by_a_budget_in_units(paths, compress, tmp_path, capsys):
    code, said = train(paths, tmp_path / "out", capsys, syn_form="webp:10")
    assert code == 2
    assert "syn_form: webp:10 has no count in units. Set budget_in=bytes" in said.err
    assert "Traceback" not in said.err


BUDGETS = [(form, regenerate) for form in FORMS for regenerate in ("ahead", "on_demand")]


@pytest.mark.parametrize(("form", "regenerate"), long_but(BUDGETS, ("webp:10@20", "ahead"), ("edges@20", "ahead")))
def test_training_under_a_budget_in_bytes(paths, compress, checkpoint, tmp_path, capsys, form, regenerate):
    """The bytes of results.json are those of the files, counted here, and every class is within its budget."""
    if regenerate == "ahead":
        assert compress("--form", form)[0] == 0
    real = max(image.stat().st_size for label in ("apple pie", "sushi") for image in paths.images(label))
    options = f"--model {checkpoint} --size 64 --steps 1 --batch-size 4 --resolution high"
    values = {"budget_in": "bytes", "memory_bytes_per_class": real + 3000, "syn_per_class": "fill", "syn_form": form}
    code, said = train(paths, tmp_path / "out", capsys, regenerate=regenerate, regenerate_options=options, **values)
    assert code == 0, said.err
    memory = phases(tmp_path / "out")[-1]["memory"]
    assert memory["bytes_budget"] == real + 3000
    assert 0 < memory["bytes_per_class_max"] <= memory["bytes_budget"]
    assert memory["nb_real"] == 2
    assert memory["nb_synthetic"] > 0
    assert memory["bytes_total"] <= 2 * memory["bytes_budget"]
    (archive,) = (tmp_path / "out").rglob("memory/phase01.memory")
    assert memory["bytes_total"] < memory["archive_bytes"] == archive.stat().st_size < memory["bytes_total"] + 300
    assert (memory["units_total"] is None) == any(word in form for word in ("webp", "jpeg", "thumb", "colour"))
    assert memory["bytes_names"] == 2 * 3 + len("apple pie") + len("sushi")
    ours = of_form(paths, form)
    if regenerate == "on_demand":  # what is on disk is what is kept
        kept = ours.root / ours.files.kept
        payloads = sum(file.stat().st_size for file in kept.rglob("*") if file.suffix in ours.files.kept_endings)
        assert 0 <= memory["bytes_prompts"] - payloads <= 2 * 6 + 2 * memory["nb_synthetic"]  # lengths and sizes


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
