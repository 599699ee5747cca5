"""A trained network's accuracies on test pictures."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from models.use.learner import Learner
from utils.data.images import is_image
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError
from utils.results.metrics import nearest_mean_scores, phase_metrics


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
    config, names = learner.config, learner.class_names
    data = data_dir(config.data_dir)
    root = data / find_dataset(data, config.dataset) if folder is None else folder
    root = root / "test" if (root / "test").is_dir() else root
    if not root.is_dir():
        raise UserError(f"--data: {root} is not a folder.")
    pictures = {name: _pictures(root / name) for name in names}
    images = [image for class_pictures in pictures.values() for image in class_pictures]
    if not images:
        raise UserError(f"--data: {root} has no pictures of {names[0]!r} or another class of this network.")
    outputs = learner.predictor.predict(learner.network, images, "evaluating")
    targets = torch.tensor([target for target, name in enumerate(names) for _ in pictures[name]])
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


def _pictures(folder: Path) -> list[Path]:
    return sorted(filter(is_image, folder.iterdir())) if folder.is_dir() else []


def _without_nan(value: Any) -> Any:
    """None in place of each accuracy over no pictures."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def in_words(figures: Evaluation, classifier: Literal["head", "nme"] | None = None) -> Iterator[str]:
    """The figures of `evaluate` as lines for a terminal, of one classifier or of both; then each class's accuracy, by
    that one or by the head."""
    chosen = figures["nme"] if classifier == "nme" else figures["cnn"]
    for name, metrics in (("CNN", figures["cnn"]), ("NME", figures["nme"])):
        if metrics is None or (classifier and metrics is not chosen):
            continue
        parts = [f"{key} {metrics[key]:.2f} %" for key in ("top1", "top5", "old", "new") if metrics[key] is not None]
        yield f"{name}: {', '.join(parts)}  ({figures['images']} pictures of {len(figures['classes'])} classes)"
    assert chosen is not None  # --classifier nme is refused where a run has none
    yield f"accuracy on each class, {'NME' if classifier == 'nme' else 'CNN'}:"
    for name in figures["classes"]:
        yield f"{chosen['per_class'][name]:7.2f} %  {name}"
