"""TIES: trim each task vector, elect a sign per element, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from plymix.methods import Array, model_weights
from plymix.methods.arrays import numel
from plymix.methods.selection import NOTHING, Among, Lazy, largest, packed_top_mask
from plymix.methods.task.vectors import Divide, Gains, distance, kept_distances, merge
from plymix.registry import Share, method

Rule = Literal["threshold", "exact"]
"""How many elements a density keeps, see `ties_count`."""


def trimmed(
    base: Array,
    models: Sequence[Array],
    density: float,
    rule: Rule = "exact",
    thinned: Sequence[Array | Lazy | None] = (),
) -> list[Array | Lazy | None]:
    """For each model what keeps its largest |d|; None keeps everything. The rules are in `ties`.

    `thinned` are masks that keep some elements only; the others count as 0.
    """
    n, thinned = numel(base), thinned or [None] * len(models)
    if rule == "exact":
        k = max(int(density * n), 1) if density > 0 else 0
    else:
        k = n - max(int((1 - density) * n), 1) + 1
    if k >= n:
        return [*thinned]
    return [
        _top(k, base, x, mask, rule == "threshold") for x, mask in zip(models, thinned, strict=True)
    ]


def _top(
    k: int, base: Array, x: Array, mask: Array | Lazy | None, with_equals: bool
) -> Array | Lazy:
    """What keeps the `k` largest |d| of those that the mask keeps."""
    if k == 0:
        return NOTHING
    if mask is None:
        return largest(k, distance, base, x, with_equals=with_equals)
    scores = kept_distances(base, x, mask)
    if isinstance(mask, Lazy):
        return Among(mask, largest(k, lambda s: s, scores, with_equals=with_equals))
    return packed_top_mask(k, scores, with_equals=with_equals)


def merge_agreeing(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    scale: float,
    normalize: bool,
    gains: Gains,
    factors: Sequence[float] = (),
) -> Array:
    """`merge` with the sign election and the divisor of `ties`."""
    divide: Divide = "weights" if normalize else ""
    return merge(
        base, models, weights, scale, gains=gains, factors=factors, vote="sum", divide=divide
    )


@method("tensor")
def ties(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.2,
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    """TIES: Trim, Elect Sign, Merge

    1. Trim: of each d_i keep the k = int(density * N) elements with the largest |d_i|.
    2. Elect: s = sign of sum_i w_i d_i per element, + where the sum is 0.
    3. Merge: d = sum_i m_i w_i d_i / D with m_i = 1 where sign(w_i d_i) = s; R = X_0 + scale * d.

    weights: one number per model after the base, each 1 when left out; a negative weight turns its
    model's vote round. density: share of each d_i that is kept; 1 trims nothing. normalize: D is
    the sum of the weights that agree at the element (1 where that is 0); off, D = 1 and the models
    add up. scale: the paper's lambda.
    Edge cases: of equal magnitudes at the cut the earlier element is kept; at least one element is
    kept, so small biases are not silently undone (mergekit stops with an error there); density 0 is
    exactly the base.
    Elsewhere: peft elects on unweighted differences and divides by the number of models that agree;
    meh and sd-mecha elect by counting, see `ties_count` and `ties_soup`.
    Source: TIES-Merging, arXiv:2306.01708; mergekit `ties`.
    """
    ws = model_weights(weights, len(models))
    gains = trimmed(base, models, density)
    return merge_agreeing(base, models, ws, scale, normalize, gains)


@method("tensor")
def ties_count(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.2,
    trim: Rule = "threshold",
    scale: float = 1.0,
) -> Array:
    """TIES, Sign Elected by Counting

    s = sign(sum_i sign(d_i)); d = sum_i m_i w_i d_i / sum_i m_i with m_i = 1 where sign(d_i) = s;
    R = X_0 + scale * d, and d = 0 where nobody agrees.

    Every model has one voice however far it moved, so with two models each conflict of signs is a
    draw and leaves the base.
    weights: one number per model after the base, each 1 when left out; they do not vote. density:
    share of each d_i that is kept. trim: `threshold` keeps |d| >= the q-th smallest with
    q = max(int((1 - density) N), 1), which is a little more than density and never trims at 1;
    `exact` keeps int(density N) elements, as `ties`. scale: the paper's lambda; with two models it
    is the alpha, and density the beta, of meh's `ties_add_difference`.
    Source: TIES-Merging, arXiv:2306.01708; sd-mecha `ties_sum`, meh; "frequency" in peft.
    """
    ws = model_weights(weights, len(models))
    gains = trimmed(base, models, density, trim)
    return merge(base, models, ws, scale, gains=gains, vote="count", divide="count")


@method("tensor")
def ties_soup(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.2,
    trim: Rule = "threshold",
    scale: float = 1.0,
) -> Array:
    """TIES, Sign Elected by Sum, Divided by Count

    s = sign(sum_i d_i), and as `ties_count` from there: d = sum_i m_i w_i d_i / sum_i m_i.

    Differs from `ties` in that the weights do not vote, the divisor is the number of models that
    agree, and a sum of exactly 0 leaves the base.
    weights, density, trim, scale: as in `ties_count`.
    Source: TIES-Merging, arXiv:2306.01708; sd-mecha `ties_sum` with `vote_sgn`.
    """
    ws = model_weights(weights, len(models))
    gains = trimmed(base, models, density, trim)
    return merge(base, models, ws, scale, gains=gains, vote="soup", divide="count")
