"""A ControlLDM that makes a picture in a moment: the real classes at a very small size, with fixed random weights."""

import copy
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import MODELS_FOLDER, create_model
from ControlNet.sampling import draw, fresh_noise, make_schedule, sample_latents

CONTROL = "control_model."
"""What the names of a control network's tensors begin with."""


def little_config() -> DictConfig:
    config = OmegaConf.load(MODELS_FOLDER / "cldm_v15.yaml")
    params = config.model.params
    for name in ("control_stage_config", "unet_config"):
        params[name].params.update(
            {
                "model_channels": 32,
                "channel_mult": [1, 1],
                "attention_resolutions": [2],
                "num_res_blocks": 1,
                "num_heads": 2,
                "context_dim": 32,
            }
        )
    params.first_stage_config.params.ddconfig.update({"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1})
    params.cond_stage_config.params = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return config


def little_model() -> ControlLDM:
    """On the CPU, in eval mode.  Its pictures are noise of full contrast, and depend on edge map, text and number."""
    return copy.deepcopy(_little_model())


@lru_cache(maxsize=1)
def _little_model() -> ControlLDM:
    model = create_model(little_config())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.data.zero_()
    return model.eval().requires_grad_(False)


def sampled(model, name, steps, shape, cond, uncond=None, scale=9.0, *, x=None, generator=None, noise=None, **how):
    """Latents by one of ControlNet.sampling's samplers.  shape: B x C x h x w; x: the initial noise, drawn if None."""
    schedule = make_schedule(name, model, steps)
    x = draw(shape, generator, model.device) if x is None else x
    noise = fresh_noise(generator) if noise is None else noise
    scales = [scale] * len(schedule.timesteps)
    return sample_latents(model, name, schedule, x, cond, uncond, noise=noise, scales=scales, **how)


def only(state: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(beginnings)}


def without(state: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


def write(path: Path, state: dict, config: bool = True) -> Path:
    """Tensors by name at `path` (.safetensors, which loads faster, else torch's format).

    config: with the little model's config beside them, as `load_model` takes other weights for Stable Diffusion 1.5's.
    """
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    if config:
        OmegaConf.save(little_config(), path.with_suffix(".yaml"))
    return path


def save_checkpoint(model: ControlLDM, path: Path) -> Path:
    return write(path, model.state_dict())
