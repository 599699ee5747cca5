"""How long choosing exemplars takes, against herding as published trainers have it: python tests/bench/bench_herding.py

The published loop goes through the remaining images for each pick and compares, one by one, what the mean of the picked
would be with it.  Both get the same unit rows, take turns, and must pick the same; figures are medians over rounds.
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


def published(vectors: np.ndarray, m: int) -> list[int]:
    """m indices, by brute force."""
    class_mean = np.mean(vectors, axis=0)
    left, picked = list(range(len(vectors))), []
    for k in range(1, m + 1):
        so_far = np.sum([vectors[i] for i in picked], axis=0)
        means = np.array([(vectors[i] + so_far) / k for i in left])
        best = int(np.argmin(np.sqrt(np.sum((class_mean - means) ** 2, axis=1))))
        picked.append(left.pop(best))
    return picked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1300)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--picks", type=int, default=66)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"published": [], "ours": []}
    for _ in range(options.rounds):
        features = np.maximum(rng.normal(0.3, 1.0, (options.images, options.features)), 0)  # as a ReLU leaves them
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        picks = {}
        for name, choose in (("published", published), ("ours", herding)):
            start = time.perf_counter()
            picks[name] = choose(unit, options.picks)
            seconds[name].append(time.perf_counter() - start)
        if picks["published"] != picks["ours"]:
            sys.exit("the picks differ")
    theirs, ours = (statistics.median(times) for times in seconds.values())
    print(
        f"herding {options.picks} of {options.images} images, {options.features} features: published loop "
        f"{1000 * theirs:.0f} ms, ours {1000 * ours:.1f} ms, {theirs / ours:.0f} x; the same picks"
    )


if __name__ == "__main__":
    main()
