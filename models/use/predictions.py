"""What a trained network says of pictures: their likeliest classes, and accuracies on test pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from models.use.learner import Learner
from utils.cli import nb_cores
from utils.data.images import UnreadableImage, is_image, read_prepared
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError
from utils.results.metrics import nearest_mean_scores, phase_metrics

SHOWN = 5
"""Classes of a picture that a prediction names."""


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
    predictor, names, transform = learner.predictor, learner.class_names, learner.data.defaults.test_transform

    def read(path: Path) -> np.ndarray | str:
        try:
            return read_prepared(path, transform.prepare)
        except UnreadableImage as error:
            return str(error)

    size = learner.config.batch_size
    with ThreadPoolExecutor(nb_cores()) as readers:
        for start in range(0, len(images), size):
            paths = images[start : start + size]
            read_ones = list(zip(paths, readers.map(read, paths), strict=True))
            broken += [picture for _, picture in read_ones if isinstance(picture, str)]
            good = [(path, picture) for path, picture in read_ones if not isinstance(picture, str)]
            if not good:
                continue
            pictures = predictor.to_device(transform([picture for _, picture in good]))
            with torch.inference_mode(), predictor.fabric.autocast():
                outputs = learner.network(pictures)
            best = learner.confidences(outputs).cpu().topk(min(SHOWN, len(names)))
            for (path, _), values, classes in zip(good, best.values.tolist(), best.indices.tolist(), strict=True):
                best_classes = zip(classes, values, strict=True)
                yield [str(path), *(text for target, p in best_classes for text in (names[target], f"{p:.4f}"))]


class Evaluation(TypedDict):
    """images: their number; classes: those that have some; cnn, nme: as a phase has them in results.json, with its
    confusion; nme: None where the run has none."""

    images: int
    classes: list[str]
    cnn: Mapping[str, Any]
    nme: Mapping[str, Any] | None


def evaluate(learner: Learner, folder: Path | None) -> Evaluation:
    """Classify the pictures of a folder and compare with the names of their class folders.

    folder: a dataset, or a folder of class folders; None: the run's own dataset.  Folders that are no class of the
    network, and classes without a folder, are left out; an accuracy of which nothing is left is None.
    Raises UserError for a folder that is not there, or has no picture of the network's classes.
    """
    names = learner.class_names
    if folder is None:
        data = data_dir(learner.config.data_dir)
        folder = data / find_dataset(data, learner.config.dataset)
    root = folder / "test" if (folder / "test").is_dir() else folder
    if not root.is_dir():
        raise UserError(f"--data: {root} is not a folder.")
    folders = {name: root / name for name in names if (root / name).is_dir()}
    pictures = {name: sorted(filter(is_image, folder.iterdir())) for name, folder in folders.items()}
    images = [image for class_pictures in pictures.values() for image in class_pictures]
    if not images:
        raise UserError(f"--data: {root} has no pictures of {names[0]!r} or another class of this network.")
    outputs = learner.predictor.predict(learner.network, images, "evaluating")
    targets = torch.tensor([target for target, name in enumerate(names) for _ in pictures.get(name, ())])
    ends = learner.data.phase_starts[1 : learner.phase + 2]

    def metrics(scores: torch.Tensor) -> Mapping[str, Any]:
        with np.errstate(invalid="ignore"):  # classes without pictures: 0 / 0
            figures = phase_metrics(scores, targets, ends)
        per_class = dict(zip(names, figures["per_class"], strict=True))
        return _without_nan({**figures, "confusion": figures["confusion"].tolist(), "per_class": per_class})

    nme = None
    if learner.class_means is not None:
        nme = metrics(nearest_mean_scores(outputs.features, learner.class_means))
    classes = [name for name, class_pictures in pictures.items() if class_pictures]
    return {"images": len(images), "classes": classes, "cnn": metrics(outputs.logits), "nme": nme}


def _without_nan(value: Any) -> Any:
    """None in place of each accuracy over no pictures."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def in_words(figures: Evaluation, classifier: str | None = None) -> Iterator[str]:
    """The figures of `evaluate` as lines for a terminal, of "head" or "nme" or of both; then each class's accuracy, by
    that one or by the head."""
    chosen = figures["nme"] if classifier == "nme" else figures["cnn"]
    assert chosen is not None  # --classifier nme is refused where a run has none
    for name, metrics in (("CNN", figures["cnn"]), ("NME", figures["nme"])):
        if metrics is not None and (classifier is None or metrics is chosen):
            values = {key: metrics[key] for key in ("top1", "top5", "old", "new") if metrics[key] is not None}
            listed = ", ".join(f"{key} {value:.2f} %" for key, value in values.items())
            yield f"{name}: {listed}  ({figures['images']} pictures of {len(figures['classes'])} classes)"
    yield f"accuracy on each class, {'NME' if classifier == 'nme' else 'CNN'}:"
    for name in figures["classes"]:
        yield f"{chosen['per_class'][name]:7.2f} %  {name}"
