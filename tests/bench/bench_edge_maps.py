"""How many bytes edge maps take by form and coder: python tests/bench/bench_edge_maps.py [FOLDER] [--sides 224 112 64]

Edge maps of images below FOLDER (without one: of the handwritten digits that experiments train on, and that the coder
was not trained on), found as compress/run.py does, of the images as they are or reduced to each of --sides.  First, the
coders: mean bytes of the same maps by what Pillow writes losslessly, by an adaptive coder with JBIG2's context of 10
pixels (ideal code length, without the coder's own bytes), and by compress/coding; how much that is of the WebP; the
processor's time for writing and reading one.  Packages that the project does not depend on (pillow-jxl-plugin,
pyoxipng) are measured where they are installed.  Every map is read back and compared; a coder that loses something is
marked.  Then the forms: mean bytes of what each keeps, and the times of `encode` and `condition`.

OMP_NUM_THREADS=1 gives the times of one core.
"""

import argparse
import importlib.util
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
from PIL import Image

from compress.coding import edge_maps
from compress.forms import form_named, reduced
from compress.presets import PRESETS
from utils.curate.command import DIGIT_SPLIT, read_digits
from utils.data.images import is_image, read_image

FORMS = "edges,edges:1,edges:1.5,edges:2,edges+colour@8,edges+colour@16,edges:1.5+colour@16,edges+webp:10@16"
TEMPLATE = ((0, -1), (0, -2), (0, -3), (0, -4), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-1, 2), (-2, 0))
"""Of JBIG2's kind: (rows, columns) from a pixel to the ten that its probability depends on."""

Coder = tuple[Callable[[np.ndarray], bytes], Callable[[bytes, tuple[int, int]], np.ndarray]]
"""(an edge map, HxW uint8, to bytes; bytes and the map's size to the map)."""


def pillow(kind: str, mode: str = "1", **options) -> Coder:
    def write(edges: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(edges > 0).convert(mode).save(file, kind, **options)
        return file.getvalue()

    return write, lambda code, size: np.asarray(Image.open(io.BytesIO(code)).convert("L"))


def oxipng() -> Coder:
    write, read = pillow("PNG")
    package = importlib.import_module("oxipng")
    return lambda edges: package.optimize_from_memory(write(edges), level=6), read


def coders() -> dict[str, Coder]:
    chosen = {
        "BMP, 8 bits, as the published scripts": pillow("BMP", "L"),
        "PNG, optimize": pillow("PNG", optimize=True),
        "TIFF, group 4": pillow("TIFF", compression="group4"),
        "JPEG 2000": pillow("JPEG2000", "L", irreversible=False),
        "WebP, method 4, as earlier versions": pillow("WEBP", lossless=True, method=4, quality=100),
        "WebP, method 6": pillow("WEBP", lossless=True, method=6, quality=100),
        "compress/coding/edge_maps.py": (edge_maps.encode, lambda code, size: edge_maps.decode(code, *size)),
    }
    if importlib.util.find_spec("oxipng"):
        chosen["PNG, oxipng 6"] = oxipng()
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # registers itself with Pillow
        chosen["JPEG XL, effort 7"] = pillow("JXL", "L", lossless=True, effort=7)
    return chosen


def adaptive_bytes(edges: np.ndarray) -> float:
    """The ideal code length of a map under counts that start at 1/2 in each context (Krichevsky and Trofimov 1981)."""
    pixels = np.pad(edges > 0, ((2, 0), (4, 4))).astype(int)
    height, width = edges.shape
    context = sum(
        pixels[2 + row : 2 + row + height, 4 + column : 4 + column + width] << i
        for i, (row, column) in enumerate(TEMPLATE)
    )
    counts = np.bincount((context << 1 | (edges > 0)).ravel(), minlength=2 << len(TEMPLATE)).reshape(-1, 2)
    bits = 0.0
    for zeros, ones in counts[counts.any(1)].tolist():
        bits += math.lgamma(zeros + ones + 1) - math.lgamma(zeros + 0.5) - math.lgamma(ones + 0.5) + math.log(math.pi)
    return bits / math.log(2) / 8


def pictures(folder: Path | None, limit: int) -> Iterator[np.ndarray]:
    """`limit` images spread over the folder; digits where there is no folder."""
    if folder is None:
        images, labels = read_digits()
        chosen = next(numbers for name, mode, numbers in DIGIT_SPLIT if (name, mode) == ("MNIST", "train"))
        files = [image for digit in range(10) for image in images[labels == digit][list(chosen)]]
    else:
        files = sorted(path for path in folder.rglob("*") if is_image(path))
    for file in [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(limit, len(files)), dtype=int))]:
        yield file if folder is None else np.asarray(read_image(file))


def measured(make: Callable, use: Callable, items: list) -> tuple[list, list, float, float]:
    """(what `make` makes of each item, what `use` makes of that and the item, CPU milliseconds of either)."""
    start = time.process_time()
    made = [make(item) for item in items]
    middle = time.process_time()
    used = [use(each, item) for each, item in zip(made, items, strict=True)]
    end = time.process_time()
    return made, used, 1000 * (middle - start) / len(items), 1000 * (end - middle) / len(items)


def compare_coders(maps: list[np.ndarray]) -> None:
    rows = {}
    for name, (write, read) in coders().items():
        write(maps[0])  # loads what it needs
        codes, back, write_ms, read_ms = measured(write, lambda code, edges, read=read: read(code, edges.shape), maps)
        is_exact = all(np.array_equal(one, other) for one, other in zip(back, maps, strict=True))
        rows[name] = np.mean([len(code) for code in codes]), f"{write_ms:10.2f}{read_ms:9.2f}", is_exact
    rows["adaptive, context of 10 pixels (ideal)"] = np.mean([adaptive_bytes(edges) for edges in maps]), "", True
    webp = rows["WebP, method 4, as earlier versions"][0]
    print(f"{'coder':40}{'bytes':>9}{'of WebP':>9}{'write ms':>10}{'read ms':>9}")
    for name, (size, times, is_exact) in rows.items():
        print(f"{name:40}{size:9,.1f}{100 * size / webp:8.1f}%{times}" + ("" if is_exact else "  LOSES SOMETHING"))


def compare_forms(names: list[str], preset, images: list[np.ndarray]) -> None:
    print(f"{'form':40}{'bytes':>9}{'':9}{'write ms':>10}{'read ms':>9}")
    for name in names:
        form = form_named(name, preset)
        kept, _, write_ms, read_ms = measured(
            form.encode, lambda kept, image, form=form: form.condition(kept, image.shape[:2]), images
        )
        print(f"{name:40}{np.mean([len(each) for each in kept]):9,.1f}{'':9}{write_ms:10.2f}{read_ms:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="images, at any depth (default: digits)")
    parser.add_argument("--resolution", choices=list(PRESETS), default="high")
    parser.add_argument("--sides", type=int, nargs="+", default=[0], help="shorter sides; 0 for the image's own [0]")
    parser.add_argument("--forms", default=FORMS, help="names with commas between them [%(default)s]")
    parser.add_argument("--limit", type=int, default=100, help="images looked at [100]")
    options = parser.parse_args()
    preset = PRESETS[options.resolution]
    taken = list(pictures(options.folder, options.limit))
    if not taken:
        parser.error(f"no images below {options.folder}")
    for side in options.sides:
        sizes = [reduced(*image.shape[:2], side or None)[::-1] for image in taken]
        images = [cv2.resize(i, size, interpolation=cv2.INTER_AREA) for i, size in zip(taken, sizes, strict=True)]
        maps = [form_named("edges", preset).edges(image) for image in images]
        print(
            f"\n{options.folder or 'digits'}, side {side or 'as it is'}, {preset.name} resolution: {len(maps)} edge "
            f"maps, {100 * np.mean([np.mean(edges > 0) for edges in maps]):.1f} % edges; one bit a pixel takes "
            f"{np.mean([edges.size for edges in maps]) / 8:,.0f} bytes"
        )
        compare_coders(maps)
        compare_forms(options.forms.split(","), preset, images)


if __name__ == "__main__":
    main()
