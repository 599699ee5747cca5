"""Saves sample images during training."""

import contextlib
from pathlib import Path

with contextlib.suppress(ModuleNotFoundError):  # absent where this folder was copied alone
    import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchvision.utils import make_grid


class ImageLogger(Callback):
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
