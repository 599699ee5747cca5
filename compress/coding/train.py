"""Train the networks that code edge maps: python -m compress.coding.train --small DIR --large DIR [--out FILE]

Writes compress/coding/edge_maps.npz: a network of `edge_maps` for each of its KINDS, of handwritten digits (the 250 of
each that MNIST-ControlNet has), the pictures below --small, those below --large at several sizes, and the same after a
blur or an enlargement; and the tables of `colour`.  Take pictures whose bytes are not going to be measured.  The file
that ships was made from CIFAR-10's train pictures from number 1,000 of each class on and Imagenette's test pictures;
about half an hour on one core.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, relu

from compress.coding import colour
from compress.coding import edge_maps as coder
from compress.forms import reduced, resized
from compress.forms.edges import Edges
from compress.presets import PRESETS
from utils import cli
from utils.curate.command import read_digits
from utils.data.images import is_image, read_image
from utils.errors import UserError
from utils.files import write_atomically

HIDDEN = 32
LARGE_SIDES = (64, 112, 160, 224)
SKETCHES = ((64, 1.0), (112, 1.5), (224, 1.5), (224, 2.0))
"""Sides and sigmas of the blurred maps."""
STEPS = {"drawings": 3000, "small": 3000, "large": 6000, "smooth": 2000}
PIXELS_A_STEP = {"drawings": 10_000, "small": 15_000, "large": 20_000, "smooth": 15_000}
CROP = 48
"""Longest side, in pixels, of what is taken of a map at a time."""
LEARNING_RATE = 5e-3


class Predictor(torch.nn.Module):
    """The network of `edge_maps.Network`, in floating point."""

    def __init__(self):
        super().__init__()
        places = coder.PLACES + 2 * coder.BORDER
        self.first = torch.nn.Linear(coder.PIXELS + coder.SHARES, HIDDEN)
        self.rows, self.columns = (torch.nn.Linear(places, HIDDEN, bias=False) for _ in range(2))
        self.second = torch.nn.Linear(HIDDEN, HIDDEN)
        self.last = torch.nn.Linear(HIDDEN, 1 << coder.LEFT)
        torch.nn.init.constant_(self.last.bias, -2.0)  # edges are rare
        for layer in (self.rows, self.columns):
            torch.nn.init.zeros_(layer.weight)

    def forward(self, inputs, rows, columns, left) -> torch.Tensor:
        """Logits of N pixels from their inputs (shares of edges between 0 and 2), places and patterns to the left."""
        hidden = relu(self.first(inputs) + self.rows(rows) + self.columns(columns))
        hidden = relu(self.second(hidden))
        return (hidden * self.last.weight[left]).sum(1) + self.last.bias[left]

    def integers(self) -> dict[str, np.ndarray]:
        """The weights as `edge_maps.Network` has them.  Raises ValueError where a sum could reach 2^24."""
        last = coder.UNIT * coder.HIDDEN_UNIT
        first = self.first.weight.T * coder.INPUT_UNIT
        first = torch.cat([first[: coder.PIXELS], first[coder.PIXELS :] / SHARE_UNIT])
        weights = {
            "first": first,
            "rows": self.rows.weight.T * coder.INPUT_UNIT,
            "columns": self.columns.weight.T * coder.INPUT_UNIT,
            "bias": self.first.bias * coder.INPUT_UNIT,
            "second": self.second.weight.T * coder.UNIT,
            "second_bias": self.second.bias * last,
            "last": self.last.weight * coder.UNIT,
            "last_bias": self.last.bias * last,
        }
        integers = {name: weight.detach().round().numpy().astype(np.int32) for name, weight in weights.items()}
        if max(most := largest_sums(integers)) >= 1 << 24:
            raise ValueError(f"sums of {most} are not exact in float32")
        return integers


def largest_sums(weights: Mapping[str, np.ndarray]) -> list[int]:
    """Bounds of the three layers' sums, whatever the inputs are."""
    of = {name: np.abs(array.astype(np.int64)) for name, array in weights.items()}
    inputs = np.repeat([1, 255], [coder.PIXELS, coder.SHARES])
    first = inputs @ of["first"] + of["rows"].sum(0) + of["columns"].sum(0) + of["bias"]
    second = coder.MOST * of["second"].sum(0) + of["second_bias"]
    last = coder.MOST * of["last"].sum(1) + of["last_bias"]
    return [int(sums.max()) for sums in (first, second, last)]


SHARE_UNIT = 128
"""Inputs for shares of edges, and for the size, are divided by this in training."""


class Pixels:
    """The pixels of some edge maps, with what the network is told about each."""

    def __init__(self, maps: Sequence[np.ndarray]):
        self.fields = []
        for edges in maps:
            field = coder.Field(*edges.shape)
            field.set_rows(0, edges)
            self.fields.append((field, (field.shares(slice(0, field.height)).astype(np.uint8))))

    def drawn(self, random: np.random.Generator, count: int) -> tuple[torch.Tensor, ...]:
        """(inputs, rows, columns, left, pixels) of about `count` pixels, in rectangles of maps drawn at random."""
        parts, drawn = [], 0
        while drawn < count:
            field, shares = self.fields[random.integers(len(self.fields))]
            height, width = min(CROP, field.height), min(CROP, field.width)
            top, start = random.integers(field.height - height + 1), random.integers(field.width - width + 1)
            parts.append(self._part(field, shares, slice(top, top + height), slice(start, start + width)))
            drawn += height * width
        return tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))

    def _part(self, field, shares, rows: slice, columns: slice) -> tuple[np.ndarray, ...]:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        inputs = np.empty((height, width, coder.PIXELS + coder.SHARES), np.float32)
        inputs[:, :, : coder.PIXELS] = field.windows[rows, columns].reshape(height, width, -1)
        inputs[:, :, coder.PIXELS : -1] = shares[rows, columns] / np.float32(SHARE_UNIT)
        inputs[:, :, -1] = field.size_input / SHARE_UNIT
        places = coder.inputs_of_places(field.height)[rows], coder.inputs_of_places(field.width)[columns]
        count = height * width
        return (
            inputs.reshape(count, -1),
            np.repeat(places[0], width, 0),
            np.tile(places[1], (height, 1)),
            field.left(rows).reshape(height, -1)[:, columns].reshape(count).astype(np.int64),
            field.pixels[rows, columns].reshape(count).astype(np.float32),
        )


def trained(kind: str, groups: Sequence[Sequence[np.ndarray]]) -> Predictor:
    """A network for the maps of all groups, each of which counts the same."""
    torch.manual_seed(0)
    network, random, steps = Predictor(), np.random.default_rng(0), STEPS[kind]
    pixel_groups = [Pixels(maps) for maps in groups]
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        parts = [group.drawn(random, PIXELS_A_STEP[kind] // len(groups)) for group in pixel_groups]
        *inputs, pixels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        loss = binary_cross_entropy_with_logits(network(*inputs), pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"{kind}: step {step + 1} of {steps}, {loss.item() / np.log(2):.4f} bits a pixel", flush=True)
    return network


def probabilities() -> np.ndarray:
    """The probability of an edge for each rounded logit, in units of 2^-16."""
    logits = (np.arange(-coder.MOST_LOGIT, coder.MOST_LOGIT + 1) + 0.5) / coder.LOGIT_UNIT
    whole = 1 << coder.PRECISION
    return np.clip(np.rint(whole / (1 + np.exp(-logits))), 1, whole - 1).astype(np.uint16)


def counted(images: Iterable[np.ndarray]) -> np.ndarray:
    """`colour.tables` for pictures like these."""
    counts = np.full((2, colour.FREQUENCIES, colour.NEIGHBOURS, colour.DECISIONS, 2), 0.4)
    for image in images:
        for level, context in colour.levels_of(image):
            for i in range(min(abs(level) + 1, colour.DECISIONS)):
                counts[context][i, int(abs(level) > i)] += 1
    whole = 1 << coder.PRECISION
    return np.clip(np.rint(whole * counts[..., 1] / counts.sum(-1)), 32, whole - 32).astype(np.uint16)


def pictures(folder: Path, first: int, every: int) -> list[np.ndarray]:
    """Pictures below a folder: of each of its folders those from number `first` on, and of these every n-th."""
    files: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if is_image(file):
            files.setdefault(file.parent, []).append(file)
    chosen = [file for folder_files in files.values() for file in folder_files[first::every]]
    if not chosen:
        raise UserError(f"no images below {folder} from number {first} of each folder on.")
    return [np.asarray(read_image(file)) for file in chosen]


def smaller(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    return resized(image, reduced(height, width, side))


def maps_of(kind: str, small: Callable[[], list[np.ndarray]], large: Callable[[], list]) -> list[list[np.ndarray]]:
    """Groups of edge maps of a kind to train on.  small, large: give the pictures."""
    plain, enlarged = Edges(PRESETS["high"]), Edges(PRESETS["low"])
    if kind == "drawings":
        digits, labels = read_digits()
        return [[plain.edges(image) for digit in range(10) for image in digits[labels == digit][:250]]]
    if kind == "small":
        return [[plain.edges(image) for image in small()]]
    if kind == "large":
        return [[plain.edges(smaller(image, side)) for image in large()] for side in LARGE_SIDES]
    sketches = [[Edges(PRESETS["high"], sigma=sigma).edges(smaller(image, side)) for image in large()]
                for side, sigma in SKETCHES]  # fmt: skip
    return [*sketches, *([enlarged.edges(image) for image in images] for images in (small()[::20], large()[::4]))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compress.coding.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--small", type=cli.path, required=True, metavar="DIR", help="pictures of about 32 pixels")
    parser.add_argument("--small-from", type=int, default=1000, metavar="N", help=(
        "leave out the first N of each folder [%(default)s]"
    ))  # fmt: skip
    parser.add_argument("--large", type=cli.path, required=True, metavar="DIR", help="pictures of 224 pixels or more")
    parser.add_argument("--kinds", nargs="+", choices=coder.KINDS, default=coder.KINDS, metavar="KIND", help=(
        f"train these alone, and keep the others of --out: {', '.join(coder.KINDS)}"
    ))  # fmt: skip
    parser.add_argument("--out", type=cli.path, default=coder.FILE, metavar="FILE", help="[%(default)s]")
    return cli.run(lambda: train(parser.parse_args(arguments)))


def train(options: argparse.Namespace) -> int:
    small = cache(lambda: pictures(options.small, options.small_from, 4))
    large = cache(lambda: pictures(options.large, 0, 1))
    tiny = (smaller(image, side) for side in (8, 12, 16, 24) for image in [*small()[::10], *large()[::3]])
    arrays = {"colour": counted(tiny), "probabilities": probabilities()}
    if options.out.exists() and set(options.kinds) != set(coder.KINDS):
        with np.load(options.out) as earlier:
            arrays = dict(earlier) | arrays
    for kind in options.kinds:
        weights = trained(kind, maps_of(kind, small, large)).integers()
        arrays |= {f"{kind}/{name}": weight for name, weight in weights.items()}
        write_atomically(options.out, partial(np.savez_compressed, **arrays))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
