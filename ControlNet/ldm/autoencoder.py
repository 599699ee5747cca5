"""The first stage: autoencoders between pictures and latents of 1/8 of their size.

AutoencoderKL is the published one.  PatchAutoencoder is for small models that are trained on a CPU, of whose training
the published one takes most of the time.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ControlNet.ldm.unet import Upsample

LEAST_LOG_VARIANCE, LARGEST_LOG_VARIANCE = -30.0, 20.0
"""Of latents."""


def normalize(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = normalize(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = normalize(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalize(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # Contiguous: fused kernels refuse other strides, and the one without them keeps all N x N scores.
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


class Middle(nn.Sequential):
    def __init__(self, channels: int, dropout: float):
        first, attention = ResnetBlock(channels, channels, dropout), AttnBlock(channels)
        last = ResnetBlock(channels, channels, dropout)
        super().__init__(OrderedDict(block_1=first, attn_1=attention, block_2=last))


class Level(nn.Module):
    """Blocks at one size of the feature maps, each perhaps with attention; then perhaps a change of the size."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attend: bool, dropout: float):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels_in if i == 0 else channels_out, channels_out, dropout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels_out) for _ in range(blocks if attend else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    """B x in_channels x H x W -> B x 2*z_channels x H/f x W/f, f = 2**(len(ch_mult) - 1)."""

    def __init__(
        self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attn_resolutions: Sequence[int],
        in_channels: int, resolution: int, z_channels: int, dropout: float, double_z: bool = True, **ignored,
    ):  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, mult in enumerate(ch_mult):
            level = Level(channels, ch * mult, num_res_blocks, resolution // 2**i in attn_resolutions, dropout)
            channels = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = Middle(channels, dropout)
        self.norm_out = normalize(channels)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """B x z_channels x H/f x W/f -> B x out_ch x H x W, the encoder's mirror with one block more a level."""

    def __init__(
        self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attn_resolutions: Sequence[int],
        out_ch: int, resolution: int, z_channels: int, dropout: float, **ignored,
    ):  # fmt: skip
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, dropout)
        levels: list[Level] = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(channels, ch * mult, num_res_blocks + 1, resolution // 2**i in attn_resolutions, dropout)
            channels = ch * mult
            if i > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = normalize(channels)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DiagonalGaussianDistribution:
    """An independent normal distribution for each latent.

    parameters: B x 2C x H x W, means then log variances (clamped to -30..20); deterministic: variance 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(LEAST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.var = self.std**2

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """B x C x H x W.  The noise is drawn on the generator's device, or on the CPU by torch's global generator."""
        device = "cpu" if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over the latents of each image: B."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """encode: B x 3 x H x W in [-1, 1] -> a distribution over B x embed_dim x H/8 x W/8; decode: the way back.

    ddconfig: the arguments of Encoder and Decoder; lossconfig and monitor have no effect.
    """

    def __init__(self, ddconfig: Mapping, embed_dim: int, lossconfig: Mapping | None = None, monitor: str = ""):
        super().__init__()
        self.embed_dim = embed_dim
        if not ddconfig["double_z"]:
            raise ValueError("ddconfig.double_z must be true: the encoder gives means and log variances")
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the latents by a factor, in the 1 x 1 convolutions on both sides; reconstructions stay the same."""
        bias = _bias(self.quant_conv)
        self.quant_conv.weight[: self.embed_dim] *= factor
        bias[: self.embed_dim] *= factor
        bias[self.embed_dim :] += 2 * math.log(factor)
        self.post_quant_conv.weight /= factor

    def forward(self, images: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(reconstruction, posterior)."""
        posterior = self.encode(images)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class PatchAutoencoder(nn.Module):
    """A linear autoencoder.  encode: B x 3 x H x W in [-1, 1] -> a distribution of variance ~0 over B x embed_dim x
    H/8 x W/8.

    Latents are the first embed_dim principal components of 8 x 8 patches, which `fit` sets, in their natural scale:
    coarse ones have a larger variance than fine ones, so a diffusion model settles them first.  12 of them keep a
    picture of CIFAR-10 at 32 dB (tests/bench/bench_patch_autoencoder.py).
    """

    PATCH = 8

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.encoder = nn.Conv2d(3, embed_dim, self.PATCH, stride=self.PATCH)
        self.decoder = nn.ConvTranspose2d(embed_dim, 3, self.PATCH, stride=self.PATCH)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        mean = self.encoder(x)
        return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, LEAST_LOG_VARIANCE)], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    @torch.no_grad()
    def fit(self, pictures: Tensor) -> None:
        """Set the components to those of B x 3 x H x W pictures in [-1, 1]."""
        patches = rearrange(pictures, "b c (h p) (w q) -> (b h w) (c p q)", p=self.PATCH, q=self.PATCH).double()
        mean = patches.mean(0)
        components = torch.linalg.eigh(torch.cov((patches - mean).T)).eigenvectors.flip(1)[:, : self.embed_dim].T
        self.encoder.weight.copy_(components.view_as(self.encoder.weight))
        _bias(self.encoder).copy_(-components @ mean)
        self.decoder.weight.copy_(components.view_as(self.decoder.weight))
        # The mean as a picture that is equal in each patch would need a bias per pixel: only its colour is kept.
        _bias(self.decoder).copy_(mean.view(3, -1).mean(1))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the latents by a factor; reconstructions stay the same."""
        self.encoder.weight *= factor
        _bias(self.encoder).mul_(factor)
        self.decoder.weight /= factor


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
