"""Chunk arithmetic: linear sums and casts on byte buffers, rounded once.

Sums that are stored in 16 bits (nearly every merge) are chains of fused multiply-add in float32:
the first product rounds, then every step rounds once. Elements whose terms cancel, so that float32
would be too coarse for them, are computed again in float64; which they are depends on the element
alone.

All other sums, and those of float64, are computed in float64. There a coefficient c is cut into two
pieces of few bits, c = hi + lo, such that hi*x and lo*x are exact; the hi products are summed, the
lo products are summed, and both sums are added.

Either way it is settled which operations round, so the bytes are the same on every machine and by
either backend. NumKong (https://github.com/ashvardanian/NumKong) does the work where it agrees with
the numpy reference on this processor; numpy does it elsewhere. `PLYMIX_KERNEL=numpy|numkong`
decides by hand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

BLOCK = 1 << 17
"""Elements computed at a time in float32: three rows of it stay in a 2 MiB cache."""

WIDE_BLOCK = 1 << 16
"""And in float64, with more rows that are twice as wide."""

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
"""The numpy type that holds a dtype's bytes (bf16 and fp8 as unsigned integers)."""

MANTISSA = {"F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
"""Significant bits, the hidden one counted, of the dtypes whose products can be exact."""

CANCELLED = 23
"""A sum's significant bits and the powers of two that its terms lose to each other may be as many
together before float32 is too coarse for it."""

EVEN = {("F16", "F16"): 0x0400, ("F16", "F32"): 0x38800000}
"""The code, by the dtype of the result and that of the codes, below which all numbers lie equally
far apart: 2^-14. A smaller sum has fewer significant bits, and needs no more care than this."""

LARGEST = {("F16", "F16"): 0x7BFF, ("F16", "F32"): 0x477FE000, ("BF16", "BF16"): 0x7F7F,
           ("BF16", "F32"): 0x7F7F0000}  # fmt: skip
"""The code, in the same way, of the largest finite number."""

_CODES = {
    "F16": (np.uint16, np.uint16(0x7FFF)),
    "BF16": (np.uint16, np.uint16(0x7FFF)),
    "F32": (np.uint32, np.uint32(0x7FFFFFFF)),
}
"""The type of a dtype's codes, and the largest, which is all bits but the sign."""

_KONG = {
    "F64": "float64", "F32": "float32", "F16": "float16",
    "BF16": "bfloat16", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2",
}  # fmt: skip

_FP8_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}

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


def _lost(terms: Sequence[Term], out: str, codes: str) -> list[int]:
    """For each term, how much smaller a code (of the dtype `codes`) than its own the sum's may be.

    Of two terms the first alone: where they cancel, one is as good as the other.
    """
    step = 1 << (MANTISSA[codes] - 1)  # how far apart the codes of x and 2x are
    most = CANCELLED - MANTISSA[out] - math.ceil(math.log2(len(terms) / 2))
    largest = int(_CODES[codes][1])
    told = terms if len(terms) > 2 else terms[:1]
    return [min(max(int(step * (most - math.log2(abs(c) or 1.0))), 0), largest) for c, _ in told]


def _largest(view: Any) -> int:
    """The largest code of any element, without its sign: two quick passes."""
    bits = 8 * view.itemsize
    signed, unsigned = view.view(f"i{view.itemsize}"), view.view(f"u{view.itemsize}")
    largest: int = max(signed.max().item(), unsigned.max().item() & ((1 << (bits - 1)) - 1))
    return largest


class Sum:
    """`out = sum(c_i * x_i)` for fixed coefficients and dtypes.

    Call it with `(n, inputs, out)`, byte buffers that hold n elements; it says whether it knows the
    result to be finite everywhere. Not thread-safe: the scratch rows are its own; make one per
    thread.
    """

    def __init__(self, terms: Sequence[Term], out: str, backend: Backend | None = None) -> None:
        self.terms = tuple(terms)
        self.out = out
        self.do = backend or best_backend()
        double = any(dtype == "F64" for _, dtype in terms)
        if double:
            self.do = Backend()  # float64 products are not exact: fused or not makes a difference
        self.cast = len(terms) == 1 and terms[0][0] == 1.0
        self.fused = len(terms) > 1 and out in ("F16", "BF16") and not double
        self.exact = _pieces(terms, 53)
        if self.fused:
            # whether terms cancel is told by codes: of the dtype that all have, or of float32
            self.codes = out if {d for _, d in terms} == {out} else "F32"
            self.lost = _lost(self.terms, out, self.codes)
            self.even = EVEN.get((out, self.codes), 0)
            room = 1 + math.log2(max(sum(abs(c) for c, _ in terms), 1.0))
            step = 1 << (MANTISSA[self.codes] - 1)
            self.small = LARGEST[out, self.codes] - math.ceil(step * room)
            self._found = np.empty(BLOCK, _CODES[self.codes][0])
            self._flags = np.zeros(-(-BLOCK // 8) * 8, np.bool_)
        # one call for a pair, that keeps no rows between; its results are the same in any pieces
        alike = self.fused and len(terms) == 2 and self.codes == out and all(c for c, _ in terms)
        self._pair = self.do.pair if alike and isinstance(self.do, NumKong) else None
        self._block = BLOCK if self.fused or self.cast else WIDE_BLOCK
        wide = 0 if self.fused or self.cast else 3
        self._rows = [np.empty(self._block, np.float64) for _ in range(wide)]
        self._single = np.empty(self._block, np.float32)
        self._total = np.empty(BLOCK if self.fused and not self._pair else 0, np.float32)

    def __call__(self, n: int, inputs: Sequence[Any], out: Any) -> bool:
        views = [
            np.frombuffer(x, NUMPY[dtype], n)
            for x, (_, dtype) in zip(inputs, self.terms, strict=True)
        ]
        result = np.frombuffer(out, NUMPY[self.out], n)
        work, finite = self._cast if self.cast else self._sum_wide, False
        if self.fused:
            most, finite = self._limits(views)
            if self._pair:
                (first, second), ((c0, _), (c1, _)) = views, self.terms
                self._pair(first, second, c0, c1, self.out, result)
                if not most:
                    return finite
                work = partial(self._mend, most)
            else:
                work = partial(self._sum_fused, most)
        for at in range(0, n, self._block):
            part = slice(at, min(at + self._block, n))
            work([x[part] for x in views], result[part])
        return finite

    def _cast(self, views: list[Any], result: Any) -> None:
        (view,), dtype, n = views, self.terms[0][1], result.size
        single = self._single[:n]
        if dtype == self.out or "F64" in (dtype, self.out):
            wide = np.empty(n, np.float64)
            self.do.double(view, dtype, single, wide)
            self._store(wide, result)
        else:
            self.do.narrow(self._widened(view, dtype, single), self.out, result)

    def _widened(self, view: Any, dtype: str, row: Any) -> Any:
        """`view` as float32: itself, or widened into `row`."""
        if dtype == "F32":
            return view
        self.do.widen(view, dtype, row)
        return row

    def _sum_fused(self, most: int, views: list[Any], result: Any) -> None:
        """Multiply-add after multiply-add in float32; what cancels once more in float64."""
        do, n = self.do, result.size
        total, single = self._total[:n], self._single[:n]
        (c0, d0), (c1, d1), *others = self.terms
        first, second = self._widened(views[0], d0, total), self._widened(views[1], d1, single)
        do.blend(first, second, c0, c1, total)
        for view, (c, dtype) in zip(views[2:], others, strict=True):
            do.blend(total, self._widened(view, dtype, single), 1.0, c, total)
        do.narrow(total, self.out, result)
        if most:
            self._mend(most, views, result)

    def _sizes(self, view: Any, dtype: str) -> Any:
        """The codes of some elements, without sign: integers that grow with them."""
        kind, unsigned = _CODES[self.codes]
        if dtype != self.codes:
            view = self._widened(view, dtype, np.empty(view.size, np.float32))
        return view.view(kind) & unsigned

    def _limits(self, views: list[Any]) -> tuple[int, bool]:
        """The code that a sum's must be below for its terms to cancel (0: none can), and whether
        all terms are so small that the sum is finite."""
        tops = []
        for view, (_, dtype) in zip(views, self.terms, strict=True):
            top = _largest(view)
            if dtype != self.codes:
                one = np.array([top], f"u{view.itemsize}").view(view.dtype)
                top = int(self._sizes(one, dtype)[0])
            tops.append(top)
        most = max(top - lost for top, lost in zip(tops, self.lost, strict=False))
        return most if most > self.even else 0, max(tops) < self.small

    def _mend(self, most: int, views: list[Any], result: Any) -> None:
        """Compute once more in float64 what cancels."""
        coarse = result if self.codes == self.out else self._total[: result.size]
        again = self._cancelled(most, views, coarse)
        if again.size:
            fixed = np.empty(again.size, result.dtype)
            self.do.narrow(self._in_float64(views, again), self.out, fixed)
            result[again] = fixed

    def _cancelled(self, most: int, views: list[Any], result: Any) -> Any:
        """Where the sum is too many powers of two smaller than one of its terms.

        Without its sign, the code of a float is its logarithm but for the fraction's curve.
        """
        n = result.size
        kind, unsigned = _CODES[self.codes]
        found = self._found[:n]
        np.bitwise_and(result.view(kind), unsigned, out=found)
        np.less(found, most, out=self._flags[:n])
        self._flags[n:] = False
        # almost all are False: skip them by eights
        eights = np.flatnonzero(self._flags.view(np.uint64) != 0)
        near = (eights[:, None] * 8 + np.arange(8)).ravel()
        near = near[self._flags[near]]
        small = np.maximum(found[near], self.even).astype(np.int64)
        guilty = np.zeros(near.size, np.bool_)
        for view, (_, dtype), lost in zip(views, self.terms, self.lost, strict=False):
            guilty |= small + lost < self._sizes(view[near], dtype)
        return near[guilty]

    def _in_float64(self, views: list[Any], at: Any) -> Any:
        """The sum of the elements `at`, as float32."""
        high: Any = 0.0
        low: Any = 0.0
        single = np.empty(at.size, np.float32)
        for view, (_, dtype), (hi, lo) in zip(views, self.terms, self.exact, strict=True):
            x = self._widened(view[at], dtype, single).astype(np.float64)
            high, low = high + hi * x, low + lo * x
        return (high + low).astype(np.float32)

    def _sum_wide(self, views: list[Any], result: Any) -> None:
        """Any number of terms in float64."""
        do, n = self.do, result.size
        total, x, low = (row[:n] for row in self._rows)
        single = self._single[:n]
        exact = not any(lo for _, lo in self.exact)
        hi, lo = self.exact[0]
        do.double(views[0], self.terms[0][1], single, total)
        if len(views) == 1:
            do.blend(total, total, lo, 0.0, low)
            do.blend(total, total, hi, 0.0, total)
        for i, view in enumerate(views[1:], 1):
            do.double(view, self.terms[i][1], single, x)
            before, rest = (hi, lo) if i == 1 else (1.0, 1.0)
            if not exact:
                do.blend(total if i == 1 else low, x, rest, self.exact[i][1], low)
            do.blend(total, x, before, self.exact[i][0], total)
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


_INFINITY = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x7C00, "BF16": 0x7F80}
"""The code of infinity, without sign; larger ones are NaN."""


def nonfinite(data: Any, dtype: str) -> int:
    """How many elements in the bytes `data` are infinite or NaN. 0 for fp8, which saturates."""
    infinity = _INFINITY.get(dtype)
    if infinity is None:
        return 0
    codes = np.frombuffer(data, f"u{np.dtype(NUMPY[dtype]).itemsize}")
    if not codes.size:
        return 0
    if _largest(codes) < infinity:
        return 0
    unsigned = (1 << (8 * codes.itemsize - 1)) - 1
    return int(np.count_nonzero((codes & unsigned) >= infinity))


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
        """float32 to `dtype`, ties to even; fp8 saturates (see `_to_fp8`)."""
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

    def dot(self, x: Any, y: Any) -> float:
        """The sum of x * y, in float64, of two rows of float32 or two of float64.

        Not by BLAS, which starts threads of its own for as many numbers.
        """
        return float(np.einsum("i,i->", x, y, dtype=np.float64))

    def apart(self, x: Any, y: Any) -> float:
        """The sum of (x - y)^2, in float64, of two rows of float32 or two of float64."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = x.astype(np.float64) - y
        return self.dot(difference, difference)

    def blend(self, x: Any, y: Any, a: float, b: float, out: Any) -> None:
        """`out = fma(y, b, a*x)`; `out` may be either input. A coefficient 0 ignores its row.

        Only what is fused in float32 needs the care of being done in float64: float64 rows come
        with coefficients whose products are exact.
        """
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if b == 0.0 or a == 0.0:
                np.multiply(*((x, x.dtype.type(a)) if b == 0.0 else (y, y.dtype.type(b))), out=out)
            elif x.dtype == np.float64:
                product = y * b
                np.multiply(x, a, out=out)
                np.add(out, product, out=out)
            else:
                product = y.astype(np.float64) * np.float64(np.float32(b))
                product += x * np.float32(a)
                np.copyto(out, product, casting="same_kind")


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
            return
        self._nk.astype(x, _KONG[dtype], out=self._view(out, dtype))
        if dtype in _FP8_LARGEST:  # its NaN and overflow are not what the formats say
            odd = np.flatnonzero(~(np.abs(x) <= _FP8_LARGEST[dtype]))
            out[odd] = _to_fp8(x[odd], dtype)

    def double(self, x: Any, dtype: str, scratch: Any, out: Any) -> None:
        if dtype == "F64":
            np.copyto(out, x)
        elif dtype == "F32":
            self._nk.astype(x, "float64", out=out)
        else:
            self.widen(x, dtype, scratch)
            self._nk.astype(scratch, "float64", out=out)

    def dot(self, x: Any, y: Any) -> float:
        return float(self._nk.dot(x, y))

    def apart(self, x: Any, y: Any) -> float:
        return float(self._nk.sqeuclidean(x, y))

    def single(self, x: Any, out: Any) -> None:
        self._nk.astype(x, "float32", out=out)

    def blend(self, x: Any, y: Any, a: float, b: float, out: Any) -> None:
        if a == 0.0 or b == 0.0:
            super().blend(x, y, a, b, out)
        else:
            self._nk.blend(x, y, alpha=a, beta=b, out=out)

    def pair(self, x: Any, y: Any, a: float, b: float, dtype: str, out: Any) -> None:
        """`out = a*x + b*y` of rows of one 16-bit dtype, neither a nor b 0, in one call."""
        first, second, result = (self._view(row, dtype) for row in (x, y, out))
        self._nk.blend(first, second, _KONG[dtype], alpha=a, beta=b, out=result)


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
    """Nearest code, ties to even; what is too large becomes the largest, 448 or 57344.

    e5m2 keeps infinity, which e4m3 does not have.
    """
    largest = 0x7E if dtype == "F8_E4M3" else 0x7B
    values = _fp8_table(dtype)[: largest + 1].astype(np.float64)
    magnitude = np.abs(x.astype(np.float64))
    low = np.clip(np.searchsorted(values, magnitude, side="right") - 1, 0, largest)
    high = np.minimum(low + 1, largest)
    middle = (values[low] + values[high]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1) & (high != low))
    code = np.where(up, high, low)
    if dtype == "F8_E5M2":
        code = np.where(np.isinf(magnitude), 0x7C, code)
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
    raw[:8] = np.nan, np.inf, -np.inf, 1e5, -1e5, -0.0, 65519.9, 1e-8
    rows: dict[str, Any] = {"F32": raw.astype(np.float32), "F64": raw}
    with np.errstate(over="ignore"):
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
        if not np.array_equal(got, want):
            found.append(what)

    def total(terms: list[Term], out: str) -> Callable[[Backend], Any]:
        def work(do: Backend) -> Any:
            """The result's bits; every NaN is one and the same."""
            result, wide = np.empty(n, NUMPY[out]), np.empty(n)
            Sum(terms, out, do)(n, [rows[dtype] for _, dtype in terms], result)
            Backend().double(result, out, np.empty(n, np.float32), wide)
            return np.where(np.isnan(wide), -1, result.view(f"i{result.itemsize}"))

        return work

    with np.errstate(all="ignore"):
        for dtype in ("F16", "BF16", "F32", "F64"):
            for out in dict.fromkeys((dtype, "F32", "F16")):
                pair = [(0.5833333333, dtype), (0.4166666667, dtype)]
                compare(f"blend {dtype} to {out}", total(pair, out))
                three = [(1.0, dtype), (0.7, dtype), (-0.7, dtype)]
                compare(f"sum {dtype} to {out}", total(three, out))
        for dtype in ("F8_E4M3", "F8_E5M2"):
            compare(f"widen {dtype}", total([(1.0, dtype)], "F32"))
        for dtype in ("F16", "BF16", "F8_E4M3", "F8_E5M2"):
            compare(f"narrow {dtype}", total([(1.0, "F32")], dtype))
    return found
