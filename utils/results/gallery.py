"""Draws what prompts keep and what comes back from them: image | edge map | copies, a row a class.

python -m utils.results.gallery --data-dir data --dataset Food101 --copies 5 exemplars.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from utils.data.images import read_image, write_atomically
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError


def plot_exemplars(paths: DatasetPaths, copies: int, file: Path, most_classes: int = 20) -> None:
    """Write the picture, with the first prompt of each class (the first most_classes of them).

    Copies that are not on disk stay empty.  Raises UserError where no class has an edge map.
    """
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    texts = paths.class_texts()
    rows = []
    for label in list(texts)[:most_classes]:
        image = next((image for image in paths.images(label) if paths.find_edge_map(image)), None)
        if image is not None:
            rows.append((texts[label], image))
    if not rows:
        raise UserError(f"{paths.folder('edge_maps')} has no edge maps yet: run compress/run.py first.")
    columns = ["image", "edge map", *(f"copy {k}" for k in range(copies))]
    figure = Figure(figsize=(1.1 * len(columns) + 0.6, 1.1 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    for row, (text, image) in zip(grid, rows, strict=True):
        row[0].set_ylabel(text, fontsize=9)
        row[0].imshow(_picture(image))
        row[1].imshow(_picture(paths.find_edge_map(image)))
        for k, axes in enumerate(row[2:]):
            if paths.copy(image, k).is_file():
                axes.imshow(_picture(paths.copy(image, k)))
    write_atomically(file, lambda f: figure.savefig(f, format="png", dpi=100))


def _picture(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except OSError as error:
        raise UserError(f"cannot read image {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.results.gallery", description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="folder of all datasets (default: $ESCORT_DATA_DIR, else ./data)")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--variant", metavar="NAME", default="", help="copies that --keep-apart NAME made")
    parser.add_argument("--copies", type=int, default=5, help="copies a row (default: 5)")
    parser.add_argument("file", type=Path, help="the picture to write, a .png")
    options = parser.parse_args(arguments)
    try:
        paths = DatasetPaths(data_dir(options.data_dir), options.dataset, options.variant)
        plot_exemplars(paths, options.copies, options.file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
