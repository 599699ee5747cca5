"""DDIM sampling (Song, Meng & Ermon 2021) with classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.ldm.schedule import ddim_timesteps


class DDIMSampler:
    """Turns noise into latents, in a few of the schedule's timesteps."""

    def __init__(self, model: ControlLDM):
        self.model = model

    def make_schedule(self, S: int, eta: float = 0.0) -> None:
        """Choose the timesteps and set `ddim_timesteps` (ascending), `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas`.

        sigma is DDIM's equation 16: eta 0 is deterministic, 1 is DDPM.
        """
        self.ddim_timesteps = ddim_timesteps(S, self.model.num_timesteps)
        cumprod = self.model.alphas_cumprod.detach().double().cpu()
        steps = torch.from_numpy(self.ddim_timesteps)
        alphas = cumprod[steps]
        previous = torch.cat([cumprod[:1], alphas[:-1]])
        self.ddim_alphas, self.ddim_alphas_prev = alphas, previous
        self.ddim_sigmas = eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()

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
        self.make_schedule(S, eta)
        if x_T is None:
            x_T = torch.randn((batch_size, *shape), generator=generator, device=model.device)
        if x_T.shape != (batch_size, *shape):
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, not {(batch_size, *shape)}")
        x = x_T.to(model.device, torch.float32)
        predict = _Guided(model, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        way = {"x_inter": [x], "pred_x0": [x]}
        order = reversed(range(len(self.ddim_timesteps)))
        for i, index in enumerate(tqdm(order, "DDIM", len(self.ddim_timesteps), leave=False, disable=not verbose)):
            a, previous, sigma = (
                float(table[index]) for table in (self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas)
            )
            t = torch.full((batch_size,), int(self.ddim_timesteps[index]), device=model.device, dtype=torch.int64)
            eps = predict(x, t)
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            x = previous**0.5 * x0 + (1 - previous - sigma**2) ** 0.5 * eps  # DDIM eq. 12
            if sigma > 0:
                x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
            if callback is not None:
                callback(i)
            if index % log_every_t == 0 or index == len(self.ddim_timesteps) - 1:
                way["x_inter"].append(x)
                way["pred_x0"].append(x0)
        return x, way


class _Guided:
    """eps = eps_uncond + scale * (eps_cond - eps_uncond); the latents stay float32 whatever the networks compute in.

    Both branches go through the networks as one batch of twice the size, unless only one of them has control (guess
    mode).  What the hint encoder makes of the edge maps is the same at every step: computed once.
    """

    def __init__(self, model: ControlLDM, cond: dict, uncond: dict | None, scale: float):
        self.model, self.scale = model, scale
        self.guided = uncond is not None and scale != 1.0
        if not self.guided:
            self.branches = [self._prepare(cond)]
        elif (cond["c_concat"] is None) == (uncond["c_concat"] is None):
            self.branches = [self._prepare(self._joined(cond, uncond))]
        else:
            self.branches = [self._prepare(cond), self._prepare(uncond)]

    def _prepare(self, cond: dict) -> dict:
        if cond["c_concat"] is None:
            return cond
        return {**cond, "hint_features": self._hint_features(cond["c_concat"])}

    def _hint_features(self, hints: list[Tensor]) -> Tensor:
        hint = torch.cat(hints, dim=1).to(self.model.device, self.model.dtype)
        return self.model.control_model.encode_hint(hint)

    @staticmethod
    def _joined(cond: dict, uncond: dict) -> dict:
        joined = {
            "c_concat": None,
            "c_crossattn": [torch.cat(pair) for pair in zip(cond["c_crossattn"], uncond["c_crossattn"], strict=True)],
        }
        if cond["c_concat"] is not None:
            joined["c_concat"] = [torch.cat(pair) for pair in zip(cond["c_concat"], uncond["c_concat"], strict=True)]
        return joined

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        y = x.to(self.model.dtype)
        if not self.guided:
            return self.model.apply_model(y, t, self.branches[0]).float()
        if len(self.branches) == 1:
            both = self.model.apply_model(torch.cat([y, y]), torch.cat([t, t]), self.branches[0])
            eps, eps_uncond = both.float().chunk(2)
        else:
            eps, eps_uncond = (self.model.apply_model(y, t, cond).float() for cond in self.branches)
        return eps_uncond + self.scale * (eps - eps_uncond)
