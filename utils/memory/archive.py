"""The exemplar memory as one file (`utils.memory.packed`): written, looked into, and trained from.

The same memory gives the same bytes.  Archives of earlier versions (`utils.memory.zipped`) are read.
"""

import json
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.data import codecs
from utils.data.images import write_atomically, write_durably
from utils.data.items import REAL
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory import packed, zipped
from utils.memory.exemplars import ExemplarMemory
from utils.memory.packed import ClassRecord, DamagedError, Exemplar, Memory
from utils.memory.share import row_of

_PNG_COLOURS = {24: (8, 2), 32: (16, 0)}
"""Bits per pixel -> PNG's bit depth and colour type; any other number is the depth of a greyscale picture."""

_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"GIF8": ".gif"}
"""First bytes -> the ending of an extracted picture whose name the file does not have."""


def write(memory: ExemplarMemory, path: Path) -> int:
    """Write the file, in one piece.  Returns its size in bytes."""
    content = packed.packed(content_of(memory))
    write_durably(path, lambda file: file.write(content))  # with memory_only, the exemplars are nowhere else
    return len(content)


def content_of(memory: ExemplarMemory) -> Memory:
    """What is kept of a memory's exemplars, as far as it is there: copies made ahead need no kept files."""
    classes = []
    for target in memory.targets:
        share, exemplars = memory.empty_shares[target], []
        for form, image in memory.of(target):
            kept = memory.forms[form].kept(image)
            exemplars.append(Exemplar(form, row_of(form, image, None if kept is None else len(kept)), kept))
        if exemplars:
            needs_text = any(exemplar.form != REAL for exemplar in exemplars)
            classes.append(ClassRecord(target, share.label, share.text if needs_text else share.label, exemplars))
    forms = {form: memory.forms[form].settings() for form in memory.forms_in_use}
    return Memory(memory.paths.dataset, forms, classes)


def read(path: Path) -> Memory:
    """The content of a memory's file.  Raises UserError for any other, and for a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}).") from None
    try:
        if content.startswith(packed.MAGIC):
            return packed.unpacked(content)
        if content.startswith(zipped.MAGIC):
            return zipped.unzipped(content)
    except DamagedError as error:
        raise UserError(
            f"{path} is damaged, or no exemplar memory of this program: {error}. If it is a run's, delete it and the "
            "checkpoint of its phase, and the run goes on from an earlier one."
        ) from None
    raise UserError(f"{path} is no exemplar memory of this program.")


def summary(path: Path) -> dict[str, Any]:
    """{"dataset", "classes", "forms": [{"form", "exemplars", "files", "bytes", "settings"}], "bytes"}.

    bytes of a form: of its payloads; of the whole: of the file.
    """
    memory = read(path)
    kept = {form: [e for c in memory.classes for e in c.exemplars if e.form == form] for form in memory.forms}
    rows = [
        {
            "form": form,
            "exemplars": len(kept[form]),
            "files": sum(exemplar.kept is not None for exemplar in kept[form]),
            "bytes": sum(len(exemplar.kept or b"") for exemplar in kept[form]),
            "settings": settings,
        }
        for form, settings in memory.forms.items()
    ]
    return {"dataset": memory.dataset, "classes": len(memory.classes), "forms": rows, "bytes": path.stat().st_size}


def extract(path: Path, folder: Path) -> int:
    """Write what a file holds into a folder, as <form>/<class>/<name>, with memory.json.  Returns the number of files.

    Pictures become files that any viewer opens.  Raises UserError, and writes nothing, for a damaged file.
    """
    memory = read(path)
    files, index = {}, {"dataset": memory.dataset, "forms": memory.forms, "texts": {}, "classes": []}
    for record in memory.classes:
        index["texts"][record.label] = record.text
        index["classes"].append({"target": record.target, "label": record.label, "exemplars": []})
        for number, exemplar in enumerate(record.exemplars):
            name, content = f"{number:03d}" if exemplar.name is None else exemplar.name, None
            if exemplar.kept is not None:
                content, ending = _viewable(exemplar, memory.forms[exemplar.form])
                name += ending
                files[folder / exemplar.form.replace(":", "-") / record.label / name] = content
            about = {"file": None if content is None else name, "form": exemplar.form}
            size = {} if exemplar.form == REAL else {"size": exemplar.row.size, "bits_per_pixel": exemplar.row.bits}
            index["classes"][-1]["exemplars"].append(about | size)
    files[folder / zipped.INDEX] = json.dumps(index, indent=1).encode()
    for file, content in files.items():
        _write(file, content)
    return len(files)


def _viewable(exemplar: Exemplar, settings: Mapping[str, Any]) -> tuple[bytes, str]:
    """(the content of a file, the ending of its name): a picture's payload becomes the codec's file."""
    kept, codec = exemplar.kept, settings.get("codec")
    if exemplar.form == REAL:
        known = next((ending for start, ending in _ENDINGS.items() if kept.startswith(start)), "")
        return kept, known if exemplar.name is None else ""
    if not isinstance(codec, str) or codec not in codecs.CODECS or exemplar.ending:
        return kept, exemplar.ending or ".bin"
    codecs.check_codec(codec)
    if codecs.version(codec) != settings.get("encoder"):
        raise UserError(f"pictures of {settings.get('encoder')} can't be read by {codecs.version(codec)}.")
    width, height = exemplar.row.size
    try:
        size = codecs.reduced(height, width, settings.get("side"))
        content = codecs.file_of(kept, codec, int(settings["codec_quality"]), size, exemplar.row.bits != 24)
    except (KeyError, TypeError, ValueError, OverflowError):
        return kept, ".bin"
    return content, codecs.CODECS[codec].ending


def unpack(path: Path, memory: ExemplarMemory, data_dir: Path) -> DatasetPaths:
    """Write a file as a dataset, whose train images are the exemplars.  Returns that dataset's paths.

    memory: whose exemplars these are, which tells the names of their images; data_dir: of the new dataset.  In place
    of an image of which something else is kept lies a header that gives its size and nothing more (`header`).  Of what
    is there already, files of the same content are left alone, train images that are no exemplars are emptied (the
    names of files derived from the others may depend on them), and copies stay.
    Raises UserError for a file that is not of this memory.
    """
    target, found = replace(memory.paths, data_dir=data_dir), read(path)
    if found.dataset != memory.paths.dataset:
        raise UserError(f"{path} is a memory of dataset {found.dataset!r}, not of {memory.paths.dataset!r}.")
    pictures, kept = {}, {}
    for image, exemplar in _with_images(path, found, memory):
        image = target.folder("train") / image.parent.name / image.name
        real = exemplar.form == REAL
        pictures[image] = exemplar.kept if real else header(*exemplar.row.size, exemplar.row.bits)
        if not real and exemplar.kept is not None:
            kept[image] = exemplar
    for file in target.folder("train").glob("*/*"):
        if file not in pictures:
            _write(file, b"")
    for image, content in pictures.items():
        _write(image, content)
    for image, exemplar in kept.items():
        place = target.kept(image)
        _write(place.with_suffix(exemplar.ending) if exemplar.ending else place, exemplar.kept)
    texts = {unicodedata.normalize("NFC", record.label): record.text for record in found.classes}
    _write(target.root / "class_names.json", json.dumps(texts).encode())
    return target


def _with_images(path: Path, found: Memory, memory: ExemplarMemory) -> Iterator[tuple[Path, Exemplar]]:
    """The exemplars of a file with their train images.  Raises UserError where they are not those of the memory."""
    stored = [(record, exemplar) for record in found.classes for exemplar in record.exemplars]
    items, other = memory.items(), f"{path} is not the memory of this run's checkpoint"
    named = all(exemplar.name is not None for _, exemplar in stored)  # by a file of earlier versions
    if not named and [(i.target, i.image.parent.name, i.role) for i in items] != [
        (record.target, record.label, exemplar.form) for record, exemplar in stored
    ]:
        raise UserError(f"{other}: its exemplars are others. Delete both, and the run goes on from an earlier phase.")
    for form, settings in found.forms.items():
        ours = memory.forms[form].settings() if form in memory.forms else None
        if not named and settings != json.loads(json.dumps(ours)):
            raise UserError(f"{other}: its exemplars of form {form!r} were made with other settings.")
    for number, (record, exemplar) in enumerate(stored):
        yield Path(record.label, exemplar.name) if named else items[number].image, exemplar


def header(width: int, height: int, bits_per_pixel: int) -> bytes:
    """The beginning of a PNG: `image_bits` reads its size, and whoever wants its pixels gets an error."""
    depth, colours = _PNG_COLOURS.get(bits_per_pixel, (bits_per_pixel, 0))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, lambda file: file.write(content))
