"""TAESD (madebyollin/taesd): a decoder of 1.2 million parameters in place of the autoencoder's 49 million."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ControlNet.cldm.files import ModelError, load_state_dict
from ControlNet.ldm.autoencoder import AutoencoderKL

IN_A_FOLDER = "diffusion_pytorch_model.safetensors"
BLOCKS = (3, 3, 3, 1)
"""Residual blocks before each doubling of the size, and after the last one."""


class _Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class SmallDecoder(nn.Module):
    """TAESD's decoder: latents, B x 4 x h x w -> images, B x 3 x 8h x 8w, about [-1, 1].

    factor: brings the latents to unit variance.  `layers` has the names of diffusers' AutoencoderTiny.
    """

    factor = 1.0

    def __init__(self, latent_channels: int = 4, channels: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(BLOCKS):
            if i > 0:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
            layers += [_Block(channels) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1))

    def extra_repr(self) -> str:
        return f"factor={self.factor}"  # a converted network depends on it

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z * self.factor / 3) * 3) * 2 - 1


def use_small_decoder(autoencoder: AutoencoderKL, scale_factor: float, decoder: SmallDecoder) -> None:
    """Let a SmallDecoder decode in place of the autoencoder's, which still encodes.

    scale_factor: the model's, which the autoencoder's latents lack to have unit variance.
    """
    decoder.factor = scale_factor
    autoencoder.add_module("post_quant_conv", nn.Identity())
    autoencoder.add_module("decoder", decoder)


def load_small_decoder(path: str | os.PathLike, latent_channels: int = 4) -> SmallDecoder:
    """path: TAESD's own file (taesd_decoder.pth or .safetensors), diffusers' AutoencoderTiny or a folder with it.

    Raises ModelError where it is neither, or for other latents.
    """
    file, decoder = decoder_file(path), SmallDecoder(latent_channels)
    state = {_own_name(name): tensor.float() for name, tensor in load_state_dict(file).items()}
    state.pop("", None)
    shapes, expected = ({name: tuple(t.shape) for name, t in each.items()} for each in (state, decoder.state_dict()))
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            what = f"{name} is {shapes.get(name)}, not {expected.get(name)}"
            if name not in expected:
                what = f"it has {name}"
            elif name not in shapes:
                what = f"it lacks {name}"
            raise ModelError(f"{file} is no decoder of TAESD for this model's latents: {what}")
    decoder.load_state_dict(state)
    return decoder


def decoder_file(path: str | os.PathLike) -> Path:
    """path, or the weights in it where it is a folder."""
    path = Path(path).expanduser()
    return path / IN_A_FOLDER if path.is_dir() else path


def _own_name(name: str) -> str:
    """SmallDecoder's name of a tensor; "" for one of the encoder."""
    if match := re.fullmatch(r"(\d+)\.(.+)", name):  # TAESD's own, which counts its first operation as layer 0
        return f"layers.{int(match[1]) - 1}.{match[2]}"
    return "" if name.startswith("encoder.") else name.removeprefix("decoder.")
