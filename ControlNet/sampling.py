"""Samplers: from noise to latents in a few of the model's timesteps.  Each is one function.

    x: B x C x h x w, float32
    denoise(x, i): the noise that the network predicts in x at step i, guided
    noise(x, i): fresh normal noise of x's shape for step i

In the papers' notation x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t).

DDIM: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models".
DPM-Solver++: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models".
UniPC: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models".
LCM: Luo et al. 2023, "Latent Consistency Models".  TCD: Zheng et al. 2024, "Trajectory Consistency Distillation".
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ControlNet.ldm.schedule import Schedule, ancestral, distilled, evenly, karras, trailing, uniform
from ControlNet.ldm.unet import DeepFeatures

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[Tensor, int], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
T = TypeVar("T", float, Tensor)

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of LCM's consistency function


# --- the guided denoiser --------------------------------------------------------------------------------------------


class Guided:
    """Classifier-free guidance: eps = eps_uncond + scale * (eps_cond - eps_uncond) (Ho & Salimans 2022).

    cond, uncond: as ControlLDM.apply_model takes them.  Without uncond, or at scale 1, the unconditional branch is not
    computed.  Both branches run as one batch of twice the size, unless only one of them has control (guess mode).  A
    hint's features are the same at every step and in both branches: they are computed once.
    reusing: keep the UNet's deep features for calls that reuse them (see DeepFeatures).
    """

    def __init__(self, model, cond: dict, uncond: dict | None = None, reusing: bool = False):
        _check_conditioning(cond, "conditioning")
        if uncond is not None:
            _check_conditioning(uncond, "unconditional_conditioning")
        self.model, self.reusing = model, reusing
        self._cond, self._uncond = cond, uncond
        self._features: dict[tuple[int, ...], Tensor] = {}  # ids of a hint's tensors -> its features
        self._conditional = self._with_features(cond)  # what is computed without guidance

    def __call__(self, x: Tensor, t: Tensor | int, scale: float = 1.0, reuse: bool = False) -> Tensor:
        """The guided noise in x (B x 4 x h x w) at timesteps t (B, or one for all): float32, x's shape.

        x is float32, whatever the networks compute in.
        reuse: take the deep features from the last call that computed them; no effect unless `reusing`.
        """
        y, t = x.to(self.model.dtype), filled(x, t) if isinstance(t, int) else t
        if self._uncond is None or scale == 1.0:
            return self._predict(y, t, self._conditional, reuse)
        if len(self._branches) == 1:
            both = self._predict(torch.cat([y, y]), torch.cat([t, t]), self._branches[0], reuse)
            eps, eps_uncond = both.chunk(2)
        else:
            eps, eps_uncond = (self._predict(y, t, branch, reuse) for branch in self._branches)
        return eps_uncond + scale * (eps - eps_uncond)

    def _predict(self, y: Tensor, t: Tensor, branch: dict[str, Any], reuse: bool) -> Tensor:
        if self.reusing:
            branch["deep"].reuse = reuse
        return self.model.apply_model(y, t, branch).float()

    @cached_property
    def _branches(self) -> list[dict[str, Any]]:
        """What is computed with guidance: one batch of both branches where that is possible, else both."""
        assert self._uncond is not None
        cond, uncond = self._with_features(self._cond), self._with_features(self._uncond)
        if (cond["c_concat"] is None) != (uncond["c_concat"] is None):
            return [cond, uncond]
        both = {**cond, "c_crossattn": _pairs(cond["c_crossattn"], uncond["c_crossattn"])}
        if cond["c_concat"] is not None:
            both["c_concat"] = _pairs(cond["c_concat"], uncond["c_concat"])
            both["hint_features"] = torch.cat([cond["hint_features"], uncond["hint_features"]])
        return [both]

    def _with_features(self, cond: dict) -> dict[str, Any]:
        branch = {"c_concat": None, **cond, "deep": DeepFeatures() if self.reusing else None}
        if branch["c_concat"] is not None:
            key = tuple(map(id, cond["c_concat"]))
            if key not in self._features:
                hint = torch.cat(cond["c_concat"], dim=1).to(self.model.device, self.model.dtype)
                self._features[key] = self.model.control_model.encode_hint(hint)
            branch["hint_features"] = self._features[key]
        return branch


def _check_conditioning(conditioning: Any, name: str) -> None:
    if not isinstance(conditioning, dict) or not isinstance(conditioning.get("c_crossattn"), list | tuple):
        raise ValueError(f'{name} must be {{"c_concat": [hint] or None, "c_crossattn": [context]}}')


def _pairs(cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of both branches as those of one batch, the conditional one first."""
    return [torch.cat(pair) for pair in zip(cond, uncond, strict=True)]


def filled(x: Tensor, timestep: int) -> Tensor:
    """The timestep for each item of x: B, int64."""
    return torch.full((len(x),), timestep, device=x.device, dtype=torch.int64)


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
        x = model.q_sample(start.to(x), filled(x, schedule.timesteps[0]), x)
    predict = Guided(model, cond, uncond, reusing=reuse_every > 1)

    def denoise(x: Tensor, i: int) -> Tensor:
        return predict(x, schedule.timesteps[i], scales[i], reuse=i % reuse_every > 0)

    return SAMPLERS[sampler].sample(denoise, x, schedule, noise, eta)
