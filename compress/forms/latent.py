"""Latent codes: the mean latents of the model's autoencoder, quantised and entropy coded ("latent:4", "latent:4@64").

The decoded picture at its image's size is the only copy: no diffusion is involved, and of the model only the first
stage.  An autoencoder knows pictures of about the size that it was trained on, so the image is brought to a shorter
side of SIDE pixels, smaller or larger; without SIDE it keeps its own size.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from compress.forms import OTHERWISE, Condition, Form, Spec, resize_back, resized
from compress.presets import Preset
from ControlNet.annotator.util import HWC3
from utils.errors import UserError

FACTOR = 8
"""Pixels of a latent's side."""
CHANNELS = 4
LEAST = 2
"""Latents along the shorter side of the smallest pictures, which the networks' norms need."""

HEADER = struct.Struct("<Bee")
"""The first bytes of a kept file: the coder (its place in CODERS), and the latents that the lowest and the highest
level stand for, in 16 bits."""

_AT_WORK = Lock()
"""Of the threads that encode and decode, one at a time uses the model, and the first one loads it."""


@dataclass(frozen=True)
class Latent(Form):
    """bits: of a latent's level; side: shorter side of the encoded picture in pixels, None for the image's own size;
    model, base: whose autoencoder it is, as `Machine` names them."""

    name: str
    bits: int
    side: int | None
    model: str = "sd15"
    base: str | None = None
    noun = "latent code"
    needs_model = False
    needs_weights = True
    deterministic = True

    def using(self, machine: Any) -> "Latent":
        from compress.generators import check_encodes  # imports the generators, which --help does not need

        check_encodes(self.name, machine.model)
        return replace(self, model=machine.model, base=machine.base)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "side": self.side, "autoencoder": _model_fingerprint(self.model, self.base)}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        """The lowest and the highest latent of the picture are the first and the last of 2^bits levels."""
        picture, (_, rows, columns) = self.shown(image), self.shape(*image.shape[:2])
        missing = FACTOR * rows - picture.shape[0], FACTOR * columns - picture.shape[1]
        latents = self.autoencoder.encode(np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge"))
        low, high = np.float16(latents.min()), np.float16(latents.max())
        step = max(float(high) - float(low), 1e-6) / (2**self.bits - 1)
        levels = np.clip(np.rint((latents - float(low)) / step), 0, 2**self.bits - 1).astype(np.uint8)
        codes = [code(levels.ravel(), self.bits) for code, _ in CODERS]
        best = min(range(len(codes)), key=lambda i: len(codes[i]))
        return HEADER.pack(best, low, high) + codes[best]

    def shown(self, image: np.ndarray) -> np.ndarray:
        """The picture that is encoded: HxWx3 uint8."""
        return resized(HWC3(image), self.shown_size(*image.shape[:2]), enlarging=cv2.INTER_CUBIC)

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the picture that is encoded of an image of this height and width."""
        scale = self.side / min(height, width) if self.side else 1.0
        return max(1, round(height * scale)), max(1, round(width * scale))

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """That of the latents of an image of this height and width."""
        height, width = (max(LEAST, -(-side // FACTOR)) for side in self.shown_size(height, width))
        return CHANNELS, height, width

    def latents(self, kept: bytes, size: tuple[int, int]) -> np.ndarray:
        """The quantised latents, CHANNELS x h x w, of what is kept of an image of size (height, width).

        Raises OSError for broken bytes.
        """
        shape = self.shape(*size)
        try:
            coder, low, high = HEADER.unpack_from(kept)
            levels = CODERS[coder][1](kept[HEADER.size :], math.prod(shape), self.bits).reshape(shape)
        except (struct.error, IndexError, ValueError, zlib.error) as error:
            what = f"no latent code of {shape[2]} x {shape[1]} latents" if kept else "the file is empty"
            raise OSError(what) from error
        return (low + levels * (max(high - low, 1e-6) / (2**self.bits - 1))).astype(np.float32)

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        height, width = self.shown_size(*size)
        picture = self.autoencoder.decode(self.latents(kept, size))[:height, :width]
        return Condition(size, start=resize_back(picture, *size))

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        return self.bits * math.prod(self.shape(height, width))

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Another device may round a few latents to the next level; another image is farther."""
        latents, fresh = (self.latents(code, image.shape[:2]) for code in (kept, self.encode(image)))
        step = max(np.ptp(fresh), 1e-6) / (2**self.bits - 1)
        return (OTHERWISE, "the image gives other latents") if np.abs(latents - fresh).mean() > step / 2 else None

    @property
    def autoencoder(self) -> "Autoencoder":
        with _AT_WORK:
            return _autoencoder(self.model, self.base)

    def release(self) -> None:
        with _AT_WORK:
            _autoencoder.cache_clear()


class Autoencoder:
    """A model's first stage, in float32 on the process's device, for one picture at a time.

    `encode` and `decode` raise OSError for a picture that does not fit the device's memory.
    """

    def __init__(self, model: str, base: str | None):
        from ControlNet.cldm.model import ModelError, load_first_stage
        from utils.devices import process_device

        self.device = process_device()
        try:
            self.network = load_first_stage(model, self.device, base)
        except ModelError as error:
            raise UserError(str(error)) from error

    def encode(self, picture: np.ndarray) -> np.ndarray:
        """The mean latents of a picture (HxWx3 uint8, sides multiples of FACTOR): CHANNELS x H/FACTOR x W/FACTOR."""
        with self._at_work(picture.shape[:2]) as torch:
            pixels = torch.from_numpy(picture).to(self.device).float().permute(2, 0, 1)[None] / 127.5 - 1
            return self.network.encode(pixels).mode()[0].cpu().numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The picture, HxWx3 uint8."""
        with self._at_work([FACTOR * side for side in latents.shape[1:]]) as torch:
            decoded = self.network.decode(torch.from_numpy(latents).to(self.device)[None])[0]
            return (decoded * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    @contextmanager
    def _at_work(self, size: Sequence[int]) -> Iterator[ModuleType]:
        """torch, for one thread at a time; a lack of memory is an OSError.  size: the picture's, for the message."""
        import torch

        from ControlNet.cldm.inference import is_out_of_memory

        try:
            with _AT_WORK, torch.inference_mode():
                yield torch
                return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OSError(f"{size[0]} x {size[1]} pixels do not fit on {self.device}: name a side, as latent:4@512")


@cache
def _autoencoder(model: str, base: str | None) -> Autoencoder:
    return Autoencoder(model, base)


@cache
def _model_fingerprint(model: str, base: str | None) -> str:
    from ControlNet.cldm.model import ModelError, weights_fingerprint

    try:
        return weights_fingerprint(model, base)
    except ModelError as error:
        raise UserError(str(error)) from error


def _pack(levels: np.ndarray, bits: int) -> bytes:
    """The levels' bits, one after another."""
    return np.packbits(np.unpackbits(levels[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _unpack(code: bytes, count: int, bits: int) -> np.ndarray:
    if len(code) != -(-count * bits // 8):
        raise ValueError("wrong length")
    rows = np.unpackbits(np.frombuffer(code, np.uint8), count=count * bits).reshape(count, bits)
    return np.packbits(np.pad(rows, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def _deflate(levels: np.ndarray, bits: int) -> bytes:
    coder = zlib.compressobj(9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(levels.tobytes()) + coder.flush()


def _inflate(code: bytes, count: int, bits: int) -> np.ndarray:
    decoder = zlib.decompressobj(wbits=-15)
    levels = decoder.decompress(code, count + 1)  # no more, whatever the bytes say
    if len(levels) != count or not decoder.eof or decoder.unused_data:
        raise ValueError("wrong length")
    return np.frombuffer(levels, np.uint8)


CODERS = ((_pack, _unpack), (_deflate, _inflate))
"""(encode, decode) of levels, of which the shorter code is kept: all bits of each, or zlib's Huffman code, which comes
within 3 to 6 % of the entropy of the latents of a 224 x 224 picture."""


def latent(spec: Spec, preset: Preset) -> Latent:
    bits = spec.argument or ""
    if not bits.isdecimal() or not 1 <= int(bits) <= 8 or spec.plus:
        raise UserError("the form 'latent' needs bits a value, 1 to 8; a side may follow: latent:4, latent:4@64.")
    return Latent(preset, spec.name, int(bits), spec.side)


EXAMPLES = ["latent:BITS", "latent:BITS@SIDE"]
FORMS = {"latent": latent}
