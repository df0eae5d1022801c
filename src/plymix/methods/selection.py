"""Which elements of a tensor are kept: the largest, by rank in their row, or by chance."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from plymix.methods import Array
from plymix.methods.arrays import BLOCK, blockwise, flatten, namespace, numel

SAMPLE = 1 << 13
"""Elements that tell about where a tensor's k-th largest lies; of large ones up to 8 times more."""


GROUPS = 48
"""Of how many groups of about one size a large tensor is sorted one by one."""


class Lazy(ABC):
    """Which elements are kept, or factors of them, told piece by piece when it is needed."""

    @property
    def grain(self) -> int:
        """How many elements the pieces, but for the last, must have a multiple of."""
        return 8

    @abstractmethod
    def masks(self) -> Callable[[Array], Array]:
        """A function that gives the mask of each piece of the scores, called in their order."""


def packed_top_mask(k: int, scores: Array, *, with_equals: bool = False) -> Array | Lazy:
    """True at the `k` largest scores, numbers >= 0, but for those that are 0; of equals at the
    earlier ones, or `with_equals` at all that equal the smallest kept."""
    if k <= 0:
        return NOTHING
    masks = largest(k, lambda s: s, scores, with_equals=with_equals).masks()
    return packed(lambda s: masks(s) & (s != 0), scores)


def packed(mask: Callable[[Array], Array], x: Array) -> Array | Packed:
    """`mask(x)`, of numpy's arrays in a bit per element. `mask` is called for pieces in order."""
    if not is_numpy_array(x):
        return mask(x)
    flat = flatten(x)
    bits = np.empty(-(-flat.shape[0] // 8), np.uint8)
    for i in range(0, flat.shape[0], BLOCK):
        bits[i // 8 : (i + BLOCK) // 8] = np.packbits(mask(flat[i : i + BLOCK]))
    return Packed(bits)


@dataclass(frozen=True)
class Largest(Lazy):
    """The elements of a tensor whose score is above `cut`, and the first `equals` that equal it."""

    cut: float
    equals: float

    def masks(self) -> Callable[[Array], Array]:
        cut, equals = self.cut, self.equals

        def mask(scores: Array) -> Array:
            nonlocal equals
            if equals == math.inf:
                return scores >= cut
            kept = scores > cut
            if equals:
                at = namespace(scores).nonzero(scores == cut)[0][: int(equals)]
                kept[at] = True
                equals -= at.shape[0]
            return kept

        return mask


NOTHING = Largest(math.inf, 0)
"""Keeps no element."""


@dataclass(frozen=True)
class Without(Lazy):
    """The elements of `largest` (None: all) but for those of `smaller`, which are some of them."""

    largest: Largest | None
    smaller: Largest

    def masks(self) -> Callable[[Array], Array]:
        more, less = self.largest.masks() if self.largest else None, self.smaller.masks()

        def mask(scores: Array) -> Array:
            return more(scores) ^ less(scores) if more else ~less(scores)

        return mask


@dataclass(frozen=True, eq=False)
class Among(Lazy):
    """The elements of `kept` that are in `largest` when the others' scores are 0."""

    kept: Lazy
    largest: Largest

    @property
    def grain(self) -> int:
        return self.kept.grain

    def masks(self) -> Callable[[Array], Array]:
        first, second = self.kept.masks(), self.largest.masks()

        def mask(scores: Array) -> Array:
            kept = first(scores)
            kept &= second(scores * kept)
            return kept

        return mask


@dataclass(frozen=True, eq=False)
class Packed(Lazy):
    """A mask of one bit per element, as those of bytes would outgrow the tensor."""

    bits: Any

    def masks(self) -> Callable[[Array], Array]:
        at = 0

        def mask(scores: Array) -> Array:
            nonlocal at
            n = scores.shape[0]
            found = np.unpackbits(self.bits[at : at + -(-n // 8)], count=n)
            at += n // 8
            return namespace(scores).asarray(found.view(np.bool_), device=device(scores))

        return mask


@dataclass(frozen=True, eq=False)
class Drawn(Lazy):
    """A mask of `n` elements, each true with probability `p`: drawn when it is needed, as masks of
    several models would outgrow the tensor.

    8 random bits decide an element, and 53 more where those equal the cut, so `p` is exact to 2^-61
    at a quarter of the cost of a float. Only the 64-bit words of the generator that `rng` gives are
    drawn, on the CPU: their bytes, lowest first, are the elements' bits, and then each element at
    the cut takes a word.
    """

    rng: Callable[[], np.random.Generator]
    n: int
    p: float

    def masks(self) -> Callable[[Array], Array]:
        """As for any `Lazy`.

        Where there are several, `rng` gives the same generator twice, anew: the second one is at
        the words for elements at the cut.
        """
        cut, rest = divmod(min(max(self.p, 0.0), 1.0) * 256, 1)
        words = self.rng().bit_generator.random_raw
        more = None

        def mask(scores: Array) -> Array:
            nonlocal more
            m = scores.shape[0]
            drawn = words(-(-m // 8)).astype("<u8", copy=False).view(np.uint8)[:m]
            if more is None:
                more = words
                if m < self.n:
                    more = self.rng().bit_generator.random_raw
                    more(-(-self.n // 8), output=False)
            found = drawn < int(cut)
            at = np.flatnonzero(drawn == int(cut))
            found[at] = (more(at.shape[0]) >> np.uint64(11)) < rest * 2.0**53
            return namespace(scores).asarray(found, device=device(scores))

        return mask


def largest(
    k: int, score: Callable[..., Array], *arrays: Array, with_equals: bool = False
) -> Largest:
    """What keeps the `k` elements whose `score(*arrays)`, a number >= 0, is largest; of equals the
    earlier ones. `with_equals` also keeps what equals the smallest score kept. 0 < k <= n."""
    cut, larger = kth_largest(k, score, *arrays)
    return Largest(cut, math.inf if with_equals else k - larger)


def kth_largest(k: int, score: Callable[..., Array], *arrays: Array) -> tuple[float, int]:
    """The k-th largest of `score(*arrays)`, counted from 1, and how many are larger."""
    return each_kth_largest([k], score, *arrays)[0]


def each_kth_largest(
    ks: Sequence[int], score: Callable[..., Array], *arrays: Array
) -> list[tuple[float, int]]:
    """`kth_largest` for each k of `ks`, in one pass. `score` works element by element.

    A sample tells two numbers that the answer nearly always lies between. In one pass in pieces the
    scores outside are counted and those between kept, a few per cent, to be partitioned. Where that
    fails all scores are.
    """
    xp, n, flat = namespace(*arrays), numel(arrays[0]), [flatten(x) for x in arrays]
    if not is_numpy_array(flat[0]):
        scores = score(*flat)
        cuts = xp.sort(scores)
        return [(float(c), int(xp.count_nonzero(scores > c))) for c in (cuts[n - k] for k in ks)]
    found: list[tuple[float, int] | None] = [None] * len(ks)
    if n >= 8 * SAMPLE:
        sample = _sample(score, flat)
        found = _between(ks, [_bracket(1 - k / n, sample) for k in ks], score, flat)
    if None in found:
        scores = blockwise(score, *flat)
        if any(np.may_share_memory(scores, x) for x in arrays):
            scores = scores.copy()
        found = [f or _partitioned(k, scores) for f, k in zip(found, ks, strict=True)]
    return [f for f in found if f is not None]


def _partitioned(k: int, scores: Any) -> tuple[float, int]:
    """As `kth_largest`, of an array that it may reorder.

    Floats >= 0 sort like the integers of their bits, which numpy partitions twice as fast.
    """
    at = scores.shape[0] - k
    (scores.view(f"i{scores.itemsize}") if scores.min() >= 0 else scores).partition(at)
    cut = float(scores[at])
    return cut, int(np.count_nonzero(scores[at:] > cut))


def _sample(score: Callable[..., Array], flat: list[Array]) -> Any:
    """Some of the scores, sorted."""
    n = flat[0].shape[0]
    size = min(max(SAMPLE, n >> 7), 8 * SAMPLE)
    # scattered, as a stride may always meet the same column; the golden ratio leaves no gaps
    at = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) % np.uint64(n)
    return np.sort(score(*(x[at] for x in flat)))


def _bracket(share: float, sample: Any) -> tuple[float, float]:
    """Two numbers, low < high, that what is above this share of the scores nearly always lies
    between."""
    size = sample.shape[0]
    middle, spread = size * share, 4 * math.sqrt(size * share * (1 - share)) + 2
    first, last = int(middle - spread), int(middle + spread) + 1
    low = sample[first] if first >= 0 else min(sample[0], sample.dtype.type(0))
    high = sample[last] if last < size else sample.dtype.type(np.inf)
    return float(low), float(max(high, np.nextafter(low, np.inf, dtype=sample.dtype)))


def _between(
    ks: Sequence[int],
    brackets: Sequence[tuple[float, float]],
    score: Callable[..., Array],
    flat: list[Array],
) -> list[tuple[float, int] | None]:
    """As `each_kth_largest`, of those that lie in their bracket, whose ends may equal them.

    What equals the ends is not kept: differences of 16-bit floats have so few values that the same
    one may be half of a tensor.
    """

    def pieces() -> Iterator[Array]:
        for i in range(0, flat[0].shape[0], BLOCK):
            yield score(*(x[i : i + BLOCK] for x in flat))

    def count(test: Callable[[Array], Array]) -> int:
        return sum(int(np.count_nonzero(test(s))) for s in pieces())

    aboves = [0] * len(ks)
    insides: list[list[Array]] = [[] for _ in ks]
    for s in pieces():
        for j, (low, high) in enumerate(brackets):
            marked = s >= high
            aboves[j] += int(np.count_nonzero(marked))
            marked ^= s > low
            insides[j].append(s[np.flatnonzero(marked)])

    def found(
        k: int, low: float, high: float, above: int, inside: list[Array]
    ) -> tuple[float, int] | None:
        inner = np.concatenate(inside)
        if above < k <= above + inner.shape[0]:
            cut, larger = _partitioned(k - above, inner)
            return cut, above + larger
        if k <= above:
            larger = count(lambda s: s > high)
            return (high, larger) if larger < k else None
        larger = above + inner.shape[0]
        return (low, larger) if count(lambda s: s >= low) >= k else None

    each = zip(ks, brackets, aboves, insides, strict=True)
    return [found(k, *bracket, above, inside) for k, bracket, above, inside in each]


def by_rank(values: Array, x: Array) -> Array:
    """`values[r]`, r the rank 0..m-1 of an element in its row of a 2-D `x` >= 0: shaped as `x`.

    Of equals the earlier is lower. The keys that are sorted take 8 bytes an element: call it for
    some rows at a time.
    """
    xp = namespace(x)
    if not is_numpy_array(x) or x.dtype != np.float32:
        order = xp.argsort(x, axis=-1, stable=True)
        return values[xp.argsort(order, axis=-1, stable=True)]
    # Bits and index share one 64-bit key: a plain sort of those is a stable argsort, and faster.
    keys = np.arange(x.size, dtype=np.int64).reshape(x.shape)
    keys.view(np.uint32)[:, int(sys.byteorder == "little") :: 2] = x.view(np.uint32)
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    found = np.empty(x.size, values.dtype)
    found[keys.reshape(-1)] = np.broadcast_to(values, x.shape).reshape(-1)
    return found.reshape(x.shape)


def by_rank_of_all(values: Callable[[Array], Array], x: Array) -> Array:
    """`values(r)`, numbers >= 0, r the rank 0..n-1 of an element in the whole of `x` >= 0, in its
    dtype. Of equals the earlier is lower. `x` may be overwritten with the result.

    Of a large array what lies between neighbours of a sample is sorted at a time, as keys for all
    would take twice its memory; what is done has a minus until the end.
    """
    xp, flat, n = namespace(x), flatten(x), numel(x)
    if not is_numpy_array(x) or x.dtype != np.float32 or n < 8 * SAMPLE:
        r = xp.arange(n, dtype=x.dtype, device=device(x))
        return xp.reshape(by_rank(values(r), xp.reshape(x, (1, -1))), x.shape)
    done = 0

    def put(order: Any) -> None:
        nonlocal done
        for i in range(0, order.shape[0], BLOCK):
            at = order[i : i + BLOCK]
            flat[at] = -values(np.arange(done, done + at.shape[0]).astype(np.float32))
            done += at.shape[0]

    sample = _sample(lambda s: s, [flat])
    cuts = [c for c in sample[:: sample.shape[0] // GROUPS].tolist() if c < math.inf] + [math.inf]
    low = -1.0
    for high in sorted({*cuts}):
        common = cuts.count(high) > 1  # too many to sort, and in order as they are
        put(_order_between(low, high, flat, np.less if common else np.less_equal))
        if common:
            for i in range(0, n, BLOCK):
                put(np.flatnonzero(flat[i : i + BLOCK] == high) + i)
        low = high
    return blockwise(lambda s: -s, x, out=x)


def _order_between(low: float, high: float, x: Any, below: Callable[[Any, float], Any]) -> Any:
    """Indices of the elements of a flat `x` above `low` and `below` `high`, in their stable order;
    by keys as in `by_rank`."""
    found = []
    for i in range(0, x.shape[0], BLOCK):
        mask = below(x[i : i + BLOCK], high)
        mask &= x[i : i + BLOCK] > low
        found.append(np.flatnonzero(mask).astype(np.uint32))
    keys = np.empty(sum(map(len, found)), np.int64)
    done = 0
    for i, at in enumerate(found):
        part = keys[done : done + at.shape[0]]
        part[:] = x[i * BLOCK :][at].view(np.int32)
        part <<= 32
        part |= at
        part += i * BLOCK
        done += at.shape[0]
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def as_matrix(x: Array) -> Array:
    """`x` as rows of its first axis, `(o, i, kh, kw)` as `(o, i kh kw)`; a vector is one row."""
    return namespace(x).reshape(x, (x.shape[0] if x.ndim > 1 else 1, -1))
