"""The classes of pictures."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from models.use.learner import Learner
from utils.cli import nb_cores
from utils.data.images import UnreadableImage, is_image, read_prepared
from utils.errors import UserError

SHOWN = 5


def pictures_of(root: Path) -> list[Path]:
    """A picture, or those of a folder and its sub-folders, sorted.  Raises UserError where there are none."""
    if root.is_file():
        return [root]
    files = [path for path in root.rglob("*") if is_image(path) and path.is_file()]
    pictures = sorted(path for path in files if not any(p.startswith(".") for p in path.relative_to(root).parts))
    if not pictures:
        raise UserError(f"--images: {root} " + ("has no pictures." if root.is_dir() else "is not there."))
    return pictures


def header(learner: Learner) -> list[str]:
    """The columns of `rows`."""
    further = range(2, min(SHOWN, len(learner.class_names)) + 1)
    value = "similarity" if learner.by_means else "probability"
    return ["file", "class", value, *(f"{name}_{n}" for n in further for name in ("class", value))]


def rows(learner: Learner, images: Sequence[Path], broken: list[str]) -> Iterator[list[str]]:
    """One row a picture: the file, then the likeliest classes and how likely they are (`Learner.confidences`).

    broken: gets a message for each picture that can't be read, which has no row.
    """
    predictor, names = learner.predictor, learner.class_names
    prepare, size = learner.data.defaults.test_transform.prepare, learner.config.batch_size

    def read(path: Path) -> np.ndarray | str:
        try:
            return read_prepared(path, prepare)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(nb_cores()) as readers:
        for start in range(0, len(images), size):
            paths = images[start : start + size]
            read_ones = list(zip(paths, readers.map(read, paths), strict=True))
            broken += [picture for _, picture in read_ones if isinstance(picture, str)]
            good = [(path, picture) for path, picture in read_ones if not isinstance(picture, str)]
            if not good:
                continue
            pictures = predictor.to_device(learner.data.defaults.test_transform([picture for _, picture in good]))
            with torch.inference_mode(), predictor.fabric.autocast():
                outputs = learner.network(pictures)
            best = learner.confidences(outputs).cpu().topk(min(SHOWN, len(names)))
            for (path, _), values, classes in zip(good, best.values.tolist(), best.indices.tolist(), strict=True):
                best_classes = zip(classes, values, strict=True)
                yield [str(path), *(text for target, p in best_classes for text in (names[target], f"{p:.4f}"))]
