"""The exemplar memory as one file."""

import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.forms import examples, form_named
from compress.options import Machine
from compress.presets import HIGH
from compress.training.exemplars import Cost
from tests.conftest import long_but
from tests.folders import make_dataset, save_noise
from utils.data.codecs import varint
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory import archive, packed
from utils.memory.__main__ import main as look
from utils.memory.budget import FILL
from utils.memory.exemplars import ExemplarMemory


@pytest.fixture(params=["edges", "webp:10@16", "edges+webp:10@16", "text"])
def memory(request, tmp_path):
    """Two classes, of each one real exemplar and two of the form."""
    return memory_of(tmp_path, request.param)


def memory_of(folder, name):
    form = form_named(name, HIGH)
    plain = make_dataset(folder, ["crème", "pie"], train=4)
    paths = DatasetPaths(plain.data_dir, plain.dataset, files=form.files)
    costs = {"real": Cost(None, paths), form.name: Cost(form, paths)}
    memory = ExemplarMemory(paths, [("real", 1), (form.name, 2)], costs, None, 1)
    for target, label in enumerate(paths.classes()):
        images = paths.images(label)
        for image in images:
            keep(paths, form, image)
        memory.update({target: images}, [[[1.0, i] for i in range(len(images))]])
    return memory


def test_the_file_holds_every_payload_and_its_bytes_are_the_reports(memory, tmp_path, capsys):
    file, report, form = tmp_path / "phase00.memory", memory.report(), memory.quotas[1][0]
    size = archive.write(memory, file)
    assert size == file.stat().st_size
    header = header_of(
        {"dataset": memory.paths.dataset, "forms": [["real", {}], [form, memory.forms[form].settings()]]}
    )
    assert size == len(packed.MAGIC) + len(header) + report["bytes_total"] + 4
    found = archive.read(file)
    assert found.forms == {"real": {}, form: memory.forms[form].settings()}
    stored = [(c.target, c.label, e.form, e.payload) for c in found.classes for e in c.exemplars]
    files = [item.image if item.role == "real" else memory.paths.kept(item.image) for item in memory.items()]
    assert stored == [
        (item.target, item.image.parent.name, item.role, file.read_bytes())
        for item, file in zip(memory.items(), files, strict=True)
    ]
    assert {e.row.size for c in found.classes for e in c.exemplars if e.form != "real"} == {(32, 32)}

    again = tmp_path / "again.memory"
    archive.write(memory, again)
    assert again.read_bytes() == file.read_bytes()

    assert look(["show", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"{memory.paths.dataset}, 2 classes, {size:,} bytes" in said
    assert f"{form}: 4 exemplars, {sum(len(kept) for *_, its_form, kept in stored if its_form == form):,} bytes" in said


@pytest.mark.parametrize("name", ["jpeg:30", "webp:10@16", "avif:20"])
def test_extracted_pictures_are_files_that_any_viewer_opens(tmp_path, name):
    memory, file, out = memory_of(tmp_path, name), tmp_path / "phase00.memory", tmp_path / "out"
    archive.write(memory, file)
    assert look(["extract", str(file), "--to", str(out)]) == 0
    index = json.loads((out / "memory.json").read_text())
    assert [c["label"] for c in index["classes"]] == ["crème", "pie"]
    form = form_named(name, HIGH)
    for target, of_class in enumerate(index["classes"]):
        for about, (role, image) in zip(of_class["exemplars"], memory.of(target), strict=True):
            extracted = out / role.replace(":", "-") / of_class["label"] / about["file"]
            with Image.open(extracted) as picture:
                seen = np.asarray(picture.convert("RGB"))
            if role == "real":
                assert extracted.read_bytes() == image.read_bytes()
                continue
            kept = memory.paths.kept(image).read_bytes()
            assert np.array_equal(seen, form.condition(kept, (32, 32)).start)
            assert extracted.stat().st_size > len(kept)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell what is synced")
def test_file_and_folder_reach_the_disk(memory, tmp_path, monkeypatch):
    """With memory_only a power failure must not leave a checkpoint without the exemplars that it speaks of."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    archive.write(memory, tmp_path / "memory" / "phase00.memory")
    assert [synced[0].endswith(".tmp"), *synced[1:]] == [True, str(tmp_path / "memory")]


def test_six_hundred_exemplars_of_fifteen_bytes_take_little_more_than_those(tmp_path):
    """A form of fixed length: no lengths, no names; sizes once a class."""

    class Code(Cost):
        def kept(self, image):
            return image.name.encode().ljust(15)

        def kept_bytes(self, image):
            return 15

        expected_bytes = kept_bytes

    paths = DatasetPaths(tmp_path, "Toy")
    code = Code(form_named("text", HIGH), paths)
    memory = ExemplarMemory(paths, [("code", 60)], {"code": code}, None, 1, bytes_budget=1200)
    for target in range(10):
        images = [save_noise(paths.folder("train") / f"class {target}" / f"{i}.png", i, (28, 28)) for i in range(60)]
        memory.update({target: images}, [np.eye(60)])
    size = archive.write(memory, tmp_path / "phase00.memory")
    classes = [memory.bytes(target) for target in memory.targets]
    assert classes == [60 * 15 + (1 + 1 + 7 + 1) + (1 + 1) + (1 + 3)] * 10  # names; number, flags; length, size, bits
    assert sum(classes) <= size < 1.03 * sum(classes)
    assert size < 1.03 * 600 * 15


FORMS = [
    *("edges", "edges@12", "edges+webp:10@16", "jpeg:30", "jpeg:5@9", "webp:10", "webp:80@20", "avif:20", "avif:60@15"),
    *("latent:3", "latent:6@16", "text", "codebook:8x2@9", "edges+colour@16", "edges:1.5", "thumb:10@8", "colour@9"),
    "codebook:8x2@9/4",
]


def test_the_list_has_all_forms():
    """A new form belongs into FORMS here, or has a test of its own."""
    heads, tested = ({re.match("[a-z0-9]+", name)[0] for name in names} for names in (examples(), FORMS))
    assert heads - {"jxl"} == tested  # jxl: tests/test_codecs.py, where its plugin is installed


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
                memory.update({target: images}, [rng.normal(size=(len(images), 3))])
        kept_something += bool(memory.targets)
        for item in memory.items():
            keep(paths, form, item.image)
        memory.enforce_budget()
        for target in memory.targets:
            assert memory.bytes(target) <= budget
        report, file = memory.report(), tmp_path / f"{attempt}.memory"
        assert report["bytes_total"] <= budget * len(memory.targets)
        assert report["bytes_per_class_max"] <= budget
        assert archive.write(memory, file) == file.stat().st_size
        found = archive.summary(file)
        assert 0 < found["bytes"] - report["bytes_total"] < 300  # the header
        assert report["bytes_total"] == sum(memory.bytes(target) for target in memory.targets)
        of_form = {row["form"]: row for row in found["forms"]}
        for row in report["forms"]:
            assert row["exemplars"] == of_form.get(row["form"], {"exemplars": 0})["exemplars"]
            assert row["missing"] == 0
    assert kept_something > 2


def keep(paths, form, image):
    if paths.find_kept(image) is None:
        paths.kept(image).parent.mkdir(parents=True, exist_ok=True)
        paths.kept(image).write_bytes(form.stand_in(image))


NO_MEMORIES = [None, b"", b"text", b"PK", b"PK\5\6", b"ESCORTm\1", b"ESCORTm\1" + b"\xff" * 40]


@pytest.mark.parametrize("content", NO_MEMORIES)
def test_what_is_no_memory_is_said_in_one_line(tmp_path, capsys, content):
    file = tmp_path / "phase00.memory"
    if content is not None:
        file.write_bytes(content)
    refused(tmp_path, file, capsys)


def refused(folder, file, capsys, *words):
    """In one line, by both commands, and nothing is written."""
    before = {*folder.rglob("*")}
    for arguments in (["show", str(file)], ["extract", str(file), "--to", str(folder / "out")]):
        assert look(arguments) == 2
        said = capsys.readouterr().err
        assert str(file) in said
        assert said.count("\n") == 1
        assert all(word in said for word in words), said
    assert {*folder.rglob("*")} == before


def test_any_flipped_bit_is_found(tmp_path, capsys):
    file = tmp_path / "phase00.memory"
    archive.write(memory_of(tmp_path, "webp:10@16"), file)
    content, rng = file.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(8, len(content), 25):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        refused(tmp_path, file, capsys, "checksum")


def deflated(content: bytes) -> bytes:
    coder = zlib.compressobj(9, wbits=-15)
    code = coder.compress(content) + coder.flush()
    return varint(len(code)) + code


def header_of(about) -> bytes:
    return deflated(json.dumps(about, separators=(",", ":")).encode())


def forged(path, classes, forms=(("real", {}), ("text", {}))):
    """A file whose checksum is right and whose content is hostile."""
    content = packed.MAGIC + header_of({"dataset": "Toy", "forms": forms}) + classes
    path.write_bytes(content + zlib.crc32(content).to_bytes(4))


def names(label, target=0):
    return varint(target) + varint(len(label)) + label + b"\0"


TEXT = b"\1\0\1\x20\x20\x18"
"""One exemplar of the form `text`: number, flags, length, width, height, bits."""

HOSTILE = {
    "'..'": names(b"..") + b"\0" + TEXT,
    "'a/b'": names(b"a/b") + b"\0" + TEXT,
    "''": names(b"") + b"\0" + TEXT,
    "twice": names(b"a") + b"\0" + TEXT + names(b"a", 1) + b"\0" + TEXT,
    "1,073,741,824 exemplars": names(b"a") + b"\0" + varint(1 << 30) + TEXT[1:],
    "1048576 x 1048576 pixels": names(b"a") + b"\0\1\0\1" + varint(1 << 20) * 2 + b"\x18",
    "7 bits": names(b"a") + b"\0\1\0\1\x20\x20\7",
    "too early": names(b"a") + b"\1\0" + varint(1 << 30) + b"\0",
    "without its picture": names(b"a") + b"\1\0\0\0",
    "data end": names(b"a") + b"\0",
    "more than 35 bits": b"\xff" * 9,
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_content_is_refused(tmp_path, capsys, words):
    file = tmp_path / "phase00.memory"
    forged(file, HOSTILE[words])
    refused(tmp_path, file, capsys, words)


@pytest.mark.parametrize("forms", ["x", [["real"]], [["../x", {}]], [["real", 3]], [[["a"], {}]], 7, None])
def test_hostile_headers_are_refused(tmp_path, capsys, forms):
    file = tmp_path / "phase00.memory"
    forged(file, b"", forms)
    refused(tmp_path, file, capsys, "forms")


@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * 100_000_000], ids=["deep", "large"])
def test_a_header_of_any_depth_or_size_is_refused(tmp_path, capsys, content):
    file, content = tmp_path / "phase00.memory", packed.MAGIC + deflated(content)
    file.write_bytes(content + zlib.crc32(content).to_bytes(4))
    refused(tmp_path, file, capsys, "JSON")


def test_control_characters_of_a_foreign_file_are_escaped(tmp_path, capsys):
    file = tmp_path / "phase00.memory"
    forged(file, names(b"a") + TEXT, [["text", {"\x1b[31m": "\x1b]0;x\a"}]])
    assert look(["show", str(file)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[31m" in said
    odd = tmp_path / "\x1b[31m.memory"
    assert look(["show", str(odd)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\\x1b[31m" in said
