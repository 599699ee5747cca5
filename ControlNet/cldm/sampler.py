"""What all samplers have in common: from noise to latents, one guided noise prediction a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ControlNet.cldm.guidance import Guided

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Normal noise of this shape, on the generator's device; generator: as Noise has it."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([draw((1, *shape[1:]), each, device).to(device) for each in generator])
    return torch.randn(shape, generator=generator, device=device if generator is None else generator.device)


@dataclass(frozen=True)
class Noise:
    """Fresh noise for steps that need some.

    generator: of all items, or a list with one for each item, whose noise then depends on its own generator alone;
    None for torch's global one; temperature: factor; dropout: share of the values that are set to 0;
    always: draw at every step, used or not, as the published sampler does, so that later draws are the published ones.
    """

    generator: Generators = None
    temperature: float = 1.0
    dropout: float = 0.0
    always: bool = False

    def __call__(self, x: Tensor, repeat: bool = False) -> Tensor:
        """Normal noise of x's shape, the same for all items of the batch where `repeat`."""
        shape = (1, *x.shape[1:]) if repeat else tuple(x.shape)
        noise = draw(shape, self.generator, x.device).to(x).expand(x.shape) * self.temperature
        return F.dropout(noise, self.dropout) if self.dropout else noise


FRESH = Noise()


class Sampler(ABC):
    """Turns noise into latents, in a few of the schedule's timesteps.

    model: a ControlLDM, or anything with its apply_model, num_timesteps, alphas_cumprod and device.
    """

    def __init__(self, model, schedule: str = "linear", **kwargs):
        if schedule != "linear" or kwargs:
            raise ValueError('schedule must be "linear", and there are no other options')
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps

    @abstractmethod
    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> list[int]:
        """Choose the timesteps and return them in the order of sampling, the noisiest first.

        ddim_num_steps: how many steps; ddim_discretize: their spacing; ddim_eta: the share of fresh noise a step.
        """

    @abstractmethod
    def step(self, i: int, x: Tensor, eps: Tensor, noise: Noise = FRESH) -> tuple[Tensor, Tensor]:
        """Step number i, with the noise eps predicted in x.  Returns the next x and the predicted clean x0."""

    @torch.no_grad()
    def sample(
        self, S: int, batch_size: int, shape: Sequence[int], conditioning: dict,
        callback: Callable[[int], Any] | None = None, normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None, quantize_x0: bool = False, eta: float = 0.0,
        mask: Tensor | None = None, x0: Tensor | None = None, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: dict | None = None, verbose: bool = True,
        x_T: Tensor | None = None, log_every_t: int = 100, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: dict | None = None, dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None, generator: Generators = None, reuse_every: int = 1,
        start: Tensor | None = None, strength: float = 1.0,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:  # fmt: skip
        """Sample latents.  The arguments are the published sampler's, and generator, reuse_every, start and strength.

        S: number of steps; shape: (4, H // 8, W // 8); conditioning, unconditional_conditioning: as
        ControlLDM.apply_model takes them; x_T: the initial noise, batch_size x shape, drawn if None; eta: 0 is
        deterministic; temperature, noise_dropout: of fresh noise (see Noise); mask, x0: keep the latents x0 where mask
        is 1; score_corrector: its modify_score(model, eps, x, t, conditioning, **corrector_kwargs) replaces eps;
        ucg_schedule: a guidance scale for each step; callback(i), img_callback(predicted x0, i): called after step i;
        verbose: show a progress bar; generator: for all noise: one, a list with one for each item of the batch (then an
        item does not depend on the others), or None for torch's global one; reuse_every: compute the UNet's deep
        features in every n-th step alone (see ControlNet.ldm.unet.DeepFeatures); start: clean latents (batch_size x
        shape) to begin with, x_T being the noise in them, in the last `strength` (0 to 1) of the steps, at least one.

        Returns the latents, batch_size x shape, and {"x_inter": [...], "pred_x0": [...]}, one every log_every_t steps.
        Raises ValueError for what is not supported: quantize_x0, dynamic_threshold, normals_sequence.
        """
        self._refuse_unsupported(quantize_x0, dynamic_threshold, normals_sequence)
        if mask is not None and x0 is None:
            raise ValueError("mask needs x0, the latents to keep where it is 1")
        timesteps = self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        if ucg_schedule is not None and len(ucg_schedule) != len(timesteps):
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(timesteps)} steps")
        as_published = not isinstance(generator, Sequence) and (x_T is None or mask is not None)
        noise = Noise(generator, temperature, noise_dropout, always=as_published)
        x = self._initial(x_T, (batch_size, *shape), generator)
        scale, reusing = unconditional_guidance_scale, reuse_every > 1
        predict = Guided(self.model, conditioning, unconditional_conditioning, scale, reusing)
        first = 0 if start is None else len(timesteps) - max(1, round(strength * len(timesteps)))
        if start is not None:
            x = self.model.q_sample(start.to(x), torch.full((batch_size,), timesteps[first], device=x.device), x)
        history = {"x_inter": [x], "pred_x0": [x]}
        bar = tqdm(timesteps[first:], type(self).__name__, leave=False, disable=not verbose)
        for i, timestep in enumerate(bar, first):
            t = torch.full((batch_size,), timestep, device=x.device, dtype=torch.int64)
            if mask is not None:
                x = self.model.q_sample(x0, t, Noise(generator)(x0)) * mask + (1 - mask) * x
            if ucg_schedule is not None:
                predict.scale = ucg_schedule[i]
            eps = predict(x, t, reuse=(i - first) % reuse_every > 0)
            if score_corrector is not None:
                eps = score_corrector.modify_score(self.model, eps, x, t, conditioning, **(corrector_kwargs or {}))
            x, predicted = self.step(i, x, eps, noise)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(predicted, i)
            if (len(timesteps) - 1 - i) % log_every_t == 0 or i == first:
                history["x_inter"].append(x)
                history["pred_x0"].append(predicted)
        return x, history

    def _initial(self, x_T: Tensor | None, shape: tuple[int, ...], generator: Generators) -> Tensor:
        if x_T is None:
            x_T = draw(shape, generator, self.model.device)
        if x_T.shape != shape:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, not {shape}")
        return x_T.to(self.model.device, torch.float32)

    @staticmethod
    def _refuse_unsupported(quantize_x0: bool, dynamic_threshold: Any, normals_sequence: Any) -> None:
        if quantize_x0:
            raise ValueError("quantize_x0 needs an autoencoder with a codebook; AutoencoderKL has none")
        if dynamic_threshold is not None:
            raise ValueError("dynamic_threshold is not supported: the published sampler does not implement it either")
        if normals_sequence is not None:
            raise ValueError("normals_sequence is not supported: the published sampler ignores it")
