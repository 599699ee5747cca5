"""The cache of trained phase-0 networks: runs that agree on all that one depends on share it."""

import hashlib
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.training import checkpoint
from models.training.checkpoint import TrainingRecord
from models.training.method import Method
from models.training.run import Run

log = logging.getLogger(__name__)


def load(run: Run, method: Method, path: Path) -> TrainingRecord | None:
    """Load the network of phase 0 where it has been trained already.  path: `path_of`.

    Returns what `Trainer.train` does; `reused` is false where this very run trained it before it was killed.
    """
    if not run.fabric.broadcast(path.is_file()):  # another job may write the file at this moment
        return None
    state = checkpoint.load(path, checkpoint.PHASE_0)
    with checkpoint.fitting(path):
        for module, weights in zip(method.network.first_phase_modules(), state["network"], strict=True):
            module.load_state_dict(weights)
        training: TrainingRecord = state["training"]
        training["reused"] = state.get("run") != _name(run)
    log.info("phase 0 is not trained again: its network is taken from %s", path)
    return training


def save(run: Run, method: Method, training: TrainingRecord, path: Path) -> None:
    """Keep the trained network of phase 0 for other runs.  path: `path_of`, before the training."""
    if run.fabric.is_global_zero:
        weights = [module.state_dict() for module in method.network.first_phase_modules()]
        checkpoint.save(path, {"network": weights, "training": training, "run": _name(run)})
    run.fabric.barrier()


def path_of(run: Run, method: Method) -> Path:
    """Named after everything that the trained network of phase 0 depends on.

    To be called by all processes before the training, while the network has its initial weights.
    """
    # Found by one process for all: listing the data takes a while.
    path = run.fabric.broadcast(_path(run, method) if run.fabric.is_global_zero else None)
    assert path is not None
    return path


def _path(run: Run, method: Method) -> Path:
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
    for key in ("dataset", "model_seed", "batch_size", "accumulate_batches", "momentum", "precision"):
        settings[key] = getattr(config, key)
    for key in ("convnet_type", "compile", "freeze_backbone", "backbone_lrate"):
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
    return run.cache / f"{checkpoint.fingerprint(settings, itertools.chain(images, copies), paths.root)}.pt"


def _digest(backbone: nn.Module) -> str:
    """Of a backbone's weights, whichever file they come from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(run: Run) -> str:
    return str(run.folder.absolute())
