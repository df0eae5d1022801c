"""How far two pictures are apart: two numbers that need no trained network.

pixel      the root of the mean square of the differences, of full scale (0..1): 0 for equal
           pictures, 1 for black against white.
structure  1 - MS-SSIM of the brightness (Wang, Simoncelli, Bovik 2003): what the eye sees as
           shapes and edges, at up to five scales. 0 for equal pictures, about 1 for unrelated ones;
           shifts of colour or brightness alone weigh little.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, finest first (Wang et al. 2003, section 3.2)."""

WINDOW = 11
SPREAD = 1.5
C1, C2 = 0.01**2, 0.03**2


def pixel(a: Array, b: Array) -> float:
    """Of two pictures, uint8 [height, width, 3] of one size."""
    apart = (a.astype(np.float64) - b.astype(np.float64)) / 255
    return float(np.sqrt(np.mean(apart**2)))


def structure(a: Array, b: Array) -> float:
    """1 - MS-SSIM of two pictures, uint8 [height, width, 3] of one size, at least 11 pixels."""
    x, y = _brightness(a), _brightness(b)
    scales = 1
    while scales < len(WEIGHTS) and min(x.shape) >> scales >= WINDOW:
        scales += 1
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    found = 1.0
    for i, weight in enumerate(weights):
        light, contrast = _similarity(x, y)
        value = contrast * light if i == scales - 1 else contrast
        found *= max(float(value.mean()), 0.0) ** weight
        x, y = _halved(x), _halved(y)
    return float(1.0 - found)


def _brightness(picture: Array) -> Array:
    """Rec. 601 luma, 0..1."""
    weighted: Array = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    return weighted


def _similarity(x: Array, y: Array) -> tuple[Array, Array]:
    """SSIM's luminance term, and contrast and structure in one, at each place."""
    mx, my = _blurred(x), _blurred(y)
    xx, yy, xy = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
    light = (2 * mx * my + C1) / (mx * mx + my * my + C1)
    return light, (2 * xy + C2) / (xx + yy + C2)


def _blurred(x: Array) -> Array:
    """Weighted means over a Gaussian window, where it lies within the picture."""
    at = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(at**2) / (2 * SPREAD**2))
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis)
        x = windows @ weights
    return x


def _halved(x: Array) -> Array:
    """Means of 2 x 2 pixels."""
    height, width = (n // 2 * 2 for n in x.shape)
    x = x[:height, :width]
    halved: Array = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    return halved
