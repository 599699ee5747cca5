"""The noise schedule of the diffusion process (Ho, Jain & Abbeel 2020, "DDPM", in that paper's notation), and its
timesteps at which samplers evaluate the network.

Karras spacing: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5.
"""

import math
from dataclasses import dataclass

import numpy as np

FIRST, LAST = 0.85, 0.05
"""Parts of the timesteps at which ancestral sampling evaluates the network first and last.

Measured on digits (tests/bench/bench_codebook.py).  In earlier steps the noise hides the picture from the network so
well that noise which is chosen changes little; later ones have too little noise to choose.
"""
KARRAS_RHO = 7.0
DISTILLED_STEPS = 50
"""Timesteps that LCM and TCD are distilled to, among which theirs are chosen."""


def schedule_buffers(timesteps: int, linear_start: float, linear_end: float) -> dict[str, np.ndarray]:
    """The tables that the official checkpoint carries, by its names; each float32 of shape (timesteps,).

    beta_t: the squares of evenly spaced values, sqrt(linear_start) to sqrt(linear_end).
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)  # of q(x_{t-1} | x_t, x_0), DDPM eq. 7
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
        "logvar": np.zeros_like(betas),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def ddim_timesteps(steps: int, num_timesteps: int = 1000, discretize: str = "uniform") -> np.ndarray:
    """Ascending timesteps of a DDIM schedule, int64.

    "uniform": every c-th, c = num_timesteps // steps, plus one.  As in the published sampler, a number of steps that
    does not divide num_timesteps gives a few more (7 -> 8); one that would exceed the last timestep is set to it, where
    the published sampler fails.  "quad": exactly `steps`, denser at low noise, plus one.  "trailing": exactly `steps`,
    evenly spaced from the last timestep down (Lin et al. 2024, table 2), as models distilled to few steps expect.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be between 1 and {num_timesteps}, not {steps}")
    if discretize == "quad":
        chosen = (np.linspace(0, (num_timesteps * 0.8) ** 0.5, steps) ** 2).astype(np.int64)
    elif discretize == "uniform":
        chosen = np.arange(0, num_timesteps, num_timesteps // steps)
    elif discretize == "trailing":
        chosen = np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)).astype(np.int64)[:steps][::-1] - 2
    else:
        raise ValueError(f"ddim_discretize must be uniform, quad or trailing, not {discretize}")
    return np.minimum(chosen + 1, num_timesteps - 1)


@dataclass(frozen=True)
class Schedule:
    """timesteps: in the order of sampling, the noisiest first; alphas, sigmas: there, and where the last step leads;
    alphas_cumprod: alpha^2 of all the model's timesteps."""

    timesteps: list[int]
    alphas: list[float]
    sigmas: list[float]
    alphas_cumprod: list[float]

    @property
    def lambdas(self) -> list[float]:
        """Infinite where there is no noise."""
        pairs = zip(self.alphas, self.sigmas, strict=True)
        return [math.log(alpha / sigma) if sigma > 0 else math.inf for alpha, sigma in pairs]

    def last(self, steps: int) -> "Schedule":
        """The last steps alone."""
        first = len(self.timesteps) - steps
        return Schedule(self.timesteps[first:], self.alphas[first:], self.sigmas[first:], self.alphas_cumprod)


def _at(alphas_cumprod: list[float], timesteps: list[int], end: float) -> Schedule:
    """The schedule of these timesteps.  end: alpha^2 where the last step leads, 1 for the clean picture."""
    squares = [*(alphas_cumprod[t] for t in timesteps), end]
    return Schedule(timesteps, [a**0.5 for a in squares], [(1 - a) ** 0.5 for a in squares], alphas_cumprod)


def uniform(alphas_cumprod: list[float], steps: int, discretize: str = "uniform") -> Schedule:
    """DDIM's, as published: it may have more steps than asked for (see `ddim_timesteps`)."""
    timesteps = ddim_timesteps(steps, len(alphas_cumprod), discretize)
    return _at(alphas_cumprod, timesteps[::-1].tolist(), alphas_cumprod[0])


def trailing(alphas_cumprod: list[float], steps: int) -> Schedule:
    """From the last timestep down: for weights distilled to one to eight steps (Turbo, Hyper-SD, Lightning)."""
    return uniform(alphas_cumprod, steps, "trailing")


def ancestral(alphas_cumprod: list[float], steps: int) -> Schedule:
    """From part FIRST of the timesteps to part LAST, and then to the clean picture."""
    count = len(alphas_cumprod)
    timesteps = np.linspace(count * FIRST, count * LAST, steps).round().astype(int)
    return _at(alphas_cumprod, timesteps.tolist(), 1.0)


def evenly(alphas_cumprod: list[float], steps: int) -> Schedule:
    """Evenly spaced from the last timestep down, as in the solvers' experiments with guidance.

    With DDIM's timesteps, which start at 951 of 999 for 20 steps, DPM-Solver++ lands two to three times as far from the
    many-step solution (measured on the bundled model).
    """
    timesteps = np.unique(np.linspace(0, len(alphas_cumprod) - 1, steps + 1).round().astype(np.int64))
    return _at(alphas_cumprod, timesteps[:0:-1].tolist(), 1.0)


def karras(alphas_cumprod: list[float], steps: int) -> Schedule:
    """sigma / alpha spaced as Karras et al. do; rounded to the nearest timestep for the network alone."""
    squares = np.array(alphas_cumprod)
    ratios = np.sqrt((1 - squares) / squares)
    chosen = np.linspace(ratios[-1] ** (1 / KARRAS_RHO), ratios[0] ** (1 / KARRAS_RHO), steps) ** KARRAS_RHO
    timesteps = np.interp(np.log(chosen), np.log(ratios), np.arange(len(ratios))).round().astype(np.int64)
    chosen = np.append(chosen, 0.0)
    alphas = 1 / np.sqrt(1 + chosen**2)
    return Schedule(timesteps.tolist(), alphas.tolist(), (chosen * alphas).tolist(), alphas_cumprod)


def distilled(alphas_cumprod: list[float], steps: int) -> Schedule:
    """At most 50 steps, of LCM and TCD."""
    if steps > DISTILLED_STEPS:
        raise ValueError(f"steps must be between 1 and {DISTILLED_STEPS}, not {steps}")
    timesteps = np.arange(DISTILLED_STEPS, 0, -1) * (len(alphas_cumprod) // DISTILLED_STEPS) - 1
    chosen = np.linspace(0, DISTILLED_STEPS, steps, endpoint=False).astype(np.int64)
    return _at(alphas_cumprod, timesteps[chosen].tolist(), alphas_cumprod[0])
