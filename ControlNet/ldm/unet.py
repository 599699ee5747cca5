"""The denoising UNet of latent diffusion and its spatial transformers, in the official checkpoint's layout."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ControlNet.ldm.util import timestep_embedding, zero_module


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.proj = nn.Linear(channels_in, 2 * channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Sequential):
    def __init__(self, channels: int, dropout: float = 0.0):
        wide = 4 * channels
        net = nn.Sequential(GEGLU(channels, wide), nn.Dropout(dropout), nn.Linear(wide, channels))
        super().__init__(OrderedDict(net=net))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B x N x C) to a context (B x M x D), or to x itself where there is none."""

    def __init__(self, channels: int, context_dim: int, heads: int, dim_head: int, dropout: float = 0.0):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each on the layer-normalised input and added to it."""

    def __init__(self, channels: int, heads: int, dim_head: int, context_dim: int, dropout: float = 0.0):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads, dim_head, dropout)
        self.ff = FeedForward(channels, dropout)
        self.attn2 = CrossAttention(channels, context_dim, heads, dim_head, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (B x C x H x W), with a residual connection."""

    def __init__(self, channels: int, heads: int, dim_head: int, depth: int, context_dim: int, dropout: float = 0.0):
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim, dropout) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))


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
