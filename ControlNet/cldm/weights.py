"""Find weights, with the official checkpoint's names, check them against a model, and fingerprint them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from ControlNet.cldm import diffusers_layout
from ControlNet.cldm.files import ModelError, broke_off, load_state_dict, read_metadata

MODELS_FOLDER = Path(__file__).parent.parent / "models"
BUNDLED = {
    "sd15": ("cldm_v15.yaml", "control_sd15_canny.pth"),
    "tiny": ("cldm_tiny.yaml", "cldm_tiny.safetensors"),
}
"""Short names: config and weights in ControlNet/models."""
OFFICIAL_REPOSITORY, OFFICIAL_FILE = "lllyasviel/ControlNet", "models/control_sd15_canny.pth"

CONTROL = diffusers_layout.NETWORKS["controlnet"]
UNET = diffusers_layout.NETWORKS["unet"]
# Tensors of base checkpoints that pictures do not depend on.
HARMLESS = (
    "model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection", "cond_stage_model.transformer.text_projection.", "embedding_manager.",
    "lvlb_weights",
)  # fmt: skip
_FOR_1_5 = "and this is a model of Stable Diffusion 1.5"
_OTHER_KINDS = {
    r"\.absmax": "it is quantised by bitsandbytes (NF4 or 8 bits), which is not supported: take plain weights",
    r"control_add_embedding\.|task_embedding":
        "it is a ControlNet-Union or ControlNet++ model, which is not supported: take a plain ControlNet",
    r"^lora_controlnet$": "it is a Control-LoRA, which is not supported: take a full ControlNet",
    r"^(adapter|body\.0)\.": "it is a T2I-Adapter, which is not supported: take a ControlNet",
    r"lora_|\.lora\.|hada_w|lokr_": "it is a LoRA, which changes a model: name a model, and this with --lora",
    rf"^conditioner\.|^({CONTROL}|{UNET})label_emb|\.add_embedding\.": f"it is of Stable Diffusion XL, {_FOR_1_5}",
    rf"^({UNET})?(joint|double)_blocks\.": f"it is a transformer (Stable Diffusion 3, Flux, ...), {_FOR_1_5}",
    r"^cond_stage_model\.model\.": f"its text encoder is Stable Diffusion 2.x's, {_FOR_1_5}",
}  # fmt: skip
"""Patterns of tensors' names -> what weights with such a tensor are."""
FINGERPRINT_VALUES = 24  # of each tensor
CONFIG_VALUES = {
    ".timesteps": 1000, ".linear_start": 0.00085, ".linear_end": 0.012, ".scale_factor": 0.18215,
    ".only_mid_control": False, "control_stage_config.num_heads": -1, "control_stage_config.num_head_channels": -1,
    "unet_config.num_heads": -1, "unet_config.num_head_channels": -1, "cond_stage_config.num_attention_heads": 12,
}  # fmt: skip
"""Parameters of a model's config that pictures depend on and that no tensor's shape tells -> defaults.  The model's own
begin with a dot, others with the network's name."""


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
            what = _likely_reason(state) or "it looks like the base of one"
            raise ModelError(f"{path} holds no ControlNet ({_first(sorted(state))}): {what}")
        if not any(name.startswith(UNET) for name in rest):
            content = _first(sorted(rest)) or "only a ControlNet"
            raise ModelError(f"the base {base_path} holds no Stable Diffusion ({content})")
        state, name = control | rest, f"{path} with base {base_path}"
        config = config or base_config
    state = {name: tensor for name, tensor in state.items() if not name.startswith(HARMLESS)}
    return Weights(state, config or MODELS_FOLDER / BUNDLED["sd15"][0], name)


def _locate(spec: str | os.PathLike) -> tuple[Path, Path | None]:
    """The file or folder of a short name or a path, and its config, None for Stable Diffusion 1.5's."""
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
        what = "holds what a ControlNet adds to its base model, not the ControlNet: take the plain file"
        raise ModelError(f"{path} {what}")
    if diffusers_layout.is_controlnet(state):
        return diffusers_layout.to_official("controlnet", state)
    if "input_hint_block.0.weight" in state:  # a control network whose prefix was taken off
        return {CONTROL + name: tensor for name, tensor in state.items()}
    return state


def download_sd15(folder: Path = MODELS_FOLDER, endpoint: str | None = None) -> Path:
    """The official control_sd15_canny.pth (5.7 GB) in `folder`, fetched from the Hugging Face hub unless it is there.

    A connection that breaks is taken up again, and a later call begins anew; the file gets its name when its SHA-256
    is the hub's.  endpoint: the hub's address, None for HF_ENDPOINT or the usual one.
    Raises ModelError: no connection, no space, or other contents than the hub promised.
    """
    # here, because no other run of the program has to do with the hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    path = folder / BUNDLED["sd15"][1]
    if path.is_file() and not broke_off(path):
        return path
    url, unfinished = hf_hub_url(OFFICIAL_REPOSITORY, OFFICIAL_FILE, endpoint=endpoint), folder / "download"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = get_hf_file_metadata(url).etag
        fetched = Path(hf_hub_download(OFFICIAL_REPOSITORY, OFFICIAL_FILE, local_dir=unfinished, endpoint=endpoint))
        with fetched.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ModelError(f"what came from {url} is not the official file: start the download again")
        os.replace(fetched, path)
    except ModelError:
        raise
    except Exception as error:  # whatever the hub's HTTP library of the day raises
        if isinstance(error, OSError) and error.errno is not None:
            raise ModelError(f"can't save {path}: {error.strerror}") from error
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"can't fetch {url} ({why[0]}): start it again, or, on a machine without network, copy the file to {folder}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def trained_hint(spec: str | os.PathLike) -> str | None:
    """What the control network of weights was trained on: "edges" or "thumb@SIDE"; None where they don't say.

    Files of ControlNet/train.py say it, and the bundled names are of edge maps.
    """
    return "edges" if str(spec) in BUNDLED else read_metadata(Path(spec).expanduser()).get("hint")


def fingerprint(weights: Weights) -> str:
    """What identifies a model: 16 hex digits of its weights, ".", and 8 of its config.

    The first are a digest of each tensor's name, its shape and a few dozen evenly spaced values rounded to float16.
    They are the same for float32 and float16 files of the same weights in any layout (bfloat16 files differ), and only
    a small part of a memory-mapped file is read.  The schedule's tables and position_ids, which some files leave out,
    are not included.  The last are a digest of CONFIG_VALUES.  Raises ModelError for a config that can't be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_bare(name), tensor) for name, tensor in weights.state.items()):
        if "." not in name or name.endswith("position_ids"):
            continue
        values = tensor.detach().flatten()
        step = max(1, len(values) // FINGERPRINT_VALUES)
        picked = values[::step].to("cpu", torch.float16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + picked.numpy().tobytes())
    config, settings = read_config(weights.config), dict[str, float]()
    try:
        params = config["model"]["params"]
        for key, default in CONFIG_VALUES.items():
            network, name = key.split(".")
            source = (params[network].get("params") or {}) if network else params
            settings[key] = float(source.get(name, default))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ModelError(f"can't read the model config {weights.config}: {reason}") from error
    config_digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{digest.hexdigest()[:16]}.{config_digest[:8]}"


def read_config(config: str | os.PathLike | DictConfig | Mapping) -> dict[str, Any]:
    """A model's config, a .yaml path or its content, with ${key} resolved.  Raises ModelError."""
    content: Any = config
    name = "the model config"
    try:
        if isinstance(config, str | os.PathLike):
            name += f" {config}"
            content = OmegaConf.load(Path(config).expanduser())
        content = OmegaConf.create(content)
        refuse_resolvers(content, name)
        content = OmegaConf.to_container(content, resolve=True)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
        raise ModelError(f"can't read {name}: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ModelError(f"{name} must have one key, `model`, with `target` and `params`")
    return content


def refuse_resolvers(config: DictConfig, name: str) -> None:
    """Raise ModelError for a config with references such as ${oc.env:NAME}: a foreign file must not read the
    environment.  ${key} is fine."""
    if resolver := re.search(r"\$\{[\w.]+:[^}]*\}", OmegaConf.to_yaml(config)):
        raise ModelError(f"{name} has {resolver[0]}; only references to its own keys are read")


def complete(weights: Weights, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model with state `model_state`, taken from weights.

    The schedule's tables may be missing, or rounded as in float16 files: then they are the model's own.
    Raises ModelError, with the likely reason and the first names that differ, unless the weights fit the model.
    """
    state = dict(weights.state)
    for name, tensor in model_state.items():
        if "." not in name and (name not in state or state[name].dtype not in (torch.float32, torch.float64)):
            state[name] = tensor
    names, expected = (  # some releases of transformers leave position_ids out
        {_bare(name): name for name in each if not name.endswith("embeddings.position_ids")}
        for each in (state, model_state)
    )
    problems = {
        "missing": [name for key, name in expected.items() if key not in names],
        "unexpected": [name for key, name in names.items() if key not in expected],
        "misshapen": [
            name for key, name in names.items()
            if key in expected and state[name].shape != model_state[expected[key]].shape
        ],
    }  # fmt: skip
    if not any(problems.values()):
        return state
    reason = _likely_reason(state, problems["misshapen"]) or f"its config is {weights.config}"
    problems["misshapen"] = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(model_state[expected[_bare(name)]].shape)}"
        for name in problems["misshapen"]
    ]
    differences = [f"{len(each):,} {what} ({_first(each)})" for what, each in problems.items() if each]
    raise ModelError(f"{weights.name} does not fit this model: {reason}\n  {'; '.join(differences)}")


def _bare(name: str) -> str:
    """The name without `text_model.`, which only some releases of transformers put before the text encoder's names."""
    return name.replace(".transformer.text_model.", ".transformer.")


def _likely_reason(state: Mapping[str, Tensor], misshapen: Sequence[str] = ()) -> str | None:
    """What these weights seem to be, in words; None where they resemble nothing known."""
    for part, network in ((UNET, "UNet"), (CONTROL, "ControlNet")):
        wide = {state[n].shape[-1] for n in misshapen if n.startswith(part) and n.endswith("attn2.to_k.weight")}
        for width, version in ((1024, "2.x"), (2048, "XL")):
            if width in wide:
                return f"its {network} is of Stable Diffusion {version} (texts {width} wide), {_FOR_1_5}"
        first = part + "input_blocks.0.0.weight"
        if first in misshapen and state[first].ndim == 4 and state[first].shape[1] in (8, 9):
            channels = state[first].shape[1]
            what = {8: "an InstructPix2Pix", 9: "an inpainting"}[channels]
            return f"it is {what} model ({channels} input channels instead of 4): take the plain Stable Diffusion 1.5"
    names = "\n".join(state)
    for pattern, what in _OTHER_KINDS.items():
        if re.search(pattern, names, re.MULTILINE):
            return what
    parts = [key for key, prefix in diffusers_layout.NETWORKS.items() if f"\n{prefix}" in f"\n{names}"]
    if not parts:
        return "it holds nothing of a Stable Diffusion checkpoint"
    if "unet" in parts and "controlnet" not in parts:
        return "it is a base model without control: name a ControlNet as the model, and this as its base (--base)"
    if "controlnet" in parts and "unet" not in parts:
        return "it is a ControlNet alone: name a Stable Diffusion 1.5 checkpoint as its base, too (--base)"
    for key, what in (("vae", "autoencoder"), ("text_encoder", "text encoder")):
        if "unet" in parts and key not in parts:
            return f"it lacks the {what}: take a whole checkpoint, not a part of one"
    return None


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
