"""The memory's file: all that is kept of the exemplars, and nothing else.

    8 bytes    MAGIC, with the version
    header     its length (a `varint`) and a raw deflate stream of JSON: {"dataset", "forms": [[name, settings], ...]}
    classes    the index of each (`utils.memory.share`) and its payloads, by form, in order of choice
    4 bytes    CRC-32 of all before

Names of images are not in it: a run that goes on has them in its checkpoint.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.data.classes import REAL
from utils.data.codecs import read_varint, varint
from utils.data.images import MAX_PIXELS
from utils.memory.share import COLUMNS, Row, columns, named

MAGIC = b"ESCORTm\x01"
_LARGEST_HEADER = 1 << 20
_MOST_EXEMPLARS = 1 << 20
"""Of a class; an exemplar may take no bytes at all."""
BITS = (1, 8, 16, 24, 32)


class DamagedError(Exception):
    """The content of a memory's file makes no sense; the message says what."""


@dataclass(frozen=True)
class Exemplar:
    """form: its name; row: see there; payload: what is kept of the image, None where nothing is."""

    form: str
    row: Row
    payload: bytes | None


@dataclass(frozen=True)
class ClassRecord:
    """text: "" or the label where no exemplar needs another."""

    target: int
    label: str
    text: str
    exemplars: Sequence[Exemplar]


@dataclass(frozen=True)
class Memory:
    """What a file holds.  forms: name -> settings, in the order in which a class's exemplars are cut."""

    dataset: str
    forms: Mapping[str, Mapping[str, Any]]
    classes: Sequence[ClassRecord]


def packed(memory: Memory) -> bytes:
    """The file's content."""
    about = {"dataset": memory.dataset, "forms": list(memory.forms.items())}
    coder = zlib.compressobj(9, wbits=-15)
    header = coder.compress(json.dumps(about, separators=(",", ":")).encode()) + coder.flush()
    parts = [MAGIC, varint(len(header)), header]
    for record in memory.classes:
        parts.append(named(record.target, record.label, record.text or record.label))
        by_form = {form: [e for e in record.exemplars if e.form == form] for form in memory.forms}
        for form, exemplars in by_form.items():
            parts.append(varint(len(exemplars)))
            if exemplars:
                parts.append(columns(form, [exemplar.row for exemplar in exemplars]))
        parts += [exemplar.payload or b"" for exemplars in by_form.values() for exemplar in exemplars]
    content = b"".join(parts)
    return content + zlib.crc32(content).to_bytes(4)


def unpacked(content: bytes) -> Memory:
    """Raises DamagedError."""
    if len(content) < len(MAGIC) + 4 or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:]):
        raise DamagedError("its checksum is wrong")
    reader, classes = _Reader(content[:-4], len(MAGIC)), []
    dataset, forms = _header(reader.part())
    while reader.position < len(reader.content):
        target, label = reader.number(), os.fsdecode(reader.part())
        text, rows = reader.part().decode(errors="replace"), []
        for form in forms:
            rows += [(form, row) for row in _rows(reader, form, f"class {label!r}")]
        exemplars = [Exemplar(form, row, None if row.length is None else reader.take(row.length)) for form, row in rows]
        classes.append(ClassRecord(target, label, text or label, exemplars))
    memory = Memory(dataset, forms, classes)
    check(memory)
    return memory


class _Reader:
    """Reads a file's content from a position on.  Raises DamagedError where it ends too early."""

    def __init__(self, content: bytes, position: int):
        self.content, self.position = content, position

    def number(self) -> int:
        try:
            number, self.position = read_varint(self.content, self.position)
        except ValueError as error:
            raise DamagedError(str(error)) from None
        return number

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.content):
            raise DamagedError(f"it ends {end - len(self.content)} bytes too early")
        taken, self.position = self.content[self.position : end], end
        return taken

    def part(self) -> bytes:
        return self.take(self.number())


def _header(part: bytes) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """(dataset, forms)."""
    decoder = zlib.decompressobj(wbits=-15)
    try:
        about = read_json(decoder.decompress(part, _LARGEST_HEADER))
    except zlib.error as error:
        raise DamagedError(f"its header can't be decompressed ({error})") from None
    try:
        dataset, forms = about["dataset"], dict(about["forms"])
    except (KeyError, TypeError, ValueError):
        raise DamagedError("its header names no dataset and forms") from None
    return dataset, forms


def _rows(reader: _Reader, form: str, where: str) -> list[Row]:
    """The index of a class's exemplars of one form."""
    count = reader.number()
    if not count:
        return []
    if count > _MOST_EXEMPLARS:
        raise DamagedError(f"{where} has {count:,} exemplars of form {form!r}")
    flags = reader.take(1)[0]
    table = []
    for column in range(1 if form == REAL else COLUMNS):
        if flags >> column & 1:
            table.append([reader.number() for _ in range(count)])
        else:
            table.append([reader.number()] * count)
    if form == REAL:
        return [Row(length - 1 if length else None, (0, 0), 0) for length in table[0]]
    return [Row(length - 1 if length else None, (w, h), bits) for length, w, h, bits in zip(*table, strict=True)]


def read_json(content: bytes) -> Any:
    """Raises DamagedError for what is no JSON, or nested too deeply to be one of ours."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its JSON can't be read ({error})") from None


def check(memory: Memory) -> None:
    """Raises DamagedError for what no memory of this program has, such as names that lead out of their folder."""
    names = [memory.dataset, *memory.forms]
    folders = [memory.dataset, *map(folder_of, memory.forms)] if all(isinstance(name, str) for name in names) else [""]
    if not all(map(_is_folder_name, folders)) or any(form.startswith(".") for form in memory.forms):
        raise DamagedError(f"its dataset and forms are {names!r}")
    if not all(isinstance(settings, dict) for settings in memory.forms.values()):
        raise DamagedError("its forms have no settings")
    targets, labels = [[getattr(record, key) for record in memory.classes] for key in ("target", "label")]
    if len({*targets}) < len(targets) or len({*labels}) < len(labels):
        raise DamagedError("a class is there twice")
    for record in memory.classes:
        if not isinstance(record.target, int):
            raise DamagedError(f"a class has the target {record.target!r}")
        if not isinstance(record.label, str) or not _is_folder_name(record.label):
            raise DamagedError(f"a class is called {record.label!r}")
        for exemplar in record.exemplars:
            _check_exemplar(exemplar, f"class {record.label!r}", memory.forms)


def _check_exemplar(exemplar: Exemplar, where: str, forms: Mapping[str, Any]) -> None:
    width, height = exemplar.row.size
    if exemplar.form not in forms:
        raise DamagedError(f"{where} has exemplars of the unknown form {exemplar.form!r}")
    if exemplar.form == REAL:
        if not exemplar.payload:
            raise DamagedError(f"{where} has a real exemplar without its picture")
    elif exemplar.row.bits not in BITS or min(width, height) < 1 or width * height > MAX_PIXELS:
        raise DamagedError(f"{where} has an image of {width} x {height} pixels of {exemplar.row.bits} bits")


def folder_of(form: str) -> str:
    """Where exemplars of a form are extracted: its name without what not all systems allow."""
    return re.sub("[:/]", "-", form)


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
