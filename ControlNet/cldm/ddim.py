"""DDIM sampling (Song, Meng & Ermon 2021)."""

import torch
from torch import Tensor

from ControlNet.cldm.sampler import Sampler
from ControlNet.ldm.schedule import ddim_timesteps


class DDIMSampler(Sampler):
    """The published sampler, and the default."""

    def make_schedule(self, S: int, eta: float = 0.0) -> list[int]:
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
        return self.ddim_timesteps[::-1].tolist()

    def step(self, i: int, x: Tensor, eps: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """DDIM's equation 12."""
        tables = (self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas)
        a, previous, sigma = (float(table[len(table) - 1 - i]) for table in tables)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = previous**0.5 * x0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        return x, x0
