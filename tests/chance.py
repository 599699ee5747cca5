"""Whether counts are those of chance."""

import numpy as np

CHI2_999 = {1: 10.83, 4: 18.47, 24: 51.18}
"""By degrees of freedom: what `chi2` exceeds once in a thousand."""


def chi2(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return float(((counts - expected) ** 2 / expected).sum())
