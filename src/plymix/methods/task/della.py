"""DELLA: drop elements of the task vectors at random, small ones more often."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from array_api_compat import device

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.methods.arrays import Rng, blockwise, clip, flatten, namespace, numel, uniform
from plymix.methods.selection import Lazy, by_rank, by_rank_of_all, packed
from plymix.methods.task.dare import make_up
from plymix.methods.task.ties import merge_agreeing
from plymix.methods.task.vectors import as_float, distance, merge
from plymix.registry import Share, method

Rescale = Literal["keep", "density", "l1", "none"]
Ranks = Literal["row", "tensor"]


@dataclass(frozen=True, eq=False)
class Ranked(Lazy):
    """MagPrune by rank in rows of `m` elements: a mask, divided by the probabilities if `keep`.

    It is made for some rows at a time, as 64-bit keys of a whole tensor would outgrow it.
    """

    rng: Callable[[], np.random.Generator]
    m: int
    density: float
    epsilon: float
    keep: bool

    @property
    def grain(self) -> int:
        return math.lcm(self.m, 2)  # see `uniform`

    def masks(self) -> Callable[[Array], Array]:
        m, low, spread, generator = (
            self.m,
            self.density - self.epsilon,
            2 * self.epsilon,
            self.rng(),
        )

        def gain(scores: Array) -> Array:
            xp = namespace(scores)
            r = xp.arange(m, dtype=scores.dtype, device=device(scores))
            p = low + spread * (r / (m - 1) if m > 1 else r + 0.5)
            p = flatten(by_rank(clip(p, 1e-12), xp.reshape(scores, (-1, m))))
            mask = uniform(generator, scores) < p
            if not self.keep:
                return mask
            gains = as_float(mask, scores)
            gains /= p
            return gains

        return gain


def _ranked_tensor(
    generator: np.random.Generator,
    base: Array,
    x: Array,
    density: float,
    epsilon: float,
    keep: bool,
) -> Array | Lazy:
    """MagPrune by rank in the whole tensor, as `Ranked`."""
    n = numel(base)

    def chances(r: Array) -> Array:
        return clip(density + epsilon * ((r + 1) / n - (n + 1) / (2 * n)), 0, 1)

    def mask(p: Array) -> Array:
        return uniform(generator, p) < p

    p = by_rank_of_all(chances, blockwise(distance, base, x))
    if not keep:
        return packed(mask, p)
    return blockwise(lambda p: as_float(mask(p), p) / clip(p, 1e-12), p, grain=2, out=p)


def mag_prune(
    base: Array,
    models: Sequence[Array],
    density: float,
    epsilon: float,
    ranks: Ranks,
    rescale: Rescale,
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
    gains: list[Array | Lazy] = []
    for i, x in enumerate(models, 1):
        if ranks == "row":
            m = numel(base) // (base.shape[0] if base.ndim > 1 else 1)
            gains.append(Ranked(partial(rng, i), m, density, epsilon, rescale == "keep"))
        else:
            keep = rescale == "keep"
            gains.append(_ranked_tensor(rng(i), base, x, density, epsilon, keep))
    return gains, [
        make_up(base, x, g, rescale, density) for x, g in zip(models, gains, strict=True)
    ]


@method("tensor", room=5)
def della(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    epsilon: Share = 0.15,
    ranks: Ranks = "row",
    rescale: Rescale = "keep",
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
    p = clamp(density + epsilon (r/N - (N+1)/(2N)), 0, 1), sd-mecha's `della_eps`; with `keep` each
    model after the second then takes two tensors of memory.
    rescale: `keep` divides each survivor by its p, so that the expected result is d_i (the paper);
    `density` divides by density; `l1` restores each tensor's sum of |d_i| (mergekit); `none`.
    mergekit ranks the last axis of a convolution's kernel instead of whole rows.
    Source: DELLA-Merging (MagPrune), arXiv:2406.11617; mergekit `della`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = mag_prune(base, models, density, epsilon, ranks, rescale, rng)
    return merge_agreeing(base, models, ws, scale, normalize, gains, factors)


@method("tensor", room=5)
def della_linear(
    base: Array,
    *models: Array,
    rng: Rng,
    weights: tuple[float, ...] = (),
    density: Share = 0.5,
    epsilon: Share = 0.15,
    ranks: Ranks = "row",
    rescale: Rescale = "keep",
    scale: float = 1.0,
) -> Array:
    """DELLA without Sign Election

    R = X_0 + scale * sum_i w_i m_i d_i / p_i with the masks and probabilities of `della`.

    weights, density, epsilon, ranks, rescale, scale: as in `della`; the weights are not normalised.
    Source: DELLA-Merging (MagPrune), arXiv:2406.11617; mergekit `della_linear`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = mag_prune(base, models, density, epsilon, ranks, rescale, rng)
    return merge(base, models, ws, scale, gains=gains, factors=factors)
