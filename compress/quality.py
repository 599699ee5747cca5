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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from compress.forms import Form, form_named, pixels
from compress.forms.edges import Edges
from compress.measures import BATCH_SIZE, batch, near, predicted, trained, variety
from compress.options import at_least_one, fitting_preset
from compress.presets import PRESETS
from compress.records import recorded_settings
from utils import cli
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError
from utils.results.files import write_json

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
    found, rest = [], []
    for label in labels:
        images = paths.images(label)
        names = {file.name for file in folder.iterdir()} if (folder := paths.copies_folder(label)).is_dir() else set()
        chosen = [image for image in images if paths.copy_name(image, 0) in names][: min(most, -(-len(images) // 2))]
        for image in chosen:
            there = [name in names for name in paths.copy_names(image, len(names) + 1)]
            copies = [pixels(paths.copy(image, k)) for k in range(there.index(False))]
            found.append(Looked(label, pixels(image), copies))
        rest += [(image, label) for image in images if image not in chosen]
    return found, rest


def measured(found: Sequence[Looked], rest: Sequence[tuple[Path, str]], form: Form, epochs: int) -> dict[str, Any]:
    """{"all": measures, "classes": {label: measures}}; measures: COLUMNS' values, None where there is nothing to tell.

    rest: real images, and their labels, that the classifier is trained on.
    """
    labels = sorted({each.label for each in found} | {label for _, label in rest})
    targets = torch.tensor([labels.index(label) for _, label in rest])
    model = trained(batch(pixels(image) for image, _ in rest), targets, len(labels), epochs)
    rows = []
    for i, each in enumerate(found):
        other = next((o for o in [*found[i:], *found[:i]] if o.label != each.label), None)
        guesses = predicted(model, [each.real, *each.copies]) == labels.index(each.label)
        edges, chance = _edges(each, other, form)
        rows.append((each, edges, chance, guesses))
    of_class = {label: _mean([row for row in rows if row[0].label == label]) for label in labels}
    return {"all": _mean(rows), "classes": {label: of for label, of in of_class.items() if of["images"]}}


def _edges(each: Looked, other: Looked | None, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """(edge pixels found, edge pixels of the image), summed over the copies; the same of another image's first copy."""
    finder = Edges(form.preset)
    prompt = finder.edges(each.real)
    side = min(prompt.shape)
    reach = max(1, round(side / min(each.real.shape[:2])), round(side / 100))
    found = np.sum([near(prompt, finder.edges(copy), reach) for copy in each.copies], axis=0)
    if other is None:
        return found, np.zeros(2)
    stranger = cv2.resize(other.copies[0], each.real.shape[1::-1], interpolation=cv2.INTER_AREA)
    return found, np.array(near(prompt, finder.edges(stranger), reach))


def _mean(rows: Sequence[tuple[Looked, np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    def share(found: float, total: float) -> float | None:
        return 100 * float(found) / float(total) if total else None

    several = [variety(each.copies) for each, *_ in rows if len(each.copies) > 1]
    guesses = [row[3] for row in rows]
    right = sum(of[1:].sum() for of in guesses), sum(len(of) - 1 for of in guesses)
    return dict(
        zip(
            COLUMNS,
            (
                len(rows),
                sum(len(each.copies) for each, *_ in rows),
                share(*sum((row[1] for row in rows), np.zeros(2))),
                share(*sum((row[2] for row in rows), np.zeros(2))),
                share(*right),
                share(sum(of[0] for of in guesses), len(guesses)),
                float(np.mean(several)) if several else None,
            ),
            strict=True,
        )
    )


def table(measures: Mapping[str, Any]) -> str:
    """As Markdown: a row for each class, then one for all."""
    rows = [f"| class | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, of in [*measures["classes"].items(), ("all", measures["all"])]:
        values = ["–" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in of.values()]
        rows.append(f"| {label} | {' | '.join(values)} |")
    return "\n".join(rows)


def default_epochs(nb_pictures: int) -> int:
    """Eight, or as many as 300 updates take."""
    return max(8, ceil(300 / ceil(nb_pictures / BATCH_SIZE)))


def command(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compress.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="D", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--form", default="edges", help="whose copies: edges, text, webp:10@64, ... [edges]")
    parser.add_argument("--keep-apart", metavar="NAME", default="", help="the variant, as compress/run.py has it")
    parser.add_argument("--resolution", choices=(*PRESETS, "auto"), default="auto")
    parser.add_argument("--images", metavar="N", type=at_least_one, default=20, help="of each class [20]")
    parser.add_argument("--epochs", metavar="N", type=at_least_one, help="of the classifier [8, or 300 updates]")
    parser.add_argument("--json", metavar="FILE", type=cli.output_file, help="also write the measures there")
    options = parser.parse_args(arguments)
    plain = DatasetPaths(data_dir(options.data_dir), options.dataset)
    preset = PRESETS[fitting_preset(plain) if options.resolution == "auto" else options.resolution]
    form = form_named(options.form, preset)
    paths = DatasetPaths(plain.data_dir, plain.dataset, options.keep_apart, form.files)
    found, rest = look(paths, paths.classes(), options.images)
    if not found:
        raise UserError(
            f"no copies in {paths.folder('copies')}: make them with compress/run.py --dataset {paths.dataset} "
            f"--form {form.name}."
        )
    if not rest:
        raise UserError(f"{paths.folder('train')}: a class needs two images at least, one to train the classifier on.")
    measures = measured(found, rest, form, options.epochs or default_epochs(len(rest)))
    print(table(measures))
    if options.json:
        made_by = recorded_settings(paths.folder("copies"), measures["classes"])
        about = {"dataset": paths.dataset, "form": form.name, "variant": paths.variant, "made_by": made_by}
        write_json(options.json, {**about, **measures})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.run(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
