"""The settings of the two kinds of data: from image to prompt to copy."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from compress.settings import SAMPLERS, check
from ControlNet.annotator.util import SIDE_STEP
from utils.errors import UserError

FAST = {"sampler": "dpm++2m", "steps": 4}
"""What --preset fast sets: the cheapest setting whose copies keep edges, class and variety on handwritten digits and on
CIFAR-10 (docs/benchmarks.md, "Few steps")."""

MAX_PIXELS = 786_432
"""The published limit of a generated picture: 768 x 1,024, or 512 x 1,536."""

LONGEST = 3
"""Up to this proportion the limit leaves a picture of the published 512 pixels as it is; so it is at any --size."""

DEFAULT_QUALITY = 75
"""Pillow's default JPEG quality (4:2:0 subsampling), with which the published scripts save copies."""


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled.

    steps: number of steps, 1 to 1,000; guidance: scale of classifier-free guidance, at 1 the negative prompt has no
    effect and its branch is not computed; eta: share of fresh noise a step, of some samplers (0: deterministic);
    strength: factor of all control tensors; control_decay: factor from each control tensor to the next finer one;
    unconditional_control: whether the edge map also steers the branch of the negative prompt; sampler: in SAMPLERS;
    guidance_from, guidance_until: guidance in this part of the steps alone, 0 (noise) to 1 (picture);
    reuse_every: compute the UNet's deep features in every n-th step alone, 1 for all;
    start_strength: of copies that start from a picture: the share of the steps that change it, above 0; at 1 little of
    it is left.
    """

    steps: int
    guidance: float = 9.0
    eta: float = 0.0
    strength: float = 1.0
    control_decay: float = 1.0
    unconditional_control: bool = True
    sampler: str = "ddim"
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    reuse_every: int = 1
    start_strength: float = 0.7

    def changed(self, values: Mapping[str, Any]) -> "Sampling":
        """With the values, by their settings' names, in place of its own; those that are no sampler's are left out.

        A sampler brings its eta and guidance where they are not given.  Raises UserError for what it does not take.
        """
        name = values.get("sampler", self.sampler)
        limits, steps = SAMPLERS[name], values.get("steps", self.steps)
        if steps > limits.most_steps:
            raise UserError(f"--sampler {name} takes at most {limits.most_steps} steps; choose fewer with --steps.")
        if "eta" in values and limits.eta is None:
            with_eta = ", ".join(each for each, others in SAMPLERS.items() if others.eta is not None)
            raise UserError(f"--eta goes with --sampler {with_eta}, not {name}.")
        changes: dict[str, Any] = {}
        if "sampler" in values:
            changes["eta"] = limits.eta or 0.0
            if limits.guidance is not None:
                changes["guidance"] = limits.guidance
        changes |= {each.name: values[each.name] for each in fields(self) if each.name in values}
        if "guidance_window" in values:
            changes["guidance_from"], changes["guidance_until"] = values["guidance_window"]
        return replace(self, **changes)

    def guidance_scales(self, steps: int) -> list[float]:
        """The scale of guidance in each of the steps: 1 outside guidance_from and guidance_until."""
        inside = [self.guidance_from <= i / steps < self.guidance_until for i in range(steps)]
        return [self.guidance if each else 1.0 for each in inside]

    def control_scales(self, tensors: int = 13) -> list[float]:
        """A factor for each control tensor, from the finest to the middle block's (13 of them at full size)."""
        return [self.strength * self.control_decay ** (tensors - 1 - i) for i in range(tensors)]


GUESS_MODE = Sampling(steps=50, guidance=4.5, control_decay=0.825, unconditional_control=False)
"""ControlNet's guess mode: no text says what the picture shows, so the edge map alone carries the guidance."""


@dataclass(frozen=True)
class Preset:
    """From image to prompt to copy.

    prompt_template: the text around "{label}"; shorter_side, small_shorter_side: the generated picture's shorter side
    in pixels, for images of at least shorter_side pixels and for smaller ones; edges_of_generated_size: whether the
    image is resized before its edges are found (edge maps then have the generated size), or the edge map afterwards;
    guess: the sampling where a class has no text, None for the ordinary one; low_threshold, high_threshold: Canny's;
    quality: of a copy's JPEG file, 1 to 100; max_pixels: the most that are generated of a picture.
    """

    name: str
    prompt_template: str
    negative_prompt: str
    sampling: Sampling
    guess: Sampling | None
    shorter_side: int
    small_shorter_side: int
    edges_of_generated_size: bool
    low_threshold: float = 100
    high_threshold: float = 200
    quality: int = DEFAULT_QUALITY
    max_pixels: int = MAX_PIXELS

    def generated_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which copies of an image of this height and width are generated."""
        small = min(height, width) < self.shorter_side
        side = self.small_shorter_side if small else self.shorter_side
        return generated_size(height, width, side, self.max_pixels)

    def prompt_text(self, label_text: str) -> str:
        """The text that conditions a copy.  Without a label, what the template says beside it."""
        text = self.prompt_template.replace("{label}", label_text)
        return text if label_text else text.lstrip(", ")

    def sampling_for(self, label_text: str) -> Sampling:
        """How to sample for a class of this text: an empty one means guess mode, where the preset has it."""
        return self.guess if self.guess is not None and not label_text else self.sampling

    def changed(self, **values: Any) -> "Preset":
        """A preset with the given values in place of its own, by the names of `compress.settings.SETTINGS`.

        None stands for a value that is not given.  Those of sampling hold for guess mode, too; `size` is the shorter
        side of every generated picture, whatever the image's, up to the proportion LONGEST.
        Raises UserError for impossible values.
        """
        values = {name: value for name, value in values.items() if value is not None}
        check(values)
        changes = {each.name: values[each.name] for each in fields(self) if each.name in values}
        if "size" in values:
            changes["shorter_side"] = changes["small_shorter_side"] = values["size"]
            changes["max_pixels"] = max(MAX_PIXELS, LONGEST * values["size"] ** 2)
        guess = None if self.guess is None else self.guess.changed(values)
        return replace(self, sampling=self.sampling.changed(values), guess=guess, **changes)


def generated_size(height: int, width: int, shorter_side: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size (height, width) at which copies of a height x width image are generated, in multiples of 64.

    As published (PESCR, `Compress._resize`): scale both sides so that the shorter one becomes `shorter_side`, halve
    both while the picture has more than max_pixels pixels, round each to the nearest multiple of 64 (ties to the even
    one, NumPy's rounding).

    Two cases differ, where the published formula has no usable result: a side is never rounded to 0 but to 64, and if
    that exceeds max_pixels (1 x 1000 would become 64 x 16000), the longer side is cut (64 x 12288).
    """
    scale = shorter_side / min(height, width)
    sides = np.array([height * scale, width * scale])
    while sides.prod() > max_pixels:
        sides /= 2
    sides = np.maximum(np.round(sides / SIDE_STEP), 1).astype(int) * SIDE_STEP
    longest = max_pixels // int(sides.min()) // SIDE_STEP * SIDE_STEP
    height, width = np.minimum(sides, longest).tolist()
    return height, width


HIGH = Preset(
    name="high",
    prompt_template="{label}, best quality, extremely detailed",
    negative_prompt=(
        "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
        "worst quality, low quality"
    ),
    sampling=Sampling(steps=20),
    guess=GUESS_MODE,
    shorter_side=512,
    small_shorter_side=512,
    edges_of_generated_size=False,
)

LOW = Preset(
    name="low",
    prompt_template="{label}, clean, clear, bright, neat",
    negative_prompt="blurry, dark, messy, dotted",
    sampling=Sampling(steps=50),
    guess=None,
    shorter_side=512,
    small_shorter_side=256,
    edges_of_generated_size=True,
)

PRESETS = {preset.name: preset for preset in (HIGH, LOW)}
