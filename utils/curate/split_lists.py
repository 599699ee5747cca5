"""Splits that were published as two lists of pictures, one of train and one of test pictures."""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from utils.curate.sources import MODE_FOLDERS, TEST_FOLDERS, Picture, choose
from utils.data.images import is_image
from utils.errors import UserError


def read_split_list(file: Path) -> list[PurePosixPath]:
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
    if not folder.is_dir():
        raise UserError(f"--source: {folder} is not a folder.")
    named = {mode: read_split_list(file) for mode, file in lists.items()}
    place = " and ".join(map(str, lists.values()))
    all_labels = list(dict.fromkeys(path.parent.name for paths in named.values() for path in paths))
    taken = set(choose(labels, all_labels, place))
    names_in = functools.cache(lambda at: frozenset(os.listdir(at)) if at.is_dir() else frozenset())
    pictures: list[Picture] = []
    missing: set[Path] = set()
    files: dict[str, set[Path]] = {"train": set(), "test": set()}
    for mode, paths in named.items():
        for path in (path for path in paths if path.parent.name in taken):
            label, name = path.parts[-2:]
            candidates = [folder / at / label / name for at in _places(folder, path, mode)]
            file = next((file for file in candidates if name in names_in(file.parent)), folder / path)
            pictures.append(Picture(mode, label, name, file))
            files[mode].add(file)
            if name not in names_in(file.parent):
                missing.add(file)
    if twice := sorted(files["train"] & files["test"]):
        raise UserError(f"{len(twice)} pictures are in both lists, such as {twice[0].relative_to(folder)}.")
    if missing:
        example = min(missing).relative_to(folder)
        raise UserError(f"{len(missing)} of {len(pictures)} listed pictures are not in {folder}, such as {example}.")
    return pictures


def _places(folder: Path, listed: PurePosixPath, mode: str) -> list[str]:
    """Where the class folder of a listed picture may be, in this order, relative to the source's folder."""
    if len(listed.parts) > 2 and (folder / listed.parts[0]).is_dir():
        return [listed.parts[0]]
    own = ["train"] if mode == "train" else list(TEST_FOLDERS)
    return ["", *own, *(name for name in MODE_FOLDERS if name not in own)]
