"""Find weights, rename them to the official checkpoint's names, check them against a model, and fingerprint them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from ControlNet.cldm import diffusers_layout
from ControlNet.cldm.files import ModelError, load_state_dict

MODELS_FOLDER = Path(__file__).parent.parent / "models"
BUNDLED = {
    "sd15": ("cldm_v15.yaml", "control_sd15_canny.pth"),
    "tiny": ("cldm_tiny.yaml", "cldm_tiny.safetensors"),
}
"""Short names: config and weights in ControlNet/models."""

CONTROL = diffusers_layout.NETWORKS["controlnet"]
UNET = diffusers_layout.NETWORKS["unet"]
# Tensors of base checkpoints that pictures do not depend on.
HARMLESS = (
    "model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection", "cond_stage_model.transformer.text_projection.", "embedding_manager.",
    "lvlb_weights",
)  # fmt: skip
_OTHER_WEIGHTS = {
    ".absmax": "quantised by bitsandbytes (NF4 or 8 bits)",
    "control_add_embedding.": "a ControlNet-Union or ControlNet++ model",
    "task_embedding": "a ControlNet-Union or ControlNet++ model",
}
"""Parts of tensors' names -> what weights have them."""
FINGERPRINT_VALUES = 24  # of each tensor
_NETWORK: dict[str, float] = {"num_heads": -1, "num_head_channels": -1}
CONFIG_VALUES: Mapping[str, Mapping[str, float]] = {
    "": {
        "timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.18215,
        "only_mid_control": False,
    },
    "control_stage_config": _NETWORK,
    "unet_config": _NETWORK,
    "cond_stage_config": {"num_attention_heads": 12},
}  # fmt: skip
"""Parameters of a model's config that pictures depend on and that no tensor's shape tells, with their defaults: the
model's own (""), and those of its networks."""


@dataclass(frozen=True)
class Weights:
    """state: tensors by official names; config: of their model; name: for messages."""

    state: dict[str, Tensor]
    config: Path
    name: str


def find_weights(spec: str | os.PathLike, base: str | os.PathLike | None = None) -> Weights:
    """The weights of `ControlNet.cldm.model.load_model(spec, base=base)`.  Raises ModelError."""
    path, config = _locate(spec)
    state, name = _read(path), str(path)
    if base is not None:
        base_path, base_config = _locate(base)
        control = {name: tensor for name, tensor in state.items() if name.startswith(CONTROL)}
        rest = {name: tensor for name, tensor in _read(base_path).items() if not name.startswith(CONTROL)}
        if not control:
            what = _other_control(state) or "it looks like the base of one"
            raise ModelError(f"{path} holds no ControlNet ({_first(sorted(state))}): {what}")
        if not any(name.startswith(UNET) for name in rest):
            raise ModelError(
                f"the base {base_path} holds no Stable Diffusion ({_first(sorted(rest)) or 'only a ControlNet'})"
            )
        state, name = control | rest, f"{path} with base {base_path}"
        config = config or base_config
    state = {name: tensor for name, tensor in state.items() if not name.startswith(HARMLESS)}
    return Weights(state, config or MODELS_FOLDER / BUNDLED["sd15"][0], name)


def _locate(spec: str | os.PathLike) -> tuple[Path, Path | None]:
    """(file or folder, config or None) of a short name or a path.  Raises ModelError where it does not exist."""
    if str(spec) in BUNDLED:
        config, weights = (MODELS_FOLDER / name for name in BUNDLED[str(spec)])
        if not weights.exists():
            raise ModelError(f"no checkpoint at {weights}: --download fetches it (5.7 GB), or put it there")
        return weights, config
    path = Path(spec).expanduser()
    if not path.exists():
        raise ModelError(f"no checkpoint at {path}: name a file, a diffusers folder, or one of {', '.join(BUNDLED)}")
    config = path / "model.yaml" if path.is_dir() else path.with_suffix(".yaml")
    # Ignore a config of Stable Diffusion alone, which web UIs put beside base checkpoints.
    described = config.is_file() and b"control_stage_config" in config.read_bytes()
    return path, config if described else None


def _read(path: Path) -> dict[str, Tensor]:
    """Official name -> tensor, of all networks in the file or folder."""
    if path.is_dir():
        return diffusers_layout.read_folder(path)
    state = load_state_dict(path)
    if state and all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "difference" in state:
        raise ModelError(
            f"{path} holds what a ControlNet adds to its base model, not the ControlNet: take the plain file"
        )
    if diffusers_layout.is_controlnet(state):
        return diffusers_layout.to_official("controlnet", state)
    if "input_hint_block.0.weight" in state:  # a control network whose prefix was taken off
        return {CONTROL + name: tensor for name, tensor in state.items()}
    return state


def trained_hint(spec: str | os.PathLike) -> str | None:
    """What the control network of weights was trained on: "edges" or "thumb@SIDE"; None where they don't say.

    Files of ControlNet/train.py say it, and the bundled names are of edge maps.
    """
    if str(spec) in BUNDLED:
        return "edges"
    path = Path(spec).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("hint")
    except (OSError, SafetensorError):  # what loads the weights names it
        return None


def fingerprint(weights: Weights) -> str:
    """What identifies a model: 16 hex digits of its weights, ".", and 8 of its config.

    The first are a digest of each tensor's name, its shape and a few dozen evenly spaced values rounded to float16.
    They are the same for float32 and float16 files of the same weights in any layout (bfloat16 files differ), and only
    a small part of a memory-mapped file is read.  The schedule's tables and position_ids, which some files leave out,
    are not included.  The last are a digest of CONFIG_VALUES.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_bare(name), tensor) for name, tensor in weights.state.items()):
        if "." not in name or name.endswith("position_ids"):
            continue
        values = tensor.detach().flatten()
        step = max(1, len(values) // FINGERPRINT_VALUES)
        picked = values[::step].to("cpu", torch.float16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + picked.numpy().tobytes())
    return f"{digest.hexdigest()[:16]}.{_config_digest(weights.config)}"


def _config_digest(config: Path) -> str:
    """8 hex digits of the values of CONFIG_VALUES in a model's config.  Raises ModelError where it can't be read."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
        model, values = content["model"]["params"], dict[str, float]()
        for network, defaults in CONFIG_VALUES.items():
            params = (model[network].get("params") or {}) if network else model
            values |= {f"{network}.{name}": float(params.get(name, value)) for name, value in defaults.items()}
    except (OSError, OmegaConfBaseException, YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"can't read the model config {config}: {type(error).__name__} {error}") from error
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def complete(weights: Weights, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model with state `model_state`, taken from weights; raises ModelError unless they fit.

    The schedule's tables may be missing, or rounded as in float16 files: then they are the model's own.
    """
    state = dict(weights.state)
    for name, tensor in model_state.items():
        if "." not in name and (name not in state or state[name].dtype not in (torch.float32, torch.float64)):
            state[name] = tensor
    _check(weights, state, {name: tensor.shape for name, tensor in model_state.items()})
    return state


def _bare(name: str) -> str:
    """The name without `text_model.`, which only some releases of transformers put before the text encoder's names."""
    return name.replace(".transformer.text_model.", ".transformer.")


def _check(weights: Weights, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise ModelError, with the likely reason and the first names that differ, unless the weights fit the model."""
    counted = "embeddings.position_ids"  # some releases of transformers leave it out
    bare = {_bare(name): name for name in state if not name.endswith(counted)}
    wanted = {_bare(name): name for name in expected if not name.endswith(counted)}
    missing = [name for key, name in wanted.items() if key not in bare]
    unexpected = [name for key, name in bare.items() if key not in wanted]
    misshapen = [name for key, name in bare.items() if key in wanted and state[name].shape != expected[wanted[key]]]
    if not (missing or unexpected or misshapen):
        return
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[wanted[_bare(name)]])}" for name in misshapen
    ]
    problems = [
        f"{len(names):,} {what} ({_first(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if names
    ]
    reason = _likely_reason(state, misshapen) or f"its config is {weights.config}"
    raise ModelError(f"{weights.name} does not fit this model: {reason}\n  {'; '.join(problems)}")


def _likely_reason(state: Mapping[str, Tensor], misshapen: Sequence[str]) -> str | None:
    """What these weights seem to be, in words; None where they resemble nothing known."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in state)

    for part, what in _OTHER_WEIGHTS.items():
        if any(part in name for name in state):
            return f"it is {what}, which is not supported: take plain weights for Stable Diffusion 1.5"
    other = _other_control(state)
    if other and not has(UNET):
        return other
    if any(part in name for name in state for part in ("lora_", ".lora.", "hada_w", "lokr_")):
        return "it is a LoRA, which changes a model and is none: name a model, and this with --lora"
    if has("conditioner.", CONTROL + "label_emb", UNET + "label_emb") or any(".add_embedding." in n for n in state):
        return "it is of Stable Diffusion XL, and this is a model of Stable Diffusion 1.5"
    if has(*(prefix + blocks for prefix in ("", UNET) for blocks in ("joint_blocks.", "double_blocks."))):
        return "it is a transformer (Stable Diffusion 3, Flux, ...), and this is a model of Stable Diffusion 1.5"
    for part, network in ((UNET, "UNet"), (CONTROL, "ControlNet")):
        wide = {state[n].shape[-1] for n in misshapen if n.startswith(part) and n.endswith("attn2.to_k.weight")}
        for width, version in ((1024, "2.x"), (2048, "XL")):
            if width in wide:
                return (
                    f"its {network} is of Stable Diffusion {version} (texts {width} wide), and this is a model of 1.5"
                )
        first = part + "input_blocks.0.0.weight"
        if first in misshapen and state[first].ndim == 4 and state[first].shape[1] in (8, 9):
            channels = state[first].shape[1]
            what = {8: "an InstructPix2Pix", 9: "an inpainting"}[channels]
            return f"it is {what} model ({channels} input channels instead of 4): take the plain Stable Diffusion 1.5"
    if has("cond_stage_model.model."):
        return "its text encoder is Stable Diffusion 2.x's, and this is a model of Stable Diffusion 1.5"
    if has(UNET) and not has(CONTROL):
        return "it is a base model without control: name a ControlNet as the model, and this as its base (--base)"
    if has(CONTROL) and not has(UNET):
        return "it is a ControlNet alone: name a Stable Diffusion 1.5 checkpoint as its base, too (--base)"
    for network, what in (("vae", "autoencoder"), ("text_encoder", "text encoder")):
        if has(UNET) and not has(diffusers_layout.NETWORKS[network]):
            return f"it lacks the {what}: take a whole checkpoint, not a part of one"
    if not has(*diffusers_layout.NETWORKS.values()):
        return "it holds nothing of a Stable Diffusion checkpoint"
    return None


def _other_control(state: Iterable[str]) -> str | None:
    """What these weights are, if they are another kind of control than a ControlNet."""
    names = list(state)
    if "lora_controlnet" in names:
        return "it is a Control-LoRA, which is not supported: use a full ControlNet for Stable Diffusion 1.5"
    if any(name.startswith(("adapter.", "body.0.", "conv_in.")) for name in names) and not any(
        name.startswith(("down_blocks.", "encoder.", "decoder.")) for name in names
    ):
        return "it is a T2I-Adapter, which is not supported: use a ControlNet for Stable Diffusion 1.5"
    return None


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
