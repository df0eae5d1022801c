"""(IA)^3: a factor for each row, or for each column, of the weight."""

from __future__ import annotations

from plymix.adapters.families import Family, Shapes, Size
from plymix.methods import Array
from plymix.methods.arrays import namespace


def ia3(w: Array, weight: Array, *, on_input: float = 0.0) -> Array:
    """Factors of activations

    D = W * weight, along the rows (outputs), or with `on_input` along axis 1 (inputs)

    Source: (IA)^3, arXiv:2205.05638; LyCORIS `ia3`, which stores the factor less 1.
    """
    axis = 1 if on_input else 0
    shape = tuple(-1 if i == axis else 1 for i in range(len(w.shape)))
    return w * namespace(w).reshape(weight, shape)


def size(shapes: Shapes) -> Size:
    return None, None  # whether it is rows or columns stands in `on_input`, not in a shape


FAMILIES = (
    Family(
        name="IA3",
        suffixes={".on_input": "on_input"},  # and ".weight", where there is an ".on_input"
        holds=lambda shapes: {"weight", "on_input"} <= shapes.keys(),
        function=ia3,
        size=size,
        rank=lambda shapes: 0,
        on_weight=True,
        numbers=("on_input",),
    ),
)
