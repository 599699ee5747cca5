"""The published sampler, for scripts: DDIM (Song, Meng & Ermon 2021) with the published arguments.

compress/ samples by the functions of ControlNet/sampling.py; `sample_ddim` there gives the same latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ControlNet.ldm.schedule import ddim_timesteps
from ControlNet.ldm.util import extract_into_tensor
from ControlNet.sampling import Guided, filled


class DDIMSampler:
    """model: a ControlLDM, or anything with its apply_model, q_sample, num_timesteps, alphas_cumprod and device."""

    def __init__(self, model, schedule: str = "linear", **kwargs):
        if schedule != "linear" or kwargs:
            raise ValueError('schedule must be "linear", and there are no other options')
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set `ddim_timesteps` (ascending), `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas` (float64, on the CPU).

        sigma is DDIM's equation 16: eta 0 is deterministic, 1 is DDPM.
        ddim_discretize: "uniform", "quad" or "trailing".
        """
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps, ddim_discretize)
        cumprod = self.model.alphas_cumprod.detach().double().cpu()
        alphas = cumprod[torch.from_numpy(self.ddim_timesteps)]
        self._chosen_steps = _tables(alphas, cumprod[:1], ddim_eta)
        self._all_steps = _tables(cumprod, torch.ones(1).double(), ddim_eta)
        self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas = self._chosen_steps
        self.ddim_sqrt_one_minus_alphas = (1 - alphas).sqrt()

    @torch.no_grad()
    def sample(
        self, S: int, batch_size: int, shape: Sequence[int], conditioning: dict,
        callback: Callable[[int], Any] | None = None, normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None, quantize_x0: bool = False, eta: float = 0.0,
        mask: Tensor | None = None, x0: Tensor | None = None, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: dict | None = None, verbose: bool = True,
        x_T: Tensor | None = None, log_every_t: int = 100, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:  # fmt: skip
        """Sample latents.

        S: number of steps; shape: (4, H // 8, W // 8); conditioning, unconditional_conditioning: as
        ControlLDM.apply_model takes them; x_T: the initial noise, batch_size x shape, drawn if None; eta: 0 is
        deterministic; temperature: factor of fresh noise; noise_dropout: share of its values that are set to 0; mask,
        x0: keep the latents x0 where mask is 1; score_corrector: its modify_score(model, eps, x, t, conditioning,
        **corrector_kwargs) replaces eps; ucg_schedule: a guidance scale for each step; callback(i), img_callback(
        predicted x0, i): called after step i; verbose: show a progress bar.

        Returns the latents, batch_size x shape, and {"x_inter": [...], "pred_x0": [...]}, one every log_every_t steps.
        Raises ValueError for what is not supported: quantize_x0, dynamic_threshold, normals_sequence.
        """
        _refuse_unsupported(quantize_x0, dynamic_threshold, normals_sequence)
        if mask is not None and x0 is None:
            raise ValueError("mask needs x0, the latents to keep where it is 1")
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        count = len(self.ddim_timesteps)
        scales = [unconditional_guidance_scale] * count if ucg_schedule is None else ucg_schedule
        if len(scales) != count:
            raise ValueError(f"ucg_schedule has {len(scales)} scales for {count} steps")
        x = torch.randn((batch_size, *shape), device=self.model.device) if x_T is None else x_T
        if x.shape != (batch_size, *shape):
            raise ValueError(f"x_T has shape {tuple(x.shape)}, not {(batch_size, *shape)}")
        x = x.to(self.model.device, torch.float32)
        always_draw = x_T is None or mask is not None
        predict = Guided(self.model, conditioning, unconditional_conditioning)
        history = {"x_inter": [x], "pred_x0": [x]}
        for i in tqdm(range(count), type(self).__name__, leave=False, disable=not verbose):
            index = count - 1 - i
            t = filled(x, int(self.ddim_timesteps[index]))
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1 - mask) * x
            eps = predict(x, t, scales[i])
            if score_corrector is not None:
                eps = score_corrector.modify_score(self.model, eps, x, t, conditioning, **(corrector_kwargs or {}))
            x, predicted = self._step(index, x, eps, False, temperature, noise_dropout, always_draw=always_draw)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(predicted, i)
            if index % log_every_t == 0 or i == 0:
                history["x_inter"].append(x)
                history["pred_x0"].append(predicted)
        return x, history

    # --- for image-to-image, inversion and scripts with a loop of their own ------------------------------------------

    @torch.no_grad()
    def p_sample_ddim(
        self, x: Tensor, c: dict, t: Tensor, index: int, repeat_noise: bool = False, use_original_steps: bool = False,
        quantize_denoised: bool = False, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: dict | None = None, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step, from timesteps t (B), which is number `index` of the schedule.  (next x, predicted x0)."""
        _refuse_unsupported(quantize_denoised, dynamic_threshold, None)
        eps = Guided(self.model, c, unconditional_conditioning)(x, t, unconditional_guidance_scale)
        if score_corrector is not None:
            eps = score_corrector.modify_score(self.model, eps, x, t, c, **(corrector_kwargs or {}))
        return self._step(index, x, eps, use_original_steps, temperature, noise_dropout, repeat_noise)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Clean latents x0 with noise added; t (B): numbers of the schedule, or timesteps where use_original_steps."""
        alphas = (self._all_steps if use_original_steps else self._chosen_steps)[0].to(x0)
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
        predict = Guided(self.model, cond, unconditional_conditioning)
        x = x_latent
        for i, index in enumerate(reversed(range(min(t_start, len(timesteps))))):
            eps = predict(x, int(timesteps[index]), unconditional_guidance_scale)
            x, _ = self._step(index, x, eps, use_original_steps)
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
        predict = Guided(self.model, c, unconditional_conditioning)
        alphas, previous, _ = self._all_steps if use_original_steps else self._chosen_steps
        x, on_the_way = x0, {}
        for i in range(t_enc):
            eps = predict(x, int(timesteps[i]), unconditional_guidance_scale)
            a, a_next = float(previous[i]), float(alphas[i])
            x = (a_next / a) ** 0.5 * x + a_next**0.5 * ((1 / a_next - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps
            if return_intermediates and (i % max(1, t_enc // return_intermediates) == 0 or i >= t_enc - 2):
                on_the_way[i] = x
            if callback is not None:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": list(on_the_way)}
        return x, out | ({"intermediates": list(on_the_way.values())} if return_intermediates else {})

    def _step(
        self, index: int, x: Tensor, eps: Tensor, original: bool = False, temperature: float = 1.0,
        dropout: float = 0.0, repeat_noise: bool = False, always_draw: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """DDIM's equation 12 from timestep number `index` (ascending) to the one before.

        always_draw: draw noise also where none is added, as published, so that later draws are the published ones.
        """
        tables = self._all_steps if original else self._chosen_steps
        a, previous, sigma = (float(table[index]) for table in tables)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x_next = previous**0.5 * x0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0 or always_draw:
            shape = (1, *x.shape[1:]) if repeat_noise else x.shape
            noise = torch.randn(shape, device=x.device).to(x).expand(x.shape) * temperature
            x_next = x_next + sigma * (F.dropout(noise, dropout) if dropout else noise)
        return x_next, x0


def _tables(alphas: Tensor, before: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha_bar of each step, that of the step before, sigma).  before: alpha_bar before the first step."""
    previous = torch.cat([before, alphas[:-1]])
    return alphas, previous, eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()


def _refuse_unsupported(quantize_x0: bool, dynamic_threshold: Any, normals_sequence: Any) -> None:
    if quantize_x0:
        raise ValueError("quantize_x0 needs an autoencoder with a codebook; AutoencoderKL has none")
    for name, value in (("dynamic_threshold", dynamic_threshold), ("normals_sequence", normals_sequence)):
        if value is not None:
            raise ValueError(f"{name} is not supported: the published sampler does not implement it either")
