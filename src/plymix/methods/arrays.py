"""Small maths that the merge methods share, on arrays of any namespace.

Reductions are summed in rows of 1024 float32 products and then in float64, so a norm of 40 million
elements keeps seven digits and does not depend on how many threads the BLAS has. What a method
does to each element after its reductions goes through `blockwise`, which keeps its temporaries in
the processor's cache; on a GPU it is one call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array

from plymix.methods import Array

ROW = 1024
"""Elements per float32 partial sum; small enough that no BLAS splits it among threads."""

Rng = Callable[[int], np.random.Generator]
"""What a random method is given: the generator of each model, by its index."""

BLOCK = 1 << 17
"""Elements per step of `blockwise` and `gram`: 512 KiB of float32, a few of which fit in the cache.
With smaller ones threads take turns more often than they compute."""

LARGE = 1 << 20
"""Bytes from which an array's memory is worth keeping for the next one."""

OWN = 32 << 20
"""Bytes of a pool's block at least, of which those never touched take no memory. From here on glibc
maps a block apart and gives it back when it is replaced; less would stay in the heap for good."""


def namespace(*arrays: Array | None) -> Any:
    """The array API namespace of the arrays that are not None."""
    if all(x is None or isinstance(x, (np.ndarray, np.generic)) for x in arrays):
        return _numpy()  # asked for every few thousand elements: the short way
    return array_namespace(*(x for x in arrays if x is not None))


@cache
def _numpy() -> Any:
    """numpy itself, which keeps the standard from 2.1 on; before that the compatibility layer's.

    That one loads all that numpy has, tests and a Fortran reader with it: 12 MiB and 0.1 s.
    """
    return np if hasattr(np, "unstack") else array_namespace(np.empty(0))


def flatten(x: Array) -> Array:
    """`x` in one dimension, row-major; a view where that is possible."""
    return namespace(x).reshape(x, (-1,))


def numel(x: Array) -> int:
    """How many elements `x` has."""
    return math.prod(x.shape)


# -- memory ---------------------------------------------------------------------------------------


class Pool:
    """Memory of large numpy arrays, used again when they are gone.

    To fault in fresh pages costs more than most arithmetic on them. The blocks are as many as there
    were large arrays at a time, each as large as the largest that was in it.
    """

    _current = threading.local()

    def __init__(self) -> None:
        self.free: list[Any] = []

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`empty` takes from this pool meanwhile, in this thread."""
        before = getattr(self._current, "pool", None)
        self._current.pool = self
        try:
            yield
        finally:
            self._current.pool = before

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """As `np.empty`. The memory comes back when the last view of the array is gone."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < LARGE:
            return np.empty(shape, dtype)
        self.free.sort(key=len)
        fits = next((i for i, block in enumerate(self.free) if len(block) >= nbytes), None)
        if fits is not None:
            block = self.free.pop(fits)
        else:
            if self.free:
                self.free.pop()  # the new one replaces it
            block = np.empty(max(nbytes, OWN), np.uint8)
        return np.asarray(_Lease(self, block, shape, np.dtype(dtype)))


class _Lease:
    """What a pool's array has as its base."""

    def __init__(self, pool: Pool, block: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.pool, self.block = pool, block
        self.__array_interface__ = {
            "version": 3,
            "data": (block.ctypes.data, False),
            "shape": tuple(shape),
            "typestr": dtype.str,
        }

    def __del__(self) -> None:
        self.pool.free.append(self.block)


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """As `np.empty`, from the pool that serves this thread if there is one."""
    pool: Pool | None = getattr(Pool._current, "pool", None)
    return np.empty(shape, dtype) if pool is None else pool.empty(shape, dtype)


# -- element by element ---------------------------------------------------------------------------


def blockwise(
    f: Callable[..., Array],
    *arrays: Array,
    dtype: Any = None,
    grain: int = 1,
    out: Array | None = None,
) -> Array:
    """`f(*arrays)` for an `f` that works element by element, computed in cache-sized pieces.

    The arrays have one shape, or have the same length or 1 along their first axis and broadcast
    along the others. The result has the shape of the first, and its dtype unless `dtype` (what `f`
    gives, a mask for one) is another. The pieces have a multiple of `grain` elements. `out`, such
    as the first, may be overwritten with the result.
    """
    first = arrays[0]
    if all(x.shape == first.shape for x in arrays):
        arrays = tuple(flatten(x) for x in arrays)
        out = None if out is None else flatten(out)
    found = rowwise(f, *arrays, dtype=dtype, grain=grain, out=out)
    return namespace(first).reshape(found, first.shape)


def rowwise(
    f: Callable[..., Array],
    *arrays: Array,
    dtype: Any = None,
    grain: int = 1,
    out: Array | None = None,
) -> Array:
    """As `blockwise`, for an `f` that works index by index of the first axis (row by row).

    The pieces come in order, and have a multiple of `grain` rows.
    """
    first, n, size = arrays[0], arrays[0].shape[0], numel(arrays[0])
    if size <= BLOCK or not is_numpy_array(first):
        return f(*arrays)
    step = max(1, BLOCK * n // size // grain) * grain
    if out is None:
        out = np.empty(first.shape, dtype) if dtype else empty(first.shape, first.dtype)
    for i in range(0, n, step):
        out[i : i + step] = f(*(x if x.shape[0] == 1 else x[i : i + step] for x in arrays))
    return out


def pieces(*arrays: Array, grain: int = 1) -> Iterator[list[Array]]:
    """The flattened arrays in pieces for the cache, of a multiple of `grain` elements."""
    flat = [flatten(x) for x in arrays]
    n = flat[0].shape[0]
    step = max(1, BLOCK // grain) * grain if is_numpy_array(flat[0]) else max(n, 1)
    for i in range(0, n, step):
        yield [x[i : i + step] for x in flat]


def add_up(xs: Sequence[Array]) -> Array:
    """The sum of the arrays, in their order."""
    return reduce(add, xs)


def combine(coefficients: Sequence[float], arrays: Sequence[Array]) -> Array:
    """The sum of `coefficients[i] * arrays[i]`; a coefficient 0 leaves its array unread."""
    terms = [(float(c), x) for c, x in zip(coefficients, arrays, strict=True) if c != 0]
    if not terms:
        return namespace(*arrays).zeros_like(arrays[0])

    def total(*xs: Array) -> Array:
        out = xs[0] * terms[0][0]
        for x, (c, _) in zip(xs[1:], terms[1:], strict=True):
            out += x * c
        return out

    return blockwise(total, *(x for _, x in terms))


def copy_of(x: Array) -> Array:
    """`x` in memory of its own."""
    return blockwise(lambda v: v + 0.0, x)


def lerp(a: Array, b: Array, t: float, *, out: Array | None = None) -> Array:
    """`a + t (b - a)`: exactly `a` at 0, exactly `b` at 1, and exactly `a` wherever a = b.

    `out` (such as `a`) may be overwritten.
    """
    if t == 0:
        return a
    if t == 1:
        return b
    if t < 0.5:
        return blockwise(lambda x, y: x + (y - x) * t, a, b, out=out)
    return blockwise(lambda x, y: y - (y - x) * (1 - t), a, b, out=out)


def mix(a: Array, b: Array, t: Array) -> Array:
    """`lerp` with one `t` per element (or broadcast along any axis), exact at the same points."""

    def one(x: Array, y: Array, t: Array) -> Array:
        d = y - x
        return choose(t < 0.5, x + t * d, y - (1 - t) * d)

    return blockwise(one, a, b, t)


def choose(mask: Array, x: Array | float, y: Array | float) -> Array:
    """`x` where `mask` is true, else `y`: `where`, of which at least one side is an array.

    numpy's `where` branches at every element, 5 ns each for masks without a pattern; bit operations
    take a tenth of that.
    """
    if not is_numpy_array(mask):
        return namespace(mask).where(mask, x, y)
    dtype = np.result_type(np.float32, x, y)  # two numbers make a float32
    bits = np.dtype(f"i{dtype.itemsize}")
    ones = np.negative(mask.view(np.int8)).astype(bits)  # all bits or none
    x, y = (np.asarray(v, dtype).view(bits) for v in (x, y))
    out = ones & (x ^ y)
    out ^= y
    return out.view(dtype)


def magnitude(x: Array) -> Array:
    """|x| of an array that nobody else needs: in its own memory where that can be."""
    return np.abs(x, out=x) if isinstance(x, np.ndarray) else namespace(x).abs(x)


def signed(size: Array, x: Array) -> Array:
    """`size`, which is nowhere negative, with the signs of `x`: `copysign`, in two quick passes."""
    if not is_numpy_array(x):
        return namespace(x).copysign(size, x)
    bits = np.dtype(f"i{x.itemsize}")
    signs = x.view(bits) & np.iinfo(bits).min
    signs |= size.view(bits)
    return signs.view(x.dtype)


def turning(x: Array, factor: float) -> Array:
    """`factor` where the sign of `x` is minus, else 1; of a numpy array."""
    bits = np.dtype(f"i{x.itemsize}")
    one, other = (np.asarray(v, x.dtype).view(bits) for v in (1.0, factor))
    k = x.view(bits) >> (8 * x.itemsize - 1)  # all bits where it is minus
    k &= one ^ other
    k ^= one
    return k.view(x.dtype)


def outside(x: Array, low: float, high: float) -> Array:
    """Where sizes in a flat numpy array are not in `low..high`, 0, infinities and NaN among them:
    their indices."""
    bits = np.dtype(f"u{x.itemsize}")
    least, most = (np.asarray(v, x.dtype).view(bits) for v in (low, high))
    above = x.view(bits) - least  # what is below wraps around
    span = most - least
    return np.flatnonzero(above > span) if above.max(initial=0) > span else np.empty(0, np.intp)


def clip(
    x: Array, low: float | None = None, high: float | None = None, *, out: Array | None = None
) -> Array:
    """`x` limited to `low..high`; None is no limit. `out` (such as `x`) may be overwritten."""
    if not is_numpy_array(x):
        return namespace(x).clip(x, low, high)
    out = out if isinstance(out, np.ndarray) else None  # sums of arrays without axes are numbers
    if low is not None:  # the compatibility layer's clip takes ten times as long
        x = np.maximum(x, low, out=out)
    return x if high is None else np.minimum(x, high, out=out)


# -- one number per tensor ------------------------------------------------------------------------


def dot(x: Array, y: Array) -> float:
    """Sum of the products of all elements."""
    return _dot(namespace(x), _cut(x), _cut(y))


def _cut(x: Array) -> tuple[Array, Array]:
    """`x` in rows, and what is left over as float64."""
    xp, x = namespace(x), flatten(x)
    whole = x.shape[0] // ROW * ROW
    return xp.reshape(x[:whole], (-1, ROW)), xp.astype(x[whole:], xp.float64)


def _dot(xp: Any, x: tuple[Array, Array], y: tuple[Array, Array]) -> float:
    total = float(xp.sum(xp.vecdot(x[0], y[0]), dtype=xp.float64))
    return total + float(xp.vecdot(x[1], y[1])) if x[1].shape[0] else total


def norm(x: Array) -> float:
    """Frobenius norm over all elements."""
    return math.sqrt(dot(x, x))


def gram(
    *arrays: Array, of: Callable[..., Sequence[Array]] = lambda *xs: xs, grain: int = 1
) -> Any:
    """All dot products between the arrays `of(*arrays)`: float64 numpy, one row per array.

    `of` works element by element and is called in pieces, so `of=lambda a, b, c: (a - c, b - c)`
    gives the products of two differences without making them. The pieces have a multiple of `grain`
    elements.
    """
    xp = namespace(*arrays)
    total: Any = 0.0
    for piece in pieces(*arrays, grain=grain):
        xs = [_cut(x) for x in of(*piece)]
        part = np.zeros((len(xs), len(xs)))
        for j, x in enumerate(xs):
            for k, y in enumerate(xs[: j + 1]):
                part[j, k] = part[k, j] = _dot(xp, x, y)
        total = total + part
    return total


def moments(x: Array) -> tuple[float, float]:
    """Mean and population standard deviation of all elements."""
    xp, n, (rows, rest) = namespace(x), numel(x), _cut(x)
    sums = (xp.sum(xp.sum(rows, axis=1), dtype=xp.float64), xp.sum(rest))
    mean = math.fsum(map(float, sums)) / n
    return mean, math.sqrt(gram(x, of=lambda v: (v - mean,))[0, 0] / n)


def match_spread(r: Array, a: Array, out: Array | None = None) -> Array:
    """`r` with its mean and standard deviation moved half-way to those of `a`; `out` (such as `r`)
    may be overwritten.

    R' = (R - mean R) / std R * (std R + std A) / 2 + (mean R + mean A) / 2; R' = R if std R < 1e-6.
    """
    (mean_r, std_r), (mean_a, std_a) = moments(r), moments(a)
    if std_r < 1e-6:
        return r
    k, mean = (std_r + std_a) / (2 * std_r), (mean_r + mean_a) / 2
    return blockwise(lambda v: (v - mean_r) * k + mean, r, out=out)


# -- one number per row or column -----------------------------------------------------------------


def as_rows(x: Array) -> Array:
    """Everything after the first axis in one: a conv kernel (o, i, h, w) becomes (o, i h w)."""
    return namespace(x).reshape(x, (x.shape[0], -1))


def as_lines(x: Array) -> Array:
    """Everything before the last axis in one."""
    return namespace(x).reshape(x, (-1, x.shape[-1]))


def row_products(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """x . x, x . y and y . y of each row of two matrices, as columns.

    float64, because what is asked is often how far a cosine is from 1.
    """
    xp = namespace(x, y)
    x, y = xp.astype(x, xp.float64), xp.astype(y, xp.float64)
    xx, xy, yy = (xp.vecdot(p, q)[:, None] for p, q in ((x, x), (x, y), (y, y)))
    return xx, xy, yy


def column_products(x: Array, y: Array, base: Array | None = None) -> tuple[Array, Array, Array]:
    """As `row_products` of each column, as rows; of the differences from `base` if there is one."""
    xp = namespace(x, y)
    rows, columns = x.shape
    step = max(1, (BLOCK if is_numpy_array(x) else 1 << 24) // columns)
    total: Any = 0.0
    for i in range(0, rows, step):
        pair = (v[i : i + step, :] for v in (x, y))
        if base is not None:
            pair = (v - base[i : i + step, :] for v in pair)
        p, q = (xp.astype(v, xp.float64) for v in pair)
        pairs = ((p, p), (p, q), (q, q))
        total = total + xp.stack([xp.sum(p * q, axis=0, keepdims=True) for p, q in pairs])
    xx, xy, yy = xp.unstack(total)
    return xx, xy, yy


# -- order ----------------------------------------------------------------------------------------


def kth_smallest(x: Array, k: int) -> float:
    """The k-th smallest element of `x`, counted from 1."""
    if is_numpy_array(x):
        return float(np.partition(x, k - 1, axis=None)[k - 1])
    return float(namespace(x).sort(flatten(x), stable=False)[k - 1])


def argsort(x: Array) -> Array:
    """Stable ascending order of the flattened `x`.

    For float32 in numpy the bits, made to sort like integers, and the index share one 64-bit
    number: the same order as a stable sort, several times faster.
    """
    x = flatten(x)
    if not is_numpy_array(x) or x.dtype != np.float32:
        return namespace(x).argsort(x, stable=True)
    bits = (x + np.float32(0)).view(np.int32)  # + 0: -0.0 and 0.0 are equal
    keys = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[0], dtype=np.int64)
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def unsort(values: Array, order: Array) -> Array:
    """The array whose elements taken in `order` are `values`."""
    out = namespace(values).empty_like(values)
    out[order] = values
    return out


# -- randomness -----------------------------------------------------------------------------------


def normal(generator: np.random.Generator, x: Array) -> Array:
    """Standard normal numbers, drawn on the CPU in float32, as an array like `x`."""
    return like(generator.standard_normal(x.shape, dtype=np.float32), x)


def uniform(generator: np.random.Generator, x: Array) -> Array:
    """Numbers uniform in [0, 1), drawn on the CPU in float32, as an array like `x`.

    What `generator.random` gives a new generator of 64-bit words, 24 bits of each half, in half the
    time. Whoever asks for them in pieces takes an even number each time but for the last.
    """
    n = numel(x)
    words = generator.bit_generator.random_raw(-(-n // 2)).astype("<u8", copy=False)
    halves = words.view("<u4")[:n]
    halves >>= 8
    numbers = halves.view("<i4").astype(np.float32)  # signed: a processor's own conversion
    numbers *= 2.0**-24
    return like(numbers.reshape(x.shape), x)


# -- to and from numpy ----------------------------------------------------------------------------


def like(values: Any, x: Array) -> Array:
    """The numpy array `values` in the namespace, dtype and device of `x`."""
    return namespace(x).asarray(np.asarray(values), dtype=x.dtype, device=device(x))


def to_numpy(x: Array) -> Any:
    """`x` as a numpy array on the CPU."""
    return x if is_numpy_array(x) else x.detach().cpu().numpy()
