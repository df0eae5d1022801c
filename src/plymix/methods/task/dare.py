"""DARE: drop elements of the task vectors at random and make up for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.methods.arrays import (
    BLOCK,
    Rng,
    add_up,
    blockwise,
    clip,
    copy_of,
    gram,
    namespace,
    numel,
)
from plymix.methods.selection import Drawn, Lazy, Packed
from plymix.methods.task.ties import merge_agreeing
from plymix.methods.task.vectors import as_float, distance, merge
from plymix.registry import Range, Share, method


def drop_masks(
    base: Array, models: Sequence[Array], density: float, rng: Rng
) -> list[Drawn | None]:
    """For each model a mask that keeps an element with probability `density`; None keeps all."""
    n = numel(base)
    return [
        Drawn(partial(rng, i), n, density) if density < 1 else None
        for i in range(1, len(models) + 1)
    ]


def make_up(
    base: Array, model: Array, gain: Array | Lazy | None, rescale: str, density: float
) -> float:
    """What a masked task vector is multiplied with to make up for what the mask took."""
    if rescale == "density":
        return 1 / density if density > 0 else 0.0
    if rescale == "drop":
        return 1 / (1 - density)
    if rescale == "l1" and gain is not None:
        return _l1_ratio(base, model, gain)
    return 1.0


def _dare(
    base: Array, models: Sequence[Array], density: float, rescale: str, rng: Rng
) -> tuple[list[Drawn | None], list[float]]:
    """The masks of DARE and the factors."""
    gains = drop_masks(base, models, density, rng)
    return gains, [
        make_up(base, x, g, rescale, density) for x, g in zip(models, gains, strict=True)
    ]


def _l1_ratio(base: Array, model: Array, gain: Array | Lazy) -> float:
    """||d||_1 / ||gain d||_1, or 1 where either is below 1e-7."""
    cut = gain.masks() if isinstance(gain, Lazy) else None

    def parts(x0: Array, x: Array, *given: Array) -> tuple[Array, Array]:
        d = distance(x0, x)
        root = namespace(d).sqrt(d)
        return root, root * namespace(d).sqrt(as_float(cut(d) if cut else given[0], d))

    given, grain = ((), gain.grain) if isinstance(gain, Lazy) else ((gain,), 1)
    sums = gram(base, model, *given, of=parts, grain=grain)
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
    return merge(base, models, ws, scale, gains=gains, factors=factors)


@method("tensor")
def dare_ties(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    rescale: Literal["density", "l1", "none"] = "density",
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
    return merge_agreeing(base, models, ws, scale, normalize, gains, factors)


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
        return copy_of(base)
    gains: Sequence[Lazy | None]
    if overlap % 2 == 1:
        gains = drop_masks(base, models, 1 - drop, rng)
    elif n > 16:
        raise Refusal(f"dropout: overlap {overlap:g} of {n} models; 16 at most, or overlap 1")
    else:
        chances = _set_chances(n, drop, overlap, overlap_emphasis)
        gains = _joint_masks(base, chances, n, rng(0))
    factor = scale / (1 - drop) ** rescale
    cuts = [g.masks() if g is not None else None for g in gains]

    def piece(x0: Array, *xs: Array) -> Array:
        ds = [x - x0 for x in xs]
        masks = [as_float(cut(x0), x0) if cut else namespace(x0).ones_like(x0) for cut in cuts]
        for d, m in zip(ds, masks, strict=True):
            d *= m
        return x0 + add_up(ds) / clip(add_up(masks), 1) * factor

    return blockwise(piece, base, *models, grain=8)


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


def _joint_masks(like: Array, chances: Any, n: int, generator: np.random.Generator) -> list[Packed]:
    """For each model the mask of the elements whose set, drawn with these chances, it is in."""
    size, cuts = numel(like), np.cumsum(chances)[:-1]
    bits = [np.empty(-(-size // 8), np.uint8) for _ in range(n)]
    for i in range(0, size, BLOCK):
        drawn = generator.random(min(BLOCK, size - i), dtype=np.float32)
        chosen = np.searchsorted(cuts, drawn, side="right")
        for model, row in enumerate(bits):
            row[i // 8 : (i + BLOCK) // 8] = np.packbits((chosen >> model) & 1 == 1)
    return [Packed(row) for row in bits]
