"""The denoising UNet of latent diffusion, in the official checkpoint's layout."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ControlNet.ldm.attention import SpatialTransformer
from ControlNet.ldm.util import timestep_embedding, zero_module


class TimestepEmbedSequential(nn.Sequential):
    """Layers in sequence; a ResBlock also gets the timestep embedding, a SpatialTransformer the text context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the timestep's embedding, with a residual connection."""

    def __init__(self, channels_in: int, channels_out: int, emb_channels: int, dropout: float = 0.0):
        super().__init__()
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels_in), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, channels_out))
        last = zero_module(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, channels_out), nn.SiLU(), nn.Dropout(dropout), last)
        same = channels_in == channels_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Upsample(nn.Sequential):
    def __init__(self, channels: int):
        enlarge, conv = nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(OrderedDict(enlarge=enlarge, conv=conv))


class UNetEncoder(nn.Module):
    """The half that the UNet and the ControlNet have in common: timestep embedding, input blocks, middle block.

    Arguments are the official config's.  attention_resolutions are downsampling factors (1 = the latents' own size);
    image_size, use_checkpoint and legacy have no effect.
    Attributes: `skip_channels`, the channels of each input block's output.
    """

    def __init__(
        self, in_channels: int, model_channels: int, num_res_blocks: int, attention_resolutions: Sequence[int],
        channel_mult: Sequence[int], context_dim: int, num_heads: int = -1, num_head_channels: int = -1,
        transformer_depth: int = 1, dropout: float = 0.0, image_size: int | None = None,
        use_spatial_transformer: bool = True, use_checkpoint: bool = False, legacy: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not use_spatial_transformer:
            raise ValueError("use_spatial_transformer must be true: Stable Diffusion attends to text that way")
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError("give one of num_heads and num_head_channels")
        self.model_channels, self.channel_mult, self.num_res_blocks = model_channels, channel_mult, num_res_blocks
        self.attention_resolutions = attention_resolutions
        self._num_heads, self._num_head_channels = num_heads, num_head_channels
        self._depth, self._context_dim, self._dropout = transformer_depth, context_dim, dropout
        self._emb_channels = emb_channels = 4 * model_channels

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        channels, factor = model_channels, 1
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self.skip_channels = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = self._layers(channels, mult * model_channels, attend=factor in attention_resolutions)
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                channels = mult * model_channels
                self.skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(channels)))
                self.skip_channels.append(channels)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            *self._layers(channels, channels, attend=True), ResBlock(channels, channels, emb_channels, dropout)
        )

    def _layers(self, channels_in: int, channels_out: int, attend: bool) -> list[nn.Module]:
        layers: list[nn.Module] = [ResBlock(channels_in, channels_out, self._emb_channels, self._dropout)]
        if attend:
            heads = channels_out // self._num_head_channels if self._num_heads == -1 else self._num_heads
            sizes = channels_out, heads, channels_out // heads
            layers.append(SpatialTransformer(*sizes, self._depth, self._context_dim, self._dropout))
        return layers

    def embed_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """timesteps (B) -> B x 4*model_channels."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))


@dataclass
class DeepFeatures:
    """What a UNet's last `SHALLOW` output blocks got from those below, kept from one timestep for the next ones.

    They change little between timesteps (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free").
    reuse: whether to take `features`, if there are any, in place of computing them and the blocks between.
    """

    SHALLOW: ClassVar[int] = 1

    reuse: bool = False
    features: Tensor | None = None

    @property
    def blocks(self) -> int | None:
        """Input blocks to compute now; None for all."""
        return self.SHALLOW if self.reuse and self.features is not None else None


class UNetModel(UNetEncoder):
    """eps(x_t, t, text): the noise in noisy latents.  `out_channels` and UNetEncoder's arguments."""

    def __init__(self, out_channels: int, **kwargs):
        super().__init__(**kwargs)
        skips, channels = list(self.skip_channels), self.skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                attend = 2**level in self.attention_resolutions
                layers = self._layers(channels + skips.pop(), mult * self.model_channels, attend)
                channels = mult * self.model_channels
                if level > 0 and i == self.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        )
