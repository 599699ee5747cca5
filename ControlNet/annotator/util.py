"""Convert an image to three channels and resize it to a size that the networks take."""

import cv2
import numpy as np

SIDE_STEP = 64
"""Sides are multiples of this: the autoencoder downsamples by 8, the UNet by another 8."""

MAX_PIXELS = 786_432
"""The presets' limit on generated pixels: 768 x 1,024, or 512 x 1,536."""


def HWC3(image: np.ndarray) -> np.ndarray:
    """HxW, HxWx1, HxWx3 or HxWx4 uint8 -> HxWx3 uint8.  A fourth channel is alpha, blended over white.

    Raises TypeError for another dtype and ValueError for another number of channels.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"HWC3 needs a uint8 image, not {image.dtype}")
    if image.ndim == 2:
        image = image[:, :, None]
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 3:
        return image
    if channels == 4:
        opacity = image[:, :, 3:].astype(np.float32) / 255
        return (image[:, :, :3] * opacity + 255 * (1 - opacity)).clip(0, 255).astype(np.uint8)
    raise ValueError(f"an image has 1, 3 or 4 channels, not {channels}")


def generated_size(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """The size to generate at for a picture of height x width pixels: its shape, in multiples of 64.

    As published: both sides are scaled so that the shorter one becomes `shorter_side`, halved together while the
    picture has more than 786,432 pixels, and rounded to the nearest multiple of 64 (ties to the even one, NumPy's
    rounding), never below 64.

    Beyond what is published: lifting a side to 64 can bring a very narrow picture over the limit again (1x1000
    would become 64x16000).  Then the longer side is cut to what the limit allows (64x12288): the generated picture
    has another shape than the original, but is resized back to it like every other, and no picture takes more
    memory than the limit promises.
    """
    scale = shorter_side / min(height, width)
    sides = np.array([height * scale, width * scale])
    while sides.prod() > MAX_PIXELS:
        sides /= 2
    sides = np.maximum(np.round(sides / SIDE_STEP), 1).astype(int) * SIDE_STEP
    longest = MAX_PIXELS // int(sides.min()) // SIDE_STEP * SIDE_STEP
    height, width = np.minimum(sides, longest).tolist()
    return height, width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The uint8 picture (HxW or HxWxC) at height x width: Lanczos4 where its shorter side grows, else by area."""
    if image.shape[:2] == (height, width):
        return image
    growing = min(height, width) > min(image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4 if growing else cv2.INTER_AREA)


def resize_image(input_image: np.ndarray, resolution: int) -> np.ndarray:
    """The published function: scale so that the shorter side becomes `resolution`, sides rounded to multiples of 64.

    input_image: HxW or HxWxC uint8.  Lanczos4 to enlarge, area to shrink.  The size has no upper limit.
    """
    height, width = input_image.shape[:2]
    scale = resolution / min(height, width)
    height, width = (int(np.round(side * scale / SIDE_STEP)) * SIDE_STEP for side in (height, width))
    interpolation = cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    return cv2.resize(input_image, (width, height), interpolation=interpolation)
