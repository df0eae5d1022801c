"""Task-vector, matrix, permutation and tuning methods against references written from their papers.

The references are plain float64 numpy on flat lists, one statement per step of the published
algorithm; nothing of plymix is called in them.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from functools import partial

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.errors import Refusal
from plymix.methods import arrays, matrix, permutation, selection, tuning
from plymix.methods.selection import Drawn, by_rank, by_rank_of_all, kth_largest, largest
from plymix.methods.task import breadcrumbs, centre, changes, dare, della, ties
from plymix.registry import Method, _read, methods

TASK = (breadcrumbs, centre, changes, dare, della, ties)
FAMILIES = (*TASK, matrix, permutation, tuning)


def registered() -> dict[str, Method]:
    modules = {m.__name__ for m in FAMILIES}
    return {n: m for n, m in methods().items() if m.function.__module__ in modules}


def rng_of(key: str = "k", seed: int = 0):
    def rng(i: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox([seed, i, *key.encode()]))

    return rng


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def three(*shape: int) -> list[np.ndarray]:
    """A base and two models near it."""
    base = normal(*shape)
    return [base, *(base + np.float32(0.1) * normal(*shape, seed=s) for s in (1, 2))]


def to_torch(x):
    torch = pytest.importorskip("torch")
    return torch.tensor(x)


# -- selection ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(0, 41), st.booleans())
def test_top_mask_is_a_stable_sort(values, k, equals):
    x = np.array(values, np.float32)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]
    expected = np.isin(np.arange(len(values)), order)
    if equals and order:
        expected |= np.abs(x) >= abs(values[order[-1]])
    for arr in (x, x.astype(np.float64), to_torch(x)):
        mask = top_mask(k, abs, arr, with_equals=equals)
        assert np.array_equal(np.asarray(mask), expected)
    assert np.array_equal(x, values)


def top_mask(k, score, x, with_equals=False):
    """The mask of the `k` largest scores, made in its pieces; of k beyond the elements, all."""
    if not 0 < k < len(x):
        return np.full(len(x), k > 0)
    masks, step = largest(k, score, x, with_equals=with_equals).masks(), arrays.BLOCK
    found = [np.asarray(masks(score(x[i : i + step]))) for i in range(0, len(x), step)]
    return np.concatenate(found)


def test_top_mask_in_pieces_with_many_equals():
    x = np.round(normal(3 * arrays.BLOCK + 17) * 4) / 4
    k = x.size // 5
    order = np.argsort(-np.abs(x), kind="stable")[:k]
    assert np.array_equal(np.flatnonzero(top_mask(k, abs, x)), np.sort(order))
    kept = x.copy()
    top_mask(k, lambda v: v, np.abs(x))
    assert np.array_equal(x, kept)


def test_top_mask_leaves_its_input_in_order():
    x = np.abs(normal(1000))
    before = x.copy()
    mask = top_mask(10, lambda v: v, x)
    assert np.array_equal(x, before)
    assert set(np.flatnonzero(mask)) == set(np.argsort(-x)[:10])


def scores_with_few_values(n):
    """Half zeros, the rest in sixteenths: nearly every cut falls among equals."""
    r = np.random.default_rng(n)
    return np.round(np.abs(r.standard_normal(n)) * 16 * (r.random(n) < 0.5)).astype(np.float32) / 16


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.2, 0.37, 0.5, 0.8, 0.99999])
@pytest.mark.parametrize("kind", ["normal", "few", "equal", "sorted"])
def test_kth_largest_of_many(kind, share):
    n = 200_003
    x = {
        "normal": np.abs(np.random.default_rng(1).standard_normal(n)).astype(np.float32),
        "few": scores_with_few_values(n),
        "equal": np.full(n, 0.5, np.float32),
        "sorted": np.linspace(0, 1, n, dtype=np.float32) ** 9,
    }[kind]
    k = max(1, int(share * n))
    ordered = np.sort(x)[::-1]
    assert kth_largest(k, abs, x) == (ordered[k - 1], (x > ordered[k - 1]).sum())
    kept = np.argsort(-x, kind="stable")[:k]
    assert np.array_equal(np.flatnonzero(top_mask(k, abs, x)), np.sort(kept))


def test_kth_largest_where_the_sample_misses(monkeypatch):
    x = np.abs(normal(100_000)).astype(np.float32)
    for wrong in ((9.0, 10.0), (0.0, 1e-9)):
        monkeypatch.setattr(selection, "_bracket", lambda *a, wrong=wrong: wrong)
        assert kth_largest(20_000, abs, x)[0] == np.sort(x)[-20_000]


def test_row_ranks():
    x = np.abs(np.round(normal(7, 50) * 3))
    expected = np.argsort(np.argsort(x, axis=1, kind="stable"), axis=1)
    ranks = np.arange(x.shape[1])
    assert np.array_equal(by_rank(ranks, x), expected)
    assert np.array_equal(np.asarray(by_rank(to_torch(ranks), to_torch(x))), expected)


@pytest.mark.parametrize("kind", ["normal", "few", "equal", "sorted", "far"])
def test_ranks_of_a_whole_tensor(kind):
    n = 200_004
    x = {
        "normal": np.abs(np.random.default_rng(1).standard_normal(n)).astype(np.float32),
        "few": scores_with_few_values(n),
        "equal": np.full(n, 0.5, np.float32),
        "sorted": np.linspace(0, 1, n, dtype=np.float32) ** 9,
        "far": np.append(np.zeros(n - 3), [1e-45, np.inf, np.inf]).astype(np.float32),
    }[kind]
    expected = np.empty(n)
    expected[np.argsort(x, kind="stable")] = np.arange(n)
    for scores in (x.copy(), to_torch(x), x.reshape(6, -1).copy()):
        found = by_rank_of_all(lambda r: r * 0.5, scores)
        assert found.shape == scores.shape
        assert np.array_equal(np.asarray(found).ravel() * 2, expected)


def bernoulli(rng, x, p):
    """The mask of a `Drawn`, made in its pieces."""
    flat = x.reshape(-1)
    cuts, pieces = Drawn(rng, flat.shape[0], p).masks(), range(0, flat.shape[0], arrays.BLOCK)
    found = [np.asarray(cuts(flat[i : i + arrays.BLOCK])) for i in pieces]
    return np.concatenate(found).reshape(x.shape)


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_bernoulli(p):
    x = np.empty(400_001, np.float32)
    mask = bernoulli(lambda: rng_of()(1), x, p)
    spread = math.sqrt(p * (1 - p) / x.size)
    assert abs(mask.mean() - p) <= 5 * spread
    assert np.array_equal(bernoulli(lambda: rng_of()(1), to_torch(x), p), mask)


def test_bernoulli_of_less_than_an_8_bit_step():
    x = np.empty(8_000_000, np.uint8)
    kept = bernoulli(lambda: rng_of()(1), x, 0.5 / 65536).sum()
    assert abs(kept - 61) < 5 * math.sqrt(61)


def test_bernoulli_draws_the_generators_own_words():
    raw = np.random.Philox([0, 1, *b"k"]).random_raw(2)
    expected = [(int(w) >> s) & 0xFF for w in raw for s in range(0, 64, 8)]
    mask = bernoulli(lambda: rng_of()(1), np.empty((2, 5), np.float32), 0.25)
    assert mask.ravel().tolist() == [v < 0x40 for v in expected[:10]]


def test_bernoulli_in_pieces_draws_the_words_at_the_cut_last():
    n, p = 3 * arrays.BLOCK + 13, 0.3
    words = np.random.Philox([0, 1, *b"k"]).random_raw
    first = words(-(-n // 8)).astype("<u8").view(np.uint8)[:n]
    expected = first < 76  # 0.3 * 256 = 76.8
    at = np.flatnonzero(first == 76)
    expected[at] = (words(at.size) >> 11) / 2**53 < 0.8
    assert at.size > 100
    assert np.array_equal(bernoulli(lambda: rng_of()(1), np.empty(n, np.float32), p), expected)


def test_dare_in_pieces_keeps_what_its_masks_say():
    base, a, b = (normal(2 * arrays.BLOCK + 13).astype(np.float32) for _ in range(3))
    a, b = a + 1, b + 2
    masks = [bernoulli(partial(rng_of(), i), base, 0.3) for i in (1, 2)]
    kept = dare.dare_linear(base, a, b, rng=rng_of(), density=0.3, rescale="none") - base
    expected = sum(np.where(m, x - base, 0) for m, x in zip(masks, (a, b), strict=True))
    np.testing.assert_allclose(kept, expected, atol=1e-5)


# -- TIES and its relatives -----------------------------------------------------------------------


def ref_trim(d, density, rule):
    n = len(d)
    if rule == "exact":
        k = max(int(density * n), 1) if density > 0 else 0
        kept = set(sorted(range(n), key=lambda i: (-abs(d[i]), i))[:k])
        return [d[i] if i in kept else 0.0 for i in range(n)]
    threshold = sorted(map(abs, d))[max(int((1 - density) * n), 1) - 1]
    return [v if abs(v) >= threshold else 0.0 for v in d]


def sgn(x):
    return (x > 0) - (x < 0)


def ref_filtered(base, models, weights, density, rule, vote):
    """The trimmed differences that agree with the elected sign, one list per model."""
    ds = [ref_trim([float(v) for v in (m - base)], density, rule) for m in models]
    out = [[0.0] * len(base) for _ in models]
    for j in range(len(base)):
        column = [d[j] for d in ds]
        if vote == "sum":
            s = 1 if sum(w * v for w, v in zip(weights, column, strict=True)) >= 0 else -1
            agree = [sgn(w * v) == s for w, v in zip(weights, column, strict=True)]
        else:
            total = sum(column) if vote == "soup" else sum(map(sgn, column))
            agree = [sgn(v) == sgn(total) and v != 0 for v in column]
        for i, a in enumerate(agree):
            out[i][j] = column[i] if a else 0.0
    return np.array(out)


quantised = st.lists(st.integers(-6, 6), min_size=3, max_size=3)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(quantised, min_size=1, max_size=24),
    st.floats(0, 1),
    st.tuples(*[st.sampled_from([-1.0, 0.5, 1.0, 2.0])] * 3),
    st.booleans(),
)
def test_ties_against_the_paper(columns, density, weights, normalize):
    models = np.array(columns, np.float64).T / 8
    base = np.linspace(-1, 1, len(columns)).round(2)
    xs = [base + m for m in models]
    f = ref_filtered(base, xs, weights, density, "exact", "sum")
    w = np.array(weights)[:, None]
    divisor = (w * (f != 0)).sum(0) if normalize else np.ones(len(base))
    expected = base + 0.7 * (w * f).sum(0) / np.where(divisor == 0, 1, divisor)
    options = {"weights": weights, "density": density, "normalize": normalize, "scale": 0.7}
    np.testing.assert_allclose(ties.ties(base, *xs, **options), expected, atol=1e-12)
    on_torch = ties.ties(to_torch(base), *map(to_torch, xs), **options)
    np.testing.assert_allclose(np.asarray(on_torch), expected, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(quantised, min_size=1, max_size=24),
    st.floats(0.01, 1),
    st.sampled_from(["exact", "threshold"]),
    st.sampled_from([("count", ties.ties_count), ("soup", ties.ties_soup)]),
)
def test_ties_by_counting_and_soup(columns, density, trim, how):
    vote, function = how
    models = np.array(columns, np.float64).T / 8
    base = np.zeros(len(columns))
    f = ref_filtered(base, list(models), [1] * 3, density, trim, vote)
    w = np.array([1.0, 2.0, 0.5])[:, None]
    expected = (w * f).sum(0) / np.maximum((f != 0).sum(0), 1)
    result = function(base, *models, density=density, trim=trim, weights=(1.0, 2.0, 0.5))
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_ties_of_one_whole_difference_is_add_difference():
    base, b, _ = three(9, 7)
    np.testing.assert_allclose(ties.ties(base, b, density=1.0), b, atol=1e-6)
    np.testing.assert_allclose(
        ties.ties(base, b, density=1.0, scale=0.3), base + 0.3 * (b - base), atol=1e-6
    )


def test_ties_over_many_pieces_equals_one_piece(monkeypatch):
    xs = three(700, 301)
    whole = ties.ties(*xs)
    monkeypatch.setattr(arrays, "BLOCK", 1000)
    assert np.array_equal(ties.ties(*xs), whole)


def test_weights_must_match_the_models():
    with pytest.raises(Refusal, match="3 weights for 2 models"):
        ties.ties(*three(4), weights=(1, 2, 3))


# -- random masks ---------------------------------------------------------------------------------


def test_dare_scales_what_it_keeps():
    base, a, b = three(200, 300)
    r = dare.dare_linear(base, a, rng=rng_of(), density=0.3)
    kept = r != base
    assert abs(kept.mean() - 0.3) < 0.01
    np.testing.assert_allclose((r - base)[kept], ((a - base) / 0.3)[kept], atol=2e-6)
    both = dare.dare_linear(base, a, b, rng=rng_of(), density=0.3, weights=(0.5, 2.0), scale=0.5)
    only_b = dare.dare_linear(base, a, b, rng=rng_of(), density=0.3, weights=(0.0, 1.0))
    expected = base + 0.5 * (0.5 * (r - base) + 2.0 * (only_b - base))
    np.testing.assert_allclose(both, expected, atol=1e-5)
    assert not np.array_equal(only_b != base, kept), "models share a mask"
    other_key = dare.dare_linear(base, a, rng=rng_of("other"), density=0.3)
    assert not np.array_equal(other_key != base, kept), "keys share a mask"


def test_dare_end_points_and_expectation():
    base, a, b = three(40)
    np.testing.assert_allclose(
        dare.dare_linear(base, a, b, rng=rng_of(), density=1.0), a + b - base, atol=1e-6
    )
    assert np.array_equal(dare.dare_linear(base, a, b, rng=rng_of(), density=0.0), base)
    runs = [dare.dare_linear(base, a, rng=rng_of(seed=s), density=0.5) for s in range(3000)]
    d = np.abs(a - base)
    assert np.all(np.abs(np.mean(runs, axis=0) - a) <= 5 * d / math.sqrt(3000) + 1e-6)


def test_dare_other_rescalings():
    base, a, _ = three(50, 60)
    runs = {
        kind: dare.dare_linear(base, a, rng=rng_of(), density=0.2, rescale=kind) - base
        for kind in ("density", "l1", "none", "drop")
    }
    np.testing.assert_allclose(np.abs(runs["l1"]).sum(), np.abs(a - base).sum(), rtol=1e-4)
    np.testing.assert_allclose(runs["density"], runs["none"] / 0.2, atol=3e-6)
    np.testing.assert_allclose(runs["drop"], runs["none"] / 0.8, atol=3e-6)
    with pytest.raises(Refusal, match="density 1"):
        dare.dare_linear(base, a, rng=rng_of(), density=1.0, rescale="drop")


@pytest.mark.parametrize("normalize", [False, True])
def test_dare_ties(normalize):
    base, a, b = three(80, 70)
    ds = [
        dare.dare_linear(base, a, b, rng=rng_of(), density=0.6, weights=w).astype(float) - base
        for w in ((1.0, 0.0), (0.0, 1.0))
    ]
    s = np.where(ds[0] * 2.0 + ds[1] * 0.5 >= 0, 1, -1)
    kept = [np.where(np.sign(d) == s, d, 0) for d in ds]
    d = 2.0 * kept[0] + 0.5 * kept[1]
    if normalize:
        divisor = 2.0 * (kept[0] != 0) + 0.5 * (kept[1] != 0)
        d = d / np.where(divisor == 0, 1, divisor)
    r = dare.dare_ties(
        base, a, b, rng=rng_of(), density=0.6, weights=(2.0, 0.5), normalize=normalize
    )
    np.testing.assert_allclose(r, base + d, atol=1e-5)


def test_dropout_with_independent_masks():
    base, a, b = (np.full(100_000, v, np.float32) for v in (0, 1, 2))
    r = dare.dropout(base, a, b, rng=rng_of(), drop=0.6) * 0.4
    shares = {v: np.isclose(r, v).mean() for v in (0, 1, 2, 1.5)}
    expected = {0: 0.36, 1: 0.24, 2: 0.24, 1.5: 0.16}
    assert shares == pytest.approx(expected, abs=0.01)


def test_dropout_with_even_overlap_never_overlaps():
    base, a, b = (np.full(100_000, v, np.float32) for v in (0, 1, 2))
    r = dare.dropout(base, a, b, rng=rng_of(), drop=0.6, overlap=2.0, rescale=0.0)
    shares = {v: (r == v).mean() for v in (0, 1, 2)}
    assert shares == pytest.approx({0: 0.6, 1: 0.2, 2: 0.2}, abs=0.01)
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("overlap", [0.3, 1.3])
def test_dropout_between_whole_overlaps(overlap):
    n, drop = 3, 0.5
    base = np.zeros(200_000, np.float32)
    models = [np.full_like(base, v) for v in (1, 3, 9)]
    r = dare.dropout(base, *models, rng=rng_of(), drop=drop, overlap=overlap, rescale=0.0)
    o = -overlap if overlap > 1 else overlap
    chance = {
        s: math.exp(math.tan(math.pi * (o - 0.5)) * (len(s) - n / 2))
        for k in (1, 2, 3)
        for s in itertools.combinations((1, 3, 9), k)
    }
    total = sum(chance.values())
    assert (r == 0).mean() == pytest.approx(drop, abs=0.01)
    for mean in {sum(s) / len(s) for s in chance}:
        expected = sum(c for s, c in chance.items() if sum(s) / len(s) == mean)
        assert np.isclose(r, mean).mean() == pytest.approx((1 - drop) * expected / total, abs=0.01)


def test_dropout_of_everything_is_the_base():
    base, a, b = three(30)
    assert np.array_equal(dare.dropout(base, a, b, rng=rng_of(), drop=1.0), base)


def test_della_keeps_by_rank_in_the_row():
    m, runs = 11, 4000
    d = np.stack([np.arange(1, m + 1), np.arange(m, 0, -1)]).astype(np.float32)
    p = 0.5 - 0.2 + 0.4 * (d - 1) / (m - 1)
    base = np.zeros_like(d)
    results = np.stack(
        [
            della.della_linear(base, d, rng=rng_of(seed=s), density=0.5, epsilon=0.2)
            for s in range(runs)
        ]
    )
    assert np.abs((results != 0).mean(0) - p).max() < 5 * 0.5 / math.sqrt(runs)
    kept = results[0] != 0
    np.testing.assert_allclose(results[0][kept], (d / p)[kept], rtol=1e-5)
    plain = della.della_linear(
        base, d, rng=rng_of(seed=0), density=0.5, epsilon=0.2, rescale="density"
    )
    np.testing.assert_allclose(plain, np.where(kept, d / 0.5, 0), rtol=1e-5)
    conv = della.della_linear(
        base.reshape(2, 11, 1, 1), d.reshape(2, 11, 1, 1), rng=rng_of(seed=0), epsilon=0.2
    )
    np.testing.assert_array_equal(conv.reshape(2, 11), results[0])


def test_della_over_the_whole_tensor():
    d = np.array([[4.0, 1.0], [3.0, 2.0]], np.float32)
    results = [
        della.della_linear(
            0 * d, d, rng=rng_of(seed=s), density=0.4, epsilon=0.4, ranks="tensor", rescale="none"
        )
        for s in range(4000)
    ]
    p = 0.4 + 0.4 * (d / 4 - 5 / 8)
    assert np.abs(np.mean(np.array(results) != 0, axis=0) - p).max() < 0.04


def test_della_elects_like_ties_and_refuses_impossible_chances():
    base, a, b = three(30, 20)
    ds = [
        della.della_linear(base, a, b, rng=rng_of(), weights=w).astype(float) - base
        for w in ((1.0, 0.0), (0.0, 1.0))
    ]
    s = np.where(ds[0] + ds[1] >= 0, 1, -1)
    kept = [np.where(np.sign(d) == s, d, 0) for d in ds]
    count = (kept[0] != 0).astype(int) + (kept[1] != 0)
    expected = base + sum(kept) / np.maximum(count, 1)
    np.testing.assert_allclose(della.della(base, a, b, rng=rng_of()), expected, atol=1e-5)
    with pytest.raises(Refusal, match="keep probabilities outside"):
        della.della(base, a, b, rng=rng_of(), density=0.95)
    one = della.della_linear(np.zeros((5, 1)), np.ones((5, 1)), rng=rng_of(), density=0.5)
    assert set(one.ravel()) <= {0.0, 2.0}


# -- other selections -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 64, 99, 500])
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.95, 0.2), (1.0, 0.3)])
def test_breadcrumbs(n, density, gamma):
    base, a, b = (x.astype(np.float64) for x in three(n))
    kept, top = int(density * n), int(gamma * n)
    bottom = n - kept - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    ds = []
    for x in (a, b):
        d = x - base
        order = np.argsort(np.abs(d))[bottom : n - top]
        assert len(order) == kept
        ds.append(np.where(np.isin(np.arange(n), order), d, 0))
    options = {"density": density, "gamma": gamma}
    np.testing.assert_allclose(
        breadcrumbs.breadcrumbs(base, a, b, weights=(1.0, 0.5), **options),
        base + ds[0] + 0.5 * ds[1],
        atol=1e-12,
    )
    s = np.where(ds[0] + ds[1] >= 0, 1, -1)
    elected = sum(np.where(np.sign(d) == s, d, 0) for d in ds)
    np.testing.assert_allclose(
        breadcrumbs.breadcrumbs_ties(base, a, b, **options), base + elected, atol=1e-12
    )
    assert not np.array_equal(breadcrumbs.breadcrumbs(base, a, b), base)


def test_sce():
    base, *models = (normal(6, 7, seed=s, dtype=np.float64) for s in range(4))
    d = np.array([m - base for m in models])
    v = ((d - d.mean(0)) ** 2).mean(0)
    k = int(0.3 * np.count_nonzero(v))
    d = d * (v >= np.sort(v.ravel())[-k])
    c = (d**2).mean((1, 2))
    c /= c.sum()
    s = np.where(d.sum(0) >= 0, 1, -1)
    m = np.sign(d) == s
    w = c[:, None, None] * m
    expected = base + 0.8 * (w * d).sum(0) / np.maximum(w.sum(0), 1e-6)
    np.testing.assert_allclose(
        changes.sce(base, *models, select=0.3, scale=0.8), expected, atol=1e-7
    )
    assert np.array_equal(changes.sce(base, models[0], select=0.5), base)


def test_arcee_fusion():
    a, b = normal(12, 9, dtype=np.float64), normal(12, 9, seed=1, dtype=np.float64)
    p = np.exp(b) / np.exp(b).sum(-1, keepdims=True) + 1e-8
    q = np.exp(a) / np.exp(a).sum(-1, keepdims=True) + 1e-8
    importance = np.abs(b - a) * (p * np.log(p / q)).sum(-1, keepdims=True)
    x = np.sort(importance.ravel())
    threshold = x[int(0.5 * 107)] + 1.5 * (x[int(0.75 * 107)] - x[int(0.25 * 107)])
    expected = np.where(importance >= threshold, b, a)
    assert 0 < (importance >= threshold).sum() < 54
    assert np.array_equal(changes.arcee_fusion(a, b), expected)


def test_ram():
    rng = np.random.default_rng(5)
    base = rng.standard_normal(400)
    ds = rng.standard_normal((3, 400)) * (rng.random((3, 400)) < 0.4)
    z = np.abs(ds) > 1e-5
    c = z.sum(0)
    xs = [base + d for d in ds]
    expected = base + 2 * (z * ds).sum(0) / np.maximum(c, 1)
    np.testing.assert_allclose(changes.ram(base, *xs, scale=2.0), expected, atol=1e-12)
    plus = np.zeros(400)
    for i in range(3):
        unique, shared = (z[i] & (c == 1)).sum(), (z[i] & (c > 1)).sum()
        gain = 1 + 0.5 * np.clip(shared / max(unique, 1e-5), 0, 0.7)
        plus += np.where(c == 1, gain, 1) * z[i] * ds[i]
    plus /= np.maximum(c, 1)
    result = changes.ramplus_tl(base, *xs, ratio=0.5, limit=0.7)
    np.testing.assert_allclose(result, base + plus, atol=1e-6)


def ref_stock(ds, clamp):
    cosines = [
        np.vdot(x, y) / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-6)
        for x, y in itertools.combinations(ds, 2)
    ]
    cosine, n = np.mean(cosines), len(ds)
    t = n * cosine / (1 + (n - 1) * cosine)
    return np.clip(t, 0, 1) if clamp else t


@pytest.mark.parametrize("clamp", [True, False])
def test_model_stock(clamp):
    base, *models = (normal(8, 6, seed=s, dtype=np.float64) for s in range(4))
    ds = [m - base for m in models]
    expected = base + ref_stock(ds, clamp) * np.mean(ds, axis=0)
    np.testing.assert_allclose(
        centre.model_stock(base, *models, clamp_t=clamp), expected, atol=1e-9
    )
    rows = [ref_stock([d[i] for d in ds], clamp) for i in range(8)]
    expected = base + np.array(rows)[:, None] * np.mean(ds, axis=0)
    result = centre.model_stock(base, *models, clamp_t=clamp, filter_wise=True)
    np.testing.assert_allclose(result, expected, atol=1e-9)


def ref_median(xs):
    m = np.mean(xs, axis=0)
    for _ in range(100):
        w = [1 / max(np.linalg.norm(x - m), 1e-6) for x in xs]
        m = sum(a * x for a, x in zip(w, xs, strict=True)) / sum(w)
    return m


def test_geometric_median():
    xs = [normal(5, 6, seed=s, dtype=np.float64) * (1 + s) for s in range(5)]
    m = centre.geometric_median(*xs)
    np.testing.assert_allclose(m, ref_median(xs), atol=1e-6)  # flat near the optimum

    def cost(y):
        return sum(np.linalg.norm(x - y) for x in xs)

    assert all(cost(m) <= cost(y) for y in (*xs, np.mean(xs, axis=0), m + 1e-3, m - 1e-3))
    np.testing.assert_allclose(centre.geometric_median(*xs[:2]), (xs[0] + xs[1]) / 2, atol=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_median(n):
    xs = [normal(50, seed=s) for s in range(n)]
    np.testing.assert_allclose(centre.median(*xs), np.median(xs, axis=0), atol=1e-6)


@pytest.mark.parametrize("vote", ["count", "soup"])
def test_ties_with_stock_and_with_median(vote):
    base, *models = (normal(60, seed=s, dtype=np.float64) for s in range(4))
    f = ref_filtered(base, models, [1] * 3, 0.4, "threshold", vote)
    count = np.maximum((f != 0).sum(0), 1)
    options = {"density": 0.4, "vote": vote}
    np.testing.assert_allclose(
        centre.ties_stock(base, *models, clamp_t=False, **options),
        base + ref_stock(list(f), False) * f.sum(0) / count,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        centre.ties_gmedian(base, *models, **options), base + ref_median(list(f)), atol=1e-6
    )


@pytest.mark.parametrize("core", ["mean", "stock", "median"])
def test_ties_dare(core):
    base, *models = (normal(90, seed=s, dtype=np.float64) for s in range(4))
    thin = [
        dare.dare_linear(base, *models, rng=rng_of(), density=0.7, rescale="none", weights=w)
        for w in np.eye(3).tolist()
    ]
    f = ref_filtered(base, thin, [1] * 3, 0.4, "threshold", "count")
    d = f.sum(0) / np.maximum((f != 0).sum(0), 1)
    if core == "stock":
        d *= ref_stock(list(f), True)
    if core == "median":
        d = ref_median(list(f))
    result = centre.ties_dare(base, *models, rng=rng_of(), keep=0.7, density=0.4, core=core)
    np.testing.assert_allclose(result, base + d / 0.7, atol=1e-6)


def test_ties_dare_that_thins_nothing_is_ties_count():
    base, *models = (np.round(normal(3, 50, seed=s) * 8) / 8 for s in range(4))
    for options in ({"density": 0.4}, {"density": 0.4, "trim": "exact"}, {"density": 1.0}):
        expected = ties.ties_count(base, *models, **options)
        found = centre.ties_dare(base, *models, rng=rng_of(), keep=1.0, **options)
        assert np.array_equal(found, expected)
    nothing = {"density": 0.0, "trim": "exact"}
    assert np.array_equal(centre.ties_dare(base, *models, rng=rng_of(), **nothing), base)
    assert np.array_equal(ties.ties(base, *models, density=0.0), base)


def test_model_stock_by_lines_of_a_large_tensor():
    base, a, b = (normal(300, 40, 5, 3, seed=s) for s in range(3))
    lines = [x.reshape(-1, 3).astype(float) for x in (base, a, b)]
    expected = [
        x0 + ref_stock([x - x0, y - x0], True) * ((x + y) / 2 - x0)
        for x0, x, y in zip(*lines, strict=True)
    ]
    found = centre.model_stock(base, a, b, filter_wise=True)
    np.testing.assert_allclose(found.reshape(-1, 3), expected, atol=2e-5)


# -- matrices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (4, 3, 3, 3), (1, 7), (7, 1)])
def test_rotate_end_points(shape):
    a, b = normal(*shape, dtype=np.float64), normal(*shape, seed=1, dtype=np.float64)
    assert np.array_equal(matrix.rotate(a, b, alignment=0.0, alpha=0.0), a)
    assert np.array_equal(matrix.rotate(a, b, alignment=1.0, alpha=1.0), b)
    # The formulas lead to the same ends, not only the short cuts.
    near = matrix.rotate(a, b, alignment=1e-9, alpha=1e-9)
    np.testing.assert_allclose(near, a, atol=1e-6)
    c = normal(*shape, seed=2, dtype=np.float64)
    np.testing.assert_allclose(matrix.rotate(a, b, c), c + matrix.rotate(a - c, b - c), atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (30, 4)])
def test_rotate_solves_procrustes(shape):
    a, b = normal(*shape, dtype=np.float64), normal(*shape, seed=1, dtype=np.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    q, _ = scipy.linalg.orthogonal_procrustes(a - mean_a, b - mean_b)
    r = matrix.rotate(a, b)
    np.testing.assert_allclose(r, (a - mean_a) @ q + mean_b, atol=1e-9)
    raw, _ = scipy.linalg.orthogonal_procrustes(a, b)
    np.testing.assert_allclose(matrix.rotate(a, b, centralization=0.0), a @ raw, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("alignment", [0.3, 0.5, -0.4, 2.0, -1.0])
def test_a_fraction_of_a_rotation_is_a_rotation(shape, alignment):
    a, b = normal(*shape, dtype=np.float64), normal(*shape, seed=1, dtype=np.float64)
    r = matrix.rotate(a, b, alignment=alignment, centralization=0.0)
    np.testing.assert_allclose(r @ r.T, a @ a.T, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_a_rotation_continues_to_its_end(shape):
    """Just short of 1 the general way meets the short cut at 1 (b is a turned, no mirror image)."""
    a = normal(*shape, dtype=np.float64)
    k = normal(shape[1], shape[1], seed=1, dtype=np.float64)
    b = a @ scipy.linalg.expm(0.1 * (k - k.T))
    ends = [matrix.rotate(a, b, alignment=x, centralization=0.0) for x in (1.0, 1 - 1e-9, 1 + 1e-9)]
    np.testing.assert_allclose(ends[0], b, atol=1e-9)
    np.testing.assert_allclose(ends[1], b, atol=1e-7)
    np.testing.assert_allclose(ends[2], b, atol=1e-7)
    there_and_back = matrix.rotate(b, a, centralization=0.0)
    np.testing.assert_allclose(there_and_back, a, atol=1e-9)


def test_fractional_power_against_scipy():
    q = scipy.linalg.expm(0.3 * (normal(7, 7, dtype=float) - normal(7, 7, dtype=float).T))
    expected = scipy.linalg.fractional_matrix_power(q, 0.37).real
    np.testing.assert_allclose(matrix._power(q, 0.37), expected, atol=1e-10)
    block = scipy.linalg.block_diag(np.eye(4), [[0.0, -1.0], [1.0, 0.0]], np.eye(3))
    np.testing.assert_allclose(matrix._power(q, -2.0), np.linalg.inv(q @ q), atol=1e-10)
    half = matrix._power(block, 0.5)
    np.testing.assert_allclose(half @ half, block, atol=1e-12)


def test_polar_between_positive_matrices_and_between_rotations():
    p, r = (normal(6, 6, seed=s, dtype=np.float64) for s in (1, 2))
    p, r = p @ p.T, r @ r.T
    np.testing.assert_allclose(matrix.polar(p, r, alpha=0.3), 0.7 * p + 0.3 * r, atol=1e-9)
    k = normal(6, 6, seed=3, dtype=np.float64)
    k = 0.2 * (k - k.T)
    start = scipy.linalg.expm(normal(6, 6, dtype=np.float64) / 9)
    start = scipy.linalg.polar(start)[0]
    mid = matrix.polar(start, scipy.linalg.expm(k) @ start, alpha=0.25)
    np.testing.assert_allclose(mid, scipy.linalg.expm(0.25 * k) @ start, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (4, 2, 3, 3), (6, 6)])
def test_polar_ends(shape):
    a, b = normal(*shape, dtype=np.float64), normal(*shape, seed=1, dtype=np.float64)
    assert np.array_equal(matrix.polar(a, b, alpha=0.0), a)
    assert np.array_equal(matrix.polar(a, b, alpha=1.0), b)
    np.testing.assert_allclose(matrix.polar(a, b, alpha=1e-10), a, atol=1e-7)
    np.testing.assert_allclose(matrix.polar(a, b, alpha=1 - 1e-10), b, atol=1e-7)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_pop_lora(shape):
    a, b = normal(*shape, dtype=np.float64), normal(*shape, seed=1, dtype=np.float64)
    q = np.linalg.qr(a)[0]
    d = q @ q.T @ (b - a)
    qd, r, order = scipy.linalg.qr(d, pivoting=True, mode="economic")
    rank = max(1, int(min(shape) * 0.5))
    expected = a.copy()
    expected[:, order] += 0.7 * (qd[:, :rank] @ r[:rank])
    result = matrix.pop_lora(a, b, key="w.weight", alpha=0.7, ratio=0.5)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    table = matrix.pop_lora(a, b, key="x.token_embedding.weight", alpha=0.25)
    np.testing.assert_allclose(table, 0.75 * a + 0.25 * b, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (10, 3, 2, 2)])
def test_truncate_rank(shape):
    d = normal(*shape, dtype=np.float64)
    u, s, vh = np.linalg.svd(d.reshape(shape[0], -1), full_matrices=False)
    expected = ((u[:, :4] * s[:4]) @ vh[:4]).reshape(shape)
    exact = matrix.truncate_rank(d, rng=rng_of(), rank=4, iterations=0)
    np.testing.assert_allclose(exact, expected, atol=1e-10)
    assert np.array_equal(matrix.truncate_rank(d, rng=rng_of(), rank=99), d)
    assert not matrix.truncate_rank(d, rng=rng_of(), ratio=0.0).any()
    by_ratio = matrix.truncate_rank(d, rng=rng_of(), ratio=4 / len(s), iterations=0)
    np.testing.assert_allclose(by_ratio, expected, atol=1e-10)


def test_truncate_rank_in_a_random_subspace():
    u, _ = np.linalg.qr(normal(80, 60, dtype=np.float64))
    v, _ = np.linalg.qr(normal(60, 60, seed=1, dtype=np.float64))
    s = 0.7 ** np.arange(60)
    d = (u * s) @ v.T
    best = (u[:, :6] * s[:6]) @ v[:, :6].T
    r = matrix.truncate_rank(d, rng=rng_of(), rank=6)
    assert np.linalg.matrix_rank(r, tol=1e-9) == 6
    np.testing.assert_allclose(r, best, atol=1e-4)
    assert not np.array_equal(r, matrix.truncate_rank(d, rng=rng_of("other"), rank=6))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_kronecker_shape(ratio):
    o, i, taps = 20, 12, 9
    pairs = [(m, n) for m in range(1, 21) for n in range(1, 13) if o % m == 0 and i % n == 0]
    offset = {p: math.log(p[0] * p[1]) - 0.5 * math.log(o * i * taps) for p in pairs}
    wanted = (2 * ratio - 1) * max(map(abs, offset.values()))
    least = min(abs(v - wanted) for v in offset.values())
    chosen = matrix._kronecker_shape(o, i, o * i * taps, ratio)
    assert abs(offset[chosen] - wanted) == pytest.approx(least)


def test_truncate_kronecker_recovers_a_product():
    m1, n1 = matrix._kronecker_shape(20, 12, 20 * 12 * 9, 0.4)
    w1 = normal(m1, n1, dtype=np.float64)
    w2 = normal(20 // m1, 12 // n1, 3, 3, seed=1, dtype=np.float64)
    product = np.einsum("ab,cdhw->acbdhw", w1, w2).reshape(20, 12, 3, 3)
    for iterations in (0, 4):
        r = matrix.truncate_kronecker(product, rng=rng_of(), ratio=0.4, iterations=iterations)
        np.testing.assert_allclose(r, product, atol=1e-9)


def test_truncate_kronecker_is_the_nearest_product():
    d = normal(6, 4, dtype=np.float64)
    m1, n1 = matrix._kronecker_shape(6, 4, 24, 0.5)
    blocks = d.reshape(m1, 6 // m1, n1, 4 // n1).transpose(0, 2, 1, 3).reshape(m1 * n1, -1)
    rest = np.linalg.svd(blocks, compute_uv=False)[1:]
    r = matrix.truncate_kronecker(d, rng=rng_of(), iterations=0)
    assert np.linalg.norm(d - r) == pytest.approx(np.linalg.norm(rest))


def nearest(x):
    return scipy.linalg.polar(x)[0]


@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
def test_svd_merges(shape):
    base, *models = (normal(*shape, seed=s, dtype=np.float64) for s in range(4))
    ds = [m - base for m in models]
    svds = [np.linalg.svd(d, full_matrices=False) for d in ds]
    k = 7 // 3
    u = nearest(np.hstack([x[0][:, :k] for x in svds]))
    v = nearest(np.hstack([x[2][:k].T for x in svds]))
    s = np.diag(np.concatenate([x[1][:k] for x in svds]))
    np.testing.assert_allclose(matrix.tsv_m(base, *models), base + u @ s @ v.T, atol=1e-9)
    one = matrix.tsv_m(base, models[0])
    np.testing.assert_allclose(one, models[0], atol=1e-9)

    u, s, vh = np.linalg.svd(sum(ds), full_matrices=False)
    np.testing.assert_allclose(
        matrix.iso_c(base, *models, scale=0.5), base + 0.5 * s.mean() * u @ vh, atol=1e-9
    )
    np.testing.assert_allclose(
        matrix.iso_cts(base, *models, common=1.0), matrix.iso_c(base, *models), atol=1e-9
    )
    own = round((7 - int(0.5 * 7)) / 3)
    c = 7 - 3 * own
    us, ss, vs = [u[:, :c]], [s[:c]], [vh[:c].T]
    for d in ds:
        x = np.linalg.svd(d - u[:, :c] @ u[:, :c].T @ d, full_matrices=False)
        us.append(x[0][:, :own])
        ss.append(x[1][:own])
        vs.append(x[2][:own].T)
    expected = np.concatenate(ss).mean() * nearest(np.hstack(us)) @ nearest(np.hstack(vs)).T
    np.testing.assert_allclose(
        matrix.iso_cts(base, *models, common=0.5), base + expected, atol=1e-9
    )

    u, s, vh = np.linalg.svd(np.hstack(ds), full_matrices=False)
    vs = np.hsplit(vh, 3)
    f = ref_filtered(np.zeros(vs[0].size), [v.ravel() for v in vs], [1] * 3, 0.4, "exact", "sum")
    merged = (f.sum(0) / np.maximum((f != 0).sum(0), 1)).reshape(vs[0].shape)
    np.testing.assert_allclose(
        matrix.knots(base, *models, density=0.4), base + u @ np.diag(s) @ merged, atol=1e-9
    )


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "knots", "wudi"])
def test_svd_merges_average_what_is_no_matrix(name):
    base, a, b = three(3, 2, 3, 3)
    result = getattr(matrix, name)(base, a, b, scale=0.5)
    np.testing.assert_allclose(result, base + 0.25 * (a + b - 2 * base), atol=1e-6)


def test_wudi_against_torch_adam():
    torch = pytest.importorskip("torch")
    base, *models = (normal(6, 5, seed=s, dtype=np.float64) for s in range(3))
    ds = [torch.tensor(m - base) for m in models]
    d = torch.nn.Parameter(sum(ds))
    adam = torch.optim.Adam([d], lr=1e-3)
    for _ in range(40):
        adam.zero_grad()
        sum((((d - x) @ x.T) ** 2).sum() / (x**2).sum() for x in ds).backward()
        adam.step()
    result = matrix.wudi(base, *models, steps=40, rate=1e-3)
    np.testing.assert_allclose(result, base + d.detach().numpy(), atol=1e-9)


# -- laws that hold for all -----------------------------------------------------------------------

SHAPES = [(), (1,), (5,), (4, 6), (6, 4), (1, 7), (3, 2, 3, 3), (4, 5, 1, 1)]
TENSOR_METHODS = sorted(n for n, m in registered().items() if m.kind in ("tensor", "elementwise"))


def call(method: Method, xs, **params):
    extra = {"rng": rng_of("law"), "key": "a.weight"}
    return method.function(*xs, **{g: extra[g] for g in method.given}, **params)


def inputs(method: Method, shape, same=False):
    n = 3 if method.variadic else len(method.inputs)
    return [normal(*shape, seed=0 if same else s) for s in range(n)]


def test_every_method_of_the_index_is_there():
    wanted = """ties ties_soup ties_count dare_linear dare_ties dropout della della_linear
        breadcrumbs breadcrumbs_ties model_stock sce arcee_fusion ram ramplus_tl geometric_median
        median ties_stock ties_gmedian ties_dare rotate truncate_rank truncate_kronecker polar
        pop_lora tsv_m iso_c iso_cts knots wudi rebasin randperm balance_attention clip_xor turbo
        deturbo cfg_sens vae_saturation"""
    assert set(wanted.split()) == set(registered())
    for method in registered().values():
        again = _read(
            method.function, method.kind, method.name, method.prepare, method.min_variadic,
            method.delta, method.adapters, method.room,
        )  # fmt: skip
        assert again == method
        assert "Source:" in method.doc
        for p in method.params:
            assert p.name in method.doc, f"{method.name} does not explain {p.name}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TENSOR_METHODS)
def test_shape_dtype_inputs_and_namespaces(name, shape):
    method = registered()[name]
    xs = inputs(method, shape)
    before = [x.copy() for x in xs]
    result = call(method, xs)
    assert isinstance(result, np.ndarray)
    assert result.shape == shape
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert all(map(np.array_equal, xs, before)), "an input was changed"
    assert not any(np.shares_memory(result, x) and result is not x for x in xs)
    wide = call(method, [x.astype(np.float64) for x in xs])
    assert wide.dtype == np.float64
    on_torch = call(method, [to_torch(x) for x in xs])
    assert str(on_torch.dtype) == "torch.float32"
    assert tuple(on_torch.shape) == shape
    np.testing.assert_allclose(on_torch.numpy(), result, atol=2e-5)
    if name != "arcee_fusion":  # its exact ties in importance fall either way
        np.testing.assert_allclose(wide, result, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [n for n in TENSOR_METHODS if not registered()[n].delta])
def test_equal_models_merge_to_themselves(name, shape):
    xs = inputs(registered()[name], shape, same=True)
    result = call(registered()[name], xs)
    if name in ("turbo", "deturbo"):
        np.testing.assert_allclose(result, xs[0], rtol=1e-6)
    else:
        assert np.array_equal(result, xs[0])


@pytest.mark.parametrize(
    "name",
    [
        *("ties", "ties_count", "ties_soup", "ties_stock", "ties_gmedian", "breadcrumbs"),
        *("breadcrumbs_ties", "sce", "model_stock", "geometric_median", "median", "ram"),
        *("ramplus_tl", "tsv_m", "iso_c", "iso_cts", "knots", "wudi"),
    ],
)
def test_the_order_of_the_models_does_not_matter(name):
    method = registered()[name]
    base, *models = (normal(9, 7, seed=s, dtype=np.float64) for s in range(4))
    fixed = [base] if method.inputs else []
    first = call(method, [*fixed, *models])
    for order in itertools.permutations(models):
        np.testing.assert_allclose(call(method, [*fixed, *order]), first, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in TENSOR_METHODS if registered()[n].random])
def test_a_seed_decides_and_another_key_decides_otherwise(name):
    method = registered()[name]
    xs = inputs(method, (40, 30))
    runs = [
        method.function(*xs, rng=rng_of(k), **({"rank": 3} if name == "truncate_rank" else {}))
        for k in ("a", "a", "b")
    ]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


# -- permutations and bases -----------------------------------------------------------------------


class Models:
    """Models in memory, as a `prepare` function sees them."""

    def __init__(self, *models):
        self.models = models

    def __iter__(self):
        return iter(self.models[0])

    def __contains__(self, key):
        return key in self.models[0]

    def __getitem__(self, key):
        return tuple(m[key] for m in self.models)

    def shape(self, key):
        return tuple(self.models[0][key].shape)


def run_group(function, *models, **params):
    prepare = registered()[function.__name__].prepare
    state = prepare(Models(*models), **params)
    return {k: function(*(m[k] for m in models), key=k, state=state, **params) for k in models[0]}


HEADS, WIDTH, HIDDEN, CONTEXT, CHANNELS, GROUPS = 2, 12, 20, 10, 12, 3


def tiny(seed=0):
    """Attention, GEGLU and a residual block of a U-Net; layers of two CLIP text encoders."""
    shapes = {"r.in_layers.2.weight": (CHANNELS, 5), "r.in_layers.2.bias": (CHANNELS,)}
    shapes |= {"r.emb_layers.1.weight": (CHANNELS, 6), "r.emb_layers.1.bias": (CHANNELS,)}
    shapes |= {"r.out_layers.0.weight": (CHANNELS,), "r.out_layers.0.bias": (CHANNELS,)}
    shapes |= {"r.out_layers.3.weight": (5, CHANNELS), "r.out_layers.3.bias": (5,)}
    for a, width in (("attn1", WIDTH), ("attn2", CONTEXT)):
        p = f"u.transformer_blocks.0.{a}."
        shapes |= {p + "to_q.weight": (WIDTH, WIDTH), p + "to_k.weight": (WIDTH, width)}
        shapes |= {p + "to_v.weight": (WIDTH, width), p + "to_out.0.weight": (WIDTH, WIDTH)}
        shapes |= {p + "to_out.0.bias": (WIDTH,)}
    p = "u.transformer_blocks.0.ff.net."
    shapes |= {p + "0.proj.weight": (2 * HIDDEN, WIDTH), p + "0.proj.bias": (2 * HIDDEN,)}
    shapes |= {p + "2.weight": (WIDTH, HIDDEN), p + "2.bias": (WIDTH,)}
    p = "t.text_model.encoder.layers.3."
    for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {p + f"self_attn.{n}.weight": (WIDTH, WIDTH), p + f"self_attn.{n}.bias": (WIDTH,)}
    shapes |= {p + "mlp.fc1.weight": (HIDDEN, WIDTH), p + "mlp.fc1.bias": (HIDDEN,)}
    shapes |= {p + "mlp.fc2.weight": (WIDTH, HIDDEN), p + "mlp.fc2.bias": (WIDTH,)}
    p = "o.transformer.resblocks.1."
    shapes |= {p + "attn.in_proj_weight": (3 * WIDTH, WIDTH), p + "attn.in_proj_bias": (3 * WIDTH,)}
    shapes |= {p + "attn.out_proj.weight": (WIDTH, WIDTH), p + "attn.out_proj.bias": (WIDTH,)}
    shapes |= {p + "mlp.c_fc.weight": (HIDDEN, WIDTH), p + "mlp.c_fc.bias": (HIDDEN,)}
    shapes |= {p + "mlp.c_proj.weight": (WIDTH, HIDDEN), p + "mlp.c_proj.bias": (WIDTH,)}
    shapes |= {"u.norm.weight": (WIDTH,)}
    return {k: normal(*s, seed=seed * 1000 + i) for i, (k, s) in enumerate(shapes.items())}


def attend(q, k, v):
    out = []
    for h in range(HEADS):
        part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        scores = q[:, part] @ k[:, part].T / 3
        p = np.exp(scores - scores.max(1, keepdims=True))
        out.append(p / p.sum(1, keepdims=True) @ v[:, part])
    return np.hstack(out)


def outputs(m):
    """What each layer of `tiny` computes for a fixed input, in float64."""
    m = {k: v.astype(np.float64) for k, v in m.items()}
    x, context = normal(4, WIDTH, seed=90, dtype=float), normal(3, CONTEXT, seed=91, dtype=float)
    result = []

    def linear(x, name):
        bias = m.get(name + ".bias", 0)
        return x @ m[name + ".weight"].T + bias

    for a, y in (("attn1", x), ("attn2", context)):
        p = f"u.transformer_blocks.0.{a}."
        heads = attend(linear(x, p + "to_q"), linear(y, p + "to_k"), linear(y, p + "to_v"))
        result.append(linear(heads, p + "to_out.0"))
    p = "u.transformer_blocks.0.ff.net."
    value, gate = np.split(linear(x, p + "0.proj"), 2, axis=1)
    result.append(linear(value * np.tanh(gate), p + "2"))
    p = "t.text_model.encoder.layers.3."
    q, k, v = (linear(x, p + f"self_attn.{n}_proj") for n in "qkv")
    result.append(linear(attend(q, k, v), p + "self_attn.out_proj"))
    result.append(linear(np.tanh(linear(x, p + "mlp.fc1")), p + "mlp.fc2"))
    p = "o.transformer.resblocks.1."
    qkv = x @ m[p + "attn.in_proj_weight"].T + m[p + "attn.in_proj_bias"]
    result.append(linear(attend(*np.split(qkv, 3, axis=1)), p + "attn.out_proj"))
    result.append(linear(np.tanh(linear(x, p + "mlp.c_fc")), p + "mlp.c_proj"))
    pixels, time = normal(7, 5, seed=92, dtype=float), normal(1, 6, seed=93, dtype=float)
    h = linear(pixels, "r.in_layers.2") + linear(time, "r.emb_layers.1")
    g = h.reshape(7, GROUPS, -1)  # a group norm over pixels and the group's channels
    g = (g - g.mean((0, 2), keepdims=True)) / g.std((0, 2), keepdims=True)
    h = g.reshape(7, -1) * m["r.out_layers.0.weight"] + m["r.out_layers.0.bias"]
    result.append(linear(np.tanh(h), "r.out_layers.3"))
    return result


KNOWN = {"heads": HEADS, "text_heads": HEADS, "norm_groups": GROUPS}


def test_randperm_keeps_the_function_and_rebasin_undoes_it():
    a = tiny()
    moved = run_group(permutation.randperm, a, **KNOWN)
    changed = {k for k in a if not np.array_equal(a[k], moved[k])}
    untouched = {k for k in a if k.endswith(("out.0.bias", "net.2.bias", "out_proj.bias"))}
    untouched |= {"r.out_layers.3.bias", "u.norm.weight"}
    untouched |= {k for k in a if k.endswith(("fc2.bias", "c_proj.bias"))}
    assert changed == set(a) - untouched
    for before, after in zip(outputs(a), outputs(moved), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-12)
    back = run_group(permutation.rebasin, moved, a, **KNOWN)
    assert all(np.array_equal(back[k], a[k]) for k in a)


def test_rebasin_finds_the_units_of_a_finetune_and_never_loses():
    a, b = tiny(), tiny(seed=1)
    noisy = {k: v + np.float32(0.05) * b[k] for k, v in a.items()}
    moved = run_group(permutation.randperm, noisy, seed=4, **KNOWN)
    back = run_group(permutation.rebasin, moved, a, **KNOWN)
    assert all(np.array_equal(back[k], noisy[k]) for k in a)
    far = run_group(permutation.rebasin, b, a, **KNOWN)
    assert sum(np.vdot(far[k], a[k]) for k in a) > sum(np.vdot(b[k], a[k]) for k in a)
    for before, after in zip(outputs(b), outputs(far), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-12)


def test_rebasin_is_the_best_permutation():
    key = "x.mlp.fc2.weight"
    a, ref = ({"x.mlp.fc1.weight": normal(4, 3, seed=s), key: normal(2, 4, seed=s)} for s in (1, 2))
    result = run_group(permutation.rebasin, a, ref)

    def score(order):
        first, second = a["x.mlp.fc1.weight"][list(order)], a[key][:, list(order)]
        return np.vdot(first, ref["x.mlp.fc1.weight"]) + np.vdot(second, ref[key])

    best = max(itertools.permutations(range(4)), key=score)
    assert np.array_equal(result[key], a[key][:, best])


def test_attention_with_unknown_heads_is_left_alone():
    a = tiny()
    moved = run_group(permutation.randperm, a, norm_groups=GROUPS)
    for k in a:
        if "attn" in k:
            assert np.array_equal(moved[k], a[k]), k
    for before, after in zip(outputs(a), outputs(moved), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-12)
    # 32 groups do not divide 12 channels; names that only look alike are no sites
    assert not [s for s in permutation.find_sites(Models(a)) if s.name.startswith("r/")]
    other = {k.replace("text_model.encoder", "vision_model.encoder"): v for k, v in a.items()}
    found = [s.name for s in permutation.find_sites(Models(other), text_heads=HEADS)]
    assert not [n for n in found if "vision" in n and not n.endswith(("/0", "/6"))]


def test_a_fused_projection_must_hold_three_parts():
    p = "o.transformer.resblocks.1.attn."
    two = {p + "in_proj_weight": normal(8, 4), p + "out_proj.weight": normal(4, 4)}
    assert not list(permutation.find_sites(Models(two), text_heads=2))
    three = {**two, p + "in_proj_weight": normal(12, 4)}
    assert len(list(permutation.find_sites(Models(three), text_heads=2))) == 2


def test_heads_of_known_models_are_looked_up():
    def blocks(width, context):
        p = "m.transformer_blocks.0.attn2."
        m = {p + "to_q.weight": (width, width), p + "to_k.weight": (width, context)}
        shapes = Models({k: np.broadcast_to(np.float32(0), s) for k, s in m.items()})
        return [(s.blocks, s.size) for s in permutation.find_sites(shapes)]

    assert blocks(320, 768) == [(8, 40)]
    assert blocks(320, 1024) == [(5, 64)]
    assert blocks(1280, 2048) == [(20, 64)]
    assert blocks(320, 64) == []


def test_balance_attention_keeps_the_function_and_evens_the_factors():
    a = tiny()
    r = run_group(permutation.balance_attention, a, heads=HEADS, text_heads=HEADS)
    for before, after in zip(outputs(a), outputs(r), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)
    p = "t.text_model.encoder.layers.3.self_attn."
    q, k = (
        np.hstack([r[p + n + ".weight"], r[p + n + ".bias"][:, None]]).astype(float)
        for n in ("q_proj", "k_proj")
    )
    half = WIDTH // HEADS
    for h in (slice(0, half), slice(half, None)):
        np.testing.assert_allclose(q[h] @ q[h].T, k[h] @ k[h].T, rtol=1e-3, atol=1e-3)
    assert not np.allclose(r[p + "q_proj.weight"], a[p + "q_proj.weight"])
    swapped = run_group(permutation.balance_attention, a, power=1.0, text_heads=HEADS)
    q = np.hstack([swapped[p + "q_proj.weight"], swapped[p + "q_proj.bias"][:, None]])[:half]
    k = np.hstack([a[p + "k_proj.weight"], a[p + "k_proj.bias"][:, None]])[:half]
    np.testing.assert_allclose(q @ q.T, k @ k.T, rtol=1e-3, atol=1e-3)
    assert np.array_equal(r["u.norm.weight"], a["u.norm.weight"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_units_that_are_not_finite_stay_where_they_are_known(bad):
    a, b = tiny(), tiny(seed=1)
    key = "t.text_model.encoder.layers.3.self_attn.q_proj.weight"
    b[key][0, 3] = bad
    with np.errstate(invalid="ignore"):
        r = run_group(permutation.balance_attention, b, heads=HEADS, text_heads=HEADS)
        assert all(np.isfinite(x).all() for k, x in r.items() if ".self_attn." not in k)
        half = WIDTH // HEADS
        assert np.isnan(r[key][:half]).all()
        assert np.isfinite(r[key][half:]).all()
        for first, second in ((a, b), (b, a)):
            found = run_group(permutation.rebasin, first, second, **KNOWN)
            for k, x in found.items():
                before, after = (np.sort(v.ravel()) for v in (first[k], x))
                assert np.array_equal(before, after, equal_nan=True)


def test_rebasin_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(Refusal, match=r'pip install "plymix\[scipy\]"'):
        run_group(permutation.rebasin, tiny(), tiny(), **KNOWN)


def test_group_methods_on_torch():
    a = {k: to_torch(v) for k, v in tiny().items()}
    moved = run_group(permutation.randperm, a, **KNOWN)
    back = run_group(permutation.rebasin, moved, a, **KNOWN)
    assert all(np.array_equal(back[k].numpy(), a[k].numpy()) for k in a)
    here = run_group(permutation.balance_attention, tiny(), heads=HEADS)
    there = run_group(permutation.balance_attention, a, heads=HEADS)
    for k in a:
        np.testing.assert_allclose(there[k].numpy(), here[k], atol=1e-6)


# -- tuning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.0, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_clip_xor(h, size):
    a, b = normal(20, 15, dtype=np.float64), size * normal(20, 15, seed=1, dtype=np.float64)
    overlap = np.where(np.sign(a) == np.sign(b), np.sign(a) * np.minimum(abs(a), abs(b)), 0)
    union = a + b - overlap
    d = union - a
    k = int((0.10 + 0.45 * h) * 300)
    d = np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-k], d, 0)
    cosine = (a * union).sum() / np.linalg.norm(a) / np.linalg.norm(union)
    g = 1 / (1 + np.exp(-(cosine - (0.35 - 0.20 * h)) / (0.12 + 0.08 * (1 - h))))
    s = 0.12 + 0.38 * h
    step = s * g * d
    r = a + step * min(1, s * np.linalg.norm(a) / np.linalg.norm(step))
    matched = (r - r.mean()) / r.std() * a.std() + a.mean()
    blend = 0.65 - 0.30 * h
    expected = (1 - blend) * r + blend * matched
    np.testing.assert_allclose(tuning.clip_xor(a, b, hardness=h), expected, atol=1e-9)


def test_turbo_and_deturbo():
    a, b, c = (normal(30, 20, seed=s, dtype=np.float64) for s in range(3))
    b = 1.5 * c + 0.1 * b
    s = (b * c).sum() / (c * c).sum()
    assert 1.2 < s < 1.8
    np.testing.assert_allclose(
        tuning.turbo(a, b, c, alpha=0.7),
        a * (1 - 0.7 + 0.7 * s) + 0.7 * (b - s * c),
        atol=1e-9,
    )
    r = a * (1 - 0.7 + 0.7 / s) + 0.7 * (c - b / s)
    np.testing.assert_allclose(tuning.deturbo(a, b, c, alpha=0.7), r, atol=1e-9)
    r = r + 0.35 * (c - r)
    damped = tuning.deturbo(a, b, c, alpha=0.7, damping=0.35)
    np.testing.assert_allclose(damped, r, atol=1e-9)
    r = (r - r.mean()) / r.std() * (r.std() + c.std()) / 2 + (r.mean() + c.mean()) / 2
    both = tuning.deturbo(a, b, c, alpha=0.7, damping=0.35, match=True)
    np.testing.assert_allclose(both, r, atol=1e-9)
    far = tuning.turbo(a, 100 * c, c)
    np.testing.assert_allclose(far, 4 * a + 96 * c, atol=1e-9)
    np.testing.assert_allclose(tuning.turbo(a, b, 0 * c), a + b, atol=1e-9)
    assert np.array_equal(tuning.turbo(a, b, c, alpha=0.0), a)
    assert np.array_equal(tuning.deturbo(a, b, c, alpha=0.0), a)


def test_turbo_compares_evenly_spaced_samples():
    c = np.ones(5000)
    b = np.where(np.arange(5000) % 3 == 0, 2.0, 9.0)
    np.testing.assert_allclose(tuning.turbo(0 * c, b, c), b - 2.0)


def test_adjust():
    u = "model.diffusion_model."
    changes = tuning.adjust((2, -1, 3, 1, 1, 2, 0, -1))
    shift = [-1 + 2 * 1 - 1 * 1, 1 / 3 + 2 * 1 - 0, 2 / 3 + 0 - 1]
    assert changes == {
        u + "input_blocks.0.0.weight": (0.98, ()),
        u + "input_blocks.0.0.bias": (1.04, ()),
        u + "out.0.weight": (1.01, ()),
        u + "out.0.bias": (0.98, ()),
        u + "out.2.weight": (0.97, ()),
        u + "out.2.bias": (1.0, pytest.approx([0.02, *(0.02 * v for v in shift)])),
    }
    assert tuning.adjust([0] * 8) == {}
    xl = tuning.adjust([0, 0, 0, 0, 1, 2, 3, 4], "sdxl")
    assert xl == {u + "out.2.bias": (1.0, pytest.approx([0, 0.02 * -5, 0.02 * 1, 0.02 * 1]))}
    old = tuning.adjust([0, 0, 0, 1, 2, 3, 4])
    assert old == {u + "out.2.bias": (1.0, pytest.approx([0.02, 0.04, 0.06, 0.08]))}
    with pytest.raises(Refusal, match="3 values"):
        tuning.adjust([1, 2, 3])
    with pytest.raises(Refusal, match="sdlx"):
        tuning.adjust([0] * 8, "sdlx")


def test_vae_saturation():
    w = normal(3, 8, 3, 3, dtype=np.float64)
    m = 0.4 * np.eye(3) + 0.6 / 3 * np.ones((3, 3))
    expected = np.einsum("ij,jabc->iabc", m, w)
    np.testing.assert_allclose(
        tuning.vae_saturation(w, key=tuning.VAE_OUTPUTS[0], saturation=0.4), expected, atol=1e-12
    )
    bias = normal(3, seed=1, dtype=np.float64)
    np.testing.assert_allclose(
        tuning.vae_saturation(bias, key=tuning.VAE_OUTPUTS[1], saturation=0.4), m @ bias, atol=1e-12
    )
    assert tuning.vae_saturation(w, key=tuning.VAE_OUTPUTS[0], saturation=1.0) is w
    with pytest.raises(Refusal, match="three colour"):
        tuning.vae_saturation(normal(4, 2), key=tuning.VAE_OUTPUTS[0], saturation=0.5)


def test_cfg_sensitivity():
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0."
    assert tuning.cfg_sensitivity(block + "attn2.to_k.weight", 1.1) == 1.1
    assert tuning.cfg_sensitivity(block + "attn2.to_q.weight", 1.1) == 1.0
    assert tuning.cfg_sensitivity(block + "attn1.to_k.weight", 1.1) == 1.0
    assert tuning.cfg_sensitivity(block + "attn2.to_out.0.weight", 1.1, ("out",)) == 1.1
    with pytest.raises(Refusal, match="did you mean"):
        tuning.cfg_sensitivity("k", 1.1, ("ouut",))


def test_prepare_functions_take_the_methods_parameters():
    for method in registered().values():
        if method.prepare:
            names = set(inspect.signature(method.prepare).parameters) - {"tensors"}
            assert names == {p.name for p in method.params}, method.name
