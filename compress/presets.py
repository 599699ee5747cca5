"""The settings that copies depend on: from image to prompt to copy, for the two kinds of data, with their options."""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ControlNet.annotator.util import SIDE_STEP
from utils import cli
from utils.errors import UserError

FAST = {"sampler": "dpm++2m", "steps": 4}
"""What --preset fast sets: the cheapest setting whose copies keep edges, class and variety on handwritten digits and on
CIFAR-10 (docs/benchmarks.md, "Few steps")."""

MAX_PIXELS = 786_432
"""The published limit of a generated picture: 768 x 1,024, or 512 x 1,536."""

LONGEST = 3
"""Up to this proportion the limit leaves a picture of the published 512 pixels as it is; so it is at any --size."""


class SamplerLimits(NamedTuple):
    """eta: the default of a sampler that takes one, else None; guidance: that it brings where none is given, None for
    the preset's; most_steps: that it can take."""

    eta: float | None = None
    guidance: float | None = None
    most_steps: int = 1000


SAMPLERS = {
    "ddim": SamplerLimits(eta=0.0),
    "ddim-trailing": SamplerLimits(eta=0.0),
    "ancestral": SamplerLimits(),
    "dpm++2m": SamplerLimits(),
    "dpm++2m-karras": SamplerLimits(),
    "unipc": SamplerLimits(),
    "unipc-karras": SamplerLimits(),
    "lcm": SamplerLimits(guidance=1.0, most_steps=50),
    "tcd": SamplerLimits(eta=0.3, guidance=1.0, most_steps=50),
}
"""The names are those of ControlNet.sampling, which imports torch.  Weights for LCM and TCD have guidance built in (Luo
et al. 2023, Zheng et al. 2024)."""


def finite(text: str) -> float:
    """A number, neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def window(text: str) -> tuple[float, float]:
    """ "0.1:0.8" -> (0.1, 0.8)."""
    start, colon, end = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, such as 0:0.5")
    return finite(start), finite(end)


@dataclass(frozen=True)
class Setting:
    """An option, whose value replaces the field of the same name of `Preset` or `Sampling`.

    read: the option's text -> its value; metavar: in the help; is_possible, bounds: what values may be;
    advice: what to take in place of one that is impossible."""

    name: str
    read: Callable[[str], Any]
    metavar: str
    help: str
    is_possible: Callable[[Any], bool] = lambda value: True
    bounds: str = ""
    advice: Callable[[Any], str] = lambda value: ""

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def words(self, value: Any) -> str:
        """The value as it can be typed."""
        return "{:g}:{:g}".format(*value) if isinstance(value, tuple) else str(value)

    def check(self, value: Any) -> None:
        """Raises UserError for a value that is impossible."""
        if not self.is_possible(value):
            text = repr(value) if isinstance(value, str) else self.words(value)
            raise UserError(f"{self.option} {self.bounds}, not {text}{self.advice(value)}.")


SETTINGS = {setting.name: setting for setting in (
    Setting(
        "size", cli.at_least(1), "N", "shorter side of the generated pictures: 64, 128, 192, ...",
        lambda size: size > 0 and size % SIDE_STEP == 0, f"is a multiple of {SIDE_STEP}",
        lambda size: f": take {max(1, round(size / SIDE_STEP)) * SIDE_STEP}",
    ),
    Setting(
        "steps", cli.at_least(1), "N", "steps of the sampler",
        lambda steps: 1 <= steps <= 1000, "lies between 1 and 1000",
    ),
    Setting("guidance", finite, "X", "scale of classifier-free guidance; 1 is none, in half the time [9; lcm, tcd: 1]"),
    Setting(
        "guidance_window", window, "A:B",
        "guidance from this part of the steps to that one, 0 is noise and 1 the picture [0:1]",
        lambda ends: 0 <= ends[0] < ends[1] <= 1, "a:b has 0 <= a < b <= 1",
    ),
    Setting(
        "reuse_every", cli.at_least(1), "N",
        "compute the UNet's deep features in every N-th step alone, and reuse them between [1: in every step]",
    ),
    Setting(
        "start_strength", finite, "X",
        "of copies that start from a picture: the share of the steps that change it, above 0 up to 1 [0.7]",
        lambda strength: 0 < strength <= 1, "lies above 0 and is at most 1",
    ),
    Setting(
        "sampler", str, "NAME", f"how latents are sampled: {', '.join(SAMPLERS)} [ddim]",
        SAMPLERS.__contains__, f"is one of {', '.join(SAMPLERS)}",
    ),
    Setting(
        "eta", finite, "X", "share of fresh noise, of ddim and tcd [0; tcd 0.3]",
        lambda eta: 0 <= eta <= 1, "lies between 0 and 1",
    ),
    Setting(
        "prompt_template", str, "TEXT", "such as 'a photo of {label}'",
        lambda text: set(re.findall(r"\{\w*\}", text)) <= {"{label}"}, "knows {label}, and no other name in braces",
    ),
    Setting("negative_prompt", str, "TEXT", "text of what copies should not be like"),
    Setting(
        "quality", cli.at_least(1), "Q", "JPEG quality of copies, 1 to 100 [75]",
        lambda quality: 1 <= quality <= 100, "lies between 1 and 100",
    ),
)}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled: SETTINGS, and

    strength: factor of all control tensors; control_decay: factor from each control tensor to the next finer one;
    unconditional_control: whether the edge map also steers the branch of the negative prompt, which is not computed at
    guidance 1; guidance_from, guidance_until: the ends of guidance_window.
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
        """With these values of SETTINGS in place of its own; those that are no sampler's are left out.

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


@dataclass(frozen=True)
class Preset:
    """From image to prompt to copy.

    prompt_template: the text around "{label}"; shorter_side, small_shorter_side: the generated picture's shorter side
    in pixels, for images of at least shorter_side pixels and for smaller ones; edges_of_generated_size: whether the
    image is resized before its edges are found (edge maps then have the generated size), or the edge map afterwards;
    guess: the sampling where a class has no text, None for the ordinary one; low_threshold, high_threshold: Canny's;
    quality: of a copy's JPEG file, Pillow's default as in the published scripts; max_pixels: the most that are
    generated of a picture.
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
    quality: int = 75
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
        """A preset with these values of SETTINGS in place of its own; None stands for a value that is not given.

        Those of sampling hold for guess mode, too; `size` is the shorter side of every generated picture, whatever the
        image's, up to the proportion LONGEST.  Raises UserError for impossible values.
        """
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            SETTINGS[name].check(value)
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
    guess=Sampling(steps=50, guidance=4.5, control_decay=0.825, unconditional_control=False),  # as published
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
