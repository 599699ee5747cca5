"""Building models from configs and filling them from checkpoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.files import ModelError, digest, load_state_dict
from ControlNet.cldm.lora import Lora, lora_digest, merge
from ControlNet.cldm.small_decoder import decoder_file, load_small_decoder, use_small_decoder
from ControlNet.cldm.weights import BUNDLED, MODELS_FOLDER, Weights, complete, find_weights, fingerprint, read_config
from ControlNet.ldm.autoencoder import AutoencoderKL
from ControlNet.ldm.util import instantiate_from_config

__all__ = [
    "BUNDLED", "MODELS_FOLDER", "Lora", "ModelError", "create_empty_model", "create_model", "load_first_stage",
    "load_model", "load_state_dict", "weights_fingerprint",
]  # fmt: skip


_OTHER_VERSIONS = {"use_linear_in_transformer": "2.x", "OpenCLIPEmbedder": "2.x", "sgm.": "XL"}  # by words of configs


class _WithoutInit(TorchFunctionMode):
    """Inside, layers get memory but no random numbers: a checkpoint is about to fill them."""

    _INITIALIZERS = ("torch.nn.init", "transformers.initialization")
    _FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) in self._INITIALIZERS or func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def create_model(
    config_path: str | os.PathLike | DictConfig | Mapping, cls: type[ControlLDM] = ControlLDM
) -> ControlLDM:
    """Build a ControlLDM, or a subclass of it, from a config: a .yaml path, or its content.

    Its parameters have the published initial values: random where theirs are, zero in the zero convolutions.  Only the
    text encoder, which the published code downloads, is random here.
    Raises ModelError for a config that names an unknown class or parameter.
    """
    config = read_config(config_path)
    name = config_path if isinstance(config_path, str | os.PathLike) else "model config"
    try:
        return instantiate_from_config(config["model"], cls)
    except KeyError as error:
        raise ModelError(f"{name}: the config lacks {error}") from error
    except ValueError as error:
        for part, version in _OTHER_VERSIONS.items():
            if part in str(config):
                what = f"a config of Stable Diffusion {version}, and only models of 1.5 are supported"
                raise ModelError(f"{name} is {what} ({error})") from error
        raise ModelError(f"{name}: {error}") from error


def create_empty_model(config_path: str | os.PathLike | DictConfig | Mapping) -> ControlLDM:
    """Like create_model, but with unset parameters, for load_state_dict to fill: instant at any size."""
    with _WithoutInit():
        return create_model(config_path)


def load_model(
    spec: str | os.PathLike = "sd15", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    base: str | os.PathLike | None = None, loras: Sequence[tuple[str | Path, float]] = (),
    decoder: str | os.PathLike | None = None,
) -> ControlLDM:  # fmt: skip
    """A ControlLDM ready to sample: weights loaded strictly, in eval mode, without gradients.

    spec: "sd15" (the official weights, ControlNet/models/control_sd15_canny.pth), "tiny" (bundled), a checkpoint's
    path, or a folder in diffusers' layout.  The config is a .yaml of the same stem beside the file, or model.yaml in
    the folder, else Stable Diffusion 1.5's.
    base: where everything but the control network comes from, named like spec; needed where spec holds a control
    network alone, as ControlNet 1.1's files do.
    loras: LoRA files and their scales, which are merged into the UNet's and the text encoder's weights.
    decoder: a TAESD file, which decodes in place of the autoencoder (see `small_decoder.load_small_decoder`).
    dtype: what the networks compute in; the diffusion tables stay float32, and beside float16 networks so does the
    autoencoder, whose activations exceed float16's range.

    On the CPU in the file's own dtype the parameters are views of the memory-mapped file.  Elsewhere they are moved or
    converted one by one.  The model's `fingerprint` is `weights_fingerprint(spec, base, loras, decoder)`.
    Raises ModelError, with the likely reason, for weights that don't fit.
    """
    weights = find_weights(spec, base)
    model = _filled_model(weights, loras)
    if decoder is not None:
        use_small_decoder(model.first_stage_model, model.scale_factor, load_small_decoder(decoder, model.channels))
    model.fingerprint = _with_changes(fingerprint(weights), loras, decoder)
    del weights  # so that a tensor's old memory is free as soon as it is converted
    tables = dict(model.named_buffers(recurse=False))
    for name, part in model.named_children():
        exceeds = dtype == torch.float16 and name == "first_stage_model"
        part.to(device=device, dtype=torch.float32 if exceeds else dtype)
    for name, table in tables.items():
        setattr(model, name, table.to(device=device, dtype=torch.float32))
    return model.eval().requires_grad_(False)


def load_first_stage(
    spec: str | os.PathLike = "sd15", device: torch.device | str = "cpu", base: str | os.PathLike | None = None
) -> AutoencoderKL:
    """The autoencoder alone of `load_model(spec, base=base)`, in float32.  Raises ModelError."""
    network = _filled_model(find_weights(spec, base)).first_stage_model
    return network.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def _filled_model(weights: Weights, loras: Sequence[tuple[str | Path, float]] = ()) -> ControlLDM:
    model = create_empty_model(weights.config)
    state = complete(weights, model.state_dict())
    for lora in loras:
        state = merge(state, lora)
    model.load_state_dict(state, assign=True)
    return model


def weights_fingerprint(
    spec: str | os.PathLike = "sd15", base: str | os.PathLike | None = None,
    loras: Sequence[tuple[str | Path, float]] = (), decoder: str | os.PathLike | None = None,
) -> str:  # fmt: skip
    """What tells the weights of `load_model` with the same arguments from others, without building the model.

    It is `weights.fingerprint`, and "+", digest and scale of each LoRA, "+decoder:" and digest of the decoder.
    Raises ModelError.
    """
    return _with_changes(fingerprint(find_weights(spec, base)), loras, decoder)


def _with_changes(weights: str, loras: Sequence[tuple[str | Path, float]], decoder: str | os.PathLike | None) -> str:
    changes = [f"{lora_digest(path)}*{scale:g}" for path, scale in loras]
    if decoder is not None:
        changes.append(f"decoder:{digest(decoder_file(decoder), 'decoder')}")
    return "+".join([weights, *changes])
