"""What exemplar forms cost on a dataset's own images, as JSON, for programs that plan.

    python -m compress.measure --dataset MNIST --forms real,webp:10,edges [--settings "--model tiny ..."] [--time]

Printed: classes, images_per_class (of the smallest class), images (that were looked at), image_bytes; forms: for each
its bytes (mean of an exemplar, with its length and size where these vary), most_bytes, units (null without such a
count), text_bytes (of the longest class label and text), needs_model, deterministic, copy_bytes and, with --time,
seconds_per_copy; or its error.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from compress.forms import Form
from compress.options import Machine, fitting_preset, parse_settings
from utils import cli
from utils.data.images import image_bits, read_image
from utils.data.paths import DatasetPaths, data_dir, find_dataset
from utils.errors import UserError
from utils.memory.packed import FormShare, Row, named

REAL = "real"


def sample_of(paths: DatasetPaths, number: int) -> tuple[list[Path], list[int]]:
    """About `number` train images, evenly over the classes, and the sizes of all classes.  Raises UserError."""
    classes = [images for label in paths.classes() if (images := paths.images(label))]
    if not classes:
        raise UserError(f"no images in {paths.folder('train')}.")
    each = -(-number // len(classes))
    chosen = [images[i] for images in classes for i in np.linspace(0, len(images) - 1, each, dtype=int)]
    return list(dict.fromkeys(chosen)), [len(images) for images in classes]


def measured(paths: DatasetPaths, images: Sequence[Path], form: Form | None) -> dict[str, Any]:
    """What exemplars of a form, None for real ones, cost.  Raises OSError where no image can be read."""
    costs = {"needs_model": False, "deterministic": True, "copy_bytes": 0.0, "text_bytes": 0, "seconds_per_copy": 0.0}
    if form is None:
        sizes = [image.stat().st_size for image in images]
        return {**costs, "bytes": fmean(sizes), "most_bytes": max(sizes), "units": 1.0}
    sizes, copies, texts = [], [], paths.class_texts()
    units: list[float | None] = []
    share = FormShare(form.name)
    for image in images:
        width, height, bits = image_bits(image)
        sizes.append(len(form.stand_in(image, texts[image.parent.name])))
        share = share.plus(Row(sizes[-1], (width, height), bits))
        raw_bits = form.raw_bits(height, width)
        units.append(None if raw_bits is None else raw_bits / (width * height * bits))
        file = io.BytesIO()
        form.save_copy(np.asarray(read_image(image)), file, bits != 24)
        copies.append(file.tell())
    costs |= {"needs_model": form.needs_model, "deterministic": form.deterministic, "copy_bytes": fmean(copies)}
    costs["text_bytes"] = max(len(named(0, label, text)) for label, text in texts.items())
    counted = [each for each in units if each is not None]
    units_mean = fmean(counted) if len(counted) == len(units) else None
    return {**costs, "bytes": share.bytes_of_one, "most_bytes": max(sizes), "units": units_mean}


def seconds_of_copy(paths: DatasetPaths, images: Sequence[Path], form: Form, machine: Machine, device: str) -> float:
    """Seconds that a copy takes here, measured on a batch.  Raises UserError without the model's weights."""
    from compress.generators.build import choose_precision, make_generator
    from compress.summary import seconds_per_copy
    from utils.devices import launch

    if not form.needs_model:
        return 0.0
    fabric = launch(device)
    precision = choose_precision(machine.precision, fabric.device, machine.engine)
    generator = make_generator(form, machine, fabric.device, precision)
    text = next(iter(paths.class_texts().values()))
    requests = [form.requests(image, form.stand_in(image, text), text, [0])[0] for image in images]
    return seconds_per_copy(form, generator, requests)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.measure", description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--forms", default=REAL, help="names with commas between them, `real` for image files")
    parser.add_argument("--settings", default="", help="options of compress/run.py about settings and model")
    parser.add_argument("--sample", type=cli.at_least(1), default=64, metavar="N", help="images to look at [64]")
    parser.add_argument("--time", action="store_true", help="also time a copy with the model")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    folder = data_dir(options.data_dir)
    paths = DatasetPaths(folder, find_dataset(folder, options.dataset))
    images, sizes = sample_of(paths, options.sample)
    forms: dict[str, Any] = {}
    for name in options.forms.split(","):
        try:
            if name == REAL:
                forms[name] = measured(paths, images, None)
                continue
            form, machine, *_ = parse_settings(options.settings, fitting_preset(paths), name)
            forms[name] = measured(paths, images, form)
            if options.time:
                forms[name]["seconds_per_copy"] = seconds_of_copy(paths, images, form, machine, options.device)
        except (UserError, OSError) as error:
            forms[name] = {"error": str(error)}
    counts = {"classes": len(sizes), "images_per_class": min(sizes), "train_images": sum(sizes), "images": len(images)}
    print(json.dumps({**counts, "image_bytes": fmean(image.stat().st_size for image in images), "forms": forms}))


if __name__ == "__main__":
    sys.exit(main())
