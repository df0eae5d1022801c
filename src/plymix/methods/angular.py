"""Methods that treat a tensor as a direction with a length.

Where a result is a sum of the models whose coefficients follow from their dot products (slerp and
its relatives), the dot products are read off in one pass and the sum is made in a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.methods.arrays import (
    as_lines,
    as_rows,
    blockwise,
    clip,
    column_products,
    combine,
    dot,
    gram,
    lerp,
    namespace,
    norm,
    row_products,
    rowwise,
)
from plymix.registry import Range, Share, method

FLAT = 1e-6
"""Below this sine two vectors count as parallel or opposite, and slerp as a weighted sum."""


@method("tensor")
def slerp(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Spherical Interpolation (Slerp)

    a = A/|A|, b = B/|B|, w = arccos(a . b)
    R = (sin((1 - alpha) w) a + sin(alpha w) b) / sin w * ((1 - alpha) |A| + alpha |B|)

    Turns A's direction towards B's at even speed and interpolates the length apart from that. alpha
    is the share of B: 0 is exactly A, 1 exactly B. Falls back to a weighted sum where either norm
    is 0 or the two are parallel or opposite (sin w < 1e-6).
    Source: sd-mecha `slerp`; K. Shoemake, Animating rotation with quaternion curves (1985).
    """
    if alpha in (0, 1):
        return b if alpha else a
    (aa, ab), (_, bb) = gram(a, b).tolist()
    length_a, length_b = math.sqrt(aa), math.sqrt(bb)
    w = _angle(ab, length_a * length_b)
    if length_a == 0 or length_b == 0 or math.sin(w) < FLAT:
        return lerp(a, b, alpha)
    length = (1 - alpha) * length_a + alpha * length_b
    s, t = (math.sin(share * w) / math.sin(w) * length for share in (1 - alpha, alpha))
    return combine((s / length_a, t / length_b), (a, b))


@method("tensor")
def slerp_mergekit(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Spherical Interpolation (Mergekit)

    w = arccos(A . B / (|A| |B|));  R = (sin((1 - alpha) w) A + sin(alpha w) B) / sin w

    The weights of slerp on tensors of their own length, so lengths are not interpolated exactly.
    alpha is the share of B: 0 is exactly A, 1 exactly B. A weighted sum where |cos w| > 0.9995; a
    tensor whose norm is below 1e-8 is not normalised.
    Source: mergekit `slerp`.
    """
    if alpha in (0, 1):
        return b if alpha else a
    (aa, ab), (_, bb) = gram(a, b).tolist()
    length_a, length_b = (x if x > 1e-8 else 1.0 for x in (math.sqrt(aa), math.sqrt(bb)))
    w = _angle(ab, length_a * length_b)
    if abs(math.cos(w)) > 0.9995:
        return lerp(a, b, alpha)
    return combine([math.sin(share * w) / math.sin(w) for share in (1 - alpha, alpha)], (a, b))


@method("tensor")
def nuslerp(
    a: Array,
    b: Array,
    base: Array | None = None,
    *,
    alpha: float = 0.5,
    axis: Literal["tensor", "last", "first"] = "tensor",
) -> Array:
    """Spherical Interpolation (NuSlerp)

    With w the angle between two vectors u of A and v of B (of A - base and B - base where a base
    is given, which is then added back):
    R = (sin((1 - alpha) w) u + sin(alpha w) v) / sin w

    axis says what a vector is: the whole tensor, or everything that differs only in the last or in
    the first index. alpha is the share of B (in mergekit's weights w_B / (w_A + w_B)): 0 is exactly
    A, 1 exactly B. A weighted sum where sin w < 1e-6. Tensors of one dimension are one vector.
    Source: mergekit `nuslerp` (`flatten`, and without it `row_wise` false or true).
    """
    if alpha in (0, 1):
        return b if alpha else a
    if axis == "tensor" or len(a.shape) < 2:
        (uu, uv), (_, vv) = _gram_of((a, b), base).tolist()
        w = _angle(uv, max(math.sqrt(uu), 1e-7) * max(math.sqrt(vv), 1e-7))
        p, q = 1 - alpha, alpha
        if math.sin(w) >= FLAT:
            p, q = (math.sin(share * w) / math.sin(w) for share in (p, q))
        return _around(base, (p, q), (a, b))
    xp, view = namespace(a), as_rows if axis == "first" else as_lines
    x, y = view(a), view(b)
    given = [] if base is None else [view(base)]

    def shares(xx: Array, xy: Array, yy: Array) -> tuple[Array, Array]:
        lengths = clip(xp.sqrt(xx), 1e-7) * clip(xp.sqrt(yy), 1e-7)
        w = xp.acos(clip(xy / lengths, -1.0, 1.0))
        flat = xp.sin(w) < FLAT
        sine = xp.where(flat, 1.0, xp.sin(w))
        p = xp.where(flat, 1 - alpha, xp.sin((1 - alpha) * w) / sine)
        q = xp.where(flat, alpha, xp.sin(alpha * w) / sine)
        return xp.astype(p, a.dtype), xp.astype(q, a.dtype)

    of_columns = shares(*column_products(x, y, *given)) if axis == "first" else None

    def turn(x: Array, y: Array, *base: Array) -> Array:
        if base:
            x, y = x - base[0], y - base[0]
        p, q = of_columns or shares(*row_products(x, y))
        moved = x * p
        moved += y * q
        return moved + base[0] if base else moved

    return xp.reshape(rowwise(turn, x, y, *given), a.shape)


@method("tensor")
def norm_direction(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Norm and Direction

    u = normalise((1 - alpha) A/|A| + alpha B/|B|);  R = u ((1 - alpha) |A| + alpha |B|)

    Averages directions and lengths apart from one another (a cheaper slerp). alpha is the share of
    B: 0 is exactly A, 1 exactly B. A weighted sum where the averaged direction vanishes.
    Source: `NORM` of Chattiori-Model-Merger.
    """
    if alpha in (0, 1):
        return b if alpha else a
    length_a, length_b = norm(a) + 1e-12, norm(b) + 1e-12
    direction = combine(((1 - alpha) / length_a, alpha / length_b), (a, b))
    size = norm(direction)
    if size < 1e-6:
        return lerp(a, b, alpha)
    factor = ((1 - alpha) * length_a + alpha * length_b) / size
    return blockwise(lambda x: x * factor, direction, out=direction)


@method("tensor", min_models=2)
def multislerp(
    base: Array | None = None,
    *models: Array,
    weights: tuple[float, ...] = (),
    normalize: bool = True,
) -> Array:
    """Spherical Interpolation of Many Models

    u_i = X_i / |X_i|;  R = normalise(sum_i w_i u_i) sum_i w_i |X_i|

    Averages directions and lengths apart from one another. With a base it works on the differences
    from it. weights: one number per model, equal when left out; normalize makes them sum to 1.
    Models whose directions cancel out: a weighted sum for two, refused for more. Mergekit then goes
    one exponential step from this mean direction; the step's length is always 0, as the tangents
    at the mean cancel out.
    Source: mergekit `multislerp`.
    """
    ws = model_weights(weights, len(models), normalize=normalize)
    g = _gram_of(models, base)
    lengths = np.sqrt(np.diagonal(g))
    w = np.array(ws) / (lengths + 1e-8)
    size = math.sqrt(max(float(w @ g @ w), 0.0))  # of sum_i w_i u_i
    if not size < 1e-8:  # nor NaN
        return _around(base, w / size * float(np.array(ws) @ lengths), models)
    if len(models) > 2 and lengths.any():
        raise Refusal(
            "multislerp: the directions of the models cancel out, so they have no mean; "
            "change the weights or use n_average"
        )
    return _around(base, ws, models)


@method("tensor")
def karcher(
    *models: Array,
    weights: tuple[float, ...] = (),
    max_iter: Annotated[int, Range(1, 1000)] = 10,
    tol: Annotated[float, Range(0, 1)] = 1e-5,
) -> Array:
    """Karcher Mean

    The direction u with the least sum of squared angles to all models, found by repeated steps
    u <- exp_u(sum_i w_i log_u(X_i/|X_i|)), times the average length sum_i w_i |X_i|.

    weights: one number per model, equal when left out, made to sum to 1. Tensors with a norm up to
    tol have no direction and count only in the length; where all are so the result is 0. Stops
    after max_iter steps or when a step is shorter than tol.
    Source: Riemannian centre of mass (H. Karcher, 1977); mergekit `karcher`.
    """
    w = np.array(model_weights(weights, len(models), normalize=True))
    g = gram(*models)
    lengths = np.sqrt(np.diagonal(g))
    valid = lengths > tol
    shares = np.where(valid, w, 0.0)
    if not shares.any():
        return namespace(*models).zeros_like(models[0])
    shares = shares / shares.sum()
    scale = np.where(valid, 1 / np.where(valid, lengths, 1.0), 0.0)
    cosines = g * np.outer(scale, scale)

    # u and its tangents are sums of the models' directions: only their coefficients are followed
    def size(x: Any) -> float:
        return math.sqrt(max(float(x @ cosines @ x), 0.0))

    u = shares / size(shares) if size(shares) >= tol else np.eye(len(models))[np.argmax(valid)]
    for _ in range(max_iter):
        c = np.clip(cosines @ u, -1, 1)
        angle = np.arccos(c)
        # a model straight behind u (sin 0) has no direction to go to
        apart = (angle >= tol) & (np.sin(angle) > 1e-12)
        pull = np.where(apart, shares * angle / np.where(apart, np.sin(angle), 1.0), 0.0)
        step = pull - float(pull @ c) * u
        length = size(step)
        if length < tol:
            break
        u = math.cos(length) * u + math.sin(length) / length * step
        u = u / size(u)
    return combine([*(u * scale * float(w @ lengths))], models)


@method("tensor", delta=True)
def perpendicular(a: Array, b: Array) -> Array:
    """Perpendicular Part

    R = B - A (A . B) / |A|^2

    What of the difference B does not point along the difference A; all of B where A is 0.
    Source: sd-mecha `perpendicular_component`.
    """
    aa = dot(a, a)
    return combine((-dot(a, b) / aa, 1.0), (a, b)) if aa else b


@method("tensor")
def add_perpendicular(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Add Perpendicular Difference

    a = A - C, b = B - C;  R = A + alpha (b - a (a . b) / |a|^2)

    Add difference without the part that A already has: only what B learned in other directions.
    alpha 0 is exactly A.
    Source: sd-mecha `add_perpendicular`.
    """
    if alpha == 0:
        return a
    (aa, ab), _ = gram(a, b, c, of=lambda a, b, c: (a - c, b - c)).tolist()
    along = ab / aa if aa else 0.0
    return blockwise(lambda a, b, c: a + ((b - c) - (a - c) * along) * alpha, a, b, c)


@method("tensor")
def ortho_delta(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Orthogonal Difference

    d = B - A;  R = A + alpha (d - A (d . A) / (|A|^2 + 1e-12))

    Moves A towards B without the part of the way that only scales A. alpha 0 is exactly A.
    Source: `ORTHO` of Chattiori-Model-Merger.
    """
    if alpha == 0:
        return a
    (aa, ad), _ = gram(a, b, of=lambda a, b: (a, b - a)).tolist()
    along = ad / (aa + 1e-12)
    return blockwise(lambda a, b: a + ((b - a) - a * along) * alpha, a, b)


@method("tensor", delta=True)
def orthonorm(a: Array, *models: Array, alpha: Annotated[float, Range(low=0)] = 0.0) -> Array:
    """Orthogonalised Sum of Differences

    For each difference m in turn, with S the sum so far and w = A + S:
    g = m - (4/pi) atan2(w . m, w . w) w, stretched to the length of m;  S <- S + alpha g

    Adds differences one after another, each freed from what the ones before it (and A) contain. All
    inputs and the result S are differences; A itself is not part of S. alpha 0 means 1/sqrt(n).
    Source: sd-optim `orthonorm`, a bounded Gram-Schmidt process.
    """
    step = alpha or 1 / math.sqrt(len(models))
    total = blockwise(lambda v: namespace(v).zeros_like(v), a)
    for m in models:
        (ww, wm), (_, mm) = gram(a, total, m, of=lambda a, s, m: (a + s, m)).tolist()
        turn = -4 / math.pi * math.atan2(wm, ww)

        def freed(a: Array, s: Array, m: Array, turn: float = turn) -> Array:
            return m + (a + s) * turn

        length = math.sqrt(gram(a, total, m, of=lambda *xs, f=freed: (f(*xs),))[0, 0])
        factor = step * max(math.sqrt(mm), 1e-6) / max(length, 1e-6)

        def added(a: Array, s: Array, m: Array, f: Any = freed, factor: float = factor) -> Array:
            return s + f(a, s, m) * factor

        total = blockwise(added, a, total, m, out=total)
    return total


@method("tensor")
def euclidean_add_difference(a: Array, b: Array, c: Array, *, alpha: Share = 0.5) -> Array:
    """Euclidean Add Difference

    a = (A - C)/|A - C|, b = (B - C)/|B - C|, v = (1 - alpha) A + alpha B - C
    e = copysign(sqrt((1 - alpha) a^2 + alpha b^2), v);  R = C + e/|e| |v|

    A weighted sum whose differences from C are averaged as squares, so that what only one model
    changed is kept better. alpha is the share of B: 0 is exactly A, 1 exactly B. Where neither
    differs from C it is C.
    Source: meh and SD.Next `euclidean_add_difference`.
    """
    if alpha in (0, 1):
        return b if alpha else a

    def between(a: Array, b: Array, c: Array) -> Array:
        return (a - c) * (1 - alpha) + (b - c) * alpha

    squares = gram(a, b, c, of=lambda a, b, c: (a - c, b - c, between(a, b, c)))
    aa, bb, vv = (float(x) for x in np.diagonal(squares))
    # a and b have length 1 or 0, so |e|^2 is the sum of the shares of those that are not 0
    ee = (1 - alpha) * (aa > 0) + alpha * (bb > 0)
    if ee == 0:
        return c
    scale = vv / ee
    share_a = scale * (1 - alpha) / aa if aa else 0.0
    share_b = scale * alpha / bb if bb else 0.0
    xp = namespace(a, b, c)

    def one(a: Array, b: Array, c: Array) -> Array:
        size = xp.sqrt((a - c) ** 2 * share_a + (b - c) ** 2 * share_b)
        return c + xp.copysign(size, between(a, b, c))

    return blockwise(one, a, b, c)


def _angle(product: float, lengths: float) -> float:
    """The angle between two vectors from their dot product and the product of their lengths."""
    return math.acos(max(-1.0, min(1.0, product / lengths))) if lengths else 0.0


def _gram_of(models: Sequence[Array], base: Array | None) -> Any:
    """Dot products of the models, or of their differences from the base."""
    if base is None:
        return gram(*models)
    return gram(base, *models, of=lambda base, *xs: [x - base for x in xs])


def _around(base: Array | None, coefficients: Sequence[float], models: Sequence[Array]) -> Array:
    """Sum of the models, or of the base and their differences from it, with these coefficients."""
    cs = [float(c) for c in coefficients]
    if base is None:
        return combine(cs, models)
    return blockwise(
        lambda base, *xs: base + sum((x - base) * c for c, x in zip(cs, xs, strict=True)),
        base,
        *models,
    )
