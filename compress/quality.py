"""How good the copies on disk are, before anything is trained with them.

    python -m compress.quality --dataset MNIST --form edges [--json quality.json]

For each class, of its first --images images that have copies:

- edges: share of the edge pixels of the image with an edge of the copy near, within a pixel of the image or 1 % of its
  shorter side; other: the same with another class's copy, which is what chance gives;
- class: share of the copies that a small network puts into their class, and the same of the images themselves.  It was
  trained on the class's other images, and sees 32 x 32 pixels;
- variety: standard deviation over the copies of one image, mean over its pixels, in levels of 255.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from compress.forms import Form, form_named, pixels
from compress.forms.edges import Edges
from compress.options import fitting_preset
from compress.presets import PRESETS
from compress.records import names_in, recorded_settings
from utils import cli
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError
from utils.files import write_json

SIDE = 32
"""Pixels a side that the classifier sees."""
BATCH_SIZE = 64
"""Pictures of one of its training updates."""

COLUMNS = ("images", "copies", "edges %", "other %", "class %", "real %", "variety")


@dataclass(frozen=True)
class Looked:
    """An image and its copies, decoded."""

    label: str
    real: np.ndarray
    copies: list[np.ndarray]


def look(paths: DatasetPaths, labels: Sequence[str], most: int) -> tuple[list[Looked], list[tuple[Path, str]]]:
    """(the first `most` images of each class that have copies, the class's other images).

    At most half of a class's images are looked at, so that the classifier has others to learn from.
    """
    looked, rest = [], []
    for label in labels:
        images = paths.images(label)
        names = set(names_in(paths.copies_folder(label)))
        chosen = [image for image in images if paths.copy_name(image, 0) in names][: min(most, -(-len(images) // 2))]
        for image in chosen:
            number = next(k for k in count() if paths.copy_name(image, k) not in names)
            copies = [pixels(paths.copy(image, k)) for k in range(number)]
            looked.append(Looked(label, pixels(image), copies))
        rest += [(image, label) for image in images if image not in chosen]
    return looked, rest


@dataclass(frozen=True)
class Measured:
    """edges, other: (edge pixels found, edge pixels of the image), with its own copies and with another class's;
    guesses: whether the classifier is right about the image, and then about each copy; variety: None for one copy."""

    label: str
    edges: np.ndarray
    other: np.ndarray
    guesses: np.ndarray
    variety: float | None


def measure(looked: Sequence[Looked], rest: Sequence[tuple[Path, str]], form: Form, epochs: int) -> dict[str, Any]:
    """{"all": measures, "classes": {label: measures}}; measures: COLUMNS' values, None where there is nothing to tell.

    rest: real images, and their labels, that the classifier is trained on.
    """
    labels = sorted({each.label for each in looked} | {label for _, label in rest})
    targets = torch.tensor([labels.index(label) for _, label in rest])
    model = trained(batch(pixels(image) for image, _ in rest), targets, len(labels), epochs)
    rows = []
    for i, each in enumerate(looked):
        other = next((o for o in [*looked[i:], *looked[:i]] if o.label != each.label), None)
        guesses = predicted(model, [each.real, *each.copies]) == labels.index(each.label)
        spread = variety(each.copies) if len(each.copies) > 1 else None
        rows.append(Measured(each.label, *_edges(each, other, form), guesses, spread))
    by_label = {label: [row for row in rows if row.label == label] for label in labels}
    return {"all": _mean(rows), "classes": {label: _mean(rows) for label, rows in by_label.items() if rows}}


def _edges(each: Looked, other: Looked | None, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """(edge pixels found, edge pixels of the image), summed over the copies; the same of another image's first copy."""
    finder = Edges(form.preset)
    prompt = finder.edges(each.real)
    side = min(prompt.shape)
    reach = max(1, round(side / min(each.real.shape[:2])), round(side / 100))
    near_edges = np.sum([near(prompt, finder.edges(copy), reach) for copy in each.copies], axis=0)
    if other is None:
        return near_edges, np.zeros(2)
    stranger = cv2.resize(other.copies[0], each.real.shape[1::-1], interpolation=cv2.INTER_AREA)
    return near_edges, np.array(near(prompt, finder.edges(stranger), reach))


def _mean(rows: Sequence[Measured]) -> dict[str, Any]:
    """The values of COLUMNS."""

    def percent(part: float, whole: float) -> float | None:
        return 100 * float(part) / float(whole) if whole else None

    copies = [right for row in rows for right in row.guesses[1:]]
    varieties = [row.variety for row in rows if row.variety is not None]
    return {
        "images": len(rows),
        "copies": len(copies),
        "edges %": percent(*sum((row.edges for row in rows), np.zeros(2))),
        "other %": percent(*sum((row.other for row in rows), np.zeros(2))),
        "class %": percent(sum(copies), len(copies)),
        "real %": percent(sum(row.guesses[0] for row in rows), len(rows)),
        "variety": float(np.mean(varieties)) if varieties else None,
    }


def near(prompt: np.ndarray, edges: np.ndarray, reach: int) -> tuple[int, int]:
    """(edge pixels of the prompt with one of `edges` at most `reach` pixels away, edge pixels of the prompt)."""
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return int(((cv2.dilate(edges, kernel) > 0) & (prompt > 0)).sum()), int((prompt > 0).sum())


def variety(copies: Sequence[np.ndarray]) -> float:
    """Standard deviation over the copies of one image (of one shape), mean over pixels and channels: levels of 255."""
    return float(np.stack(copies).astype(np.float32).std(axis=0).mean())


def network(classes: int) -> nn.Module:
    """A classifier of 3 x SIDE x SIDE pictures."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(128 * (SIDE // 8) ** 2, classes))


def batch(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """Pictures (HxWx3 or HxW uint8) as the classifier takes them: N x 3 x SIDE x SIDE, -1 to 1."""
    rgb = [np.repeat(p[:, :, None], 3, 2) if p.ndim == 2 else p for p in pictures]
    resized = [cv2.resize(p, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for p in rgb]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(pictures: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int) -> nn.Module:
    """A classifier of real pictures (`batch`), trained with shifts of up to 3 pixels; its seed is fixed."""
    torch.manual_seed(0)
    model = network(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pictures)).split(BATCH_SIZE):
            if len(chosen) == 1 < len(pictures):  # too few for batch normalisation
                continue
            shift = torch.randint(-3, 4, (2,)).tolist()
            loss = nn.functional.cross_entropy(model(pictures[chosen].roll(shift, (2, 3))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def predicted(model: nn.Module, pictures: Iterable[np.ndarray]) -> np.ndarray:
    """The classifier's class of each picture."""
    return torch.cat([model(part).argmax(1) for part in batch(pictures).split(256)]).numpy()


def show(measures: Mapping[str, Any]) -> None:
    """Print a row for each class, then one for all, and what the columns are."""
    rows = []
    for label, of in [*measures["classes"].items(), ("all", measures["all"])]:
        values = ["-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in of.values()]
        rows.append([label, *values])
    cli.show_table(("class", *COLUMNS), rows, [str(__doc__).partition("have copies:\n\n")[2].strip()])


def command(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compress.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", metavar="D", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--form", default="edges", help="whose copies: edges, text, webp:10@64, ... [edges]")
    parser.add_argument("--keep-apart", metavar="NAME", default="", help="the variant, as compress/run.py has it")
    parser.add_argument("--resolution", choices=(*PRESETS, "auto"), default="auto")
    parser.add_argument("--images", metavar="N", type=cli.at_least(1), default=20, help="of each class [20]")
    parser.add_argument("--epochs", metavar="N", type=cli.at_least(1), help="of the classifier [8, or 300 updates]")
    parser.add_argument("--json", metavar="FILE", type=cli.output_file, help="also write the measures there")
    options = parser.parse_args(arguments)
    plain = DatasetPaths(data_dir(options.data_dir), options.dataset)
    preset = PRESETS[fitting_preset(plain) if options.resolution == "auto" else options.resolution]
    form = form_named(options.form, preset)
    paths = DatasetPaths(plain.data_dir, plain.dataset, options.keep_apart, form.files)
    looked, rest = look(paths, paths.classes(), options.images)
    if not looked:
        raise UserError(
            f"no copies in {paths.folder('copies')}: make them with compress/run.py --dataset {paths.dataset} "
            f"--form {form.name}."
        )
    if not rest:
        raise UserError(f"{paths.folder('train')}: a class needs two images at least, one to train the classifier on.")
    epochs = options.epochs or max(8, ceil(300 / ceil(len(rest) / BATCH_SIZE)))  # 300 updates or more
    measures = measure(looked, rest, form, epochs)
    show(measures)
    if options.json:
        made_by = recorded_settings(paths.folder("copies"), measures["classes"])
        about = {"dataset": paths.dataset, "form": form.name, "variant": paths.variant, "made_by": made_by}
        write_json(options.json, {**about, **measures})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.run(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
