"""The noise schedule of the diffusion process (Ho, Jain & Abbeel 2020, "DDPM", in that paper's notation)."""

import numpy as np


def scaled_linear_betas(timesteps: int, linear_start: float, linear_end: float) -> np.ndarray:
    """beta_t: the squares of evenly spaced values, sqrt(linear_start) to sqrt(linear_end); float64, (timesteps,)."""
    return np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2


def schedule_buffers(betas: np.ndarray) -> dict[str, np.ndarray]:
    """The tables that the official checkpoint carries, by its names; each float32 of shape (timesteps,)."""
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
