"""Codes of noise: an exemplar is the walk of the diffusion model to its picture ("codebook:12@10", 15 bytes).

In each of STEPS steps of ancestral sampling the noise is one of 2^BITS codewords that encoder and decoder draw from one
seed ("codebook:BITS@STEPS"), or the sum of ATOMS signed ones ("codebook:BITSxATOMS@STEPS"); ControlNet/cldm/codebook.py
has the papers.  The class's text conditions the walk; there is no guidance and no control.  "codebook:12@10/4" keeps
the first 4 steps and draws the noise of the others freely, so that copies differ; with "/0" nothing is kept, and copies
are those of the form "text" with --sampler ancestral --steps STEPS+1 --guidance 1.

Nothing but the codewords' numbers is kept, BITS * STEPS bits with one atom, so a code that was damaged and has its
length gives another picture.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress.forms import Condition, Form, Spec, resized
from compress.presets import Preset, Sampling
from ControlNet.annotator.util import HWC3
from utils.errors import UserError

MOST_BITS, MOST_ATOMS = 16, 64

CANDIDATES = 4
"""Noises that the encoder tries in each step.  Encoding then takes about four times as long as with one, and gains 0.7
to 0.8 dB on digits (tests/bench/bench_codebook.py)."""


@dataclass(frozen=True)
class Codebook(Form):
    """bits, atoms, steps: as the name has them; coded: steps that are kept."""

    name: str
    bits: int
    atoms: int
    steps: int
    coded: int
    machine: Any = field(default=None, compare=False)
    noun = "code"
    seeded_by_name = True
    needs_weights = True
    encoded_by_generator = True

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return self.coded == self.steps

    @property
    def fixed_bytes(self) -> int:  # type: ignore[override]
        return -(-((self.radix**self.coded - 1).bit_length()) // 8)

    @property
    def radix(self) -> int:
        """How many different noises a step has."""
        words = 2**self.bits
        return words if self.atoms == 1 else math.comb(words, self.atoms) * 2**self.atoms

    def using(self, machine: Any) -> "Codebook":
        from compress.generators import check_encodes  # imports the generators, which --help does not need

        check_encodes(self.name, machine.model, "encode")
        return replace(self, machine=machine)

    def settings(self) -> dict[str, Any]:
        """`model` is None where there are no weights."""
        settings = {name: getattr(self, name) for name in ("bits", "atoms", "steps", "coded")}
        settings["candidates"] = CANDIDATES
        for name in ("shorter_side", "small_shorter_side", "prompt_template"):
            settings[name] = getattr(self.preset, name)
        return {**settings, "model": self.machine and _model_fingerprint(self.machine)}

    def copy_settings(self) -> dict[str, Any]:
        return {"form": self.name, **super().copy_settings()}  # in the order of records so far

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        raise TypeError("a code is made by a generator: encode_batch")

    def prepared(self, image: np.ndarray) -> np.ndarray:
        return resized(HWC3(image), self.preset.generated_size(*image.shape[:2]))

    def encode_batch(self, pictures: Sequence[np.ndarray], texts: Sequence[str], generator: Any) -> list[bytes]:
        if not self.coded:
            return [b""] * len(pictures)
        codes = {"coded": self.coded, "bits": self.bits, "atoms": self.atoms, "candidates": CANDIDATES}
        return [self.packed(code) for code in generator.encode(pictures, texts, **codes)]

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        return Condition(self.preset.generated_size(*size), code=self.unpacked(kept))

    def packed(self, code: np.ndarray) -> bytes:
        """The bytes of a code (coded x atoms): its steps are the digits of one number, the first step's the highest."""
        value = 0
        for numbers in code.tolist():
            value = value * self.radix + self._digit(numbers)
        return value.to_bytes(self.fixed_bytes, "big")

    def unpacked(self, kept: bytes) -> np.ndarray | None:
        """The code of `packed`'s bytes, None where no step is coded.  Raises OSError for bytes that are no code."""
        if len(kept) != self.fixed_bytes:
            raise OSError(f"a code of {len(kept)} bytes instead of {self.fixed_bytes}" if kept else "the file is empty")
        value, code = int.from_bytes(kept, "big"), []
        if value >= self.radix**self.coded:
            raise OSError("no code: a number in it is too large")
        for _ in range(self.coded):
            value, digit = divmod(value, self.radix)
            code.append(self._numbers(digit))
        return np.array(code[::-1], np.int64) if code else None

    def _digit(self, numbers: Sequence[int]) -> int:
        """0 to radix - 1: one atom's number; the rank of several (combinatorial number system) and their signs."""
        if self.atoms == 1:
            return numbers[0]
        words = [k if k >= 0 else ~k for k in numbers]
        rank = sum(math.comb(word, i + 1) for i, word in enumerate(words))
        return rank << self.atoms | sum((k < 0) << i for i, k in enumerate(numbers))

    def _numbers(self, digit: int) -> list[int]:
        if self.atoms == 1:
            return [digit]
        rank, signs, words = digit >> self.atoms, digit & (2**self.atoms - 1), []
        for i in reversed(range(self.atoms)):
            word = _largest(rank, i + 1, 2**self.bits)
            rank -= math.comb(word, i + 1)
            words.append(word)
        return [~word if signs >> i & 1 else word for i, word in enumerate(words[::-1])]

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        return 8 * self.fixed_bytes

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Whether it is a code; whether the image's own only the model could tell."""
        self.unpacked(kept)
        return None


def _largest(rank: int, k: int, most: int) -> int:
    """The largest n < most with comb(n, k) <= rank."""
    low, high = k - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if math.comb(middle, k) <= rank else (low, middle)
    return low


@cache
def _model_fingerprint(machine: Any) -> str | None:
    from compress.generators.build import model_fingerprint

    try:
        return model_fingerprint(machine)
    except UserError:
        return None


def codebook(spec: Spec, preset: Preset) -> Codebook:
    match = re.fullmatch(r"(\d{1,2})(?:x(\d{1,2}))?", spec.argument or "")
    bits, atoms = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
    steps = spec.side or 0
    coded = steps if spec.part is None else spec.part
    if spec.plus or not 1 <= bits <= MOST_BITS or not 1 <= atoms <= min(MOST_ATOMS, 2**bits) or not 1 <= steps < 1000:
        raise UserError(
            f"the form 'codebook' needs bits (1 to {MOST_BITS}) and steps, and may have atoms: codebook:12@10, "
            "codebook:8x4@10; /N keeps the first N steps alone: codebook:12@10/4."
        )
    if coded > steps:
        raise UserError(f"{spec.name} has {steps} steps: it can't keep the first {coded} of them.")
    name = replace(spec, part=None if coded == steps else coded).name
    preset = replace(preset, sampling=Sampling(steps + 1, guidance=1.0, sampler="ancestral"), guess=None)
    return Codebook(preset, name, bits, atoms, steps, coded)


EXAMPLES = ["codebook:BITS@STEPS", "codebook:BITSxATOMS@STEPS", "codebook:BITS@STEPS/N"]
FORMS = {"codebook": codebook}
