"""Classifier-free guidance (Ho & Salimans 2022): the noise prediction that every sampler steps along."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ControlNet.ldm.unet import DeepFeatures


class Guided:
    """eps = eps_uncond + scale * (eps_cond - eps_uncond); the latents stay float32 whatever the networks compute in.

    cond, uncond: as ControlLDM.apply_model takes them.  Without uncond, or at scale 1, the unconditional branch is not
    computed.  Both branches run as one batch of twice the size, unless only one of them has control (guess mode).  A
    hint's features are the same at every step and in both branches: they are computed once.
    reusing: keep the UNet's deep features for calls that reuse them (see DeepFeatures).
    """

    def __init__(self, model, cond: dict, uncond: dict | None = None, reusing: bool = False):
        for name, conditioning in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            is_absent = conditioning is None and name.startswith("un")
            if not is_absent and not _is_conditioning(conditioning):
                raise ValueError(f'{name} must be {{"c_concat": [hint] or None, "c_crossattn": [context]}}')
        self.model, self.reusing = model, reusing
        self._cond, self._uncond = cond, uncond
        self._features: dict[tuple[int, ...], Tensor] = {}  # ids of a hint's tensors -> its features

    def __call__(self, x: Tensor, t: Tensor, scale: float = 1.0, reuse: bool = False) -> Tensor:
        """The guided noise in x (float32, B x 4 x h x w) at timesteps t (B): float32, x's shape.

        reuse: take the deep features from the last call that computed them; no effect unless `reusing`.
        """
        y = x.to(self.model.dtype)
        if self._uncond is None or scale == 1.0:
            return self._predict(y, t, self._conditional, reuse)
        if len(self._branches) == 1:
            both = self._predict(torch.cat([y, y]), torch.cat([t, t]), self._branches[0], reuse)
            eps, eps_uncond = both.chunk(2)
        else:
            eps, eps_uncond = (self._predict(y, t, branch, reuse) for branch in self._branches)
        return eps_uncond + scale * (eps - eps_uncond)

    @cached_property
    def _conditional(self) -> dict[str, Any]:
        """What is computed without guidance."""
        return self._with_deep(self._with_features(self._cond))

    @cached_property
    def _branches(self) -> list[dict[str, Any]]:
        """What is computed with guidance: one batch of both branches where that is possible, else both."""
        assert self._uncond is not None
        cond, uncond = self._with_features(self._cond), self._with_features(self._uncond)
        if (cond["c_concat"] is None) == (uncond["c_concat"] is None):
            return [self._with_deep(_joined(cond, uncond))]
        return [self._with_deep(cond), self._with_deep(uncond)]

    def _predict(self, y: Tensor, t: Tensor, branch: dict[str, Any], reuse: bool) -> Tensor:
        if self.reusing:
            branch["deep"].reuse = reuse
        return self.model.apply_model(y, t, branch).float()

    def _with_deep(self, branch: dict[str, Any]) -> dict[str, Any]:
        return {**branch, "deep": DeepFeatures() if self.reusing else None}

    def _with_features(self, cond: dict) -> dict[str, Any]:
        hints = cond.get("c_concat")
        if hints is None:
            return {**cond, "c_concat": None}
        key = tuple(map(id, hints))
        if key not in self._features:
            hint = torch.cat(hints, dim=1).to(self.model.device, self.model.dtype)
            self._features[key] = self.model.control_model.encode_hint(hint)
        return {**cond, "hint_features": self._features[key]}


def _is_conditioning(conditioning: Any) -> bool:
    return isinstance(conditioning, dict) and isinstance(conditioning.get("c_crossattn"), list | tuple)


def _joined(cond: dict, uncond: dict) -> dict[str, Any]:
    """Both branches as one batch, the conditional one first."""
    names = [name for name in ("c_concat", "c_crossattn") if cond.get(name) is not None]
    pairs = {name: [torch.cat(pair) for pair in zip(cond[name], uncond[name], strict=True)] for name in names}
    if "c_concat" not in pairs:
        return {"c_concat": None, **pairs}
    return {**pairs, "hint_features": torch.cat([cond["hint_features"], uncond["hint_features"]])}
