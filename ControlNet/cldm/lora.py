"""LoRA files (Hu et al. 2021): low-rank changes of weights, merged into the UNet and the text encoder.

Layers are named as kohya's scripts do (`lora_unet_down_blocks_0_...`, also LCM-LoRA's), or as diffusers does and did
(`unet.down_blocks.0...lora_A.weight`, `...lora.down.weight`, `...processor.to_q_lora.down.weight`).
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ControlNet.cldm import diffusers_layout
from ControlNet.cldm.files import ModelError, digest, load_state_dict, read_metadata

_TEXT = diffusers_layout.NETWORKS["text_encoder"]
_TENSOR = re.compile(r"(.+?)(?:\.lora(?:_linear_layer)?\.|_lora\.|\.lora_)(down|up|mid|A|B)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_PART = {"A": "down", "B": "up"}
# Of files of the first releases, which named the text encoder's layers like the UNet's.
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}


class Lora(NamedTuple):
    """A LoRA file, and the factor of its change of the weights."""

    path: str | Path
    scale: float = 1.0


def merge(state: Mapping[str, Tensor], lora: tuple[str | Path, float]) -> dict[str, Tensor]:
    """The state (official names) with W + scale * alpha / rank * up @ down, float32, in place of the LoRA's weights W.

    lora: file and scale.  Raises ModelError where the file is no LoRA, or not one for this model.
    """
    path, scale = Path(lora[0]).expanduser(), lora[1]
    layers, names = _read(path), _names(state)
    strange = [layer for layer in layers if layer not in names]
    if strange:
        kind = "fits nothing of" if len(strange) == len(layers) else f"has {len(strange)} layers that are not in"
        raise ModelError(f"the LoRA {path} {kind} this model ({strange[0]}): is it for Stable Diffusion 1.5?")
    merged = dict(state)
    for layer, tensors in layers.items():
        name = names[layer] + ".weight"
        weight = merged[name].float()
        try:
            change = _change(tensors, weight.shape)
        except (RuntimeError, KeyError, ValueError) as error:
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in tensors.items())
            what = f"{layer} has {shapes} for a weight of {tuple(weight.shape)}"
            raise ModelError(f"the LoRA {path} does not fit this model: {what}") from error
        merged[name] = weight + scale * change
    return merged


def _change(tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """alpha / rank * up @ down, in the weight's shape.  With a `mid` (LoCon's), its kernel lies between the two."""
    up, down = (tensors[part].float().flatten(1) for part in ("up", "down"))
    rank = len(down)
    if "mid" in tensors:
        change = torch.einsum("or,rs...,si->oi...", up, tensors["mid"].float(), down)
    else:
        change = up @ down
    if change.numel() != shape.numel() or len(change) != shape[0]:
        raise ValueError("another shape")
    return float(tensors.get("alpha", rank)) / rank * change.reshape(shape)


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """Layer, as the file names it -> its tensors: down, up, perhaps mid and alpha."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_state_dict(path).items():
        if tensor_name := _TENSOR.fullmatch(name):
            layer, part = tensor_name[1], _PART.get(tensor_name[2], tensor_name[2])
        elif alpha := _ALPHA.fullmatch(name):
            layer, part = alpha[1], "alpha"
        else:
            kind = next((kind for word, kind in _OTHER_KINDS.items() if word in name), None)
            what = f"is a {kind}, and only plain LoRA is supported" if kind else f"is no LoRA: it holds {name}"
            raise ModelError(f"{path} {what}")
        layers.setdefault(_plain(layer), {})[part] = tensor
    for layer, value in (_alphas_of_peft(path, layers) | _alphas_of_diffusers(path, layers)).items():
        layers[layer].setdefault("alpha", torch.tensor(value))
    return layers


def lora_digest(path: str | Path) -> str:
    """16 hex digits of a LoRA's file, and ".", and 8 of the adapter_config.json beside it where that counts."""
    file = _adapter_config(Path(path).expanduser())
    return digest(path, "LoRA") + (f".{digest(file, 'config')[:8]}" if file else "")


def _adapter_config(path: Path) -> Path | None:
    """The adapter_config.json that peft writes beside its adapter_model.safetensors; None for other files."""
    file = path.parent / "adapter_config.json"
    return file if path.stem == "adapter_model" and file.is_file() else None


def _alphas_of_peft(path: Path, layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The alphas of layers by the adapter_config.json that peft writes beside its weights; none without that file.

    alpha_pattern has a layer's own; with use_rslora the change is scaled by alpha / sqrt(rank).
    """
    file, alphas = _adapter_config(path), dict[str, float]()
    if file is None:
        return alphas
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        patterns = {pattern: float(value) for pattern, value in dict(config.get("alpha_pattern") or {}).items()}
        for layer, tensors in layers.items():
            rank = len(tensors["down"]) if "down" in tensors else 1
            own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = float(next(own, config.get("lora_alpha", 8)))
            alphas[layer] = alpha * rank**0.5 if config.get("use_rslora") else alpha
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ModelError(f"can't read {file}, which says how strong the LoRA is: {error}") from error
    return alphas


def _alphas_of_diffusers(path: Path, layers: Iterable[str]) -> dict[str, float]:
    """The alphas of layers by the head of diffusers' files, where it has them by network."""
    settings = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    alphas = {layer: settings.get(f"{layer.partition('.')[0]}.lora_alpha") for layer in layers}
    return {layer: float(alpha) for layer, alpha in alphas.items() if alpha is not None}


def _plain(layer: str) -> str:
    """One name of a layer where releases of diffusers had several."""
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    if layer.startswith("text_encoder."):
        head, _, last = layer.rpartition(".")
        return f"{head}.{_TEXT_ATTENTION.get(last, last)}"
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name that LoRA files have for a layer -> the official one, without ".weight"."""
    names: dict[str, str] = {}
    for theirs, official in diffusers_layout.unet_layers(state).items():
        bare = official.removeprefix(diffusers_layout.NETWORKS["unet"])
        kohya = [f"lora_unet_{name.replace('.', '_')}" for name in (theirs, bare)]
        names |= dict.fromkeys((theirs, f"unet.{theirs}", *kohya), official)
    for weight in state:
        if weight.startswith(_TEXT) and weight.endswith(".weight"):
            official = weight.removesuffix(".weight")
            bare = official.removeprefix(_TEXT).removeprefix("text_model.")
            kohya = [f"{prefix}_text_model_{bare.replace('.', '_')}" for prefix in ("lora_te", "lora_te1")]
            names |= dict.fromkeys((f"text_encoder.{bare}", f"text_encoder.text_model.{bare}", *kohya), official)
    return names
