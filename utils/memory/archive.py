"""The exemplar memory as one file: a ZIP, stored without compression, whose size is what the memory takes.

    memory.json              which exemplars there are, in which form; the forms' settings; the classes' texts
    real/<class>/<file>      real exemplars, byte for byte
    <form>/<class>/<file>    what is kept of the others

The same memory gives the same bytes.
"""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from utils.data.images import image_bits, write_atomically
from utils.data.items import REAL
from utils.errors import UserError
from utils.memory.exemplars import ExemplarMemory

INDEX = "memory.json"


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
        name = kept and f"{form}/{label}/{kept.name}"
        width, height, bits = image_bits(item.image)
        about = {"image": item.image.name, "form": form, "file": name, "size": [width, height], "bits_per_pixel": bits}
        classes[-1]["exemplars"].append(about)
        forms[form] = memory.forms[form].settings()
        files += [(name, kept)] if kept else []
    texts = memory.paths.class_texts() if any(form != REAL for form in forms) else {}
    texts = {of_class["label"]: texts[of_class["label"]] for of_class in classes if of_class["label"] in texts}
    index = {"dataset": memory.paths.dataset, "forms": forms, "texts": texts, "classes": classes}

    def fill(file) -> None:
        with zipfile.ZipFile(file, "w") as archive:  # ZipInfo's date is always 1980
            archive.writestr(zipfile.ZipInfo(INDEX), json.dumps(index, ensure_ascii=True, separators=(",", ":")))
            for name, kept in files:
                archive.writestr(zipfile.ZipInfo(name.encode("utf-8", "backslashreplace").decode()), kept.read_bytes())

    write_atomically(path, fill)
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
    for about in _exemplars(index):
        exemplars[about["form"]] += 1
        files[about["form"]] += about["file"] is not None
        taken[about["form"]] += sizes.get(about["file"], 0)
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
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    return len(names)


def _exemplars(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [about for of_class in index["classes"] for about in of_class["exemplars"]]
