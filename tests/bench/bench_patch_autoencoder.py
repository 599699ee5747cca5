"""How well principal components of 8 x 8 patches keep pictures: the bound that a PatchAutoencoder sets to a model.

    python tests/bench/bench_patch_autoencoder.py data/CIFAR10-ControlNet/train data/CIFAR10-120/train

PSNR, in dB, of pictures of the second folder at 64 x 64 pixels, with components of those of the first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import torch

from ControlNet.ldm.autoencoder import PatchAutoencoder
from ControlNet.training_data import read_picture

PICTURES = 2000


def pictures(folder: Path) -> torch.Tensor:
    """Every n-th picture, about PICTURES in all: B x 3 x 64 x 64 in [-1, 1]."""
    files = sorted(folder.glob("*/*"))
    images = [read_picture(file) for file in files[:: max(1, len(files) // PICTURES)]]
    large = [cv2.resize(image, (64, 64), interpolation=cv2.INTER_LANCZOS4) for image in images]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1 for image in large])


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    known, unseen = (pictures(Path(folder)) for folder in sys.argv[1:])
    print(f"{len(unseen)} pictures, components of {len(known)} others")
    for channels in (4, 8, 12, 16):
        autoencoder = PatchAutoencoder(channels)
        autoencoder.fit(known)
        with torch.no_grad():
            found = autoencoder.decode(autoencoder.encode(unseen).mode()).clamp(-1, 1)
        psnr = 10 * (4 / (found - unseen).square().mean((1, 2, 3))).log10()
        print(f"{channels:3d} channels: {psnr.mean():.1f} dB")


if __name__ == "__main__":
    main()
