"""Whole differences: of weights, norms and biases; and values that replace a weight."""

from __future__ import annotations

import math

from plymix.adapters.families import Family, Rows, Shapes, Size
from plymix.methods import Array
from plymix.methods.arrays import as_rows, namespace


def full(diff: Array) -> Rows:
    """Difference of a weight, a norm or a bias

    D = diff

    Source: LyCORIS `full` and `norm`; ComfyUI's `diff` and `diff_b`.
    """
    whole = as_rows(diff)
    return lambda rows: whole[rows, :]


def replaced(w: Array, value: Array) -> Array:
    """Value that takes the weight's place

    D = value - W

    Source: ComfyUI's `set_weight`; the norms in BFL's control LoRAs.
    """
    return namespace(w).reshape(value, w.shape) - w


def size(shapes: Shapes) -> Size:
    (shape,) = shapes.values()
    return (shape[0] if shape else 1), math.prod(shape[1:])


FAMILIES = (
    Family(
        name="full",
        suffixes={
            ".diff": "diff",
            ".w_norm": "diff",
            ".diff_b": "bias diff",
            ".b_norm": "bias diff",
            # PEFT with `lora_bias`, scaled as its LoRA is
            ".lora_up.bias": "bias diff",
            ".lora_B.bias": "bias diff",
        },
        holds=lambda shapes: "diff" in shapes,
        function=full,
        size=size,
        rank=lambda shapes: 0,
    ),
    Family(
        name="set",
        suffixes={".set_weight": "value"},
        holds=lambda shapes: "value" in shapes,
        function=replaced,
        size=size,
        rank=lambda shapes: 0,
        on_weight=True,
    ),
)
