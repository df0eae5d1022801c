"""Published results of the tools the methods come from, on two small inputs.

Each vector was computed in float32 with the named tool's own functions (tolerance 1e-5; rotate
1e-4). One that depends on rounding is left out: sd-mecha's `rotate` of two rows (rank 1).
"""

from __future__ import annotations

import numpy as np
import pytest

from plymix.methods.matrix import rotate
from plymix.methods.task.centre import geometric_median, model_stock
from plymix.methods.task.changes import arcee_fusion, sce
from plymix.methods.task.ties import ties, ties_count, ties_soup

A, B, C = (
    np.array(v, np.float32).reshape(2, 3)
    for v in (
        [0.5, -1, 2, 1.5, 0.25, -0.75],
        [1, -0.5, 1, -0.5, 1.25, -1.5],
        [0.25, -0.75, 1.5, 0.5, 0.5, -1],
    )
)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        pytest.param(
            lambda: ties_count(C, A, B, density=0.6, scale=0.3),
            [0.4, -0.825, 1.5, 0.5, 0.5, -1],
            id="meh ties",
        ),
        pytest.param(
            lambda: ties_count(C, A, B, density=0.5) - C, [0.5, -0.25, 0, 0, 0, 0], id="sd-mecha"
        ),
        pytest.param(
            lambda: ties_soup(C, A, B, density=0.5) - C,
            [0.5, -0.25, 0, 0, 0.75, -0.5],
            id="sd-mecha vote_sgn",
        ),
        pytest.param(
            lambda: ties(C, A, B, density=0.5, weights=(1, 1)),
            [0.75, -0.75, 2, 1.5, 1.25, -1],
            id="mergekit ties",
        ),
        pytest.param(lambda: sce(C, A, B), [0.820895, -0.5, 2, 1.5, 1.25, -1.5], id="mergekit sce"),
        pytest.param(
            lambda: sce(C, A, B, select=0.5), [0.25, -0.75, 2, 1.5, 1.25, -1], id="sce half"
        ),
        pytest.param(
            lambda: arcee_fusion(A, B), [0.5, -1, 2, -0.5, 0.25, -0.75], id="mergekit arcee_fusion"
        ),
        pytest.param(
            lambda: model_stock(C, A, B, clamp_t=False),
            [-2.27062, -0.75, 1.5, 0.5, -0.760308, -0.369846],
            id="mergekit model_stock",
        ),
        pytest.param(
            lambda: geometric_median(A, B, C),
            [0.25, -0.75, 1.5, 0.5, 0.5, -1],
            id="sd-mecha geometric_median",
        ),
    ],
)
def test_two_by_three(result, expected):
    np.testing.assert_allclose(result().ravel(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("alignment", "alpha", "expected"),
    [
        (
            1,
            0,
            "0.447301 0.173375 0.655079 -0.457457 0.95331 0.467373 -0.451443 -0.682136 0.164473"
            " -1.14133 -0.0466526 0.0241356 1.05172 -0.682431 0.862083",
        ),
        (
            0.5,
            0,
            "0.261087 0.598597 0.627615 -0.780387 0.830507 0.0586966 -0.236227 -0.639487 0.615004"
            " -1.04683 -0.426652 0.17105 1.15792 0.163871 1.01139",
        ),
        (
            0.5,
            0.5,
            "0.465743 0.794027 0.0984713 -0.873304 0.331243 0.569898 -0.185315 -0.475769 0.919456"
            " -1.02347 -0.158194 -0.242114 0.971897 0.0355278 1.13804",
        ),
    ],
)
def test_rotate_of_five_rows(alignment, alpha, expected):
    i = np.arange(15)
    a = np.sin(0.9 * i + 0.2 * i**2).astype(np.float32).reshape(5, 3)
    b = np.cos(0.7 * i + 0.11 * i**2).astype(np.float32).reshape(5, 3)
    r = rotate(a, b, alignment=alignment, alpha=alpha)
    assert r.dtype == np.float32
    np.testing.assert_allclose(r.ravel(), [float(v) for v in expected.split()], atol=1e-4)
