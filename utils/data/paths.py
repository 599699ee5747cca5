"""The layout on disk: train image <-> edge map <-> copies.  All paths come from this module.

    <data-dir>/<dataset>/train/<class-label>/<stem>.<ext>
    <data-dir>/<dataset>/test/<class-label>/<stem>.<ext>
    <data-dir>/<dataset>/edge_maps/<class-label>/<stem>.edges
    <data-dir>/<dataset>/exemplars/<class-label>/<stem>_seed00.jpg

Other exemplar forms have folders of their own instead of the last two (`FormFiles`).  A variant's folders are
`edge_maps-<variant>` and `exemplars-<variant>`.  What belongs to a train image lies beside the `train` folder that the
image itself is in, which may be another data folder's: exemplars from a memory's archive are in one of their own.
Where two images of a class differ only in their ending (`a.jpg`, `a.png`), files derived from them have the whole name
as their stem.
"""

import difflib
import functools
import hashlib
import logging
import os
import re
import shlex
import unicodedata
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.datasets import FETCHED, class_lists, curate_command
from utils.data.images import is_image
from utils.errors import UserError
from utils.files import load_json

log = logging.getLogger(__name__)


@functools.cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)


def data_dir(chosen: str | os.PathLike | None = None) -> Path:
    """The folder of all datasets: `chosen`, else $ESCORT_DATA_DIR, else ./data."""
    return Path(chosen or os.environ.get("ESCORT_DATA_DIR") or "data").expanduser()


def datasets(folder: Path) -> list[str]:
    """The names of the datasets in a data folder: its sub-folders that have a folder `train`."""
    return sorted(entry.name for entry in folder.glob("*") if (entry / "train").is_dir()) if folder.is_dir() else []


def find_dataset(folder: Path, name: str) -> str:
    """A dataset's folder name; the case of letters may differ where only one folder matches ("cifar100")."""
    alike = [other for other in datasets(folder) if other.lower() == name.lower()]
    return alike[0] if len(alike) == 1 and not (folder / name).exists() else name


@dataclass(frozen=True)
class FormFiles:
    """The folders of an exemplar form, beside `train`, and the endings of its files; by default those of edge maps.

    kept_endings: the first is written, all are read.
    """

    kept: str = "edge_maps"
    copies: str = "exemplars"
    kept_endings: tuple[str, ...] = (".edges", ".webp", ".png", ".bmp")
    copy_ending: str = ".jpg"


@dataclass(frozen=True)
class DatasetPaths:
    """One dataset's folders.

    data_dir: of all datasets; dataset: the folder's name in it; variant: name of a separate set of kept files and
    copies, "" for the default one; files: of the exemplar form.
    Raises UserError for a dataset or variant that is no folder name.
    """

    data_dir: Path
    dataset: str
    variant: str = ""
    files: FormFiles = FormFiles()
    _other_stems: dict[Path, dict[str, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "data_dir", Path(self.data_dir))
        if self.dataset in ("", ".", "..") or re.search(r"[/\\\0]", self.dataset):
            raise UserError(f"a dataset is one folder of the data folder, not {self.dataset!r} (see --data-dir).")
        if not re.fullmatch(r"[\w.-]*", self.variant):
            raise UserError(f"a variant's name consists of letters, digits, '.', '-' and '_', unlike {self.variant!r}.")

    @property
    def root(self) -> Path:
        return self.data_dir / self.dataset

    def folder(self, mode: str) -> Path:
        """The folder of "train" or "test" images, or of the exemplar form's "kept" files or "copies"."""
        if mode not in ("kept", "copies"):
            return self.root / mode
        name = getattr(self.files, mode)
        return self.root / (f"{name}-{self.variant}" if self.variant else name)

    def classes(self, mode: str = "train") -> list[str]:
        """Sorted class labels: the names of the mode's sub-folders.  Raises UserError if there are none."""
        folder = self.folder(mode)
        if not folder.is_dir():
            put = f"{others} put" if (others := self._other_ways()) else "Put"
            raise UserError(
                f"no {mode} images of dataset {self.dataset!r}: {folder} is not a folder. {put} images in "
                f"{folder}/<class-label>/, or set another folder with --data-dir or data_dir."
            )
        labels = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
        if not labels:
            raise UserError(f"{folder} has no class folders; images belong in {folder}/<class-label>/.")
        return labels

    def _other_ways(self) -> str:
        """To get a dataset that is not there, than to put images into its folders; "" for none."""
        if self.root.is_dir():
            return ""
        if command := curate_command(self.dataset):
            where = f" --data-dir {shlex.quote(str(self.data_dir))}" if self.data_dir != data_dir() else ""
            return f"{command}{where} makes it; or"
        names = {name.lower(): name for name in (*class_lists(), *FETCHED, *datasets(self.data_dir))}
        near = difflib.get_close_matches(self.dataset.lower(), names, n=1)
        return f"Did you mean {names[near[0]]!r}? Else" if near else ""

    def images(self, label: str, mode: str = "train") -> list[Path]:
        """Sorted image files of a class, by their endings.  Raises UserError for a folder that can't be listed."""
        return _images(self.folder(mode) / label)

    def _stem(self, image: Path) -> str:
        folder = image.parent
        if folder not in self._other_stems:
            self._other_stems[folder] = _distinct_stems([path.name for path in _images(folder)])
        return self._other_stems[folder].get(image.name, image.stem)

    def _beside(self, image: Path, mode: str) -> Path:
        """The folder of a train image's kept file or copies."""
        return image.parents[2] / self.folder(mode).name / image.parent.name

    def kept(self, image: Path) -> Path:
        """Where a train image's kept file is written."""
        return self._beside(image, "kept") / f"{self._stem(image)}{self.files.kept_endings[0]}"

    def find_kept(self, image: Path, among: Container[str] | None = None) -> Path | None:
        """A train image's kept file, with any of the form's endings; None if there is none.

        An edge map is an .edges, a .webp or .png of earlier versions, or a .bmp of the published scripts.
        among: the names in its folder, if the caller has listed it.
        """
        folder, stem = self._beside(image, "kept"), self._stem(image)
        for name in (f"{stem}{ending}" for ending in self.files.kept_endings):
            # isfile: False, not an error, for a name that is too long
            if name in among if among is not None else os.path.isfile(folder / name):
                return folder / name
        return None

    def copy(self, image: Path, k: int) -> Path:
        """The path of copy number k (0, 1, ...) of a train image."""
        return self._beside(image, "copies") / self.copy_name(image, k)

    def copy_name(self, image: Path, k: int) -> str:
        """The file name of copy number k, within its class's `copies_folder`."""
        return f"{self._stem(image)}_seed{k:02d}{self.files.copy_ending}"

    def copies_folder(self, label: str) -> Path:
        """The folder with the copies of a class's images."""
        return self.folder("copies") / label

    def class_texts(self, labels: Iterable[str] | None = None) -> dict[str, str]:
        """Class label -> its text in prompts: the entry of `class_names.json`, else the label.

        labels: None for all that have a folder, with a warning about entries that match none.  Labels match whether
        their accents are composed or not.  Bytes of a label that are not UTF-8 become "?".
        """
        entries = self._class_names()
        chosen = self.classes() if labels is None else labels
        composed = {label: unicodedata.normalize("NFC", label) for label in chosen}
        if labels is None and (unused := entries.keys() - composed.values()):
            match = f"{len(unused)} of its {len(entries)} entries match no class folder, such as {min(unused)!r}"
            _warn_once(f"{self.root / 'class_names.json'}: {match}")
        return {label: entries.get(name, label).encode("utf-8", "replace").decode() for label, name in composed.items()}

    def _class_names(self) -> dict[str, str]:
        """The entries of class_names.json, by label in composed form (NFC)."""
        file = self.root / "class_names.json"
        if not file.is_file():
            return {}
        texts = load_json(file)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise UserError(f'{file} must be one object of texts, like {{"n01440764": "tench"}}.')
        return {unicodedata.normalize("NFC", label): text for label, text in texts.items()}

    def warn_of_nested(self, labels: Iterable[str]) -> None:
        """Log a warning if class folders of `train` have sub-folders with pictures, which are not used."""
        nested = []
        for label in labels:
            if not (folder := self.folder("train") / label).is_dir():
                continue
            with os.scandir(folder) as entries:
                nested += [Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")]
        if holding := [folder for folder in nested if any(is_image(path) for path in _entries(folder))]:
            more = f" (and {len(holding) - 1} more folders)" if len(holding) > 1 else ""
            _warn_once(f"{holding[0]}{more}: pictures in sub-folders of a class folder are not used")


def _distinct_stems(names: Collection[str]) -> dict[str, str]:
    """File name -> the stem of the files derived from it, for names that share their plain stem with another.

    Such a file's stem is its whole name (a.jpg, a.png), or, where that is taken too or differs only in case (which some
    file systems ignore), its name and a digest of it.
    """
    choices = {name: (os.path.splitext(name)[0], name, f"{name}-{_digest(name)}") for name in names}
    level = dict.fromkeys(names, 0)
    while True:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(choices[name][level[name]].casefold(), []).append(name)
        colliding = [group for group in groups.values() if len(group) > 1]
        if not colliding:
            return {name: choices[name][level[name]] for name in names if level[name]}
        for group in colliding:
            lowest = min(level[name] for name in group)
            for name in group:
                level[name] += level[name] == lowest


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in _entries(folder) if is_image(path)) if folder.is_dir() else []


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from error
