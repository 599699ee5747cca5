"""Latent diffusion (Rombach et al. 2022): the schedule, the two frozen stages, and the training loss."""

import abc
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ControlNet.ldm.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from ControlNet.ldm.schedule import scaled_linear_betas, schedule_buffers
from ControlNet.ldm.unet import UNetModel
from ControlNet.ldm.util import extract_into_tensor, instantiate_from_config

if TYPE_CHECKING:
    from ControlNet.ldm.text import FrozenCLIPEmbedder


def _trainable(cls: type[nn.Module]) -> type[nn.Module]:
    """The class, and a LightningModule too where Lightning is loaded: published training scripts give the model to a
    Trainer.  Importing Lightning takes seconds, which others need not spend."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        base = getattr(sys.modules.get(name), "LightningModule", None)
        if base is not None:
            return _joined(cls, base)  # type: ignore[arg-type]  # a class of modules is hashable
    return cls


@functools.cache
def _joined(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    if issubclass(cls, base):
        return cls
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class DiffusionWrapper(nn.Module):
    """Holds the UNet where the official checkpoint has it: `model.diffusion_model`."""

    def __init__(self, diffusion_model: UNetModel):
        super().__init__()
        self.diffusion_model = diffusion_model


class LatentDiffusion(nn.Module, abc.ABC):
    """A UNet that predicts the noise in latents, with the autoencoder and the text encoder that it was trained on.

    The *_config arguments are {target, params}; the others are the official config's.  The autoencoder is frozen, and
    so is the text encoder unless cond_stage_trainable.  Only noise prediction (parameterization "eps") is supported.
    monitor, image_size, conditioning_key, num_timesteps_cond and log_every_t are accepted and not used.
    """

    learning_rate = 1e-5
    parameterization = "eps"
    model: DiffusionWrapper
    first_stage_model: AutoencoderKL
    cond_stage_model: "FrozenCLIPEmbedder"
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    logvar: Tensor
    log: Callable[..., None]  # these three are the LightningModule's
    log_dict: Callable[..., None]
    global_step: int

    def __new__(cls, *args, **kwargs) -> "LatentDiffusion":
        """A LightningModule as well, if Lightning has been imported by now."""
        return super().__new__(_trainable(cls))  # type: ignore[return-value]

    def __init__(
        self,
        unet_config: Mapping,
        first_stage_config: Mapping,
        cond_stage_config: Mapping,
        timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        first_stage_key: str = "jpg",
        cond_stage_key: str = "txt",
        channels: int = 4,
        scale_factor: float = 0.18215,
        cond_stage_trainable: bool = False,
        parameterization: str = "eps",
        use_ema: bool = False,
        monitor: str | None = None,
        image_size: int | None = None,
        conditioning_key: str | None = "crossattn",
        num_timesteps_cond: int | None = None,
        log_every_t: int = 100,
    ):
        super().__init__()
        if parameterization != "eps":
            raise ValueError(f"parameterization must be eps (the network predicts noise), not {parameterization}")
        self.first_stage_key, self.cond_stage_key, self.channels = first_stage_key, cond_stage_key, channels
        self.num_timesteps, self.scale_factor, self.log_every_t = timesteps, scale_factor, log_every_t
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

    @abc.abstractmethod
    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The predicted noise in x_noisy; a subclass knows what the conditioning is."""

    # --- training, as pytorch_lightning.Trainer calls it --------------------------------------------------------

    @torch.no_grad()
    def get_input(self, batch: Mapping, k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, text conditioning; the texts themselves where the text encoder is trained) of the first bs items.

        batch: {k: images, B x H x W x 3 in [-1, 1]; cond_stage_key: B texts}.
        """
        images = rearrange(batch[k][:bs], "b h w c -> b c h w").contiguous().float().to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(images))
        texts = batch[self.cond_stage_key][:bs]
        return z, texts if self.cond_stage_trainable else self.get_learned_conditioning(texts)

    def shared_step(self, batch: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        return self(*self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at timesteps drawn uniformly."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device)
        return self.p_losses(x, c, t)

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, values to log): the mean square error of the predicted noise (DDPM eq. 14)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        eps = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        simple = F.mse_loss(eps, noise, reduction="none").mean([1, 2, 3])
        logvar = self.logvar.to(self.device)[t]
        loss = (simple / logvar.exp() + logvar).mean()
        prefix = "train" if self.training else "val"
        return loss, {f"{prefix}/loss_simple": simple.mean(), f"{prefix}/loss": loss}

    def training_step(self, batch: Mapping, batch_idx: int) -> Tensor:
        loss, values = self.shared_step(batch)
        self.log_dict(values, prog_bar=True, on_step=True, on_epoch=True)
        self.log("global_step", float(self.global_step), prog_bar=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        self.log_dict(self.shared_step(batch)[1], on_step=False, on_epoch=True)
