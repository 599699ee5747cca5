"""The exemplar memory as one file."""

import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from compress.forms import Cost, examples, form_named, pixels
from compress.job import Machine
from compress.presets import HIGH
from tests.conftest import long_but
from tests.folders import make_dataset, save_noise
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory import archive
from utils.memory.__main__ import main as look
from utils.memory.budget import FILL
from utils.memory.exemplars import ExemplarMemory


@pytest.fixture(params=["edges", "webp:10@16", "edges+webp:10@16", "text"])
def memory(request, tmp_path):
    """Two classes, of each one real exemplar and two of the form."""
    form = form_named(request.param, HIGH)
    plain = make_dataset(tmp_path, ["crème", "pie"], train=4)
    paths = DatasetPaths(plain.data_dir, plain.dataset, files=form.files)
    costs = {"real": Cost(None, paths), form.name: Cost(form, paths)}
    memory = ExemplarMemory(paths, [("real", 1), (form.name, 2)], costs, None, 1)
    for target, label in enumerate(paths.classes()):
        images = paths.images(label)
        for image in images:
            paths.kept(image).parent.mkdir(parents=True, exist_ok=True)
            paths.kept(image).write_bytes(form.encode(pixels(image)))
        memory.add_class(target, images, [[1.0, i] for i in range(len(images))])
    return memory


def test_every_file_is_there_byte_for_byte(memory, tmp_path, capsys):
    file, report = tmp_path / "memory00.zip", memory.report()
    size = archive.write(memory, file)
    assert size == file.stat().st_size
    with zipfile.ZipFile(file) as content:
        assert {entry.compress_type for entry in content.infolist()} == {zipfile.ZIP_STORED}
        files = {entry.filename: content.read(entry) for entry in content.infolist()}
    index = json.loads(files.pop("memory.json"))
    texts = sum(len(text.encode()) for text in index["texts"].values())
    assert sum(map(len, files.values())) + texts == report["bytes_total"]
    for item in memory.items():
        kept = item.image if item.role == "real" else memory.paths.kept(item.image)
        name = item.image.name if item.role == "real" else f"{item.image.name}{kept.suffix}"
        assert files[f"{item.role}/{item.image.parent.name}/{name}"] == kept.read_bytes()
    form = memory.quotas[1][0]
    assert index["forms"] == {"real": {}, form: memory.forms[form].settings()}
    assert [each["size"] for of_class in index["classes"] for each in of_class["exemplars"]] == [[32, 32]] * 6

    again = tmp_path / "again.zip"
    archive.write(memory, again)
    assert again.read_bytes() == file.read_bytes()

    assert look(["show", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"Toy, 2 classes, {size:,} bytes" in said
    assert f"{form}: 4 exemplars, {sum(len(v) for k, v in files.items() if not k.startswith('real/')):,} bytes" in said
    assert look(["extract", str(file), "--to", str(tmp_path / "out")]) == 0
    out = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert {name: out[name] for name in files} == files


FORMS = [
    *("edges", "edges@12", "edges+webp:10@16", "jpeg:30", "jpeg:5@9", "webp:10", "webp:80@20", "avif:20", "avif:60@15"),
    *("latent:3", "latent:6@16", "text", "codebook:8x2@9", "thumb:40@8"),
]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell what is synced")
def test_file_and_folder_reach_the_disk(memory, tmp_path, monkeypatch):
    """With memory_only a power failure must not leave a checkpoint without the exemplars that it speaks of."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    archive.write(memory, tmp_path / "memory" / "phase00.zip")
    assert [synced[0].endswith(".tmp"), *synced[1:]] == [True, str(tmp_path / "memory")]


def test_the_list_has_all_forms():
    """A new form belongs into FORMS here, or has a test of its own."""
    heads, tested = ({re.match("[a-z0-9]+", name)[0] for name in names} for names in (examples(), FORMS))
    assert heads == tested


@pytest.mark.parametrize("name", long_but(FORMS, *(name for name in FORMS if not name.startswith("latent"))))
def test_whatever_the_sizes_and_budgets_no_class_takes_more_and_the_archive_is_what_the_report_says(tmp_path, name):
    rng = np.random.default_rng(FORMS.index(name))
    form = form_named(name, HIGH).using(Machine(model="tiny"))
    paths, kept_something = DatasetPaths(tmp_path, "Toy", files=form.files), 0
    labels = ["pie", "crème brûlée"]
    for label in labels:
        for i in range(5):
            width, height = (int(side) for side in rng.integers(2, 48, 2))
            save_noise(paths.folder("train") / label / f"{i}{rng.choice(['.jpg', '.png'])}", i, (width, height))
    for label in labels:
        for image in paths.images(label):
            if rng.random() < 0.8:  # others are made after the choice
                keep(paths, form, image)
    costs = {"real": Cost(None, paths), form.name: Cost(form, paths)}
    for attempt in range(5):
        budget, real = int(rng.integers(100, 12_000)), int(rng.integers(0, 4))
        memory = ExemplarMemory(paths, [("real", real), (form.name, FILL)], costs, None, 1, bytes_budget=budget)
        for target, label in enumerate(labels):
            images = paths.images(label)
            with suppress(UserError):  # where not one exemplar fits
                memory.add_class(target, images, rng.normal(size=(len(images), 3)))
        kept_something += bool(memory.targets)
        for item in memory.items():
            keep(paths, form, item.image)
        for target in memory.targets:
            memory.enforce_budget(target)
            assert memory.bytes(target) <= budget
        report, file = memory.report(), tmp_path / f"{attempt}.zip"
        assert report["bytes_total"] <= budget * len(memory.targets)
        assert report["bytes_per_class_max"] <= budget
        assert archive.write(memory, file) == file.stat().st_size
        found = archive.summary(file)
        assert sum(row["bytes"] for row in found["forms"]) + found["text_bytes"] == report["bytes_total"]
        of_form = {row["form"]: row for row in found["forms"]}
        for row in report["forms"]:
            assert row["exemplars"] == of_form.get(row["form"], {"exemplars": 0})["exemplars"]
            assert row["missing"] == 0
    assert kept_something > 2


def keep(paths, form, image):
    if paths.find_kept(image) is None:
        paths.kept(image).parent.mkdir(parents=True, exist_ok=True)
        paths.kept(image).write_bytes(form.stand_in(image))


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_what_is_no_archive_is_said_in_one_line(tmp_path, capsys, content):
    file = tmp_path / "memory00.zip"
    if content is not None:
        file.write_bytes(content)
    assert look(["show", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert said.count("\n") == 1


def test_names_that_lead_elsewhere_are_refused(tmp_path, capsys):
    file = tmp_path / "memory00.zip"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("memory.json", "{}")
        content.writestr("../outside", "x")
    assert look(["extract", str(file)]) == 2
    assert "outside" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()
