"""Deterministic weights for a model of any size, so that outputs can be compared without shipping a checkpoint.

Every tensor depends only on its own name and shape, through NumPy's frozen legacy generator, so the
same file of numbers comes out on every machine.  Names are the *official* checkpoint's, as listed in
control_sd15_canny.keys.json (`cond_stage_model.transformer.text_model...` for the text encoder).
Names without a dot (betas, alphas_cumprod, ..., logvar) and `position_ids` are buffers that the model
computes itself: leave those alone.
"""

import math
import zlib

import numpy as np


def reference_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 array of `shape` for the parameter called `name` in the official checkpoint."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    values = draw.standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)
    if name.endswith(".bias"):
        return values * np.float32(0.05)
    if len(shape) == 1:  # the scale of a normalisation layer
        return np.float32(1) + values * np.float32(0.1)
    if "embedding" in name:
        return values * np.float32(0.5)
    return values * np.float32(1 / math.sqrt(math.prod(shape[1:])))
