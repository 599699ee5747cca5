"""A trained network's accuracies on test pictures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.use.learner import Learner
from utils.data.images import is_image
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError
from utils.results.metrics import nearest_mean_scores, phase_metrics


def evaluate(learner: Learner, place: Path | None) -> dict[str, Any]:
    """images, classes; cnn and nme (None where the run has none) as a phase has them in results.json.

    place: a dataset, or a folder of class folders; None: the run's own dataset.  Folders that are no class of the
    network, and classes without a folder, are left out; an accuracy of which nothing is left is None.
    """
    config, names = learner.config, learner.class_names
    folder = data_dir(config.data_dir)
    root = folder / find_dataset(folder, config.dataset) if place is None else place
    root = root / "test" if (root / "test").is_dir() else root
    if not root.is_dir():
        raise UserError(f"--data: {root} is not a folder.")
    pictures = {name: _pictures(root / name) for name in names}
    images = [image for of_class in pictures.values() for image in of_class]
    if not images:
        raise UserError(f"--data: {root} has no pictures of {names[0]!r} or another class of this network.")
    outputs = learner.predictor.predict(learner.network, images, "evaluating")
    targets = torch.tensor([target for target, name in enumerate(names) for _ in pictures[name]])
    ends = learner.data.phase_starts[1 : learner.phase + 2]

    def metrics(scores: torch.Tensor) -> dict[str, Any]:
        with np.errstate(invalid="ignore"):  # classes without pictures: 0 / 0
            figures = phase_metrics(scores, targets, ends)
        figures["confusion"] = figures["confusion"].tolist()
        figures["per_class"] = dict(zip(names, figures["per_class"], strict=True))
        return _without_nan(figures)

    nme = None
    if learner.class_means is not None:
        nme = metrics(nearest_mean_scores(outputs.features, learner.class_means))
    classes = [name for name, of_class in pictures.items() if of_class]
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


def in_words(figures: dict[str, Any], classifier: Literal["head", "nme"] | None = None) -> Iterator[str]:
    """The figures of `evaluate` as lines for a terminal, of one classifier or of both; then each class's accuracy, by
    that one or by the head."""
    shown = {"head": ["cnn"], "nme": ["nme"], None: ["cnn", "nme"]}[classifier]
    for key in shown:
        name, metrics = key.upper(), figures[key]
        if metrics is None:
            continue
        parts = [f"{key} {metrics[key]:.2f} %" for key in ("top1", "top5", "old", "new") if metrics[key] is not None]
        yield f"{name}: {', '.join(parts)}  ({figures['images']} pictures of {len(figures['classes'])} classes)"
    yield f"accuracy on each class, {shown[0].upper()}:"
    for name in figures["classes"]:
        yield f"{figures[shown[0]]['per_class'][name]:7.2f} %  {name}"
