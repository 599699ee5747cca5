"""What grows with a dataset: python tests/bench/bench_scale.py N

N one-pixel train images in folders of 1,000, each with an edge map and two copies, in a temporary folder.  Prints the
wall and CPU seconds of listing, phase 0's fingerprint, planning and verifying, and the bytes of the memory in a
checkpoint.  On a busy machine, read the CPU seconds.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image

from compress.forms import form_named
from compress.plan import plan
from compress.presets import HIGH
from compress.records import Recipe, Records
from compress.training.exemplars import Cost
from compress.verify import verify
from models.training.phase0 import fingerprint
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths
from utils.memory.exemplars import ExemplarMemory

CLASS_SIZE, COPIES = 1000, 2


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, kind)
    return file.getvalue()


def make(paths: DatasetPaths, count: int) -> None:
    png, webp, jpeg = encoded("PNG"), encoded("WEBP"), encoded("JPEG")
    for number in range(count):
        label, name = f"class{number // CLASS_SIZE:05d}", f"{number:08d}"
        files = {paths.folder("train") / label / f"{name}.png": png}
        files[paths.folder("kept") / label / f"{name}.webp"] = webp
        files |= {paths.copies_folder(label) / f"{name}_seed{k:02d}.jpg": jpeg for k in range(COPIES)}
        if number % CLASS_SIZE == 0:
            files[paths.folder("test") / label / f"{name}.png"] = png
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            file.write_bytes(content)


def timed(what: str, work: Callable):
    start, busy = time.perf_counter(), time.process_time()
    result = work()
    print(f"{what:34}{time.perf_counter() - start:10.2f} s, CPU {time.process_time() - busy:8.2f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("n", type=int, help="train images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = DatasetPaths(Path(folder), "Many")
        timed(f"making {options.n:,} images", lambda: make(paths, options.n))
        data = timed("listing", lambda: DataManager(paths, shuffle=True, seed=1, init_cls=1, increment=1))
        timed("another class order", lambda: data.reordered(2))
        images = [image for target in range(data.nb_classes) for image in data.train_images(target)]
        copies = [paths.copy(image, k) for image in images for k in range(COPIES)]
        timed("fingerprint, images and copies", lambda: fingerprint({}, [*images, *copies], paths.root))
        form = form_named("edges", HIGH)
        timed("planning, all there, no record", lambda: plan(Records(paths, Recipe(form)), images, range(COPIES)))
        timed("verifying", lambda: verify(Records(paths, Recipe(form)), images, range(COPIES)))
        costs = {"real": Cost(None, paths), "edges": Cost(form, paths)}
        memory = ExemplarMemory(paths, [("real", 18), ("edges", 48)], costs, None, COPIES)
        for target in range(data.nb_classes):
            of_class = data.train_images(target)
            memory.update({target: of_class}, [torch.rand(len(of_class), 8)])
        file = io.BytesIO()
        torch.save(memory.state_dict(), file)
        print(f"{'memory in a checkpoint':34}{file.tell():10,} bytes")


if __name__ == "__main__":
    main()
