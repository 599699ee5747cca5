"""Weights in diffusers' layout -> the official checkpoint's names, for any number of levels and blocks.

diffusers stores each network in its own folder and numbers blocks within each level (`down_blocks.1.resnets.0`), where
the official checkpoint numbers them consecutively (`input_blocks.4.0`).
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ControlNet.cldm.files import ModelError, load_state_dict

NETWORKS = {
    "controlnet": "control_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
"""Folder of each network in a pipeline's folder -> what the official names begin with."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")  # the first that exists is read

_UNET_PARTS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",  # before diffusers 0.12
}  # fmt: skip
# Stored as linear layers by some releases, as 1x1 convolutions by the official checkpoint.
_POINTWISE = re.compile(r"\.(mid\.attn_1\.(q|k|v|proj_out)|[01]\.proj_(in|out))\.weight$")


def read_folder(path: Path) -> dict[str, Tensor]:
    """The tensors of a pipeline's folder (unet/, vae/, text_encoder/, controlnet/, those that it has) or of a
    ControlNet's folder, by official names.  Raises ModelError.
    """
    state: dict[str, Tensor] = {}
    if networks := [network for network in NETWORKS if (path / network).is_dir()]:
        _check_schedule(path)
        for network in networks:
            state |= to_official(network, _read_network(path / network))
        return state
    state = _read_network(path)
    if not is_controlnet(state):
        what = "name the folder that has unet/, vae/ and text_encoder/"
        raise ModelError(f"{path} holds one network, and no ControlNet: {what}")
    return to_official("controlnet", state)


def _check_schedule(folder: Path) -> None:
    """Raise ModelError for a model whose UNet does not predict noise, which its shapes do not show."""
    try:
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
    except (OSError, ValueError):
        return  # without a schedule Stable Diffusion 1.5's is assumed
    prediction = settings.get("prediction_type", "epsilon") if isinstance(settings, dict) else "epsilon"
    if prediction != "epsilon":
        raise ModelError(f"{folder} was trained for {prediction}, and this is a model that predicts noise (epsilon)")


def _read_network(folder: Path) -> dict[str, Tensor]:
    """The tensors of one network's folder: of one file, or of the shards that an index lists."""
    names = [f"{stem}.{ending}" for ending in _ENDINGS for stem in _STEMS]
    for name in names:
        if (folder / name).is_file():
            return load_state_dict(folder / name)
        stem, *variant, kind = name.split(".")
        index = folder / ".".join([stem, kind, "index", *variant, "json"])
        if index.is_file():
            return _read_shards(index)
    entries = sorted(entry.name for entry in folder.iterdir())
    content = (", ".join(entries[:5]) or "nothing") + (", ..." if len(entries) > 5 else "")
    wanted = f"neither unet/, vae/ and text_encoder/ nor {names[0]}"
    raise ModelError(f"{folder} is no folder of diffusers' layout: it has {wanted}, but {content}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} does not list the files of the weights") from error
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_state_dict(index.parent / Path(file).name)
    return state


def is_controlnet(state: Iterable[str]) -> bool:
    """Whether these are diffusers' names of a control network."""
    return any(name.startswith("controlnet_cond_embedding.") for name in state)


def to_official(network: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one network (a key of NETWORKS) by official names; unknown names are kept."""
    if network == "text_encoder":
        modules, parts = {}, {}  # transformers' own names in both
    elif network == "vae":
        modules, parts = _vae_modules(levels=_count(state, r"encoder\.down_blocks\.(\d+)"), state=state), _VAE_PARTS
    else:
        levels, n = _count(state, r"down_blocks\.(\d+)"), _count(state, r"down_blocks\.0\.resnets\.(\d+)")
        attend = {int(match[1]) for name in state if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        modules, parts = _unet_modules(levels, n, attend), _UNET_PARTS
    official = {}
    for name, tensor in state.items():
        name = NETWORKS[network] + _rename(name, modules, parts)
        if tensor.ndim == 2 and _POINTWISE.search(name):
            tensor = tensor[:, :, None, None]
        official[name] = tensor
    return official


def _rename(name: str, modules: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """Replace the longest prefix of a tensor's name that is in `modules`, and the layer in it if `parts` has it."""
    layer, _, kind = name.rpartition(".")
    words = layer.split(".")
    for end in range(len(words), 0, -1):
        module = modules.get(".".join(words[:end]))
        if module is not None:
            rest = ".".join(words[end:])
            return ".".join(filter(None, (module, parts.get(rest, rest), kind)))
    return name


def _count(state: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group matches in the names."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=0)


def unet_layers(state: Iterable[str]) -> dict[str, str]:
    """diffusers' names of the UNet's layers -> the official names, of all weights among these official names."""
    prefix, kind = NETWORKS["unet"], ".weight"
    weights = [name for name in state if name.startswith(prefix) and name.endswith(kind)]
    layers = [name.removeprefix(prefix).removesuffix(kind) for name in weights]
    levels = 1 + sum(layer.startswith("input_blocks.") and layer.endswith(".op") for layer in layers)
    n = _count(layers, r"input_blocks\.(\d+)") // levels - 1
    transformers = (re.match(r"output_blocks\.(\d+)\.1\.transformer_blocks\.", layer) for layer in layers)
    attend = {int(match[1]) // (n + 1) for match in transformers if match}
    modules = {official: theirs for theirs, official in _unet_modules(levels, n, attend).items()}
    parts = {official: theirs for theirs, official in _UNET_PARTS.items()}
    return {_rename(layer + kind, modules, parts).removesuffix(kind): prefix + layer for layer in layers}


def _unet_modules(levels: int, n: int, attend: Collection[int]) -> dict[str, str]:
    """The UNet's modules, and the ControlNet's, which has the first half of them.

    A level is n residual blocks, each perhaps with a transformer, and a down- or upsampling in all levels but the last.
    attend: the levels of the decoder that have transformers.
    """
    modules = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
        "mid_block.attentions.0": "middle_block.1", "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    }  # fmt: skip
    modules |= {f"controlnet_cond_embedding.blocks.{k}": f"input_hint_block.{2 + 2 * k}" for k in range(6)}
    modules |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(levels * (n + 1))}
    for i in range(levels):
        first = 1 + i * (n + 1)  # input block 0 is conv_in
        for j in range(n):
            modules[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{first + j}.0"
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{first + j}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + n}.0.op"

        first = i * (n + 1)
        for j in range(n + 1):
            modules[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{first + j}.0"
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{first + j}.1"
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{first + n}.{2 if i in attend else 1}.conv"
    return modules


def _vae_modules(levels: int, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The autoencoder's modules; its decoder counts the levels from the picture's side, diffusers from the latents'."""
    n = _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)")
    modules: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        modules |= {
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.mid_block.resnets.0": f"{half}.mid.block_1",
            f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1",
            f"{half}.mid_block.attentions.0.to_out.0": f"{half}.mid.attn_1.proj_out",
            f"{half}.mid_block.resnets.1": f"{half}.mid.block_2",
        }
    for i in range(levels):
        up = levels - 1 - i
        modules |= {f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for j in range(n)}
        modules |= {f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{up}.block.{j}" for j in range(n + 1)}
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    return modules
