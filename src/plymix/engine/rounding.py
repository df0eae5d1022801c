"""Rounding up or down by chance, so that what is lost is lost without a bias.

A value between two neighbours of a coarse number format becomes either, the nearer one the more
likely, so that the mean over many draws is the value (Croci et al. 2022, "Stochastic rounding:
implementation, error analysis and applications", eq. 1.1).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

GRID = {"F8_E4M3": (3, -6, 448.0), "F8_E5M2": (2, -14, 57344.0)}
"""Bits of the fraction, least normal exponent, largest number (OCP 8-bit floating point, 1.0)."""

DRAWS = 8  # 32 bits each that one step of the generator gives


def by_chance(values: Any, dtype: str, noise: tuple[int, str], first: int) -> Any:
    """float32 `values` on the grid of `dtype`, as float32.

    They are the elements from number `first` on of a tensor whose draws are set by `noise`, a
    (seed, name): the same for any cut of the tensor. What is too large becomes the largest number;
    infinities and NaN stay.
    """
    bits, least, largest = GRID[dtype]
    x = np.clip(values.astype(np.float64), -largest, largest)
    _, exponent = np.frexp(x)
    step = np.maximum(exponent - 1, least) - bits
    scaled = np.ldexp(x, -step)
    low = np.floor(scaled)
    with np.errstate(invalid="ignore"):
        up = _draws(noise, first, values.size) < scaled - low
    return np.where(np.isfinite(values), np.ldexp(low + up, step), values).astype(np.float32)


def _draws(noise: tuple[int, str], first: int, n: int) -> Any:
    """Numbers of [0, 1) for the elements [first, first + n): multiples of 2^-32, by Philox."""
    skipped = first % DRAWS
    stream = np.random.Philox(key=_key(noise), counter=first // DRAWS)
    raw = stream.random_raw(-(-(skipped + n) // 2)).astype("<u8").view("<u4")
    return raw[skipped : skipped + n] * 2.0**-32


@lru_cache(maxsize=64)
def _key(noise: tuple[int, str]) -> int:
    seed, name = noise
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
