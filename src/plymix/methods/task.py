"""Methods on task vectors: what each model learnt beyond a common base.

d_i = X_i - X_0 is the task vector of model i and the result is X_0 + scale * d, where `scale` is
the papers' lambda. Most of these methods are three choices: what is kept of each d_i (`gains`: one
mask or factor per element), whether the models vote on the sign of each element, and what the sum
is divided by. `_merge` is that sum, in one pass and without making the task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Annotated, Any, Literal, Union

import numpy as np
from array_api_compat import device

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.methods.arrays import (
    BLOCK,
    blockwise,
    choose,
    clip,
    flatten,
    gram,
    kth_smallest,
    namespace,
    numel,
    uniform,
)
from plymix.methods.selection import (
    Largest,
    Packed,
    as_matrix,
    bernoulli,
    largest,
    mask_where,
    row_ranks,
    top_mask,
)
from plymix.registry import Range, method

Share = Annotated[float, Range(0, 1)]
Rng = Callable[[int], np.random.Generator]
Vote = Literal["", "sum", "count", "soup"]
Divide = Literal["", "weights", "count"]
Trim = Literal["threshold", "exact"]
Rescale = Literal["density", "l1", "none"]
Gains = Sequence[Union[Array, Largest, Packed, None]]


# -- the sum that the methods share ---------------------------------------------------------------


def _float(mask: Array, like: Array) -> Array:
    return mask if mask.dtype == like.dtype else namespace(like).astype(mask, like.dtype)


def _sum(xs: Sequence[Array]) -> Array:
    return reduce(add, xs)


def _reader(gains: Gains) -> Callable[..., list[Array]]:
    """A function from pieces of the base, the models and `_given(gains)`, called in their order,
    to the task vectors after their gains."""
    n = len(gains)
    cuts = [g.masks() if isinstance(g, (Largest, Packed)) else None for g in gains]

    def read(x0: Array, *rest: Array) -> list[Array]:
        ds, given = [x - x0 for x in rest[:n]], iter(rest[n:])
        for d, g, cut in zip(ds, gains, cuts, strict=True):
            if cut is not None:
                d *= _float(cut(namespace(d).abs(d)), d)
            elif g is not None:
                d *= _float(next(given), d)
        return ds

    return read


def _given(gains: Gains) -> list[Array]:
    """The gains that are one number or truth per element."""
    return [g for g in gains if g is not None and not isinstance(g, (Largest, Packed))]


def _elected(
    ds: Sequence[Array], vote: Vote, weights: Sequence[float]
) -> tuple[list[Array], Array]:
    """The task vectors that point along the elected sign s, times s (0 where they do not), and s.

    Changes `ds` in place.

    sum    s = sign of sum_i w_i d_i, + where that is 0; model i agrees if sign(w_i d_i) = s
    soup   s = sign of sum_i d_i, and    count  s = sign of sum_i sign(d_i): where that is 0 nobody
           agrees; model i agrees if sign(d_i) = s
    """
    xp, sides = namespace(*ds), [1.0] * len(ds)
    if vote == "sum":
        sides = [math.copysign(1, w) if w else 0.0 for w in weights]
        sign = _float(_weighted_sum(ds, weights) >= 0, ds[0])
        sign *= 2
        sign -= 1
    else:
        sign = xp.sign(_sum([xp.sign(d) for d in ds] if vote == "count" else ds))
    kept = []
    for d, side in zip(ds, sides, strict=True):
        d *= sign if side == 1 else sign * side
        along = clip(d, 0, out=d)
        kept.append(along if side >= 0 else -along)
    return kept, sign


def _weighted_sum(xs: Sequence[Array], weights: Sequence[float]) -> Array:
    return _sum([x if w == 1 else x * w for x, w in zip(xs, weights, strict=True)])


def _merge(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    scale: float,
    *,
    gains: Gains = (),
    factors: Sequence[float] = (),
    vote: Vote = "",
    voices: Sequence[float] = (),
    divide: Divide = "",
    floor: float = 0.0,
) -> Array:
    """X_0 + scale * (sum_i w_i f_i d_i) / D over the surviving elements, in one pass.

    D = sum of w_i ("weights") or the number ("count") of the models that survive the vote at an
    element, not below `floor`, and 1 where it is 0. `factors` rescale a model after its gains;
    `voices` are the weights in the election where they are not those of the sum.
    """
    n = len(models)
    gains = gains or [None] * n
    strengths = [w * f for w, f in zip(weights, factors or [1.0] * n, strict=True)]
    by = [1.0] * n if divide == "count" else weights
    read = _reader(gains)

    def piece(x0: Array, *rest: Array) -> Array:
        kept = read(x0, *rest)
        if vote:
            kept, sign = _elected(kept, vote, voices or strengths)
        d = _weighted_sum(kept, strengths)
        if divide:
            d = d / _divisor([k != 0 for k in kept], by, floor, x0)
        if vote:
            d = d * sign
        return x0 + (d if scale == 1 else d * scale)

    return blockwise(piece, base, *models, *_given(gains))


def _divisor(there: Sequence[Array], weights: Sequence[float], floor: float, like: Array) -> Array:
    """The sum of the weights of the models that are there, not below `floor`; 1 where it is 0."""
    xp = namespace(like)
    if not floor and all(w == 1 for w in weights):
        count = _sum([xp.astype(t, xp.int16) for t in there])
        return _float(clip(count, 1), like)
    total = _weighted_sum([_float(t, like) for t in there], weights)
    if floor:
        total = clip(total, floor)
    return total + _float(total == 0, like)


def _distance(x0: Array, x: Array, *gain: Array) -> Array:
    """|d| of one model, after its gain if it has one: the score that trimming ranks by."""
    d = namespace(x0).abs(x - x0)
    return d * _float(gain[0], d) if gain else d


def _scored(base: Array, models: Sequence[Array], gains: Gains) -> list[tuple[Array, ...]]:
    """The arguments of `_distance` for each model."""
    gains = gains or [None] * len(models)
    return [(base, x) if g is None else (base, x, g) for x, g in zip(models, gains, strict=True)]


def _trim(
    base: Array, models: Sequence[Array], density: float, rule: Trim = "exact", gains: Gains = ()
) -> list[Array | None]:
    """For each model what keeps its largest |d|; None keeps everything. The rules are in `ties`."""
    n = numel(base)
    if rule == "exact":
        k = max(int(density * n), 1) if density > 0 else 0
    else:
        k = n - max(int((1 - density) * n), 1) + 1
    if k >= n:
        return [None] * len(models)
    if k > 0 and not gains:
        return [largest(k, _distance, base, x, with_equals=rule == "threshold") for x in models]
    return [
        top_mask(k, _distance, *scored, with_equals=rule == "threshold")
        for scored in _scored(base, models, gains)
    ]


def _both(first: Gains, second: Gains) -> list[Array | None]:
    """Gains that apply one after the other."""
    return [
        a if b is None else b if a is None else a * _float(b, a)
        for a, b in zip(first, second, strict=True)
    ]


# -- TIES -----------------------------------------------------------------------------------------


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
    gains = _trim(base, models, density)
    divide: Divide = "weights" if normalize else ""
    return _merge(base, models, ws, scale, gains=gains, vote="sum", divide=divide)


@method("tensor")
def ties_count(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.2,
    trim: Trim = "threshold",
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
    gains = _trim(base, models, density, trim)
    return _merge(base, models, ws, scale, gains=gains, vote="count", divide="count")


@method("tensor")
def ties_soup(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    density: Share = 0.2,
    trim: Trim = "threshold",
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
    gains = _trim(base, models, density, trim)
    return _merge(base, models, ws, scale, gains=gains, vote="soup", divide="count")


# -- random masks ---------------------------------------------------------------------------------


def _drop(base: Array, models: Sequence[Array], density: float, rng: Rng) -> list[Array | None]:
    """For each model a mask that keeps an element with probability `density`."""
    if density >= 1:
        return [None] * len(models)
    return [bernoulli(rng(i), base, density) for i in range(1, len(models) + 1)]


def _factors(
    base: Array, models: Sequence[Array], gains: Gains, rescale: str, density: float
) -> list[float]:
    """What each masked task vector is multiplied with to make up for what the mask took."""
    if rescale == "density":
        return [1 / density if density > 0 else 0.0] * len(models)
    if rescale == "drop":
        return [1 / (1 - density)] * len(models)
    if rescale == "none":
        return [1.0] * len(models)
    return [1.0 if g is None else _l1_ratio(base, x, g) for x, g in zip(models, gains, strict=True)]


def _dare(
    base: Array, models: Sequence[Array], density: float, rescale: str, rng: Rng
) -> tuple[list[Any], list[float]]:
    """The masks of DARE, one model's made and packed after the other's, and the factors."""
    gains, factors = [], []
    for i, x in enumerate(models, 1):
        mask = bernoulli(rng(i), base, density) if density < 1 else None
        factors += _factors(base, [x], [mask], rescale, density)
        gains.append(None if mask is None else Packed.of(mask))
    return gains, factors


def _l1_ratio(base: Array, model: Array, gain: Array) -> float:
    """||d||_1 / ||gain d||_1, or 1 where either is below 1e-7."""

    def parts(x0: Array, x: Array, g: Array) -> tuple[Array, Array]:
        d = _distance(x0, x)
        root = namespace(d).sqrt(d)
        return root, root * namespace(d).sqrt(_float(g, d))

    sums = gram(base, model, gain, of=parts)
    whole, kept = float(sums[0, 0]), float(sums[1, 1])
    return whole / kept if whole >= 1e-7 and kept >= 1e-7 else 1.0


@method("tensor")
def dare_linear(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    rescale: Literal["density", "l1", "none", "drop"] = "density",
    scale: float = 1.0,
) -> Array:
    """DARE: Drop and Rescale

    m_i is 1 with probability density, else 0, for each element on its own;
    d = sum_i w_i m_i d_i / density;  R = X_0 + scale * d

    The expected result is the plain sum of the weighted differences.
    weights: one number per model after the base, each 1 when left out (they are not normalised).
    density: share that is kept, 1 - p of the paper; 1 drops nothing, 0 is exactly the base.
    rescale: `density` divides by density; `l1` instead restores each tensor's sum of |d_i|, as
    mergekit does; `none` does not rescale (model-mixer's "DARE", whose density 1 gives B);
    `drop` divides by 1 - density: what safetensors-merge-supermario does when its p is given as
    density, so its p = 0.13 with lambda 3 is density 0.13, rescale drop, scale 3 and adds only
    0.45 of the difference.
    scale: factor of the sum. Chattiori's and model-mixer's DARE(alpha) is density 0.5, scale alpha.
    Masks come from (seed, key, model), so they do not depend on the order of keys or on threads.
    Source: Language Models are Super Mario, arXiv:2311.03099.
    """
    if rescale == "drop" and density >= 1:
        raise Refusal("dare_linear: rescale drop divides by 1 - density; density 1 needs another")
    ws = model_weights(weights, len(models))
    gains, factors = _dare(base, models, density, rescale, rng)
    return _merge(base, models, ws, scale, gains=gains, factors=factors)


@method("tensor")
def dare_ties(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    rescale: Rescale = "density",
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """DARE with the Sign Election of TIES

    d~_i = m_i d_i / density with random m_i as in `dare_linear`, then signs are elected on
    sum_i w_i d~_i (+ where it is 0) and d = sum of the w_i d~_i that agree;  R = X_0 + scale * d

    weights, density, rescale, scale: as in `dare_linear`. normalize: divide by the sum of the
    weights that agree (1 where it is 0); off by default, as in mergekit. Nothing is trimmed by
    magnitude.
    Source: arXiv:2311.03099 and arXiv:2306.01708; mergekit `dare_ties`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = _dare(base, models, density, rescale, rng)
    divide: Divide = "weights" if normalize else ""
    return _merge(base, models, ws, scale, gains=gains, factors=factors, vote="sum", divide=divide)


@method("tensor")
def dropout(
    base: Array,
    *models: Array,
    rng: Rng,
    drop: Share = 0.9,
    overlap: Annotated[float, Range(0, 1000)] = 1.0,
    overlap_emphasis: Share = 0.0,
    rescale: float = 1.0,
    scale: float = 1.0,
) -> Array:
    """Random Drop with Controlled Overlap

    d = (sum_i m_i d_i) / max(sum_i m_i, 1) / (1 - drop)^rescale;  R = X_0 + scale * d

    Where several models keep an element their differences are averaged, not added.
    drop: probability that an element of a model is dropped. overlap: an odd number draws each
    model's mask on its own; otherwise, with probability drop nobody keeps the element, and else one
    non-empty set K of models does: for an even number exactly one model, any with the same chance;
    between whole numbers set K has a chance in proportion to exp(tan(pi (o - 1/2)) (|K| - n/2))
    with o = overlap, negated if its whole part is odd. overlap_emphasis e moves these chances
    towards those of independent masks that keep with probability drop, by e (1 - |2 overlap - 1|).
    rescale: exponent of the correction; 0 does not rescale. drop 1 is exactly the base.
    Masks come from (seed, key, model); those of a set from (seed, key) alone.
    sd-mecha stops with an error for an overlap between whole numbers.
    Source: sd-mecha `dropout` ("n-supermario"), after arXiv:2311.03099.
    """
    n = len(models)
    if drop >= 1:
        return blockwise(lambda x0: x0 + 0.0, base)
    gains = _drop(base, models, 1 - drop, rng)
    if overlap % 2 != 1:
        if n > 16:
            raise Refusal(f"dropout: overlap {overlap:g} of {n} models; 16 at most, or overlap 1")
        gains = _joint_masks(base, _set_chances(n, drop, overlap, overlap_emphasis), n, rng(0))
    factor = scale / (1 - drop) ** rescale

    def piece(x0: Array, *rest: Array) -> Array:
        masks = [_float(m, x0) for m in rest[n:]] or [namespace(x0).ones_like(x0)] * n
        total = _sum([(x - x0) * m for x, m in zip(rest[:n], masks, strict=True)])
        return x0 + total / clip(_sum(masks), 1) * factor

    return blockwise(piece, base, *models, *(g for g in gains if g is not None))


def _set_chances(n: int, drop: float, overlap: float, emphasis: float) -> Any:
    """The probability of each set of models (bit i: model i) to keep an element; [0] is nobody."""
    sizes = np.array([bin(s).count("1") for s in range(1, 2**n)])
    if overlap == int(overlap):
        chances = (sizes == 1) / n
    else:
        o = -overlap if int(overlap) % 2 else overlap
        slopes = math.tan(math.pi * (o - 0.5)) * (sizes - n / 2)
        chances = np.exp(slopes - slopes.max())
        chances /= chances.sum()
    independent = drop**sizes * (1 - drop) ** (n - sizes)
    independent = independent / independent.sum() if independent.any() else chances
    toward = emphasis * (1 - abs(2 * overlap - 1))
    chances = np.clip(chances + toward * (independent - chances), 0, None)
    return np.concatenate([[drop], chances / chances.sum() * (1 - drop)])


def _joint_masks(
    like: Array, chances: Any, n: int, generator: np.random.Generator
) -> list[Array | None]:
    xp = namespace(like)
    drawn = generator.random(numel(like), dtype=np.float32)
    chosen = np.searchsorted(np.cumsum(chances)[:-1], drawn, side="right")
    return [
        xp.reshape(xp.asarray((chosen >> i) & 1 == 1, device=device(like)), like.shape)
        for i in range(n)
    ]


DellaRescale = Literal["keep", "density", "l1", "none"]
Ranks = Literal["row", "tensor"]


def _della(
    base: Array,
    models: Sequence[Array],
    density: float,
    epsilon: float,
    ranks: Ranks,
    rescale: DellaRescale,
    rng: Rng,
) -> tuple[list[Array | None], list[float]]:
    """Masks of MagPrune (with 1/p in them for `keep`) and the factors for the other rescalings."""
    if density >= 1 and (epsilon == 0 or ranks == "tensor"):
        return [None] * len(models), [1.0] * len(models)
    if ranks == "row" and not (density - epsilon > 0 and density + epsilon < 1):
        raise Refusal(
            f"della: density {density:g} with epsilon {epsilon:g} gives keep probabilities outside"
            " 0..1; density - epsilon and density + epsilon must lie between them"
        )
    xp, gains = namespace(base), []
    for i, x in enumerate(models, 1):
        size = blockwise(_distance, base, x)
        rows = as_matrix(size) if ranks == "row" else xp.reshape(size, (1, -1))
        r, m = _float(row_ranks(rows), size), rows.shape[1]
        if ranks == "row":
            keep = (density - epsilon) + 2 * epsilon * (r / (m - 1) if m > 1 else r + 0.5)
        else:
            keep = clip(density + epsilon * ((r + 1) / m - (m + 1) / (2 * m)), 0, 1)
        keep = xp.reshape(keep, base.shape)
        mask = uniform(rng(i), base) < keep
        gains.append(_float(mask, base) / clip(keep, 1e-12) if rescale == "keep" else mask)
    kind = "none" if rescale == "keep" else rescale
    return gains, _factors(base, models, gains, kind, density)


@method("tensor")
def della(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    epsilon: Share = 0.15,
    ranks: Ranks = "row",
    rescale: DellaRescale = "keep",
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    """DELLA: Drop by Magnitude, Elect Sign, Merge

    In each row of m elements let r = 0..m-1 be the rank of |d_i|, smallest first; an element is
    kept with probability p = density - epsilon + 2 epsilon r / (m - 1), so larger ones survive more
    often, and is then divided by p. Signs are elected and merged as in `ties`.

    weights, normalize, scale: as in `ties`. density: the mean share that is kept. epsilon: half the
    spread of p; density +- epsilon must lie inside 0..1. A convolution's rows are its output
    channels, a vector is one row, a row of one element has r / (m - 1) = 1/2.
    ranks: `tensor` ranks over all N elements with r = 1..N and
    p = clamp(density + epsilon (r/N - (N+1)/(2N)), 0, 1), sd-mecha's `della_eps`.
    rescale: `keep` divides each survivor by its p, so that the expected result is d_i (the paper);
    `density` divides by density; `l1` restores each tensor's sum of |d_i| (mergekit); `none`.
    mergekit ranks the last axis of a convolution's kernel instead of whole rows.
    Source: DELLA-Merging (MagPrune), arXiv:2406.11617; mergekit `della`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = _della(base, models, density, epsilon, ranks, rescale, rng)
    divide: Divide = "weights" if normalize else ""
    return _merge(base, models, ws, scale, gains=gains, factors=factors, vote="sum", divide=divide)


@method("tensor")
def della_linear(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    epsilon: Share = 0.15,
    ranks: Ranks = "row",
    rescale: DellaRescale = "keep",
    scale: float = 1.0,
) -> Array:
    """DELLA without Sign Election

    R = X_0 + scale * sum_i w_i m_i d_i / p_i with the masks and probabilities of `della`.

    weights, density, epsilon, ranks, rescale, scale: as in `della`; the weights are not normalised.
    Source: DELLA-Merging (MagPrune), arXiv:2406.11617; mergekit `della_linear`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = _della(base, models, density, epsilon, ranks, rescale, rng)
    return _merge(base, models, ws, scale, gains=gains, factors=factors)


# -- other ways to thin out -----------------------------------------------------------------------


def _crumbs(
    base: Array, models: Sequence[Array], density: float, gamma: float
) -> list[Array | None]:
    """Masks without the largest int(gamma N) and without the smallest elements of each |d|."""
    n = numel(base)
    kept, top = int(density * n), int(gamma * n)
    top = max(min(top, n - kept), 0)
    if kept >= n:
        return [None] * len(models)
    return [
        top_mask(kept + top, _distance, base, x) & ~top_mask(top, _distance, base, x)
        for x in models
    ]


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
    return _merge(base, models, ws, scale, gains=_crumbs(base, models, density, gamma))


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
    divide: Divide = "weights" if normalize else ""
    return _merge(base, models, ws, scale, gains=gains, vote="sum", divide=divide)


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
        xp = namespace(base)
        varied = mask_where(lambda *xs: _variance(*xs) != 0, base, *models)
        mask = top_mask(int(select * int(xp.count_nonzero(varied))), _variance, base, *models)
    masks = () if mask is None else (mask,)

    def kept(x0: Array, *xs: Array) -> list[Array]:
        return [(x - x0) if mask is None else (x - x0) * _float(xs[n], x0) for x in xs[:n]]

    powers = np.diag(gram(base, *models, *masks, of=kept)) / max(numel(base), 1)
    total = float(powers.sum())
    shares = [float(p) / total for p in powers] if total >= 1e-6 else [1 / n] * n
    return _merge(
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
    mean = _sum(ds) / len(ds)
    return _sum([(d - mean) ** 2 for d in ds]) / len(ds)


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
    xp = namespace(a)
    shape = (-1, a.shape[-1] if a.ndim else 1)
    x, y = xp.reshape(a, shape), xp.reshape(b, shape)
    score, step = xp.empty_like(x), max(1, BLOCK // max(shape[1], 1))
    for i in range(0, x.shape[0], step):
        score[i : i + step, :] = _importance(x[i : i + step, :], y[i : i + step, :])
    n = numel(a)
    low, middle, high = (kth_smallest(score, int(q * (n - 1)) + 1) for q in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (high - low)
    taken = blockwise(
        lambda s, x, y: choose(s >= threshold, y, x), flatten(score), *map(flatten, (a, b))
    )
    return xp.reshape(taken, a.shape)


def _importance(a: Array, b: Array) -> Array:
    xp = namespace(a)

    def softmax(x: Array) -> Array:
        e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
        return e / xp.sum(e, axis=-1, keepdims=True) + 1e-8

    p, q = softmax(b), softmax(a)
    return xp.abs(b - a) * xp.sum(p * xp.log(p / q), axis=-1, keepdims=True)


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
    n = len(models)

    def changed(x0: Array, *xs: Array) -> list[Array]:
        zs = [_float(_distance(x0, x) > epsilon, x0) for x in xs]
        alone = _float(_sum(zs) == 1, x0)
        return [*zs, alone]

    counts = gram(base, *models, of=changed)
    gains = []
    for i in range(n):
        unique = float(counts[i, n])
        shared = float(counts[i, i]) - unique
        gains.append(1 + ratio * min(max(shared / max(unique, epsilon or 1.0), 0.0), limit))
    return _ram(base, models, gains, epsilon, scale)


def _ram(
    base: Array, models: Sequence[Array], alone: Sequence[float], epsilon: float, scale: float
) -> Array:
    def piece(x0: Array, *xs: Array) -> Array:
        ds = [x - x0 for x in xs]
        zs = [_float(namespace(d).abs(d) > epsilon, d) for d in ds]
        count = _sum(zs)
        unique = _float(count == 1, x0)
        total = _sum(
            [
                d * z if g == 1 else d * z * (unique * (g - 1) + 1)
                for d, z, g in zip(ds, zs, alone, strict=True)
            ]
        )
        return x0 + total / clip(count, 1) * scale

    return blockwise(piece, base, *models)


# -- averages that look at the geometry -----------------------------------------------------------


def _stock_share(cosine: float, n: int, clamp_t: bool) -> float:
    """t = n cos / (1 + (n - 1) cos); 0 at its pole cos = -1/(n - 1)."""
    below = 1 + (n - 1) * cosine
    t = n * cosine / below if below else 0.0
    return min(max(t, 0.0), 1.0) if clamp_t else t


def _mean_cosine(products: Any) -> float:
    """The mean cosine over all pairs, from the dot products; norm products not below 1e-6."""
    n = len(products)
    norms = np.sqrt(np.diag(products))
    pairs = [
        min(max(products[i, j] / max(norms[i] * norms[j], 1e-6), -1.0), 1.0)
        for i in range(n)
        for j in range(i)
    ]
    return float(sum(pairs)) / len(pairs) if pairs else 1.0


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
        products = gram(base, *models, of=lambda x0, *xs: [x - x0 for x in xs])
        t = _stock_share(_mean_cosine(products), n, clamp_t)
        return _merge(base, models, [1 / n] * n, t)
    xp = namespace(base)
    ds = [x - base for x in models]
    norms = [xp.sqrt(xp.sum(d * d, axis=-1, keepdims=True)) for d in ds]
    cosines = [
        xp.sum(ds[i] * ds[j], axis=-1, keepdims=True) / clip(norms[i] * norms[j], 1e-6)
        for i in range(n)
        for j in range(i)
    ]
    cosine = _sum([clip(c, -1, 1) for c in cosines]) / len(cosines)
    below = 1 + (n - 1) * cosine
    pole = _float(below == 0, base)
    share = n * cosine / (below + pole) * (1 - pole)
    if clamp_t:
        share = clip(share, 0, 1)
    return base + share * (_sum(ds) / n)


def _weiszfeld(products: Any, epsilon: float, iterations: int, tolerance: float) -> list[float]:
    """The weights of the geometric median of n vectors whose dot products are given.

    The median is a weighted mean at every step, so all distances follow from the n x n products.
    """
    n = len(products)
    c = np.full(n, 1 / n)

    def distances(c: Any) -> Any:
        away = np.eye(n) - c
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", away, products, away), 0))

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
    epsilon: Annotated[float, Range(1e-300)] = 1e-6,
    iterations: Annotated[int, Range(1)] = 100,
    tolerance: Annotated[float, Range(0)] = 1e-20,
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
    products = gram(*models, of=lambda x, *xs: [y - x for y in (x, *xs)])
    shares = _weiszfeld(products, epsilon, iterations, tolerance)
    return _merge(first, others, shares[1:], 1.0) if others else blockwise(lambda x: x + 0.0, first)


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


@method("tensor")
def ties_stock(
    base: Array,
    *models: Array,
    density: Share = 0.2,
    vote: Literal["count", "soup"] = "count",
    trim: Trim = "threshold",
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
    gains = _trim(base, models, density, trim)
    t = _stock_share(_mean_cosine(_products(base, models, gains, vote)), len(models), clamp_t)
    ones = [1.0] * len(models)
    return _merge(base, models, ones, scale * t, gains=gains, vote=vote, divide="count")


@method("tensor")
def ties_gmedian(
    base: Array,
    *models: Array,
    density: Share = 0.2,
    vote: Literal["count", "soup"] = "count",
    trim: Trim = "threshold",
    scale: float = 1.0,
) -> Array:
    """TIES, then Geometric Median

    R = X_0 + scale * the geometric median of the differences that survive `ties_count` (or
    `ties_soup`), with the defaults of `geometric_median`.

    density, vote, trim: as in `ties_count` and `ties_soup`.
    Source: sd-mecha `ties_sum_extended` with `apply_median`.
    """
    gains = _trim(base, models, density, trim)
    shares = _weiszfeld(_products(base, models, gains, vote), 1e-6, 100, 1e-20)
    return _merge(base, models, shares, scale, gains=gains, vote=vote)


def _products(base: Array, models: Sequence[Array], gains: Gains, vote: Vote) -> Any:
    """The dot products of the differences that survive their gains and the vote.

    The elected sign drops out of them.
    """
    ones = [1.0] * len(models)
    read = _reader(gains)

    def of(*pieces: Array) -> list[Array]:
        ds = read(*pieces)
        return _elected(ds, vote, ones)[0] if vote else ds

    return gram(base, *models, *_given(gains), of=of)


@method("tensor")
def ties_dare(
    base: Array,
    *models: Array,
    rng: Rng,
    keep: Share = 0.5,
    epsilon: Share = 0.0,
    density: Share = 0.2,
    vote: Literal["count", "soup"] = "count",
    trim: Trim = "threshold",
    core: Literal["mean", "stock", "median"] = "mean",
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
    n = len(models)
    if keep == 0:
        return blockwise(lambda x0: x0 + 0.0, base)
    if epsilon > 0:
        thinned, _ = _della(base, models, keep, epsilon, "tensor", "none", rng)
    else:
        thinned = _drop(base, models, keep, rng)
    gains = _both(thinned, _trim(base, models, density, trim, thinned))
    factor = scale / keep if rescale else scale
    ones = [1.0] * n
    if core == "median":
        shares = _weiszfeld(_products(base, models, gains, vote), 1e-6, 100, 1e-20)
        return _merge(base, models, shares, factor, gains=gains, vote=vote)
    if core == "stock":
        products = _products(base, models, gains, vote)
        factor *= _stock_share(_mean_cosine(products), n, clamp_t)
    return _merge(base, models, ones, factor, gains=gains, vote=vote, divide="count")
