"""Prompts -> pictures: one batch of copies at a time, through the diffusion model.  Nothing here touches the disk."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress.presets import Preset
from ControlNet.cldm.ddim import DDIMSampler
from utils.errors import UserError

FULL_SIZE = 300_000_000
"""A model of more parameters than this keeps a CPU busy with one picture at a time."""


@dataclass(frozen=True)
class Job:
    """One copy to make.

    text: what the class is called; hint: the edge map at the generated size, HxW uint8, 0 or 255; original: (height,
    width) of the image, and so of the copy; greyscale: whether the image is, and so the copy.
    """

    image: Path
    copy_number: int
    text: str
    hint: np.ndarray
    original: tuple[int, int]
    greyscale: bool


class PictureGenerator:
    """Makes the pictures of copies.

    preset: the settings; model: a ControlLDM as `ControlNet.cldm.model.load_model` returns it; batch_size: copies
    generated together, None to choose it by device and model.

    A copy depends on its prompt, its number, the settings and the model alone.  It starts from noise of its own
    (`initial_noise`).  As kernels may round differently at another batch size, a batch that is not full is filled up:
    which copies are missing, and which share a batch, then does not show in a single byte.  Measured, this holds on a
    CPU where the number of threads divides the batch size (an odd share changes how the work is split).  Elsewhere,
    and between batch sizes, a few pixels in ten thousand differ by one level of 255.
    """

    def __init__(self, preset: Preset, model, *, batch_size: int | None = None):
        self.preset = preset
        self.model = model
        self.batch_size = batch_size or default_batch_size(model)
        self._contexts: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Job], steps: int | None = None) -> list[np.ndarray]:
        """The pictures of jobs that share their generated size and sampling, each HxWx3 uint8 at the generated size.

        steps: DDIM steps, the preset's if None.
        """
        model, sampling = self.model, self.preset.sampling_for(batch[0].text)
        filled = list(batch) + [batch[-1]] * (self.batch_size - len(batch))
        height, width = batch[0].hint.shape
        hints = torch.from_numpy(np.stack([job.hint for job in filled])).to(model.device)
        hints = (hints.to(model.dtype) / 255)[:, None].expand(-1, 3, -1, -1)
        noise = torch.cat([initial_noise(job.copy_number, height, width) for job in filled])
        texts = torch.cat([self._context(self.preset.prompt_text(job.text)) for job in filled])
        negative = self._context(self.preset.negative_prompt).expand(len(filled), -1, -1)
        model.control_scales = sampling.control_scales(len(model.control_scales))
        try:
            latents, _ = DDIMSampler(model).sample(
                steps or sampling.steps,
                len(filled),
                tuple(noise.shape[1:]),
                {"c_concat": [hints], "c_crossattn": [texts]},
                eta=sampling.eta,
                unconditional_guidance_scale=sampling.guidance,
                unconditional_conditioning={
                    "c_concat": [hints] if sampling.unconditional_control else None,
                    "c_crossattn": [negative],
                },
                x_T=noise.to(model.device),
                verbose=False,
            )
            decoded = model.decode_first_stage(latents.to(model.dtype))[: len(batch)].float()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(filled)} pictures of {height} x {width} pixels don't fit on {model.device}: "
                "use a smaller --batch-size, or --precision bf16."
            ) from error
        if not decoded.isfinite().all():
            raise UserError(
                f"in {model.dtype} the model's pictures hold values that are no numbers: use --precision fp32."
            )
        pictures = (decoded * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return list(pictures)

    def _context(self, text: str) -> torch.Tensor:
        """1 x 77 x D; each text is encoded once."""
        if text not in self._contexts:
            self._contexts[text] = self.model.get_learned_conditioning([text])
        return self._contexts[text]


def batches(jobs: Iterable[Job], batch_size: int) -> Iterator[list[Job]]:
    """Jobs of one generated size, and alike in having a text or none, in groups of batch_size; the rest at the end."""
    waiting: dict[tuple, list[Job]] = defaultdict(list)
    for job in jobs:
        group = waiting[job.hint.shape, bool(job.text)]
        group.append(job)
        if len(group) == batch_size:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


def initial_noise(copy_number: int, height: int, width: int) -> torch.Tensor:
    """The noise that copy number k of a picture of this generated size starts from: 1 x 4 x height/8 x width/8.

    Drawn on the CPU by a generator of its own, so that it is the same in every batch, process and device.
    """
    generator = torch.Generator().manual_seed(copy_number)
    return torch.randn((1, 4, height // 8, width // 8), generator=generator)


def default_batch_size(model) -> int:
    """Copies to generate together, where nobody said: 8 on a GPU; on a CPU 1 with the full-size model, else 8."""
    if model is None or model.device.type != "cpu":
        return 8
    return 1 if sum(parameter.numel() for parameter in model.parameters()) > FULL_SIZE else 8
