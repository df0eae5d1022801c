"""DoRA: any change, with the lengths of the weight's rows or columns trained apart."""

from __future__ import annotations

import math
from typing import Literal

from plymix.methods import Array
from plymix.methods.arrays import namespace

Norm = Literal["trained", "comfyui"]


def dora(w: Array, change: Array, magnitude: Array, *, norm: Norm = "trained") -> Array:
    """Weight-decomposed change

    V = W + change;  D = V * magnitude / |V| - W

    |V| are the norms of V's rows (outputs) where `magnitude` has one number for each, else of its
    columns (inputs), over all other axes. `norm = "comfyui"` divides rows by |W|, the norms of the
    unchanged weight, as ComfyUI does at run time; columns are |V| there, too.

    Source: DoRA, arXiv:2402.09353; LyCORIS `dora_wd`, PEFT `lora_magnitude_vector`.
    """
    xp, rows = namespace(w), math.prod(magnitude.shape) == w.shape[0] == magnitude.shape[0]
    v = w + change
    of = w if rows and norm == "comfyui" else v
    kept = 0 if rows else 1
    others = tuple(axis for axis in range(len(w.shape)) if axis != kept)
    lengths = xp.sqrt(xp.sum(xp.astype(of, xp.float64) ** 2, axis=others, keepdims=True))
    shape = tuple(-1 if axis == kept else 1 for axis in range(len(w.shape)))
    factor = xp.astype(xp.reshape(magnitude, shape), xp.float64) / (lengths + 1e-12)
    return xp.astype(v * factor - w, xp.float32)
