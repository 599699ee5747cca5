"""The exemplar memory as one file."""

import json
import zipfile

import pytest

from compress.forms import Cost, form_named, pixels
from compress.presets import HIGH
from tests.folders import make_dataset
from utils.data.paths import DatasetPaths
from utils.memory import archive
from utils.memory.__main__ import main as look
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
        assert files[f"{item.role}/{item.image.parent.name}/{kept.name}"] == kept.read_bytes()
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
