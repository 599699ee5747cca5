"""A tiny dataset that a small network learns within seconds: coloured shapes on a dark, noisy ground."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.data.images import image_bits
from utils.data.paths import DatasetPaths

SHAPES = {
    "blue disc": ("ellipse", (40, 80, 230)),
    "blue square": ("rectangle", (40, 80, 230)),
    "green disc": ("ellipse", (40, 200, 60)),
    "green square": ("rectangle", (40, 200, 60)),
    "red disc": ("ellipse", (230, 50, 40)),
    "red square": ("rectangle", (230, 50, 40)),
}


def picture(label: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """One shape of its class's colour, anywhere in the picture."""
    kind, colour = SHAPES[label]
    image = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
    side = int(rng.integers(size // 3, size // 2))
    x, y = rng.integers(0, size - side, 2).tolist()
    getattr(ImageDraw.Draw(image), kind)((x, y, x + side, y + side), fill=colour)
    return image


def make_shapes(
    data_dir: Path, *, train: int = 12, test: int = 6, copies: int = 2, name: str = "Shapes"
) -> DatasetPaths:
    """The dataset with its edge maps and copies; a copy is simply another picture of the class."""
    paths = DatasetPaths(data_dir, name)
    for number, label in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        for mode, count in (("train", train), ("test", test)):
            folder = paths.folder(mode) / label
            folder.mkdir(parents=True)
            for i in range(count):
                picture(label, rng).save(folder / f"{i:03d}.png")
        for image in paths.images(label):
            for path in [paths.kept(image), *(paths.copy(image, k) for k in range(copies))]:
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("1", image_bits(image)[:2]).save(paths.kept(image).with_suffix(".webp"))
            for k in range(copies):
                picture(label, rng).save(paths.copy(image, k))
    return paths
