"""Which elements of a tensor are kept: the largest, by rank in their row, or by chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from array_api_compat import device, is_numpy_array

from plymix.methods import Array
from plymix.methods.arrays import BLOCK, blockwise, flatten, namespace, numel

_ALL_ONES = 2**64 - 1


def mask_where(test: Callable[..., Array], *arrays: Array) -> Array:
    """`test(*arrays)`, a mask, for a test that works element by element: `blockwise` for bools.

    The arrays have one shape, which is the mask's.
    """
    xp, n = namespace(*arrays), numel(arrays[0])
    flat = [flatten(x) for x in arrays]
    if n <= BLOCK or not is_numpy_array(arrays[0]):
        return xp.reshape(test(*flat), arrays[0].shape)
    mask = np.empty(n, np.bool_)
    for i in range(0, n, BLOCK):
        mask[i : i + BLOCK] = test(*(x[i : i + BLOCK] for x in flat))
    return mask.reshape(arrays[0].shape)


def bernoulli(generator: np.random.Generator, x: Array, p: float) -> Array:
    """True with probability `p` for each element of `x`: a mask of its shape, drawn on the CPU.

    16 random bits decide an element, and 53 more where those equal the cut, so `p` is exact to
    2^-69 at a quarter of the cost of a float. Only whole 64-bit words are drawn: the generator's
    own output, which numpy promises not to change.
    """

    def words(n: int) -> np.typing.NDArray[np.uint64]:
        return generator.integers(0, _ALL_ONES, n, dtype=np.uint64, endpoint=True)

    n = numel(x)
    cut, rest = divmod(min(max(p, 0.0), 1.0) * 65536, 1)
    mask = np.empty(n, np.bool_)
    close = []
    for i in range(0, n, BLOCK):
        part = mask[i : i + BLOCK]
        bits = words(-(-part.shape[0] // 4)).astype("<u8", copy=False).view("<u2")
        np.less(bits[: part.shape[0]], cut, out=part)
        close.append(np.flatnonzero(bits[: part.shape[0]] == cut) + i)
    for at in close:
        mask[at] = (words(at.shape[0]) >> np.uint64(11)) < rest * 2.0**53
    xp = namespace(x)
    return xp.reshape(xp.asarray(mask, device=device(x)), x.shape)


def top_mask(
    k: int, score: Callable[..., Array], *arrays: Array, with_equals: bool = False
) -> Array:
    """True at the `k` elements whose `score(*arrays)` is largest; of equals the earlier ones win.

    `score` works element by element and gives numbers >= 0. It is computed twice, in pieces, so
    that only one array of scores exists. `with_equals` also keeps what equals the smallest score
    kept.
    """
    xp, n = namespace(*arrays), numel(arrays[0])
    if k >= n or k <= 0:
        return xp.full(arrays[0].shape, k > 0, dtype=xp.bool, device=device(arrays[0]))
    scores = flatten(blockwise(score, *arrays))
    if is_numpy_array(scores):
        # Floats >= 0 sort like the integers of their bits, which numpy partitions twice as fast.
        if any(np.may_share_memory(scores, x) for x in arrays):
            scores = scores.copy()
        scores.view(np.int32 if scores.dtype == np.float32 else np.int64).partition(n - k)
        cut = float(scores[n - k])
    else:
        cut = float(xp.sort(scores)[n - k])
    del scores
    mask = flatten(mask_where(lambda *xs: score(*xs) >= cut, *arrays))
    surplus = int(xp.count_nonzero(mask)) - k
    if surplus > 0 and not with_equals:
        equal = flatten(mask_where(lambda *xs: score(*xs) == cut, *arrays))
        start = int(xp.nonzero(equal)[0][-surplus])
        mask[start:] = mask[start:] & ~equal[start:]
    return xp.reshape(mask, arrays[0].shape)


def row_ranks(x: Array) -> Array:
    """Rank 0..m-1 of each element in its row of a 2-D `x` >= 0; of equals the earlier is lower."""
    xp = namespace(x)
    if not is_numpy_array(x) or x.dtype != np.float32:
        order = xp.argsort(x, axis=-1, stable=True)
        return xp.argsort(order, axis=-1, stable=True)
    # Bits and column share one 64-bit key: a plain sort of those is a stable argsort, and faster.
    keys = np.ascontiguousarray(x).view(np.uint32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[1])
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    ranks = np.empty(x.shape, np.int64)
    np.put_along_axis(ranks, keys, np.arange(x.shape[1])[None], axis=-1)
    return ranks


def as_matrix(x: Array) -> Array:
    """`x` as rows of its first axis, `(o, i, kh, kw)` as `(o, i kh kw)`; a vector is one row."""
    return namespace(x).reshape(x, (x.shape[0] if x.ndim > 1 else 1, -1))
