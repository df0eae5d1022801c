"""OFT and BOFT: rows of the weight are rotated among each other."""

from __future__ import annotations

import math
from collections.abc import Callable

from plymix.adapters.families import Family, Shapes, Size
from plymix.methods import Array
from plymix.methods.arrays import as_rows, namespace, norm


def oft(w: Array, blocks: Array, rescale: Array | None = None, *, constraint: float = 0.0) -> Array:
    """Orthogonal fine-tuning

    The rows of W are k groups of n. Group g becomes R_g^T W_g with R = (I + Q) (I - Q)^-1 and
    Q = B - B^T, B = blocks[g]; D = rescale * R^T W - W. Where the file has an alpha > 0, Q is made
    no longer than alpha * out (the norm over all groups).

    Source: OFT, arXiv:2306.07280; LyCORIS `diag-oft` and kohya's `oft`, which train with the limit
    alpha * out (ComfyUI reads it as alpha).
    """
    xp, rows = namespace(w), as_rows(w)
    groups = xp.reshape(rows, (blocks.shape[0], blocks.shape[1], -1))
    turn = _rotation(blocks, constraint * rows.shape[0]) - _identity(blocks)
    change = xp.reshape(xp.matrix_transpose(turn) @ groups, rows.shape)
    return xp.reshape(_rescaled(change, rows, rescale), w.shape)


def boft(
    w: Array, blocks: Array, rescale: Array | None = None, *, constraint: float = 0.0
) -> Array:
    """Butterfly orthogonal fine-tuning

    Round i of m takes the rows in pairs of runs, 2^i b / 2 rows long, interleaves the two, and
    multiplies groups of b rows by R (see OFT); D = rescale * W after all rounds - W.

    Source: BOFT, arXiv:2311.06243; LyCORIS `boft`.
    """
    xp, rows = namespace(w), as_rows(w)
    rounds, _, b, _ = blocks.shape
    turn = _rotation(blocks, constraint * rows.shape[0])
    out, columns = rows.shape
    found = rows
    for i in range(rounds):
        run = 2**i * (b // 2)
        paired = xp.permute_dims(xp.reshape(found, (-1, 2, run, columns)), (0, 2, 1, 3))
        turned = turn[i, ...] @ xp.reshape(paired, (-1, b, columns))
        back = xp.permute_dims(xp.reshape(turned, (-1, run, 2, columns)), (0, 2, 1, 3))
        found = xp.reshape(back, (out, columns))
    return xp.reshape(_rescaled(found - rows, rows, rescale), w.shape)


def _rotation(blocks: Array, limit: float) -> Array:
    """Cayley's rotation of each block, from a skew matrix of norm `limit` at most (0: any)."""
    xp = namespace(blocks)
    skew = blocks - xp.matrix_transpose(blocks)
    length = norm(skew) + 1e-8
    if 0 < limit < length:
        skew = skew * (limit / length)
    one = _identity(blocks)
    return (one + skew) @ xp.linalg.inv(one - skew)


def _identity(blocks: Array) -> Array:
    from array_api_compat import device

    xp = namespace(blocks)
    return xp.eye(blocks.shape[-1], dtype=blocks.dtype, device=device(blocks))


def _rescaled(change: Array, rows: Array, rescale: Array | None) -> Array:
    if rescale is None:
        return change
    factor = as_rows(rescale)
    return factor * change + (factor - 1) * rows


def size(shapes: Shapes) -> Size:
    return math.prod(shapes["blocks"][-3:-1]), None


def _family(function: Callable[..., Array], ndim: int) -> Family:
    return Family(
        name=function.__name__.upper(),
        suffixes={".oft_blocks": "blocks", ".rescale": "rescale"},
        holds=lambda shapes: len(shapes.get("blocks", ())) == ndim,
        function=function,
        size=size,
        rank=lambda shapes: 0,
        fits=lambda shapes: shapes["blocks"][-1] == shapes["blocks"][-2],
        on_weight=True,
        numbers=("constraint",),
    )


FAMILIES = (_family(oft, 3), _family(boft, 4))
