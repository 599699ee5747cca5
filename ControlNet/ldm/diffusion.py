"""Latent diffusion (Rombach et al. 2022): the schedule and the two frozen stages."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ControlNet.ldm.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from ControlNet.ldm.schedule import scaled_linear_betas, schedule_buffers
from ControlNet.ldm.unet import UNetModel
from ControlNet.ldm.util import extract_into_tensor, instantiate_from_config

if TYPE_CHECKING:
    from ControlNet.ldm.text import FrozenCLIPEmbedder


class DiffusionWrapper(nn.Module):
    """Holds the UNet where the official checkpoint has it: `model.diffusion_model`."""

    def __init__(self, diffusion_model: UNetModel):
        super().__init__()
        self.diffusion_model = diffusion_model


class LatentDiffusion(nn.Module):
    """A UNet that predicts the noise in latents, with the autoencoder and the text encoder that it was trained on.

    The *_config arguments are {target, params}; the others are the official config's.  The autoencoder is frozen, and
    so is the text encoder unless cond_stage_trainable.  Only noise prediction (parameterization "eps") is supported.
    monitor, image_size, conditioning_key, num_timesteps_cond and log_every_t are accepted and not used.
    """

    parameterization = "eps"
    model: DiffusionWrapper
    first_stage_model: AutoencoderKL
    cond_stage_model: "FrozenCLIPEmbedder"
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    logvar: Tensor

    def __init__(
        self, unet_config: Mapping, first_stage_config: Mapping, cond_stage_config: Mapping, timesteps: int = 1000,
        linear_start: float = 0.00085, linear_end: float = 0.0120, first_stage_key: str = "jpg",
        cond_stage_key: str = "txt", channels: int = 4, scale_factor: float = 0.18215,
        cond_stage_trainable: bool = False, parameterization: str = "eps", use_ema: bool = False,
        monitor: str | None = None, image_size: int | None = None, conditioning_key: str | None = "crossattn",
        num_timesteps_cond: int | None = None, log_every_t: int = 100,
    ):  # fmt: skip
        super().__init__()
        if parameterization != "eps":
            raise ValueError(f"parameterization must be eps (the network predicts noise), not {parameterization}")
        self.first_stage_key, self.cond_stage_key, self.channels = first_stage_key, cond_stage_key, channels
        self.num_timesteps, self.scale_factor = timesteps, scale_factor
        self.cond_stage_trainable, self.use_ema = cond_stage_trainable, use_ema
        self.model = DiffusionWrapper(instantiate_from_config(unet_config))
        for name, table in schedule_buffers(scaled_linear_betas(timesteps, linear_start, linear_end)).items():
            self.register_buffer(name, torch.tensor(table))
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if not cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.betas.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the networks compute in."""
        return next(self.model.parameters()).dtype

    @property
    def first_stage_dtype(self) -> torch.dtype:
        """The type that the autoencoder computes in."""
        return next(self.first_stage_model.parameters()).dtype

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Switch to training mode; what is frozen stays in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def get_learned_conditioning(self, text: str | Sequence[str]) -> Tensor:
        """Texts (one string is one text) -> B x 77 x context_dim."""
        return self.cond_stage_model.encode(text)

    @torch.no_grad()
    def get_unconditional_conditioning(self, N: int) -> Tensor:
        """The empty text, N times: N x 77 x context_dim."""
        return self.get_learned_conditioning([""] * N)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (B x 3 x H x W in [-1, 1]) -> a distribution over latents (B x 4 x H/8 x W/8), not scaled."""
        return self.first_stage_model.encode(x.to(self.first_stage_dtype))

    def get_first_stage_encoding(
        self, encoder_posterior: DiagonalGaussianDistribution | Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sample of the distribution (or the given latents), times scale_factor: unit variance."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample(generator)
        return self.scale_factor * encoder_posterior

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Latents of unit variance (B x 4 x h x w) -> images (B x 3 x 8h x 8w), about [-1, 1]."""
        if predict_cids:
            raise ValueError("predict_cids needs an autoencoder with a codebook; this one is AutoencoderKL")
        return self.first_stage_model.decode(z.to(self.first_stage_dtype) / self.scale_factor)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t: clean latents with the noise of timesteps t (B) added (DDPM eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)
        return signal * x_start + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
