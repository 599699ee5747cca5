"""The exemplar memory as one file: a ZIP, stored without compression, whose size is what the memory takes.

    memory.json                     which exemplars there are, in which form; the forms' settings; the classes' texts
    real/<class>/<image>            real exemplars, byte for byte
    <form>/<class>/<image><ending>  what is kept of the others

The same memory gives the same bytes.
"""

import functools
import json
import shutil
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from utils.data.images import image_bits, write_atomically, write_durably
from utils.data.items import REAL
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.exemplars import ExemplarMemory

INDEX = "memory.json"

_PNG_COLOURS = {24: (8, 2), 32: (16, 0)}
"""Bits per pixel -> PNG's bit depth and colour type; any other number is the depth of a greyscale picture."""


def write(memory: ExemplarMemory, path: Path) -> int:
    """Write the archive, in one piece.  Returns its size in bytes.

    A kept file that is not there (copies made ahead need none) has no entry.
    """
    classes, files, forms = [], [], {}
    for item in memory.items():
        label, form = item.image.parent.name, item.role
        if not classes or classes[-1]["target"] != item.target:
            classes.append({"target": item.target, "label": label, "exemplars": []})
        kept = item.image if form == REAL else memory.paths.find_kept(item.image)
        ending = kept and ("" if form == REAL else kept.suffix)
        width, height, bits = image_bits(item.image)
        about = {"image": item.image.name, "form": form, "kept": ending, "size": [width, height]}
        classes[-1]["exemplars"].append({**about, "bits_per_pixel": bits})
        forms[form] = memory.forms[form].settings()
        files += [(_entry(label, about), kept)] if kept else []
    labels = [c["label"] for c in classes if any(about["form"] != REAL for about in c["exemplars"])]
    texts = memory.paths.class_texts(labels)
    index = {"dataset": memory.paths.dataset, "forms": forms, "texts": texts, "classes": classes}

    def fill(file) -> None:
        with zipfile.ZipFile(file, "w") as archive:  # ZipInfo's date is always 1980
            archive.writestr(zipfile.ZipInfo(INDEX), json.dumps(index, ensure_ascii=True, separators=(",", ":")))
            for name, kept in files:
                archive.writestr(zipfile.ZipInfo(name), kept.read_bytes())

    write_durably(path, fill)  # with memory_only, the exemplars are nowhere else
    return path.stat().st_size


def read(path: Path) -> dict[str, Any]:
    """The content of `memory.json`.  Raises UserError for a file that is no archive of a memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(INDEX))
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"{path} is no exemplar memory of this program ({error}).") from None


def summary(path: Path) -> dict[str, Any]:
    """{"dataset", "classes", "forms": [{"form", "exemplars", "files", "bytes", "settings"}], "text_bytes", "bytes"}."""
    index = read(path)
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    exemplars, files, taken = Counter(), Counter(), Counter()
    for of_class in index["classes"]:
        for about in of_class["exemplars"]:
            exemplars[about["form"]] += 1
            files[about["form"]] += about["kept"] is not None
            taken[about["form"]] += sizes.get(_entry(of_class["label"], about), 0)
    return {
        "dataset": index["dataset"],
        "classes": len(index["classes"]),
        "forms": [
            {
                "form": form,
                "exemplars": exemplars[form],
                "files": files[form],
                "bytes": taken[form],
                "settings": settings,
            }
            for form, settings in index["forms"].items()
        ],
        "text_bytes": sum(len(text.encode()) for text in index["texts"].values()),
        "bytes": path.stat().st_size,
    }


def extract(path: Path, folder: Path) -> int:
    """Write the archive's files into a folder, as <form>/<class>/<file> with memory.json.  Returns their number.

    Raises UserError for names that lead out of the folder.
    """
    read(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{path}: {name!r} would lie outside {folder}.")
        for name in names:
            with archive.open(name) as source:
                write_atomically(folder / name, functools.partial(shutil.copyfileobj, source))
    return len(names)


def unpack(path: Path, paths: DatasetPaths, data_dir: Path) -> DatasetPaths:
    """Write the archive as a dataset, whose train images are the exemplars.  Returns that dataset's paths.

    paths: of the dataset that the memory is of; data_dir: of the new one.  In place of an image of which something else
    is kept lies a header that gives its size and nothing more (`header`).  Of what is there already, files of the same
    content are left alone, train images that the archive does not have are emptied (the names of files derived from
    the others may depend on them), and copies stay.
    Raises UserError for a file that is no archive of this dataset's memory.
    """
    index, target = read(path), replace(paths, data_dir=data_dir)
    if index["dataset"] != paths.dataset:
        raise UserError(f"{path} is a memory of dataset {index['dataset']!r}, not of {paths.dataset!r}.")
    train = target.folder("train")
    with zipfile.ZipFile(path) as archive:
        pictures, kept = {}, {}
        for of_class in index["classes"]:
            for about in of_class["exemplars"]:
                image, name = train / of_class["label"] / about["image"], _entry(of_class["label"], about)
                if image.parent.parent != train or (about["kept"] is None and about["form"] == REAL):
                    raise UserError(f"{path}: {name!r} is no exemplar's name.")
                if about["form"] == REAL:
                    pictures[image] = archive.read(name)
                else:
                    pictures[image] = header(*about["size"], about["bits_per_pixel"])
                    if about["kept"] is not None:
                        kept[image] = about["kept"], archive.read(name)
    for file in train.glob("*/*"):
        if file not in pictures:
            _write(file, b"")
    for image, content in pictures.items():
        _write(image, content)
    for image, (ending, content) in kept.items():
        _write(target.kept(image).with_suffix(ending), content)
    texts = {unicodedata.normalize("NFC", label): text for label, text in index["texts"].items()}
    _write(target.root / "class_names.json", json.dumps(texts).encode())
    return target


def header(width: int, height: int, bits_per_pixel: int) -> bytes:
    """The beginning of a PNG: `image_bits` reads its size, and whoever wants its pixels gets an error."""
    depth, colours = _PNG_COLOURS.get(bits_per_pixel, (bits_per_pixel, 0))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, lambda file: file.write(content))


def _entry(label: str, about: Mapping[str, Any]) -> str:
    """The name of an exemplar's entry in the archive."""
    name = f"{about['form']}/{label}/{about['image']}{about['kept'] or ''}"
    return name.encode("utf-8", "backslashreplace").decode()
