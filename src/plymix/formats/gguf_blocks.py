"""ggml's packed kinds of tensors: runs of elements in blocks that share a scale.

Source: the block layouts of ggml's `ggml-common.h`. What is read is, bit by bit, what ggml's
reference code makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Decode = Callable[[Any], Any]
"""(n, bytes per block) uint8 to (n, elements per block) float32."""


class Quant(NamedTuple):
    """A way to pack a run of `elements` into `nbytes`."""

    name: str
    elements: int
    nbytes: int
    decode: Decode


def _half(blocks: Any, at: int) -> Any:
    """The float16 at byte `at` of each block, as a column of float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Any) -> Any:
    """Low nibbles, then high nibbles."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Any, at: int) -> Any:
    """The 32 bits at byte `at`, each moved to where it counts 16."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return bits << 4


def _q4_0(b: Any) -> Any:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Any) -> Any:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Any) -> Any:
    q = _nibbles(b[:, 6:]) | _fifth_bits(b, 2)
    return _half(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Any) -> Any:
    q = _nibbles(b[:, 8:]) | _fifth_bits(b, 4)
    return _half(b, 0) * q.astype(np.float32) + _half(b, 2)


def _q8_0(b: Any) -> Any:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _planes(packed: Any, run: int, bits: int) -> Any:
    """Fields of `bits` bits: for every `run` bytes all their lowest fields, then the next ones.

    (n, m) uint8 to (n, m * 8 / bits).
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts) & ((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _scaled(q: Any, d: Any, offset: Any = None) -> Any:
    """q * d - offset: (n, elements), and (n, runs) of which each counts for a run of elements."""
    runs = q.reshape(len(q), d.shape[1], -1).astype(np.float32)
    found = d[:, :, None] * runs
    if offset is not None:
        found -= offset[:, :, None]
    return found.reshape(q.shape)


def _q2_k(b: Any) -> Any:
    scales, d, least = b[:, :16], _half(b, 80), _half(b, 82)
    return _scaled(_planes(b[:, 16:80], 32, 2), d * (scales & 15), least * (scales >> 4))


def _q3_k(b: Any) -> Any:
    # 16 scales of six bits: low nibbles in bytes 96 to 103, high pairs of bits in 104 to 107
    low = _nibbles(b[:, 96:104])
    high = _planes(b[:, 104:108], 4, 2)
    scales = (low | (high << 4)).astype(np.float32) - 32
    q = _planes(b[:, 32:96], 32, 2).astype(np.float32)
    q -= 4 - 4 * _planes(b[:, :32], 32, 1).astype(np.float32)
    return _scaled(q, _half(b, 108) * scales)


def _six_bits(packed: Any) -> tuple[Any, Any]:
    """Eight scales and eight minima of six bits each, in 12 bytes (Q4_K and Q5_K)."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q4_k(b: Any) -> Any:
    scales, minima = _six_bits(b[:, 4:16])
    return _scaled(_planes(b[:, 16:], 32, 4), _half(b, 0) * scales, _half(b, 2) * minima)


def _q5_k(b: Any) -> Any:
    scales, minima = _six_bits(b[:, 4:16])
    q = _planes(b[:, 48:], 32, 4) | (_planes(b[:, 16:48], 32, 1) << 4)
    return _scaled(q, _half(b, 0) * scales, _half(b, 2) * minima)


def _q6_k(b: Any) -> Any:
    q = _planes(b[:, :128], 64, 4) | (_planes(b[:, 128:192], 32, 2) << 4)
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(q.astype(np.float32) - 32, _half(b, 208) * scales)


def _q8_k(b: Any) -> Any:
    d = np.ascontiguousarray(b[:, :4]).view(np.float32)
    return d * b[:, 4:260].view(np.int8).astype(np.float32)


QUANTS: dict[int, Quant] = {
    2: Quant("Q4_0", 32, 18, _q4_0),
    3: Quant("Q4_1", 32, 20, _q4_1),
    6: Quant("Q5_0", 32, 22, _q5_0),
    7: Quant("Q5_1", 32, 24, _q5_1),
    8: Quant("Q8_0", 32, 34, _q8_0),
    10: Quant("Q2_K", 256, 84, _q2_k),
    11: Quant("Q3_K", 256, 110, _q3_k),
    12: Quant("Q4_K", 256, 144, _q4_k),
    13: Quant("Q5_K", 256, 176, _q5_k),
    14: Quant("Q6_K", 256, 210, _q6_k),
    15: Quant("Q8_K", 256, 292, _q8_k),
}
"""The packed kinds that are read, by ggml's number of the type."""


Q8_0 = QUANTS[8]


def encode_q8_0(values: Any) -> Any:
    """float32 as Q8_0 blocks: (n, 32) to (n, 34) uint8.

    Each block has a float16 scale, its largest magnitude / 127; the codes are the values over that
    scale in float32, rounded to the nearest with halves away from zero, as ggml's reference does.
    Only where the scale is 0 in float16, so that the codes mean nothing, they are 0 here.
    Values must be finite and of a magnitude up to 127 * 65504. Packing what was unpacked gives the
    same blocks.
    """
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scale = d.astype(np.float16)
    factor = np.divide(np.float32(1), d, out=np.zeros_like(d), where=scale != 0)
    scaled = values * factor
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += np.floor(2 * (magnitude - whole))
    codes = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)
