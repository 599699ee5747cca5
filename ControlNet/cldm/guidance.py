"""Classifier-free guidance (Ho & Salimans 2022): the noise prediction that every sampler steps along."""

import torch
from torch import Tensor

from ControlNet.cldm.cldm import ControlLDM


class Guided:
    """eps = eps_uncond + scale * (eps_cond - eps_uncond); the latents stay float32 whatever the networks compute in.

    cond, uncond: as ControlLDM.apply_model takes them; uncond None or scale 1 means no guidance, and one branch.
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
        """The guided noise in x (float32, B x 4 x h x w) at timesteps t (B): float32, x's shape."""
        y = x.to(self.model.dtype)
        if not self.guided:
            return self.model.apply_model(y, t, self.branches[0]).float()
        if len(self.branches) == 1:
            both = self.model.apply_model(torch.cat([y, y]), torch.cat([t, t]), self.branches[0])
            eps, eps_uncond = both.float().chunk(2)
        else:
            eps, eps_uncond = (self.model.apply_model(y, t, cond).float() for cond in self.branches)
        return eps_uncond + self.scale * (eps - eps_uncond)
