"""The exemplar memory as one file (`utils.memory.packed`): written, looked into, and trained from.

The same memory gives the same bytes.
"""

import json
import struct
import unicodedata
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.data import codecs
from utils.data.classes import REAL
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.files import write_atomically
from utils.memory import packed
from utils.memory.exemplars import ExemplarMemory, name_of
from utils.memory.packed import ClassRecord, DamagedError, Exemplar, Memory, row_of

_PNG_COLOURS = {24: (8, 2), 32: (16, 0)}
"""Bits per pixel -> PNG's bit depth and colour type; any other number is the depth of a greyscale picture."""

_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"GIF8": ".gif"}
"""First bytes -> the ending of an extracted picture, whose name the file does not have."""


def write(memory: ExemplarMemory, path: Path) -> int:
    """Write the file, in one piece.  Returns its size in bytes."""
    content = packed.packed(content_of(memory))
    write_atomically(path, lambda file: file.write(content), durably=True)  # memory_only: they are nowhere else
    return len(content)


def content_of(memory: ExemplarMemory) -> Memory:
    """What is kept of a memory's exemplars, as far as it is there: copies made ahead need no kept files."""
    classes = []
    for target in memory.targets:
        exemplars = []
        for form, image in memory.of(target):
            payload = memory.forms[form].kept(image)
            exemplars.append(Exemplar(form, row_of(form, image, None if payload is None else len(payload)), payload))
        if exemplars:
            share = memory.classes[target].empty_share
            text = share.text if any(exemplar.form != REAL for exemplar in exemplars) else share.label
            classes.append(ClassRecord(target, share.label, text, exemplars))
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
    if not content.startswith(packed.MAGIC):
        raise UserError(f"{path} is no exemplar memory of this program.")
    try:
        return packed.unpacked(content)
    except DamagedError as error:
        raise UserError(
            f"{path} is damaged, or no exemplar memory of this program: {error}. If it is a run's, delete it and the "
            "checkpoint of its phase, and the run goes on from an earlier one."
        ) from None


def summary(path: Path) -> dict[str, Any]:
    """{"dataset", "classes", "forms": [{"form", "exemplars", "files", "bytes", "settings"}], "bytes"}.

    bytes of a form: of its payloads; of the whole: of the file.
    """
    memory, rows = read(path), []
    for form, settings in memory.forms.items():
        payloads = [e.payload for record in memory.classes for e in record.exemplars if e.form == form]
        sizes = [len(payload) for payload in payloads if payload is not None]
        row = {"form": form, "exemplars": len(payloads), "files": len(sizes), "bytes": sum(sizes)}
        rows.append({**row, "settings": settings})
    return {"dataset": memory.dataset, "classes": len(memory.classes), "forms": rows, "bytes": path.stat().st_size}


def extract(path: Path, folder: Path) -> int:
    """Write what a file holds into a folder, as <form>/<class>/<name>, with memory.json.  Returns the number of files.

    Pictures become files that any viewer opens.  Raises UserError, and writes nothing, for a damaged file.
    """
    memory, classes = read(path), []
    files: dict[Path, bytes] = {}
    for record in memory.classes:
        exemplars = []
        for number, exemplar in enumerate(record.exemplars):
            about: dict[str, Any] = {"file": None, "form": exemplar.form}
            if exemplar.payload is not None:
                content, ending = _viewable(exemplar.payload, exemplar, memory.forms[exemplar.form])
                about["file"] = f"{number:03d}{ending}"
                files[folder / packed.folder_of(exemplar.form) / record.label / about["file"]] = content
            if exemplar.form != REAL:
                about |= {"size": exemplar.row.size, "bits_per_pixel": exemplar.row.bits}
            exemplars.append(about)
        classes.append({"target": record.target, "label": record.label, "exemplars": exemplars})
    texts = {record.label: record.text for record in memory.classes}
    index = {"dataset": memory.dataset, "forms": memory.forms, "texts": texts, "classes": classes}
    files[folder / "memory.json"] = json.dumps(index, indent=1).encode()
    for file, content in files.items():
        _write(file, content)
    return len(files)


def _viewable(payload: bytes, exemplar: Exemplar, settings: Mapping[str, Any]) -> tuple[bytes, str]:
    """(the content of a file, the ending of its name): a picture's payload becomes the codec's file."""
    codec = settings.get("codec")
    if exemplar.form == REAL:
        return payload, next((ending for start, ending in _ENDINGS.items() if payload.startswith(start)), "")
    if not isinstance(codec, str) or codec not in codecs.CODECS:
        return payload, ".bin"
    codecs.check_codec(codec)
    if codecs.version(codec) != settings.get("encoder"):
        raise UserError(f"pictures of {settings.get('encoder')} can't be read by {codecs.version(codec)}.")
    width, height = exemplar.row.size
    try:
        size = codecs.reduced(height, width, settings.get("side"))
        content = codecs.file_of(payload, codec, int(settings["codec_quality"]), size, exemplar.row.bits != 24)
    except (KeyError, TypeError, ValueError, OverflowError):
        return payload, ".bin"
    return content, codecs.CODECS[codec].ending


def unpack(path: Path, memory: ExemplarMemory, data_dir: Path) -> DatasetPaths:
    """Write a file as a dataset, whose train images are the exemplars.  Returns that dataset's paths.

    memory: whose exemplars these are, which tells the names of their images; data_dir: of the new dataset.  In place
    of an image of which something else is kept lies a header that gives its size and nothing more (`header`).  Of what
    is there already, files of the same content are left alone, train images that are no exemplars are emptied (the
    names of files derived from the others may depend on them), and copies stay.
    Raises UserError for a file that is not of this memory.
    """
    content, paths = read(path), replace(memory.paths, data_dir=data_dir)
    _check_same(path, content, memory)
    exemplars = [exemplar for record in content.classes for exemplar in record.exemplars]
    pictures: dict[Path, bytes] = {}
    payloads: dict[Path, bytes] = {}
    for item, exemplar in zip(memory.items(), exemplars, strict=True):
        image = paths.folder("train").joinpath(*name_of(item.image))
        if exemplar.form == REAL:
            pictures[image] = exemplar.payload or b""
            continue
        pictures[image] = header(*exemplar.row.size, exemplar.row.bits)
        if exemplar.payload is not None:
            payloads[image] = exemplar.payload
    for file in paths.folder("train").glob("*/*"):
        if file not in pictures:
            _write(file, b"")
    for image, picture in pictures.items():
        _write(image, picture)
    for image, payload in payloads.items():
        _write(paths.kept(image), payload)
    texts = {unicodedata.normalize("NFC", record.label): record.text for record in content.classes}
    _write(paths.root / "class_names.json", json.dumps(texts).encode())
    return paths


def _check_same(path: Path, content: Memory, memory: ExemplarMemory) -> None:
    """Raises UserError where a file's exemplars are not those of the memory."""
    if content.dataset != memory.paths.dataset:
        raise UserError(f"{path} is a memory of dataset {content.dataset!r}, not of {memory.paths.dataset!r}.")
    stored = [(record.target, record.label, e.form) for record in content.classes for e in record.exemplars]
    other = f"{path} is not the memory of this run's checkpoint"
    if [(item.target, item.image.parent.name, item.role) for item in memory.items()] != stored:
        raise UserError(f"{other}: its exemplars are others. Delete both, and the run goes on from an earlier phase.")
    for form, settings in content.forms.items():
        if form not in memory.forms or settings != json.loads(json.dumps(memory.forms[form].settings())):
            raise UserError(f"{other}: its exemplars of form {form!r} were made with other settings.")


def header(width: int, height: int, bits_per_pixel: int) -> bytes:
    """The beginning of a PNG: `image_bits` reads its size, and whoever wants its pixels gets an error."""
    depth, colours = _PNG_COLOURS.get(bits_per_pixel, (bits_per_pixel, 0))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, lambda file: file.write(content))
