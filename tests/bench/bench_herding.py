"""How long choosing exemplars takes, against herding as PyCIL has it: python tests/bench/bench_herding.py

PyCIL's way (models/base.py, the same in PESCR's): for each pick the sum of the picked rows is added up anew, the mean
of the picked with each remaining row is made as a matrix, and the picked row is deleted from the features and from the
images.  Both get the same unit rows, in the type that networks give (float32), and take turns; figures are medians over
rounds of CPU seconds, with the threads that NumPy takes (OMP_NUM_THREADS).  In float64 both must pick the same; in
float32 two rows may be equally near.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split

import numpy as np

from utils.memory.selection import herding


def pycil(vectors: np.ndarray, m: int) -> list[int]:
    """The rows of m picks.  vectors: N x D."""
    class_mean = vectors.mean(axis=0)
    rows = np.arange(len(vectors))  # stands for the images, which are deleted alike
    chosen: list[np.ndarray] = []
    picks = []
    for k in range(1, m + 1):
        means = (vectors + np.sum(chosen, axis=0)) / k
        best = np.argmin(np.sqrt(np.sum((class_mean - means) ** 2, axis=1)))
        chosen.append(vectors[best].copy())
        picks.append(int(rows[best]))
        vectors, rows = np.delete(vectors, best, axis=0), np.delete(rows, best, axis=0)
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1300)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--picks", type=int, default=66)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"pycil": [], "ours": []}
    for _ in range(options.rounds):
        features = np.maximum(rng.normal(0.3, 1.0, (options.images, options.features)), 0)  # as a ReLU leaves them
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        if pycil(unit, options.picks) != herding(unit, options.picks):
            sys.exit("the picks differ")
        unit = unit.astype(np.float32)
        for name, choose in (("pycil", pycil), ("ours", herding)):
            start = time.process_time()
            choose(unit, options.picks)
            seconds[name].append(time.process_time() - start)
    theirs, ours = (statistics.median(times) for times in seconds.values())
    print(
        f"herding {options.picks} of {options.images} images, {options.features} features: PyCIL "
        f"{1000 * theirs:.1f} ms, ours {1000 * ours:.1f} ms, {theirs / ours:.1f} x"
    )


if __name__ == "__main__":
    main()
