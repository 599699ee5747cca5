"""How many bytes an edge map takes in each lossless form: python tests/bench/bench_edge_maps.py [FOLDER]

Edge maps of the images below FOLDER (without one: of handwritten digits), extracted as compress/run.py does.  For each
form that Pillow writes: mean bytes, how much that is of the best PNG and of the image's own file, and how long writing
and reading take.  Forms of packages that the project does not depend on (pillow-jxl-plugin, pyoxipng) are measured
where they are installed.  Every form is read back and compared; one that loses something is marked.
"""

import argparse
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from compress.forms.edges import Edges, written
from compress.presets import PRESETS
from utils.curate.command import read_digits
from utils.data.images import is_image, read_image

Write = Callable[[Image.Image, io.BytesIO], object]


def pillow(kind: str, mode: str = "1", **options) -> Write:
    return lambda edges, file: edges.convert(mode).save(file, kind, **options)


def oxipng(edges: Image.Image, file: io.BytesIO) -> None:
    plain = io.BytesIO()
    edges.save(plain, "PNG")
    file.write(importlib.import_module("oxipng").optimize_from_memory(plain.getvalue(), level=6))


def forms() -> dict[str, Write]:
    """Name -> how it is written, from a picture of mode "1"."""
    chosen = {
        "BMP, 8 bits, as the published scripts": pillow("BMP", "L"),
        "PNG": pillow("PNG"),
        "PNG, optimize": pillow("PNG", optimize=True),
        "PNG, level 9, filtered": pillow("PNG", compress_level=9, compress_type=1),
        "PNG, level 9, run lengths": pillow("PNG", compress_level=9, compress_type=3),
        "TIFF, group 4": pillow("TIFF", compression="group4"),
        "TIFF, deflate": pillow("TIFF", compression="tiff_adobe_deflate"),
        "JPEG 2000": pillow("JPEG2000", "L", irreversible=False),
        "AVIF": pillow("AVIF", "L", quality=100, subsampling="4:0:0"),
        "WebP, method 0": pillow("WEBP", lossless=True, method=0, quality=100),
        "WebP, method 4": pillow("WEBP", lossless=True, method=4, quality=100),
        "WebP, method 5": pillow("WEBP", lossless=True, method=5, quality=100),
        "WebP, method 6": pillow("WEBP", lossless=True, method=6, quality=100),
        "as compress/forms/edges.py writes it": lambda edges, file: file.write(written(np.asarray(edges))),
    }
    if importlib.util.find_spec("oxipng"):
        chosen["PNG, oxipng 6"] = oxipng
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # registers itself with Pillow
        chosen["JPEG XL, effort 7"] = pillow("JXL", "L", lossless=True, effort=7)
    return chosen


def pictures(folder: Path | None, limit: int) -> Iterator[tuple[np.ndarray, int]]:
    """(picture, bytes of its file): `limit` images spread over the folder; digits as PNGs where there is no folder."""
    if folder is None:
        images, _ = read_digits()
        for image in images[:: max(1, len(images) // limit)][:limit]:
            yield image, _size(pillow("PNG", "L"), Image.fromarray(image))
        return
    files = sorted(path for path in folder.rglob("*") if is_image(path))
    for path in files[:: max(1, len(files) // limit)][:limit]:
        yield np.asarray(read_image(path)), path.stat().st_size


def _size(write: Write, image: Image.Image) -> int:
    file = io.BytesIO()
    write(image, file)
    return file.tell()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="images, at any depth (default: digits)")
    parser.add_argument("--resolution", choices=list(PRESETS), default="high")
    parser.add_argument("--limit", type=int, default=100, help="images looked at [100]")
    options = parser.parse_args()
    preset = PRESETS[options.resolution]
    taken = list(pictures(options.folder, options.limit))
    if not taken:
        parser.error(f"no images below {options.folder}")
    maps = [Image.fromarray(Edges(preset).edges(picture) > 0) for picture, _ in taken]
    image_bytes = np.mean([size for _, size in taken])
    jpeg_bytes = np.mean([_size(pillow("JPEG", "RGB", quality=95), Image.fromarray(picture)) for picture, _ in taken])
    best_png = np.mean([_size(pillow("PNG", optimize=True), edges) for edges in maps])
    bits = np.mean([edges.width * edges.height for edges in maps])
    shown = np.mean([np.asarray(edges).mean() for edges in maps])
    print(
        f"{options.folder or 'digits'}, {preset.name} resolution: {len(maps)} edge maps, {100 * shown:.1f} % edges; "
        f"mean bytes: one bit a pixel {bits / 8:,.0f}, the image's file {image_bytes:,.0f}, as a JPEG of quality 95 "
        f"{jpeg_bytes:,.0f}"
    )
    print(f"{'':38}{'bytes':>9}{'of PNG':>9}{'of file':>9}{'of JPEG':>9}{'write ms':>10}{'read ms':>9}")
    for name, write in forms().items():
        files = [io.BytesIO() for _ in maps]
        start = time.perf_counter()
        for edges, file in zip(maps, files, strict=True):
            write(edges, file)
        written = time.perf_counter()
        back = [np.asarray(Image.open(file).convert("L")) for file in files]
        read = time.perf_counter()
        exact = all(np.array_equal(b, np.asarray(e.convert("L"))) for b, e in zip(back, maps, strict=True))
        size = np.mean([len(file.getvalue()) for file in files])
        print(
            f"{name:38}{size:9,.1f}"
            + "".join(f"{100 * size / other:8.1f}%" for other in (best_png, image_bytes, jpeg_bytes))
            + f"{1000 * (written - start) / len(maps):10.2f}{1000 * (read - written) / len(maps):9.2f}"
            + ("" if exact else "  LOSES SOMETHING")
        )


if __name__ == "__main__":
    main()
