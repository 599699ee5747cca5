"""Small functions of the published `ldm.util` and `ldm.modules.diffusionmodules.util`."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

TARGETS = {
    "cldm.cldm.ControlLDM": "ControlNet.cldm.cldm",
    "cldm.cldm.ControlNet": "ControlNet.cldm.cldm",
    "cldm.cldm.ControlledUnetModel": "ControlNet.cldm.cldm",
    "ldm.models.autoencoder.AutoencoderKL": "ControlNet.ldm.autoencoder",
    "ldm.models.autoencoder.PatchAutoencoder": "ControlNet.ldm.autoencoder",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "ControlNet.ldm.text",
    "torch.nn.Identity": "torch.nn",
}
"""What a config's `target:` may be, and the module that has it.  Nothing else is imported: a config can't run code."""


def instantiate_from_config(config: Mapping, subclass: type | None = None) -> Any:
    """Build what {target, params} describes, as an instance of a subclass of the target where one is named.

    Raises ValueError for an unknown target or parameter.
    """
    target, params = config["target"], dict(config.get("params") or {})
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    cls = getattr(importlib.import_module(TARGETS[target]), target.rpartition(".")[2])
    try:
        return (subclass or cls)(**params)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sinusoidal embedding of timesteps (B) -> B x dim, cosines first (dim must be even)."""
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a branch that adds nothing until it is trained (ControlNet, section 3.1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def extract_into_tensor(table: Tensor, t: Tensor, shape: Sequence[int]) -> Tensor:
    """table[t] (B values), shaped B x 1 x ... to broadcast against a tensor of this shape."""
    return table.gather(-1, t).reshape(len(t), *(1 for _ in shape[1:]))


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Texts as images, B x 3 x height x width in [-1, 1]; wh: (width, height); size: of the font, in pixels."""
    width, height = wh
    per_line = int(40 * width / 256)
    images = []
    for text in xc:
        image = Image.new("RGB", (width, height), "white")
        lines = "\n".join(text[start : start + per_line] for start in range(0, len(text), per_line))
        ImageDraw.Draw(image).text((0, 0), lines, fill="black", font=ImageFont.load_default(size))
        images.append(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)
    return torch.from_numpy(np.stack(images))
