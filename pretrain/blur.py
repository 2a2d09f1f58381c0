"""The kernel of Pillow's Gaussian blur, for backends that convolve."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PASSES = 3  # of Pillow's box filter, for a Gaussian


@lru_cache(maxsize=1024)
def blur_kernel(sigma: float) -> NDArray[np.float32]:
    """Return the kernel of Pillow's Gaussian, three extended box filters, (K,).

    An extended box is 2 l + 1 whole pixels and a share of one more at each end, so that three of
    them have the variance asked for (Gwosdek et al., 2011, Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering, Eqs. 3 to 6).

    Args:
        sigma: of the Gaussian, pixels.
    """
    variance = sigma * sigma / PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    share /= 6 * (variance - (whole + 1) ** 2)
    box = np.array([share, *[1.0] * (2 * whole + 1), share]) / (2 * (whole + share) + 1)
    return np.convolve(np.convolve(box, box), box).astype(np.float32)
