"""The page's pictures: what forms keep and what comes back, confusion matrices; and what made the copies."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from compress.forms import form_named
from compress.presets import PRESETS
from exps.report.entries import REAL, Entry, in_words
from utils.data.images import read_image
from utils.data.paths import DatasetPaths, data_dir, find_dataset
from utils.errors import UserError
from utils.results.output import confusion_file
from utils.results.records import Copies

SIDE = 112
"""Most pixels of a picture's longer side."""
MOST_CLASSES = 20
"""Up to this number, a confusion matrix is a table whose cells say what they count; and classes of which forms show."""
MOST_COPIES = 10
"""Copies of an image that are shown."""
MODELS = Path(__file__).resolve().parents[2] / "ControlNet" / "models"
"""Of bundled models, beside which lies what they were trained on."""
TRAINED_ON = {"sd15": "LAION-5B's captioned pictures (Stable Diffusion 1.5), and edge maps of 3 million pictures"}


class Picture(NamedTuple):
    """A picture with what is said of it.  uri: None where there is nothing to show; alt: what it shows; others: further
    copies, as `uri`."""

    uri: str | None
    note: str
    alt: str = ""
    others: tuple[str, ...] = ()


class Confusion(NamedTuple):
    """A confusion matrix.

    names: of the classes, in order; cells: for each true class (percent, colour) of each predicted one, empty where
    there are too many classes, of which `uri` is a picture; in_order: whether the order is that of learning.
    """

    names: list[str]
    cells: list[list[tuple[str, str]]]
    uri: str
    in_order: bool


def form_rows(compared: Sequence[Entry]) -> list[dict[str, Picture]]:
    """What the forms of several runs of one dataset keep: a row an image, pictures by the titles of their columns.

    The columns are the image, then for each form what is kept and the copies.  Shows an image of each of the first
    MOST_CLASSES classes, as far as files are at hand; no rows where none is, or where the runs have several datasets.
    """
    forms = [form for form in dict.fromkeys(entry.form for entry in compared) if form != REAL]
    configs = [entry.config for entry in compared]
    datasets = {(data_dir(c.get("data_dir")), c["dataset"], c.get("variant", "")) for c in configs}
    if not forms or len(datasets) != 1:
        return []
    folder, dataset, variant = datasets.pop()
    try:
        paths = DatasetPaths(folder, find_dataset(folder, dataset), variant)
        form_paths = {form: replace(paths, files=form_named(form, PRESETS["high"]).files) for form in forms}
        classes = [images for label in paths.classes()[:MOST_CLASSES] if (images := paths.images(label))]
    except UserError:
        return []
    # Of a class's images the first one of which the most forms have copies: those made on demand are few.
    first = [max(images, key=lambda i: sum(p.copy(i, 0).is_file() for p in form_paths.values())) for images in classes]
    rows = [{"original": _thumbnail(image, image.stat().st_size, f"{image.parent.name}: original")} for image in first]
    for form, own in form_paths.items():
        files = [(own.find_kept(image), [own.copy(image, k) for k in range(MOST_COPIES)]) for image in first]
        if any(kept or copies[0].is_file() for kept, copies in files):
            for image, row, (kept, copies) in zip(first, rows, files, strict=True):
                size = kept.stat().st_size if kept else None
                row[f"{form}: kept"] = _thumbnail(kept, size, f"{image.parent.name}: {form}, kept")
                alt = f"{image.parent.name}: {form}, copy"
                pictures = [_thumbnail(copy, None, alt) for copy in copies if copy.is_file()]
                others = tuple(picture.uri for picture in pictures[1:] if picture.uri)
                first_copy = pictures[0] if pictures else Picture(None, "not there")
                row[f"{form}: comes back"] = first_copy._replace(others=others)
    return rows if rows and len(rows[0]) > 1 else []


def _thumbnail(file: Path | None, size: int | None, alt: str) -> Picture:
    """size: the bytes that are said of it."""
    if file is None:
        return Picture(None, "not there")
    if size == 0:
        return Picture(None, "the class's text only")
    note = "" if size is None else f"{size:,} bytes"
    try:
        picture = read_image(file)
    except OSError:  # a form may keep a code, which its copy shows decoded
        return Picture(None, f"{note}, coded".strip(", "))
    picture.thumbnail((SIDE, SIDE))
    return Picture(_uri(picture, "WEBP", quality=80), note, alt)


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def confusion(entry: Entry) -> Confusion | None:
    """The confusion matrix after the last phase, summed over class orders.

    Rows are true classes and columns predicted ones.  Of one class order they are in the order in which they were
    learnt, so that a column of the last phase shows what the newest classes draw to themselves; of several they are
    sorted.  None where the files are not at hand.
    """
    in_order = len(entry.orders) == 1
    names = entry.orders[0].class_names[: entry.results.summary.classes_seen[-1]]
    names = names if in_order else sorted(names)
    total = np.zeros((len(names), len(names)))
    for order in entry.orders:
        try:
            text = confusion_file(entry.folder, order.seed, len(order.phases) - 1, entry.classifier).read_text("utf-8")
            header, *rows = csv.reader(io.StringIO(text))
            counts = np.array([[float(cell) for cell in row[1:]] for row in rows])
            columns = [header[1:].index(name) for name in names]
            total += counts[np.ix_(columns, columns)]
        except (OSError, ValueError, IndexError):
            return None
    share = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    pale, dark = np.array([247.0, 251, 255]), np.array([8.0, 48, 107])
    pixels = (pale + np.sqrt(share)[..., None] * (dark - pale)).astype(np.uint8)
    if len(names) > MOST_CLASSES:
        return Confusion(names, [], _uri(Image.fromarray(pixels), "PNG", optimize=True), in_order)
    cells = [
        [(f"{100 * part:.0f}", f"#{colour.tobytes().hex()}") for part, colour in zip(*row, strict=True)]
        for row in zip(share, pixels, strict=True)
    ]
    return Confusion(names, cells, "", in_order)


ABOUT_GENERATOR = ("generator", "generator's bytes", "generator trained on")
"""Rows of a provenance that say what the generator has seen, and how large it is."""


def provenance(entry: Entry) -> list[tuple[str, str]]:
    """What made the copies that a run used, as (what, value); empty where it used none."""
    phases = [phase for order in entry.orders for phase in reversed(order.phases)]
    copies = next((phase.copies for phase in phases if phase.copies), None)
    if copies is None:
        return []
    rows = []
    for made_by in copies.made_by:
        settings = {"settings": "not recorded"} if made_by.settings is None else dict(_flat(made_by.settings))
        rows += sorted(settings.items(), key=lambda row: (row[0] not in ("model", "precision"), row))
    return [*rows, ("copies used", f"{copies.files:,}"), ("digest of copies", copies.digest), *_generator(copies)]


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    flat = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value)
        elif value is not None:
            flat.append((key, in_words(value)))
    return flat


def _generator(copies: Copies) -> list[tuple[str, str]]:
    """The generator's name or file, its bytes, and what it was trained on; nothing for copies that no model made."""
    settings = [made_by.settings or {} for made_by in copies.made_by]
    if not any(each.get("model") or each.get("autoencoder") for each in settings):
        return []
    if (name := copies.generator) is None:  # results of earlier versions do not tell
        return [("generator", "not recorded")]
    bundled = MODELS / f"cldm_{name}.safetensors"
    file = bundled if bundled.is_file() else Path(name).expanduser()
    size = f"{file.stat().st_size:,}" if file.is_file() else "about 5,700,000,000" if name == "sd15" else "not at hand"
    about, notes = TRAINED_ON.get(name, "not recorded"), file.with_suffix(".md")
    if notes.is_file():
        paragraphs = notes.read_text(encoding="utf-8").replace("\n\n", "\0").replace("\n", " ").split("\0")
        about = next((p.removeprefix("**Data.** ") for p in paragraphs if p.startswith("**Data.**")), about)
    size = f"{size} (not counted in the memory)"
    return list(zip(ABOUT_GENERATOR, (name, size, about.replace("`", "")), strict=True))
