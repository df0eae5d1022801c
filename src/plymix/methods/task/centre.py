"""Centres of models or of task vectors: Model Stock and medians, alone and after TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np

from plymix.methods import Array
from plymix.methods.arrays import (
    Rng,
    add_up,
    as_lines,
    blockwise,
    clip,
    copy_of,
    namespace,
    rowwise,
)
from plymix.methods.task.dare import drop_masks
from plymix.methods.task.della import mag_prune
from plymix.methods.task.ties import Rule, trimmed
from plymix.methods.task.vectors import Gains, as_float, mean_and_products, merge, products
from plymix.registry import Range, Share, method

Election = Literal["count", "soup"]
Core = Literal["mean", "stock", "median"]


def _stock_share(dots: Sequence[Sequence[Array]], clamp_t: bool) -> Array:
    """t = n cos / (1 + (n - 1) cos) of n vectors; 0 at its pole cos = -1/(n - 1).

    cos is the mean cosine over all pairs. The dot products are numbers, or arrays of one shape;
    products of norms are not below 1e-6.
    """
    n = len(dots)
    if n == 1:
        return 1.0
    norms = [namespace(row[i]).sqrt(row[i]) for i, row in enumerate(dots)]
    cosines = [
        clip(dots[i][j] / clip(norms[i] * norms[j], 1e-6), -1, 1)
        for i in range(n)
        for j in range(i)
    ]
    cosine = add_up(cosines) / len(cosines)
    below = 1 + (n - 1) * cosine
    pole = as_float(below == 0, cosine)
    t = n * cosine / (below + pole) * (1 - pole)
    return clip(t, 0, 1) if clamp_t else t


@method("tensor", min_models=2)
def model_stock(
    base: Array, *models: Array, filter_wise: bool = False, clamp_t: bool = True
) -> Array:
    """Model Stock

    cos = mean of cos(d_i, d_j) over all pairs;  t = n cos / (1 + (n - 1) cos);
    R = t mean_i X_i + (1 - t) X_0

    The less the models' changes agree, the closer the result stays to the base.
    filter_wise: one cos and t per vector along the last axis instead of one per tensor. clamp_t:
    limit t to 0..1; off, as in other tools, t has a pole at cos = -1/(n - 1) and opposite changes
    are magnified without bound. Cosines are limited to -1..1 and norm products to at least 1e-6.
    sd-mecha averages only the cosines of neighbours in the list, per vector.
    Source: Model Stock, arXiv:2403.19522; mergekit `model_stock`.
    """
    n = len(models)
    if not filter_wise or not base.ndim:
        t = float(_stock_share(products(base, models), clamp_t))
        return merge(base, models, [1 / n] * n, t)
    xp = namespace(base)

    def piece(x0: Array, *xs: Array) -> Array:
        ds = [x - x0 for x in xs]
        dots = [
            [xp.sum(d * e, axis=-1, keepdims=True) for e in ds[: i + 1]] for i, d in enumerate(ds)
        ]
        return x0 + _stock_share(dots, clamp_t) * (add_up(ds) / n)

    return xp.reshape(rowwise(piece, *map(as_lines, (base, *models))), base.shape)


EPSILON, ITERATIONS, TOLERANCE = 1e-6, 100, 1e-20
"""Settings of the geometric median where a method has none of its own."""


def _weiszfeld(
    dots: Any,
    epsilon: float = EPSILON,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> list[float]:
    """The weights of the geometric median of n vectors whose dot products are given.

    The median is a weighted mean at every step, so all distances follow from the n x n products.
    """
    n = len(dots)
    c = np.full(n, 1 / n)

    def distances(c: Any) -> Any:
        away = np.eye(n) - c
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", away, dots, away), 0))

    far = distances(c)
    for _ in range(iterations):
        w = 1 / np.maximum(far, epsilon)
        c = w / w.sum()
        before, far = far.mean(), distances(c)
        if abs(before - far.mean()) <= tolerance * far.mean():
            break
    return [float(x) for x in c]


@method("tensor")
def geometric_median(
    *models: Array,
    epsilon: Annotated[float, Range(1e-300)] = EPSILON,
    iterations: Annotated[int, Range(1)] = ITERATIONS,
    tolerance: Annotated[float, Range(0)] = TOLERANCE,
) -> Array:
    """Geometric Median

    R minimises sum_i ||X_i - R|| over whole tensors (Weiszfeld): from R = mean, repeat
    w_i = 1 / max(||X_i - R||, epsilon);  R = sum_i w_i X_i / sum_i w_i

    One model far from the others does not drag the result as it drags a mean. With two models it
    is their mean. epsilon: smallest distance. iterations: at most so many. tolerance: stop when
    the mean distance changes by no more than this share of itself.
    The iteration runs on the dot products of the models, so the models are read twice, not once per
    step.
    Source: Weiszfeld 1937; sd-mecha `geometric_median`.
    """
    first, *others = models
    if not others:
        return copy_of(first)
    shares = _weiszfeld(products(first, models), epsilon, iterations, tolerance)
    return merge(first, others, shares[1:], 1.0)


@method("elementwise")
def median(*models: Array) -> Array:
    """Median of the Models, Element by Element

    R = the middle value of X_1..X_n; for an even number the mean of the two middle values.

    torch.median, and tools built on it, give the lower of the two middle values instead.
    Source: the ordinary median; the "core" of sd-optim's `rams`.
    """
    n = len(models)

    def piece(*xs: Array) -> Array:
        xp, row = namespace(*xs), list(xs)
        for step in range(n):  # odd-even transposition sort of n columns
            for i in range(step % 2, n - 1, 2):
                row[i], row[i + 1] = xp.minimum(row[i], row[i + 1]), xp.maximum(row[i], row[i + 1])
        low, high = row[(n - 1) // 2], row[n // 2]
        return low + (high - low) / 2

    return blockwise(piece, *models)


def _centred(
    base: Array,
    models: Sequence[Array],
    scale: float,
    gains: Gains,
    vote: Election,
    core: Core,
    clamp_t: bool = True,
) -> Array:
    """X_0 + scale * the `core` of the differences that survive their gains and the vote."""
    if core == "median":
        shares = _weiszfeld(products(base, models, gains, vote))
        return merge(base, models, shares, scale, gains=gains, vote=vote)
    if core == "stock":
        mean, dots = mean_and_products(base, models, gains, vote)
        scale *= float(_stock_share(dots, clamp_t))
        return blockwise(lambda d, x0: d * scale + x0, mean, base, out=mean)
    ones = [1.0] * len(models)
    return merge(base, models, ones, scale, gains=gains, vote=vote, divide="count")


@method("tensor")
def ties_stock(
    base: Array,
    *models: Array,
    density: Share = 0.2,
    vote: Election = "count",
    trim: Rule = "threshold",
    clamp_t: bool = True,
    scale: float = 1.0,
) -> Array:
    """TIES, then Model Stock

    The differences that survive `ties_count` (or `ties_soup`) are averaged and shrunk by the t of
    `model_stock`, computed on these survivors:  R = X_0 + scale * t * sum_i f_i / count

    density, vote, trim: as in `ties_count` and `ties_soup`. clamp_t: as in `model_stock`.
    sd-mecha's `apply_stock` works the wrong way round: it shrinks when switched off.
    Source: sd-mecha `ties_sum_extended`; arXiv:2306.01708, arXiv:2403.19522.
    """
    gains = trimmed(base, models, density, trim)
    return _centred(base, models, scale, gains, vote, "stock", clamp_t)


@method("tensor")
def ties_gmedian(
    base: Array,
    *models: Array,
    density: Share = 0.2,
    vote: Election = "count",
    trim: Rule = "threshold",
    scale: float = 1.0,
) -> Array:
    """TIES, then Geometric Median

    R = X_0 + scale * the geometric median of the differences that survive `ties_count` (or
    `ties_soup`), with the defaults of `geometric_median`.

    density, vote, trim: as in `ties_count` and `ties_soup`.
    Source: sd-mecha `ties_sum_extended` with `apply_median`.
    """
    gains = trimmed(base, models, density, trim)
    return _centred(base, models, scale, gains, vote, "median")


@method("tensor")
def ties_dare(
    base: Array,
    *models: Array,
    rng: Rng,
    keep: Share = 0.5,
    epsilon: Share = 0.0,
    density: Share = 0.2,
    vote: Election = "count",
    trim: Rule = "threshold",
    core: Core = "mean",
    clamp_t: bool = True,
    rescale: bool = True,
    scale: float = 1.0,
) -> Array:
    """DARE, then TIES

    Each d_i is thinned at random to the share `keep`, then trimmed and elected as in `ties_count`
    (or `ties_soup`); d = the mean of the survivors, divided by keep;  R = X_0 + scale * d

    keep: 1 - p of DARE; 0 is exactly the base. epsilon: above 0, larger elements are kept more
    often, as `della` with `ranks = tensor`. density, vote, trim: the trim and election of the
    thinned differences. core: `stock` shrinks the mean as `ties_stock`, `median` takes the
    geometric median instead, as `ties_gmedian`. clamp_t: as in `model_stock`. rescale: divide by
    keep.
    Source: sd-mecha `add_difference_ties_dare` (`ties_with_dare`); arXiv:2311.03099.
    """
    if keep == 0:
        return copy_of(base)
    thinned: Gains
    if epsilon > 0:
        thinned, _ = mag_prune(base, models, keep, epsilon, "tensor", "none", rng)
    else:
        thinned = drop_masks(base, models, keep, rng)
    gains = trimmed(base, models, density, trim, thinned)
    return _centred(base, models, scale / keep if rescale else scale, gains, vote, core, clamp_t)
