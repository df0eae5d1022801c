"""LoRA: a product of two thin matrices; on convolutions LoCon, with a core LoCon-CP."""

from __future__ import annotations

from plymix.adapters.families import Family, Rows, Shapes, Size, meet
from plymix.methods import Array
from plymix.methods.arrays import as_rows, namespace


def lora(up: Array, down: Array, mid: Array | None = None) -> Rows:
    """Low-rank change of a linear layer or convolution

    D = up down, of a convolution D[o, (i, h, w)] = sum_r up[o, r] down[r, (i, h, w)]; with a core
    D[o, i, h, w] = sum_{p, q} up[o, p] mid[p, q, h, w] down[q, i]

    Source: LoRA, arXiv:2106.09685; LoCon and its Tucker (CP) form, LyCORIS, arXiv:2309.14859.
    """
    left, right = product(up, down, mid)
    return lambda rows: left[rows, :] @ right


def product(up: Array, down: Array, mid: Array | None = None) -> tuple[Array, Array]:
    """The matrices (out, r) and (r, (i, h, w)) whose product the change is."""
    return as_rows(up), as_rows(down) if mid is None else core(mid, down)


def core(mid: Array, down: Array) -> Array:
    """(p, (i, h, w)): sum_q mid[p, q, h, w] down[q, i]."""
    xp = namespace(mid, down)
    p, q = mid.shape[:2]
    kernel = xp.permute_dims(xp.reshape(mid, (p, q, -1)), (0, 2, 1))
    found = xp.permute_dims(kernel @ as_rows(down), (0, 2, 1))
    return xp.reshape(found, (p, -1))


def size(shapes: Shapes) -> Size:
    kernel = shapes["mid"][2:] if "mid" in shapes else ()
    columns = 1
    for n in (*shapes["down"][1:], *kernel):
        columns *= n
    return shapes["up"][0], columns


FAMILIES = (
    Family(
        name="LoRA",
        suffixes={
            ".lora_up.weight": "up",
            ".lora_down.weight": "down",
            ".lora_mid.weight": "mid",
            ".lora_B.weight": "up",
            ".lora_A.weight": "down",
            ".lora_B": "up",
            ".lora_A": "down",
            ".lora_linear_layer.up.weight": "up",
            ".lora_linear_layer.down.weight": "down",
            "_lora.up.weight": "up",
            "_lora.down.weight": "down",
            ".lora.up.weight": "up",
            ".lora.down.weight": "down",
            ".up.weight": "up",
            ".down.weight": "down",
        },
        holds=lambda shapes: {"up", "down"} <= shapes.keys(),
        function=lora,
        size=size,
        rank=lambda shapes: shapes["down"][0],
        fits=lambda shapes: meet(shapes["up"][1], shapes["down"], shapes.get("mid")),
        product=product,
    ),
)
