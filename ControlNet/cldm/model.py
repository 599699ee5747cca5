"""Building models from configs and filling them from checkpoints."""

import inspect
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from yaml import YAMLError

from ControlNet.cldm.cldm import ControlLDM, ControlledUnetModel, ControlNet
from ControlNet.ldm.autoencoder import AutoencoderKL
from ControlNet.ldm.text import FrozenCLIPEmbedder

MODELS_FOLDER = Path(__file__).parent.parent / "models"
BUNDLED = {
    "sd15": ("cldm_v15.yaml", "control_sd15_canny.pth"),
    "tiny": ("cldm_tiny.yaml", "cldm_tiny.safetensors"),
}
"""Short names of `load_model`: config and weights in ControlNet/models."""

# What a config's `target:` may be.  Looked up, never imported: a config can't run code.
_TARGETS = {
    "cldm.cldm.ControlLDM": ControlLDM,
    "cldm.cldm.ControlNet": ControlNet,
    "cldm.cldm.ControlledUnetModel": ControlledUnetModel,
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": FrozenCLIPEmbedder,
    "torch.nn.Identity": nn.Identity,
}
# Keys of the official config that steer its authors' trainer and logger, not the network.
_TRAINER_KEYS = {
    "base_learning_rate", "channels", "cond_stage_key", "conditioning_key", "control_key", "first_stage_key",
    "image_size", "log_every_t", "monitor", "num_timesteps_cond", "use_ema",
}  # fmt: skip


class ModelError(ValueError):
    """A config or a checkpoint that can't be used.  The message is for the person who named it."""


class _WithoutInit(TorchFunctionMode):
    """Inside, layers get memory but no random numbers: a checkpoint is about to fill them."""

    _INITIALIZERS = ("torch.nn.init", "transformers.initialization")
    _FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) in self._INITIALIZERS or func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def create_model(config_path: str | os.PathLike | DictConfig | Mapping, initialize: bool = False) -> ControlLDM:
    """Build a ControlLDM from a config: a .yaml path, or its content.

    initialize: False leaves the parameters unset, for `load_state_dict` to fill, which is instant at any size; True
    fills them for training from scratch.
    Raises ModelError for a config that names an unknown class or parameter.
    """
    config = _read_config(config_path)
    try:
        node = config["model"]
        if initialize:
            return _build(node)
        with _WithoutInit():
            return _build(node)
    except KeyError as error:
        raise ModelError(f"{_name(config_path)}: the config lacks {error}") from error
    except ValueError as error:
        raise ModelError(f"{_name(config_path)}: {error}") from error


def _name(config_path) -> str:
    return str(config_path) if isinstance(config_path, str | os.PathLike) else "model config"


def _read_config(config_path) -> dict:
    if isinstance(config_path, str | os.PathLike):
        try:
            config_path = OmegaConf.load(config_path)
        except (OSError, OmegaConfBaseException, YAMLError) as error:
            raise ModelError(f"can't read the model config {config_path}: {error}") from error
    config = OmegaConf.to_container(OmegaConf.create(config_path), resolve=True)
    if not isinstance(config, dict) or "model" not in config:
        raise ModelError("a model config has one key, `model`, with `target` and `params`")
    return config


def _build(node: Mapping) -> nn.Module:
    """Instantiate {target, params}; the four *_config params become networks."""
    target, params = node["target"], dict(node.get("params") or {})
    if target not in _TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(_TARGETS)}")
    cls = _TARGETS[target]
    if cls is nn.Identity:
        return cls()
    if cls is ControlLDM:
        params = {key: value for key, value in params.items() if key not in _TRAINER_KEYS}
        params["unet"] = _build(params.pop("unet_config"))
        params["control"] = _build(params.pop("control_stage_config"))
        params["first_stage"] = _build(params.pop("first_stage_config"))
        params["cond_stage"] = _build(params.pop("cond_stage_config"))
    known = {name for base in cls.__mro__ if base is not nn.Module for name in inspect.signature(base).parameters}
    unknown = sorted(set(params) - known)
    if unknown:
        raise ValueError(f"{target} has no parameter {', '.join(unknown)}")
    try:
        return cls(**params)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error


def load_state_dict(path: str | os.PathLike, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name: .safetensors, or anything torch.save wrote.

    Nothing in the file is run (weights_only), and on the CPU its tensors are views of the memory-mapped file: they
    take no memory until they are used.  Tensors nested under "state_dict" are found.
    Raises ModelError where the file is missing, broken or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: download it there, or name another file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(location))
        content = torch.load(path, map_location=location, weights_only=True, mmap=_can_map(path))
    except pickle.UnpicklingError as error:  # torch's own words advise to switch the protection off
        raise ModelError(
            f"{path} is not a plain checkpoint: another kind of file, or one that holds code, which is never run"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"{path} is not a whole checkpoint, a broken download?: {why}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no tensors by name")
    return dict(content)


def _can_map(path: Path) -> bool:
    """torch maps files of its zip format only; older ones are read whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load_model(
    spec: str | os.PathLike = "sd15", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ControlLDM:
    """A ControlLDM ready to sample: weights loaded strictly, in eval mode, without gradients.

    spec: "sd15" (the official weights, ControlNet/models/control_sd15_canny.pth), "tiny" (bundled), or a checkpoint's
    path; a .yaml of the same stem beside it is its config, else it is read as a Stable Diffusion 1.5 ControlNet.
    dtype: what the networks compute in; the diffusion tables stay float32.
    Raises ModelError.
    """
    if str(spec) in BUNDLED:
        config, weights = (MODELS_FOLDER / name for name in BUNDLED[str(spec)])
    else:
        weights = Path(spec)
        beside = weights.with_suffix(".yaml")
        config = beside if beside.is_file() else MODELS_FOLDER / BUNDLED["sd15"][0]
    state = load_state_dict(weights)
    model = create_model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_names(weights, state, expected)
    model.load_state_dict({name: tensor for name, tensor in state.items()}, assign=True)
    tables = dict(model.named_buffers(recurse=False))
    model = model.to(device=device, dtype=dtype)
    for name, table in tables.items():
        setattr(model, name, table.to(device=device, dtype=torch.float32))
    return model.eval().requires_grad_(False)


def _check_names(weights: Path, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise ModelError, with the first names that differ, unless the checkpoint fits the model."""
    counted = "embeddings.position_ids"  # some releases of transformers leave it out
    bare = {name.replace(".transformer.text_model.", ".transformer."): name for name in state}
    wanted = {name.replace(".transformer.text_model.", ".transformer."): name for name in expected}
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
        raise ModelError(f"{weights} does not fit this model: {'; '.join(problems)}")


def _first(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
