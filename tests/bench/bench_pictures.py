"""Bytes of picture forms as files and as what is kept of them, PSNR and time.

    python tests/bench/bench_pictures.py [FOLDER] [--pictures 200]

FOLDER: a dataset's train folder, such as data/CIFAR10/train; by default the bundled digits.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from compress.forms import form_named, pixels
from compress.presets import HIGH
from tests.digits import make_digits
from utils.data import codecs
from utils.errors import UserError

QUALITIES = {"jpeg": (1, 5, 15, 30), "webp": (0, 10, 30, 50), "avif": (1, 10, 20, 30, 40), "jxl": (1, 10, 30, 50)}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.square(one.astype(float) - other).mean(), 1e-9))


def row(name: str, images: list[np.ndarray]) -> str:
    form = form_named(name, HIGH)
    start = time.perf_counter()
    kept = [form.encode(image) for image in images]
    encoding = time.perf_counter() - start
    files = [
        codecs.file_of(each, form.codec, form.quality, image.shape[:2], image.ndim == 2)
        for each, image in zip(kept, images, strict=True)
    ]
    start = time.perf_counter()
    back = [form.condition(each, i.shape[:2], i.ndim == 2).start for each, i in zip(kept, images, strict=True)]
    decoding = time.perf_counter() - start
    quality = np.mean(
        [psnr(picture, i if i.ndim == 3 else i[:, :, None]) for picture, i in zip(back, images, strict=True)]
    )
    sizes = [np.mean([len(each) for each in of]) for of in (files, kept)]
    times = [1000 * seconds / len(images) for seconds in (encoding, decoding)]
    return f"{name:10} {sizes[0]:9.1f} {sizes[1]:9.1f} {quality:8.2f} {times[0]:9.1f} {times[1]:9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or make_digits(Path(made)).folder("train")
        files = sorted(file for file in folder.glob("*/*") if file.is_file())
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, options.pictures, dtype=int)]
        images = [pixels(file) for file in chosen]
    print(f"{len(images)} pictures; bytes as a file and as kept, PSNR in dB, ms a picture to encode and to decode")
    print(f"{'form':10} {'file':>9} {'kept':>9} {'PSNR':>8} {'encode':>9} {'decode':>9}")
    for codec, qualities in QUALITIES.items():
        for quality in qualities:
            try:
                print(row(f"{codec}:{quality}", images), flush=True)
            except UserError as error:
                print(f"{codec}: {error}")
                break


if __name__ == "__main__":
    main()
