"""Methods that filter: neighbours smoothed, frequencies mixed, distributions matched.

A mix of two spectra with weights g is A plus the g-filtered difference B - A, because the Fourier
transform is linear: one transform instead of two, and exactly A where the models agree. Filters
over axes as short as a kernel's are small matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from plymix.methods import Array
from plymix.methods.arrays import (
    BLOCK,
    argsort,
    blockwise,
    flatten,
    lerp,
    like,
    match_spread,
    moments,
    namespace,
    numel,
    unsort,
)
from plymix.registry import Share, method


@method("tensor", room=7)
def smooth_add(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Smooth Add Difference

    R = A + alpha gauss(median(B - C))

    Add difference after a median of 3 and a Gaussian blur (sigma 1, radius 4) along every axis;
    beyond an edge the tensor is mirrored, its outermost element twice. alpha 0 is exactly A. Slow:
    the median of a convolution looks at 81 elements for each.
    Source: supermerger `smoothAdd`.
    """
    if alpha == 0:
        return a
    smooth = _gauss(_median3(b - c))
    return blockwise(lambda a, g: a + g * alpha, a, smooth, out=smooth)


@method("tensor", room=6)
def gaussian_add(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Gaussian Add Difference

    R = A + alpha gauss(B - C)

    As `smooth_add` without the median. alpha 0 is exactly A.
    Source: `sAD` of newer Chattiori-Model-Merger.
    """
    if alpha == 0:
        return a
    smooth = _gauss(b - c)
    return blockwise(lambda a, g: a + g * alpha, a, smooth, out=smooth)


@method("tensor", room=12)
def distribution_crossover(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.0,
) -> Array:
    """Distribution Crossover

    A and B in the order that sorts C; of n frequencies f = 0, 1/n, ... the ones above alpha come
    from B, the others from A, with a linear change beta wide in between; then the order is undone.

    Here alpha is the share of A, other than everywhere else: 1 keeps A's spectrum, 0 takes B's. A
    scalar is alpha A + (1 - alpha) B.
    Source: meh and SD.Next `distribution_crossover`.
    """
    if not a.shape:
        return lerp(b, a, alpha)
    xp, n = namespace(a, b, c), numel(a)
    order = argsort(c)
    d = flatten(b)[order] - flatten(a)[order]
    spectrum = xp.fft.rfft(d)
    length = spectrum.shape[0]
    f = np.arange(length) / length
    g = np.clip((f - alpha) / beta + 0.5, 0, 1) if beta > 1e-10 else f >= alpha
    moved = xp.fft.irfft(spectrum * like(g, a), n=n)
    return a + xp.reshape(unsort(xp.astype(moved, a.dtype), order), a.shape)


@method("tensor", room=11)
def crossover(a: Array, b: Array, *, alpha: Share = 0.5, tilt: float = 0.0) -> Array:
    """Crossover

    R = IFFT((1 - g) FFT(A) + g FFT(B)) over all axes, g a filter over the frequencies

    tilt turns the border between the frequencies of A and of B: 0 takes those above 1 - alpha from
    B, 1 mixes all alike (a weighted sum), 2 takes those below 1 - alpha, numbers between are smooth
    ramps, 4 is 0 again. alpha is about the share of B: 0 is exactly A, 1 exactly B. A scalar is a
    weighted sum.
    Source: sd-mecha `crossover`.
    """
    if alpha in (0, 1) or tilt == 1 or not a.shape:
        return lerp(a, b, alpha)
    xp = namespace(a, b)
    spectrum = xp.fft.rfftn(b - a)
    spectrum = spectrum * like(_crossover_filter(a.shape, alpha, tilt), a)
    moved = xp.fft.irfftn(spectrum, s=a.shape, axes=tuple(range(len(a.shape))))
    return a + xp.astype(moved, a.dtype)


@method("tensor")
def freq_band_blend(a: Array, b: Array, *, alpha: float = 0.5, beta: Share = 0.5) -> Array:
    """Frequency Band Blend

    Of each convolution kernel the frequencies below max(int(min(h, w) beta), 1) along both axes
    stay A; the higher ones are (1 - alpha) A + alpha B.

    Only kernels of 3 x 3 and more have bands; every other tensor is a weighted sum. alpha 0 is
    exactly A; beta 0 keeps only the mean of A's kernels.
    Source: `FREQ` of Chattiori-Model-Merger, with the spectrum's true order of frequencies.
    """
    if alpha == 0 or not _has_kernel(a):
        return lerp(a, b, alpha)
    h, w = a.shape[-2:]
    cut = max(int(min(h, w) * beta), 1)
    rows, columns = np.minimum(np.arange(h), h - np.arange(h)), np.arange(w // 2 + 1)
    high = np.maximum(rows[:, None], columns[None, :]) >= cut
    kernels = np.eye(h * w).reshape(-1, h, w)
    passed = np.fft.irfft2(np.fft.rfft2(kernels) * high, s=(h, w)).reshape(h * w, h * w)
    return blockwise(lambda a, d: a + d, a, _apply_matrix(b - a, passed * alpha))


@method("tensor")
def feature_weighted(a: Array, b: Array, *, alpha: float = 0.3) -> Array:
    """Feature-Weighted Merge

    d = B - A, of kernels of 3 x 3 and more smoothed: d <- box((d + box(d)) / 2)
    r = clamp(sB/sA, 0.5, 2), scale = clamp((sA/sD)^(1.5 - r/2), 0.5, 1.5)
    M = A + alpha scale clamp(sqrt(sA/sB), 0.8, 1.1) d
    R = M with its mean and standard deviation moved half-way to A's

    sA, sB, sD are the standard deviations of A, B and d; box averages 3 x 3 elements with zeros
    around the kernel. alpha 0 is exactly A. A weighted sum where one of the deviations is below
    1e-6.
    Source: `FWM` of Chattiori-Model-Merger.
    """
    if alpha == 0:
        return a
    matrix = None
    if _has_kernel(a):
        box = _kernel_matrix([_box_matrix(size) for size in a.shape[-2:]])
        matrix = (np.eye(len(box)) + box) / 2 @ box
    d = b - a if matrix is None else _apply_matrix(b - a, matrix)
    s_a, s_b, s_d = (moments(x)[1] for x in (a, b, d))
    if s_a < 1e-6 or s_b < 1e-6 or s_d < 1e-6:  # not their least, where one is NaN
        return lerp(a, b, alpha)
    r = _limit(s_b / s_a, 0.5, 2)
    scale = _limit((s_a / s_d) ** (1.5 - r / 2), 0.5, 1.5)
    step = alpha * scale * _limit(math.sqrt(s_a / s_b), 0.8, 1.1)
    r = blockwise(lambda a, d: a + d * step, a, d, out=d)
    return match_spread(r, a, out=r)


# -- filters over neighbours ----------------------------------------------------------------------


def _mirrored(size: int, reach: int) -> Any:
    """Indices -reach .. size + reach - 1 brought back inside: d c b a | a b c d | d c b a."""
    i = np.arange(-reach, size + reach) % (2 * size)
    return np.where(i < size, i, 2 * size - 1 - i)


GAUSS = np.exp(-(np.arange(-4, 5) ** 2) / 2)
GAUSS /= GAUSS.sum()
"""A Gaussian of sigma 1 at -4 .. 4, summing to 1."""


def _gauss(x: Array) -> Array:
    """Gaussian blur of `x`, which may be overwritten, along every axis; short trailing axes (a
    kernel's) in one product."""
    short = 0
    while short < len(x.shape) and math.prod(x.shape[-short - 1 :]) <= 64:
        short += 1
    if short:
        x = _apply_matrix(x, _kernel_matrix([_gauss_matrix(n) for n in x.shape[-short:]]))
    for axis in range(len(x.shape) - short):
        x = _gauss_along(x, axis)
    return x


def _gauss_matrix(size: int) -> Any:
    """The blur of one axis as a matrix: row i holds what each element gives to element i."""
    taps = np.eye(size)[_mirrored(size, 4)]
    return sum(w * taps[k : k + size] for k, w in enumerate(GAUSS))


def _gauss_along(x: Array, axis: int) -> Array:
    xp, shape, n = namespace(x), x.shape, x.shape[axis]
    if n == 1:
        return x
    x = xp.reshape(x, (math.prod(shape[:axis]), n, -1))
    index = xp.asarray(_mirrored(n, 4), device=device(x))
    for piece in _pieces(x):
        taps = xp.take(x[piece], index, axis=1)
        blurred = taps[:, 4 : 4 + n, :] * float(GAUSS[4])
        for k in range(1, 5):
            pair = taps[:, 4 - k : 4 - k + n, :] + taps[:, 4 + k : 4 + k + n, :]
            blurred += pair * float(GAUSS[4 + k])
        x[piece] = blurred
    return xp.reshape(x, shape)


def _pieces(x: Array) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts of a 3-D array into cache-sized pieces with the middle axis whole."""
    before, n, after = x.shape
    every = slice(None)
    if not is_numpy_array(x):
        yield every, every, every
    elif before > 1:
        step = max(1, BLOCK // (n * after))
        yield from ((slice(i, i + step), every, every) for i in range(0, before, step))
    else:
        step = max(64, BLOCK // n)
        yield from ((every, every, slice(i, i + step)) for i in range(0, after, step))


def _median3(x: Array) -> Array:
    """Median of the 3 x 3 x ... elements around each; axes of length 1 add nothing new."""
    xp, shape = namespace(x), x.shape
    x = xp.reshape(x, [n for n in shape if n > 1])
    if not x.shape:
        return xp.reshape(x, shape)
    rows = x.shape[0]
    windows = 3 ** len(x.shape)
    room = BLOCK * 4 // windows  # a window of up to 81 elements for each
    step = max(1, room * rows // numel(x)) if is_numpy_array(x) else rows
    index = [xp.asarray(_mirrored(n, 1), device=device(x)) for n in x.shape]
    out = xp.empty_like(x)
    for i in range(0, rows, step):
        block = xp.take(x, index[0][i : i + step + 2], axis=0)
        for axis in range(1, len(x.shape)):
            block = xp.take(block, index[axis], axis=axis)
        sizes = (block.shape[0] - 2, *x.shape[1:])
        if is_numpy_array(block):
            view = np.lib.stride_tricks.sliding_window_view(block, (3,) * len(sizes))
            window = view.copy().reshape(*sizes, windows)
            window.sort(axis=-1)  # for so few elements faster than a partition
        else:
            views = [
                block[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                for offsets in product(range(3), repeat=len(sizes))
            ]
            window = xp.sort(xp.stack(views, axis=-1), axis=-1)
        out[i : i + step, ...] = window[..., windows // 2]
    return xp.reshape(out, shape)


# -- kernels as vectors ---------------------------------------------------------------------------


def _has_kernel(x: Array) -> bool:
    return len(x.shape) == 4 and min(x.shape[-2:]) >= 3


def _kernel_matrix(matrices: Sequence[Any]) -> Any:
    """One matrix for several trailing axes from one for each."""
    return reduce(np.kron, matrices)


def _apply_matrix(x: Array, matrix: Any) -> Array:
    """The matrix times each vector of trailing elements of `x`."""
    xp = namespace(x)
    vectors = xp.reshape(x, (-1, len(matrix)))
    return xp.reshape(xp.matmul(vectors, like(matrix.T, x)), x.shape)


def _box_matrix(size: int) -> Any:
    """The mean of 3 neighbours with zeros outside, as a matrix."""
    return sum(np.eye(size, k=k) for k in (-1, 0, 1)) / 3


def _limit(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


# -- the filter of crossover ----------------------------------------------------------------------


def _crossover_filter(shape: tuple[int, ...], alpha: float, tilt: float) -> Any:
    """B's share of each frequency on the grid of `rfftn`; see `crossover`."""
    squares = []
    for axis, n in enumerate(shape):
        if axis == len(shape) - 1:
            ramp = np.linspace(0, 1, n // 2 + 1)
        elif n == 1:
            ramp = np.zeros(1)
        else:  # frequencies rise to the middle and fall again: the second half are negative ones
            up = np.linspace(0, (n - 1) // 2, n - n // 2)
            ramp = np.concatenate([up, np.linspace(n // 2, 1, n // 2)]) / (n // 2)
        squares.append(ramp.astype(np.float32) ** 2)
    mesh = np.sqrt(reduce(np.add, np.ix_(*squares)) / np.float32(len(shape)))
    tilt = tilt % 4
    flip = tilt > 2
    if flip:
        alpha = 1 - alpha
    if tilt == 0:
        g = mesh > 1 - alpha
    elif tilt == 2:
        g = mesh < 1 - alpha
    else:
        c = 1 / math.tan(math.pi * tilt / 2)
        border = c * alpha + alpha - c if tilt <= 1 or (flip and tilt <= 3) else alpha - c * alpha
        g = np.clip(c * mesh + border, 0, 1)
    return 1 - g if flip else g
