"""What ControlNet/train.py trains on: pictures with their hints and texts, in an order that can be resumed."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ControlNet.cldm.files import ModelError

MAX_PIXELS = 90_000_000
LONGEST_SIDE = 32767
"""OpenCV's maps take no longer one."""
STAGES = ("autoencoder", "text", "diffusion", "refine", "consistency")


class Views(Dataset):
    """Pairs of an augmented picture and its hint; the random choices depend on (step, position in the batch).

    An item is (picture, 3 x S x S float in [-1, 1]; hint, 1 or 3 x S x S float in [0, 1]; class number).  The config's
    `hint` is "edges", for edge maps (the default), or "thumb@SIDE", for the picture reduced to a shorter side of SIDE
    pixels and enlarged again.
    """

    def __init__(self, config: DictConfig, stage: str):
        folder = user_path(config.data)
        if not folder.is_dir():
            raise ModelError(f"no folder {folder} to train on (for the digits: python -m utils.curate digits)")
        labels = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.items = [(file, y) for y, label in enumerate(labels) for file in sorted((folder / label).iterdir())]
        if not self.items:
            raise ModelError(f"{folder} holds no pictures; they belong in {folder}/<class-label>/")
        names = read_class_names(user_path(config.class_names)) if config.class_names else {}
        texts = [text.replace("{label}", names.get(label, label)) for label in labels for text in config.texts]
        self.texts = [*texts, *config.negative_texts]
        """Those of class 0, of class 1, ..., one for each template, and then the negative ones."""
        self.classes, self.templates, self.negatives = len(labels), len(config.texts), len(config.negative_texts)
        self.size = config.image_size
        self.augmentation, self.looseness = config.augmentation, config.looseness
        self.seed = [config.seed, STAGES.index(stage)]
        kind = re.fullmatch(r"edges|thumb@([1-9]\d*)", config.get("hint") or "edges")
        if kind is None:
            raise ModelError(f"hint is edges or thumb@SIDE, such as thumb@8, not {config.hint!r}")
        self.thumb_side = kind[1] and int(kind[1])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        rng = np.random.default_rng([*self.seed, *key])
        file, label = self.items[rng.integers(len(self.items))]
        source = _moved(read_picture(file), rng, self.augmentation)
        hint = self._thumb(source) if self.thumb_side else self._edges(source, rng)
        gamma = math.exp(rng.uniform(-1, 1) * self.looseness.gamma)
        target = self._resized(_moved(source, rng, self.looseness), cv2.INTER_LANCZOS4).astype(np.float32) / 255
        picture = torch.from_numpy(target**gamma * 2 - 1).permute(2, 0, 1)
        return picture, torch.from_numpy(hint / np.float32(255)), label

    def _edges(self, source: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The edge map, 1 x S x S, in one of both presets' ways: found at the picture's own size, or at S x S."""
        if rng.random() < 0.5:
            return self._resized(cv2.Canny(source, 100, 200), cv2.INTER_NEAREST)[None]
        return cv2.Canny(self._resized(source, cv2.INTER_LANCZOS4), 100, 200)[None]

    def _thumb(self, source: np.ndarray) -> np.ndarray:
        """The picture of a thumbnail, 3 x S x S, as the form "thumb" enlarges it."""
        scale = min(1.0, self.thumb_side / min(source.shape[:2]))
        height, width = (max(1, round(side * scale)) for side in source.shape[:2])
        small = cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(self._resized(small, cv2.INTER_CUBIC).transpose(2, 0, 1))

    def _resized(self, image: np.ndarray, interpolation: int) -> np.ndarray:
        return cv2.resize(image, (self.size, self.size), interpolation=interpolation)


def user_path(text: str) -> Path:
    """~ is the home folder."""
    return Path(text).expanduser()


class UnreadableImage(ModelError):
    """A DataLoader re-raises its workers' errors with their traceback as the message; only its last line is kept."""

    def __init__(self, message: str):
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_picture(file: Path) -> np.ndarray:
    """A picture as RGB.  Raises UnreadableImage, which names the file, also for one of more pixels than memory has."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) >= LONGEST_SIDE:
                raise OSError(f"{image.width} x {image.height} pixels are too many to train on")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise anything for a broken file
        raise UnreadableImage(f"cannot read image {file}: {error}") from error


def read_class_names(file: Path) -> dict[str, str]:
    """Class label -> text.  Raises ModelError for a file that is no such table, or gives a label two texts."""

    def unique(pairs: list[tuple[str, str]]) -> dict[str, str]:
        for label, count in Counter(label for label, _ in pairs).items():
            if count > 1:
                raise ModelError(f"{file} gives class {label!r} {count} texts: keep one")
        return dict(pairs)

    try:
        texts = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ModelError(f"{file} must be an object of class labels and their texts")
    return texts


def _moved(image: np.ndarray, rng: np.random.Generator, amount: DictConfig) -> np.ndarray:
    """The picture under a random affine map about its centre.

    amount: the largest rotation (degrees), scale, shear and shift (fractions).  Border pixels are repeated outwards.
    """
    height, width = image.shape[:2]
    angle = math.radians(rng.uniform(-1, 1) * amount.rotate)
    zoom = math.exp(rng.uniform(-1, 1) * amount.scale)
    shear = rng.uniform(-1, 1) * amount.shear
    linear = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = linear @ np.array([[1, shear], [0, 1]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + rng.uniform(-1, 1, 2) * amount.shift * np.array([width, height])
    matrix = np.hstack([linear, offset[:, None]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def step_seed(seed: int, stage: str, step: int) -> int:
    """The seed of a step's random numbers, 0 to 2**63 - 1."""
    return int(np.random.SeedSequence([seed, STAGES.index(stage), step]).generate_state(1, np.uint64)[0]) >> 1
