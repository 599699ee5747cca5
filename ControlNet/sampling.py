"""Samplers: from noise to latents in a few of the model's timesteps.  Each is one function.

    x: B x C x h x w, float32
    denoise(x, i): the noise that the network predicts in x at step i, guided
    noise(x, i): fresh normal noise of x's shape for step i

In the papers' notation x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t).

DDIM: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models".
DPM-Solver++: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models".
UniPC: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models".
LCM: Luo et al. 2023, "Latent Consistency Models".  TCD: Zheng et al. 2024, "Trajectory Consistency Distillation".
Karras spacing: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ControlNet.cldm.guidance import Guided
from ControlNet.ldm.schedule import ddim_timesteps

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[Tensor, int], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
T = TypeVar("T", float, Tensor)

FIRST, LAST = 0.85, 0.05
"""Parts of the timesteps at which ancestral sampling evaluates the network first and last.

Measured on digits (tests/bench/bench_codebook.py).  In earlier steps the noise hides the picture from the network so
well that noise which is chosen changes little; later ones have too little noise to choose.
"""
KARRAS_RHO = 7.0
DISTILLED_STEPS = 50
"""Timesteps that LCM and TCD are distilled to, among which theirs are chosen."""
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of LCM's consistency function


# --- schedules ------------------------------------------------------------------------------------------------------


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


def _at(alphas_cumprod: list[float], timesteps: Sequence[int], end: float) -> Schedule:
    """The schedule of these timesteps.  end: alpha^2 where the last step leads, 1 for the clean picture."""
    squares = [*(alphas_cumprod[t] for t in timesteps), end]
    alphas, sigmas = [square**0.5 for square in squares], [(1 - square) ** 0.5 for square in squares]
    return Schedule(list(timesteps), alphas, sigmas, alphas_cumprod)


def uniform(alphas_cumprod: list[float], steps: int) -> Schedule:
    """DDIM's, as published: it may have more steps than asked for (see `ddim_timesteps`)."""
    timesteps = ddim_timesteps(steps, len(alphas_cumprod), "uniform")
    return _at(alphas_cumprod, timesteps[::-1].tolist(), alphas_cumprod[0])


def trailing(alphas_cumprod: list[float], steps: int) -> Schedule:
    """From the last timestep down: for weights distilled to one to eight steps (Turbo, Hyper-SD, Lightning)."""
    timesteps = ddim_timesteps(steps, len(alphas_cumprod), "trailing")
    return _at(alphas_cumprod, timesteps[::-1].tolist(), alphas_cumprod[0])


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


# --- samplers -------------------------------------------------------------------------------------------------------


def clean(schedule: Schedule, i: int, x: Tensor, eps: Tensor) -> Tensor:
    """x_0 as predicted in step i."""
    return (x - schedule.sigmas[i] * eps) / schedule.alphas[i]


def ddim_mean(schedule: Schedule, i: int, x0: Tensor, eps: Tensor, eta: float) -> tuple[Tensor, float]:
    """What step i comes to before its noise is added (DDIM, equation 12), and the noise's sigma (equation 16)."""
    alpha, alpha_next = schedule.alphas[i : i + 2]
    sigma, sigma_next = schedule.sigmas[i : i + 2]
    fresh = eta * sigma_next / sigma * (1 - alpha**2 / alpha_next**2) ** 0.5 if eta > 0 else 0.0
    return alpha_next * x0 + max(sigma_next**2 - fresh**2, 0.0) ** 0.5 * eps, fresh


def sample_ddim(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM.  eta 0 is deterministic, 1 is DDPM's ancestral sampling."""
    for i in range(len(schedule.timesteps)):
        eps = denoise(x, i)
        x, fresh = ddim_mean(schedule, i, clean(schedule, i, x, eps), eps, eta)
        if fresh > 0:
            x = x + fresh * noise(x, i)
    return x


def sample_ancestral(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 1.0) -> Tensor:
    return sample_ddim(denoise, x, schedule, noise, eta=1.0)


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Tensor:
    """DPM-Solver++'s algorithm 2, on the prediction of x_0; the last step is of first order.  Deterministic."""
    alphas, sigmas, lambdas = schedule.alphas, schedule.sigmas, schedule.lambdas
    previous: Tensor | None = None  # x_0 as predicted in the step before
    for i in range(len(schedule.timesteps)):
        d = x0 = clean(schedule, i, x, denoise(x, i))
        h = lambdas[i + 1] - lambdas[i]
        if previous is not None and sigmas[i + 1] > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * d
        previous = x0
    return x


def sample_unipc(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Tensor:
    """UniPC of order 2, on the prediction of x_0, with B(h) = exp(h) - 1 (B_2 in the paper).  Deterministic.

    Each prediction serves twice: it corrects the step that led to x (equation 2), and predicts the next one
    (equation 3).  The first and the last step are of first order.
    """
    alphas, sigmas, lambdas = schedule.alphas, schedule.sigmas, schedule.lambdas

    def integrate(i: int, x: Tensor, x0: Tensor) -> Tensor:
        """From timestep i to i + 1 with a constant x_0."""
        return sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(lambdas[i] - lambdas[i + 1]) * x0

    start, x0_before, d1, r = x, x, None, 0.0  # of the step before: its x, its x_0, and D_1 / r where it had order 2
    for i in range(len(schedule.timesteps)):
        x0 = clean(schedule, i, x, denoise(x, i))
        if i > 0:
            d2 = x0 - x0_before
            change = 0.5 * d2
            if d1 is not None:
                rho1, rho2 = _corrector_weights(r, lambdas[i] - lambdas[i - 1])
                change = rho1 * d1 + rho2 * d2
            x = integrate(i - 1, start, x0_before + change)
        start, estimate, d1 = x, x0, None
        if i > 0 and sigmas[i + 1] > 0:
            r = (lambdas[i - 1] - lambdas[i]) / (lambdas[i + 1] - lambdas[i])
            d1 = (x0_before - x0) / r
            estimate = x0 + 0.5 * d1
        x, x0_before = integrate(i, start, estimate), x0
    return x


def _corrector_weights(r: float, h: float) -> list[float]:
    """UniC's rho_1 and rho_2: R_2 rho = phi_2 / B(h) for the prediction of x_0."""
    growth = math.expm1(-h)
    phi2 = growth / -h - 1
    phi3 = phi2 / -h - 1 / 2
    return np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi2 / growth, 2 * phi3 / growth])).tolist()


def boundary(t: T) -> tuple[T, T]:
    """(factor of x, factor of the predicted x_0) in LCM's consistency function at timestep t; (1, 0) at 0."""
    t = t * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2), t / (t**2 + SIGMA_DATA**2) ** 0.5


def sample_lcm(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Tensor:
    """Each step predicts the clean latents and adds fresh noise of the next timestep's level; the last adds none."""
    for i, t in enumerate(schedule.timesteps):
        skip, out = boundary(float(t))
        x0 = out * clean(schedule, i, x, denoise(x, i)) + skip * x
        if i + 1 == len(schedule.timesteps):
            return x0
        x = schedule.alphas[i + 1] * x0 + schedule.sigmas[i + 1] * noise(x, i)
    return x


def sample_tcd(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Tensor:
    """Each step goes to timestep s = (1 - eta) * the next one, and with fresh noise back up to the next one.

    eta is the paper's gamma: 0 is deterministic, 1 is nearly LCM.
    """
    for i, end in enumerate([*schedule.timesteps[1:], 0]):
        a, a_s = schedule.alphas_cumprod[end], schedule.alphas_cumprod[int((1 - eta) * end)]
        eps = denoise(x, i)
        x = a_s**0.5 * clean(schedule, i, x, eps) + (1 - a_s) ** 0.5 * eps
        if eta > 0 and i + 1 < len(schedule.timesteps):
            x = (a / a_s) ** 0.5 * x + (1 - a / a_s) ** 0.5 * noise(x, i)
    return x


class Sampler(NamedTuple):
    """Where its steps lie, what it does there, and whether it takes an eta."""

    schedule: Callable[[list[float], int], Schedule]
    sample: Callable[[Denoise, Tensor, Schedule, Noise, float], Tensor]
    has_eta: bool = False


SAMPLERS = {
    "ddim": Sampler(uniform, sample_ddim, has_eta=True),
    "ddim-trailing": Sampler(trailing, sample_ddim, has_eta=True),
    "ancestral": Sampler(ancestral, sample_ancestral),
    "dpm++2m": Sampler(evenly, sample_dpmpp_2m),
    "dpm++2m-karras": Sampler(karras, sample_dpmpp_2m),
    "unipc": Sampler(evenly, sample_unipc),
    "unipc-karras": Sampler(karras, sample_unipc),
    "lcm": Sampler(distilled, sample_lcm),
    "tcd": Sampler(distilled, sample_tcd, has_eta=True),
}


# --- a model's latents ----------------------------------------------------------------------------------------------


def draw(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Normal noise of this shape, on the generator's device.

    generator: of all items, or a list with one for each item, whose noise then depends on its own alone; None for
    torch's global one.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([draw((1, *shape[1:]), each, device).to(device) for each in generator])
    return torch.randn(shape, generator=generator, device=device if generator is None else generator.device)


def fresh_noise(generator: Generators) -> Noise:
    """Noise that is drawn as `draw` does."""
    return lambda x, i: draw(tuple(x.shape), generator, x.device).to(x)


def make_schedule(sampler: str, model, steps: int) -> Schedule:
    """The schedule of a sampler in SAMPLERS.  model: with alphas_cumprod.  Raises ValueError for too many steps."""
    alphas_cumprod = model.alphas_cumprod.detach().double().cpu().tolist()
    if not 1 <= steps <= len(alphas_cumprod):
        raise ValueError(f"steps must be between 1 and {len(alphas_cumprod)}, not {steps}")
    return SAMPLERS[sampler].schedule(alphas_cumprod, steps)


@torch.no_grad()
def sample_latents(
    model, sampler: str, schedule: Schedule, x: Tensor, cond: dict, uncond: dict | None = None, *, noise: Noise,
    scales: Sequence[float], eta: float = 0.0, reuse_every: int = 1, start: Tensor | None = None, strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sample latents, B x C x h x w in float32.

    model: a ControlLDM; schedule: `make_schedule(sampler, ...)`; x: the initial noise, on any device; cond, uncond: as
    ControlLDM.apply_model takes them; scales: of guidance, one a step; eta: share of fresh noise, of some samplers;
    reuse_every: compute the UNet's deep features in every n-th step alone (see ControlNet.ldm.unet.DeepFeatures);
    start: clean latents to begin with, x being the noise in them, in the last `strength` (0 to 1) of the steps, at
    least one.  Raises ValueError for an eta that the sampler does not take.
    """
    if not 0 <= eta <= 1 or (eta and not SAMPLERS[sampler].has_eta):
        raise ValueError(f"eta {eta} is not for the sampler {sampler}")
    x = x.to(model.device, torch.float32)
    if start is not None:
        count = len(schedule.timesteps)
        schedule = schedule.last(max(1, round(strength * count)))
        scales = scales[count - len(schedule.timesteps) :]
        x = model.q_sample(start.to(x), _filled(x, schedule.timesteps[0]), x)
    predict = Guided(model, cond, uncond, reusing=reuse_every > 1)

    def denoise(x: Tensor, i: int) -> Tensor:
        return predict(x, _filled(x, schedule.timesteps[i]), scales[i], reuse=i % reuse_every > 0)

    return SAMPLERS[sampler].sample(denoise, x, schedule, noise, eta)


def _filled(x: Tensor, timestep: int) -> Tensor:
    return torch.full((len(x),), timestep, device=x.device, dtype=torch.int64)
