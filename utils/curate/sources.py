"""The sources of `utils.curate`: datasets of torchvision, and folders of class folders.

A source lists pictures with their places in the project's layout.  The table SOURCES, at the end, has them all.
"""

import functools
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from utils.data.images import is_image
from utils.errors import UserError
from utils.files import load_json

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
    """How each class is divided where there is no official split; share: of the test pictures, between 0 and 1."""

    share: float = 0.2
    seed: int = 0


def divide(files: Mapping[str, Mapping[str, Path]], split: Split) -> list[Picture]:
    """Divide label -> name -> file: of a class's n, round(share * n) are test pictures, but at least one of each kind.

    A hash of seed, label and name chooses them, on every machine the same.  Raises UserError for one picture.
    """
    pictures = []
    for label, named in files.items():
        if len(named) < 2:
            raise UserError(f"class {label!r} has {len(named)} pictures: too few to divide into train and test.")
        texts = {name: f"{split.seed}/{label}/{name}".encode("utf-8", "surrogateescape") for name in named}
        count = min(max(round(split.share * len(named)), 1), len(named) - 1)
        for_test = set(sorted(named, key=lambda name: hashlib.sha256(texts[name]).digest())[:count])
        for name, file in named.items():
            pictures.append(Picture("test" if name in for_test else "train", label, name, file))
    return pictures


# torchvision's datasets


def _torchvision(name: str, root: Path, **arguments):
    """A dataset of torchvision from `root`, downloaded if it is not there.  Raises UserError where that fails."""
    import torchvision_compat  # noqa: F401, I001  (before torchvision)
    from torchvision import datasets

    existing = {root, *root.rglob("*")} if root.is_dir() else set()
    try:
        return getattr(datasets, name)(str(root), download=True, **arguments)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        for made in sorted({root, *root.rglob("*")} - existing, reverse=True):
            with suppress(OSError):  # only folders that the failed download has left empty
                made.rmdir()
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is not in {root} and can't be downloaded ({reason}). "
            f"Put it there, packed or unpacked as torchvision keeps it, or name its folder with --source."
        ) from None


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
    taken = choose(labels or [label for label in folders if label != CALTECH_CLUTTER], folders, folder)
    # only .jpg: there are a stray folder and a script among the archive's pictures
    files = {label: sorted((folder / label).glob("*.jpg")) for label in taken}
    return divide({label: {file.name: file for file in files[label]} for label in taken}, split)


# Folders of class folders


def image_folder(folder: Path, split: Split, labels: Iterable[str] | None = None) -> list[Picture]:
    """Pictures in <folder>/train/<label>/ and <folder>/{test,val,valid,validation}/<label>/; without the latter, those
    in <folder>/[train/]<label>/ are divided.

    labels: the classes to take, None for all.  Pictures in sub-folders of a class folder are named folder_file.
    Raises UserError where a class or pictures of a class are missing.
    """
    has_train = bool(class_folders(folder / "train"))
    train = folder / "train" if has_train else folder
    taken = choose(labels, class_folders(train), train)
    if not taken:
        raise UserError(f"{train} has no class folders; pictures belong in {train}/<class-label>/.")
    if not labels:
        _check_level(train, taken)
    others = [folder / name for name in TEST_FOLDERS if has_train and (folder / name).is_dir()]
    test = next((other for other in others if set(taken) & set(class_folders(other))), None)
    if test is None:
        for other in others:
            if any(is_image(path) for path in other.iterdir()):
                raise UserError(
                    f"{other} holds pictures without class folders. Sort them into class folders, or rename {other} "
                    f"to divide {train} instead."
                )
        return divide({label: _images(train / label) for label in taken}, split)
    pictures = []
    for mode, part in (("train", train), ("test", test)):
        for label in taken:
            files = _images(part / label)
            if not files:
                raise UserError(f"class {label!r} has no pictures in {part}. Add some, or leave it out (--classes).")
            pictures += [Picture(mode, label, name, file) for name, file in files.items()]
    return pictures


def _check_level(folder: Path, labels: Sequence[str]) -> None:
    """Raise UserError where sub-folders are parts of a split (Kaggle's ImageNet-100: train.X1, ..., val.X) or groups of
    classes: they hold folders with pictures, and no picture themselves.

    One folder of pictures in each class, as Tiny ImageNet has it, is accepted.
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


# Splits that were published as two lists of pictures


def _read_split_list(file: Path) -> list[PurePosixPath]:
    """The pictures that a list names: [<train, test, val, ...>/]<class label>/<file name>, each once.

    A line is a path, with or without a class number behind it or a dash in front:

        train/n01440764/n01440764_18.JPEG 0        PODNet's lists of ImageNet
        n01514668/n01514668_23056.JPEG             FOSTER's
        - data/imagenet-r/test/n02128757/art_4.jpg CODA-Prompt's of ImageNet-R, as YAML

    The last two parts count, and the one before where it is one of MODE_FOLDERS.  Lines that are no path of a picture,
    such as YAML's other lines, are left out.  Raises UserError where none is left.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'}).") from None
    named = []
    for line in lines:
        words = re.sub(r"^-\s+|[\s,]+\d+$", "", line.strip()).strip("\"'")
        path = PurePosixPath(words.replace("\\", "/"))
        if len(path.parts) >= 2 and is_image(path):
            has_mode = path.parts[-3:-2] and path.parts[-3] in MODE_FOLDERS
            named.append(PurePosixPath(*path.parts[-3 if has_mode else -2 :]))
    if not named:
        raise UserError(f"{file} is no list of pictures. It may have a line <class-label>/<file> for each.")
    return list(dict.fromkeys(named))


def listed_pictures(folder: Path, lists: Mapping[str, Path], labels: Iterable[str] | None = None) -> list[Picture]:
    """The pictures of two lists, in <folder>/<label>/ or <folder>/{train,test,val,...}/<label>/.

    lists: "train" and "test" to files; labels: of the classes to take, None or empty for all that are named.
    A picture that its list names as test/<label>/<file> is looked for in <folder>/test/, where there is such a folder;
    others in <folder>/<label>/, then in the folders of the list's own mode, then in those of the other.
    Raises UserError for pictures that are not there, or are in both lists.
    """
    named = {mode: _read_split_list(file) for mode, file in lists.items()}
    all_labels = list(dict.fromkeys(path.parent.name for paths in named.values() for path in paths))
    taken = set(choose(labels, all_labels, " and ".join(map(str, lists.values()))))
    names_in = functools.cache(lambda at: frozenset(os.listdir(at)) if at.is_dir() else frozenset())
    pictures: list[Picture] = []
    missing: set[Path] = set()
    files: dict[str, set[Path]] = {"train": set(), "test": set()}
    for mode, paths in named.items():
        for path in (path for path in paths if path.parent.name in taken):
            label, name = path.parts[-2:]
            candidates = [folder / part / label / name for part in _parts(folder, path, mode)]
            file = next((file for file in candidates if name in names_in(file.parent)), None)
            if file is None:
                file = folder / path
                missing.add(file)
            pictures.append(Picture(mode, label, name, file))
            files[mode].add(file)
    if twice := sorted(files["train"] & files["test"]):
        raise UserError(f"{len(twice)} pictures are in both lists, such as {twice[0].relative_to(folder)}.")
    if missing:
        example = min(missing).relative_to(folder)
        raise UserError(f"{len(missing)} of {len(pictures)} listed pictures are not in {folder}, such as {example}.")
    return pictures


def _parts(folder: Path, listed: PurePosixPath, mode: str) -> list[str]:
    """Where the class folder of a listed picture may be, in this order, relative to the source's folder."""
    if len(listed.parts) > 2 and (folder / listed.parts[0]).is_dir():
        return [listed.parts[0]]
    own = ["train"] if mode == "train" else list(TEST_FOLDERS)
    return ["", *own, *(name for name in MODE_FOLDERS if name not in own)]


# Texts for the classes


def readable(label: str) -> str:
    """A class label as a text for prompts: "apple_pie" -> "apple pie", "001.Laysan_Albatross" -> "Laysan Albatross"."""
    without_number = re.sub(r"^(\d+\.|0\d+[_-]|\d{3,}[_-])", "", label)
    return " ".join(without_number.replace("_", " ").split()) or label


def readable_caltech(label: str) -> str:
    """The same of Caltech-256: "001.ak47" -> "ak47", "253.faces-easy-101" -> "faces easy"; "t-shirt" is unchanged."""
    words = re.sub(r"-101$", "", readable(label))
    return re.sub(r"(?<=\w\w)-(?=\w\w)", " ", words)


class Source(NamedTuple):
    """A dataset, or kind of folder, that `python -m utils.curate` knows by name.

    pictures: (folder of the archives or class folders, split, labels to take, none for all) -> pictures; it may ignore
    the split and the labels, as the command takes those of the labels.
    text: class label -> the text of its prompts, where no list gives one.
    """

    pictures: Callable[[Path, Split, Iterable[str] | None], list[Picture]]
    text: Callable[[str], str] = readable


SOURCES = {
    "CIFAR10": Source(functools.partial(cifar, name="CIFAR10")),
    "CIFAR100": Source(functools.partial(cifar, name="CIFAR100")),
    "Food101": Source(food101),
    "Caltech256": Source(caltech256, readable_caltech),
    "folder": Source(image_folder),
}
