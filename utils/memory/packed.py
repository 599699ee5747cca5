"""The memory's file: all that is kept of the exemplars, and nothing else; and what a class takes in it.

    8 bytes    MAGIC, with the version
    header     its length and a raw deflate stream of JSON: {"dataset", "forms": [[name, settings], ...]}
    classes    of each: target, label, text (0 bytes where no exemplar needs it, or it is the label)
               of each form: number of exemplars; a byte of flags; lengths, and, where the file does not tell them by
                   itself, widths, heights, bits per pixel
               the payloads, by form, in order of choice
    4 bytes    CRC-32 of all before

A number is a `varint`, a label or text its length and its bytes.  A column of equal numbers is written once, and only
the columns whose flag is set have a number for each exemplar.  Names of images are not in it: a run that goes on has
them in its checkpoint.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.classes import REAL
from utils.data.codecs import read_varint, varint
from utils.data.images import MAX_PIXELS, image_bits

MAGIC = b"ESCORTm\x01"
_LARGEST_HEADER = 1 << 20
_MOST_EXEMPLARS = 1 << 20
"""Of a class; an exemplar may take no bytes at all."""
BITS = (1, 8, 16, 24, 32)


class DamagedError(Exception):
    """The content of a memory's file makes no sense; the message says what."""


@dataclass(frozen=True)
class Row:
    """What the index says of an exemplar.

    length: of its payload in bytes, None where none is kept (copies made ahead need none); size: (width, height) of
    its image; bits: per pixel of its image.  Both are 0 for a real exemplar, whose file tells them.
    """

    length: int | None
    size: tuple[int, int] = (0, 0)
    bits: int = 0

    def numbers(self, form: str) -> tuple[int, ...]:
        """As they are written: a length is one more, since 0 stands for none."""
        length = 0 if self.length is None else self.length + 1
        return (length,) if form == REAL else (length, *self.size, self.bits)


def row_of(form: str, image: Path, length: int | None) -> Row:
    """Of a train image's exemplar."""
    if form == REAL:
        return Row(length)
    width, height, bits = image_bits(image)
    return Row(length, (width, height), bits)


class Column(NamedTuple):
    """The bytes of a column.  first: its first number; varies: whether others differ; each: bytes of all numbers."""

    first: int
    varies: bool = False
    each: int = 0

    def plus(self, number: int) -> "Column":
        return Column(self.first, self.varies or number != self.first, self.each + len(varint(number)))

    @property
    def bytes(self) -> int:
        return self.each if self.varies else len(varint(self.first))


@dataclass(frozen=True)
class FormShare:
    """The bytes of a class's exemplars of one form.  missing: exemplars of which nothing is kept."""

    form: str
    count: int = 0
    columns: tuple[Column, ...] = ()
    payloads: int = 0
    missing: int = 0

    def plus(self, row: Row) -> "FormShare":
        numbers = row.numbers(self.form)
        columns = self.columns or [Column(number) for number in numbers]
        grown = tuple(column.plus(number) for column, number in zip(columns, numbers, strict=True))
        payloads, missing = self.payloads + (row.length or 0), self.missing + (row.length is None)
        return FormShare(self.form, self.count + 1, grown, payloads, missing)

    @property
    def bytes_of_one(self) -> float:
        """The mean of what an exemplar adds: its payload, and its numbers in the columns that vary."""
        varying = sum(column.each for column in self.columns if column.varies)
        return (self.payloads + varying) / max(self.count, 1)

    @property
    def bytes(self) -> int:
        """With the index."""
        index = len(varint(self.count)) + bool(self.count) + sum(column.bytes for column in self.columns)
        return index + self.payloads


@dataclass(frozen=True)
class ClassShare:
    """The bytes of a class, whose exemplars are added in order of choice."""

    target: int
    label: str
    text: str
    forms: tuple[FormShare, ...]

    @classmethod
    def empty(cls, target: int, label: str, text: str, forms: Sequence[str]) -> "ClassShare":
        return cls(target, label, text, tuple(FormShare(form) for form in dict.fromkeys(forms)))

    def plus(self, form: str, row: Row) -> "ClassShare":
        return replace(self, forms=tuple(each.plus(row) if each.form == form else each for each in self.forms))

    @property
    def names(self) -> int:
        """Bytes of target, label and text."""
        needs_text = any(each.count for each in self.forms if each.form != REAL)
        return len(named(self.target, self.label, self.text if needs_text else self.label))

    @property
    def bytes(self) -> int:
        return self.names + sum(each.bytes for each in self.forms)


@dataclass(frozen=True)
class Exemplar:
    """form: its name; payload: what is kept of the image, None where nothing is."""

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
            parts += [varint(len(exemplars)), columns([exemplar.row.numbers(form) for exemplar in exemplars])]
        parts += [exemplar.payload or b"" for exemplars in by_form.values() for exemplar in exemplars]
    content = b"".join(parts)
    return content + zlib.crc32(content).to_bytes(4)


def named(target: int, label: str, text: str) -> bytes:
    """The beginning of a class's record."""
    parts = [os.fsencode(label), b"" if text == label else text.encode("utf-8", "replace")]
    return varint(target) + b"".join(varint(len(part)) + part for part in parts)


def columns(rows: Sequence[tuple[int, ...]]) -> bytes:
    """Flags and columns of a form's exemplars; nothing where there are none."""
    flags, content = 0, b""
    for index, column in enumerate(zip(*rows, strict=True)):
        varies = len(set(column)) > 1
        flags |= varies << index
        content += b"".join(map(varint, column if varies else column[:1]))
    return bytes([flags]) + content if rows else b""


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
    _check(memory)
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
    try:
        content = zlib.decompressobj(wbits=-15).decompress(part, _LARGEST_HEADER)
    except zlib.error as error:
        raise DamagedError(f"its header can't be decompressed ({error})") from None
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its JSON can't be read ({error})") from None
    try:
        return about["dataset"], dict(about["forms"])
    except (KeyError, TypeError, ValueError):
        raise DamagedError("its header names no dataset and forms") from None


def _rows(reader: _Reader, form: str, where: str) -> list[Row]:
    """The index of a class's exemplars of one form."""
    count = reader.number()
    if not count:
        return []
    if count > _MOST_EXEMPLARS:
        raise DamagedError(f"{where} has {count:,} exemplars of form {form!r}")
    flags, table = reader.take(1)[0], []
    for column in range(1 if form == REAL else 4):
        varies = flags >> column & 1
        table.append([reader.number() for _ in range(count)] if varies else [reader.number()] * count)
    rows = []
    for length, *rest in zip(*table, strict=True):
        width, height, bits = rest or (0, 0, 0)
        rows.append(Row(length - 1 if length else None, (width, height), bits))
    return rows


def _check(memory: Memory) -> None:
    """Raises DamagedError for what no memory of this program has, such as names that lead out of their folder."""
    names = [memory.dataset, *memory.forms]
    folders = [memory.dataset, *map(folder_of, memory.forms)] if all(isinstance(name, str) for name in names) else [""]
    if not all(map(_is_folder_name, folders)) or any(form.startswith(".") for form in memory.forms):
        raise DamagedError(f"its dataset and forms are {names!r}")
    if not all(isinstance(settings, dict) for settings in memory.forms.values()):
        raise DamagedError("its forms have no settings")
    targets, labels = {record.target for record in memory.classes}, {record.label for record in memory.classes}
    if min(len(targets), len(labels)) < len(memory.classes):
        raise DamagedError("a class is there twice")
    for record in memory.classes:
        if not _is_folder_name(record.label):
            raise DamagedError(f"a class is called {record.label!r}")
        where = f"class {record.label!r} has"
        for exemplar in record.exemplars:
            (width, height), bits = exemplar.row.size, exemplar.row.bits
            if exemplar.form == REAL:
                if not exemplar.payload:
                    raise DamagedError(f"{where} a real exemplar without its picture")
            elif bits not in BITS or min(width, height) < 1 or width * height > MAX_PIXELS:
                raise DamagedError(f"{where} an image of {width} x {height} pixels of {bits} bits")


def folder_of(form: str) -> str:
    """Where exemplars of a form are extracted: its name without what not all systems allow."""
    return re.sub("[:/]", "-", form)


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
