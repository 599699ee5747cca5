"""Weights as people have them -> the official checkpoint's names, and a fingerprint of them."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ControlNet.cldm.files import ModelError, load_state_dict

MODELS_FOLDER = Path(__file__).parent.parent / "models"
BUNDLED = {
    "sd15": ("cldm_v15.yaml", "control_sd15_canny.pth"),
    "tiny": ("cldm_tiny.yaml", "cldm_tiny.safetensors"),
}
"""Short names: config and weights in ControlNet/models."""

CONTROL = "control_model."
# What base checkpoints carry beside the networks, none of which a picture depends on.
HARMLESS = (
    "model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "cond_stage_model.logit_scale",
    "cond_stage_model.transformer.text_projection.", "lvlb_weights",
)  # fmt: skip
FINGERPRINT_VALUES = 24  # of each tensor


@dataclass(frozen=True)
class Weights:
    """Tensors by official names, the config of the model that they are for, and what to call them in a message."""

    state: dict[str, Tensor]
    config: Path
    name: str


def find_weights(spec: str | os.PathLike, base: str | os.PathLike | None = None) -> Weights:
    """The weights that `ControlNet.cldm.model.load_model` was asked for.  Raises ModelError."""
    path, config = _locate(spec)
    state = _read(path)
    name = str(path)
    if base is not None:
        base_path, base_config = _locate(base)
        control = {name: tensor for name, tensor in state.items() if name.startswith(CONTROL)}
        if not control:
            raise ModelError(f"{path} holds no ControlNet (no {CONTROL}...): it may be what belongs into --base")
        rest = {name: tensor for name, tensor in _read(base_path).items() if not name.startswith(CONTROL)}
        state, config, name = control | rest, config or base_config, f"{path} with base {base_path}"
    state = {name: tensor for name, tensor in state.items() if not name.startswith(HARMLESS)}
    return Weights(state, config or MODELS_FOLDER / BUNDLED["sd15"][0], name)


def _locate(spec: str | os.PathLike) -> tuple[Path, Path | None]:
    """(weights, config or None) of a short name or a path."""
    if str(spec) in BUNDLED:
        config, weights = (MODELS_FOLDER / name for name in BUNDLED[str(spec)])
        return weights, config
    path = Path(spec)
    beside = path.with_suffix(".yaml")
    return path, beside if beside.is_file() else None


def _read(path: Path) -> dict[str, Tensor]:
    return load_state_dict(path)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hex digits that tell these weights from others.  state: tensors by official names.

    A digest of every tensor's name and shape and of a few dozen evenly spaced values of it, rounded to float16: the
    same for a float32 and a float16 file of the same weights, in any layout (bfloat16 rounds away more and differs).
    The schedule's tables and position_ids, which some files leave out, don't count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_bare(name), tensor) for name, tensor in state.items()):
        if "." not in name or name.endswith("position_ids"):
            continue
        values = tensor.detach().flatten()
        where = torch.arange(min(FINGERPRINT_VALUES, len(values))) * len(values) // FINGERPRINT_VALUES
        if len(values) <= FINGERPRINT_VALUES:
            where = torch.arange(len(values))
        picked = values[where.to(values.device)].to("cpu", torch.float16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def complete(weights: Weights, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model with state `model_state`, taken from weights; raises ModelError unless they fit.

    The schedule's tables may be missing, or of a lower precision than the config gives them: then they are the model's
    own.
    """
    state = dict(weights.state)
    for name, tensor in model_state.items():
        if "." not in name and (name not in state or state[name].dtype not in (torch.float32, torch.float64)):
            state[name] = tensor
    _check_names(weights, state, {name: tensor.shape for name, tensor in model_state.items()})
    return state


def _bare(name: str) -> str:
    """A name as all releases of transformers have it: some put `text_model.` before the text encoder's."""
    return name.replace(".transformer.text_model.", ".transformer.")


def _check_names(weights: Weights, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise ModelError, with the first names that differ, unless the checkpoint fits the model."""
    counted = "embeddings.position_ids"  # some releases of transformers leave it out
    bare = {_bare(name): name for name in state}
    wanted = {_bare(name): name for name in expected}
    missing = [wanted[name] for name in wanted if name not in bare and not name.endswith(counted)]
    unexpected = [bare[name] for name in bare if name not in wanted and not name.endswith(counted)]
    misshapen = [
        f"{bare[name]} {tuple(state[bare[name]].shape)} instead of {tuple(expected[wanted[name]])}"
        for name in bare
        if name in wanted and state[bare[name]].shape != expected[wanted[name]]
    ]
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ModelError(f"{weights.name} does not fit this model: {'; '.join(problems)}")


def _first(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
