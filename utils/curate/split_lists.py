"""Splits that were published as two lists of pictures, one of train and one of test pictures."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from utils.curate.sources import TEST_FOLDERS, Picture, choose
from utils.data.images import is_image
from utils.errors import UserError


def read_split_list(file: Path) -> list[tuple[str, str]]:
    """(class label, file name) of each picture that a list names.

    A line is a path whose last two parts count, with or without a class number behind it or a dash in front:

        train/n01440764/n01440764_18.JPEG 0        PODNet's lists of ImageNet
        n01514668/n01514668_23056.JPEG             FOSTER's
        - data/imagenet-r/test/n02128757/art_4.jpg CODA-Prompt's of ImageNet-R, as YAML

    Lines that are no path of a picture, such as YAML's other lines, are left out.  Raises UserError where none is left.
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
            named.append((path.parent.name, path.name))
    if not named:
        raise UserError(f"{file} is no list of pictures. It may have a line <class-label>/<file> for each.")
    return list(dict.fromkeys(named))


def listed_pictures(folder: Path, lists: Mapping[str, Path], labels: Iterable[str] | None = None) -> list[Picture]:
    """The pictures of two lists, in <folder>/<label>/ or <folder>/{train,test,val,...}/<label>/.

    lists: "train" and "test" to files; labels: of the classes to take, None or empty for all that are named.
    Raises UserError for pictures that are not there, or are in both lists.
    """
    if not folder.is_dir():
        raise UserError(f"--source: {folder} is not a folder.")
    named = {mode: read_split_list(file) for mode, file in lists.items()}
    if twice := sorted(set(named["train"]) & set(named["test"])):
        raise UserError(f"{len(twice)} pictures are in both lists, such as {'/'.join(twice[0])}.")
    place = " and ".join(map(str, lists.values()))
    taken = set(choose(labels, list(dict.fromkeys(label for of_mode in named.values() for label, _ in of_mode)), place))
    places = [folder, *(folder / name for name in ("train", *TEST_FOLDERS))]
    found: dict[tuple[str, str], Path] = {}
    for of_place in reversed(places):
        for label in taken:
            if (of_place / label).is_dir():
                found |= {(label, file.name): file for file in (of_place / label).iterdir() if is_image(file)}
    wanted = [(mode, picture) for mode, of_mode in named.items() for picture in of_mode if picture[0] in taken]
    if missing := [picture for _, picture in wanted if picture not in found]:
        raise UserError(
            f"{len(missing)} of {len(wanted)} listed pictures are not in {folder}, such as {'/'.join(missing[0])}."
        )
    return [Picture(mode, *picture, found[picture]) for mode, picture in wanted]
