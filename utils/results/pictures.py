"""The page's pictures: what forms keep and what comes back, and confusion matrices, as data URIs."""

import base64
import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.images import read_image
from utils.data.paths import DatasetPaths, FormFiles, data_dir
from utils.errors import UserError
from utils.results.entries import REAL, Entry

SIDE = 112
"""Most pixels of a picture's longer side."""


@dataclass(frozen=True)
class Picture:
    """A picture with what is said of it.  uri: None where there is nothing to show."""

    uri: str | None
    note: str = ""


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
    of_forms = {form: DatasetPaths(Path(folder), dataset, variant, form_files(form)) for form in forms}
    paths = DatasetPaths(Path(folder), dataset, variant)
    try:
        first = [
            _shown(images, of_forms.values()) for label in paths.classes()[:most] if (images := paths.images(label))
        ]
    except UserError:
        return [], []
    titles, rows = ["original"], [[_thumbnail(image, _size(image))] for image in first]
    for form, of_form in of_forms.items():
        cells = [(_kept(of_form, image), _copy(of_form, image)) for image in first]
        if any(cell is not None for pair in cells for cell in pair):
            titles += [f"{form}: kept", f"{form}: comes back"]
            for row, pair in zip(rows, cells, strict=True):
                row += [cell or Picture(None, "not there") for cell in pair]
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


def confusion(entry: Entry) -> Picture | None:
    """The confusion matrix after the last phase, summed over class orders, as a picture of one pixel a cell.

    Rows are true classes and columns predicted ones, both in the order in which they were learnt, so that a column of
    the last phase shows what the newest classes draw to themselves.  None where the files are not at hand.
    """
    total = None
    for run in entry.runs:
        path = entry.folder / f"seed{run['seed']}" / f"confusion_phase{len(run['phases']) - 1:02d}.csv"
        try:
            with path.open(encoding="utf-8", newline="") as file:
                counts = np.array([[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
        except (OSError, ValueError):
            return None
        total = counts if total is None else total + counts
    if total is None or total.ndim != 2 or not total.size:
        return None
    share = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    pale, dark = np.array([247.0, 251, 255]), np.array([8.0, 48, 107])
    pixels = (pale + np.sqrt(share)[..., None] * (dark - pale)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), f"{len(total)} classes")


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
    return rows + _generator(entry, models)


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value)
        elif value is not None:
            found.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _generator(entry: Entry, models: Path) -> list[tuple[str, str]]:
    """The generator's file, its bytes, and what it was trained on, as far as these are at hand."""
    settings = [
        of["settings"] or {}
        for run in entry.runs
        for p in run["phases"]
        for of in (p.get("copies") or {}).get("made_by", [])
    ]
    if not any(each.get("model") or each.get("autoencoder") for each in settings):
        return []
    options = _options(entry)
    name = options[options.index("--model") + 1] if "--model" in options else "sd15"
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


def _options(entry: Entry) -> list[str]:
    """The options of compress/run.py that made a run's copies: from the config, or the record beside the copies."""
    import json
    import shlex

    config = entry.config
    if config.get("regenerate") == "on_demand":
        return shlex.split(config.get("regenerate_options") or "")
    paths = DatasetPaths(
        data_dir(config.get("data_dir")), config["dataset"], config.get("variant", ""), form_files(entry.form)
    )
    records = sorted(paths.folder("copies").glob("settings*.json"), key=lambda file: (len(file.name), file.name))
    try:
        return list(json.loads(records[-1].read_text(encoding="utf-8")).get("options", ())) if records else []
    except (OSError, ValueError, AttributeError):
        return []
