"""Second-order multistep solvers of the deterministic equation: DPM-Solver++ 2M and UniPC.

DPM-Solver++: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models".
UniPC: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models".
Karras spacing: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5.

In the papers' notation x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t).
"""

import numpy as np
import torch
from torch import Tensor

from ControlNet.cldm.sampler import Noise, Sampler

KARRAS_RHO = 7.0


class MultistepSampler(Sampler):
    """The timesteps of the solvers in this file.

    They are evenly spaced from the last one down, as in the papers' experiments with guidance; after the lowest comes
    the clean picture, sigma = 0.  With DDIM's timesteps, which start at 951 of 999 for 20 steps, DPM-Solver++ lands two
    to three times as far from the many-step solution (measured on the bundled model).

    karras: space sigma_t / alpha_t as Karras et al. do, and round to the nearest timestep for the network alone.
    """

    karras = False

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> list[int]:
        """Choose the timesteps and set `alphas`, `sigmas` and `lambdas` (float64, one more, in the order of sampling).

        ddim_discretize has no effect.  Raises ValueError for an eta other than 0: the equation is deterministic.
        """
        count = self.model.num_timesteps
        if not 1 <= ddim_num_steps <= count:
            raise ValueError(f"steps must be between 1 and {count}, not {ddim_num_steps}")
        if ddim_eta != 0:
            raise ValueError(f"{type(self).__name__} is deterministic: eta must be 0, not {ddim_eta}")
        cumprod = self.model.alphas_cumprod.detach().double().cpu()
        noise = ((1 - cumprod) / cumprod).sqrt().numpy()  # sigma / alpha
        if self.karras:
            highest, lowest = noise[-1] ** (1 / KARRAS_RHO), noise[0] ** (1 / KARRAS_RHO)
            chosen = np.linspace(highest, lowest, ddim_num_steps) ** KARRAS_RHO
            timesteps = np.interp(np.log(chosen), np.log(noise), np.arange(count)).round().astype(np.int64)
        else:
            timesteps = np.unique(np.linspace(0, count - 1, ddim_num_steps + 1).round().astype(np.int64))[:0:-1]
            chosen = noise[timesteps]
        chosen = torch.from_numpy(np.append(chosen, 0.0))
        self.alphas = 1 / (1 + chosen.square()).sqrt()
        self.sigmas = chosen * self.alphas
        self.lambdas = -chosen.log()  # infinite at the end
        return timesteps.tolist()

    def _x0(self, i: int, x: Tensor, eps: Tensor) -> Tensor:
        return (x - float(self.sigmas[i]) * eps) / float(self.alphas[i])


class DPMSolverSampler(MultistepSampler):
    """DPM-Solver++'s algorithm 2, on the prediction of x0.  One noise prediction a step; the last is of first order."""

    def make_schedule(self, *args, **kwargs) -> list[int]:
        self._previous_x0: Tensor | None = None
        return super().make_schedule(*args, **kwargs)

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """From timestep i to i + 1; in the paper's notation from t_{i-1} to t_i."""
        next_a, next_sigma = float(self.alphas[i + 1]), float(self.sigmas[i + 1])
        h = float(self.lambdas[i + 1] - self.lambdas[i])
        x0 = d = self._x0(i, x, eps)
        if self._previous_x0 is not None and next_sigma > 0:
            r = float(self.lambdas[i] - self.lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * self._previous_x0
        self._previous_x0 = x0
        return next_sigma / float(self.sigmas[i]) * x - next_a * np.expm1(-h) * d, x0


class KarrasDPMSolverSampler(DPMSolverSampler):
    """DPM-Solver++ 2M with Karras spacing."""

    karras = True


class UniPCSampler(MultistepSampler):
    """UniPC of order 2, on the prediction of x0, with B(h) = exp(h) - 1 (B_2 in the paper).

    Each noise prediction serves twice: it corrects the step that led to x, and predicts the next one.  The first and
    the last prediction are of first order.
    """

    def make_schedule(self, *args, **kwargs) -> list[int]:
        self._x0s: list[Tensor] = []  # of the last two steps
        self._came: tuple[Tensor, int] | None = None  # the x that the last step started from, and its order
        return super().make_schedule(*args, **kwargs)

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        x0 = self._x0(i, x, eps)
        if self._came is not None:
            x = self._advance(i - 1, *self._came, x0)
        self._x0s = [*self._x0s[-1:], x0]
        order = min(2, len(self._x0s), len(self.lambdas) - 1 - i)
        self._came = x, order
        return self._advance(i, x, order), x0

    def _advance(self, i: int, x: Tensor, order: int, end: Tensor | None = None) -> Tensor:
        """From timestep i to i + 1: the paper's equation 3, or, with x0 predicted at the end, its equation 2."""
        h = float(self.lambdas[i + 1] - self.lambdas[i])
        start, growth = self._x0s[-1], np.expm1(-h)
        slopes = []  # differences of x0, each over its distance in units of h
        if order == 2:
            r = float(self.lambdas[i - 1] - self.lambdas[i]) / h
            slopes = [(self._x0s[-2] - start) / r]
        if end is None:
            weights = [0.5]
        elif order == 1:
            weights, slopes = [0.5], [end - start]
        else:
            phi2 = growth / -h - 1
            phi3 = phi2 / -h - 1 / 2
            weights = np.linalg.solve([[1, 1], [r, 1]], [phi2 / growth, 2 * phi3 / growth]).tolist()
            slopes += [end - start]
        change = sum(weight * slope for weight, slope in zip(weights, slopes, strict=False))
        a, sigma = float(self.alphas[i + 1]), float(self.sigmas[i + 1]) / float(self.sigmas[i])
        return sigma * x - a * growth * (start + change)


class KarrasUniPCSampler(UniPCSampler):
    """UniPC with Karras spacing."""

    karras = True
