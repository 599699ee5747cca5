"""How well the tiny bundled model follows the edge map and the text: python tests/bench/bench_tiny_model.py

On digits that it was not trained on (`python -m utils.curate digits`), 64x64, 10 DDIM steps, guidance 9:

- edges: share of a prompt's edge pixels with an edge of the copy at most 2 pixels away, against the same share with
  another prompt's edges;
- text: how many pictures made from the text alone, and how many made from edge map and text, a nearest-neighbour
  classifier of real digits puts into the class that the text names; and what it says of real test digits;
- variety: standard deviation over copies of one prompt, in grey levels of 255, mean over the pixels of its digit.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch

from compress.quality import near
from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import load_model
from utils.curate.command import DIGIT_NAMES, read_digits

SIZE, STEPS, GUIDANCE = 64, 10, 9.0
NEGATIVE = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)


def edge_map(image: np.ndarray) -> np.ndarray:
    """The high-resolution preset's hint of a 28x28 digit: SIZE x SIZE, bool."""
    return cv2.resize(cv2.Canny(image, 100, 200), (SIZE, SIZE), interpolation=cv2.INTER_NEAREST) > 0


def generate(model, texts: list[str], hints: np.ndarray | None, seed: int) -> np.ndarray:
    """Pictures, B x SIZE x SIZE uint8 grey, from texts and hints (B x SIZE x SIZE bool, or None: the text alone)."""
    hint = None if hints is None else [torch.from_numpy(hints).float()[:, None].repeat(1, 3, 1, 1)]
    cond, uncond = (
        {"c_concat": hint, "c_crossattn": [model.get_learned_conditioning(t)]} for t in (texts, [NEGATIVE] * len(texts))
    )
    shape = (4, SIZE // 8, SIZE // 8)
    noise = torch.randn((len(texts), *shape), generator=torch.Generator().manual_seed(seed))
    latents, _ = DDIMSampler(model).sample(
        STEPS,
        len(texts),
        shape,
        cond,
        unconditional_guidance_scale=GUIDANCE,
        unconditional_conditioning=uncond,
        x_T=noise,
    )
    pictures = model.decode_first_stage(latents).clamp(-1, 1).mean(dim=1)
    return ((pictures + 1) * 127.5).round().byte().numpy()


def edges_found(prompts: Sequence[np.ndarray], copies: Sequence[np.ndarray], reach: int = 2) -> float:
    """Share of the prompts' edge pixels with an edge of their copy at most `reach` pixels away.

    prompts: HxW, above 0 on an edge; copies: pictures (HxWx3 or HxW uint8), brought to their prompt's size.
    nan where the prompts have no edge.
    """
    maps = [cv2.resize(p, e.shape[::-1], interpolation=cv2.INTER_LINEAR) for e, p in zip(prompts, copies, strict=True)]
    counts = [near(prompt, cv2.Canny(picture, 100, 200), reach) for prompt, picture in zip(prompts, maps, strict=True)]
    near_edges, total = np.sum(counts, axis=0)
    return float(near_edges / total) if total else float("nan")


def nearest_neighbour(pictures: np.ndarray, real: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of the nearest real digit by Euclidean distance of 28x28 pixels."""

    def flat(images):
        resized = [cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA) for image in images]
        rows = np.stack(resized).reshape(len(images), -1).astype(np.float32)
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6))

    return labels[torch.cdist(flat(pictures), flat(real)).argmin(dim=1).numpy()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--picture", metavar="FILE.png", help="also write what was generated")
    options = parser.parse_args()
    model = load_model(options.model)
    images, labels = read_digits()
    place = np.arange(len(images)) % 500  # a class's digits stand together: 0-249 trained the model
    real, real_labels = images[(place >= 250) & (place < 400)], labels[(place >= 250) & (place < 400)]
    test, test_labels = images[(place >= 400) & (place < 410)], labels[(place >= 400) & (place < 410)]
    texts = [f"digit {DIGIT_NAMES[y]}, best quality, extremely detailed" for y in test_labels]
    hints = np.stack([edge_map(image) for image in test])

    copies = np.stack([generate(model, texts, hints, seed) for seed in range(3)])
    from_text = generate(model, texts, None, seed=3)
    other = np.roll(hints, 37, axis=0)
    print(f"{options.model} model, {len(test)} digits it has not seen, {STEPS} steps, guidance {GUIDANCE}")
    print(f"edges of the prompt found in the copy      {100 * edges_found(hints, copies[0]):6.1f} %")
    print(f"edges of another prompt found in the copy  {100 * edges_found(other, copies[0]):6.1f} %")
    for name, pictures in (("real test digits", test), ("edge map and text", copies[0]), ("the text alone", from_text)):
        right = (nearest_neighbour(pictures, real, real_labels) == test_labels).mean()
        print(f"in the right class: {name:22} {100 * right:6.1f} %")
    variety = copies.astype(float).std(axis=0)[hints].mean()
    print(f"variety of the copies of one prompt        {variety:6.1f} grey levels of 255")
    if options.picture:
        rows = [
            np.hstack([cv2.resize(test[i], (SIZE, SIZE)), hints[i].astype(np.uint8) * 255, *copies[:, i], from_text[i]])
            for i in range(0, len(test), 5)
        ]
        cv2.imwrite(options.picture, np.hstack([np.vstack(rows[:10]), np.vstack(rows[10:])]))


if __name__ == "__main__":
    main()
