"""What methods make piece by piece is what they would make at once."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from plymix.methods import arrays
from plymix.registry import methods


def rng(i):
    return np.random.Generator(np.random.Philox(key=[7, i]))


@pytest.mark.parametrize("n", [1, 2, 7, 1001])
def test_uniform_is_what_the_generator_gives(n):
    expected = rng(1).random(n, dtype=np.float32)
    assert np.array_equal(arrays.uniform(rng(1), np.empty(n, np.float32)), expected)
    generator, pieces = rng(1), []
    for i in range(0, n, 100):
        pieces.append(arrays.uniform(generator, np.empty(min(100, n - i), np.float32)))
    assert np.array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize("shape", [(37, 333), (12, 7, 3, 3), (5000,), (3, 2048)], ids=str)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("della", {}),
        ("della_linear", {"rescale": "density"}),
        ("breadcrumbs", {}),
        ("breadcrumbs", {"gamma": 0.0}),
        ("breadcrumbs_ties", {"gamma": 0.3, "density": 0.7}),
        ("sce", {"select": 0.4}),
        ("arcee_fusion", {}),
        ("dropout", {}),
        ("dropout", {"overlap": 0.5}),
        ("ties_dare", {}),
        ("ties_dare", {"epsilon": 0.3, "trim": "exact"}),
        ("della", {"ranks": "tensor"}),
        ("della_linear", {"ranks": "tensor", "rescale": "l1"}),
        ("model_stock", {"filter_wise": True}),
    ],
    ids=str,
)
def test_size_of_pieces_does_not_matter(name, params, shape, monkeypatch):
    m = methods()[name]
    xs = [half(shape, i) for i in range(3)]
    xs = xs if m.variadic else xs[: len(m.inputs)]
    given = {"rng": rng} if m.random else {}
    whole = m.function(*xs, **given, **params)
    for module in [v for k, v in sys.modules.items() if k.startswith("plymix.methods")]:
        for number, small in (("BLOCK", 1 << 8), ("SAMPLE", 1 << 7)):
            if hasattr(module, number):
                monkeypatch.setattr(module, number, small)
    cut = m.function(*xs, **given, **params)
    if name == "sce" or "l1" in params.values():  # sums, whose last bits depend on the pieces
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)
    else:
        assert np.array_equal(cut, whole)


def half(shape, i):
    """A model as a file of 16-bit floats has it, with many equal differences."""
    numbers = np.random.default_rng(i).standard_normal(shape)
    return numbers.astype(np.float16).astype(np.float32)
