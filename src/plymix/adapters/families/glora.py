"""GLoRA: a low-rank change of the weight's input side, and one that is added."""

from __future__ import annotations

import math

from plymix.adapters.families import Family, Shapes, Size, meet
from plymix.adapters.families.lora import core
from plymix.methods import Array
from plymix.methods.arrays import as_rows, namespace


def glora(w: Array, a1: Array, a2: Array, b1: Array, b2: Array, bm: Array | None = None) -> Array:
    """Generalised LoRA

    D = W a1 a2 + b1 b2, of a convolution (W a1 a2)[o, j, h, w] = sum_i W[o, i, h, w] (a1 a2)[i, j];
    with a core b1 b2 is sum_{p, q} b1[o, p] bm[p, q, h, w] b2[q, i].

    Old files have the roles exchanged: D = W a2 a1 + b2 b1. They are known by a1 having the
    rank first.
    Source: GLoRA, arXiv:2306.07967; LyCORIS `glora` of both kinds.
    """
    xp = namespace(w)
    a1, a2, b1, b2 = (as_rows(x) for x in (a1, a2, b1, b2 if bm is None else core(bm, b2)))
    if _old(a1.shape):
        a1, a2, b1, b2 = a2, a1, b2, b1
    columns = xp.reshape(w, (w.shape[0], w.shape[1], -1))
    columns = xp.permute_dims(columns, (0, 2, 1)) @ a1 @ a2
    turned = xp.reshape(xp.permute_dims(columns, (0, 2, 1)), w.shape)
    return turned + xp.reshape(b1 @ b2, w.shape)


def _old(a1: tuple[int, ...]) -> bool:
    return a1[0] < a1[1]


def size(shapes: Shapes) -> Size:
    b1, b2 = shapes["b1"], shapes["b2"]
    if _old(shapes["a1"]):
        b1, b2 = b2, b1
    return b1[0], math.prod((*b2[1:], *shapes.get("bm", ())[2:]))


def fits(shapes: Shapes) -> bool:
    pairs = [(shapes[f"{x}1"], shapes[f"{x}2"]) for x in "ab"]
    (a1, a2), (b1, b2) = (p[::-1] for p in pairs) if _old(shapes["a1"]) else pairs
    return meet(a1[1], a2) and a1[0] == a2[1] and meet(b1[1], b2, shapes.get("bm"))


FAMILIES = (
    Family(
        name="GLoRA",
        suffixes={f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
        holds=lambda shapes: {"a1", "a2", "b1", "b2"} <= shapes.keys(),
        function=glora,
        size=size,
        rank=lambda shapes: min(shapes["a1"][:2]),
        fits=fits,
        on_weight=True,
    ),
)
