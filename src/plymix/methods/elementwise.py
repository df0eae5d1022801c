"""Methods that look at one element of each model at a time, and at nothing else."""

from __future__ import annotations

import math
from functools import reduce
from operator import imul
from typing import Annotated

import numpy as np
from array_api_compat import is_numpy_array

from plymix.methods import Array
from plymix.methods.arrays import (
    Rng,
    choose,
    clip,
    flatten,
    lerp,
    magnitude,
    namespace,
    normal,
    outside,
    signed,
    turning,
)
from plymix.methods.linear import keeps_scale
from plymix.registry import Range, Share, method

LEAST = 2.0**-149
"""The least number above 0 in float32. As lower limit of a divisor it turns 0 / 0 into 0."""

ODD = 1 << 14
"""Elements at a time that need a slower way: seldom any, and in a file of zeros all of them."""


@method("elementwise")
def geometric_sum(a: Array, b: Array, *, alpha: Share = 0.5) -> Array:
    """Geometric Sum

    R = Re(A^(1-alpha) B^alpha), the complex power's principal branch

    With m = |A|^(1-alpha) |B|^alpha: equal signs give sign m; A > 0 > B gives m cos(pi alpha);
    A < 0 < B gives m cos(pi (1 - alpha)); a zero on either side gives 0. alpha is the share of B:
    0 is exactly A, 1 exactly B. Elements that differ much in size end near the smaller one.
    Source: sd-mecha `geometric_sum`.
    """
    if alpha in (0, 1):
        return b if alpha else a
    turn = math.cos(math.pi * alpha)  # cos(pi (1 - x)) = -cos(pi x)
    if not is_numpy_array(a):
        return _powers(a, b, alpha, turn)
    x, y = flatten(a), flatten(b)
    with np.errstate(all="ignore"):
        # A |B / A|^alpha: a logarithm and its inverse take half as long as two powers, and those of
        # a ratio near 1 lose no digits.
        r = y / x
        factor = turning(r, turn)
        np.abs(r, out=r)
        odd = outside(r, 2.0**-64, 2.0**64)
        np.log(r, out=r)
        r *= alpha
        np.exp(r, out=r)
        r *= x
        r *= factor
        for at in range(0, odd.size, ODD):
            some = odd[at : at + ODD]
            r[some] = _powers(x[some], y[some], alpha, turn)
    return r.reshape(a.shape)


def _powers(a: Array, b: Array, alpha: float, turn: float) -> Array:
    """`geometric_sum` as it is written."""
    xp = namespace(a, b)
    size = xp.abs(a) ** (1 - alpha) * xp.abs(b) ** alpha
    return signed(size, a) * choose((a < 0) ^ (b < 0), turn, 1.0)


@method("elementwise")
def multiply_difference(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.5,
) -> Array:
    """Multiply Difference

    R = C + copysign(|A - C|^(1-alpha) |B - C|^alpha, (1 - beta) A + beta B - C)

    The sizes of the two differences from C are mixed geometrically by alpha (share of B), so only
    what both models changed survives; beta decides whose sign wins. alpha = beta = 0 is exactly A,
    alpha = beta = 1 exactly B.
    Source: meh and SD.Next `multiply_difference`.
    """
    if alpha == beta and alpha in (0, 1):
        return b if alpha else a
    x, y = a - c, b - c
    sign = x * (1 - beta)
    sign += y * beta
    sizes = []
    for d, e in ((x, 1 - alpha), (y, alpha)):
        if e:  # 0 ** 0 is 1 and would move what a model left alone
            size = magnitude(d)
            size **= e
            sizes.append(size)
    r = signed(reduce(imul, sizes), sign)
    r += c
    return r


@method("elementwise")
def multiply_quotient(
    a: Array, b: Array, c: Array, *, alpha: Annotated[float, Range(low=0)] = 1.0
) -> Array:
    """Multiply Quotient

    a = ln|A/C|, b = ln|B/C|, t = max(|a|, |b|)
    e = alpha max(0, -a b / t^2);  R = Re(A (B/C)^e)

    Multiplies A by the ratio B/C only where A and B moved away from C in opposite directions (one
    grew, one shrank). Elsewhere, where any of the three is 0, and at alpha 0 it is exactly A.
    Source: sd-mecha `multiply_quotient`.
    """
    xp = namespace(a, b, c)
    usable = (a != 0) & (b != 0) & (c != 0)
    log_a, log_b, log_c = (xp.log(clip(xp.abs(x), LEAST)) for x in (a, b, c))
    log_a -= log_c
    log_b -= log_c
    e = clip(_agreement(log_a, log_b) * -alpha, 0.0) * xp.astype(usable, a.dtype)
    turn = choose((b < 0) == (c < 0), 1.0, xp.cos(math.pi * e))
    return a * (xp.exp(e * log_b) * turn)


@method("elementwise")
def train_difference(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Train Difference

    s = |B - A| / (|B - A| + |B - C|);  R = A + 1.8 alpha s (B - C)

    Adds B - C as if it had been trained into A: much where A is still far from B, nothing where A
    is there already. s is 0 where its denominator is. alpha 0 is exactly A; the usual value is 1.
    Source: supermerger `trainDifference`; sd-mecha `train_difference_mask`.
    """
    d, distance = b - c, magnitude(b - a)
    whole = namespace(d).abs(d)
    whole += distance
    distance /= clip(whole, LEAST, out=whole)
    d *= distance
    d *= 1.8 * alpha
    d += a
    return d


@method("elementwise")
def add_opposite(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Add Opposite

    m = |A - B| / (|A - B| + |A + B - 2 C|);  R = A + 2 alpha m (B - C)

    Adds B - C where A and B moved away from C in opposite directions (m = 1), half where only one
    moved, not where both moved alike (m = 0). alpha 0 is exactly A.
    Source: sd-mecha `add_opposite`.
    """
    d = b - c
    whole = magnitude((a - c) + d)
    m = magnitude(a - b)
    whole += m
    m /= clip(whole, LEAST, out=whole)
    m *= d
    m *= 2 * alpha
    m += a
    return m


@method("elementwise")
def add_strict_opposite(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Add Strict Opposite

    t = max(|A - C|, |B - C|);  m = max(0, (C - A) (B - C) / t^2);  R = A + 2 alpha m (B - C)

    As `add_opposite`, but nothing is added unless A and B moved away from C in opposite directions.
    alpha 0 is exactly A.
    Source: sd-mecha `add_strict_opposite`.
    """
    d = b - c
    r = clip(_agreement(c - a, d), 0.0, 1.0)
    r *= d
    r *= 2 * alpha
    r += a
    return r


@method("elementwise")
def similarity_add_difference(
    a: Array, b: Array, c: Array, *, alpha: float = 0.5, beta: Share = 0.5
) -> Array:
    """Similarity Add Difference

    s = beta (A B / max(|A|, |B|)^2 + 1) / 2;  P = A + alpha (B - C);  Q = A + alpha/2 (B - A)
    R = (1 - s) P + s Q

    Where A and B are alike (s near beta) it averages them, elsewhere it adds the difference B - C.
    s is beta where both are 0. alpha 0 is exactly A; beta 0 is `add_difference`.
    Source: meh and SD.Next `similarity_add_difference`.
    """
    p, q = b - c, b - a
    p *= alpha
    p += a
    q *= alpha / 2
    q += a
    s = _agreement(a, b, otherwise=1.0)  # where both are 0 the similarity counts as 1
    s += 1
    s *= beta / 2
    q -= p
    q *= s
    q += p
    return q


@method("elementwise")
def nearswap(a: Array, b: Array, *, t: Annotated[float, Range(low=0)] = 1e-4) -> Array:
    """Near Swap

    w = min(t / max(|A - B|, 1e-6), 1);  R = (1 - w) A + w B

    Takes B where the two models are closer than t, and ever less of it where they are further
    apart. t 0 is exactly A; an element closer than t (and 1e-6) is exactly B's.
    Source: mergekit `nearswap`.
    """
    d = b - a
    w = t / clip(namespace(d).abs(d), 1e-6)
    d *= w
    d += a
    return choose(w >= 1, b, d)


@method("elementwise")
def maximum(a: Array, b: Array) -> Array:
    """Maximum

    R = max(A, B)

    The larger of the two numbers, sign included; moves all weights upwards.
    Source: `MAX` of Chattiori-Model-Merger, from idelairre's merger.
    """
    return namespace(a, b).maximum(a, b)


@method("elementwise")
def minimum(a: Array, b: Array) -> Array:
    """Minimum

    R = min(A, B)

    The smaller of the two numbers, sign included; moves all weights downwards.
    Source: the counterpart of `maximum`.
    """
    return namespace(a, b).minimum(a, b)


@method("elementwise")
def magmax(base: Array, *models: Array, scale: float = 0.5) -> Array:
    """Largest Change (MagMax)

    d_i = X_i - X_0;  R = X_0 + scale d_j, j the model with the largest |d_i|

    Of all models the one that changed an element most decides it; of equal ones the later. scale 0
    is exactly the base.
    Source: MagMax, arXiv:2407.06322; fusion_bench `magmax`.
    """
    xp = namespace(base, *models)

    def larger(x: Array, y: Array) -> Array:
        return choose((xp.abs(y) >= xp.abs(x)) | (y != y), y, x)  # NaN is not lost, and is told

    return base + reduce(larger, (x - base for x in models)) * scale


@method("elementwise")
def clamp(a: Array, *bounds: Array, stiffness: Share = 0.0) -> Array:
    """Clamp

    L = min_i P_i, U = max_i P_i;  R = min(max(A, L), U)

    Keeps A within what the other models P_i span, element by element. stiffness narrows that span
    from the outermost bounds (0) to the two next to the mean of all bounds (1); it needs three
    bounds or more to matter. One bound alone replaces A.
    Source: sd-mecha `clamp`.
    """
    xp = namespace(a, *bounds)
    low, high = reduce(xp.minimum, bounds), reduce(xp.maximum, bounds)
    if stiffness and len(bounds) > 2:
        mean = sum(bounds) / len(bounds)
        mean = xp.minimum(xp.maximum(mean, low), high)  # rounding may have put it outside
        above = reduce(xp.minimum, (choose(p >= mean, p, math.inf) for p in bounds))
        below = reduce(xp.maximum, (choose(p <= mean, p, -math.inf) for p in bounds))
        low, high = lerp(low, below, stiffness), lerp(high, above, stiffness)
    return xp.minimum(xp.maximum(a, low), high)


@method("elementwise")
def clip_to_ab(r: Array, a: Array, b: Array) -> Array:
    """Clip to A and B

    R = min(max(R, min(A, B)), max(A, B))

    A finishing step: keeps the result of an earlier one between two models, element by element.
    After `add_difference` it is the clipped add difference.
    Source: `--weights_clip` of meh, `clamp_to_ab` of sd-mecha.
    """
    return clamp(r, a, b)


@method("tensor")
def plus_random(a: Array, *, alpha: float = 0.0, key: str, rng: Rng) -> Array:
    """Plus Random

    R = A + alpha n, n normally distributed (mean 0, standard deviation 1)

    Adds noise; alpha is its standard deviation (try 0.001). Keys that contain to_out, proj_out or
    norm stay as they are. The noise of a tensor depends on the seed and its key alone. alpha 0 is
    exactly A.
    Source: supermerger calcmode `plus random`, here with a seed.
    """
    return a if alpha == 0 or keeps_scale(key) else a + normal(rng(0), a) * alpha


def _agreement(x: Array, y: Array, otherwise: float = 0.0) -> Array:
    """x y / max(|x|, |y|)^2: 1 where equal, -1 where opposite, `otherwise` where both are 0."""
    xp = namespace(x, y)
    t = xp.maximum(xp.abs(x), xp.abs(y))
    least = clip(t, LEAST)
    r = x / least
    r *= y / least  # two quotients, because t^2 of small weights is 0 in float32
    return r + xp.astype(t == 0, r.dtype) * otherwise if otherwise else r
