"""Methods that take some elements from one model and the rest from another."""

from __future__ import annotations

import math
from typing import Annotated

from plymix.methods import Array
from plymix.methods.arrays import (
    argsort,
    blockwise,
    choose,
    flatten,
    kth_smallest,
    lerp,
    namespace,
    numel,
    unsort,
)
from plymix.methods.selection import kth_largest
from plymix.registry import Range, Share, method


@method("tensor")
def tensor(
    a: Array,
    b: Array,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.0,
) -> Array:
    """Tensor Exchange

    With n rows: rows int(n beta) up to int(n (alpha + beta)) come from B, the rest from A; where
    alpha + beta > 1 the region goes on at row 0.

    alpha is the share of rows from B, beta where they begin. alpha 0 is exactly A, 1 exactly B.
    Nothing is blended. Scalars stay A.
    Source: supermerger calcmode `tensor`, meh `tensor_sum`, Chattiori `TS`.
    """
    return _exchange(a, b, alpha, beta, axis=0)


@method("tensor")
def tensor2(
    a: Array,
    b: Array,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.0,
) -> Array:
    """Tensor Exchange Along Inputs

    As `tensor`, with the same alpha and beta, but along the second axis (the input channels) where
    that is longer than 100.
    Source: supermerger calcmode `tensor2`, without its mix-up of the two axes for shorter ones.
    """
    return _exchange(a, b, alpha, beta, axis=int(len(a.shape) > 1 and a.shape[1] > 100))


@method("tensor", name="tensor_sum")
@method("tensor")
def copy_region(
    a: Array,
    b: Array,
    *,
    alpha: Annotated[float, Range(-1, 1)] = 0.5,
    beta: Annotated[float, Range(-1, 1)] = 0.0,
) -> Array:
    """Copy Region

    With n rows: rows round(n beta) up to round(n (alpha + beta)) come from B, the rest from A;
    where alpha + beta > 1 the region goes on at row 0.

    alpha is the width of the region from B; a negative one reaches back from beta. beta is where it
    begins; a negative one counts from the end. alpha 0 is exactly A, 1 exactly B. A scalar is B's
    where alpha > 0.5. `copy_region` and `tensor_sum` are one method under two names.
    Source: sd-mecha `tensor_sum` (`width`, `offset`).
    """
    if not a.shape:
        return b if alpha > 0.5 else a
    start, end, inverted = _region(alpha, beta, a.shape[0])
    return _splice(b, a, start, end, 0) if inverted else _splice(a, b, start, end, 0)


@method("tensor", room=12)
def top_k_tensor_sum(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: Annotated[float, Range(-1, 1)] = 0.5,
    beta: Annotated[float, Range(-1, 1)] = 0.0,
) -> Array:
    """Top-K Tensor Sum

    v = A's elements in ascending order, r_i = rank of B_i in B, K(k) = k-th smallest |A|
    R_i = v[r_i] where K(start) < |v[r_i]| <= K(end), else A_i

    Gives a part of A the order of B while keeping A's own numbers. start and end are the region of
    `copy_region` (alpha wide, from beta) among the elements ordered by size: beta near 1 means the
    largest. With a third model C all of this happens to A - C and B - C. alpha 0 is exactly A.
    Source: meh `top_k_tensor_sum`.
    """
    if alpha == 0:
        return a
    if c is not None:
        return c + top_k_tensor_sum(a - c, b - c, alpha=alpha, beta=beta)
    start, end, inverted = _region(alpha, beta, numel(a))
    if start == end and not inverted:
        return a
    xp = namespace(a, b)
    flat, order = flatten(a), argsort(b)
    v = xp.sort(flat, stable=False)
    size = xp.abs(v)
    low, high = (kth_smallest(size, k) if k > 0 else -1.0 for k in (start, end))
    chosen = (size > low) & (size <= high)
    chosen = ~chosen if inverted else chosen
    return xp.reshape(unsort(xp.where(chosen, v, flat[order]), order), a.shape)


@method("tensor")
def sparse_topk_delta(a: Array, b: Array, *, alpha: float = 1.0, beta: Share = 0.5) -> Array:
    """Sparse Top-K Difference

    d = B - A;  R = A + alpha d where |d| is among its int(N beta) largest, else A

    Moves only the elements that differ most. beta is the share of elements that move (all equal to
    the last of them move too), alpha how far: alpha 0 and beta 0 are exactly A, alpha 1 with beta 1
    exactly B.
    Source: `SPRSE` of Chattiori-Model-Merger. Model-mixer calls it TIES; it elects no signs.
    """
    n = numel(a)
    k = int(n * beta)
    if alpha == 0 or k == 0:
        return a
    if k == n:
        return lerp(a, b, alpha)
    xp = namespace(a, b)
    threshold, _ = kth_largest(k, lambda a, b: xp.abs(b - a), a, b)

    def one(a: Array, b: Array) -> Array:
        # not `>=`: where either is NaN the result is, and is told
        return choose(xp.abs(b - a) < threshold, a, lerp(a, b, alpha))

    return blockwise(one, a, b)


def _exchange(a: Array, b: Array, width: float, offset: float, axis: int) -> Array:
    if not a.shape:
        return a
    n = a.shape[axis]
    if width + offset <= 1:
        return _splice(a, b, int(n * offset), int(n * (width + offset)), axis)
    return _splice(b, a, int(n * (width + offset - 1)), int(n * offset), axis)


def _region(width: float, offset: float, n: int) -> tuple[int, int, bool]:
    """Start, end and whether the region is what lies outside them, of n places."""
    if width < 0:
        width, offset = -width, offset + width
    width = min(width, 1.0)
    if offset < 0:
        offset = 1 + offset - int(offset)
    offset = math.fmod(offset, 1.0)
    if width + offset <= 1:
        return round(offset * n), round((width + offset) * n), False
    return round((width + offset - 1) * n), round(offset * n), True


def _splice(a: Array, b: Array, start: int, end: int, axis: int) -> Array:
    """`a` with `start` up to `end` along `axis` taken from `b`."""
    if start >= end:
        return a

    def cut(x: Array, i: int, j: int) -> Array:
        return x[(slice(None),) * axis + (slice(i, j),)]

    n = a.shape[axis]
    parts = (cut(a, 0, start), cut(b, start, end), cut(a, end, n))
    return namespace(a, b).concat(parts, axis=axis)
