"""The cache of trained phase-0 networks: runs that agree on all that one depends on share it."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.training import checkpoint
from models.training.method import Method
from models.training.run import Run
from utils.devices import by_first
from utils.files import content_digest
from utils.results.records import Training

log = logging.getLogger(__name__)


def load(run: Run, method: Method, path: Path) -> Training | None:
    """Load the network of phase 0 where it has been trained already, and return the record of its training.

    path: `path_of`.  `reused` is false where this very run trained it before it was killed.
    """
    if not run.fabric.broadcast(path.is_file()):  # another job may write the file at this moment
        return None
    state = checkpoint.load(path, checkpoint.PHASE_0)
    with checkpoint.fitting(path):
        for module, weights in zip(method.network.first_phase_modules(), state["network"], strict=True):
            module.load_state_dict(weights)
        training = Training.model_validate(state["training"])
        training.reused = state.get("run") != str(run.folder.absolute())
    log.info("phase 0 is not trained again: its network is taken from %s", path)
    return training


def save(run: Run, method: Method, training: Training, path: Path) -> None:
    """Keep the trained network of phase 0 for other runs.  path: `path_of`, before the training."""
    if run.fabric.is_global_zero:
        weights = [module.state_dict() for module in method.network.first_phase_modules()]
        checkpoint.save(path, {"network": weights, "training": training.to_json(), "run": str(run.folder.absolute())})
    run.fabric.barrier()


def path_of(run: Run, method: Method) -> Path:
    """Named after everything that the trained network of phase 0 depends on.

    To be called by all processes before the training, while the network has its initial weights.  The first one lists
    the files, which takes a while.
    """
    return by_first(run.fabric, lambda: run.cache / f"{_name_of_network(run, method)}.pt")


def _name_of_network(run: Run, method: Method) -> str:
    config, data, paths = run.config, run.data, run.data.paths
    backbone, head = method.network.first_phase_modules()
    settings: dict[str, Any] = {
        "method": "any" if method.plain_phase_0 else config.model_name,
        "method_keys": [getattr(method.settings, key) for key in method.phase_0_keys],
        "layers": [str(layer) for layer in backbone.children()],
        "head": [list(parameter.shape) for parameter in head.parameters()],
        "transform": str(run.train_transform(method.augmentation)),
        "normalise": str(data.defaults.normalise),
        "classes": [data.class_names[target] for target in data.phase_targets(0)],
        "schedule": list(method.schedule()),
        "processes": run.fabric.world_size,
    }
    keys = ["dataset", "model_seed", "batch_size", "accumulate_batches", "momentum", "precision"]
    for key in [*keys, "convnet_type", "compile", "freeze_backbone", "backbone_lrate"]:
        settings[key] = getattr(config, key)
    if config.freeze_backbone:  # whether its batch norm's statistics follow the pictures all the same
        settings["frozen_in_eval"] = method.network.frozen_in_eval
    if config.pretrained:
        settings["weights"] = _digest(backbone)
    images = [item.image for item in data.new_items(0)]
    copies: Iterable[Path] = ()
    if config.augmentation_prob > 0 and config.augmentation_scope == "all":
        settings["copies"] = [config.augmentation_prob, config.augmentations_per_image]
        copies = (paths.copy(image, k) for image in images for k in range(config.augmentations_per_image))
    return fingerprint(settings, itertools.chain(images, copies), paths.root)


def fingerprint(settings: Mapping[str, Any], files: Iterable[Path], root: Path) -> str:
    """Of settings, and of files by name, size, time of modification, and the content of a few of each folder.

    Each folder is listed once.  Files that are not there count as such: copies may be missing where they are drawn with
    probability 0.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for folder, group in itertools.groupby(files, key=lambda file: file.parent):
        folder_files, stamps = list(group), _stamps(folder)
        digest.update(os.fsencode(f"{folder.relative_to(root).as_posix()}\0{content_digest(folder_files)}\0"))
        for file in folder_files:
            digest.update(os.fsencode(f"{file.name}\0{stamps.get(file.name, -1)}\0"))
    return digest.hexdigest()[:24]


def _stamps(folder: Path) -> dict[str, str]:
    """Size and time of modification of the files in a folder, by name."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        stats = ((entry.name, entry.stat()) for entry in entries if entry.is_file())
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats}


def _digest(backbone: nn.Module) -> str:
    """Of a backbone's weights, whichever file they come from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
