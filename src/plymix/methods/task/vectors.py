"""The sum that methods on task vectors share, and what they measure; no method is in this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union

from plymix.methods import Array
from plymix.methods.arrays import add_up, blockwise, clip, gram, magnitude, namespace
from plymix.methods.selection import Lazy

Vote = Literal["", "sum", "count", "soup"]
Divide = Literal["", "weights", "count"]
Gains = Sequence[Union[Array, Lazy, None]]


def as_float(mask: Array, like: Array) -> Array:
    """`mask` as zeros and ones in the dtype of `like`."""
    return mask if mask.dtype == like.dtype else namespace(like).astype(mask, like.dtype)


def _given(gains: Gains) -> list[Array]:
    """The gains that are one number or truth per element."""
    return [g for g in gains if g is not None and not isinstance(g, Lazy)]


def _grain(gains: Gains) -> int:
    """Elements that the pieces must have a multiple of."""
    return math.lcm(*(g.grain for g in gains if isinstance(g, Lazy)))


def _reader(gains: Gains) -> Callable[..., list[Array]]:
    """A function from pieces of the base, the models and `_given(gains)`, called in their order,
    to the task vectors after their gains."""
    n = len(gains)
    cuts = [g.masks() if isinstance(g, Lazy) else None for g in gains]

    def read(x0: Array, *rest: Array) -> list[Array]:
        ds, given = [x - x0 for x in rest[:n]], iter(rest[n:])
        for d, g, cut in zip(ds, gains, cuts, strict=True):
            if cut is not None:
                d *= as_float(cut(namespace(d).abs(d)), d)
            elif g is not None:
                d *= as_float(next(given), d)
        return ds

    return read


def _elected(
    ds: Sequence[Array], vote: Vote, weights: Sequence[float]
) -> tuple[list[Array], Array]:
    """The task vectors that point along the elected sign s, times s (0 where they do not), and s.

    Changes `ds` in place.

    sum    s = sign of sum_i w_i d_i, + where that is 0; model i agrees if sign(w_i d_i) = s
    soup   s = sign of sum_i d_i, and    count  s = sign of sum_i sign(d_i): where that is 0 nobody
           agrees; model i agrees if sign(d_i) = s
    """
    sides = [1.0] * len(ds)
    if vote == "sum":
        sides = [math.copysign(1, w) if w else 0.0 for w in weights]
        sign = as_float(_weighted_sum(ds, weights) >= 0, ds[0])
        sign *= 2
        sign -= 1
    else:
        total = add_up([_sign(d) for d in ds] if vote == "count" else ds)
        sign = as_float(_sign(total), ds[0])
    kept = []
    for d, side in zip(ds, sides, strict=True):
        d *= sign if side == 1 else sign * side
        along = clip(d, 0, out=d)
        kept.append(along if side >= 0 else -along)
    return kept, sign


def _sign(x: Array) -> Array:
    """-1, 0 or 1 as small integers, in a third of the time of `sign`; 0 for NaN."""
    xp = namespace(x)
    return xp.astype(x > 0, xp.int16) - xp.astype(x < 0, xp.int16)


def _weighted_sum(xs: Sequence[Array], weights: Sequence[float]) -> Array:
    return add_up([x if w == 1 else x * w for x, w in zip(xs, weights, strict=True)])


def mean_and_products(
    base: Array, models: Sequence[Array], gains: Gains, vote: Vote
) -> tuple[Array, Any]:
    """The mean of the differences that survive their gains and the vote, over their number at each
    element, and their dot products as `products` gives them: in one pass."""
    ones, read, dots = [1.0] * len(models), _reader(gains), 0.0

    def piece(x0: Array, *rest: Array) -> Array:
        nonlocal dots
        kept, sign = _elected(read(x0, *rest), vote, ones)
        dots = dots + gram(*kept)
        d = add_up(kept)
        d /= _divisor([k != 0 for k in kept], ones, 0.0, x0)
        d *= sign
        return d

    mean = blockwise(piece, base, *models, *_given(gains), grain=_grain(gains))
    return mean, dots


def merge(
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
            d /= _divisor([k != 0 for k in kept], by, floor, x0)
        if vote:
            d *= sign
        if scale != 1:
            d *= scale
        d += x0
        return d

    given = _given(gains)
    own = [g for g in given if g.dtype == base.dtype]  # made for this sum: has room for the result
    return blockwise(piece, base, *models, *given, grain=_grain(gains), out=own[0] if own else None)


def _divisor(there: Sequence[Array], weights: Sequence[float], floor: float, like: Array) -> Array:
    """The sum of the weights of the models that are there, not below `floor`; 1 where it is 0."""
    xp = namespace(like)
    if not floor and all(w == 1 for w in weights):
        count = add_up([xp.astype(t, xp.int16) for t in there])
        count += xp.astype(count == 0, xp.int16)  # of small integers, quicker than a limit
        return as_float(count, like)
    total = _weighted_sum([as_float(t, like) for t in there], weights)
    return clip(total, floor) if floor else total + as_float(total == 0, like)


def distance(x0: Array, x: Array) -> Array:
    """|d| of one model: the score that trimming ranks by."""
    return magnitude(x - x0)


def kept_distances(base: Array, x: Array, gain: Array | Lazy) -> Array:
    """`distance` of all elements of one model, after its gain."""
    read = _reader([gain])
    return blockwise(
        lambda *xs: magnitude(read(*xs)[0]), base, x, *_given([gain]), grain=_grain([gain])
    )


def products(base: Array, models: Sequence[Array], gains: Gains = (), vote: Vote = "") -> Any:
    """The dot products of the differences that survive their gains and the vote, as `gram` gives.

    The elected sign drops out of them.
    """
    ones = [1.0] * len(models)
    gains = gains or [None] * len(models)
    read = _reader(gains)

    def of(*pieces: Array) -> list[Array]:
        ds = read(*pieces)
        return _elected(ds, vote, ones)[0] if vote else ds

    return gram(base, *models, *_given(gains), of=of, grain=_grain(gains))
