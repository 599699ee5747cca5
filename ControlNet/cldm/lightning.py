"""Training with pytorch_lightning's Trainer: what published scripts get as `cldm.model` and `cldm.logger`.

`create_model` here makes LightningModules, whatever was imported before.  Those of ControlNet.cldm.model are plain
modules, since importing Lightning takes seconds.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

with contextlib.suppress(ModuleNotFoundError):  # absent where this folder was copied alone
    import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from ControlNet.cldm import model as plain
from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import ModelError, load_model, load_state_dict  # noqa: F401  of `cldm.model`, too
from ControlNet.ldm.util import log_txt_as_img


def create_model(config_path: str | os.PathLike | DictConfig | Mapping) -> "LightningControlLDM":
    """ControlNet.cldm.model.create_model, for a Trainer."""
    model = plain.create_model(config_path, LightningControlLDM)
    assert isinstance(model, LightningControlLDM)
    return model


class LightningControlLDM(ControlLDM, pl.LightningModule):  # type: ignore[misc]  # both have dtype and device
    """A ControlLDM that a Trainer trains.

    Attributes: `learning_rate`; `sd_locked`, whether training leaves the UNet's decoder as it is.
    """

    learning_rate = 1e-5
    sd_locked = True

    @torch.no_grad()
    def get_input(self, batch: Mapping, k: str, bs: int | None = None) -> tuple[Tensor, dict[str, list]]:
        """(latents, conditioning) of the first bs items; c_crossattn holds the texts where the text encoder is trained.

        batch: {first_stage_key: images, B x H x W x 3 in [-1, 1]; cond_stage_key: B texts; control_key: hints,
        B x H x W x 3 in 0..1}.
        """
        images, hint = (
            rearrange(batch[key][:bs], "b h w c -> b c h w").contiguous().float().to(self.device)
            for key in (self.first_stage_key, self.control_key)
        )
        z = self.get_first_stage_encoding(self.encode_first_stage(images))
        texts = batch[self.cond_stage_key][:bs]
        context = texts if self.cond_stage_trainable else self.get_learned_conditioning(texts)
        return z, {"c_crossattn": [context], "c_concat": [hint]}

    def shared_step(self, batch: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        return self(*self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, c: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at timesteps drawn uniformly."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device)
        return self.p_losses(x, self._encoded(c), t)

    def _encoded(self, cond: dict) -> dict:
        """The conditioning with the texts encoded that get_input has left as they are."""
        if not self.cond_stage_trainable:
            return cond
        return {**cond, "c_crossattn": [self.get_learned_conditioning(texts) for texts in cond["c_crossattn"]]}

    def p_losses(
        self, x_start: Tensor, cond: dict, t: Tensor, noise: Tensor | None = None
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the control network and, unless sd_locked, the UNet's decoder; the rest is frozen."""
        if self.use_ema:
            raise ValueError("training keeps no moving average of the weights: set use_ema to False in the config")
        unet = self.model.diffusion_model.requires_grad_(False)
        trained: list[nn.Module] = [self.control_model]
        if not self.sd_locked:
            trained += [unet.output_blocks, unet.out]
        parameters = [parameter for part in trained for parameter in part.requires_grad_(True).parameters()]
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping, N: int = 4, sample: bool = False, ddim_steps: int = 50, ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 9.0, **kwargs,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Images of the first N items to look at, each n x 3 x H x W in about [-1, 1].

        sample: whether to sample without guidance, too.  The published rows of noisy and of denoised images are not
        made: their arguments (n_row, plot_diffusion_rows, ...) are accepted and have no effect.
        """
        z, cond = self.get_input(batch, self.first_stage_key, bs=N)
        cond, hint = self._encoded(cond), cond["c_concat"][0]
        log = {
            "reconstruction": self.decode_first_stage(z),
            "control": hint * 2.0 - 1.0,
            "conditioning": log_txt_as_img((512, 512), batch[self.cond_stage_key][:N], size=16),
        }
        if sample:
            log["samples"] = self.decode_first_stage(self.sample_log(cond, len(z), True, ddim_steps, eta=ddim_eta)[0])
        scale = unconditional_guidance_scale
        if scale > 1.0:
            uncond = {"c_concat": [hint], "c_crossattn": [self.get_unconditional_conditioning(len(z))]}
            guidance: Any = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
            samples, _ = self.sample_log(cond, len(z), True, ddim_steps, eta=ddim_eta, **guidance)
            log[f"samples_cfg_scale_{scale:.2f}"] = self.decode_first_stage(samples)
        return log

    @torch.no_grad()
    def sample_log(self, cond: dict, batch_size: int, ddim: bool, ddim_steps: int, **kwargs) -> tuple[Tensor, dict]:
        """DDIMSampler.sample at the hint's size."""
        height, width = cond["c_concat"][0].shape[-2:]
        shape = (self.channels, height // 8, width // 8)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)


class ImageLogger(pl.Callback):
    """Every batch_frequency batches, what the model's log_images returns as PNG, in <save_dir>/image_log/train.

    max_images: of each kind; rescale: values are in [-1, 1], not [0, 1]; clamp: to [-1, 1] first; disabled: save none;
    log_images_kwargs: passed to log_images.  The other arguments have no effect, as in the published class.
    """

    def __init__(
        self, batch_frequency: int = 2000, max_images: int = 4, clamp: bool = True, increase_log_steps: bool = True,
        rescale: bool = True, disabled: bool = False, log_on_batch_idx: bool = False, log_first_step: bool = False,
        log_images_kwargs: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        self.batch_freq, self.max_images = batch_frequency, max_images
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled
        self.log_images_kwargs = log_images_kwargs or {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not self.disabled and self.max_images > 0 and batch_idx % self.batch_freq == 0:
            self.log_img(pl_module, batch, batch_idx)

    def log_img(self, pl_module, batch, batch_idx: int, split: str = "train") -> None:
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            images = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        pl_module.train(was_training)
        images = {name: kind[: self.max_images].detach().float().cpu() for name, kind in images.items()}
        if self.clamp:
            images = {name: kind.clamp(-1, 1) for name, kind in images.items()}
        save_dir = pl_module.logger.save_dir if pl_module.logger else pl_module.trainer.default_root_dir
        self.log_local(save_dir, split, images, pl_module.global_step, pl_module.current_epoch, batch_idx)

    @rank_zero_only
    def log_local(
        self, save_dir: str, split: str, images: dict[str, Tensor], global_step: int, current_epoch: int, batch_idx: int
    ) -> None:
        folder = Path(save_dir) / "image_log" / split
        folder.mkdir(parents=True, exist_ok=True)
        for name, kind in images.items():
            grid = make_grid(kind, nrow=4).permute(1, 2, 0).numpy()
            grid = (grid + 1) / 2 if self.rescale else grid
            file = f"{name}_gs-{global_step:06}_e-{current_epoch:06}_b-{batch_idx:06}.png"
            Image.fromarray((grid * 255).clip(0, 255).astype(np.uint8)).save(folder / file)
