"""The contract of exemplar forms: what is stored of an image, and what pictures come back from it."""

import abc
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from compress.presets import Preset
from utils.data.images import image_bits, read_image
from utils.data.paths import FormFiles

WRONG_SIZE, OTHERWISE = "of the wrong size", "made otherwise"

PICTURES = ("WEBP", "PNG", "BMP", "JPEG", "AVIF", "JXL")
"""Pillow's names of the formats that are kept; the last one is a plugin's."""


@dataclass(frozen=True)
class Condition:
    """What copies are made from.

    size: (height, width) of the generated pictures; hint: what the control network sees, of that size: an edge map (HxW
    uint8, 0 or 255) or a picture (HxWx3 uint8), None for no control; start: a picture (HxWx3 uint8) that copies start
    from, or, for forms without a model, that they are; code: of the noise of the first sampling steps
    (`ControlNet.cldm.codebook`), None where all noise is drawn freely.
    """

    size: tuple[int, int]
    hint: np.ndarray | None = None
    start: np.ndarray | None = None
    code: np.ndarray | None = None


@dataclass(frozen=True)
class Request:
    """One copy to make.

    text: the class's text; size: (height, width) of the image and so of the copy; greyscale: whether both are;
    seed: of the noise.
    """

    image: Path
    copy_number: int
    text: str
    condition: Condition
    size: tuple[int, int]
    greyscale: bool
    seed: int


class _Described(abc.ABC):
    """What each form has as class attributes, or as fields of its own where they depend on its name."""

    name: str
    noun: str
    kept_endings: tuple[str, ...] = (".bin",)
    needs_model: bool = True
    has_start: bool = False
    deterministic: bool = False
    seeded_by_name: bool = False
    needs_weights: bool = False
    encoded_by_generator: bool = False
    fixed_bytes: int | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Form(_Described):
    """A form and its settings.  Immutable and picklable.

    name: as users write it; noun: what messages call a kept file; kept_endings: of kept files: the first is written,
    all are read, and more where `files` says so;
    needs_model: whether copies come from a diffusion model; has_start: whether they start from a kept picture;
    deterministic: whether all copies of an image are equal, which are PNGs then; seeded_by_name: whether the noise
    differs between images; needs_weights: whether encoding takes a model (`using`);
    encoded_by_generator: whether that is the generator's own, so that images are encoded in batches (`encode_batch`);
    fixed_bytes: the length of every kept file, None where it depends on the image; never None where the form is
    `encoded_by_generator`, and then as many zeros stand for some picture (`stand_in`);
    hint: what the control network must have been trained on, "edges" or "thumb"; None where it has no part in copies.
    """

    preset: Preset

    @property
    def files(self) -> FormFiles:
        """Where kept files and copies lie."""
        folder = re.sub("[:/]", "-", self.name)  # which are not allowed in names on all systems
        return FormFiles(folder, f"{folder}-copies", self.kept_endings, ".png" if self.deterministic else ".jpg")

    def using(self, machine: Any) -> "Form":
        """This form with the model (`compress.options.Machine`) that encodes and decodes; most forms need none."""
        return self

    def release(self) -> None:
        """Free the model that encoding and decoding have loaded, if any."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a kept file depends on beside its image: plain values."""

    @abc.abstractmethod
    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        """What is kept of an image (HxWx3 RGB or HxW greyscale, uint8) whose class is called `text`.

        Not called where the form is `encoded_by_generator`.
        """

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """The picture that `encode_batch` takes of an image: HxWx3 uint8, at the size at which it is encoded."""
        return image

    def encode_batch(self, pictures: Sequence[np.ndarray], texts: Sequence[str], generator: Any) -> list[bytes]:
        """What is kept of images whose `prepared` pictures have one shape, and whose classes have these texts.

        generator: of `make_generator`.  Called where the form is `encoded_by_generator`.  Raises UserError.
        """
        raise NotImplementedError

    def stand_in(self, image: Path, text: str = "") -> bytes:
        """Bytes as long as what is kept of a train image, from which copies can be made: to estimate sizes and times.

        Raises OSError with the path.
        """
        return self.encode(pixels(image), text) if self.fixed_bytes is None else bytes(self.fixed_bytes)

    def payload(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> bytes:
        """What of a kept file counts, and goes into the memory's file: all but what earlier versions wrote around."""
        return kept

    @abc.abstractmethod
    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        """What copies of an image of size (height, width) are made from.  Raises OSError for broken bytes."""

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int | None:
        """Bits that are kept of a height x width image as the paper counts them, before any coding; None where the form
        has no such count.  kept: the file, where there is one.  Raises OSError with its path.
        """
        return None

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """(WRONG_SIZE or OTHERWISE, details) where a kept file is not what `encode` makes of its image.

        Raises OSError for broken bytes.
        """
        return None if kept == self.encode(image) else (OTHERWISE, "the image gives another one")

    def recoded(self, kept: bytes, image: np.ndarray) -> bytes | None:
        """A kept file with an ending that is no longer written, as `encode` writes it now, for the same copies.

        None where it is to stay as it is.  Raises OSError for broken bytes.
        """
        return None

    def copy_settings(self) -> dict[str, Any]:
        """What a copy depends on beside image, number, class text, model and precision: plain values."""
        if not self.needs_model:
            return {"form": self.name, **self.settings()}
        settings = asdict(self.preset)
        del settings["name"]
        for sampling in (settings["sampling"], settings["guess"]):
            if sampling and not self.has_start:
                del sampling["start_strength"]
        return settings if self.name == "edges" else {**settings, "form": self.name}

    def requests(self, image: Path, kept: bytes, text: str, numbers: Sequence[int]) -> list[Request]:
        """The copies with these numbers of a train image, of which `kept` is kept."""
        width, height, bits_per_pixel = image_bits(image)
        size, greyscale = (height, width), bits_per_pixel != 24
        condition = self.condition(kept, size, greyscale)
        return [Request(image, k, text, condition, size, greyscale, self.seed(image, k)) for k in numbers]

    def seed(self, image: Path, copy_number: int) -> int:
        """Of the noise of an image's copy: as published, the copy's number; where seeded_by_name, a digest, in 32 bits:
        torch's generator ignores the higher ones."""
        if not self.seeded_by_name:
            return copy_number
        return zlib.crc32(bytes(f"{image.stem}/{copy_number}", "utf-8", "surrogateescape"))

    def save_copy(self, picture: np.ndarray, file: BinaryIO, greyscale: bool, mark: str | None = None) -> None:
        """Write a copy (HxWx3 uint8), greyscale as its image is, with its mark (see `compress.records`) as the comment:
        as a JPEG (4:2:0), or, where it is `deterministic`, as a PNG."""
        image = Image.fromarray(picture).convert("L" if greyscale else "RGB")
        if self.deterministic:
            about = PngInfo()
            if mark:
                about.add_text("Comment", mark)
            image.save(file, "PNG", pnginfo=about)
        else:
            image.save(file, "JPEG", quality=self.preset.quality, **({"comment": mark.encode()} if mark else {}))


def pixels(image: Path) -> np.ndarray:
    """A train image as forms take it: HxWx3 uint8, HxW for a greyscale one.  Raises OSError with the path."""
    picture = np.asarray(read_image(image))
    return picture if image_bits(image)[2] == 24 else np.ascontiguousarray(picture[:, :, 0])


def decoded(kept: bytes) -> np.ndarray:
    """A kept picture (HxWx3 uint8).  Raises OSError for bytes that are none."""
    try:
        with Image.open(io.BytesIO(kept), formats=[kind for kind in PICTURES if kind in Image.OPEN]) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file makes decoders raise anything
        reason = "not a picture that Pillow reads" if kept else "the file is empty"
        raise OSError(reason if isinstance(error, Image.UnidentifiedImageError) else str(error)) from error


def resized(image: np.ndarray, size: tuple[int, int], enlarging: int = cv2.INTER_LANCZOS4) -> np.ndarray:
    """An image (HxWx3 or HxW, uint8) at the size (height, width) at which it is encoded: enlarged so, or by area."""
    if image.shape[:2] == size:
        return image
    is_larger = math.prod(size) >= image.shape[0] * image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=enlarging if is_larger else cv2.INTER_AREA)


def resize_back(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A generated picture (HxWx3 uint8) at its image's size, height x width.

    The published rule: Lanczos where the generated picture's shorter side is at most the image's, else by area.
    """
    enlarge = min(picture.shape[:2]) <= min(height, width)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarge else cv2.INTER_AREA)
