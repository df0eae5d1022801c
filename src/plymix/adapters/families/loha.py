"""LoHa: the element-wise product of two LoRAs."""

from __future__ import annotations

import math

from plymix.adapters.families import Family, Rows, Shapes, Size, meet
from plymix.adapters.families.lora import core
from plymix.methods import Array
from plymix.methods.arrays import as_rows


def loha(
    w1_a: Array,
    w1_b: Array,
    w2_a: Array,
    w2_b: Array,
    t1: Array | None = None,
    t2: Array | None = None,
) -> Rows:
    """Hadamard product of two low-rank matrices

    D = (w1_a w1_b) * (w2_a w2_b); with cores each factor is
    sum_{p, q} t[p, q, h, w] b[q, i] a[p, o], so that `a` has the rank first.

    Source: FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859.
    """
    one, right_one = _pair(w1_a, w1_b, t1)
    two, right_two = _pair(w2_a, w2_b, t2)
    return lambda rows: (one[rows, :] @ right_one) * (two[rows, :] @ right_two)


def _pair(a: Array, b: Array, t: Array | None) -> tuple[Array, Array]:
    return (as_rows(a), as_rows(b)) if t is None else (as_rows(a).T, core(t, b))


def size(shapes: Shapes) -> Size:
    return _size(shapes, "1")


def _size(shapes: Shapes, i: str) -> Size:
    core = shapes.get(f"t{i}")
    columns = math.prod((*shapes[f"w{i}_b"][1:], *(core[2:] if core else ())))
    return shapes[f"w{i}_a"][1 if core else 0], columns


def fits(shapes: Shapes) -> bool:
    cores = {i: shapes.get(f"t{i}") for i in "12"}
    ranks = {i: shapes[f"w{i}_a"][0 if core else 1] for i, core in cores.items()}
    both = all(meet(ranks[i], shapes[f"w{i}_b"], core) for i, core in cores.items())
    return both and _size(shapes, "1") == _size(shapes, "2")


FAMILIES = (
    Family(
        name="LoHa",
        suffixes={
            ".hada_w1_a": "w1_a",
            ".hada_w1_b": "w1_b",
            ".hada_w2_a": "w2_a",
            ".hada_w2_b": "w2_b",
            ".hada_t1": "t1",
            ".hada_t2": "t2",
        },
        holds=lambda shapes: {"w1_a", "w1_b", "w2_a", "w2_b"} <= shapes.keys(),
        function=loha,
        size=size,
        rank=lambda shapes: shapes["w1_b"][0],
        fits=fits,
    ),
)
