"""Weights stored as codes beside scales, in any container, read as the numbers they stand for.

    scaled fp8        X.weight (fp8) x X.scale_weight or X.weight_scale: one scale for all, one per
                      row, or one per run of a row
    bitsandbytes 4bit X.weight (two codes per byte): quant_map[code] x absmax of its run

Sources: ComfyUI's `comfy/ops.py` and `comfy/quant_ops.py` (names and meaning of the scales);
bitsandbytes' `functional.py`, `QuantState.from_dict` and `dequantize_4bit`.

A number is the float32 product of two float32 values. Scales, tables and markers are then no
tensors of the model any more (`Source.left_out`). What does not fit exactly stays as it is, and a
merge refuses it by the names of its scales.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from plymix.formats.base import BITS, Source, TensorInfo
from plymix.formats.virtual import Virtual

MARKER = "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
"""What may lie beside a scaled weight and says nothing about its numbers."""
STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
MORE = (".weight_scale_2", ".pre_quant_scale")
"""What multiplies a weight beside its scale in kinds that are not read (nvfp4, smoothed ones)."""
TABLES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")

FP8 = ("F8_E4M3", "F8_E5M2")
COMFY = ("float8_e4m3fn", "float8_e5m2")
"""The formats of a `.comfy_quant` that are a plain scaled fp8."""
_SCALE_DTYPES = ("F32", "F16", "BF16")
_MAX_STATE = 1 << 16

Values = Callable[[int, int], Any]
"""(first, count) -> so many values of an array on disk, as float32."""


@dataclass(frozen=True, slots=True)
class Span:
    """A packed weight: codes of `bits` bits, each a value of `table` x the scale of its `group`.

    Scales and table are read anew for every part: they are small, and so nothing is kept.
    """

    start: int
    numel: int
    codes: TensorInfo
    bits: int
    table: Callable[[], Any]
    scales: Values
    group: int


def unpacked(source: Source) -> Source:
    """`source` with its scaled fp8 and 4-bit weights as float32; itself where it has none.

    Reads a few bytes per weight to know how it is packed, nothing of the weights.
    """
    if not any(key.endswith((MARKER, *SCALES, *STATES)) for key in source.tensors):
        return source
    return _Unpacking(source).done()


class _Unpacking:
    """The state of one pass over a source's tensors."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tensors = dict(source.tensors)
        self.spans: list[Span] = []
        self.left_out: dict[str, list[str]] = {}
        self.kinds: Counter[str] = Counter()
        self.end = 0

    def done(self) -> Source:
        for key in self.source.tensors:
            if key.endswith(SCALES):
                self._scaled(key)
            elif key.endswith(STATES):
                self._four_bits(key)
        if self.spans and not any(key.endswith(SCALES) for key in self.tensors):
            for key in self.source.tensors:
                if key.rpartition(".")[2] == MARKER:
                    self._leave_out("marker of scaled fp8", key)
        if not self.left_out:
            return self.source
        source = self.source
        notes = [
            f"{n} weights are {kind}; they are read as the numbers that codes and scales stand for"
            for kind, n in self.kinds.items()
        ]
        return replace(
            source,
            tensors=self.tensors,
            notes=(*source.notes, *notes),
            handles=(*source.handles, self._virtual()),
            left_out={**source.left_out, **{k: tuple(v) for k, v in self.left_out.items()}},
        )

    def _virtual(self) -> Virtual[Span]:
        source = self.source
        return Virtual(
            source.path,
            self.spans,
            partial(unpack, source),
            lambda span: source.expect([span.codes]),
        )

    def _leave_out(self, why: str, key: str) -> None:
        self.left_out.setdefault(why, []).append(key)
        del self.tensors[key]

    def _put(self, span: Span, shape: tuple[int, ...], encoding: str) -> None:
        self.spans.append(span)
        self.kinds[encoding] += 1
        self.end += 4 * span.numel
        self.tensors[span.codes.name] = TensorInfo(
            span.codes.name, "F32", shape, span.start, len(self.source.handles), encoding=encoding
        )

    def _scaled(self, key: str) -> None:
        stem = key.rpartition(".")[0]
        weight, scale = self.tensors.get(f"{stem}.weight"), self.tensors[key]
        group = _group(weight, scale) if weight and weight.dtype in FP8 else 0
        if weight is None or not group or not self._is_plain(stem):
            return
        span = Span(
            start=self.end,
            numel=weight.numel,
            codes=weight,
            bits=8,
            table=partial(fp8_values, weight.dtype),
            scales=partial(_floats, self.source, scale),
            group=group,
        )
        self._put(span, weight.shape, f"scaled {weight.dtype}")
        self._leave_out("scales of scaled fp8", key)
        for side in UNUSED:
            if stem + side in self.tensors:
                self._leave_out("scales of scaled fp8", stem + side)

    def _is_plain(self, stem: str) -> bool:
        """Whether a weight is code x scale and no more, also by its `.comfy_quant`."""
        if any(stem + side in self.tensors for side in MORE):
            return False
        said = f"{stem}.comfy_quant"
        return said not in self.tensors or self._json(said).get("format") in COMFY

    def _json(self, key: str) -> Mapping[str, Any]:
        info = self.tensors[key]
        if info.dtype not in ("U8", "I8") or info.nbytes > _MAX_STATE:
            return {}
        try:
            found = json.loads(bytes(self.source.read(info)))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _four_bits(self, key: str) -> None:
        name = key[: key.index(".quant_state.")]
        codes, absmax = self.tensors.get(name), self.tensors.get(f"{name}.absmax")
        table, state = self.tensors.get(f"{name}.quant_map"), self._json(key)
        shape, group = _shape(state.get("shape")), state.get("blocksize")
        if codes is None or absmax is None or not _is(table, "F32", 16) or shape is None:
            return
        numel = math.prod(shape)
        if type(group) is not int or group < 2 or group % 2 or codes.scattered:
            return
        if codes.dtype != "U8" or codes.numel != -(-numel // 2) or codes.numel != codes.nbytes:
            return
        scales = self._absmax(name, absmax, -(-numel // group), state)
        if scales is None or table is None or state.get("quant_type") not in ("nf4", "fp4"):
            return
        span = Span(
            start=self.end,
            numel=numel,
            codes=codes,
            bits=4,
            table=partial(_floats, self.source, table, 0, 16),
            scales=scales,
            group=group,
        )
        kind = f"bitsandbytes {state['quant_type']}"
        self._put(span, shape, kind)
        for side in (*TABLES, *STATES):
            if name + side in self.tensors:
                self._leave_out(f"scales and tables of {kind}", name + side)

    def _absmax(
        self, name: str, absmax: TensorInfo, count: int, state: Mapping[str, Any]
    ) -> Values | None:
        """The scales of a 4-bit weight, which may themselves be codes of 8 bits."""
        if _is(absmax, "F32", count):
            return partial(_floats, self.source, absmax)
        table = self.tensors.get(f"{name}.nested_quant_map")
        maxima = self.tensors.get(f"{name}.nested_absmax")
        group, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if table is None or maxima is None or type(group) is not int or group < 1:
            return None
        good = _is(absmax, "U8", count) and _is(table, "F32", 256)
        if not good or not _is(maxima, "F32", -(-count // group)):
            return None
        if not isinstance(offset, (int, float)) or isinstance(offset, bool):
            return None

        def values(first: int, n: int) -> Any:
            import numpy as np

            codes = np.frombuffer(_bytes(self.source, absmax, first, n), np.uint8)
            inner = _floats(self.source, table, 0, 256)[codes]
            return inner * _repeated(partial(_floats, self.source, maxima), group, first, n) + (
                np.float32(offset)
            )

        return values


def _is(info: TensorInfo | None, dtype: str, numel: int) -> bool:
    return (
        info is not None
        and info.dtype == dtype
        and info.numel == numel
        and not info.scattered
        and not info.encoding
    )


def _shape(said: object) -> tuple[int, ...] | None:
    """A JSON list as a shape."""
    if not isinstance(said, list) or len(said) > 64:
        return None
    good = all(type(n) is int and 0 <= n < 1 << 62 for n in said)
    return tuple(said) if good and math.prod(said) < 1 << 62 else None


def _group(weight: TensorInfo, scale: TensorInfo) -> int:
    """How many neighbouring elements share a scale; 0 where scales lie in another way.

    One for all; [rows] or [rows, 1]: one per row; [rows, n] or [rows, n, 1]: n runs in each row.
    """
    if scale.dtype not in _SCALE_DTYPES or scale.scattered or weight.scattered or not weight.numel:
        return 0
    if scale.numel == 1:
        return weight.numel
    runs = scale.shape
    while runs and runs[-1] == 1:
        runs = runs[:-1]
    row = weight.numel // weight.shape[0] if weight.shape else 0
    if runs == weight.shape[:1]:
        return row
    if len(runs) == 2 and runs[0] == weight.shape[0] and row % runs[1] == 0:
        return row // runs[1]
    return 0


# ---- reading


def unpack(source: Source, span: Span, first: int, count: int) -> Any:
    """Elements [first, first + count) of `span`, flat, as float32."""
    import numpy as np

    table = span.table()
    codes = np.frombuffer(_codes(source, span, first, count), np.uint8)
    if span.bits == 4:  # the first of two is in the high half
        codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
        codes = codes[first % 2 : first % 2 + count]
    if span.group == span.numel:
        return np.take(table * span.scales(0, 1), codes)
    return np.take(table, codes) * _repeated(span.scales, span.group, first, count)


def _codes(source: Source, span: Span, first: int, count: int) -> bytearray:
    if span.bits == 8:
        return _bytes(source, span.codes, first, count)
    begin, end = first // 2, (first + count + 1) // 2
    return _bytes(source, span.codes, begin, end - begin)


def _repeated(scales: Values, group: int, first: int, count: int) -> Any:
    """The scale of each of the elements [first, first + count)."""
    import numpy as np

    begin, end = first // group, -(-(first + count) // group)
    ends = np.minimum(np.arange(begin + 1, end + 1) * group, first + count)
    return np.repeat(scales(begin, end - begin), np.diff(ends, prepend=first))


def _floats(source: Source, info: TensorInfo, first: int, count: int) -> Any:
    import numpy as np

    raw = _bytes(source, info, first, count)
    if info.dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    dtype = np.float32 if info.dtype == "F32" else np.float16
    return np.frombuffer(raw, dtype).astype(np.float32)


def _bytes(source: Source, info: TensorInfo, first: int, count: int) -> bytearray:
    size = BITS[info.dtype] // 8
    out = bytearray(count * size)
    source.read_at(info.file, info.offset + first * size, out)
    return out


@lru_cache(maxsize=2)
def fp8_values(dtype: str) -> Any:
    """float32 value of each of the 256 codes of an fp8 dtype.

    e5m2 is the upper half of a float16. e4m3 has float16's bits in other places: its exponent is 8
    less biased, and its highest magnitude is NaN, not infinity.
    """
    import numpy as np

    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    bits = (codes & 0x80) << 8 | (codes & 0x7F) << 7
    values = bits.view(np.float16).astype(np.float32) * 256
    values[[0x7F, 0xFF]] = np.nan
    return values
