"""DDIM sampling (Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models")."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ControlNet.cldm.guidance import Guided
from ControlNet.cldm.sampler import FRESH, Noise, Sampler
from ControlNet.ldm.schedule import ddim_timesteps
from ControlNet.ldm.util import extract_into_tensor


class DDIMSampler(Sampler):
    """The published sampler, and the default."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> list[int]:
        """Set `ddim_timesteps` (ascending), `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas` (float64, on the CPU).

        sigma is DDIM's equation 16: eta 0 is deterministic, 1 is DDPM.
        ddim_discretize: "uniform", "quad" or "trailing".
        """
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps, ddim_discretize)
        cumprod = self.model.alphas_cumprod.detach().double().cpu()
        steps = torch.from_numpy(self.ddim_timesteps)
        self.ddim_alphas = cumprod[steps]
        self.ddim_alphas_prev = torch.cat([cumprod[:1], self.ddim_alphas[:-1]])
        self.ddim_sigmas = _sigmas(self.ddim_alphas, self.ddim_alphas_prev, ddim_eta)
        self.ddim_sqrt_one_minus_alphas = (1 - self.ddim_alphas).sqrt()
        every = torch.cat([torch.ones(1).double(), cumprod[:-1]])
        self._all_steps = (cumprod, every, _sigmas(cumprod, every, ddim_eta))
        return self.ddim_timesteps[::-1].tolist()

    def _tables(self, use_original_steps: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_bar, the previous step's alpha_bar, sigma; of the chosen timesteps, or of all of them."""
        return self._all_steps if use_original_steps else (self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas)

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise = FRESH) -> tuple[Tensor, Tensor]:
        return self._step(len(self.ddim_alphas) - 1 - i, x, eps, noise)

    def _step(
        self, index: int, x: Tensor, eps: Tensor, noise: Noise, original: bool = False, repeat: bool = False
    ) -> tuple[Tensor, Tensor]:
        """DDIM's equation 12 from timestep number `index` (ascending) to the one before."""
        a, previous, sigma = (float(table[index]) for table in self._tables(original))
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = previous**0.5 * x0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0 or noise.always:
            x = x + sigma * noise(x, repeat)
        return x, x0

    # --- parts of the published interface, for image-to-image, inversion and scripts with a loop of their own --------

    @torch.no_grad()
    def p_sample_ddim(
        self, x: Tensor, c: dict, t: Tensor, index: int, repeat_noise: bool = False, use_original_steps: bool = False,
        quantize_denoised: bool = False, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: dict | None = None, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step, from timesteps t (B), which is number `index` of the schedule.  (next x, predicted x0)."""
        self._refuse_unsupported(quantize_denoised, dynamic_threshold, None)
        eps = Guided(self.model, c, unconditional_conditioning, unconditional_guidance_scale)(x, t)
        if score_corrector is not None:
            eps = score_corrector.modify_score(self.model, eps, x, t, c, **(corrector_kwargs or {}))
        noise = Noise(None, temperature, noise_dropout, always=True)
        return self._step(index, x, eps, noise, use_original_steps, repeat_noise)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Clean latents x0 with noise added; t (B): numbers of the schedule, or timesteps where use_original_steps."""
        alphas = self._tables(use_original_steps)[0].to(x0)
        noise = torch.randn_like(x0) if noise is None else noise
        signal, noisy = (extract_into_tensor(table.sqrt(), t, x0.shape) for table in (alphas, 1 - alphas))
        return signal * x0 + noisy * noise

    @torch.no_grad()
    def decode(
        self, x_latent: Tensor, cond: dict, t_start: int, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """Sample from noisy latents: the last t_start steps of the schedule."""
        timesteps = range(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        predict = Guided(self.model, cond, unconditional_conditioning, unconditional_guidance_scale)
        x, noise = x_latent, Noise(always=True)
        for i, index in enumerate(reversed(range(min(t_start, len(timesteps))))):
            t = torch.full((len(x),), int(timesteps[index]), device=x.device)
            x, _ = self._step(index, x, predict(x, t), noise, use_original_steps)
            if callback is not None:
                callback(i)
        return x

    @torch.no_grad()
    def encode(
        self, x0: Tensor, c: dict, t_enc: int, use_original_steps: bool = False,
        return_intermediates: int | None = None, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, callback: Callable[[int], Any] | None = None,
    ) -> tuple[Tensor, dict]:  # fmt: skip
        """DDIM inversion: from clean latents to noise, the schedule's first t_enc steps backwards.

        Returns the noisy latents and {"x_encoded", "intermediate_steps"}, with return_intermediates also
        "intermediates": about that many latents on the way.
        """
        timesteps = range(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        if t_enc > len(timesteps):
            raise ValueError(f"t_enc must be at most the schedule's {len(timesteps)} steps, not {t_enc}")
        predict = Guided(self.model, c, unconditional_conditioning, unconditional_guidance_scale)
        alphas, previous, _ = self._tables(use_original_steps)
        x, kept = x0, {}
        for i in range(t_enc):
            eps = predict(x, torch.full((len(x),), int(timesteps[i]), device=x.device))
            a, a_next = float(previous[i]), float(alphas[i])
            x = (a_next / a) ** 0.5 * x + a_next**0.5 * ((1 / a_next - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps
            if return_intermediates and (i % max(1, t_enc // return_intermediates) == 0 or i >= t_enc - 2):
                kept[i] = x
            if callback is not None:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": list(kept)}
        return x, out | ({"intermediates": list(kept.values())} if return_intermediates else {})


class TrailingDDIMSampler(DDIMSampler):
    """DDIM from the last timestep down: for weights distilled to one to eight steps (Turbo, Hyper-SD, Lightning)."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "trailing", ddim_eta: float = 0.0, verbose: bool = True
    ) -> list[int]:
        return super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)


def _sigmas(alphas: Tensor, previous: Tensor, eta: float) -> Tensor:
    return eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
