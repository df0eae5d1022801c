"""Each method against its formula, written out naively in float64 here, and its edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from plymix.errors import Refusal
from plymix.methods import angular, arrays, elementwise, exchange, linear, spectral
from plymix.methods import cosine as cosine_family
from plymix.registry import get_method

SHAPES = [(7,), (6, 5), (4, 3, 3, 3), (5, 2, 1, 1), (1, 7)]
"""A bias, a matrix, a 3x3 and a 1x1 convolution, and a matrix of one row."""


def three(shape, seed=0):
    """A, B and C: related as fine-tunes of one model are, with some exact zeros and equals."""
    r = np.random.default_rng(seed)
    c = r.standard_normal(shape)
    a, b = c + 0.5 * r.standard_normal(shape), c + 0.5 * r.standard_normal(shape)
    for x in (a, b, c):
        x[r.random(shape) < 0.1] = 0
    a, b = np.where(r.random(shape) < 0.1, c, a), np.where(r.random(shape) < 0.1, c, b)
    return tuple(x.astype(np.float32) for x in (a, b, c))


def wide(*xs):
    return tuple(x.astype(np.float64) for x in xs)


def same(found, expected, tolerance=2e-6):
    assert np.asarray(found).dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def nan0(x):
    return np.where(np.isfinite(x), x, 0)


@pytest.fixture(params=SHAPES, ids=str)
def abc(request):
    return three(request.param)


# -- linear ---------------------------------------------------------------------------------------


def test_linear_formulas(abc):
    a, b, c = abc
    x, y, z = wide(*abc)
    same(linear.weighted_sum(a, b, alpha=0.2), 0.8 * x + 0.2 * y)
    same(linear.n_average(a, b, c, weights=(1, 2, 5)), (x + 2 * y + 5 * z) / 8)
    same(linear.n_average(a, b, c, weights=(1, 2, 5), normalize=False), x + 2 * y + 5 * z)
    same(linear.add_difference(a, b, c, alpha=0.7), x + 0.7 * (y - z))
    same(linear.task_arithmetic(a, b, c), x + (y - x) + (z - x))
    same(
        linear.task_arithmetic(a, b, c, weights=(1, 3), normalize=True, scale=0.5),
        x + 0.5 * ((y - x) + 3 * (z - x)) / 4,
    )
    same(linear.subtract(a, b, scale=2), 2 * (x - y))
    same(linear.scaled(a, scale=-0.5), -x / 2)
    same(linear.added(a, b), x + y)
    same(linear.triple_sum(a, b, c, alpha=0.2, beta=0.5), 0.3 * x + 0.2 * y + 0.5 * z)
    once = 0.8 * x + 0.2 * y
    same(linear.sum_twice(a, b, c, alpha=0.2, beta=0.4), 0.6 * once + 0.4 * z)
    same(linear.weighted_subtraction(a, b, alpha=0.5, beta=0.4), (x - 0.2 * y) / 0.8)
    same(linear.affine_sum(a, b, weight_a=0.9, weight_b=0.3), 0.9 * x + 0.3 * y)
    same(linear.passthrough(a, scale=1.5), 1.5 * x)
    same(linear.extrapolate(a, b, k=0.3), y + 0.3 * (y - x))
    s = [1 / (1 + math.exp(-v)) for v in (1.2, 0.3)]
    same(linear.logistic_sum(a, b, alpha=0.3), s[0] * (x + y) - s[1] * x)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_smoothstep_and_its_inverse_undo_each_other(alpha, other):
    one, zero = np.float64(1), np.float64(0)
    t = float(linear.smoothstep_sum(zero, one, alpha=alpha))
    assert float(linear.inv_smoothstep_sum(zero, one, alpha=t)) == pytest.approx(alpha, abs=1e-6)
    assert t == pytest.approx(3 * alpha**2 - 2 * alpha**3)
    assert (t <= float(linear.smoothstep_sum(zero, one, alpha=other))) == (
        alpha <= other
    ) or t == pytest.approx(linear.smoothstep_sum(zero, one, alpha=other))


def test_inverse_smoothstep_formula():
    found = linear.inv_smoothstep_sum(np.float64(0), np.float64(1), alpha=0.2)
    assert found == pytest.approx(0.5 - math.sin(math.asin(0.6) / 3))


def test_weighted_subtraction_undoes_a_weighted_sum():
    a, b, _ = three((6, 5))
    mixed = linear.weighted_sum(a, b, alpha=0.3)
    same(linear.weighted_subtraction(mixed, b, alpha=0.6, beta=0.5), a)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 0.5), (-2, -1)])
def test_weighted_subtraction_refuses_its_singularity(alpha, beta):
    with pytest.raises(Refusal, match=r"alpha \* beta"):
        linear.weighted_subtraction(np.ones(3), np.ones(3), alpha=alpha, beta=beta)


def test_weights_must_fit_the_models():
    x = np.ones(3, np.float32)
    with pytest.raises(Refusal, match="2 weights for 3 models"):
        linear.n_average(x, x, x, weights=(1, 2))
    with pytest.raises(Refusal, match="sum to 0"):
        linear.n_average(x, x, weights=(1, -1))
    same(linear.n_average(x, 2 * x, weights=(1, -1), normalize=False), -x)


def test_weights_that_sum_to_one_leave_nothing_of_the_base():
    """0.3 + 0.7 is not 1 when subtracted one by one; the coefficient must be 0 all the same."""
    base = np.array([np.inf], np.float64)
    with np.errstate(invalid="ignore"):
        found = linear.task_arithmetic(base, base * 0, base * 0, weights=(0.3, 0.7))
    assert np.isnan(found).all()  # inf * 0, where any other coefficient gives inf
    assert 1 - (0.3 + 0.7) == 0


@pytest.mark.parametrize("function", [linear.self_scale, elementwise.plus_random])
@pytest.mark.parametrize("key", ["x.to_out.0.weight", "x.proj_out.bias", "x.norm1.weight"])
def test_scaling_methods_keep_outputs_and_norms(function, key):
    a = np.ones((3, 2), np.float32)
    extra = {"rng": np.random.default_rng} if function is elementwise.plus_random else {}
    assert (function(a, alpha=0.5, key=key, **extra) == a).all()
    assert not (function(a, alpha=0.5, key="x.to_q.weight", **extra) == a).all()
    assert (function(a, alpha=0, key="x.to_q.weight", **extra) == a).all()


def test_self_and_replace():
    a, b = np.ones(3, np.float32), np.full(3, 4, np.float32)
    assert (linear.self_scale(a, alpha=0.5, key="x") == 0.5).all()
    assert (linear.replace(a, b, alpha=1, key="x") == 4).all()
    assert (linear.replace(a, b, alpha=0.25, key="x") == 1).all()
    assert (linear.replace(a, b, alpha=1, key="x.norm") == 1).all()
    assert (linear.replace(a, b, alpha=0, key="x") == 1).all()


@pytest.mark.parametrize(
    ("name", "parameter", "outside"),
    [
        ("smoothstep_sum", "alpha", 1.01),
        ("inv_smoothstep_sum", "alpha", -0.01),
        ("geometric_sum", "alpha", 1.5),
        ("multiply_difference", "beta", 2),
        ("multiply_quotient", "alpha", -1),
        ("nearswap", "t", -1e-9),
        ("clamp", "stiffness", 1.5),
        ("euclidean_add_difference", "alpha", 1.5),
        ("extract", "gamma", -1),
        ("tensor", "alpha", -0.5),
        ("copy_region", "beta", 1.5),
        ("sparse_topk_delta", "beta", 1.1),
        ("distribution_crossover", "alpha", 1.1),
        ("crossover", "alpha", -0.1),
        ("karcher", "max_iter", 0),
    ],
)
def test_domain_limits(name, parameter, outside):
    with pytest.raises(Refusal, match="outside its range"):
        get_method(name).param(parameter).check(outside, name)


def test_a_list_of_weights_is_a_parameter():
    weights = get_method("n_average").param("weights")
    assert weights.check([1, 0.5], "step") == (1.0, 0.5)
    assert weights.check((), "step") == ()
    for wrong in (1.0, "1, 2", [1, "x"], [1, float("nan")], [True]):
        with pytest.raises(Refusal, match="weights"):
            weights.check(wrong, "step")


# -- element by element ---------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_geometric_sum_is_the_real_part_of_a_complex_power(abc, alpha):
    a, b, _ = abc
    x, y = (v.astype(np.complex128) for v in (a, b))
    same(elementwise.geometric_sum(a, b, alpha=alpha), (x ** (1 - alpha) * y**alpha).real)


def test_geometric_sum_of_numbers_far_apart():
    """Ratios that no float32 holds, zeros, infinities and NaN among ordinary numbers."""
    odd = [0, -0.0, 1e-44, -1e-38, 1e-20, 2, -3, 1e20, 3e38, np.inf, -np.inf, np.nan]
    a, b = (x.ravel() for x in np.meshgrid(np.float32(odd), np.float32(odd)))
    x, y = wide(a, b)
    with np.errstate(all="ignore"):
        turn = np.where(np.signbit(x) == np.signbit(y), 1, math.cos(0.3 * math.pi))
        expected = np.copysign(np.abs(x) ** 0.7 * np.abs(y) ** 0.3, x) * turn
        expected = expected.astype(np.float32)
        found = elementwise.geometric_sum(a, b, alpha=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("beta", [0, 0.6, 1])
def test_multiply_difference(abc, alpha, beta):
    x, y, z = wide(*abc)
    sizes = abs(x - z), abs(y - z)
    size = sizes[0] ** (1 - alpha) * sizes[1] ** alpha
    size = sizes[0] if alpha == 0 else sizes[1] if alpha == 1 else size
    expected = z + np.copysign(size, (1 - beta) * x + beta * y - z)
    same(elementwise.multiply_difference(*abc, alpha=alpha, beta=beta), expected, 1e-5)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 1.5])
def test_multiply_quotient(abc, alpha):
    x, y, z = wide(*abc)
    with np.errstate(all="ignore"):
        la, lb = np.log(abs(x)) - np.log(abs(z)), np.log(abs(y)) - np.log(abs(z))
        t = np.maximum(abs(la), abs(lb))
        e = alpha * np.maximum(0, -np.where(np.isnan(la * lb / t**2), 0, la * lb / t**2))
        r = (x * (y / z).astype(complex) ** e).real
    expected = np.where(np.isnan(r), x, r)
    same(elementwise.multiply_quotient(*abc, alpha=alpha), expected, 1e-5)


def test_masks(abc):
    x, y, z = wide(*abc)
    with np.errstate(all="ignore"):
        train = 1.8 * nan0(abs(y - x) / (abs(y - x) + abs(y - z)))
        opposite = 2 * nan0(abs(x - y) / (abs(x - y) + abs(x + y - 2 * z)))
        t = np.maximum(abs(x - z), abs(y - z))
        strict = 2 * np.maximum(0, nan0((z - x) * (y - z) / t**2))
    for function, mask in [
        (elementwise.train_difference, train),
        (elementwise.add_opposite, opposite),
        (elementwise.add_strict_opposite, strict),
    ]:
        same(function(*abc, alpha=0.7), x + 0.7 * mask * (y - z))
        assert (function(*abc, alpha=0) == abc[0]).all()


@pytest.mark.parametrize("beta", [0, 0.4, 1])
def test_similarity_add_difference(abc, beta):
    x, y, z = wide(*abc)
    with np.errstate(all="ignore"):
        s = beta * (x * y / np.maximum(abs(x), abs(y)) ** 2 + 1) / 2
    s = np.where(np.isnan(s), beta, s)
    p, q = x + 0.3 * (y - z), 0.85 * x + 0.15 * y
    expected = (1 - s) * p + s * q
    same(elementwise.similarity_add_difference(*abc, alpha=0.3, beta=beta), expected)


def test_similarity_of_tiny_weights_survives_float32():
    a = np.array([1e-25, 1e-25], np.float32)
    b = np.array([1e-25, -1e-25], np.float32)
    found = elementwise.similarity_add_difference(a, b, a * 0, alpha=1.0, beta=1.0)
    np.testing.assert_allclose(found, [1e-25, 0], rtol=1e-6, atol=1e-31)  # average; A + B


@pytest.mark.parametrize("t", [0, 1e-4, 0.3, 10])
def test_nearswap(abc, t):
    a, b, _ = abc
    x, y = wide(a, b)
    w = np.clip(t / np.maximum(abs(x - y), 1e-6), 0, 1)
    found = elementwise.nearswap(a, b, t=t)
    same(found, w * y + (1 - w) * x)
    assert (found[w == 1] == b[w == 1]).all()
    assert (found[w == 0] == a[w == 0]).all()


def test_magmax_takes_the_largest_change_and_the_later_of_equals():
    base = np.array([1, 1, 1, 1], np.float32)
    x = np.array([3, 0, 1, 2], np.float32)
    y = np.array([0, 4, 1, 0], np.float32)
    assert elementwise.magmax(base, x, y, scale=1.0).tolist() == [3, 4, 1, 0]
    assert elementwise.magmax(base, y, x, scale=1.0).tolist() == [3, 4, 1, 2]
    assert elementwise.magmax(base, x, y).tolist() == [2, 2.5, 1, 0.5]


def test_maximum_and_minimum(abc):
    a, b, _ = abc
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    assert elementwise.maximum(a, b).ravel().tolist() == [max(p) for p in pairs]
    assert elementwise.minimum(a, b).ravel().tolist() == [min(p) for p in pairs]


def test_clamp_with_stiffness():
    """Bounds 0, 1, 5, 10 have mean 4: stiffness 1 limits to 1..5, half of it to 0.5..7.5."""
    bounds = [np.full(5, v, np.float32) for v in (0, 1, 5, 10)]
    a = np.array([-9, 0.7, 3, 6, 99], np.float32)
    assert elementwise.clamp(a, *bounds).tolist() == pytest.approx([0, 0.7, 3, 6, 10])
    found = elementwise.clamp(a, *bounds, stiffness=0.5)
    assert found.tolist() == pytest.approx([0.5, 0.7, 3, 6, 7.5])
    found = elementwise.clamp(a, *bounds, stiffness=1.0)
    assert found.tolist() == [1, 1, 3, 5, 5]
    # two bounds: no effect
    assert elementwise.clamp(a, *bounds[2:], stiffness=1.0).tolist() == [5, 5, 5, 6, 10]


@given(st.floats(-1e3, 1e3, width=32), st.integers(3, 7))
@settings(deadline=None, max_examples=50)
def test_clamp_to_equal_bounds_is_that_bound(value, count):
    """The mean of equal numbers may round past them; the limits must not."""
    bounds = [np.array([value], np.float32)] * count
    found = elementwise.clamp(np.zeros(1, np.float32), *bounds, stiffness=0.5)
    assert found == np.float32(value)


def test_clip_to_ab():
    r, a, b = (np.array(v, np.float32) for v in ([0, 5, 9], [1, 6, 6], [3, 2, 2]))
    assert elementwise.clip_to_ab(r, a, b).tolist() == [1, 5, 6]


def test_plus_random_is_normal_noise_of_its_seed():
    a = np.ones((100, 200), np.float32)

    def draw(seed):
        return elementwise.plus_random(
            a, alpha=0.5, key="x", rng=lambda i: np.random.default_rng([seed, i])
        )

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).mean() > 0.99
    assert draw(1).mean() == pytest.approx(1, abs=0.02)
    assert draw(1).std() == pytest.approx(0.5, abs=0.02)


# -- one direction per tensor ---------------------------------------------------------------------


def angle(x, y):
    return math.acos(np.clip(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 0.9, 1.5])
def test_slerp(abc, alpha):
    a, b, _ = abc
    x, y = wide(a, b)
    nx, ny, w = np.linalg.norm(x), np.linalg.norm(y), angle(x, y)
    p, q = math.sin((1 - alpha) * w) / math.sin(w), math.sin(alpha * w) / math.sin(w)
    expected = (p * x / nx + q * y / ny) * ((1 - alpha) * nx + alpha * ny)
    found = angular.slerp(a, b, alpha=alpha)
    same(found, expected)
    assert np.linalg.norm(found) == pytest.approx(abs((1 - alpha) * nx + alpha * ny), rel=1e-5)
    same(angular.slerp_mergekit(a, b, alpha=alpha), p * x + q * y)
    same(angular.nuslerp(a, b, alpha=alpha), p * x + q * y)


@pytest.mark.parametrize("function", [angular.slerp, angular.slerp_mergekit, angular.nuslerp])
@pytest.mark.parametrize("factor", [1, 2, -1, 0])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_linear(function, factor):
    a = three((6, 5))[0]
    found = function(a, a * factor, alpha=0.25)
    if factor == 0 and function is not angular.slerp:  # cos w = 0 there: a quarter circle
        same(found, math.sin(0.75 * math.pi / 2) * a)
    else:
        same(found, 0.75 * a + 0.25 * factor * a)


@pytest.mark.parametrize("axis", ["last", "first"])
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_of_single_vectors(abc, axis, with_base):
    a, b, c = abc
    if a.ndim == 1:
        return  # one vector: the method for whole tensors
    x, y, z = wide(*abc)
    u, v = (x - z, y - z) if with_base else (x, y)
    along = 0 if axis == "first" else -1
    u, v = np.moveaxis(u, along, -1), np.moveaxis(v, along, -1)
    expected = np.empty_like(u)
    for i in np.ndindex(u.shape[:-1]):
        lengths = (max(np.linalg.norm(s), 1e-7) for s in (u[i], v[i]))
        w = math.acos(np.clip(np.sum(u[i] * v[i]) / math.prod(lengths), -1, 1))
        p, q = 0.7, 0.3
        if abs(math.sin(w)) > 1e-6:
            p, q = math.sin(0.7 * w) / math.sin(w), math.sin(0.3 * w) / math.sin(w)
        elif w > 1:
            p = q = math.nan  # opposite: any direction is as good; not compared
        expected[i] = p * u[i] + q * v[i]
    expected = np.moveaxis(expected, -1, along) + (z if with_base else 0)
    found = angular.nuslerp(a, b, c if with_base else None, alpha=0.3, axis=axis)
    same(np.where(np.isnan(expected), 0, found), nan0(expected), 1e-5)


def test_nuslerp_with_base_adds_it_back(abc):
    a, b, c = abc
    x, y, z = wide(*abc)
    w = angle(x - z, y - z)
    p, q = math.sin(0.7 * w) / math.sin(w), math.sin(0.3 * w) / math.sin(w)
    same(angular.nuslerp(a, b, c, alpha=0.3), z + p * (x - z) + q * (y - z))


def test_norm_direction(abc):
    a, b, _ = abc
    x, y = wide(a, b)
    nx, ny = np.linalg.norm(x), np.linalg.norm(y)
    u = 0.3 * x / nx + 0.7 * y / ny
    same(angular.norm_direction(a, b, alpha=0.7), u / np.linalg.norm(u) * (0.3 * nx + 0.7 * ny))
    same(angular.norm_direction(a, -a, alpha=0.5), 0 * a)  # no direction: the weighted sum


@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(abc, with_base):
    a, b, c = abc
    x, y, z = wide(*abc)
    base = 0.1 * y + 0.3 if with_base else 0 * y
    ws = np.array([0.2, 0.5, 0.3])
    xs = np.stack([v - base for v in (x, y, z)]).reshape(3, -1)
    us = xs / (np.linalg.norm(xs, axis=1, keepdims=True) + 1e-8)
    m = ws @ us
    m /= np.linalg.norm(m)
    v = ws @ (us - (us @ m)[:, None] * m)
    r = np.linalg.norm(v) + 1e-8
    q = m * math.cos(r) + v * math.sin(r) / r
    expected = base + (q * (ws @ np.linalg.norm(xs, axis=1))).reshape(a.shape)
    given_base = base.astype(np.float32) if with_base else None
    same(angular.multislerp(given_base, a, b, c, weights=(2, 5, 3)), expected, 1e-5)


def test_multislerp_of_directions_that_cancel():
    e = np.eye(2, dtype=np.float32)[0]
    same(angular.multislerp(None, e, -e), 0 * e)
    with pytest.raises(Refusal, match="cancel out"):
        angular.multislerp(None, e, -e, e, -e)


@pytest.mark.parametrize("weights", [(), (1, 2, 5)])
def test_karcher(abc, weights):
    xs = np.stack(wide(*abc)).reshape(3, -1)
    ws = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    lengths = np.linalg.norm(xs, axis=1)
    us = xs / lengths[:, None]
    u = ws @ us / np.linalg.norm(ws @ us)
    for _ in range(10):
        step = np.zeros_like(u)
        for w, ui in zip(ws, us, strict=True):
            c = np.clip(u @ ui, -1, 1)
            th = math.acos(c)
            if th >= 1e-5:
                step += w * th / math.sin(th) * (ui - c * u)
        length = np.linalg.norm(step)
        if length < 1e-5:
            break
        u = math.cos(length) * u + math.sin(length) * step / length
        u /= np.linalg.norm(u)
    expected = (u * (ws @ lengths)).reshape(abc[0].shape)
    same(angular.karcher(*abc, weights=weights), expected, 1e-5)


def test_karcher_of_two_is_halfway_slerp_and_ignores_zero_directions():
    a, b, _ = three((6, 5))
    half = angular.slerp(a, b, alpha=0.5)
    same(angular.karcher(a, b), half, 1e-5)
    same(angular.karcher(a, b, 0 * a), half * (2 / 3), 1e-5)  # but counts them in the length
    assert (angular.karcher(0 * a, 0 * a) == 0).all()
    assert np.isfinite(angular.karcher(a, -a)).all()


def test_perpendicular_and_its_relatives(abc):
    a, b, c = abc
    x, y, z = wide(*abc)

    def perp(p, q):
        return q - p * np.sum(p * q) / np.sum(p * p)

    assert abs(np.sum(perp(x, y) * x)) < 1e-12
    same(angular.perpendicular(a, b), perp(x, y))
    same(angular.add_perpendicular(a, b, c, alpha=0.6), x + 0.6 * perp(x - z, y - z))
    same(angular.ortho_delta(a, b, alpha=0.6), x + 0.6 * perp(x, y - x))
    assert (angular.perpendicular(0 * a, b) == b).all()
    same(angular.add_perpendicular(c, b, c, alpha=1.0), y)


@pytest.mark.parametrize("alpha", [0, 0.7])
def test_orthonorm(abc, alpha):
    x, *ms = wide(*abc)
    acc = 0 * x
    for m in ms:
        w = x + acc
        g = m - 4 / math.pi * math.atan2(np.sum(w * m), np.sum(w * w)) * w
        g *= max(np.linalg.norm(m), 1e-6) / max(np.linalg.norm(g), 1e-6)
        acc = acc + (alpha or 1 / math.sqrt(2)) * g
    same(angular.orthonorm(*abc, alpha=alpha), acc, 1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_euclidean_add_difference(abc, alpha):
    x, y, z = wide(*abc)
    da, db = (v / np.linalg.norm(v) for v in (x - z, y - z))
    v = (1 - alpha) * x + alpha * y - z
    e = np.copysign(np.sqrt((1 - alpha) * da**2 + alpha * db**2), v)
    expected = z + e / np.linalg.norm(e) * np.linalg.norm(v)
    # where v is 0 in exact arithmetic its sign is rounding's
    found = angular.euclidean_add_difference(*abc, alpha=alpha)
    clear = abs(v) > 1e-6
    same(found[clear], expected[clear], 1e-5)


def test_euclidean_add_difference_of_equal_models():
    a, b, c = three((6, 5))
    assert (angular.euclidean_add_difference(c, c, c, alpha=0.5) == c).all()
    half = c + (b - c) * math.sqrt(0.5) / math.sqrt(0.5) * 0.5
    same(angular.euclidean_add_difference(c, b, c, alpha=0.5), half)
    assert (angular.euclidean_add_difference(a, b, c, alpha=0.0) == a).all()


# -- rows and columns -----------------------------------------------------------------------------


def cosine(x, y, axis, eps=1e-8):
    sizes = np.linalg.norm(x, axis=axis, keepdims=True) * np.linalg.norm(
        y, axis=axis, keepdims=True
    )
    return np.sum(x * y, axis=axis, keepdims=True) / np.maximum(sizes, eps)


def test_cosine_local(abc):
    a, b, _ = abc
    x, y = wide(a, b)
    s = cosine(x, y, 0)
    k = 1 - np.clip(s - 0.2, 0, 1)
    same(cosine_family.cosine_local_a(a, b, alpha=0.2), x + k * (y - x))
    c = (s + cosine(x.ravel(), y.ravel(), 0)) / 2
    k = 1 - np.clip(c - 0.2, 0, 1)
    same(cosine_family.cosine_local_b(a, b, alpha=0.2), x + k * (y - x))


class Keys(dict):
    def shape(self, key):
        return self[key][0].shape


def test_cosine_over_all_keys(abc):
    """Several keys, against the definition; the trim is numpy's midpoint percentile, twice."""
    tensors = Keys({f"k{i}": three((8, 9), seed=i)[:2] for i in range(6)})
    tensors["first_stage_model.x"] = three((8, 9), seed=7)[:2]
    tensors["scalar"] = (np.float32(1), np.float32(2))
    for wanted, function, prepare in [
        ("a", cosine_family.cosine_a, cosine_family.prepare_cosine_a),
        ("b", cosine_family.cosine_b, cosine_family.prepare_cosine_b),
    ]:
        seen, combined = [], {}
        for key in list(tensors)[:6]:
            x, y = wide(*tensors[key])
            if wanted == "a":
                x, y = (v / np.linalg.norm(v, axis=0, keepdims=True) for v in (x, y))
            s = cosine(x, y, 0)
            combined[key] = (s + cosine(x.ravel(), y.ravel(), 0)) / 2
            seen.append((s if wanted == "a" else combined[key]).ravel())
        seen = np.concatenate(seen)
        seen = seen[~(seen < np.percentile(seen, 1, method="midpoint"))]
        seen = seen[~(seen > np.percentile(seen, 99, method="midpoint"))]
        state = prepare(tensors, alpha=0.2)
        assert state == pytest.approx((seen.min(), seen.max()), abs=1e-6)
        for key, c in combined.items():
            x, y = wide(*tensors[key])
            k = np.clip((c - seen.min()) / (seen.max() - seen.min()) - 0.2, 0, 1)
            found = function(*tensors[key], alpha=0.2, key=key, state=state)
            same(found, (1 - k) * y + k * x, 1e-5)
            found = function(*tensors[key], alpha=1.0, key=key, state=state)
            assert (found == tensors[key][1]).all()
        for key in ("first_stage_model.x", "scalar"):
            found = function(*tensors[key], alpha=0.2, key=key, state=state)
            assert (found == tensors[key][0]).all()


@pytest.mark.parametrize(
    ("function", "prepare"),
    [
        (cosine_family.cosine_a, cosine_family.prepare_cosine_a),
        (cosine_family.cosine_b, cosine_family.prepare_cosine_b),
    ],
)
def test_cosine_without_spread_and_with_empty_columns(function, prepare):
    a = np.ones((4, 3), np.float32)
    a[:, 1] = 0
    b = 2 * a
    state = prepare(Keys(k=(a, b)))
    if function is cosine_family.cosine_a:  # all similarities are 1: k = 1 - alpha
        assert state[0] == pytest.approx(state[1], abs=1e-12)
        same(function(a, b, alpha=0.25, key="k", state=(1.0, 1.0)), 0.75 * a + 0.25 * b)
    zero = (0 * a, 0 * a)
    assert prepare(Keys(k=zero)) == (1.0, 1.0)
    # A without any direction counts as alike: k = 1 - 0.25
    same(function(0 * b, b, alpha=0.25, key="k", state=(0.0, 1.0)), 0.25 * b)
    assert prepare(Keys()) == (1.0, 1.0)
    assert np.isfinite(function(a, b, alpha=0.3, key="k", state=state)).all()
    assert (function(*zero, alpha=0.3, key="k", state=(1.0, 1.0)) == 0).all()


def matched(r, a):
    spread = (r.std() + a.std()) / 2
    return (r - r.mean()) / r.std() * spread + (r.mean() + a.mean()) / 2


@pytest.mark.parametrize("alpha", [-0.4, 0.6])
def test_cosine_gates(abc, alpha):
    a, b, _ = abc
    x, y = wide(a, b)
    if a.ndim == 1:
        same(cosine_family.cosine_gate_blend(a, b, alpha=alpha), x + 0.25 * alpha * (y - x))
        same(cosine_family.channel_cosine_gate(a, b, alpha=alpha), x + alpha * (y - x))
        return
    axes = tuple(range(1, a.ndim))
    c = np.sum(x * y, axes, keepdims=True) / np.sqrt(
        np.sum(x * x, axes, keepdims=True) * np.sum(y * y, axes, keepdims=True)
    )
    m = np.clip(abs(alpha) * np.clip((c + 1) / 2, 0, 1), 0, 1)
    found = cosine_family.cosine_gate_blend(a, b, alpha=alpha)
    same(found, matched(x + m * (y - x), x), 1e-5)
    g = np.clip(3 * (1 - c), 0, 1)
    found = cosine_family.channel_cosine_gate(a, b, alpha=alpha, beta=3.0)
    same(found, (1 - g) * x + g * (x + alpha * (y - x)), 1e-5)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("simple", [False, True])
def test_cosine_scaled(abc, inverse, simple):
    x, y, z = wide(*abc)
    s = abs(cosine(x, y, 0))
    kept = s[s >= np.percentile(s, 1, method="midpoint")]
    kept = kept[kept <= np.percentile(kept, 99, method="midpoint")]
    low, high = kept.min(), kept.max()
    k = np.ones_like(s)
    if high - low > 1e-6:
        k = np.clip((s - low) / (high - low), 0, 1)
        k = 1 - k if inverse else k
        k = np.full_like(k, k.mean()) if simple else k
    options = {"alpha": 0.6, "inverse": inverse, "simple": simple}
    same(cosine_family.cosine_scaled(*abc[:2], **options), x + 0.6 * k * (y - x), 2e-5)
    same(cosine_family.cosine_scaled(*abc, **options), x + 0.6 * k * (y - z), 2e-5)


def test_cosine_scaled_of_scalars_is_unscaled():
    a, b, c = (np.float32(x) for x in (1, 3, 2))
    assert cosine_family.cosine_scaled(a, b, alpha=0.25) == 1.5
    assert cosine_family.cosine_scaled(a, b, c, alpha=0.25) == 1.25


@pytest.mark.parametrize("axis", ["last", "row"])
@pytest.mark.parametrize("gamma", [0.3, 0, 2])
def test_extract(abc, axis, gamma):
    x, y, z = wide(*abc)
    b, c = y - x, z - x
    if axis == "last" or x.ndim == 1:
        s = cosine(b, c, -1)
    else:
        s = cosine(b.reshape(len(b), -1), c.reshape(len(c), -1), 1)
        s = s.reshape(len(b), *[1] * (x.ndim - 1))
    d = ((np.clip(s, -1, 1) + 1) / 2) ** gamma
    expected = x + (0.8 * b + 0.2 * c) * (0.7 * d + 0.3 * (1 - d))
    found = cosine_family.extract(*abc, alpha=0.2, beta=0.3, gamma=gamma, axis=axis)
    same(found, expected, 1e-4 if gamma == 0.3 else 1e-5)  # x^0.3 is steep at s = -1


# -- exchange -------------------------------------------------------------------------------------


def letters(n):
    return np.zeros(n, np.float32), np.ones(n, np.float32)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.3, 0.0, "1110000000"),
        (0.3, 0.55, "0000011100"),
        (0.5, 0.75, "1100000111"),
        (1.0, 0.5, "1111111111"),
        (0.0, 0.5, "0000000000"),
        (0.5, 1.0, "1111100000"),
    ],
)
def test_tensor_exchange(alpha, beta, expected):
    a, b = letters(10)
    found = exchange.tensor(a, b, alpha=alpha, beta=beta)
    assert "".join(str(int(v)) for v in found) == expected
    many = exchange.tensor(np.zeros((10, 3, 3, 3)), np.ones((10, 3, 3, 3)), alpha=alpha, beta=beta)
    assert (many == found[:, None, None, None]).all()


def test_tensor2_works_on_wide_second_axes_only():
    a, b = np.zeros((4, 101), np.float32), np.ones((4, 101), np.float32)
    wide_one = exchange.tensor2(a, b, alpha=0.5, beta=0.25)
    assert (wide_one.sum(0) == [4 if 25 <= i < 75 else 0 for i in range(101)]).all()
    narrow = exchange.tensor2(a[:, :100], b[:, :100], alpha=0.5, beta=0.25)
    assert narrow.sum(1).tolist() == [0, 100, 100, 0]


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.28, 0.0, "1110000000"),  # round, where `tensor` cuts off
        (-0.3, 0.5, "0011100000"),
        (0.3, -0.3, "0000000111"),
        (0.5, 0.8, "1110000011"),
        (-1.0, 0.0, "1111111111"),
        (0.0, 0.3, "0000000000"),
        (1.0, 0.3, "1111111111"),
        (-0.5, 0.2, "1100000111"),
        (-0.8, -0.7, "1110011111"),
    ],
)
def test_copy_region(alpha, beta, expected):
    found = exchange.copy_region(*letters(10), alpha=alpha, beta=beta)
    assert "".join(str(int(v)) for v in found) == expected


def test_copy_region_of_a_scalar():
    a, b = np.float32(1), np.float32(2)
    assert exchange.copy_region(a, b, alpha=0.5) == 1
    assert exchange.copy_region(a, b, alpha=0.6) == 2


@pytest.mark.parametrize("alpha", [0.25, 0.6, 1.0, -0.4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.7])
def test_top_k_tensor_sum(abc, alpha, beta):
    a, b, c = abc
    n, sizes = a.size, np.sort(abs(a).ravel())
    width, offset = (-alpha, alpha + beta) if alpha < 0 else (alpha, beta)
    offset = math.fmod(offset if offset >= 0 else 1 + offset, 1)
    wraps = width + offset > 1
    start, end = round(offset * n), round((width + offset) * n)
    if wraps:
        start, end = round((width + offset - 1) * n), start
    v = np.sort(a.ravel())
    rank = np.argsort(np.argsort(b.ravel(), kind="stable"))
    low = sizes[start - 1] if start > 0 else -1
    inside = (abs(v) > low) & (abs(v) <= (sizes[end - 1] if end > 0 else -1))
    inside = ~inside if wraps else inside
    expected = np.where(inside[rank], v[rank], a.ravel()).reshape(a.shape)
    found = exchange.top_k_tensor_sum(a, b, alpha=alpha, beta=beta)
    assert (found == expected).all()
    deltas = exchange.top_k_tensor_sum(a - c, b - c, alpha=alpha, beta=beta)
    same(exchange.top_k_tensor_sum(a, b, c, alpha=alpha, beta=beta), c + deltas)


def test_top_k_tensor_sum_keeps_the_numbers_of_a():
    a, b, _ = three((40, 30))
    found = exchange.top_k_tensor_sum(a, b, alpha=1.0)
    assert (np.sort(found, axis=None) == np.sort(a, axis=None)).all()
    assert (np.argsort(found, axis=None)[-20:] == np.argsort(b, axis=None)[-20:]).all()


@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.99, 1])
def test_sparse_topk_delta(abc, beta):
    a, b, _ = abc
    k, d = int(a.size * beta), b - a
    threshold = np.sort(abs(d).ravel())[::-1][k - 1] if k else np.inf
    x, y = wide(a, b)
    expected = x + 0.4 * (y - x) * (abs(d) >= threshold)
    same(exchange.sparse_topk_delta(a, b, alpha=0.4, beta=beta), expected)


def test_sparse_topk_delta_moves_all_ties():
    a = np.zeros(4, np.float32)
    b = np.array([1, -2, 2, 2], np.float32)
    assert exchange.sparse_topk_delta(a, b, alpha=1.0, beta=0.25).tolist() == [0, -2, 2, 2]


# -- filters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(9,), (1,), (20, 30), (1, 7), (6, 5, 3, 3), (7, 3, 1, 1), (2, 2, 2)]
)
def test_smooth_add_against_scipy(shape):
    a, b, c = three(shape)
    x, y, z = wide(a, b, c)
    median = ndimage.median_filter(y - z, size=3, mode="reflect")
    smooth = ndimage.gaussian_filter(median, sigma=1, mode="reflect", truncate=4)
    same(spectral.smooth_add(a, b, c, alpha=0.7), x + 0.7 * smooth)
    smooth = ndimage.gaussian_filter(y - z, sigma=1, mode="reflect", truncate=4)
    same(spectral.gaussian_add(a, b, c, alpha=0.7), x + 0.7 * smooth)


def test_smooth_add_in_pieces():
    """More than one block of the median and of the blur, along each axis."""
    a, b, c = three((300, 64, 3, 3))
    x, y, z = wide(a, b, c)
    smooth = ndimage.gaussian_filter(
        ndimage.median_filter(y - z, size=3, mode="reflect"), sigma=1, mode="reflect"
    )
    same(spectral.smooth_add(a, b, c, alpha=1.0), x + smooth)
    a, b, c = three((70, 2000))
    x, y, z = wide(a, b, c)
    smooth = ndimage.gaussian_filter(y - z, sigma=1, mode="reflect")
    same(spectral.gaussian_add(a, b, c, alpha=1.0), x + smooth)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.6), (0.5, 0.0), (0.0, 0.0), (1.0, 0.4)])
def test_distribution_crossover(abc, alpha, beta):
    x, y, z = wide(*abc)
    order = np.argsort(z.ravel(), kind="stable")
    fa, fb = np.fft.rfft(x.ravel()[order]), np.fft.rfft(y.ravel()[order])
    f = np.arange(len(fa)) / len(fa)
    g = np.clip((f - alpha) / beta + 0.5, 0, 1) if beta else (f >= alpha)
    expected = np.empty(x.size)
    expected[order] = np.fft.irfft((1 - g) * fa + g * fb, x.size)
    found = spectral.distribution_crossover(*abc, alpha=alpha, beta=beta)
    same(found, expected.reshape(x.shape))


def test_distribution_crossover_gives_alpha_to_a():
    a, b, c = three((6, 5))
    assert (spectral.distribution_crossover(a, b, c, alpha=1.0, beta=0.0) == a).all()
    same(spectral.distribution_crossover(a, b, c, alpha=0.0, beta=0.0), b)
    one, two = np.float32(1), np.float32(2)
    assert spectral.distribution_crossover(one, two, one, alpha=0.25) == np.float32(1.75)


def mesh_of(shape):
    """Distance of each frequency from 0: 0 at rest, 1 where all axes are at their highest."""
    grid = np.zeros((*shape[:-1], shape[-1] // 2 + 1))
    for i in np.ndindex(grid.shape):
        squares = 0.0
        for k, n in zip(i, shape, strict=True):
            if n == 1:
                continue
            squares += (min(k, n - k) / (n // 2)) ** 2
        grid[i] = math.sqrt(squares / len(shape))
    return grid


@pytest.mark.parametrize("shape", [(8,), (6, 4), (4, 3, 3, 3), (5, 1, 2), (7, 5)])
@pytest.mark.parametrize("tilt", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.5, 4.0, -0.5])
def test_crossover(shape, tilt):
    a, b, _ = three(shape)
    x, y = wide(a, b)
    alpha = 0.37
    mesh = mesh_of(shape)
    share, t = alpha, tilt % 4
    if t > 2:
        share = 1 - alpha
    if t == 0:
        g = (mesh > 1 - share) * 1.0
    elif t == 2:
        g = (mesh < 1 - share) * 1.0
    else:
        cot = math.cos(math.pi * t / 2) / math.sin(math.pi * t / 2)
        rising = t <= 1 or 2 < t <= 3
        line = cot * share + share - cot if rising else share - cot * share
        g = np.clip(cot * mesh + line, 0, 1)
    if t > 2:
        g = 1 - g
    axes = tuple(range(len(shape)))
    mixed = (1 - g) * np.fft.rfftn(x) + g * np.fft.rfftn(y)
    same(spectral.crossover(a, b, alpha=alpha, tilt=tilt), np.fft.irfftn(mixed, shape, axes))


@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
def test_freq_band_blend(beta):
    a, b, _ = three((4, 3, 5, 7))
    x, y = wide(a, b)
    fa, fb = np.fft.fft2(x), np.fft.fft2(y)
    cut = max(int(5 * beta), 1)
    for i in range(5):
        for j in range(7):
            if max(min(i, 5 - i), min(j, 7 - j)) >= cut:
                fa[:, :, i, j] += 0.3 * (fb - fa)[:, :, i, j]
    found = spectral.freq_band_blend(a, b, alpha=0.3, beta=beta)
    same(found, np.fft.ifft2(fa).real)
    if beta == 0:
        same(found.mean((2, 3)), x.mean((2, 3)))
    a, b, _ = three((4, 3, 1, 1))
    same(spectral.freq_band_blend(a, b, alpha=0.3, beta=beta), 0.7 * a + 0.3 * b)


@pytest.mark.parametrize("shape", [(40,), (6, 5), (4, 3, 3, 3), (4, 3, 1, 1)])
@pytest.mark.parametrize("stretch", [0.3, 1, 4])
def test_feature_weighted(shape, stretch):
    a, b, _ = three(shape)
    b = b * np.float32(stretch)
    x, y = wide(a, b)
    d = y - x
    if shape[-1] == 3:
        box = np.ones((1, 1, 3, 3)) / 9
        d = 0.5 * d + 0.5 * ndimage.convolve(d, box, mode="constant")
        d = ndimage.convolve(d, box, mode="constant")
    sa, sb, sd = (v.std(ddof=1) for v in (x, y, d))
    exponent = 1 - 0.5 * (np.clip(sb / sa, 0.5, 2) - 1)
    scale = np.clip((sa / sd) ** exponent, 0.5, 1.5)
    m = x + 0.3 * scale * np.clip(math.sqrt(sa / sb), 0.8, 1.1) * d
    same(spectral.feature_weighted(a, b, alpha=0.3), matched(m, x), 1e-5)


def test_feature_weighted_without_spread_is_a_weighted_sum():
    a = np.ones((4, 4), np.float32)
    same(spectral.feature_weighted(a, 3 * a, alpha=0.5), 2 * a)
    x = three((4, 4))[0].astype(np.float64)  # float64: the steps are tiny
    for step, moves in ((0.5e-6, False), (5e-6, True)):
        d = np.resize([step, -step], x.shape)
        found = spectral.feature_weighted(x, x + d, alpha=0.3)
        assert np.allclose(found, x + 0.3 * d, rtol=0, atol=1e-12) != moves


# -- the shared maths -----------------------------------------------------------------------------


def test_reductions_of_many_elements_keep_seven_digits():
    """Four million equal numbers: a running float32 sum is off by far more."""
    x = np.full(4_000_003, 0.1, np.float32)
    exact = float(np.float32(0.1)) ** 2 * x.size
    assert arrays.dot(x, x) == pytest.approx(exact, rel=2e-7)
    assert arrays.gram(x, 2 * x)[1, 0] == pytest.approx(2 * exact, rel=2e-7)
    mean, std = arrays.moments(x + np.resize(np.float32([-0.01, 0.01]), x.size))
    assert mean == pytest.approx(0.1, rel=1e-5)
    assert std == pytest.approx(0.01, rel=1e-5)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None, max_examples=100)
def test_argsort_is_the_stable_order(values):
    x = np.array(values, np.float32)
    assert (arrays.argsort(x) == np.argsort(x, kind="stable")).all()
    assert (arrays.unsort(x[arrays.argsort(x)], arrays.argsort(x)) == x).all()


@given(st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=30)
def test_kth_smallest_counts_from_one(n, data):
    x = np.random.default_rng(n).integers(0, 9, n).astype(np.float32)
    k = data.draw(st.integers(1, n))
    assert arrays.kth_smallest(x, k) == sorted(x.tolist())[k - 1]


def test_blockwise_in_pieces_is_the_whole():
    """Broadcast along the first axis and along the others, longer than one block."""
    r = np.random.default_rng(0)
    x = r.standard_normal((700, 300), dtype=np.float32)
    for shape in [(700, 300), (1, 300), (700, 1)]:
        y = r.standard_normal(shape, dtype=np.float32)
        assert (arrays.blockwise(lambda x, y: x * y + x, x, y) == x * y + x).all()
    assert (arrays.combine([2, 0, -1], [x, x * np.nan, 3 * x]) == 2 * x - 3 * x).all()
    assert (arrays.combine([0, 0], [x, x]) == 0).all()


@given(st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_lerp_and_mix_agree_and_are_exact_at_the_ends(t):
    a, b, _ = three((6, 5))
    for found in (arrays.lerp(a, b, t), arrays.mix(a, b, np.full_like(a, t))):
        same(found, a + np.float64(t) * (b.astype(float) - a))
        assert (found[a == b] == a[a == b]).all()
    for end, expected in ((0, a), (1, b)):
        assert (arrays.lerp(a, b, end) == expected).all()
        assert (arrays.mix(a, b, np.full_like(a, end)) == expected).all()


@pytest.mark.parametrize("scalar", [False, True])
def test_choose_is_where(scalar):
    r = np.random.default_rng(3)
    x, y = (r.standard_normal((50, 7)).astype(np.float32) for _ in range(2))
    x[0, 0], y[0, 1] = np.nan, -0.0
    mask, y = r.random((50, 7)) < 0.5, 0.25 if scalar else y
    expected = np.array([p if m else q for m, p, q in zip(
        mask.ravel(), x.ravel(), np.broadcast_to(y, x.shape).ravel(), strict=True
    )], np.float32)  # fmt: skip
    found = arrays.choose(mask, x, y)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()
    rows = arrays.choose(mask[:, :1], x, y)
    assert all((rows[i] == (x[i] if mask[i, 0] else y if scalar else y[i])).all() for i in (3, 4))


def test_a_pool_lends_memory_again_only_when_no_view_is_left():
    pool = arrays.Pool()
    first = pool.empty((1 << 19,), np.float32)
    at, view = first.ctypes.data, first[5:]
    del first
    other = pool.empty((1 << 19,), np.float32)
    assert not np.may_share_memory(other, view)
    del view
    again = pool.empty((3, 1 << 17), np.float32)
    assert again.ctypes.data == at
    assert again.shape == (3, 1 << 17)
    del again, other
    larger = pool.empty((2, arrays.OWN), np.uint8)  # takes the place of one
    assert larger.nbytes == 2 * arrays.OWN
    assert [len(b) for b in pool.free] == [arrays.OWN]


def test_a_pool_serves_its_thread_only_meanwhile():
    x, pool = np.ones(1 << 20, np.float32), arrays.Pool()
    with pool.serving():
        arrays.blockwise(lambda v: v + 1, x)
    assert len(pool.free) == 1
    kept = arrays.blockwise(lambda v: v + 1, x)
    assert len(pool.free) == 1
    assert (kept == 2).all()
