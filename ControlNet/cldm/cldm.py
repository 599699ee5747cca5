"""ControlNet: a trainable copy of the UNet's encoder that reads an edge map and steers the UNet (Zhang et al. 2023).

LatentDiffusion (Rombach et al. 2022) has the UNet, its schedule and the two frozen stages; ControlLDM adds the control.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ControlNet.ldm.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from ControlNet.ldm.schedule import schedule_buffers
from ControlNet.ldm.unet import DeepFeatures, TimestepEmbedSequential, UNetEncoder, UNetModel
from ControlNet.ldm.util import extract_into_tensor, instantiate_from_config, zero_module

if TYPE_CHECKING:
    from ControlNet.ldm.text import FrozenCLIPEmbedder


class ControlledUnetModel(UNetModel):
    """The UNet, with the control's tensors added to its skip connections and its middle block."""

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False, deep: DeepFeatures | None = None,
    ) -> Tensor:  # fmt: skip
        """The noise in x: B x 4 x h x w.

        x: B x 4 x h x w noisy latents; timesteps: B; context: B x 77 x context_dim.
        control: one tensor an input block and one for the middle block, in that order, or None; where deep features
        are reused, those of deep.blocks alone.
        deep: where to keep the deep features, and whether to reuse them.
        """
        emb = self.embed_timesteps(timesteps, x.dtype)
        reused = None if deep is None or deep.blocks is None else deep.features
        h, skips = x, []
        for stage in self.input_blocks[: None if deep is None else deep.blocks]:
            h = stage(h, emb, context)
            skips.append(h)
        if reused is not None:
            h = reused
        else:
            h = self.middle_block(h, emb, context)
            if control is not None:
                *control, middle = control
                h = h + middle
        if control is not None and not only_mid_control:
            skips = [skip + added for skip, added in zip(skips, control, strict=True)]
        for stage in self.output_blocks[len(self.output_blocks) - len(skips) :]:
            if deep is not None and len(skips) == deep.SHALLOW:
                deep.features = h
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class ControlNet(UNetEncoder):
    """The control network.  Arguments: UNetEncoder's and hint_channels (3)."""

    def __init__(self, hint_channels: int, model_channels: int, **kwargs):
        super().__init__(model_channels=model_channels, **kwargs)
        layers: list[nn.Module] = []
        channels = hint_channels
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2)):  # 8x down in all
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.SiLU()]
            channels = width
        layers.append(zero_module(nn.Conv2d(channels, model_channels, 3, padding=1)))
        self.input_hint_block = TimestepEmbedSequential(*layers)
        self.zero_convs = nn.ModuleList(_zero_convolution(channels) for channels in self.skip_channels)
        self.middle_block_out = _zero_convolution(self.skip_channels[-1])

    def encode_hint(self, hint: Tensor) -> Tensor:
        """hint: B x 3 x 8h x 8w in 0..1 -> B x model_channels x h x w.  It depends on neither timestep nor text."""
        for layer in self.input_hint_block:
            hint = layer(hint)
        return hint

    def forward(
        self, x: Tensor, hint: Tensor | None, timesteps: Tensor, context: Tensor, hint_features: Tensor | None = None,
        blocks: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The control tensors, one an input block and one for the middle block (13 at full size).

        hint_features: encode_hint(hint), where the caller has it already; blocks: the first input blocks alone.
        """
        emb = self.embed_timesteps(timesteps, x.dtype)
        if hint_features is None:
            assert hint is not None
            hint_features = self.encode_hint(hint)
        h, control = x, []
        for i, (stage, zero_conv) in enumerate(zip(self.input_blocks[:blocks], self.zero_convs[:blocks], strict=True)):
            h = stage(h, emb, context)
            if i == 0:
                h = h + hint_features
            control.append(zero_conv(h, emb, context))
        if blocks is None:
            control.append(self.middle_block_out(self.middle_block(h, emb, context), emb, context))
        return control


def _zero_convolution(channels: int) -> TimestepEmbedSequential:
    return TimestepEmbedSequential(zero_module(nn.Conv2d(channels, channels, 1)))


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
        for name, table in schedule_buffers(timesteps, linear_start, linear_end).items():
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


class ControlLDM(LatentDiffusion):
    """Latent diffusion with a control network.

    control_stage_config: {target, params} of the control network; control_key: where a training batch has the hint;
    only_mid_control: add the control to the middle block alone; others: LatentDiffusion's.

    Attributes: `control_model`, `first_stage_model`, `cond_stage_model`, `model.diffusion_model`; `control_scales`, a
    factor for each control tensor, 1 at first; `fingerprint`, which tells the weights from others ("" unless
    `load_model` loaded them).
    """

    fingerprint = ""
    control_model: ControlNet

    def __init__(self, control_stage_config: Mapping, control_key: str = "hint", only_mid_control: bool = False,
                 **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key, self.only_mid_control = control_key, only_mid_control
        self.control_scales = [1.0] * (len(self.control_model.zero_convs) + 1)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: dict) -> Tensor:
        """The predicted noise in x_noisy (B x 4 x h x w) at timesteps t (B).

        cond: {"c_concat": [hint, B x 3 x 8h x 8w in 0..1] or None, "c_crossattn": [context, B x 77 x context_dim]};
        "hint_features", if it is there, is control_model.encode_hint(hint) computed before; "deep", DeepFeatures.
        """
        deep = cond.get("deep")
        context = torch.cat(cond["c_crossattn"], dim=1)
        control = None
        if cond["c_concat"] is not None:
            hint = torch.cat(cond["c_concat"], dim=1)
            blocks = None if deep is None else deep.blocks
            features = cond.get("hint_features")
            control = self.control_model(
                x=x_noisy, hint=hint, timesteps=t, context=context, hint_features=features, blocks=blocks
            )
            scaled = zip(control, self.control_scales[:blocks], strict=True)
            control = [c if scale == 1 else c * scale for c, scale in scaled]
        return self.model.diffusion_model(
            x=x_noisy, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control, deep=deep
        )

    def low_vram_shift(self, is_diffusing: bool) -> None:
        """Move to the GPU what is needed next, and the rest to the CPU; without a GPU, do nothing.

        is_diffusing: True for UNet and control network, False for autoencoder and text encoder.
        """
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        sampling, coding = (gpu, "cpu") if is_diffusing else ("cpu", gpu)
        self.model.to(sampling)
        self.control_model.to(sampling)
        self.first_stage_model.to(coding)
        self.cond_stage_model.to(coding)
