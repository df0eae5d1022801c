"""Methods that ask which models changed an element, and how much it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from array_api_compat import is_numpy_array

from plymix.methods import Array
from plymix.methods.arrays import (
    add_up,
    blockwise,
    choose,
    clip,
    namespace,
    numel,
    pieces,
    rowwise,
)
from plymix.methods.selection import each_kth_largest, packed_top_mask
from plymix.methods.task.vectors import as_float, distance, merge, products
from plymix.registry import Range, Share, method


@method("tensor")
def sce(
    base: Array,
    *models: Array,
    select: Share = 1.0,
    scale: float = 1.0,
) -> Array:
    """SCE: Select, Calculate, Erase

    Select: v = variance over the models of d_i (divided by n); below 1, only the
    k = int(select * number of v != 0) elements with the largest v are kept, in every d_i.
    Calculate: c_i = mean(d_i^2) / sum_j mean(d_j^2) of what is kept (1/n each if the sum < 1e-6).
    Erase: signs are elected on sum_i d_i (+ where it is 0) and
    d = sum_i c_i m_i d_i / max(sum_i c_i m_i, 1e-6) over those that agree;  R = X_0 + scale * d

    select: mergekit's `select_topk`. Models that agree everywhere (one model, equal models) have
    no variance, so any select below 1 gives the base.
    Source: FuseChat (SCE), arXiv:2408.07990; mergekit `sce`.
    """
    n = len(models)
    mask = None
    if select < 1:
        varied = 0

        def counted(*xs: Array) -> Array:
            nonlocal varied
            v = _variance(*xs)
            varied += int(namespace(v).count_nonzero(v != 0))
            return v

        variance = blockwise(counted, base, *models)
        mask = packed_top_mask(int(select * varied), variance)
        del variance  # makes room for the result
    powers = np.diag(products(base, models, [mask] * n)) / max(numel(base), 1)
    total = float(powers.sum())
    shares = [float(p) / total for p in powers] if total >= 1e-6 else [1 / n] * n
    return merge(
        base,
        models,
        shares,
        scale,
        gains=[mask] * n,
        vote="sum",
        voices=[1.0] * n,
        divide="weights",
        floor=1e-6,
    )


def _variance(x0: Array, *xs: Array) -> Array:
    ds = [x - x0 for x in xs]
    mean = add_up(ds) / len(ds)
    for d in ds:
        d -= mean
        d *= d
    total = add_up(ds)
    total /= len(ds)
    return total


@method("tensor")
def arcee_fusion(a: Array, b: Array) -> Array:
    """Arcee Fusion: Take the Important Changes of B

    p = softmax(B) + 1e-8 and q = softmax(A) + 1e-8 along the last axis; importance
    I = |B - A| * sum_row p ln(p / q); t = median(I) + 1.5 (Q3 - Q1);  R = B where I >= t, else A

    The quartiles and the median are the elements int(q (N - 1)) of the sorted I, for tensors of any
    size (mergekit samples a million elements of larger ones without a seed). A row of one element
    has I = 0, so t = 0 and B is taken; for a convolution the rows are those of the kernel.
    Source: mergekit `arcee_fusion`.
    """
    xp, n = namespace(a), numel(a)
    shape = (-1, a.shape[-1] if a.ndim else 1)
    score = rowwise(_importance, *(xp.reshape(x, shape) for x in (a, b)))
    ks = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]
    low, middle, high = (cut for cut, _ in each_kth_largest(ks, lambda s: s, score))
    threshold = middle + 1.5 * (high - low)
    # not `>=`: a row with NaN is B's, and NaN in B is told
    return blockwise(lambda s, x, y: choose(s < threshold, x, y), xp.reshape(score, a.shape), a, b)


def _importance(a: Array, b: Array) -> Array:
    if a.shape[-1] >= 8 or not is_numpy_array(a):
        return _along(-1, a, b)
    # numpy sums rows of less than 8 in their order, and columns likewise ten times faster
    return _along(0, *(np.ascontiguousarray(x.T) for x in (a, b))).T


def _along(axis: int, a: Array, b: Array) -> Array:
    """The importance of the elements of rows that lie along `axis`."""
    xp = namespace(a)

    def softmax(x: Array) -> Array:
        e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
        e /= xp.sum(e, axis=axis, keepdims=True)
        e += 1e-8
        return e

    p = softmax(b)
    ratio = p / softmax(a)
    p *= xp.log(ratio)
    return xp.abs(b - a) * xp.sum(p, axis=axis, keepdims=True)


@method("elementwise")
def ram(
    base: Array,
    *models: Array,
    epsilon: Annotated[float, Range(0)] = 1e-5,
    scale: float = 1.0,
) -> Array:
    """RAM: Keep What Only One Model Changed, Average the Rest

    z_i = 1 where |d_i| > epsilon; c = sum_i z_i;  R = X_0 + scale * sum_i z_i d_i / max(c, 1)

    An element that one model alone changed keeps its full difference, one that several changed
    gets their mean. epsilon: what counts as unchanged. scale: factor of the sum.
    Source: Reinforced Agent Merging, arXiv:2601.13572.
    """
    return _ram(base, models, [1.0] * len(models), epsilon, scale)


@method("tensor")
def ramplus_tl(
    base: Array,
    *models: Array,
    ratio: float = 0.1,
    limit: Annotated[float, Range(0)] = 0.2,
    epsilon: Annotated[float, Range(0)] = 1e-5,
    scale: float = 1.0,
) -> Array:
    """RAM+ per Tensor: Strengthen What Only One Model Changed

    As `ram`, with what model i alone changed multiplied by
    l_i = 1 + ratio * clamp(shared_i / max(unique_i, epsilon), 0, limit)

    shared_i and unique_i: how many elements of the tensor model i changed together with another
    model, and alone. ratio and limit: r and alpha of the paper. epsilon: what counts as unchanged.
    scale: factor of the sum.
    Source: Reinforced Agent Merging (RAM+), arXiv:2601.13572.
    """
    changed, alone = [0] * len(models), [0] * len(models)
    for x0, *xs in pieces(base, *models):
        zs = [distance(x0, x) > epsilon for x in xs]
        once = _number(zs) == 1
        for i, z in enumerate(zs):
            changed[i] += int(namespace(z).count_nonzero(z))
            alone[i] += int(namespace(z).count_nonzero(z & once))
    gains = []
    for total, unique in zip(changed, alone, strict=True):
        shared = total - unique
        gains.append(1 + ratio * min(max(shared / max(unique, epsilon or 1.0), 0.0), limit))
    return _ram(base, models, gains, epsilon, scale)


def _ram(
    base: Array, models: Sequence[Array], alone: Sequence[float], epsilon: float, scale: float
) -> Array:
    def piece(x0: Array, *xs: Array) -> Array:
        ds = [x - x0 for x in xs]
        zs = [namespace(d).abs(d) > epsilon for d in ds]
        number = _number(zs)
        unique = as_float(number == 1, x0)
        for d, z, g in zip(ds, zs, alone, strict=True):
            d *= as_float(z, d)
            if g != 1:
                d *= unique * (g - 1) + 1
        total = add_up(ds)
        total /= clip(as_float(number, x0), 1)
        if scale != 1:
            total *= scale
        total += x0
        return total

    return blockwise(piece, base, *models)


def _number(masks: Sequence[Array]) -> Array:
    """How many of the masks are true, as small integers."""
    return add_up([namespace(m).astype(m, namespace(m).int16) for m in masks])
