"""LoKr: a Kronecker product."""

from __future__ import annotations

import math

from plymix.adapters.families import Family, Rows, Shapes, Size, meet
from plymix.adapters.families.lora import core
from plymix.methods import Array
from plymix.methods.arrays import as_rows, namespace


def lokr(
    w1: Array | None = None,
    w2: Array | None = None,
    w1_a: Array | None = None,
    w1_b: Array | None = None,
    w2_a: Array | None = None,
    w2_b: Array | None = None,
    t2: Array | None = None,
) -> Rows:
    """Kronecker product of a small and a larger matrix

    D[i p + k, j q + l, h, w] = w1[i, j] w2[k, l, h, w], where w1 = w1_a w1_b or is given whole, and
    w2 = w2_a w2_b, or sum_{r, s} t2[r, s, h, w] w2_b[s, l] w2_a[r, k], or is given whole.

    Source: KronA, arXiv:2212.10650; LyCORIS, arXiv:2309.14859. alpha scales it only where a factor
    is itself a product.
    """
    first = as_rows(w1) if w1 is not None else as_rows(w1_a) @ as_rows(w1_b)
    if w2 is not None:
        second = as_rows(w2)
    elif t2 is not None:
        second = as_rows(w2_a).T @ core(t2, w2_b)
    else:
        second = as_rows(w2_a) @ as_rows(w2_b)
    xp, p, out = namespace(first), second.shape[0], first.shape[0] * second.shape[0]

    def change(rows: slice) -> Array:
        start, stop, _ = rows.indices(out)
        parts = []
        for i in range(start // p, -(-stop // p)):
            k = slice(max(start - i * p, 0), min(stop - i * p, p))
            part = first[i, :][None, :, None] * second[k, :][:, None, :]
            parts.append(xp.reshape(part, (part.shape[0], -1)))
        return parts[0] if len(parts) == 1 else xp.concat(parts)

    return change


def size(shapes: Shapes) -> Size:
    (a, b), (c, d) = _first(shapes), _second(shapes)
    return a * c, b * d


def _first(shapes: Shapes) -> tuple[int, int]:
    a, b = shapes.get("w1") or (shapes["w1_a"][0], shapes["w1_b"][1])
    return a, b


def _second(shapes: Shapes) -> tuple[int, int]:
    if "w2" in shapes:
        return shapes["w2"][0], math.prod(shapes["w2"][1:])
    if "t2" in shapes:
        return shapes["w2_a"][1], math.prod((*shapes["w2_b"][1:], *shapes["t2"][2:]))
    return shapes["w2_a"][0], math.prod(shapes["w2_b"][1:])


def _whole(name: str, shapes: Shapes) -> bool:
    return name in shapes or {f"{name}_a", f"{name}_b"} <= shapes.keys()


def fits(shapes: Shapes) -> bool:
    for name, mid in (("w1", None), ("w2", shapes.get("t2"))):
        if name not in shapes:
            rank = shapes[f"{name}_a"][0 if mid else 1]
            if not meet(rank, shapes[f"{name}_b"], mid):
                return False
    return True


def rank(shapes: Shapes) -> int:
    return next((shapes[b][0] for b in ("w2_b", "w1_b") if b in shapes), 0)


FAMILIES = (
    Family(
        name="LoKr",
        suffixes={
            ".lokr_w1": "w1",
            ".lokr_w2": "w2",
            ".lokr_w1_a": "w1_a",
            ".lokr_w1_b": "w1_b",
            ".lokr_w2_a": "w2_a",
            ".lokr_w2_b": "w2_b",
            ".lokr_t2": "t2",
        },
        holds=lambda shapes: _whole("w1", shapes) and _whole("w2", shapes),
        function=lokr,
        size=size,
        rank=rank,
        fits=fits,
    ),
)
