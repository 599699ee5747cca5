"""How close copies come to their pictures at how many bytes, beside bare AVIF at the same bytes.

    python tests/bench/bench_copies.py TRAIN_FOLDER --model WEIGHTS [--forms codebook:12@13,...] [--per-class 10]

TRAIN_FOLDER: <label>/<picture>, such as data/CIFAR10-120/train.  One copy of each picture is made by compress/run.py
(--resolution high, generated at --size) from what it keeps.  Bytes: of the kept file, mean over pictures.  PSNR in dB:
at the picture's own size, mean over pictures.  AVIF: the best PSNR over reduced sides and qualities whose payloads are
no longer than the form's in the mean.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from compress import run
from compress.forms import form_named, pixels, resize_back
from compress.presets import HIGH
from ControlNet.annotator.util import HWC3
from tests.bench.bench_pictures import psnr
from utils.data.paths import DatasetPaths

SIDES = (4, 6, 8, 10, 12, 16, 20, 24, 32)
QUALITIES = (1, 5, 10, 20, 30, 40, 50, 60)


def copy_pictures(folder: Path, per_class: int, train: Path) -> None:
    for label in (each for each in folder.iterdir() if each.is_dir()):
        (train / label.name).mkdir(parents=True)
        for picture in sorted(label.iterdir())[:per_class]:
            shutil.copy(picture, train / label.name)


def measure(paths: DatasetPaths, name: str, options: Sequence[str]) -> tuple[float, float, float]:
    """(bytes, PSNR, wall seconds to encode and to make a copy) of a form, means over pictures."""
    start = time.perf_counter()
    where = ["--data-dir", str(paths.data_dir), "--dataset", paths.dataset]
    if run.main([*where, "--form", name, "--seeds", "1", *options]):
        raise SystemExit(1)
    seconds = time.perf_counter() - start
    paths = DatasetPaths(paths.data_dir, paths.dataset, files=form_named(name, HIGH).files)
    pictures = [picture for label in paths.classes() for picture in paths.images(label)]
    kept = [file.stat().st_size if (file := paths.find_kept(picture)) else 0 for picture in pictures]
    quality = [psnr(HWC3(pixels(paths.copy(picture, 0))), HWC3(pixels(picture))) for picture in pictures]
    return float(np.mean(kept)), float(np.mean(quality)), seconds / len(pictures)


def avif_points(images: Sequence[np.ndarray]) -> list[tuple[float, float, str]]:
    """(bytes, PSNR, form) of AVIF at each side and quality."""
    points = []
    for side in SIDES:
        for quality in QUALITIES:
            form = form_named(f"avif:{quality}@{side}", HIGH)
            kept = [form.encode(image) for image in images]
            starts = [form.condition(k, i.shape[:2], i.ndim == 2).start for k, i in zip(kept, images, strict=True)]
            back = [resize_back(picture, *i.shape[:2]) for picture, i in zip(starts, images, strict=True)]
            values = [psnr(picture, HWC3(image)) for picture, image in zip(back, images, strict=True)]
            points.append((float(np.mean([len(each) for each in kept])), float(np.mean(values)), form.name))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--forms", default="codebook:12@13,codebook:12@27,codebook:12@53")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--size", default="64")
    options = parser.parse_args()
    settings = ["--resolution", "high", "--size", options.size, "--batch-size", "50", "--model", options.model]
    with tempfile.TemporaryDirectory() as folder:
        paths = DatasetPaths(Path(folder), "Pictures")
        copy_pictures(options.folder, options.per_class, paths.folder("train"))
        points = avif_points([pixels(picture) for label in paths.classes() for picture in paths.images(label)])
        rows = [(name, *measure(paths, name, settings)) for name in options.forms.split(",")]
    print("| form | bytes | PSNR, dB | seconds | AVIF: PSNR, dB | bytes | form |\n|---|---|---|---|---|---|---|")
    for name, size, quality, seconds in rows:
        best = max(
            (value, nbytes, form) for nbytes, value, form in points if nbytes <= size or nbytes == min(points)[0]
        )
        print(f"| {name} | {size:.0f} | {quality:.1f} | {seconds:.2f} | {best[0]:.1f} | {best[1]:.0f} | {best[2]} |")


if __name__ == "__main__":
    main()
