"""The settings that copies depend on: one row each, from which option, help, check and recorded words come.

A row's value, where it is given, replaces the field of the same name of `Preset` or `Sampling` (`Preset.changed`),
which the records list.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ControlNet.annotator.util import SIDE_STEP
from utils import cli
from utils.errors import UserError


@dataclass(frozen=True)
class SamplerLimits:
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
    """read: the option's text -> its value; metavar: in the help; is_possible, bounds: what values may be;
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


SETTINGS = (
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
)  # fmt: skip


def check(values: Mapping[str, Any]) -> None:
    """Raises UserError for a value, by its setting's name, that is impossible."""
    for setting in SETTINGS:
        value = values.get(setting.name)
        if value is not None and not setting.is_possible(value):
            text = repr(value) if isinstance(value, str) else setting.words(value)
            raise UserError(f"{setting.option} {setting.bounds}, not {text}{setting.advice(value)}.")
