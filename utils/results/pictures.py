"""The page's pictures: what forms keep and what comes back, and confusion matrices, as data URIs."""

import base64
import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.images import read_image
from utils.data.paths import DatasetPaths, FormFiles, data_dir, find_dataset
from utils.errors import UserError
from utils.results.entries import REAL, Entry

SIDE = 112
"""Most pixels of a picture's longer side."""


@dataclass(frozen=True)
class Picture:
    """A picture with what is said of it.  uri: None where there is nothing to show; alt: what it shows."""

    uri: str | None
    note: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    names: of the classes, in order; cells: for each true class (percent, colour) of each predicted one, empty where
    there are too many classes, of which `uri` is a picture; in_order: whether the order is that of learning.
    """

    names: list[str]
    cells: list[list[tuple[str, str]]]
    uri: str
    in_order: bool


def form_files(form: str) -> FormFiles:
    """The folders of a form's files, by its name, as `compress.forms` calls them."""
    if form == "edges":
        return FormFiles()
    folder = form.replace(":", "-")
    return FormFiles(folder, f"{folder}-copies")


def form_rows(of: Sequence[Entry], most: int = 4) -> tuple[list[str], list[list[Picture]]]:
    """What the forms of several runs of one dataset keep: (titles, rows of pictures), a row an image.

    The columns are the image, then for each form what is kept and the first copy.  Shows an image of each of the first
    classes, as far as files are at hand; no rows where none is, or where the runs have several datasets.
    """
    forms = [form for form in dict.fromkeys(entry.form for entry in of) if form != REAL]
    places = {(str(data_dir(e.config.get("data_dir"))), e.config["dataset"], e.config.get("variant", "")) for e in of}
    if not forms or len(places) != 1:
        return [], []
    folder, dataset, variant = places.pop()
    dataset = find_dataset(Path(folder), dataset)
    of_forms = {form: DatasetPaths(Path(folder), dataset, variant, form_files(form)) for form in forms}
    paths = DatasetPaths(Path(folder), dataset, variant)
    try:
        first = [
            _shown(images, of_forms.values()) for label in paths.classes()[:most] if (images := paths.images(label))
        ]
    except UserError:
        return [], []
    titles = ["original"]
    rows = [[replace(_thumbnail(image, _size(image)), alt=f"{image.parent.name}: original")] for image in first]
    for form, of_form in of_forms.items():
        cells = [(_kept(of_form, image), _copy(of_form, image)) for image in first]
        if any(cell is not None for pair in cells for cell in pair):
            own = [f"{form}: kept", f"{form}: comes back"]
            titles += own
            for image, row, pair in zip(first, rows, cells, strict=True):
                alts = [f"{image.parent.name}: {title}" for title in own]
                pair = [cell or Picture(None, "not there") for cell in pair]
                row += [replace(cell, alt=alt) for cell, alt in zip(pair, alts, strict=True)]
    return (titles, rows) if len(titles) > 1 else ([], [])


def _shown(images: Sequence[Path], of_forms: Collection[DatasetPaths]) -> Path:
    """Of a class's images the first one of which the most forms have files: those on demand have few."""
    names = [(paths, _stems(paths, images[0].parent.name)) for paths in of_forms]

    def found(image: Path) -> int:
        return sum(paths.kept(image).stem in stems for paths, stems in names)

    return max(images, key=found)


def _stems(paths: DatasetPaths, label: str) -> set[str]:
    """Of the images of which a form has a copy 0."""
    folder = paths.copies_folder(label)
    return {file.stem.removesuffix("_seed00") for file in folder.glob("*_seed00.*")} if folder.is_dir() else set()


def _beside(folder: Path, stem: str) -> Path | None:
    return next((file for file in sorted(folder.glob(f"{_literal(stem)}.*")) if not file.name.startswith(".")), None)


def _literal(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _kept(paths: DatasetPaths, image: Path) -> Picture | None:
    file = _beside(paths.folder("kept") / image.parent.name, paths.kept(image).stem)
    if file is None:
        return None
    size = file.stat().st_size
    return Picture(None, "the class's text alone") if not size else _thumbnail(file, _size(file))


def _copy(paths: DatasetPaths, image: Path) -> Picture | None:
    file = _beside(paths.copies_folder(image.parent.name), Path(paths.copy_name(image, 0)).stem)
    return file and _thumbnail(file, "")


def _size(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes"


def _thumbnail(file: Path, note: str) -> Picture:
    try:
        picture = read_image(file)
    except OSError:  # a form may keep a code, which its copy shows decoded
        return Picture(None, f"{note}, coded".strip(", "))
    picture.thumbnail((SIDE, SIDE))
    return Picture(_uri(picture), note)


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


MOST_CLASSES = 20
"""Up to this number, a matrix is a table whose cells say what they count."""


def confusion(entry: Entry) -> Confusion | None:
    """The confusion matrix after the last phase, summed over class orders.

    Rows are true classes and columns predicted ones.  Of one class order they are in the order in which they were
    learnt, so that a column of the last phase shows what the newest classes draw to themselves; of several they are
    sorted.  None where the files are not at hand.
    """
    total, names = None, []
    for run in entry.runs:
        path = entry.folder / f"seed{run['seed']}" / f"confusion_phase{len(run['phases']) - 1:02d}.csv"
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
            counts = np.array([[float(cell) for cell in row[1:]] for row in rows[1:]])
        except (OSError, ValueError):
            return None
        own = rows[0][1:]
        if counts.shape != (len(own), len(own)) or (names and sorted(own) != sorted(names)):
            return None
        names = names or (own if len(entry.runs) == 1 else sorted(own))
        order = [own.index(name) for name in names]
        counts = counts[np.ix_(order, order)]
        total = counts if total is None else total + counts
    if total is None or not total.size:
        return None
    share = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    pale, dark = np.array([247.0, 251, 255]), np.array([8.0, 48, 107])
    pixels = (pale + np.sqrt(share)[..., None] * (dark - pale)).astype(np.uint8)
    in_order = len(entry.runs) == 1
    if len(names) <= MOST_CLASSES:
        cells = [
            [(f"{100 * part:.0f}", f"#{colour.tobytes().hex()}") for part, colour in zip(*row, strict=True)]
            for row in zip(share, pixels, strict=True)
        ]
        return Confusion(names, cells, "", in_order)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return Confusion(names, [], uri, in_order)


ABOUT_GENERATOR = ("generator", "generator's bytes", "generator trained on")
"""Rows of a provenance that say what the generator has seen, and how large it is."""


def provenance(entry: Entry, models: Path) -> list[tuple[str, str]]:
    """What made the copies that a run used, as (what, value); empty where it used none.

    models: the folder of bundled models, which tells what they were trained on.
    """
    copies = next((p["copies"] for run in entry.runs for p in reversed(run["phases"]) if p.get("copies")), None)
    if copies is None:
        return []
    rows = []
    for of_classes in copies["made_by"]:
        settings = of_classes["settings"]
        if settings is None:
            rows.append(("settings", "not recorded"))
            continue
        flat = dict(_flat(settings))
        rows += [(key, flat[key]) for key in sorted(flat, key=lambda key: (key not in ("model", "precision"), key))]
    rows += [("copies used", f"{copies['files']:,}"), ("digest of copies", copies["digest"])]
    return rows + _generator(copies, models)


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value)
        elif value is not None:
            found.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _generator(copies: Mapping[str, Any], models: Path) -> list[tuple[str, str]]:
    """The generator's name or file, its bytes, and what it was trained on, as far as these are at hand.

    copies: of a phase's record; nothing for copies that no model made.
    """
    settings = [of_classes["settings"] or {} for of_classes in copies["made_by"]]
    if not any(each.get("model") or each.get("autoencoder") for each in settings):
        return []
    name = copies.get("generator")  # results of earlier versions do not tell
    if name is None:
        return [("generator", "not recorded")]
    bundled = models / f"cldm_{name}.safetensors"
    file = bundled if bundled.is_file() else Path(name).expanduser()
    size = f"{file.stat().st_size:,}" if file.is_file() else "about 5,700,000,000" if name == "sd15" else "not at hand"
    about = {"sd15": "LAION-5B's captioned pictures (Stable Diffusion 1.5), and edge maps of 3 million pictures"}.get(
        name
    )
    notes = file.with_suffix(".md")
    if notes.is_file():
        paragraphs = notes.read_text(encoding="utf-8").split("\n\n")
        about = next((p.removeprefix("**Data.** ") for p in paragraphs if p.startswith("**Data.**")), about)
    rows = [("generator", name), ("generator's bytes", f"{size} (not counted in the memory)")]
    return [*rows, ("generator trained on", about.replace("\n", " ").replace("`", "") if about else "not recorded")]
