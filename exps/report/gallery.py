"""Pictures that matplotlib draws: accuracy curves for a paper, and what prompts keep and what comes back from them.

python -m exps.report.gallery --data-dir data --dataset Food101 --copies 5 exemplars.png
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from compress.forms.edges import Edges, read
from compress.presets import HIGH
from compress.records import recorded_settings
from exps.report.entries import Runs, entries
from exps.report.figures import COLOURS
from utils import cli
from utils.data.images import image_bits, read_image
from utils.data.paths import DatasetPaths, data_dir, find_dataset
from utils.errors import UserError
from utils.files import printable, write_atomically

DESCRIPTION = "Draws what prompts keep and what comes back from them: image | edge map | copies, a row a class."
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^v<>PX*"


def drawn(text: str) -> str:
    """A name as matplotlib draws it: in UTF-8, no formula, and not left out of a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot(runs: Runs, path: Path) -> None:
    """Top-1 accuracy over the number of classes seen, a line a run; a band of one standard deviation over its seeds."""
    from matplotlib.figure import Figure  # slow to import, and needed here alone
    from matplotlib.ticker import MaxNLocator

    compared = entries(runs)
    crowded, several = len(compared) > 6, any(len(entry.orders) > 1 for entry in compared)
    figure = Figure(figsize=(10 if crowded else 7, max(4.5, 0.25 * len(compared))))
    figure.set_layout_engine("constrained" if crowded else "none")  # only a legend beside the axes needs to be measured
    axes = figure.subplots()
    for number, entry in enumerate(compared):
        colour, seen = COLOURS[number % len(COLOURS)], entry.results.summary.classes_seen
        mean, std = (np.array([getattr(value, key) for value in entry.top1]) for key in ("mean", "std"))
        label = drawn(f"{entry.title}: average {entry.average.mean:.1f} %")
        style, marker = STYLES[number // len(COLOURS) % len(STYLES)], MARKERS[number % len(MARKERS)]
        axes.plot(seen, mean, style, color=colour, marker=marker, markersize=5, alpha=0.9, label=label)
        if len(entry.orders) > 1:
            axes.fill_between(seen, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(drawn(_subject([results.config for _, results in runs.values()])), fontsize=10)
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 accuracy (%)" + (", mean ± standard deviation over class orders" if several else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _subject(configs: Sequence[Mapping[str, str]]) -> str:
    """Such as "CIFAR100, icarl / der, resnet32"."""
    titles = []
    for key in ("dataset", "model_name", "convnet_type"):
        names = list(dict.fromkeys(config[key] for config in configs))
        titles.append(" / ".join(names[:3]) + (" / ..." if len(names) > 3 else ""))
    return ", ".join(titles)


def plot_exemplars(paths: DatasetPaths, copies: int, file: Path, most_classes: int = 20) -> None:
    """Write the picture, with the first prompt of each class (the first most_classes of them).

    Shows the first `copies` copies as far as they are on disk.  Raises UserError where there is no edge map or no copy.
    """
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    rows: list[tuple[str, Path, Path]] = []
    for label, text in list(paths.class_texts().items())[:most_classes]:
        prompts = ((text, image, kept) for image in paths.images(label) if (kept := paths.find_kept(image)))
        rows += itertools.islice(prompts, 1)
    if not rows:
        raise UserError(f"{paths.folder('kept')} has no edge maps yet: run compress/run.py first.")
    existing = [[copy for k in range(copies) if (copy := paths.copy(image, k)).is_file()] for _, image, _ in rows]
    if copies and not any(existing):
        raise UserError(f"{paths.folder('copies')} has no copies yet: run compress/run.py first, or set --copies 0.")
    columns = ["image", "edge map", *(f"copy {k}" for k in range(max(map(len, existing))))]
    figure = Figure(figsize=(1.1 * len(columns) + 0.6, 1.1 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    for row, (text, image, kept), copy_files in zip(grid, rows, existing, strict=True):
        row[0].set_ylabel(drawn(text), fontsize=9)
        pictures = [_picture(image), _edge_map(paths, image, kept), *map(_picture, copy_files)]
        for axes, picture in zip(row, pictures, strict=False):
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in row[len(pictures) :]:
            axes.set_axis_off()
    write_atomically(file, lambda f: figure.savefig(f, format="png", dpi=100))


def _picture(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except OSError as error:
        raise UserError(f"cannot read image {error}") from error


def _edge_map(paths: DatasetPaths, image: Path, kept: Path) -> np.ndarray:
    """HxWx3 uint8.  A coded map's size follows from the image's and the recorded settings."""
    recorded = recorded_settings(paths.folder("kept"), [image.parent.name])[image.parent.name] or {}
    names = {each.name for each in fields(HIGH)}
    form = Edges(replace(HIGH, **{name: value for name, value in recorded.items() if name in names}))
    try:
        width, height, _ = image_bits(image)
        return np.dstack([read(kept.read_bytes(), form.edge_size(height, width))] * 3)
    except OSError as error:
        raise UserError(f"cannot read edge map {kept}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(arguments))


def command(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m exps.report.gallery", description=DESCRIPTION)
    parser.add_argument("--data-dir", help="folder of all datasets (default: $ESCORT_DATA_DIR, else ./data)")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--variant", metavar="NAME", default="", help="copies that --keep-apart NAME made")
    parser.add_argument("--copies", type=cli.at_least(0), default=5, help="most copies a row (default: 5)")
    parser.add_argument("file", type=cli.output_file, help="the picture to write, a .png")
    options = parser.parse_args(arguments)
    folder = data_dir(options.data_dir)
    paths = DatasetPaths(folder, find_dataset(folder, options.dataset), options.variant)
    plot_exemplars(paths, options.copies, options.file)
    print(options.file)


if __name__ == "__main__":
    sys.exit(main())
