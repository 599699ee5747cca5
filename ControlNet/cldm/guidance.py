"""Classifier-free guidance (Ho & Salimans 2022): the noise prediction that every sampler steps along."""

import torch
from torch import Tensor

from ControlNet.ldm.unet import DeepFeatures


class Guided:
    """eps = eps_uncond + scale * (eps_cond - eps_uncond); the latents stay float32 whatever the networks compute in.

    cond, uncond: as ControlLDM.apply_model takes them.  Without uncond, or at scale 1, the unconditional branch is not
    computed.  `scale` may change between calls.  Both branches run as one batch of twice the size, unless only one of
    them has control (guess mode).  A hint's features are the same at every step and in both branches: they are computed
    once.  reusing: keep the UNet's deep features for calls that reuse them (see DeepFeatures).
    """

    def __init__(self, model, cond: dict, uncond: dict | None = None, scale: float = 1.0, reusing: bool = False):
        for name, given in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            if not (given is None and name.startswith("un")) and not _is_conditioning(given):
                raise ValueError(f'{name} must be {{"c_concat": [hint] or None, "c_crossattn": [context]}}')
        self.model, self.scale, self._reusing = model, scale, reusing
        self._cond, self._uncond = cond, uncond
        self._prepared: dict[bool, list[dict]] = {}  # guided or not -> the branches that are computed
        self._features: dict[tuple[int, ...], Tensor] = {}  # ids of a hint's tensors -> its features

    def _branches(self, guided: bool) -> list[dict]:
        if guided not in self._prepared:
            branches = [self._with_features(cond) for cond in [self._cond, self._uncond][: 1 + guided]]
            if guided and (self._cond.get("c_concat") is None) == (self._uncond.get("c_concat") is None):
                branches = [_joined(*branches)]
            self._prepared[guided] = [
                {**branch, "deep": DeepFeatures() if self._reusing else None} for branch in branches
            ]
        return self._prepared[guided]

    def _with_features(self, cond: dict) -> dict:
        hints = cond.get("c_concat")
        if hints is None:
            return {**cond, "c_concat": None}
        key = tuple(map(id, hints))
        if key not in self._features:
            hint = torch.cat(hints, dim=1).to(self.model.device, self.model.dtype)
            self._features[key] = self.model.control_model.encode_hint(hint)
        return {**cond, "hint_features": self._features[key]}

    def __call__(self, x: Tensor, t: Tensor, reuse: bool = False) -> Tensor:
        """The guided noise in x (float32, B x 4 x h x w) at timesteps t (B): float32, x's shape.

        reuse: take the deep features from the last call that computed them; no effect unless `reusing`.
        """
        y = x.to(self.model.dtype)
        guided = self._uncond is not None and self.scale != 1.0
        branches = self._branches(guided)
        for branch in branches * self._reusing:
            branch["deep"].reuse = reuse
        if not guided:
            return self.model.apply_model(y, t, branches[0]).float()
        if len(branches) == 1:
            both = self.model.apply_model(torch.cat([y, y]), torch.cat([t, t]), branches[0])
            eps, eps_uncond = both.float().chunk(2)
        else:
            eps, eps_uncond = (self.model.apply_model(y, t, branch).float() for branch in branches)
        return eps_uncond + self.scale * (eps - eps_uncond)


def _is_conditioning(given) -> bool:
    return isinstance(given, dict) and isinstance(given.get("c_crossattn"), list | tuple)


def _joined(cond: dict, uncond: dict) -> dict:
    """Both branches as one batch, the conditional one first."""
    names = [name for name in ("c_concat", "c_crossattn") if cond.get(name) is not None]
    joined = {"c_concat": None} | {
        name: [torch.cat(pair) for pair in zip(cond[name], uncond[name], strict=True)] for name in names
    }
    if joined["c_concat"] is not None:
        joined["hint_features"] = torch.cat([cond["hint_features"], uncond["hint_features"]])
    return joined
