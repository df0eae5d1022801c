"""Low-rank matrices: singular values, truncation, products. Pure functions on numpy arrays.

A change of a weight is a matrix D (m, n), rows of the weight by all its other axes. It is given
whole, or as factors D = up down. `Factored` is its best approximation of every rank up to some
largest one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

Matrix = Any
"""A two-dimensional numpy array of floats."""

SPARE = 10
"""Directions that a randomised decomposition looks at beyond those that are asked for."""

POWER = 2
"""Power iterations of a randomised decomposition."""

WORTH = 0.3
"""Up to this share of all directions, random ones are the quicker way."""

SMALL = 256
"""Of matrices with a side no longer than this all singular values are found as quickly."""


CANCELLED = 1e-7
"""A product so much shorter than its factors is what rounding to float32 left of 0."""


@dataclass(frozen=True)
class Factored:
    """D ~ u diag(s) vt: `u` (m, k) with orthonormal columns, `s` (k,) falling, `vt` (k, n).

    `energy` is |D|^2, the sum of all squared singular values, those beyond k included.
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    energy: float

    def error(self, rank: int) -> float:
        """|D - D_rank|, in the Frobenius norm."""
        kept = math.fsum(float(x) ** 2 for x in self.s[:rank])
        return math.sqrt(max(0.0, self.energy - kept))

    def balanced(self, rank: int) -> tuple[Matrix, Matrix]:
        """up (m, r), down (r, n) in float32, each with the square root of the singular values.

        So neither leaves the range of 16-bit numbers where the other has room.
        """
        root = np.sqrt(self.s[:rank])
        up, down = self.u[:, :rank] * root, root[:, None] * self.vt[:rank]
        return up.astype(np.float32), down.astype(np.float32)


def energy(d: Matrix) -> float:
    """|d|^2, summed in float64."""
    flat = d.reshape(-1)
    step = 1 << 16
    parts = (flat[i : i + step].astype(np.float64) for i in range(0, flat.size, step))
    return math.fsum(float(x @ x) for x in parts)


def vanishes(up: Matrix, down: Matrix) -> bool:
    """Whether `up @ down` is 0 but for rounding: its parts are, or take each other off."""
    u, d = up.astype(np.float64), down.astype(np.float64)
    squared = float(((u.T @ u) * (d @ d.T)).sum())
    return squared <= CANCELLED**2 * energy(up) * energy(down)


def whole(d: Matrix) -> Factored:
    """All singular values of `d`, in float64.

    By the eigenvalues of the smaller Gram matrix: the vectors of one side are orthonormal to the
    last digit and the other side is what they make of `d`, so that the product is `d` whatever
    rounding did to small singular values.
    """
    if d.shape[0] > d.shape[1]:
        found = whole(d.T)
        return Factored(found.vt.T, found.s, found.u.T, found.energy)
    m = d.shape[0]
    gram = np.zeros((m, m))
    step = max(1, (1 << 22) // m)
    for i in range(0, d.shape[1], step):
        part = d[:, i : i + step].astype(np.float64)
        gram += part @ part.T
    values, u = np.linalg.eigh(gram)
    s = np.sqrt(np.maximum(values[::-1], 0.0))
    u = np.ascontiguousarray(u[:, ::-1])
    vt = u.T.astype(d.dtype) @ d
    return Factored(u, s, vt / np.maximum(s, np.finfo(np.float64).tiny)[:, None], energy(d))


def leading(d: Matrix, rank: int, rng: np.random.Generator) -> Factored:
    """The `rank` largest singular values of `d` with their vectors.

    Where they are few of all, by a randomised range finder with power iterations: Halko,
    Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    least = min(d.shape)
    if least <= SMALL or rank + SPARE > WORTH * least:
        found = whole(d)
        return Factored(found.u[:, :rank], found.s[:rank], found.vt[:rank], found.energy)
    q = _basis(d @ rng.standard_normal((d.shape[1], rank + SPARE), dtype=np.float32))
    for _ in range(POWER):
        q = _basis(d @ _basis(d.T @ q))
    inner = whole(q.T @ d)
    return Factored((q @ inner.u)[:, :rank], inner.s[:rank], inner.vt[:rank], energy(d))


def with_energy(d: Matrix, share: float, most: int, rng: np.random.Generator) -> Factored:
    """As many singular values of `d` as hold `share` of its energy, `most` at most."""
    rank, least = min(32, most), min(d.shape)
    while True:
        found = leading(d, min(rank, least), rng)
        if rank >= min(most, least) or rank_for(found, share) < len(found.s):
            return found
        rank = min(2 * rank, most)


def of_product(up: Matrix, down: Matrix) -> Factored:
    """All singular values of `up @ down`, in float64 and without the product where it is large."""
    (m, k), n = up.shape, down.shape[1]
    if k >= min(m, n):
        return whole(up.astype(np.float64) @ down.astype(np.float64))
    q, r = np.linalg.qr(up.astype(np.float64))
    p, t = np.linalg.qr(down.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r @ t.T)
    return Factored(q @ u, s, vt @ p.T, math.fsum(float(x) ** 2 for x in s))


def _basis(x: Matrix) -> Matrix:
    """Orthonormal columns that span those of `x`."""
    return np.linalg.qr(x)[0]


# --- ranks ---------------------------------------------------------------------------------------


def rank_for(found: Factored, share: float) -> int:
    """The least rank that holds `share` of |D|^2; all there are if none does. 0 for D = 0."""
    if found.energy == 0:
        return 0
    # A rounding error of the sums must not cost a rank.
    wanted = share * found.energy * (1 - 1e-12)
    kept = accumulate(float(x) ** 2 for x in found.s)
    return next((r for r, sum_ in enumerate(kept, 1) if sum_ >= wanted), len(found.s))


def ranks_for(spectra: Sequence[Any], costs: Sequence[int], budget: int) -> list[int]:
    """A rank for each matrix, for the least total error in `budget` bytes.

    `spectra` are the singular values of each, falling; `costs` the bytes of one rank of each. Ranks
    are given one by one where a byte takes away most of the squared error, until the next one does
    not fit; then to whatever still fits. A matrix may get none.
    """
    ranks, left = [0] * len(spectra), budget
    waiting = [(-(float(s[0]) ** 2) / c, i) for i, (s, c) in enumerate(_pairs(spectra, costs))]
    heapq.heapify(waiting)
    while waiting:
        gain, i = heapq.heappop(waiting)
        if gain == 0 or costs[i] > left:
            continue
        ranks[i] += 1
        left -= costs[i]
        if ranks[i] < len(spectra[i]):
            heapq.heappush(waiting, (-(float(spectra[i][ranks[i]]) ** 2) / costs[i], i))
    return ranks


def _pairs(spectra: Sequence[Any], costs: Sequence[int]) -> list[tuple[Any, int]]:
    return list(zip(spectra, costs, strict=True))


# --- other families as products ------------------------------------------------------------------


def beside(factors: Sequence[tuple[Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
    """The sum of products as one product: factors side by side."""
    return np.concatenate([u for u, _ in factors], axis=1), np.concatenate([d for _, d in factors])


def joined(factors: Sequence[tuple[Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
    """The same with no more columns than the smaller side of the matrix has: the sum itself times
    the identity, where it would be more."""
    up, down = beside(factors)
    (m, k), n = up.shape, down.shape[1]
    if k <= min(m, n):
        return up, down
    d = up.astype(np.float64) @ down.astype(np.float64)
    return (np.eye(m), d) if m <= n else (d, np.eye(n))


def hadamard(one: tuple[Matrix, Matrix], two: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
    """(a b) * (c d), element by element, as a product of rank r^2: columns of a times those of c,
    and rows of b times those of d, each with each (the face-splitting product)."""
    (a, b), (c, d) = one, two
    up = (a[:, :, None] * c[:, None, :]).reshape(len(a), -1)
    down = (b[:, None, :] * d[None, :, :]).reshape(-1, b.shape[1])
    return up, down


def kronecker(w1: Matrix, w2: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
    """kron(w1, a b) as the product kron(w1, a) kron(1, b)."""
    a, b = w2
    return np.kron(w1, a), np.kron(np.eye(w1.shape[1], dtype=w1.dtype), b)


def nearest_kronecker(
    d: Matrix, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Matrix, Matrix, float]:
    """w1 of `shape` and w2 with the least |d - kron(w1, w2)|, and |d|^2.

    The blocks of d in lines are w1 and w2 in lines, multiplied: their largest singular value.
    Source: Van Loan and Pitsianis, Approximation with Kronecker products, 1993.
    """
    (p, q), (m, n) = shape, d.shape
    blocks = d.reshape(p, m // p, q, n // q).transpose(0, 2, 1, 3).reshape(p * q, -1)
    found = leading(blocks, 1, rng)
    up, down = found.balanced(1)
    return up.reshape(p, q), down.reshape(m // p, n // q), found.energy


def divided(size: int, factor: int) -> int:
    """The smaller factor of `size` for a Kronecker product: the divisor nearest to its root from
    below, or, with a `factor` > 0, the largest divisor that is not larger."""
    most = factor if factor > 0 else math.isqrt(size)
    return max(i for i in range(1, min(most, size) + 1) if size % i == 0)
