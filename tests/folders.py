"""Small datasets on disk for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.paths import DatasetPaths


def save_picture(path: Path, colour=0, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Path:
    """A picture of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def save_noise(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture that differs for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_dataset(data_dir: Path, labels, *, train=4, test=2, size=(32, 32), name="Toy", ending=".png") -> DatasetPaths:
    """A dataset of noise pictures; `train` and `test` are numbers of images per class."""
    paths = DatasetPaths(data_dir, name)
    for mode, count in (("train", train), ("test", test)):
        for c, label in enumerate(labels):
            for i in range(count):
                save_noise(paths.folder(mode) / label / f"{i:04d}{ending}", seed=1000 * c + i, size=size)
    return paths
