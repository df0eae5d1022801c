"""Chunk arithmetic against long double sums rounded once, and backend against backend."""

import contextlib
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix import kernels
from small import coded, deviation, draw, exact

BACKENDS = [kernels.Backend()]
with contextlib.suppress(ImportError):
    BACKENDS.append(kernels.NumKong())
FLOATS = ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]
SIZE = 4096
CLASSIC = 0.5833333333  # as its users type 7/12; with 0.4166666667 it makes 5 and -7 nearly cancel

# dtypes of inputs and result: computed in float32 by codes of 16 bits, of 32 bits, in float64
ROADS = [("F16", "F16"), ("BF16", "BF16"), ("F32", "F16"), ("F32", "BF16"), ("F32", "F32")]

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)


def total(coefficients, tensors, out, backend):
    """(dtype, array): sum(c * x) by the kernel."""
    n = tensors[0][1].size
    result = np.empty(n, kernels.NUMPY[out])
    terms = [(c, dtype) for c, (dtype, _) in zip(coefficients, tensors, strict=True)]
    kernels.Sum(terms, out, backend)(n, [np.ascontiguousarray(x) for _, x in tensors], result)
    return out, result


def largest_term(coefficients, tensors):
    rows = [np.abs(exact([c], [x])) for c, x in zip(coefficients, tensors, strict=True)]
    return np.max(rows, axis=0)


def check(coefficients, tensors, out, backend):
    want = exact(coefficients, tensors)
    # float64 itself is only noise where the terms cancel to 2^-50
    noise = 2.0**-50 * largest_term(coefficients, tensors)
    if out == "F32":
        noise = noise * 2**24
    got = total(coefficients, tensors, out, backend)
    differ, ulp = deviation(got, want, out, noise)
    assert ulp <= 1, (coefficients, [d for d, _ in tensors])
    return differ


@each_backend
@pytest.mark.parametrize(("dtype", "out"), ROADS)
@pytest.mark.parametrize("scale", [2e-3, 0.02, 1.0, 6000.0])
@pytest.mark.parametrize("alpha", [5 / 12, 0.3, 0.5, 1 / 3, CLASSIC, 0.0833333333, 1.25])
def test_two_models(dtype, out, scale, alpha, backend):
    pair = [draw(dtype, 1 << 16, seed, scale) for seed in (1, 2)]
    assert check([1 - alpha, alpha], pair, out, backend) <= 1e-3


@each_backend
@pytest.mark.parametrize(("dtype", "out"), ROADS[:4])
def test_every_pair_of_values_that_nearly_cancels(dtype, out, backend):
    """5 * 0.58... - 7 * 0.41...: the difference lies 33 bits below the terms."""
    steps = np.arange(1, 128, dtype=np.float64)
    a, b = (x.ravel() for x in np.meshgrid(steps, -steps))
    for scale in (2.0**-9, 1.0, 2.0**5):
        pair = [coded(a * scale, dtype), coded(b * scale, dtype)]
        for c in (CLASSIC, 0.0833333333, 0.3, 0.123456789012):
            assert check([1 - c, c], pair, out, backend) <= 1e-3


@each_backend
@pytest.mark.parametrize("c", [CLASSIC, 0.3, 0.123456789012, 0.62])
def test_large_values_of_fp16_that_cancel_by_any_amount(c, backend):
    """B is what comes nearest to cancelling A; what is left lies 2^11 and more below."""
    a = np.arange(1024, 2048) * 4
    pair = [coded(a, "F16"), coded(-a * (1 - c) / c, "F16")]
    check([1 - c, c], pair, "F16", backend)  # one unit in the last place, even here


@each_backend
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), out=st.sampled_from(FLOATS[:3]))
@settings(max_examples=60, deadline=None)
def test_many_models_of_many_dtypes(backend, seed, count, out):
    rng = np.random.default_rng(seed)
    dtypes = rng.choice(FLOATS, count)
    tensors = [
        draw(str(d), SIZE, int(rng.integers(1 << 30)), 2.0 ** int(rng.integers(-8, 4)))
        for d in dtypes
    ]
    menu = [5 / 12, 0.3, -0.3, 1.0, -1.0, CLASSIC, 0.5, 1e-3, 1.7]
    coefficients = [float(c) for c in rng.choice(menu, count)]
    assert check(coefficients, tensors, out, backend) * SIZE <= 4  # 0.1 %


@each_backend
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_what_cancels_leaves_the_rest_exact(dtype, backend):
    """A + a (B - C) with B = C gives A's values; with 12 terms too."""
    a, b = draw(dtype, SIZE, 1), draw(dtype, SIZE, 2, 100.0)
    assert total([1.0, 0.3, -0.3], [a, b, b], dtype, backend)[1].tobytes() == a[1].tobytes()
    pairs = [0.3, -0.3, 0.7, -0.7, 1.1, -1.1, 2.0, -2.0, 0.9, -0.9]
    got = total([1.0, *pairs], [a, *[b] * 10], dtype, backend)
    noise = largest_term(pairs, [b] * 10) * 2.0**-26
    _, ulp = deviation(got, exact([1.0], [a]), dtype, noise)
    assert ulp <= 1


@pytest.mark.skipif(len(BACKENDS) < 2, reason="NumKong is not installed")
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), same=st.booleans())
@settings(max_examples=150, deadline=None)
def test_both_backends_give_the_same_bytes(seed, count, same):
    rng = np.random.default_rng(seed)
    dtypes = [str(d) for d in rng.choice(FLOATS, count)]
    if same:
        dtypes = dtypes[:1] * count
    out = dtypes[0] if same else str(rng.choice(FLOATS))
    steps = [rng.integers(-200, 200, 1024) / 64 for _ in dtypes]  # many ratios that cancel
    tensors = [coded(x, d) for x, d in zip(steps, dtypes, strict=True)]
    coefficients = [float(c) for c in rng.choice([0.3, 0.7, -0.3, CLASSIC, 1 - CLASSIC], count)]
    first, second = (total(coefficients, tensors, out, b)[1].tobytes() for b in BACKENDS)
    assert first == second


@each_backend
@pytest.mark.parametrize(("dtype", "out"), [*ROADS, ("F8_E4M3", "F8_E4M3")])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, kernels.BLOCK - 1, kernels.BLOCK + 9])
def test_any_length_gives_the_same_elements(dtype, out, n, backend):
    """Where a chunk begins and ends makes no difference to an element."""
    tensors = [draw(dtype, 2 * kernels.BLOCK, seed, 3.0) for seed in (1, 2, 3)]
    for count in (2, 3):
        coefficients, some = [CLASSIC, 1 - CLASSIC, 0.1][:count], tensors[:count]
        whole = total(coefficients, some, out, backend)[1]
        part = total(coefficients, [(d, x[-n:]) for d, x in some], out, backend)[1]
        assert part.tobytes() == whole[-n:].tobytes()


@each_backend
@pytest.mark.parametrize(("dtype", "out"), ROADS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_long_row_takes_no_rows_of_its_length(dtype, out, count, backend):
    tensors = [draw(dtype, 16 * kernels.BLOCK, seed, 3.0)[1] for seed in range(count)]
    result = np.empty(16 * kernels.BLOCK, kernels.NUMPY[out])
    mix = kernels.Sum([(0.3, dtype)] * count, out, backend)
    tracemalloc.start()
    mix(result.size, tensors, result)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 8 * kernels.BLOCK  # a few float64 rows of a block


@each_backend
@pytest.mark.parametrize(("dtype", "out"), ROADS[:4])
def test_nothing_is_left_from_the_block_before(dtype, out, backend):
    """A whole block that cancels everywhere, then a short one, by the same object."""
    a, b = coded(np.full(kernels.BLOCK, 5.0), dtype), coded(np.full(kernels.BLOCK, -7.0), dtype)
    mix = kernels.Sum([(CLASSIC, dtype), (1 - CLASSIC, dtype)], out, backend)
    for n in (kernels.BLOCK, 1001):
        result = np.empty(n, kernels.NUMPY[out])
        mix(n, [a[1], b[1]], result)
        want = exact([CLASSIC, 1 - CLASSIC], [(d, x[:n]) for d, x in (a, b)])
        assert deviation((out, result), want, out) == (0.0, 0.0)


@each_backend
@pytest.mark.parametrize(
    ("dtype", "reference"),
    [
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
    ],
)
class TestCasts:
    def test_every_code_widens_to_its_value(self, dtype, reference, backend):
        bits = np.dtype(reference).itemsize * 8
        codes = np.arange(1 << bits).astype(f"u{bits // 8}")
        got = np.empty(codes.size, np.float32)
        backend.widen(codes.view(kernels.NUMPY[dtype]), dtype, got)
        with np.errstate(invalid="ignore"):
            want = codes.view(reference).astype(np.float32)
        np.testing.assert_array_equal(got, want)
        assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()

    def test_narrowing_rounds_to_nearest_even(self, dtype, reference, backend):
        rng = np.random.default_rng(5)
        values = (rng.standard_normal(SIZE) * np.exp2(rng.uniform(-12, 4, SIZE))).astype("f4")
        halves = np.arange(-400, 400, dtype=np.float32) / 256  # ties of the narrow ones
        values = np.concatenate([values, halves, [0.0, -0.0, 1.0, 240.0]]).astype(np.float32)
        got = np.empty(values.size, kernels.NUMPY[dtype])
        backend.narrow(values, dtype, got)
        want = values.astype(reference)
        assert got.tobytes() == want.tobytes()

    def test_too_large(self, dtype, reference, backend):
        """fp16 and bf16 go to infinity; fp8 to its largest number."""
        got = np.empty(2, kernels.NUMPY[dtype])
        backend.narrow(np.array([3.4e38, -3.4e38], np.float32), dtype, got)
        value = got.view(reference).astype(np.float32)
        limit = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}.get(dtype, np.inf)
        assert list(value) == [limit, -limit]


@each_backend
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_nan_and_infinity_go_through(dtype, backend):
    a = coded([np.nan, np.inf, -np.inf, np.inf, 1.0], dtype)
    b = coded([1.0, 1.0, 2.0, -np.inf, np.nan], dtype)
    for c in (0.3, 0.5, CLASSIC):
        got = total([1 - c, c], [a, b], dtype, backend)
        value = exact([1.0], [got])
        assert np.isnan(value[[0, 3, 4]]).all()
        assert list(value[1:3]) == [np.inf, -np.inf]


@given(st.floats(-1e3, 1e3, allow_nan=False), st.sampled_from([13, 16, 20, 29, 42, 45]))
def test_split_is_exact_to_its_bits(c, bits):
    hi, lo = kernels.split(c, bits)
    assert abs(c - hi - lo) <= abs(c) * 2.0 ** (1 - 2 * bits)
    assert hi == 0 or abs(math.frexp(hi)[0] * 2**bits) % 1 == 0
    assert lo == 0 or abs(math.frexp(lo)[0] * 2**bits) % 1 == 0
    assert lo == 0 or (lo > 0) == (c > 0)


def test_the_backend_is_checked_and_can_be_chosen(monkeypatch):
    monkeypatch.setenv("PLYMIX_KERNEL", "numpy")
    kernels.best_backend.cache_clear()
    assert kernels.best_backend().name == "numpy"
    monkeypatch.delenv("PLYMIX_KERNEL")
    assert kernels.disagreements(kernels.Backend()) == []

    class Off(kernels.Backend):
        def narrow(self, x, dtype, out):
            super().narrow(x * np.float32(1.01), dtype, out)

    assert kernels.disagreements(Off())
    monkeypatch.setattr(kernels, "NumKong", Off)
    kernels.best_backend.cache_clear()
    assert type(kernels.best_backend()) is kernels.Backend  # numpy takes over
    kernels.best_backend.cache_clear()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_whole_arrays(dtype):
    """`float32`, which methods of whole tensors use, is the exact widening cast."""
    x = np.random.default_rng(3).standard_normal(2 * kernels.BLOCK + 5)
    stored = x if dtype == "F64" else coded(x, dtype)[1]
    wide = kernels.float32(stored.tobytes(), dtype)
    assert wide.dtype == np.float32
    want = x.astype(np.float32) if dtype == "F64" else exact([1.0], [(dtype, stored)])
    np.testing.assert_array_equal(wide, want)
