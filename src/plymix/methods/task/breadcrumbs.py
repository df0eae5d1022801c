"""Breadcrumbs: drop the largest and the smallest elements of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from plymix.methods import Array, model_weights
from plymix.methods.arrays import numel
from plymix.methods.selection import NOTHING, Largest, Lazy, Without, each_kth_largest
from plymix.methods.task.ties import merge_agreeing
from plymix.methods.task.vectors import distance, merge
from plymix.registry import Share, method


def _crumbs(
    base: Array, models: Sequence[Array], density: float, gamma: float
) -> list[Lazy | None]:
    """Masks without the largest int(gamma N) and without the smallest elements of each |d|."""
    n = numel(base)
    kept, top = int(density * n), int(gamma * n)
    top = max(min(top, n - kept), 0)
    if kept >= n:
        return [None] * len(models)
    return [_between(kept + top, top, base, x) for x in models]


def _between(k: int, top: int, base: Array, x: Array) -> Lazy:
    """What keeps the `k` largest |d| but for the `top` largest."""
    n = numel(base)
    if k == 0:
        return NOTHING
    ks = [i for i in (k, top) if 0 < i < n]
    cuts = zip(ks, each_kth_largest(ks, distance, base, x), strict=True)
    found = [Largest(cut, i - larger) for i, (cut, larger) in cuts]
    if top == 0:
        return found[0]
    return Without(found[0] if k < n else None, found[-1])


@method("tensor")
def breadcrumbs(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.9,
    gamma: Share = 0.01,
    scale: float = 1.0,
) -> Array:
    """Model Breadcrumbs

    Of each d_i the int(gamma N) largest and then the smallest elements are dropped so that
    int(density N) remain;  R = X_0 + scale * sum_i w_i m_i d_i

    weights: one number per model after the base, each 1 when left out (not normalised). density:
    share that is kept, without rescaling. gamma: share of outliers dropped from the top; where
    density + gamma > 1 it gives way. Of equal magnitudes the earlier counts as the larger.
    mergekit drops the whole difference of every tensor with gamma N < 1 (biases and norms of fewer
    than 100 elements at the default gamma); here such a tensor has no outliers.
    Source: Model Breadcrumbs, arXiv:2312.06795; mergekit `breadcrumbs`.
    """
    ws = model_weights(weights, len(models))
    return merge(base, models, ws, scale, gains=_crumbs(base, models, density, gamma))


@method("tensor")
def breadcrumbs_ties(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.9,
    gamma: Share = 0.01,
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """Model Breadcrumbs with the Sign Election of TIES

    The masks of `breadcrumbs`, then signs are elected on sum_i w_i m_i d_i (+ where it is 0) and
    d = sum of the w_i m_i d_i that agree;  R = X_0 + scale * d

    weights, density, gamma, scale: as in `breadcrumbs`. normalize: divide by the sum of the weights
    that agree (1 where it is 0).
    Source: arXiv:2312.06795 and arXiv:2306.01708; mergekit `breadcrumbs_ties`.
    """
    ws = model_weights(weights, len(models))
    gains = _crumbs(base, models, density, gamma)
    return merge_agreeing(base, models, ws, scale, normalize, gains)
