"""The sources of `utils.curate`: datasets of torchvision, and folders of class folders.

A source lists pictures with their places in the project's layout.  The table SOURCES, at the end, has them all.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.images import is_image
from utils.data.published import without_comments
from utils.errors import UserError
from utils.files import load_json, parse_json

CALTECH_CLUTTER = "257.clutter"
"""Caltech-256's folder of pictures that are in none of its 256 classes; left out unless a class list names it."""
TEST_FOLDERS = ("test", "val", "valid", "validation")
MODE_FOLDERS = ("train", *TEST_FOLDERS)


class Picture(NamedTuple):
    """One picture of a dataset, to be written to <mode>/<label>/<name>.

    content: a file, copied byte for byte, or pixels (uint8, H x W or H x W x 3), written as PNG.
    """

    mode: str
    label: str
    name: str
    content: Path | np.ndarray


class Split(NamedTuple):
    """How each class is divided where there is no official split.

    share: of the test pictures, between 0 and 1; seed: of the choice.
    """

    share: float = 0.2
    seed: int = 0


def divide(files: Mapping[str, Mapping[str, Path]], split: Split) -> list[Picture]:
    """Divide label -> name -> file into train and test pictures: of a class's n, round(share * n) are test pictures,
    but at least one of each kind.

    They are chosen by a hash of seed, label and name, the same on every machine.  Raises UserError for a class with one
    picture.
    """
    pictures = []
    for label, class_files in files.items():
        if len(class_files) < 2:
            raise UserError(f"class {label!r} has {len(class_files)} pictures: too few to divide into train and test.")
        digests = {
            name: hashlib.sha256(f"{split.seed}/{label}/{name}".encode("utf-8", "surrogateescape")).digest()
            for name in class_files
        }
        count = min(max(round(split.share * len(class_files)), 1), len(class_files) - 1)
        for_test = set(sorted(class_files, key=digests.__getitem__)[:count])
        for name, file in class_files.items():
            pictures.append(Picture("test" if name in for_test else "train", label, name, file))
    return pictures


# torchvision's datasets


def _torchvision(name: str, root: Path, **arguments):
    """A dataset of torchvision from `root`, downloaded if it is not there.  Raises UserError where that fails."""
    import torchvision_compat  # noqa: F401, I001  (before torchvision)
    from torchvision import datasets

    entries = set(root.rglob("*")) if root.is_dir() else None
    try:
        return getattr(datasets, name)(str(root), download=True, **arguments)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = str(error).strip().partition("\n")[0]
        _remove_empty_folders(root, entries)
        raise UserError(
            f"{name} is not in {root} and can't be downloaded ({reason}). "
            f"Put it there, packed or unpacked as torchvision keeps it, or name its folder with --source."
        ) from None


def _remove_empty_folders(root: Path, entries: set[Path] | None) -> None:
    """Remove the empty folders that a failed download made; there: what root had before, None if there was no root."""
    folders = [path for path in root.rglob("*") if path.is_dir() and (entries is None or path not in entries)]
    for folder in [*sorted(folders, reverse=True), *([root] if entries is None else [])]:
        with suppress(OSError):
            folder.rmdir()


def cifar(root: Path, split: Split, labels: Iterable[str] | None = None, *, name: str) -> list[Picture]:
    """CIFAR10 or CIFAR100, its files named by their place in the batches.  PNG, as JPEG would change the pixels."""
    pictures = []
    for mode in ("train", "test"):
        dataset = _torchvision(name, root, train=mode == "train")
        pictures += [
            Picture(mode, dataset.classes[target], f"{i:05d}.png", pixels)
            for i, (pixels, target) in enumerate(zip(dataset.data, dataset.targets, strict=True))
        ]
    return pictures


def food101(root: Path, split: Split, labels: Iterable[str] | None = None) -> list[Picture]:
    """Food101 with its official split: 750 train and 250 test pictures a class."""
    _torchvision("Food101", root)
    folder = root / "food-101"
    pictures = []
    for mode in ("train", "test"):
        file = folder / "meta" / f"{mode}.json"
        try:
            listed = load_json(file)
        except UserError as error:
            raise UserError(f"{error} Delete {folder} and unpack it again.") from None
        for label, names in listed.items():
            files = [folder / "images" / f"{name}.jpg" for name in names]
            pictures += [Picture(mode, label, path.name, path) for path in files]
    return pictures


def caltech256(root: Path, split: Split, labels: Iterable[str] | None = None) -> list[Picture]:
    """Caltech256, which has no official split.  labels: the classes to take; without them, all but the clutter."""
    _torchvision("Caltech256", root)
    folder = root / "caltech256" / "256_ObjectCategories"
    folders = class_folders(folder)
    taken = choose(labels, folders, folder) if labels else [label for label in folders if label != CALTECH_CLUTTER]
    # only .jpg: there are a stray folder and a script among the archive's pictures
    return divide(
        {label: {file.name: file for file in sorted((folder / label).glob("*.jpg"))} for label in taken}, split
    )


# Folders of class folders


def image_folder(folder: Path, split: Split, labels: Iterable[str] | None = None) -> list[Picture]:
    """Pictures in <folder>/train/<label>/ and <folder>/{test,val,valid,validation}/<label>/; without the latter, those
    in <folder>/[train/]<label>/ are divided.

    labels: the classes to take, None for all.  Pictures in sub-folders of a class folder are named folder_file.
    Raises UserError where the folder, a class or pictures of a class are missing.
    """
    if not folder.is_dir():
        raise UserError(f"--source: {folder} is not a folder.")
    has_train = bool(class_folders(folder / "train"))
    train = folder / "train" if has_train else folder
    taken = choose(labels, class_folders(train), train)
    if not taken:
        raise UserError(f"{train} has no class folders; pictures belong in {train}/<class-label>/.")
    if not labels:
        _check_level(train, taken)
    for name in TEST_FOLDERS if has_train else ():
        if set(taken) & set(class_folders(folder / name)):
            modes = {"train": train, "test": folder / name}
            break
    else:
        for name in TEST_FOLDERS if has_train else ():
            if (folder / name).is_dir() and any(is_image(path) for path in (folder / name).iterdir()):
                raise UserError(
                    f"{folder / name} holds pictures without class folders. Sort them into class folders, or rename "
                    f"{folder / name} to divide {train} instead."
                )
        return divide({label: _images(train / label) for label in taken}, split)
    pictures = []
    for mode, where in modes.items():
        for label in taken:
            files = _images(where / label)
            if not files:
                raise UserError(f"class {label!r} has no pictures in {where}. Add some, or leave it out (--classes).")
            pictures += [Picture(mode, label, name, file) for name, file in files.items()]
    return pictures


def _check_level(folder: Path, labels: Sequence[str]) -> None:
    """Raise UserError where sub-folders are not classes but parts of a split, or groups of classes.

    Such are Kaggle's ImageNet-100 (train.X1, ..., train.X4, val.X) and a folder of datasets: they hold folders with
    pictures, and no picture themselves.  One folder of pictures in each class, as Tiny ImageNet has it, is accepted.
    """
    inner = {label: names for label in labels if (names := _only_folders(folder / label))}
    parts = [label for label in inner if re.fullmatch(rf"({'|'.join(MODE_FOLDERS)})(\d+|[._-].*)?", label)]
    if parts:
        advice = f"Move the class folders of train into {folder / 'train'}, those of val or test into {folder / 'val'}."
    elif len(inner) == len(labels) and len({name for names in inner.values() for name in names}) > 1:
        advice = (
            "Name one of them with --source, or move the class folders one level up; --classes takes them as they are."
        )
    else:
        return
    groups = parts or list(inner)
    examples = ", ".join(groups[:3]) + (", ..." if len(groups) > 3 else "")
    raise UserError(f"{folder}: {examples} hold class folders (such as {groups[0]}/{inner[groups[0]][0]}). {advice}")


def _only_folders(folder: Path) -> list[str]:
    """The sub-folders that hold pictures, of a folder that holds no picture itself; else []."""
    if any(is_image(path) for path in folder.iterdir()):
        return []
    return [name for name in class_folders(folder) if any(is_image(path) for path in (folder / name).rglob("*"))]


def choose(labels: Iterable[str] | None, available: Sequence[str], where: Path | str) -> list[str]:
    """The labels of a class list, or all found labels without a list.  Raises UserError for a label not found."""
    if not labels:
        return list(available)
    labels = list(dict.fromkeys(labels))
    if missing := sorted(set(labels) - set(available)):
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(labels)} classes of the list are not in {where}: {examples}.")
    return labels


def class_folders(folder: Path) -> list[str]:
    """Sorted names of a folder's sub-folders, without hidden ones; [] if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> dict[str, Path]:
    """Name -> file of all pictures in a class folder and its sub-folders."""
    files = sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())
    named = {"_".join(file.relative_to(folder).parts): file for file in files}
    if len(named) < len(files):
        raise UserError(f"{folder}: two pictures in sub-folders would get the same name. Rename one.")
    return named


# Texts for the classes


def read_class_list(file: Path) -> dict[str, str | None]:
    """Class labels and their texts (None without one), from a file in one of these formats:

        n01440764                        one label a line; "# ..." is a comment,
        n01440764 tench, Tinca tinca     and a text after a tab, or after a space behind a WordNet number (ImageNet's
                                         LOC_synset_mapping.txt): its first name is taken,
        {"n01440764": "tench"}           JSON,
        {"0": ["n01440764", "tench"]}    JSON as imagenet_class_index.json has it,
        ["n01440764", ...]               a JSON list of labels.

    Raises UserError for anything else.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
        pairs: list[tuple[str, str | None]] = []
        if file.suffix.lower() != ".json":
            for line in without_comments(content.splitlines()):
                label, *texts = re.split(r"\s*\t\s*|(?<=^n\d{8})\s+", line, maxsplit=1)
                pairs.append((label, texts[0] if texts else None))
        else:
            listed = parse_json(content.encode(), str(file))
            items = listed.items() if isinstance(listed, dict) else ((label, None) for label in listed)
            for key, value in items:
                label, text = value if isinstance(value, list) else (key, value)
                pairs.append((label, text))
        entries: dict[str, str | None] = {}
        for label, text in pairs:
            if entries.setdefault(label, text) != text:
                raise ValueError(f"{label} has two texts, {entries[label]!r} and {text!r}; keep one")
        if not entries or not all(isinstance(t, str | None) and isinstance(label, str) for label, t in entries.items()):
            raise ValueError("it has no labels, or values that are not texts")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no list of classes ({error}). It may have one label a line.") from None
    return {label: text and text.partition(",")[0].strip() for label, text in entries.items()}


def readable(label: str) -> str:
    """A class label as a text for prompts: "apple_pie" -> "apple pie", "001.Black_footed_Albatross" -> "Black footed
    Albatross"."""
    without_number = re.sub(r"^(\d+\.|0\d+[_-]|\d{3,}[_-])", "", label)
    return " ".join(without_number.replace("_", " ").split()) or label


def readable_caltech(label: str) -> str:
    """The same of Caltech-256: "001.ak47" -> "ak47", "253.faces-easy-101" -> "faces easy"; "t-shirt" is unchanged."""
    words = re.sub(r"-101$", "", readable(label))
    return re.sub(r"(?<=\w\w)-(?=\w\w)", " ", words)


def is_wordnet_number(label: str) -> bool:
    """Whether a label is a WordNet number, such as ImageNet's n01440764, which means nothing to a text encoder."""
    return re.fullmatch(r"n\d{8}", label) is not None


class Source(NamedTuple):
    """A dataset, or kind of folder, that `python -m utils.curate` knows by name.

    pictures: (folder of the archives or class folders, split, labels to take, none for all) -> pictures; it may ignore
    a split that it does not need, and labels, as the command leaves out what was not asked for.
    text: class label -> the text of its prompts, where no list gives one.
    """

    pictures: Callable[[Path, Split, Iterable[str] | None], list[Picture]]
    text: Callable[[str], str] = readable


SOURCES = {
    "CIFAR10": Source(partial(cifar, name="CIFAR10")),
    "CIFAR100": Source(partial(cifar, name="CIFAR100")),
    "Food101": Source(food101),
    "Caltech256": Source(caltech256, readable_caltech),
    "folder": Source(image_folder),
}
