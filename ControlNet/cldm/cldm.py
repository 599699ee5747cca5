"""ControlNet: a trainable copy of the UNet's encoder that reads an edge map and steers the UNet (Zhang et al. 2023)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ControlNet.ldm.attention import zeroed
from ControlNet.ldm.schedule import scaled_linear_betas, schedule_buffers
from ControlNet.ldm.unet import Stage, UNetEncoder, UNetModel


class ControlledUnetModel(UNetModel):
    """The UNet, with the control's tensors added to its skip connections and its middle block."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """Predict the noise.

        x: B x 4 x h x w noisy latents; timesteps: B; context: B x 77 x context_dim.
        control: one tensor an input block and one for the middle block, in that order, or None.
        Returns B x 4 x h x w.
        """
        emb = self.embed_timesteps(timesteps, x.dtype)
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if control is not None:
            h = h + control[-1]
            if not only_mid_control:
                skips = [skip + added for skip, added in zip(skips, control[:-1], strict=True)]
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class ControlNet(UNetEncoder):
    """The control network.  Arguments: UNetEncoder's and hint_channels (3)."""

    def __init__(self, hint_channels: int, model_channels: int, **kwargs):
        super().__init__(model_channels=model_channels, **kwargs)
        widths = [(16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2)]  # channels and stride; 8x down in all
        layers: list[nn.Module] = []
        channels = hint_channels
        for width, stride in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.SiLU()]
            channels = width
        self.input_hint_block = Stage(*layers, zeroed(nn.Conv2d(channels, model_channels, 3, padding=1)))
        self.zero_convs = nn.ModuleList(Stage(zeroed(nn.Conv2d(c, c, 1))) for c in self.skip_channels)
        middle = self.skip_channels[-1]
        self.middle_block_out = Stage(zeroed(nn.Conv2d(middle, middle, 1)))

    def encode_hint(self, hint: Tensor) -> Tensor:
        """hint: B x 3 x 8h x 8w in 0..1 -> B x model_channels x h x w.  It depends on neither timestep nor text."""
        for layer in self.input_hint_block:
            hint = layer(hint)
        return hint

    def forward(
        self,
        x: Tensor,
        hint: Tensor | None,
        timesteps: Tensor,
        context: Tensor,
        hint_features: Tensor | None = None,
    ) -> list[Tensor]:
        """The control tensors, one an input block and one for the middle block (13 at full size).

        hint_features: encode_hint(hint), where the caller has it already.
        """
        emb = self.embed_timesteps(timesteps, x.dtype)
        if hint_features is None:
            hint_features = self.encode_hint(hint)
        h, control = x, []
        for i, (stage, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = stage(h, emb, context)
            if i == 0:
                h = h + hint_features
            control.append(zero_conv(h, emb, context))
        control.append(self.middle_block_out(self.middle_block(h, emb, context), emb, context))
        return control


class DiffusionWrapper(nn.Module):
    """Holds the UNet where the official checkpoint has it: `model.diffusion_model`."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model


class ControlLDM(nn.Module):
    """Latent diffusion with a text encoder, an autoencoder and a control network.

    unet, control, first_stage and cond_stage are the four networks; the other arguments are the official config's.
    cond_stage_trainable says whether training changes the text encoder (the official one stays as it is).

    Attributes: `control_model`, `first_stage_model`, `cond_stage_model`, `model.diffusion_model`, `control_scales`, a
    factor for each control tensor, all 1 at first, and `fingerprint`, which tells the weights from others ("" unless
    `load_model` loaded them).
    """

    fingerprint = ""

    def __init__(
        self,
        unet: ControlledUnetModel,
        control: ControlNet,
        first_stage: nn.Module,
        cond_stage: nn.Module,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        timesteps: int = 1000,
        scale_factor: float = 0.18215,
        only_mid_control: bool = False,
        cond_stage_trainable: bool = False,
    ):
        super().__init__()
        self.model = DiffusionWrapper(unet)
        self.control_model = control
        self.first_stage_model = first_stage
        self.cond_stage_model = cond_stage
        self.num_timesteps = timesteps
        self.scale_factor = scale_factor
        self.only_mid_control = only_mid_control
        self.cond_stage_trainable = cond_stage_trainable
        self.control_scales = [1.0] * (len(control.zero_convs) + 1)
        for name, table in schedule_buffers(scaled_linear_betas(timesteps, linear_start, linear_end)).items():
            self.register_buffer(name, torch.tensor(table))

    @property
    def device(self) -> torch.device:
        return self.betas.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the networks compute in."""
        return next(self.model.parameters()).dtype

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        """Texts -> B x 77 x context_dim."""
        return self.cond_stage_model(texts)

    def apply_model(self, x: Tensor, t: Tensor, cond: dict) -> Tensor:
        """The predicted noise in x (B x 4 x h x w) at timesteps t (B).

        cond: {"c_concat": [hint, B x 3 x 8h x 8w in 0..1] or None, "c_crossattn": [context, B x 77 x context_dim]};
        "hint_features", if it is there, is control_model.encode_hint(hint) computed before.
        """
        context = torch.cat(cond["c_crossattn"], dim=1)
        control = None
        if cond["c_concat"] is not None:
            hint = torch.cat(cond["c_concat"], dim=1)
            control = self.control_model(
                x=x, hint=hint, timesteps=t, context=context, hint_features=cond.get("hint_features")
            )
            scaled = zip(control, self.control_scales, strict=True)
            control = [c if scale == 1 else c * scale for c, scale in scaled]
        return self.model.diffusion_model(
            x=x, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control
        )

    def encode_first_stage(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]) -> latents of unit scale, B x 4 x H/8 x W/8, drawn from the encoder."""
        return self.scale_factor * self.first_stage_model.encode(images).sample(generator)

    def decode_first_stage(self, latents: Tensor) -> Tensor:
        """Latents (B x 4 x h x w) -> images (B x 3 x 8h x 8w), about [-1, 1]."""
        return self.first_stage_model.decode(latents / self.scale_factor)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: clean latents with the noise of timesteps t (B) added (DDPM eq. 4)."""
        signal = self.sqrt_alphas_cumprod[t][:, None, None, None]
        return signal * x_start + self.sqrt_one_minus_alphas_cumprod[t][:, None, None, None] * noise
