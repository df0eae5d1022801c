"""Chunk arithmetic: linear sums and casts on byte buffers, rounded once.

A coefficient c is cut into two pieces of few bits, c = hi + lo, such that hi*x and lo*x are exact.
The hi products are summed, the lo products are summed, both sums are added and the total is cast.
No product ever rounds, so it makes no difference whether a processor fuses multiply and add: the
same bytes on every machine, by either backend.

The sum of two tensors of one 16-bit dtype (nearly every merge) is computed in float32; the few
elements in which the two terms cancel are computed again in float64, as all other sums are.

NumKong (https://github.com/ashvardanian/NumKong) does the work where it agrees with the numpy
reference on this processor; numpy does it elsewhere. `PLYMIX_KERNEL=numpy|numkong` decides by hand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

BLOCK = 1 << 16
"""Elements computed at a time: three float32 rows of it stay in a 1 MiB cache."""

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
"""The numpy type that holds a dtype's bytes (bf16 and fp8 as unsigned integers)."""

MANTISSA = {"F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
"""Significant bits, the hidden one counted, of the dtypes whose products can be exact."""

CANCELLED = 13
"""Powers of two that two terms may lose to each other before float32 is too coarse for them."""

_KONG = {
    "F64": "float64", "F32": "float32", "F16": "float16",
    "BF16": "bfloat16", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2",
}  # fmt: skip

Term = tuple[float, str]
"""(coefficient, dtype) of one input of a sum."""


def split(coefficient: float, bits: int) -> tuple[float, float]:
    """`coefficient` as hi + lo of `bits` significant bits each; what is below is dropped.

    Both have its sign, so that an infinite element stays infinite.
    """
    mantissa, exponent = math.frexp(coefficient)
    hi = math.ldexp(math.trunc(math.ldexp(mantissa, bits)), exponent - bits)
    mantissa, exponent = math.frexp(coefficient - hi)
    return hi, math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def _pieces(terms: Sequence[Term], bits: int) -> list[tuple[float, float]]:
    """Each coefficient cut for products that are exact in `bits` bits (float64 inputs: not cut)."""
    return [
        split(c, bits - MANTISSA[dtype]) if dtype in MANTISSA else (c, 0.0) for c, dtype in terms
    ]


class Sum:
    """`out = sum(c_i * x_i)` for fixed coefficients and dtypes, on buffers of up to BLOCK elements.

    Call it with `(n, inputs, out)`, byte buffers that hold n elements. Not thread-safe: the scratch
    rows are its own; make one per thread.
    """

    def __init__(self, terms: Sequence[Term], out: str, backend: Backend | None = None) -> None:
        self.terms = tuple(terms)
        self.out = out
        self.do = backend or best_backend()
        self.cast = len(terms) == 1 and terms[0][0] == 1.0
        self.narrow = len(terms) == 2 and out in ("F16", "BF16") and {d for _, d in terms} == {out}
        self._exact = _pieces(terms, 53)
        rows, compute = (4, np.float32) if self.narrow else (0 if self.cast else 3, np.float64)
        self._rows = [np.empty(BLOCK, compute) for _ in range(rows)]
        self._single = np.empty(BLOCK, np.float32)
        if self.narrow:
            self._pieces = _pieces(terms, 24)
            step = 1 << (MANTISSA[out] - 1)  # how far apart the codes of x and 2x are
            lost = CANCELLED - math.log2(abs(terms[0][0]) or 1.0)
            self._lost = np.uint16(min(max(step * lost, 0), 0x7FFF))
            self._codes = [np.empty(BLOCK, np.uint16) for _ in range(2)]
            self._flags = np.zeros(-(-BLOCK // 8) * 8, np.bool_)

    def __call__(self, n: int, inputs: Sequence[Any], out: Any) -> None:
        views = [
            np.frombuffer(x, NUMPY[dtype], n)
            for x, (_, dtype) in zip(inputs, self.terms, strict=True)
        ]
        result = np.frombuffer(out, NUMPY[self.out], n)
        if self.cast:
            self._cast(n, views[0], result)
        elif self.narrow:
            self._sum_narrow(n, views, result)
        else:
            self._sum_wide(n, views, result)

    def _cast(self, n: int, view: Any, result: Any) -> None:
        dtype, single = self.terms[0][1], self._single[:n]
        if dtype == self.out or "F64" in (dtype, self.out):
            wide = np.empty(n, np.float64)
            self.do.double(view, dtype, single, wide)
            self._store(wide, result)
            return
        if dtype == "F32":
            single = view
        else:
            self.do.widen(view, dtype, single)
        self.do.narrow(single, self.out, result)

    def _sum_narrow(self, n: int, views: list[Any], result: Any) -> None:
        """Two terms in float32: one sum of the high pieces, one of the low ones."""
        do = self.do
        x, y, high, low = (row[:n] for row in self._rows)
        (hi0, lo0), (hi1, lo1) = self._pieces
        do.widen(views[0], self.out, x)
        do.widen(views[1], self.out, y)
        do.blend(x, y, hi0, hi1, high)
        if lo0 or lo1:
            do.blend(x, y, lo0, lo1, low)
            do.blend(high, low, 1.0, 1.0, high)
        do.narrow(high, self.out, result)
        again = self._cancelled(n, views[0].view(np.uint16), result.view(np.uint16))
        if again.size:
            (hi0, lo0), (hi1, lo1) = self._exact
            x64, y64 = x[again].astype(np.float64), y[again].astype(np.float64)
            total = (hi0 * x64 + hi1 * y64) + (lo0 * x64 + lo1 * y64)
            fixed = np.empty(again.size, result.dtype)
            do.narrow(total.astype(np.float32), self.out, fixed)
            result[again] = fixed

    def _cancelled(self, n: int, first: Any, result: Any) -> Any:
        """Where the sum is smaller than its first term by `CANCELLED` powers of two.

        Without its sign, the code of a float is its logarithm but for the fraction's curve.
        """
        found, of = (row[:n] for row in self._codes)
        np.bitwise_and(first, 0x7FFF, out=of)
        if of.max() <= self._lost:  # nothing is large enough, as in most tensors of fp16
            return of[:0]
        np.bitwise_and(result, 0x7FFF, out=found)
        np.add(found, self._lost, out=found)
        np.less(found, of, out=self._flags[:n])
        self._flags[n:] = False
        # almost all are False: skip them by eights
        eights = np.flatnonzero(self._flags.view(np.uint64) != 0)
        near = (eights[:, None] * 8 + np.arange(8)).ravel()
        return near[self._flags[near]]

    def _sum_wide(self, n: int, views: list[Any], result: Any) -> None:
        """Any number of terms in float64."""
        do = self.do
        total, x, low = (row[:n] for row in self._rows)
        single = self._single[:n]
        exact = not any(lo for _, lo in self._exact)
        hi, lo = self._exact[0]
        do.double(views[0], self.terms[0][1], single, total)
        if len(views) == 1:
            do.blend(total, total, lo, 0.0, low)
            do.blend(total, total, hi, 0.0, total)
        for i, view in enumerate(views[1:], 1):
            do.double(view, self.terms[i][1], single, x)
            before, rest = (hi, lo) if i == 1 else (1.0, 1.0)
            if not exact:
                do.blend(total if i == 1 else low, x, rest, self._exact[i][1], low)
            do.blend(total, x, before, self._exact[i][0], total)
        if not exact:
            do.blend(total, low, 1.0, 1.0, total)
        self._store(total, result)

    def _store(self, total: Any, result: Any) -> None:
        if self.out == "F64":
            result[:] = total
        elif self.out == "F32":
            self.do.single(total, result)
        else:
            single = self._single[: total.size]
            self.do.single(total, single)
            self.do.narrow(single, self.out, result)


class Backend:
    """numpy's way to cast and blend rows; also the reference the others are held against."""

    name = "numpy"

    def widen(self, x: Any, dtype: str, out: Any) -> None:
        """16-bit or 8-bit floats to float32 (exact)."""
        if dtype == "F16":
            np.copyto(out, x)
        elif dtype == "BF16":
            bits = out.view(np.uint32)
            np.copyto(bits, x)
            np.left_shift(bits, 16, out=bits)
        else:
            np.take(_fp8_table(dtype), x, out=out, mode="clip")

    def narrow(self, x: Any, dtype: str, out: Any) -> None:
        """float32 to `dtype`, ties to even; fp8 e4m3 saturates at 448 (it has no infinity)."""
        if dtype == "F32" or dtype == "F64":
            np.copyto(out, x)
        elif dtype == "F16":
            with np.errstate(over="ignore"):
                np.copyto(out, x, casting="same_kind")
        elif dtype == "BF16":
            np.copyto(out, _to_bf16(x))
        else:
            np.copyto(out, _to_fp8(x, dtype))

    def double(self, x: Any, dtype: str, scratch: Any, out: Any) -> None:
        """Any float to float64 (exact). `scratch` is a float32 row of the same length."""
        if dtype in ("F32", "F64", "F16"):
            np.copyto(out, x)
        else:
            self.widen(x, dtype, scratch)
            np.copyto(out, scratch)

    def single(self, x: Any, out: Any) -> None:
        """float64 to float32."""
        with np.errstate(over="ignore"):
            np.copyto(out, x, casting="same_kind")

    def blend(self, x: Any, y: Any, a: float, b: float, out: Any) -> None:
        """`out = a*x + b*y`; `out` may be either input. A coefficient 0 ignores its row."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if b == 0.0:
                np.multiply(x, x.dtype.type(a), out=out)
                return
            product = y * y.dtype.type(b)
            if a == 1.0:
                np.add(x, product, out=out)
            else:
                np.multiply(x, x.dtype.type(a), out=out)
                np.add(out, product, out=out)


class NumKong(Backend):
    """The same operations by NumKong's kernels for this processor."""

    name = "numkong"

    def __init__(self) -> None:
        import numkong

        self._nk: Any = numkong

    def _view(self, x: Any, dtype: str) -> Any:
        if dtype in ("F16", "F32", "F64"):
            return x
        return self._nk.from_pointer(x.ctypes.data, (x.size,), _KONG[dtype], owner=x)

    def widen(self, x: Any, dtype: str, out: Any) -> None:
        self._nk.astype(self._view(x, dtype), "float32", out=out)

    def narrow(self, x: Any, dtype: str, out: Any) -> None:
        if dtype in ("F32", "F64"):
            np.copyto(out, x)
        else:
            self._nk.astype(x, _KONG[dtype], out=self._view(out, dtype))

    def double(self, x: Any, dtype: str, scratch: Any, out: Any) -> None:
        if dtype == "F64":
            np.copyto(out, x)
        elif dtype == "F32":
            self._nk.astype(x, "float64", out=out)
        else:
            self.widen(x, dtype, scratch)
            self._nk.astype(scratch, "float64", out=out)

    def single(self, x: Any, out: Any) -> None:
        self._nk.astype(x, "float32", out=out)

    def blend(self, x: Any, y: Any, a: float, b: float, out: Any) -> None:
        if b == 0.0:
            super().blend(x, y, a, b, out)
        else:
            self._nk.blend(x, y, alpha=a, beta=b, out=out)


@lru_cache(maxsize=1)
def _fp8_tables() -> dict[str, Any]:
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)

    def table(exponent_bits: int, mantissa_bits: int, bias: int) -> Any:
        exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
        fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        normal = np.ldexp(1 + fraction, exponent - bias)
        subnormal = np.ldexp(fraction, 1 - bias)
        return (sign * np.where(exponent == 0, subnormal, normal)).astype(np.float32)

    e4m3 = table(4, 3, 7)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2 = table(5, 2, 15)
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2}


def _fp8_table(dtype: str) -> Any:
    """float32 value of each of the 256 codes (OCP 8-bit floating point specification, 1.0)."""
    return _fp8_tables()[dtype]


def _to_bf16(x: Any) -> Any:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _to_fp8(x: Any, dtype: str) -> Any:
    """Nearest code, ties to even. e4m3 saturates at 448; e5m2 overflows to infinity."""
    largest = 0x7E if dtype == "F8_E4M3" else 0x7B
    values = _fp8_table(dtype)[: largest + 1].astype(np.float64)
    magnitude = np.abs(x.astype(np.float64))
    low = np.clip(np.searchsorted(values, magnitude, side="right") - 1, 0, largest)
    high = np.minimum(low + 1, largest)
    middle = (values[low] + values[high]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1) & (high != low))
    code = np.where(up, high, low)
    if dtype == "F8_E5M2":
        code = np.where(magnitude >= 61440.0, 0x7C, code)  # half a step beyond 57344
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | (np.signbit(x).astype(np.int64) << 7)).astype(np.uint8)


def float32(data: Any, dtype: str) -> Any:
    """Bytes of `dtype` as a new float32 array (1-D). float64 is rounded."""
    x = np.frombuffer(data, NUMPY[dtype])
    if dtype == "F32":
        return x.copy()
    out = np.empty(x.size, np.float32)
    do = best_backend()
    for at in range(0, x.size, BLOCK):
        part = slice(at, at + BLOCK)
        if dtype == "F64":
            do.single(x[part], out[part])
        else:
            do.widen(x[part], dtype, out[part])
    return out


def narrowed(x: Any, dtype: str) -> Any:
    """A float32 array as bytes of `dtype` (1-D uint8), rounded once."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    out = np.empty(flat.size, NUMPY[dtype])
    do = best_backend()
    for at in range(0, flat.size, BLOCK):
        part = slice(at, at + BLOCK)
        do.narrow(flat[part], dtype, out[part])
    return out.view(np.uint8)


@lru_cache(maxsize=1)
def best_backend() -> Backend:
    """NumKong when it is installed and agrees with numpy here, else numpy."""
    wish = os.environ.get("PLYMIX_KERNEL", "")
    if wish == "numpy":
        return Backend()
    try:
        kong = NumKong()
    except ImportError:
        return Backend()
    if wish == "numkong" or not disagreements(kong):
        return kong
    return Backend()


def disagreements(backend: Backend) -> list[str]:
    """Where `backend` deviates from numpy's bytes on a small probe; empty when it is sound."""
    rng = np.random.default_rng(20221128)
    n = 1031
    found: list[str] = []
    raw = rng.standard_normal(n) * np.exp2(rng.integers(-20, 6, n))
    rows: dict[str, Any] = {"F32": raw.astype(np.float32), "F64": raw}
    rows["F16"] = rows["F32"].astype(np.float16)
    rows["BF16"] = _to_bf16(rows["F32"])
    rows["F8_E4M3"] = rng.integers(0, 256, n).astype(np.uint8)
    rows["F8_E5M2"] = rng.integers(0, 256, n).astype(np.uint8)

    def compare(what: str, work: Callable[[Backend], Any]) -> None:
        try:
            got, want = work(backend), work(Backend())
        except Exception as e:
            found.append(f"{what}: {e}")
            return
        if got.dtype.kind == "f":
            same = np.array_equal(got, want, equal_nan=True)
        else:
            same = np.array_equal(got, want)
        if not same:
            found.append(what)

    def total(terms: list[Term], out: str) -> Callable[[Backend], Any]:
        def work(do: Backend) -> Any:
            result = np.empty(n, NUMPY[out])
            Sum(terms, out, do)(n, [rows[dtype] for _, dtype in terms], result)
            return result

        return work

    for dtype in ("F16", "BF16"):
        compare(f"blend {dtype}", total([(0.5833333333, dtype), (0.4166666667, dtype)], dtype))
        compare(f"sum {dtype}", total([(1.0, dtype), (0.7, dtype), (-0.7, dtype)], dtype))
    compare("blend F32", total([(0.7, "F32"), (0.3, "F32")], "F32"))
    for dtype in ("F8_E4M3", "F8_E5M2"):
        compare(f"widen {dtype}", total([(1.0, dtype)], "F32"))
    for dtype in ("F16", "BF16", "F8_E4M3", "F8_E5M2"):
        compare(f"narrow {dtype}", total([(1.0, "F32")], dtype))
    return found
