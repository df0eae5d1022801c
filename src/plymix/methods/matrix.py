"""Methods that factorise the weight matrix of one key: SVD, QR, rotations.

A tensor of more than two axes is seen as rows of its first axis, `(o, i kh kw)`. Everything here
costs O(n^3) in the smaller side. Matrices whose smaller side is at most `EXACT` are computed in
float64; larger ones, where float64 would double minutes, in the arrays' own float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from array_api_compat import device

from plymix.methods import Array
from plymix.methods.arrays import (
    Rng,
    add_up,
    blockwise,
    combine,
    copy_of,
    lerp,
    namespace,
    norm,
    normal,
)
from plymix.methods.selection import as_matrix
from plymix.methods.task.ties import ties
from plymix.registry import Range, Share, method

EXACT = 768
"""Smaller side up to which a matrix is computed in float64."""

EMBEDDINGS = (
    "token_embedding.weight",
    "position_embedding.weight",
    "positional_embedding",
    "embed_tokens.weight",
    "shared.weight",
)
"""Ends of the keys of look-up tables: their rows are separate vectors, not one linear map."""

PHASE = 0.7390851
"""Any angle: `_power` tells eigenvalues e^{it} apart by cos(t - PHASE)."""


def _precise(x: Array) -> Array:
    xp = namespace(x)
    return xp.astype(x, xp.float64) if min(x.shape) <= EXACT else x


def _back(x: Array, original: Array) -> Array:
    xp = namespace(x)
    return xp.reshape(xp.astype(x, original.dtype), original.shape)


def _svd(x: Array) -> tuple[Array, Array, Array]:
    """The thin SVD; all NaN where `x` is not finite, with which LAPACK's does not converge."""
    xp, finite = namespace(x), _finite(x)
    u, s, vh = xp.linalg.svd(x if finite else xp.zeros_like(x), full_matrices=False)
    return (u, s, vh) if finite else (u * math.nan, s * math.nan, vh * math.nan)


def _finite(*xs: Array) -> bool:
    return all(bool(namespace(x).all(namespace(x).isfinite(x))) for x in xs)


def _t(x: Array) -> Array:
    return namespace(x).matrix_transpose(x)


def _orthogonal(x: Array) -> Array:
    """The nearest matrix with orthonormal columns (or rows): U V^T of x = U S V^T."""
    u, _, vh = _svd(x)
    return u @ vh


def _power(q: Array, exponent: float) -> Array:
    """The real part of an orthogonal matrix to a real power, each eigen-angle times `exponent`.

    q is normal, so its symmetric and skew parts share eigenvectors; those of the Hermitian matrix
    with eigenvalues cos(angle - PHASE) are orthonormal however close the angles lie.
    """
    xp = namespace(q)
    if exponent == int(exponent):
        return xp.linalg.matrix_power(q if exponent > 0 else _t(q), abs(int(exponent)))
    even, odd = (q + _t(q)) / 2, (q - _t(q)) / 2
    _, vectors = xp.linalg.eigh(even * math.cos(PHASE) - 1j * (odd * math.sin(PHASE)))
    values = xp.sum(xp.conj(vectors) * (xp.astype(q, vectors.dtype) @ vectors), axis=0)
    angles = xp.atan2(xp.imag(values), xp.real(values)) * exponent
    turned = vectors * (xp.cos(angles) + 1j * xp.sin(angles))
    return xp.real(turned @ _t(xp.conj(vectors)))


def _turn(u: Array, v: Array, exponent: float, *, proper: bool) -> tuple[Array, Array]:
    """A basis W and, in it, Q^exponent for the rotation Q that takes the columns `u` to `v`.

    Both have orthonormal columns, and Q turns only the space they span, whose basis is W = [u, r].
    What of that space lies outside `u` is taken to what lies outside `v` by the shortest way.
    `proper` avoids a reflection by turning round the last column of `u` (the least important one).
    """
    xp, k = namespace(u), u.shape[1]
    if k == 0:
        return u, xp.zeros((0, 0), dtype=u.dtype, device=device(u))
    w = xp.concat([u, _beyond(u, v)], axis=1)
    q = _t(w) @ v
    if w.shape[1] > k:
        rest = xp.linalg.svd(q, full_matrices=True)[0][:, k:]
        q = xp.concat([q, rest @ _orthogonal(_t(rest[k:, :]))], axis=1)
    if proper and float(xp.linalg.slogdet(q)[0]) < 0:
        q = xp.concat([q[:, : k - 1], -q[:, k - 1 : k], q[:, k:]], axis=1)
    return w, _power(q, exponent)


def _beyond(u: Array, v: Array) -> Array:
    """An orthonormal basis of what the columns of `v` have outside those of `u`."""
    xp = namespace(u)
    if u.shape[0] == u.shape[1]:
        return u[:, :0]
    basis, s, _ = _svd(v - u @ (_t(u) @ v))
    r = basis[:, : int(xp.count_nonzero(s > max(u.shape) * xp.finfo(u.dtype).eps))]
    r = r - u @ (_t(u) @ r)
    r = r[:, xp.linalg.vector_norm(r, axis=0) > 0.5]  # the others were rounding inside u
    return xp.linalg.qr(r)[0] if r.shape[1] else r


def _rotated(x: Array, w: Array, q: Array) -> Array:
    """Each row of `x`, seen in the basis `w`, turned by `q`; what lies outside `w` stays."""
    inside = x @ w
    return x + (inside @ _t(q) - inside) @ _t(w)


# -- rotations ------------------------------------------------------------------------------------


@method("tensor", room=34)
def rotate(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alignment: float = 1.0,
    alpha: float = 0.0,
    centralization: Share = 1.0,
) -> Array:
    """Rotate A towards B

    A' and B' are A and B with their rows' mean, times centralization, taken off;
    Q = the orthogonal matrix with the smallest ||A' Q - B'|| (Procrustes);
    R = lerp(A', B' Q^T, alpha) Q^alignment + centralization * lerp(mean A, mean B, alignment)

    alignment: how far A is turned onto B; 1 is as close as a rotation can bring it, fractions turn
    part of the way, negative values away. alpha: how much of what the rotation cannot explain is
    taken from B. alignment = alpha = 0 is exactly A, 1 and 1 exactly B. c: the differences A - C
    and B - C are rotated and the result is added to C.
    A k x k convolution with k > 1 is seen as (o i, k k), any other tensor as (o, rest). For a
    fraction of a Q that contains a reflection, the weakest direction is turned round to make it a
    rotation. Where rows are fewer than columns, Q turns only the space that the rows of A' and B'
    span. 1-D tensors, and tensors equal to half precision, are lerp(A, B, alpha).
    sd-mecha's map for wide matrices, x - x V V^T + x U V^T, is not orthogonal, and depends on
    rounding where the rows are dependent; fractions there follow another curve (Stiefel) between
    the same ends.
    Source: sd-mecha `rotate`; the orthogonal Procrustes problem, Schoenemann 1966.
    """
    if c is not None:
        x, y = combine((1, -1), (a, c)), combine((1, -1), (b, c))
        moved = rotate(x, y, alignment=alignment, alpha=alpha, centralization=centralization)
        return combine((1, 1), (c, moved))
    if alignment == alpha and alpha in (0, 1):
        return lerp(a, b, alpha)
    xp = namespace(a, b)
    near = xp.abs(a - b) <= 1e-8 + 1e-3 * xp.abs(b)
    if a.ndim < 2 or bool(xp.all(near)):
        return lerp(a, b, alpha)
    taps = math.prod(a.shape[2:])
    shape = (-1, taps) if taps > 1 else (a.shape[0], -1)
    x, y = (_precise(xp.reshape(v, shape)) for v in (a, b))
    if not _finite(x, y):
        return _back(x * math.nan, a)
    mean_x, mean_y = (xp.mean(v, axis=0, keepdims=True) * centralization for v in (x, y))
    x, y = x - mean_x, y - mean_y
    if x.shape[0] >= x.shape[1]:
        u, _, vh = _svd(_t(x) @ y)
        v = _t(vh)
    else:
        (qx, rx), (qy, ry) = xp.linalg.qr(_t(x)), xp.linalg.qr(_t(y))
        left, s, right = _svd(rx @ _t(ry))
        rank = int(xp.count_nonzero(s > s[0] * max(x.shape) * xp.finfo(s.dtype).eps))
        u, v = qx @ left[:, :rank], qy @ _t(right)[:, :rank]
    mean = mean_x + (mean_y - mean_x) * alignment
    inside = x @ u
    if alignment == 1 and alpha == 0 and norm(inside) >= norm(x) * (1 - 1e-6):
        # All of x lies in the columns of u, so no more of Q is needed.
        return _back(inside @ _t(v) + mean, a)
    whole = alignment == int(alignment)
    w, q = _turn(u, v, 1.0 if alpha else alignment, proper=not whole)
    if alpha:
        x = lerp(x, _rotated(y, w, _t(q)), alpha)
        q = _power(q, alignment) if w.shape[1] else q
    return _back(_rotated(x, w, q) + mean, a)


@method("tensor", room=50)
def polar(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Interpolate Rotation and Stretch Separately

    A = U_A P_A and B = U_B P_B (polar decomposition: U orthonormal, P positive semidefinite);
    R = U P with U on the geodesic from U_A to U_B at alpha and P = lerp(P_A, P_B, alpha)

    alpha: share of B; 0 is exactly A, 1 exactly B. A matrix with more columns than rows is treated
    as its transpose. Where no rotation leads from U_A to U_B (one is a mirror image), one direction
    shrinks to 0 and grows again. 1-D tensors are lerp(A, B, alpha).
    Source: sd-optim `polar`; Higham, Computing the polar decomposition, 1986.
    """
    if a.ndim < 2 or alpha in (0, 1):
        return lerp(a, b, alpha)
    x, y = _precise(as_matrix(a)), _precise(as_matrix(b))
    if not _finite(x, y):
        return _back(x * math.nan, a)
    wide = x.shape[0] < x.shape[1]
    if wide:
        x, y = _t(x), _t(y)
    (ux, sx, vx), (uy, sy, vy) = _svd(x), _svd(y)
    ox, oy = ux @ vx, uy @ vy
    w, q = _turn(ox, oy, alpha, proper=False)
    px, py = (_t(v) @ (s[:, None] * v) for s, v in ((sx, vx), (sy, vy)))
    r = w @ (q @ (_t(w) @ ox)) @ lerp(px, py, alpha)
    return _back(_t(r) if wide else r, a)


@method("tensor", room=16)
def pop_lora(a: Array, b: Array, *, key: str, alpha: float = 1.0, ratio: Share = 0.25) -> Array:
    """Pivoted Projection of the Difference (PoP)

    D = Q Q^T (B - A) with Q an orthonormal basis of A's columns; D is then replaced by its
    projection on its own r most independent columns (column-pivoted QR);  R = A + alpha D_r

    alpha: strength. ratio: r = max(1, int(ratio * min(o, i))) columns. For square or wide matrices
    of full rank Q Q^T is the identity. 1-D tensors and embedding tables are lerp(A, B, alpha).
    Source: sd-optim `pop_lora`; Businger & Golub 1965 for the pivoting.
    """
    if a.ndim < 2 or key.endswith(EMBEDDINGS):
        return lerp(a, b, alpha)
    x, y = _precise(as_matrix(a)), _precise(as_matrix(b))
    xp = namespace(x)
    d = y - x
    if x.shape[0] > x.shape[1]:
        q = xp.linalg.qr(x)[0]
        d = q @ (_t(q) @ d)
    rest, sizes = d + 0.0, xp.sum(d * d, axis=0)
    floor = float(xp.max(sizes)) * xp.finfo(d.dtype).eps ** 2
    for _ in range(max(1, int(ratio * min(d.shape)))):
        pivot = int(xp.argmax(sizes))
        if float(sizes[pivot]) <= floor:
            break
        direction = rest[:, pivot : pivot + 1] / xp.sqrt(sizes[pivot])
        rest = rest - direction @ (_t(direction) @ rest)
        sizes = xp.sum(rest * rest, axis=0)
    return _back(x + alpha * (d - rest), a)


# -- truncation of a difference -------------------------------------------------------------------


def _leading(x: Array, rank: int, rng: Rng, iterations: int) -> tuple[Array, Array, Array]:
    """The leading singular triplets: exact for `iterations` 0, else in a random subspace.

    Halko, Martinsson & Tropp, arXiv:0909.4061: eight spare columns and power iterations with QR.
    """
    width = min(rank + 8, *x.shape)
    if iterations == 0 or width == min(x.shape):
        u, s, vh = _svd(x)
    else:
        xp = namespace(x)
        basis = normal(rng(0), xp.empty((x.shape[1], width), dtype=x.dtype, device=device(x)))
        q = xp.linalg.qr(x @ basis)[0]
        for _ in range(iterations):
            q = xp.linalg.qr(x @ xp.linalg.qr(_t(x) @ q)[0])[0]
        u, s, vh = _svd(_t(q) @ x)
        u = q @ u
    return u[:, :rank], s[:rank], vh[:rank, :]


@method("tensor", delta=True, room=10)
def truncate_rank(
    delta: Array,
    *,
    rng: Rng,
    rank: Annotated[int, Range(0)] = 0,
    ratio: Share = 0.25,
    iterations: Annotated[int, Range(0, 20)] = 2,
) -> Array:
    """Low-Rank Part of a Difference

    R = U_r S_r V_r^T, the nearest matrix of rank r to the difference seen as (o, rest)

    rank: r; 0 takes r = round(ratio * min(o, rest)) instead. r is limited to 0..min(o, rest): 0
    gives zeros, the full rank the difference itself. iterations: power iterations of the randomised
    SVD, whose start is drawn from (seed, key); 0 computes the exact SVD, which is much slower.
    1-D tensors are returned as they are.
    Source: Eckart-Young; arXiv:0909.4061; sd-mecha `truncate_rank`.
    """
    xp = namespace(delta)
    if delta.ndim < 2:
        return copy_of(delta)
    x = _precise(as_matrix(delta))
    most = min(x.shape)
    r = min(rank or round(ratio * most), most)
    if r == 0:
        return xp.zeros_like(delta)
    if r == most:
        return copy_of(delta)
    u, s, vh = _leading(x, r, rng, iterations)
    return _back((u * s) @ vh, delta)


@method("tensor", delta=True, room=11)
def truncate_kronecker(
    delta: Array,
    *,
    rng: Rng,
    ratio: Share = 0.5,
    iterations: Annotated[int, Range(0, 20)] = 4,
) -> Array:
    """Nearest Kronecker Product of a Difference

    R = W1 (x) W2 with W1 of shape (m1, n1) and W2 of (m2, n2, kh, kw), m1 m2 = o and n1 n2 = i, the
    pair with the smallest ||delta - W1 (x) W2|| (Van Loan & Pitsianis): what a LoKr can hold.

    ratio: size of W1 among the possible divisors, 0 smallest, 1 largest, 0.5 as balanced as can be.
    iterations: power iterations of the randomised rank-1 SVD; 0 computes the exact one.
    1-D tensors are returned as they are.
    Source: Van Loan & Pitsianis 1993; LyCORIS LoKr; sd-mecha `truncate_kronecker`.
    """
    if delta.ndim < 2:
        return copy_of(delta)
    xp = namespace(delta)
    o, i, taps = delta.shape[0], delta.shape[1], math.prod(delta.shape[2:])
    m1, n1 = _kronecker_shape(o, i, o * i * taps, ratio)
    m2, n2 = o // m1, i // n1
    split = xp.permute_dims(xp.reshape(delta, (m1, m2, n1, n2, taps)), (0, 2, 1, 3, 4))
    x = _precise(xp.reshape(split, (m1 * n1, m2 * n2 * taps)))
    u, s, vh = _leading(x, 1, rng, iterations)
    product = xp.reshape((u * s) @ vh, (m1, n1, m2, n2, taps))
    return _back(xp.permute_dims(product, (0, 2, 1, 3, 4)), delta)


def _kronecker_shape(o: int, i: int, count: int, ratio: float) -> tuple[int, int]:
    """The divisors (m1, n1) of (o, i) whose product has the asked size; the squarest of equals."""

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    pairs = [(m, n) for m in divisors(o) for n in divisors(i)]
    size = {p: math.log(p[0] * p[1]) - 0.5 * math.log(count) for p in pairs}
    wanted = (2 * ratio - 1) * max(map(abs, size.values()))
    return min(
        pairs, key=lambda p: (round(abs(size[p] - wanted), 9), abs(math.log(p[0] / p[1])), p)
    )


# -- several task matrices ------------------------------------------------------------------------


def _deltas(base: Array, models: Sequence[Array]) -> list[Array]:
    return [_precise(as_matrix(x) - as_matrix(base)) for x in models]


def _plain_mean(base: Array, models: Sequence[Array], scale: float) -> Array:
    """X_0 + scale * mean d_i: what the methods below do to everything that is not a matrix."""
    n = len(models)
    return blockwise(lambda x0, *xs: x0 + add_up([x - x0 for x in xs]) * (scale / n), base, *models)


def _onto(base: Array, d: Array, scale: float) -> Array:
    return base + scale * _back(d, base)


@method("tensor", room=19)
def tsv_m(base: Array, *models: Array, scale: float = 1.0) -> Array:
    """Task Singular Vectors

    d_i = U_i S_i V_i^T; each model keeps its k = int(min(o, i) / n) leading triplets, all are put
    side by side, U and V are replaced by their nearest orthonormal matrices, d = U S V^T;
    R = X_0 + scale * d

    Making the models' singular vectors orthogonal takes out their interference. At least one
    triplet of each is kept. Tensors that are not matrices get the mean of the d_i.
    Models with equal differences have no distinct vectors to make orthogonal; the result is then
    one of several.
    Source: Task Singular Vectors, arXiv:2412.00081; fusion_bench.
    """
    if base.ndim != 2:
        return _plain_mean(base, models, scale)
    xp = namespace(base)
    k = max(1, min(base.shape) // len(models))
    parts = [_svd(d) for d in _deltas(base, models)]
    u = _orthogonal(xp.concat([u[:, :k] for u, _, _ in parts], axis=1))
    s = xp.concat([s[:k] for _, s, _ in parts])
    v = _orthogonal(xp.concat([vh[:k, :] for _, _, vh in parts], axis=0))
    return _onto(base, (u * s) @ v, scale)


@method("tensor", room=11)
def iso_c(base: Array, *models: Array, scale: float = 1.0) -> Array:
    """Isotropic Merging in the Common Subspace

    sum_i d_i = U S V^T;  d = mean(S) U V^T;  R = X_0 + scale * d

    All directions of the summed change become equally strong. Tensors that are not matrices get
    the mean of the d_i.
    Source: No Task Left Behind, arXiv:2502.04959; fusion_bench.
    """
    if base.ndim != 2:
        return _plain_mean(base, models, scale)
    xp = namespace(base)
    u, s, vh = _svd(add_up(_deltas(base, models)))
    return _onto(base, xp.mean(s) * (u @ vh), scale)


@method("tensor", room=33)
def iso_cts(base: Array, *models: Array, common: Share = 0.8, scale: float = 1.0) -> Array:
    """Isotropic Merging in Common and Task-Specific Subspaces

    Of the r = min(o, i) directions, t = round((r - int(common r)) / n) are given to each model and
    the rest to the leading singular vectors U_c of sum_i d_i; model i's are the leading ones of
    d_i - U_c U_c^T d_i. All are put side by side and made orthonormal; d = mean(S) U V^T;
    R = X_0 + scale * d

    common: share of the directions that the models have in common; 1 is `iso_c`. Tensors that are
    not matrices get the mean of the d_i.
    Source: No Task Left Behind, arXiv:2502.04959; fusion_bench.
    """
    if base.ndim != 2:
        return _plain_mean(base, models, scale)
    xp, n, r = namespace(base), len(models), min(base.shape)
    own = min(round((r - int(common * r)) / n), r // n)  # directions of each model
    ds = _deltas(base, models)
    u, s, vh = (p[..., : r - own * n] for p in _columns(_svd(add_up(ds))))
    parts = [(u, s, vh)]
    if own:
        rests = [d - u @ (_t(u) @ d) for d in ds]
        parts += [tuple(p[..., :own] for p in _columns(_svd(d))) for d in rests]
    all_u, all_s, all_v = (xp.concat(list(p), axis=-1) for p in zip(*parts, strict=True))
    return _onto(base, xp.mean(all_s) * (_orthogonal(all_u) @ _t(_orthogonal(all_v))), scale)


def _columns(parts: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    u, s, vh = parts
    return u, s, _t(vh)


@method("tensor", room=18)
def knots(
    base: Array, *models: Array, density: Share = 0.2, normalize: bool = True, scale: float = 1.0
) -> Array:
    """KnOTS: TIES in Aligned Coordinates

    [d_1 .. d_n] side by side along the inputs = U S [V_1 .. V_n]; V = TIES of the V_i (about 0);
    d = U S V;  R = X_0 + scale * d

    density and normalize: as in `ties`. Tensors that are not matrices get the mean of the d_i.
    Source: KnOTS, arXiv:2410.19735; fusion_bench.
    """
    if base.ndim != 2:
        return _plain_mean(base, models, scale)
    xp, width = namespace(base), base.shape[1]
    u, s, vh = _svd(xp.concat(_deltas(base, models), axis=1))
    own = [vh[:, i * width : (i + 1) * width] for i in range(len(models))]
    v = ties(xp.zeros_like(own[0]), *own, density=density, normalize=normalize)
    return _onto(base, (u * s) @ v, scale)


@method("tensor", room=32)
def wudi(
    base: Array,
    *models: Array,
    steps: Annotated[int, Range(0, 100000)] = 300,
    rate: Annotated[float, Range(0)] = 1e-5,
    scale: float = 1.0,
) -> Array:
    """WUDI: Least Interference with Every Task

    d starts at sum_i d_i and is improved by Adam on
    sum_i ||(d - d_i) d_i^T||^2 / ||d_i||^2;  R = X_0 + scale * d

    The rows of d_i stand for the inputs of task i, which are not known. steps and rate: iterations
    and learning rate of Adam (0.9, 0.999, 1e-8). Models equal to the base do not count. Tensors
    that are not matrices get the mean of the d_i. Slow: each step multiplies two whole matrices.
    Source: Whoever Started the Interference Should End It, arXiv:2503.08099; fusion_bench.
    """
    if base.ndim != 2:
        return _plain_mean(base, models, scale)
    xp = namespace(base)
    ds = _deltas(base, models)
    d = add_up(ds)
    powers = [float(xp.sum(x * x)) for x in ds]
    terms: list[tuple[Any, Any]] = [
        (_t(x) @ x / p, x @ (_t(x) @ x) / p) for x, p in zip(ds, powers, strict=True) if p > 0
    ]
    if not terms:
        return _onto(base, d, scale)
    # The gradient of the loss is 2 (d K - L): both are fixed.
    gram, goal = (add_up(part) for part in zip(*terms, strict=True))
    mean, square = xp.zeros_like(d), xp.zeros_like(d)
    for step in range(1, steps + 1):
        g = 2 * (d @ gram - goal)
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g * g
        root = xp.sqrt(square / (1 - 0.999**step)) + 1e-8
        d = d - rate * (mean / (1 - 0.9**step)) / root
    return _onto(base, d, scale)
