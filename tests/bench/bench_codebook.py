"""What codes of noise are worth at equal bytes: python tests/bench/bench_codebook.py [--digits N]

Digits that the bundled model has not seen (`python -m utils.curate digits` leaves them out), 28 x 28, generated at
64 x 64, conditioned on their class's text.  For each way of coding: bytes; PSNR of the decoded picture at 28 x 28, mean
over digits; the share that a nearest-neighbour classifier of other real digits puts into its class; and the CPU time,
of one thread, of encoding and of decoding a picture in batches of 50.  Rows of equal bytes tell what a choice is worth:

- timesteps: where the walk begins and ends; "951-1" is DDIM's own 20 steps, of which the last have little noise left;
- bits and steps: few steps of large codebooks, or many of small ones;
- candidates: noises that the encoder tries in each step, by the network's next prediction (1: as published);
- atoms: codewords of a step's sum.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch

from compress.forms import form_named, resize_back
from compress.presets import HIGH
from ControlNet import sampling
from ControlNet.cldm import codebook
from ControlNet.cldm.model import load_model
from ControlNet.ldm import schedule
from tests.little_model import sampled
from utils.curate.command import DIGIT_NAMES, read_digits

BATCH = 50
DEFAULT = (schedule.FIRST, schedule.LAST)
WAYS = [  # (form, timesteps as parts, candidates)
    ("codebook:6@20", (0.951, 0.001), 1),
    ("codebook:6@20", DEFAULT, 1),
    ("codebook:12@10", (0.951, 0.001), 1),
    ("codebook:12@10", DEFAULT, 1),
    ("codebook:12@10", DEFAULT, 2),
    ("codebook:12@10", DEFAULT, 4),
    ("codebook:6@20", DEFAULT, 4),
    ("codebook:15@8", DEFAULT, 4),
    ("codebook:8x2@7", DEFAULT, 4),
    ("codebook:12x2@5", DEFAULT, 4),
    ("codebook:12@5", DEFAULT, 4),
    ("codebook:12@20", DEFAULT, 4),
    ("codebook:12x4@10", DEFAULT, 4),
    ("codebook:12@10", DEFAULT, 8),
]


def pictures_of(digits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(unseen digits, their labels, other real digits, their labels); digits: of all classes together."""
    images, labels = read_digits()
    place = np.arange(len(images)) % 500
    chosen, real = (place >= 400) & (place < 400 + digits // 10), (place >= 250) & (place < 400)
    return images[chosen], labels[chosen], images[real], labels[real]


def nearest(pictures: np.ndarray, real: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows, known = (torch.from_numpy(p.reshape(len(p), -1)).float() for p in (pictures, real))
    rows, known = (each / each.norm(dim=1, keepdim=True).clamp(min=1e-6) for each in (rows, known))
    return labels[torch.cdist(rows, known).argmin(1).numpy()]


class Bench:
    def __init__(self, digits: int):
        self.model = load_model("tiny")
        self.images, self.labels, self.real, self.real_labels = pictures_of(digits)
        form = form_named("codebook:1@1", HIGH.changed(size=64))
        prepared = np.stack([form.prepared(image) for image in self.images])
        texts = [form.preset.prompt_text(DIGIT_NAMES[int(label)]) for label in self.labels]
        with torch.inference_mode():
            pixels = torch.from_numpy(prepared).permute(0, 3, 1, 2).float() / 127.5 - 1
            self.latents = self.model.get_first_stage_encoding(self.model.encode_first_stage(pixels).mode())
            self.context = self.model.get_learned_conditioning(texts)

    @torch.inference_mode()
    def code(self, name: str, ends: tuple[float, float], candidates: int) -> tuple[int, torch.Tensor, float, float]:
        """(bytes, latents that come back, CPU seconds of encoding a picture, of decoding one)."""
        form = form_named(name, HIGH)
        how = {"steps": form.steps + 1, "coded": form.coded, "bits": form.bits, "atoms": form.atoms}
        schedule.FIRST, schedule.LAST = ends
        conds = [{"c_concat": None, "c_crossattn": [part]} for part in self.context.split(BATCH)]
        parts, back = list(zip(self.latents.split(BATCH), conds, strict=True)), []
        start = time.process_time()
        codes = [codebook.encode(self.model, part, cond, candidates=candidates, **how) for part, cond in parts]
        middle = time.process_time()
        for code, (part, cond) in zip(codes, parts, strict=True):
            x = codebook.initial_noise(part.shape[1:]).expand(part.shape)
            noise = codebook.noise_of_code(code, sampling.fresh_noise(None))
            back.append(sampled(self.model, "ancestral", form.steps + 1, part.shape, cond, x=x, noise=noise))
        self.pictures(torch.cat(back))  # a copy's time has the decoder in it
        seconds = middle - start, time.process_time() - middle
        schedule.FIRST, schedule.LAST = DEFAULT
        return form.fixed_bytes, torch.cat(back), *(each / len(self.images) for each in seconds)

    @torch.inference_mode()
    def pictures(self, latents: torch.Tensor) -> np.ndarray:
        """N x 28 x 28 uint8."""
        decoded = torch.cat([self.model.decode_first_stage(part) for part in latents.split(BATCH)])
        pixels = (decoded * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return np.stack([cv2.cvtColor(resize_back(p, 28, 28), cv2.COLOR_RGB2GRAY) for p in pixels])

    def figures(self, pictures: np.ndarray) -> str:
        errors = np.square(pictures.astype(float) - self.images).mean((1, 2))
        share = (nearest(pictures, self.real, self.real_labels) == self.labels).mean()
        return f"{10 * np.log10(255**2 / np.maximum(errors, 1e-9)).mean():.2f} | {100 * share:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--digits", type=int, default=100, help="of all ten classes together, at most 1000 [100]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.digits)
    print("| form | timesteps | candidates | bytes | PSNR, dB | class, % | CPU ms to encode | to decode |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| the autoencoder alone | | | | {bench.figures(bench.pictures(bench.latents))} | | |")
    for name, ends, candidates in WAYS:
        size, latents, encoding, decoding = bench.code(name, ends, candidates)
        where = "-".join(f"{1000 * end:.0f}" for end in ends)
        figures = bench.figures(bench.pictures(latents))
        times = f"{1000 * encoding:.0f} | {1000 * decoding:.0f}"
        print(f"| {name} | {where} | {candidates} | {size} | {figures} | {times} |", flush=True)


if __name__ == "__main__":
    main()
