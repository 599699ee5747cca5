"""What all samplers have in common: from noise to latents, one guided noise prediction a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.guidance import Guided


class Sampler(ABC):
    """Turns noise into latents, in a few of the schedule's timesteps.  A subclass has the timesteps and the step."""

    def __init__(self, model: ControlLDM):
        self.model = model

    @abstractmethod
    def make_schedule(self, S: int, eta: float = 0.0) -> list[int]:
        """Get ready for S steps.  Returns the timesteps in the order of sampling, the noisiest first."""

    @abstractmethod
    def step(self, i: int, x: Tensor, eps: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Step number i, with the noise eps predicted in x.  Returns the next x, and the prediction of the clean x0."""

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: dict,
        eta: float = 0.0,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None,
        x_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        verbose: bool = False,
        log_every_t: int = 100,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample latents.

        S: number of steps; shape: (4, H // 8, W // 8); conditioning, unconditional_conditioning: as
        ControlLDM.apply_model takes them; x_T: the initial noise, batch_size x shape (drawn with `generator` if None).
        Returns the latents, batch_size x shape, and the way there: {"x_inter": [...], "pred_x0": [...]}, noted every
        log_every_t steps.
        """
        model = self.model
        timesteps = self.make_schedule(S, eta)
        if x_T is None:
            x_T = torch.randn((batch_size, *shape), generator=generator, device=model.device)
        if x_T.shape != (batch_size, *shape):
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, not {(batch_size, *shape)}")
        x = x_T.to(model.device, torch.float32)
        predict = Guided(model, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        way = {"x_inter": [x], "pred_x0": [x]}
        for i, timestep in enumerate(tqdm(timesteps, type(self).__name__, leave=False, disable=not verbose)):
            t = torch.full((batch_size,), timestep, device=model.device, dtype=torch.int64)
            x, x0 = self.step(i, x, predict(x, t), generator)
            if callback is not None:
                callback(i)
            left = len(timesteps) - 1 - i
            if left % log_every_t == 0 or i == 0:
                way["x_inter"].append(x)
                way["pred_x0"].append(x0)
        return x, way
