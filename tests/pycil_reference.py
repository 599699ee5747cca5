"""PyCIL's figures of one run each in a file (`pycil_parity` says what they are), and the file's pictures."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.paths import DatasetPaths


class Reference:
    """The arrays of one run in a file of PyCIL's figures.

    `args`: the keys of PyCIL's config; `constants`: those of its method's module; `sizes`: classes of each phase, of
    the first nb_phases alone where given.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str, nb_phases: int | None = None):
        self.arrays = arrays
        self.name = name
        meta = json.loads(str(arrays[f"{name}/meta"]))
        self.args: dict[str, Any] = meta["args"]
        self.constants: dict[str, Any] = meta["constants"]
        self.sizes: list[int] = meta["increments"][:nb_phases]
        self.method: str = self.args["model_name"]

    def get(self, phase: int, name: str) -> np.ndarray | None:
        return self.arrays.get(f"{self.name}/p{phase}/{name}")

    def setting(self, *names: str) -> Any:
        """The first of these that PyCIL's module or config has."""
        for name in names:
            for place in (self.constants, self.args):
                if name in place:
                    return place[name]
        raise KeyError(names)

    def batches(self, phase: int, stage: int) -> list[list[int]]:
        """The pictures of each step of a stage; stage -1: of the passes without a step (EWC's Fisher matrix)."""
        rows = self.get(phase, "nostep_batch") if stage < 0 else self.get(phase, "batch")
        if stage >= 0:
            rows = rows[self.get(phase, "stage") == stage]
        return [[int(number) for number in row if number >= 0] for row in rows]

    @cached_property
    def compared(self) -> tuple[int, str]:
        """(number of phases to compare, why not all).

        In phases of different sizes PyCIL's GEM takes k s ... (k + 1) s, s the size of the *present* phase, for phase
        k's classes.  The project takes the classes that phase k had, so they agree until these differ.
        """
        starts = [0, *np.cumsum(self.sizes)]
        if self.method == "gem":
            for phase, size in enumerate(self.sizes):
                if any([k * size, (k + 1) * size] != starts[k : k + 2] for k in range(phase)):
                    reason = f"differs by design: from phase {phase} on PyCIL's masks hold other classes than a phase's"
                    return phase, reason
        return len(self.sizes), ""


def runs_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return sorted(name.partition("/")[0] for name in arrays if name.endswith("/meta"))


def initial_weight(name: str, shape: Sequence[int]) -> Tensor:
    """A backbone's parameter before training, by its name in PyCIL and its shape, as the file's README defines it."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    x = random.standard_normal(int(np.prod(shape))).reshape(tuple(shape))
    if len(shape) == 4:
        x *= np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    elif len(shape) >= 2:
        x /= np.sqrt(shape[-1])
    elif name.endswith("weight"):
        x = (1 + 0.1 * x) * (0.25 if name.endswith("bn_b.weight") else 1)
    else:
        x *= 0.05
    return torch.from_numpy(x.astype(np.float32).astype(np.float64))


def pycil_name(name: str, backbone: str) -> str:
    """layer1.0.conv1.weight -> stage_1.0.conv_a.weight, and so on."""
    if backbone == "little_rep":
        name = re.sub(r"^bn1", "conv1.1", re.sub(r"^conv1", "conv1.0", name))
        name = re.sub(r"\.(conv\d)\.(weight|bias)", r".\1.conv.\2", name)
        return re.sub(r"\.bn(\d)", r".norm\1", name)
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name)
    if block is None:
        return name.replace("conv1", "conv_1_3x3").replace("bn1", "bn_1")
    inner = block[3]
    for ours, theirs in (("1.", "_a."), ("2.", "_b.")):
        inner = inner.replace(f"conv{ours}", f"conv{theirs}").replace(f"bn{ours}", f"bn{theirs}")
    inner = inner.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
    return f"stage_{block[1]}.{block[2]}.{inner}"


@dataclass
class Pictures:
    """The file's pictures as a dataset on disk: `numbers` tells which picture of the file a train image is."""

    paths: DatasetPaths
    numbers: dict[Path, int]

    @classmethod
    def write(cls, arrays: Mapping[str, np.ndarray], folder: Path) -> "Pictures":
        numbers = {}
        for mode in ("train", "test"):
            for number, (pixels, target) in enumerate(
                zip(arrays[f"data/{mode}_images"], arrays[f"data/{mode}_targets"], strict=True)
            ):
                path = folder / "CIFAR100" / mode / f"class{target}" / f"{number:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                if mode == "train":
                    numbers[path] = number
        return cls(DatasetPaths(folder, "CIFAR100", ""), numbers)
