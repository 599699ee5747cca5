"""The settings of the two kinds of data, as data (DESIGN section 4)."""

import re
from dataclasses import dataclass, replace

from ControlNet.annotator.util import generated_size
from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.dpm_solver import DPMSolverSampler
from utils.errors import UserError

SAMPLERS = {"ddim": DDIMSampler, "dpm++2m": DPMSolverSampler}
"""What `Sampling.sampler` may be."""


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled.

    steps: number of steps, 1 to 1,000; guidance: scale of classifier-free guidance; eta: DDIM's, 0 is deterministic;
    strength: factor of all control tensors; control_decay: factor from each control tensor to the next finer one;
    unconditional_control: whether the edge map also steers the branch of the negative prompt; sampler: in SAMPLERS.
    """

    steps: int
    guidance: float = 9.0
    eta: float = 0.0
    strength: float = 1.0
    control_decay: float = 1.0
    unconditional_control: bool = True
    sampler: str = "ddim"

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
    guess: the sampling where a class has no text, None for the ordinary one; low_threshold, high_threshold: Canny's.
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

    def generated_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which copies of an image of this height and width are generated."""
        small = min(height, width) < self.shorter_side
        return generated_size(height, width, self.small_shorter_side if small else self.shorter_side)

    def prompt_text(self, label_text: str) -> str:
        """The text that conditions a copy.  Without a label, what the template says beside it."""
        text = self.prompt_template.replace("{label}", label_text)
        return text if label_text else text.lstrip(", ")

    def sampling_for(self, label_text: str) -> Sampling:
        """How to sample for a class of this text: an empty one means guess mode, where the preset has it."""
        return self.guess if self.guess is not None and not label_text else self.sampling

    def changed(
        self,
        *,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        prompt_template: str | None = None,
        negative_prompt: str | None = None,
    ) -> "Preset":
        """This preset with what is not None put in; steps, guidance and sampler hold for guess mode too.

        size: the shorter side of every generated picture, whatever the image's.  Raises UserError for what can't be.
        """
        if size is not None and size < 64:
            raise UserError(f"a generated picture's shorter side is at least 64 pixels; --size {size} is too small.")
        if steps is not None and not 1 <= steps <= 1000:
            raise UserError(f"the number of steps lies between 1 and 1000; --steps {steps} does not.")
        if sampler is not None and sampler not in SAMPLERS:
            raise UserError(f"--sampler is one of {', '.join(SAMPLERS)}, not {sampler!r}.")
        strange = set(re.findall(r"\{\w*\}", prompt_template or "")) - {"{label}"}
        if strange:
            names = ", ".join(sorted(strange))
            raise UserError(f"--prompt-template knows {{label}}, and not {names}: {prompt_template!r}")
        sampling_changes = _given(steps=steps, guidance=guidance, sampler=sampler)
        return replace(
            self,
            sampling=replace(self.sampling, **sampling_changes),
            guess=self.guess and replace(self.guess, **sampling_changes),
            **_given(
                shorter_side=size,
                small_shorter_side=size,
                prompt_template=prompt_template,
                negative_prompt=negative_prompt,
            ),
        )


def _given(**values) -> dict:
    return {name: value for name, value in values.items() if value is not None}


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
