"""DELLA: drop elements of the task vectors at random, small ones more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.methods.arrays import Rng, blockwise, clip, namespace, uniform
from plymix.methods.selection import as_matrix, row_ranks
from plymix.methods.task.dare import make_up
from plymix.methods.task.ties import merge_agreeing
from plymix.methods.task.vectors import as_float, distance, merge
from plymix.registry import Share, method

Rescale = Literal["keep", "density", "l1", "none"]
Ranks = Literal["row", "tensor"]


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
    xp, gains = namespace(base), []
    for i, x in enumerate(models, 1):
        size = blockwise(distance, base, x)
        rows = as_matrix(size) if ranks == "row" else xp.reshape(size, (1, -1))
        r, m = as_float(row_ranks(rows), size), rows.shape[1]
        if ranks == "row":
            keep = (density - epsilon) + 2 * epsilon * (r / (m - 1) if m > 1 else r + 0.5)
        else:
            keep = clip(density + epsilon * ((r + 1) / m - (m + 1) / (2 * m)), 0, 1)
        keep = xp.reshape(keep, base.shape)
        mask = uniform(rng(i), base) < keep
        gains.append(as_float(mask, base) / clip(keep, 1e-12) if rescale == "keep" else mask)
    return gains, [
        make_up(base, x, g, rescale, density) for x, g in zip(models, gains, strict=True)
    ]


@method("tensor")
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
    p = clamp(density + epsilon (r/N - (N+1)/(2N)), 0, 1), sd-mecha's `della_eps`.
    rescale: `keep` divides each survivor by its p, so that the expected result is d_i (the paper);
    `density` divides by density; `l1` restores each tensor's sum of |d_i| (mergekit); `none`.
    mergekit ranks the last axis of a convolution's kernel instead of whole rows.
    Source: DELLA-Merging (MagPrune), arXiv:2406.11617; mergekit `della`.
    """
    ws = model_weights(weights, len(models))
    gains, factors = mag_prune(base, models, density, epsilon, ranks, rescale, rng)
    return merge_agreeing(base, models, ws, scale, normalize, gains, factors)


@method("tensor")
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
