"""The cache of trained phase-0 networks: runs that agree on all that one depends on share it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import checkpoint

if TYPE_CHECKING:
    from models.base import Learner

log = logging.getLogger(__name__)


def load(learner: "Learner") -> dict[str, Any] | None:
    """Load the network of phase 0 where it has been trained already.

    Returns what `Learner.train` does; `reused` is false where this very run trained it before it was killed.
    """
    path = path_of(learner)
    if not learner.fabric.broadcast(path.is_file()):  # decided once: another job may write it at this moment
        return None
    state = checkpoint.load(path)
    for module, weights in zip(learner.network.first_phase_modules(), state["network"], strict=True):
        module.load_state_dict(weights)
    log.info("phase 0 is not trained again: its network is taken from %s", path)
    return {**state["training"], "reused": state.get("run") != _run(learner)}


def save(learner: "Learner", training: dict[str, Any]) -> None:
    """Keep the trained network of phase 0 for other runs."""
    if learner.fabric.is_global_zero:
        weights = [module.state_dict() for module in learner.network.first_phase_modules()]
        state = {"network": weights, "training": training, "run": _run(learner)}
        checkpoint.save(path_of(learner), state)
    learner.fabric.barrier()


def path_of(learner: "Learner") -> Path:
    """Named after everything that the trained network of phase 0 depends on."""
    config, data, paths = learner.config, learner.data, learner.data.paths
    backbone, head = learner.network.first_phase_modules()
    settings: dict[str, Any] = {
        "method": "any" if learner.plain_phase_0 else config.model_name,
        "method_keys": [getattr(config, key) for key in learner.phase_0_keys],
        "layers": [str(layer) for layer in backbone.children()],
        "head": [list(parameter.shape) for parameter in head.parameters()],
        "transform": str(data.train_transform),
        "classes": [data.class_names[target] for target in data.phase_targets(0)],
        "schedule": list(learner.schedule()),
        "processes": learner.fabric.world_size,
    }
    for key in ("dataset", "model_seed", "batch_size", "accumulate_batches", "momentum", "precision", "pretrained"):
        settings[key] = getattr(config, key)
    settings["compile"] = config.compile
    files = [item.image for item in data.new_items(0)]
    if config.augmentation_prob > 0 and config.augmentation_scope == "all":
        settings["copies"] = [config.augmentation_prob, config.augmentations_per_image]
        files += [paths.copy(image, k) for image in files for k in range(config.augmentations_per_image)]
    return learner.cache / f"{checkpoint.fingerprint(settings, files, paths.root)}.pt"


def _run(learner: "Learner") -> str:
    return str(learner.folder.absolute())
