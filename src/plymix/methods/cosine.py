"""Methods that weigh rows, columns or channels by how alike the models are there (their cosine)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np

from plymix.methods import Array, Tensors
from plymix.methods.arrays import (
    as_lines,
    as_rows,
    blockwise,
    clip,
    column_products,
    lerp,
    like,
    match_spread,
    mix,
    namespace,
    row_products,
    rowwise,
    to_numpy,
)
from plymix.registry import Range, Share, method

NARROW = 1e-6
"""A spread of cosines up to this is rounding of float32 weights and counts as none."""


def prepare_cosine_a(tensors: Tensors, **_: object) -> tuple[float, float]:
    """Least and greatest column similarity of all keys, without the outer percents."""
    return _spread(tensors, lambda a, b: _normalised_cosines(a, b)[0])


def prepare_cosine_b(tensors: Tensors, **_: object) -> tuple[float, float]:
    """As `prepare_cosine_a`, of the means of column and tensor similarity."""
    return _spread(tensors, _mean_cosines)


@method("cross", prepare=prepare_cosine_a)
def cosine_a(
    a: Array, b: Array, *, alpha: float = 0.0, key: str, state: tuple[float, float]
) -> Array:
    """Cosine Similarity A

    s = cosine of A and B along their first axis, g = cosine of the whole tensors (of which each
    column was brought to length 1), lo and hi = range of s over all keys
    k = clamp(((s + g)/2 - lo) / (hi - lo) - |alpha|, 0, 1);  R = k A + (1 - k) B

    Keeps A where the models are alike and takes B where they differ; a greater alpha takes more of
    B. alpha 1 is exactly B, but alpha 0 is not A. The VAE and scalars stay A. Columns without a
    direction count as alike; where lo = hi, k = 1 - |alpha|. Reads the models twice.
    Source: supermerger `cosineA`.
    """
    if _is_vae(key) or not a.shape:
        return a
    s, whole = _normalised_cosines(a, b)
    c = (np.where(np.isnan(s), 1.0, s) + whole) / 2
    return _keep_similar(a, b, c, state, abs(alpha))


@method("cross", prepare=prepare_cosine_b)
def cosine_b(
    a: Array, b: Array, *, alpha: float = 0.0, key: str, state: tuple[float, float]
) -> Array:
    """Cosine Similarity B

    s = cosine of A and B along their first axis, g = cosine of the whole tensors, lo and hi = range
    of c = (s + g)/2 over all keys;  k = clamp((c - lo) / (hi - lo) - alpha, 0, 1)
    R = k A + (1 - k) B

    Keeps A where the models are alike and takes B where they differ; a greater alpha takes more of
    B. alpha 1 is exactly B, but alpha 0 is not A. The VAE and scalars stay A. Where lo = hi,
    k = 1 - alpha. Reads the models twice.
    Source: supermerger `cosineB`.
    """
    if _is_vae(key) or not a.shape:
        return a
    c = _mean_cosines(a, b)
    return _keep_similar(a, b, np.where(np.isnan(c), 1.0, c), state, alpha)


@method("tensor")
def cosine_local_a(a: Array, b: Array, *, alpha: float = 0.0) -> Array:
    """Cosine Similarity A within a Tensor

    c = cosine of A and B along their first axis;  k = 1 - clamp(c - alpha, 0, 1)
    R = (1 - k) A + k B

    As `cosine_a` without statistics over all keys. alpha 1 is exactly B; alpha 0 keeps A only where
    the columns are parallel. Scalars stay A.
    Source: sd-mecha `add_cosine_a`.
    """
    if not a.shape:
        return a
    return _take_different(a, b, _cosines(*column_products(as_rows(a), as_rows(b))), alpha)


@method("tensor")
def cosine_local_b(a: Array, b: Array, *, alpha: float = 0.0) -> Array:
    """Cosine Similarity B within a Tensor

    c = mean of the cosine of A and B along their first axis and that of the whole tensors
    k = 1 - clamp(c - alpha, 0, 1);  R = (1 - k) A + k B

    As `cosine_b` without statistics over all keys. alpha 1 is exactly B; alpha 0 keeps A only where
    the tensors are parallel. Scalars stay A.
    Source: sd-mecha `add_cosine_b`.
    """
    if not a.shape:
        return a
    products = column_products(as_rows(a), as_rows(b))
    whole = _cosines(*(namespace(a).sum(p, keepdims=True) for p in products))
    return _take_different(a, b, (_cosines(*products) + whole) / 2, alpha)


@method("tensor")
def cosine_gate_blend(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Cosine Gate Blend

    c = cosine of each output channel of A and B, m = clamp(|alpha| (c + 1)/2, 0, 1)
    R = (1 - m) A + m B, then mean and standard deviation go half-way back to A's

    Moves the channels in which the models are alike. alpha 0 is exactly A. Tensors of one dimension
    (biases, norms) and scalars are a weighted sum with alpha / 4.
    Source: `--cosine0` of Chattiori-Model-Merger.
    """
    if alpha == 0:
        return a
    if len(a.shape) < 2:
        return lerp(a, b, 0.25 * alpha)
    return match_spread(_mix_rows(a, b, lambda c: clip(abs(alpha) * (c + 1) / 2, 0.0, 1.0)), a)


@method("tensor")
def channel_cosine_gate(
    a: Array, b: Array, *, alpha: float = 0.5, beta: Annotated[float, Range(low=0)] = 1.0
) -> Array:
    """Channel Cosine Gate

    c = cosine of each output channel of A and B, g = clamp(beta (1 - c), 0, 1)
    R = (1 - g) A + g ((1 - alpha) A + alpha B)

    Moves the channels in which the models differ, the more the larger beta is, and keeps those in
    which they are alike. alpha 0 and beta 0 are exactly A. Tensors of one dimension are a weighted
    sum.
    Source: `CHAN` of Chattiori-Model-Merger.
    """
    if alpha == 0 or beta == 0:
        return a
    if len(a.shape) < 2:
        return lerp(a, b, alpha)
    return _mix_rows(a, b, lambda c: clip((1 - c) * beta, 0.0, 1.0) * alpha)


@method("tensor")
def cosine_scaled(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 0.5,
    inverse: bool = False,
    simple: bool = False,
) -> Array:
    """Cosine-Scaled Merge

    s = |cosine of A and B along their first axis|, lo and hi = its range without the outer percents
    k = clamp((s - lo) / (hi - lo), 0, 1), 1 - k if inverse; its mean if simple
    R = (1 - alpha k) A + alpha k B, with a third model A + alpha k (B - C)

    A weighted sum (or add difference) that moves the columns in which the models are alike, with
    inverse those in which they differ; simple gives a whole tensor one number. alpha 0 is exactly
    A. Where lo = hi, and for scalars, k is 1.
    Source: the four cosine modes of model-mixer, whose own code never stores the result.
    """
    if alpha == 0:
        return a
    if not a.shape:
        return lerp(a, b, alpha) if c is None else a + (b - c) * alpha
    xp = namespace(a, b)
    k = xp.abs(_cosines(*column_products(as_rows(a), as_rows(b))))
    low, high = _trimmed_range(to_numpy(k))
    if high - low > NARROW:
        k = clip((k - low) / (high - low), 0.0, 1.0)
        k = 1 - k if inverse else k
        k = xp.mean(k, keepdims=True) if simple else k
    else:
        k = xp.ones_like(k)
    if c is None:
        return _mix(a, b, k * alpha)
    k = xp.astype(k * alpha, a.dtype)
    x, y, z = (as_rows(v) for v in (a, b, c))
    return xp.reshape(blockwise(lambda x, y, z, k: x + (y - z) * k, x, y, z, k), a.shape)


@method("tensor")
def extract(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.5,
    gamma: Annotated[float, Range(low=0)] = 0.3,
    axis: Literal["last", "row"] = "last",
) -> Array:
    """Extract Common or Different Features

    b = B - A, c = C - A, s = cosine of b and c, d = ((s + 1)/2)^gamma
    R = A + ((1 - alpha) b + alpha c) ((1 - beta) d + beta (1 - d))

    Adds to A what B (alpha 0) or C (alpha 1) changed, where both changed it alike (beta 0) or
    differently (beta 1). gamma sharpens the choice. axis: the cosine is taken over the last axis
    (of a convolution the kernel's width, as in supermerger), or over a whole row: everything
    that shares its first index. Scalars stay A.
    Source: supermerger `extract` by subaqua.
    """
    if not a.shape:
        return a
    view = as_rows if axis == "row" and len(a.shape) > 1 else as_lines
    xp = namespace(a, b, c)

    def one(x: Array, y: Array, z: Array) -> Array:
        y, z = y - x, z - x
        d = clip((_cosines(*row_products(y, z)) + 1) / 2, 0.0, 1.0) ** gamma
        d = xp.astype(d * (1 - beta) + (1 - d) * beta, a.dtype)
        return x + (y * (1 - alpha) + z * alpha) * d

    return xp.reshape(rowwise(one, view(a), view(b), view(c)), a.shape)


def _cosines(xx: Array, xy: Array, yy: Array, eps: float = 1e-8) -> Array:
    """Cosines from `_products`; 0 where a vector is 0."""
    xp = namespace(xy)
    return xy / clip(xp.sqrt(xx * yy), eps)


def _mix(a: Array, b: Array, t: Array) -> Array:
    """`mix` of tensors with one t per row or column of their matrices."""
    xp = namespace(a, b)
    return xp.reshape(mix(as_rows(a), as_rows(b), xp.astype(t, a.dtype)), a.shape)


def _mix_rows(a: Array, b: Array, gate: Callable[[Array], Array]) -> Array:
    """`mix` with t = gate(cosine) for each output channel."""
    xp = namespace(a, b)

    def one(x: Array, y: Array) -> Array:
        t = gate(_cosines(*row_products(x, y), eps=1e-12))
        return mix(x, y, xp.astype(t, a.dtype))

    return xp.reshape(rowwise(one, as_rows(a), as_rows(b)), a.shape)


def _take_different(a: Array, b: Array, c: Array, alpha: float) -> Array:
    return b if alpha == 1 else _mix(a, b, 1 - clip(c - alpha, 0.0, 1.0))


def _keep_similar(a: Array, b: Array, c: Any, state: tuple[float, float], alpha: float) -> Array:
    if alpha == 1:
        return b
    low, high = state
    k = (c - low) / (high - low) if high - low > NARROW else np.ones_like(c)
    return _mix(b, a, like(np.clip(k - alpha, 0, 1), a))


def _normalised_cosines(a: Array, b: Array) -> tuple[Any, float]:
    """Cosine of each column, NaN where one is 0, and of the tensors of normalised columns."""
    aa, ab, bb = (to_numpy(p) for p in column_products(as_rows(a), as_rows(b)))
    sizes = np.sqrt(aa * bb)
    s = np.where(sizes > 0, ab / np.where(sizes > 0, sizes, 1), np.nan)
    columns = math.sqrt(np.count_nonzero(aa) * np.count_nonzero(bb))
    return s, float(np.nansum(s)) / columns if columns else 1.0


def _mean_cosines(a: Array, b: Array) -> Any:
    """Mean of the cosine of each column and that of the tensors; NaN where a tensor is 0."""
    aa, ab, bb = (to_numpy(p) for p in column_products(as_rows(a), as_rows(b)))
    size = math.sqrt(aa.sum() * bb.sum())
    whole = ab.sum() / size if size else math.nan
    return (ab / np.maximum(np.sqrt(aa * bb), 1e-8) + whole) / 2


def _spread(tensors: Tensors, similarities: Callable[[Array, Array], Any]) -> tuple[float, float]:
    found = [
        similarities(*tensors[key]).ravel()
        for key in tensors
        if tensors.shape(key) and not _is_vae(key)
    ]
    return _trimmed_range(np.concatenate(found)) if found else (1.0, 1.0)


def _trimmed_range(values: Any) -> tuple[float, float]:
    """Least and greatest value between the 1st and the 99th percentile; NaN does not count."""
    values = values[~np.isnan(values)]
    if not values.size:
        return 1.0, 1.0
    values = values[values >= np.percentile(values, 1, method="midpoint")]
    values = values[values <= np.percentile(values, 99, method="midpoint")]
    return float(values.min()), float(values.max())


def _is_vae(key: str) -> bool:
    return key.startswith(("first_stage_model.", "vae."))
