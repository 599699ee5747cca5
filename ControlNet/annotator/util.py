"""Convert an image to three channels and resize it to a size that the networks take."""

import os

import cv2
import numpy as np

SIDE_STEP = 64
"""Sides are multiples of this: the autoencoder downsamples by 8, the UNet by another 8."""

annotator_ckpts_path = os.path.join(os.path.dirname(__file__), "ckpts")
"""Where the published annotators (hed, midas, mlsd, ...), copied beside this file, keep their weights."""


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


def resize_image(input_image: np.ndarray, resolution: int) -> np.ndarray:
    """The published function: scale so that the shorter side becomes `resolution`, sides rounded to multiples of 64.

    input_image: HxW or HxWxC uint8.  Lanczos4 to enlarge, area to shrink.  The size has no upper limit.
    """
    height, width = input_image.shape[:2]
    scale = resolution / min(height, width)
    height, width = (int(np.round(side * scale / SIDE_STEP)) * SIDE_STEP for side in (height, width))
    interpolation = cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    return cv2.resize(input_image, (width, height), interpolation=interpolation)
