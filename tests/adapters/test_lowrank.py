"""Low-rank algebra against numpy's own decomposition in float64."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.adapters import lowrank


def rng(seed=0):
    return np.random.default_rng(seed)


def with_spectrum(m, n, s, seed=0):
    """A float32 matrix with these singular values."""
    u = np.linalg.qr(rng(seed).standard_normal((m, len(s))))[0]
    v = np.linalg.qr(rng(seed + 1).standard_normal((n, len(s))))[0]
    return ((u * s) @ v.T).astype(np.float32)


def rebuilt(f, rank):
    up, down = f.balanced(rank)
    return up.astype(np.float64) @ down


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30), (1, 9), (9, 1)])
def test_all_singular_values(shape):
    d = rng().standard_normal(shape).astype(np.float32)
    f, s = lowrank.whole(d), np.linalg.svd(d.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(f.s, s, rtol=1e-6)
    np.testing.assert_allclose(rebuilt(f, len(s)), d, atol=1e-5)
    assert f.energy == pytest.approx((d.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_what_is_lost_is_the_discarded_singular_values(rank):
    d = rng(3).standard_normal((40, 60)).astype(np.float32)
    s = np.linalg.svd(d.astype(np.float64), compute_uv=False)
    f = lowrank.leading(d, rank, rng())
    want = math.sqrt((s[rank:] ** 2).sum())
    assert f.error(rank) == pytest.approx(want, rel=1e-4)
    assert np.linalg.norm(d - rebuilt(f, rank)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_random_directions_lose_at_most_one_per_cent_more(shape, decay):
    s = np.arange(1, 301) ** -decay
    d = with_spectrum(*shape, s)
    f = lowrank.leading(d, 16, rng(1))
    best = math.sqrt((s[16:] ** 2).sum())
    assert np.linalg.norm(d - rebuilt(f, 16)) <= 1.01 * best
    assert f.error(16) == pytest.approx(np.linalg.norm(d - rebuilt(f, 16)), rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_energy_is_held_by_the_least_rank(share):
    s = np.arange(1, 301) ** -1.0
    d = with_spectrum(400, 300, s)
    f = lowrank.with_energy(d, share, 300, rng(2))
    rank = lowrank.rank_for(f, share)
    held = np.cumsum(s**2) / (s**2).sum()
    assert held[rank - 1] >= share - 1e-5
    assert rank == 1 or held[rank - 2] < share + 1e-5


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_products_are_factored_without_being_made(m, n, k, seed):
    up, down = rng(seed).standard_normal((m, k)), rng(seed + 50).standard_normal((k, n))
    f, s = lowrank.of_product(up, down), np.linalg.svd(up @ down, compute_uv=False)
    r = min(len(s), len(f.s))
    np.testing.assert_allclose(f.s[:r], s[:r], rtol=1e-6, atol=1e-7 * s[0])
    np.testing.assert_allclose(rebuilt(f, r), up @ down, rtol=1e-4, atol=1e-5 * s[0])


@given(st.integers(0, 200), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ranks_fit_the_budget_and_no_byte_is_better_spent(budget, costs, seed):
    spectra = [np.sort(x)[::-1] for x in rng(seed).random((3, 4)) + 0.01]
    ranks = lowrank.ranks_for(spectra, costs, budget)
    assert sum(map(math.prod, zip(ranks, costs, strict=True))) <= budget

    def lost(ranks):
        return sum((s[r:] ** 2).sum() for s, r in zip(spectra, ranks, strict=True))

    every = itertools.product(range(5), repeat=3)
    fitting = [r for r in every if sum(map(math.prod, zip(r, costs, strict=True))) <= budget]
    best = min(map(lost, fitting))
    # Ranks one by one are the best there is but for one rank that might not fit: the usual bound.
    largest = max((s[0] ** 2) for s in spectra)
    assert lost(ranks) <= best + largest + 1e-9
    if len(set(costs)) == 1:
        assert lost(ranks) == pytest.approx(best)


def test_element_wise_and_kronecker_products_are_products():
    new = rng().standard_normal
    a, b, c, d = new((6, 2)), new((2, 8)), new((6, 3)), new((3, 8))
    up, down = lowrank.hadamard((a, b), (c, d))
    assert up.shape == (6, 6)
    np.testing.assert_allclose(up @ down, (a @ b) * (c @ d), atol=1e-12)
    w1 = new((2, 4))
    up, down = lowrank.kronecker(w1, (a, b))
    np.testing.assert_allclose(up @ down, np.kron(w1, a @ b), atol=1e-12)


def test_factors_side_by_side_are_a_sum():
    new = rng().standard_normal
    pairs = [(new((9, k)), new((k, 7))) for k in (1, 2, 3)]
    up, down = lowrank.joined(pairs)
    assert up.shape[1] == 6
    np.testing.assert_allclose(up @ down, sum(u @ d for u, d in pairs), atol=1e-12)
    up, down = lowrank.joined([*pairs, (new((9, 2)), new((2, 7)))])
    assert up.shape[1] == 7  # never more than the smaller side


def test_the_nearest_kronecker_product():
    w1, w2 = rng().standard_normal((3, 2)), rng(1).standard_normal((4, 5))
    d = np.kron(w1, w2).astype(np.float32)
    x, y, energy = lowrank.nearest_kronecker(d, (3, 2), rng())
    np.testing.assert_allclose(np.kron(x, y), d, atol=1e-5)
    assert energy == pytest.approx((d**2).sum(), rel=1e-5)
    noisy = d + rng(2).standard_normal(d.shape).astype(np.float32)
    x, y, _ = lowrank.nearest_kronecker(noisy, (3, 2), rng())
    # Its blocks as lines: the error is what the largest singular value leaves.
    lines = np.stack([noisy[i * 4 : i * 4 + 4, j * 5 : j * 5 + 5].ravel()
                      for i in range(3) for j in range(2)])  # fmt: skip
    s = np.linalg.svd(lines.astype(np.float64), compute_uv=False)
    want = math.sqrt((s[1:] ** 2).sum())
    assert np.linalg.norm(noisy - np.kron(x, y)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "factor", "want"), [(320, -1, 16), (768, -1, 24), (7, -1, 1), (320, 8, 8), (320, 7, 5)]
)
def test_sides_of_the_small_factor(size, factor, want):
    assert lowrank.divided(size, factor) == want
