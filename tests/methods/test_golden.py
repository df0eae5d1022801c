"""Results published with the formulas: computed with the original tools' own functions.

Inputs are three 2 x 3 tensors, alpha 0.3 and beta 0.6 unless a row says otherwise; the vectors are
good to 1e-5.
"""

from __future__ import annotations

import numpy as np
import pytest

from plymix.methods import angular, elementwise, exchange, linear, spectral
from plymix.methods import cosine as cosine_family

A = np.array([[0.5, -1, 2], [1.5, 0.25, -0.75]], dtype=np.float32)
B = np.array([[1, -0.5, 1], [-0.5, 1.25, -1.5]], dtype=np.float32)
C = np.array([[0.25, -0.75, 1.5], [0.5, 0.5, -1]], dtype=np.float32)
AB = {"alpha": 0.3, "beta": 0.6}
TS = {"alpha": 0.5, "beta": 0.0}


def mask(function):
    """The mask m of a method that returns A + m (B - C)."""
    return (function(A, B, C, alpha=1.0) - A) / (B - C)


def test_linear():
    golden(linear.weighted_sum(A, B, alpha=0.3), "0.65, -0.85, 1.7, 0.9, 0.55, -0.975")
    golden(
        linear.weighted_subtraction(A, B, **AB),
        "0.390244, -1.10976, 2.21951, 1.93902, 0.0304878, -0.585366",
    )
    golden(linear.add_difference(A, B, C, alpha=0.3), "0.725, -0.925, 1.85, 1.2, 0.475, -0.9")
    golden(linear.sum_twice(A, B, C, **AB), "0.41, -0.79, 1.58, 0.66, 0.52, -0.99")
    golden(linear.triple_sum(A, B, C, **AB), "0.5, -0.7, 1.4, 0.3, 0.7, -1.125")
    golden(linear.n_average(A, B, C), "0.583333, -0.75, 1.5, 0.5, 0.666667, -1.08333")


def test_elementwise():
    golden(
        elementwise.multiply_difference(A, B, C, **AB),
        "0.597597, -0.5, 1, -0.5, 0.847597, -1.30779",
    )
    golden(
        elementwise.similarity_add_difference(A, B, C, **AB),
        "0.6575, -0.925, 1.85, 1.2, 0.448, -0.883125",
    )
    golden(
        elementwise.train_difference(A, B, C, alpha=0.3),
        "0.662, -0.91, 1.82, 1.14, 0.481429, -0.912",
    )
    golden(mask(elementwise.train_difference), "0.72, 1.2, 1.2, 1.2, 1.02857, 1.08")
    golden(mask(elementwise.add_opposite), "0.666667, 2, 2, 2, 1.33333, 1.5")
    golden(mask(elementwise.add_strict_opposite), "0, 2, 2, 2, 0.666667, 1")
    golden(
        elementwise.geometric_sum(A, B, alpha=0.3),
        "0.615572, -0.812252, 1.6245, 0.634123, 0.405164, -0.923358",
    )
    golden(elementwise.multiply_quotient(A, B, C, alpha=1.0), "0.5, -0.75, 1.5, 1.5, 0.5, -1")
    golden(elementwise.nearswap(A, B, t=0.1), "0.6, -0.9, 1.9, 1.4, 0.35, -0.85")
    golden(elementwise.clamp(A + 1, A, B, C), "1, -0.5, 2, 1.5, 1.25, -0.75")
    golden(elementwise.clamp(A + 1, A, B, C, stiffness=0.5), "1, -0.625, 1.75, 1, 1.25, -0.875")


def test_angular():
    golden(
        angular.slerp(A, B, alpha=0.3),
        "0.759423, -0.936673, 1.87335, 0.919866, 0.670798, -1.13914",
    )
    mergekit = "0.739717, -0.947362, 1.89472, 0.97765, 0.635895, -1.10958"
    golden(angular.slerp_mergekit(A, B, alpha=0.3), mergekit)
    golden(angular.nuslerp(A, B, alpha=0.3), mergekit)
    golden(
        angular.nuslerp(A, B, alpha=0.3, axis="last"),
        "0.670097, -0.871928, 1.74386, 1.04879, 0.717961, -1.23729",
    )
    golden(
        angular.nuslerp(A, B, alpha=0.3, axis="first"),
        "0.967034, -0.930549, 1.76659, 1.1634, 0.620933, -1.02081",
    )
    golden(
        angular.multislerp(None, A, B, weights=(0.3, 0.7)),
        "0.970266, -0.716353, 1.43271, 0.0543821, 1.09722, -1.4554",
    )
    golden(
        angular.karcher(A, B, C),
        "0.640143, -0.827663, 1.65533, 0.509713, 0.759141, -1.22616",
    )
    golden(
        angular.perpendicular(A - C, B - C),
        "0.989583, 0.0104167, -0.0208334, -0.0416667, 0.510417, -0.260417",
    )
    golden(
        angular.euclidean_add_difference(A, B, C, alpha=0.3),
        "0.435234, -0.866129, 1.73226, 0.964517, 0.685234, -0.85407",
    )
    golden(
        cosine_family.cosine_local_a(A, B, alpha=0.3),
        "1, -0.642745, 1.51153, -0.5, 0.964509, -1.11635",
    )
    golden(
        cosine_family.cosine_local_b(A, B, alpha=0.3),
        "1, -0.625097, 1.36322, -0.5, 0.999807, -1.22759",
    )
    golden(
        cosine_family.extract(A, B, C, **AB, gamma=0.3),
        "0.612927, -0.825476, 1.65095, 0.818688, 0.560598, -0.990463",
    )


def test_exchange():
    half = "1, -0.5, 1, 1.5, 0.25, -0.75"
    golden(exchange.tensor(A, B, **TS), half)
    golden(exchange.copy_region(A, B, **TS), half)
    golden(exchange.tensor(A, B, alpha=0.5, beta=0.75), "0.5, -1, 2, -0.5, 1.25, -1.5")
    golden(exchange.top_k_tensor_sum(A, B, **AB), "0.5, -1, 1.5, 1.5, 0.25, -0.75")


def test_spectral():
    golden(
        spectral.distribution_crossover(A, B, C, **AB),
        "1.16319, -0.552083, 1.40625, 0.0208334, 1.53819, -1.07639",
    )
    golden(
        spectral.smooth_add(A, B, C, alpha=0.3),
        "0.599285, -0.995464, 1.91328, 1.55189, 0.214879, -0.858869",
    )
    golden(
        spectral.crossover(A, B, alpha=0.3, tilt=0.0),
        "1.29167, -0.208333, 1.29167, -0.208333, 1.54167, -1.20833",
    )
    golden(
        spectral.crossover(A, B, alpha=0.3, tilt=0.5),
        "1.02382, -0.915524, 1.66043, 0.69467, 0.80533, -0.768718",
    )


class TwoKeys(dict):
    def shape(self, key):
        return self[key][0].shape


@pytest.fixture
def two_keys() -> TwoKeys:
    """sin and cos tensors of 6 x 5 and 8 x 4, each with a second one near it."""
    i, j = np.arange(30.0), np.arange(32.0)
    k0, k1 = np.sin(0.3 * i), np.cos(0.2 * j)
    tensors = {
        "model.k0": (k0, k0 + 0.3 * np.cos(0.5 * i), (6, 5)),
        "model.k1": (k1, k1 + 0.4 * np.sin(0.9 * j), (8, 4)),
    }
    return TwoKeys(
        (key, tuple(x.astype(np.float32).reshape(shape) for x in (a, b)))
        for key, (a, b, shape) in tensors.items()
    )


@pytest.mark.parametrize(
    ("function", "prepare", "limits", "row"),
    [
        (
            cosine_family.cosine_a,
            cosine_family.prepare_cosine_a,
            (0.9385926, 0.9640512),
            "0.192438, 0.433354, 0.62597, 0.789876, 0.885542",
        ),
        (
            cosine_family.cosine_b,
            cosine_family.prepare_cosine_b,
            (0.9385513, 0.9622139),
            "0.176832, 0.417301, 0.614301, 0.788236, 0.894586",
        ),
    ],
)
def test_cosine_over_all_keys(two_keys, function, prepare, limits, row):
    state = prepare(two_keys)
    assert state == pytest.approx(limits, abs=1e-6)
    k0, k1 = (function(*two_keys[k], alpha=0.3, key=k, state=state) for k in two_keys)
    golden(k0[0], row)
    golden(k1[0], "1, 1.2934, 1.3106, 0.996288")


def golden(found, expected: str):
    numbers = np.array([float(x) for x in expected.split(",")])
    np.testing.assert_allclose(np.asarray(found).ravel(), numbers, rtol=1e-5, atol=1e-5)
