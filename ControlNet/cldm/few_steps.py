"""Samplers for weights that were distilled to a few steps: LCM and TCD.

LCM: Luo et al. 2023, "Latent Consistency Models".  TCD: Zheng et al. 2024, "Trajectory Consistency Distillation".
Both choose their timesteps among the 50 that the distillation used.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

from ControlNet.cldm.sampler import FRESH, Noise, Sampler

T = TypeVar("T", float, Tensor)
DISTILLED_STEPS = 50
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary(t: T) -> tuple[T, T]:
    """(factor of x, factor of the predicted x0) in LCM's consistency function at timestep t; (1, 0) at 0."""
    t = t * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2), t / (t**2 + SIGMA_DATA**2) ** 0.5


class _Distilled(Sampler):
    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> list[int]:
        """At most 50 steps; ddim_discretize has no effect.  Sets `timesteps`, `alphas_cumprod` and `eta`."""
        if not 1 <= ddim_num_steps <= DISTILLED_STEPS:
            raise ValueError(f"steps must be between 1 and {DISTILLED_STEPS}, not {ddim_num_steps}")
        self._check_eta(ddim_eta)
        count = self.model.num_timesteps
        distilled = np.arange(DISTILLED_STEPS, 0, -1) * (count // DISTILLED_STEPS) - 1
        chosen = np.linspace(0, DISTILLED_STEPS, ddim_num_steps, endpoint=False).astype(np.int64)
        self.timesteps = distilled[chosen].tolist()
        self.alphas_cumprod = self.model.alphas_cumprod.detach().double().cpu()
        self.eta = ddim_eta
        return self.timesteps

    def _check_eta(self, eta: float) -> None:
        """Raise ValueError unless the sampler can use this eta."""

    def _x0(self, i: int, x: Tensor, eps: Tensor) -> Tensor:
        a = float(self.alphas_cumprod[self.timesteps[i]])
        return (x - (1 - a) ** 0.5 * eps) / a**0.5


class LCMSampler(_Distilled):
    """Each step predicts the clean latents and adds fresh noise of the next timestep's level; the last adds none."""

    def _check_eta(self, eta: float) -> None:
        if eta != 0:
            raise ValueError(f"LCM always adds fresh noise: eta must be 0, not {eta}")

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise = FRESH) -> tuple[Tensor, Tensor]:
        skip, out = boundary(float(self.timesteps[i]))
        x0 = out * self._x0(i, x, eps) + skip * x
        if i + 1 == len(self.timesteps):
            return x0, x0
        a = float(self.alphas_cumprod[self.timesteps[i + 1]])
        return a**0.5 * x0 + (1 - a) ** 0.5 * noise(x), x0


class TCDSampler(_Distilled):
    """Each step goes to timestep s = (1 - eta) * the next one, and with fresh noise back up to the next one.

    eta is the paper's gamma: 0 is deterministic, 1 is nearly LCM.
    """

    def _check_eta(self, eta: float) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"TCD's eta (gamma in the paper) lies between 0 and 1, not {eta}")

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise = FRESH) -> tuple[Tensor, Tensor]:
        last = i + 1 == len(self.timesteps)
        end = 0 if last else self.timesteps[i + 1]
        s = int((1 - self.eta) * end)
        a, a_s = float(self.alphas_cumprod[end]), float(self.alphas_cumprod[s])
        x0 = self._x0(i, x, eps)
        x = a_s**0.5 * x0 + (1 - a_s) ** 0.5 * eps
        if self.eta > 0 and not last:
            x = (a / a_s) ** 0.5 * x + (1 - a / a_s) ** 0.5 * noise(x)
        return x, x0
