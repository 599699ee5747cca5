"""What a class takes in the memory's file: its index and its payloads (`utils.memory.packed` has the layout).

    target, label, text (0 bytes where no exemplar needs it, or it is the label)
    of each form: number of exemplars; a byte of flags; lengths, and, where the file does not tell them by itself,
        widths, heights, bits per pixel

A number is a `varint`, a label or text its length and its bytes.  A column of equal numbers is written once, and only
the columns whose flag is set have a number for each exemplar.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from utils.data.classes import REAL
from utils.data.codecs import varint
from utils.data.images import image_bits

COLUMNS = 4
"""Lengths, widths, heights, bits per pixel; real exemplars, which are files, have lengths alone."""


@dataclass(frozen=True)
class Row:
    """What the index says of an exemplar.

    length: of its payload in bytes, None where none is kept (copies made ahead need none); size: (width, height) of
    its image; bits: per pixel of its image.
    """

    length: int | None
    size: tuple[int, int]
    bits: int

    def columns(self, form: str) -> tuple[int, ...]:
        """A length is written as one more, since 0 stands for none."""
        length = 0 if self.length is None else self.length + 1
        return (length,) if form == REAL else (length, *self.size, self.bits)


def row_of(form: str, image: Path, length: int | None) -> Row:
    """Of a train image's exemplar."""
    if form == REAL:
        return Row(length, (0, 0), 0)
    width, height, bits = image_bits(image)
    return Row(length, (width, height), bits)


@dataclass(frozen=True)
class Column:
    """The bytes of a column.  first: its first number; varies: whether others differ; each: bytes of all numbers."""

    first: int | None = None
    varies: bool = False
    each: int = 0

    def plus(self, number: int) -> "Column":
        first = number if self.first is None else self.first
        return Column(first, self.varies or number != first, self.each + len(varint(number)))

    @property
    def bytes(self) -> int:
        if self.first is None:
            return 0
        return self.each if self.varies else len(varint(self.first))


@dataclass(frozen=True)
class FormShare:
    """The bytes of a class's exemplars of one form."""

    form: str
    count: int = 0
    columns: tuple[Column, ...] = ()
    payloads: int = 0
    missing: int = 0

    def plus(self, row: Row) -> "FormShare":
        numbers = row.columns(self.form)
        columns = self.columns or (Column(),) * len(numbers)
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
        forms = tuple(each.plus(row) if each.form == form else each for each in self.forms)
        return replace(self, forms=forms)

    @property
    def names(self) -> int:
        """Bytes of target, label and text."""
        needs_text = any(each.count for each in self.forms if each.form != REAL)
        return len(named(self.target, self.label, self.text if needs_text else self.label))

    @property
    def bytes(self) -> int:
        return self.names + sum(each.bytes for each in self.forms)


def named(target: int, label: str, text: str) -> bytes:
    """The beginning of a class's record."""
    parts = [os.fsencode(label), b"" if text == label else text.encode("utf-8", "replace")]
    return varint(target) + b"".join(varint(len(part)) + part for part in parts)


def columns(form: str, rows: Sequence[Row]) -> bytes:
    """Flags and columns of a form's exemplars, of which there is one at least."""
    numbers = list(zip(*(row.columns(form) for row in rows), strict=True))
    varies = [any(one != other for one, other in pairwise(column)) for column in numbers]
    flags = sum(1 << index for index, differs in enumerate(varies) if differs)
    parts = [column if differs else column[:1] for column, differs in zip(numbers, varies, strict=True)]
    return bytes([flags]) + b"".join(varint(number) for part in parts for number in part)
