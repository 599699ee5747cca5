"""One picture -> its prompt (edge map and text) -> copies, with nothing but ControlNet/.

    python docs/example.py [PICTURE TEXT] [--out FOLDER]

Without arguments: a digit drawn here.  The bundled tiny model knows handwritten digits alone; for photographs put
"sd15" for "tiny" below (see docs/experiment.md for its weights).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch

from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3, resize_image
from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import load_model

MODEL, SHORTER_SIDE = "tiny", 64  # "sd15", 512
NEGATIVE = "longbody, lowres, bad anatomy, bad hands, missing fingers, cropped, worst quality, low quality"


def digit() -> np.ndarray:
    """A seven, white on black, 28x28x3 uint8."""
    image = np.zeros((28, 28, 3), np.uint8)
    return cv2.polylines(image, [np.array([[7, 7], [20, 7], [12, 22]])], False, (255, 255, 255), 2, cv2.LINE_AA)


@torch.inference_mode()
def copies(model, edges: np.ndarray, text: str, seeds: list[int], steps: int = 10, guidance: float = 9.0) -> np.ndarray:
    """Pictures that follow an edge map (HxW uint8, sides multiples of 64) and a text: len(seeds) x H x W x 3 uint8."""
    height, width = edges.shape
    n = len(seeds)
    hint = torch.from_numpy(edges).float()[None, None].expand(n, 3, -1, -1) / 255
    noise = [torch.randn(4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    conditions = [
        {"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([words] * n)]}
        for words in (f"{text}, best quality, extremely detailed", NEGATIVE)
    ]
    latents, _ = DDIMSampler(model).sample(
        steps, n, noise[0].shape, conditions[0], x_T=torch.stack(noise), verbose=False,
        unconditional_guidance_scale=guidance, unconditional_conditioning=conditions[1],
    )  # fmt: skip
    decoded = model.decode_first_stage(latents) * 127.5 + 127.5
    return decoded.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", nargs="?", help="an image file")
    parser.add_argument("text", nargs="?", default="digit seven", help="what it shows [digit seven]")
    parser.add_argument("--out", type=Path, default=Path("outputs/example"), help="a folder [outputs/example]")
    options = parser.parse_args()
    image = cv2.imread(options.picture) if options.picture else digit()
    if image is None:
        parser.error(f"can't read {options.picture} as an image")
    if options.picture and MODEL == "tiny":
        print("the bundled model knows handwritten digits only; sd15 knows photographs (docs/experiment.md)")
    edges = CannyDetector()(resize_image(HWC3(image), SHORTER_SIDE))  # the prompt: this and the text
    pictures = copies(load_model(MODEL), edges, options.text, seeds=[0, 1, 2, 3])
    options.out.mkdir(parents=True, exist_ok=True)
    for name, picture in [("edges", edges), *((f"copy{i}", picture[..., ::-1]) for i, picture in enumerate(pictures))]:
        cv2.imwrite(str(options.out / f"{name}.png"), picture)
    bits = image.shape[0] * image.shape[1]
    print(f"{options.out}: edges.png ({bits:,} bits at the picture's own size) and {len(pictures)} copies")


if __name__ == "__main__":
    main()
