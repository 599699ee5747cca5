"""Canny's edge detector."""

import cv2
import numpy as np


class CannyDetector:
    """Edges by hysteresis between two gradient thresholds (Canny, 1986), as ControlNet's Canny model was trained on."""

    def __call__(self, image: np.ndarray, low_threshold: float = 100, high_threshold: float = 200) -> np.ndarray:
        """image: HxWx3 or HxW uint8 -> HxW uint8, 255 on an edge and 0 elsewhere.

        In a colour picture each pixel takes the channel with the strongest gradient.
        """
        return cv2.Canny(np.ascontiguousarray(image), low_threshold, high_threshold)
