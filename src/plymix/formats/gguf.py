"""GGUF 2 and 3: metadata, tensor descriptions, then tensors that may be packed in coarse blocks.

Sources: the GGUF specification (ggml's `docs/gguf.md`); `comfy.gguf.orig_shape.*` as ComfyUI-GGUF
defines it.

A packed tensor is read as float32: it lies in a virtual file of the source (`virtual`). Writing
mirrors this: what goes to an offset beyond the file's size is packed (`Encoding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from plymix.errors import Failure, FormatError, Refusal
from plymix.formats.base import (
    FLOATS,
    Entry,
    Layout,
    OpenFile,
    Piece,
    Readable,
    Source,
    TensorInfo,
    opened,
)
from plymix.formats.gguf_blocks import Q8_0, QUANTS, Quant, encode_q8_0
from plymix.formats.virtual import Spans, Virtual

name = "gguf"
suffixes = (".gguf",)

MAGIC = b"GGUF"
MAX_HEADER = 64 << 20
MAX_TENSORS = 100_000
MAX_VALUES = 10_000  # of metadata
MAX_STRINGS = 2_000_000  # in arrays, all together; the largest vocabularies have 300,000
MAX_NAME = 65_535
MAX_RANK = 8  # ggml stops at 4, but video models are about with 5

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
OURS = ("general.alignment", "general.quantization_version", "general.file_type")
"""Metadata that is about the file and not about the model: neither passed on nor taken over."""

PLAIN = {
    0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
}  # fmt: skip
"""The kinds whose bytes are the elements, by ggml's number: plymix's name, which is ggml's."""

REFUSED = {
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip

NUMBERS = {label: number for number, label in PLAIN.items()} | {
    quant.name: number for number, quant in QUANTS.items()
}
"""ggml's number of each kind that is written or read."""


# ---- packed tensors


@dataclass(frozen=True, slots=True)
class Span:
    """A packed tensor: where its float32 elements begin virtually, and its blocks really."""

    start: int
    numel: int
    at: int
    quant: Quant
    name: str


def unpack(handle: Readable, span: Span, first: int, count: int) -> Any:
    """Elements [first, first + count) of `span`, flat, as float32."""
    quant = span.quant
    block = first // quant.elements
    packed = np.empty((-(-(first + count) // quant.elements) - block, quant.nbytes), np.uint8)
    handle.read_at(span.at + block * quant.nbytes, packed)
    skip = first - block * quant.elements
    return quant.decode(packed).reshape(-1)[skip : skip + count]


def expect(handle: Readable, span: Span) -> None:
    """Say that `span` will be read."""
    nbytes = span.numel // span.quant.elements * span.quant.nbytes
    handle.expect([(span.at, span.at + nbytes)])


class Encoding:
    """A target of the engine that packs what is written at the virtual offsets of `spans`."""

    waits = False

    def __init__(self, target: Any, spans: Sequence[Span]) -> None:
        self._target = target
        self._first = spans[0].start
        self._spans = Spans(spans)

    def write_at(self, offset: int, data: Any) -> None:
        if offset < self._first:
            self._target.write_at(offset, data)
            return
        values = np.frombuffer(data, np.uint8)
        for span, begin, n in self._spans.parts(offset, len(values)):
            quant = span.quant
            if begin % (4 * quant.elements) or n % (4 * quant.elements):
                raise ValueError(f"{quant.name} is written in whole blocks")
            rows = values[:n].view(np.float32).reshape(-1, quant.elements)
            if not (np.abs(rows) <= 127 * 65504.0).all():
                raise Failure(
                    f"{span.name} holds values that {quant.name} cannot express (infinite, not a"
                    " number or too large); write another dtype"
                )
            self._target.write_at(
                span.at + begin // (4 * quant.elements) * quant.nbytes, encode_q8_0(rows)
            )
            values = values[n:]

    def read_at(self, offset: int, out: Any) -> None:
        self._target.read_at(offset, out)

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        if at >= self._first:
            return 0
        moved: int = self._target.copy_from(handle, offset, at, nbytes)
        return moved


# ---- reading


def sniff(head: bytes) -> bool:
    """Whether `head` (the first 16 bytes or more) begins a GGUF file."""
    return head[:4] == MAGIC


def open_file(path: Path) -> Source:
    """Read the header of `path`. Raises FormatError when it is damaged, hostile or of a kind that
    is not read (version 1, big-endian, IQ types)."""
    return opened(path, lambda handle: _Header(handle).source())


_U32, _U64, _I32 = Struct("<I"), Struct("<Q"), Struct("<i")
_SCALARS = {
    0: Struct("<B"), 1: Struct("<b"), 2: Struct("<H"), 3: Struct("<h"), 4: _U32, 5: _I32,
    6: Struct("<f"), 7: Struct("<?"), 10: _U64, 11: Struct("<q"), 12: Struct("<d"),
}  # fmt: skip
"""The fixed-size types of metadata values; 8 is text, 9 an array."""
_INT32, _STRING, _ARRAY = 5, 8, 9


class _Description(NamedTuple):
    """A tensor as the header describes it; `at` is relative to the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    at: int


class _Header:
    """Goes through a header once, through a window, never beyond MAX_HEADER or the file's end."""

    def __init__(self, handle: OpenFile) -> None:
        self.handle = handle
        self.limit = min(handle.size, MAX_HEADER)
        self.at = 0
        self.window = b""
        self.window_at = 0
        self.strings = MAX_STRINGS

    def bad(self, what: str) -> FormatError:
        return FormatError(f"{self.handle.path.name} is not a sound GGUF file: {what}")

    def take(self, n: int) -> bytes:
        begin = self.at - self.window_at
        if not 0 <= begin <= begin + n <= len(self.window):
            self.check(n)
            # the tail of the file may be shorter; what is asked for is there, as checked
            self.window = self.handle.head(max(n, 1 << 16), self.at)
            self.window_at, begin = self.at, 0
        self.at += n
        return self.window[begin : begin + n]

    def skip(self, n: int) -> None:
        self.check(n)
        self.at += n

    def check(self, n: int) -> None:
        if self.at + n > self.limit:
            if self.limit < self.handle.size:
                raise self.bad(f"its header goes on beyond {MAX_HEADER:,} bytes")
            raise FormatError(
                f"{self.handle.path.name} is truncated: it ends within its header; fetch it again"
            )

    def number(self, packed: Struct) -> Any:
        return packed.unpack(self.take(packed.size))[0]

    def count(self, what: str, limit: int) -> int:
        n = int(self.number(_U64))
        if n > limit:
            raise self.bad(f"it claims {n:,} {what} (limit {limit:,})")
        return n

    def text(self, limit: int = MAX_HEADER) -> str:
        n = self.count("bytes for a text", limit)
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("it has a text that is not UTF-8") from None

    def source(self) -> Source:
        """The whole file as a Source."""
        file = self.handle.path.name
        if self.take(4) != MAGIC:
            raise self.bad("it does not begin with GGUF")
        version = self.number(_U32)
        if version & 0xFFFF == 0:
            raise FormatError(f"{file} is a big-endian GGUF file; fetch the ordinary one")
        if version not in (2, 3):
            raise FormatError(f"{file} has GGUF version {version}; 2 and 3 are read")
        tensors = self.count("tensors", MAX_TENSORS)
        values = self.count("metadata values", MAX_VALUES)
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self.text(MAX_NAME)
            if key in metadata:
                raise self.bad(f"metadata {key[:80]!r} occurs twice")
            metadata[key] = self.value(key, self.number(_U32))
        found = [self.description() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment % 8:
            raise self.bad(f"its alignment is {str(alignment)[:40]!r}")
        start = -(-self.at // alignment) * alignment
        infos, spans = self.placed(found, start, alignment, metadata)
        handles: tuple[Readable, ...] = (self.handle,)
        if spans:
            ways = partial(unpack, self.handle), partial(expect, self.handle)
            handles += (Virtual(self.handle.path, spans, *ways),)
        said = {k: _as_text(v) for k, v in metadata.items() if v is not None and k not in OURS}
        shown = {k: v for k, v in said.items() if not k.startswith(ORIGINAL_SHAPE)}
        return Source(self.handle.path, name, infos, shown, handles=handles)

    def value(self, key: str, kind: int) -> Any:
        """A metadata value. Arrays are passed over (None) but those that say a tensor's shape."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.bad(f"metadata {key[:80]!r} has the unknown type {kind}")
        item = self.number(_U32)
        if item == _STRING:
            n = self.count("texts", self.strings)
            self.strings -= n
            for _ in range(n):
                self.skip(self.count("bytes for a text", MAX_HEADER))
            return None
        if item not in _SCALARS:
            raise self.bad(f"metadata {key[:80]!r} is an array of the unknown type {item}")
        size = _SCALARS[item].size
        n = self.count("numbers", MAX_HEADER // size)
        if not key.startswith(ORIGINAL_SHAPE):
            self.skip(n * size)
            return None
        if item != _INT32 or n > MAX_RANK:
            raise self.bad(f"metadata {key[:80]!r} is not a shape")
        return tuple(self.number(_I32) for _ in range(n))

    def description(self) -> _Description:
        label = self.text(MAX_NAME)
        rank = self.number(_U32)
        if rank > MAX_RANK:
            raise self.bad(f"tensor {label[:80]!r} has {rank} dimensions (limit {MAX_RANK})")
        shape = tuple(self.number(_U64) for _ in range(rank))
        # in the file the dimension that runs fastest comes first
        return _Description(label, shape[::-1], self.number(_U32), self.number(_U64))

    def placed(
        self,
        found: Sequence[_Description],
        start: int,
        alignment: int,
        metadata: Mapping[str, Any],
    ) -> tuple[dict[str, TensorInfo], list[Span]]:
        """Every tensor's place. Raises FormatError for what overlaps or lies outside the file."""
        infos: dict[str, TensorInfo] = {}
        spans: list[Span] = []
        ranges: list[tuple[int, int, str]] = []
        virtual = 0
        for label, stored, kind, at in found:
            shown = repr(label[:80])
            if label in infos:
                raise self.bad(f"tensor {shown} occurs twice")
            if at % alignment:
                raise self.bad(f"tensor {shown} is not aligned to {alignment} bytes")
            numel = math.prod(stored)
            shape = metadata.get(ORIGINAL_SHAPE + label, stored)
            if type(shape) is not tuple or math.prod(shape) != numel or min(shape, default=0) < 0:
                raise self.bad(f"tensor {shown} {list(stored)} has the original shape {shape!r}")
            if kind in PLAIN:
                infos[label] = TensorInfo(label, PLAIN[kind], shape, start + at)
                nbytes = infos[label].nbytes
            else:
                quant = self.quant(label, kind)
                if not stored or stored[-1] % quant.elements:
                    raise self.bad(
                        f"tensor {shown} {list(stored)} has rows that are no multiple of"
                        f" {quant.elements} elements, which {quant.name} demands"
                    )
                infos[label] = TensorInfo(label, "F32", shape, virtual, 1, encoding=quant.name)
                spans.append(Span(virtual, numel, start + at, quant, label))
                virtual += 4 * numel
                nbytes = numel // quant.elements * quant.nbytes
            ranges.append((start + at, start + at + nbytes, shown))
        end = start
        for begin, stop, shown in sorted(ranges):
            if stop > self.handle.size:
                raise FormatError(
                    f"{self.handle.path.name} is truncated: tensor {shown} ends at byte {stop:,}"
                    f" and the file has {self.handle.size:,}; fetch it again"
                )
            if begin < end and begin != stop:
                raise self.bad(f"tensor {shown} overlaps its neighbour")
            end = max(end, stop)
        return infos, spans

    def quant(self, label: str, kind: int) -> Quant:
        if kind in QUANTS:
            return QUANTS[kind]
        what = REFUSED.get(kind, f"of the unknown type {kind}")
        read = ", ".join(q.name for q in QUANTS.values())
        raise FormatError(
            f"{self.handle.path.name}: tensor {label[:80]!r} is {what}, which is not read ({read},"
            " F16, BF16 and F32 are); fetch the model in one of these"
        )


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- writing

ALIGNMENT = 32
MAX_WRITTEN_NAME = 127  # what the longest-reaching build of ggml holds
_MAX_WRITTEN_RANK = 4
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def packed(entries: Sequence[Entry]) -> list[Entry]:
    """`entries` with those that suit it as Q8_0: float32 matrices and kernels of whole blocks.

    Vectors stay float32, as other tools have it: they are small and matter much.
    """
    return [
        replace(e, encoding=Q8_0.name)
        if e.dtype == "F32" and len(e.shape) > 1 and _rows(e.shape, Q8_0.elements)
        else e
        for e in entries
    ]


def layout(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Layout:
    """Where everything goes in a file of version 3. Tensors keep their order.

    All metadata becomes text. Entries with the encoding "Q8_0" must be F32 there; their offsets
    are virtual ones (see `Layout.through`). A tensor whose shape ggml cannot hold (more than four
    dimensions, none, or rows that are no whole blocks) is reshaped, and the metadata says what it
    was. Raises Refusal for a dtype, an encoding or a name that GGUF has not.
    """
    descriptions = b""
    shapes: dict[str, tuple[int, ...]] = {}
    places: list[tuple[Entry, int]] = []
    end = 0
    for e in entries:
        number = _number(e)
        label = _labelled(e.name, MAX_WRITTEN_NAME)
        shape = _stored(e)
        if shape != e.shape:
            shapes[e.name] = e.shape
        at = -(-end // ALIGNMENT) * ALIGNMENT
        dims = Struct(f"<I{len(shape)}QIQ").pack(len(shape), *shape[::-1], number, at)
        descriptions += label + dims
        places.append((e, at))
        end = at + nbytes(e)
    values = _values(entries, metadata, shapes)
    head = MAGIC + Struct("<IQQ").pack(3, len(entries), len(values)) + b"".join(values)
    head += descriptions
    head += bytes(-len(head) % ALIGNMENT)
    if len(head) > MAX_HEADER:
        raise Refusal(f"the GGUF header would have {len(head):,} bytes (limit {MAX_HEADER:,})")
    start = len(head)
    size = start + -(-end // ALIGNMENT) * ALIGNMENT
    offsets: dict[str, int] = {}
    pieces: list[Piece] = [(0, head)]
    spans: list[Span] = []
    encoded: dict[str, tuple[int, int]] = {}
    # Not where the last tensor ends, for nothing real joins the virtual; and a multiple of a block,
    # so that the engine's steps, which end at round offsets, are whole blocks.
    block = 4 * Q8_0.elements
    virtual = (size // block + 2) * block
    for e, at in places:
        offsets[e.name] = start + at
        if e.encoding:
            offsets[e.name] = virtual
            numel = math.prod(e.shape)
            spans.append(Span(virtual, numel, start + at, Q8_0, e.name))
            encoded[e.name] = (start + at, nbytes(e))
            virtual += 4 * numel
        filled = start + at + nbytes(e)
        if padding := bytes(-filled % ALIGNMENT):
            pieces.append((filled, padding))
    through = (lambda target: Encoding(target, spans)) if spans else None
    return Layout(offsets, size, pieces, through=through, encoded=encoded)


def _number(e: Entry) -> int:
    """ggml's number of the type of `e`."""
    if e.encoding and (e.encoding, e.dtype) != (Q8_0.name, "F32"):
        raise Refusal(f"{e.name!r}: GGUF is written as {Q8_0.name} from F32, not as {e.encoding}")
    label = e.encoding or e.dtype
    if label not in NUMBERS:
        raise Refusal(
            f"{e.name!r} is {label}, which GGUF cannot hold; write .safetensors, or choose the"
            " output dtype fp16, bf16 or fp32"
        )
    return NUMBERS[label]


def nbytes(e: Entry) -> int:
    """The bytes of `e` in the file."""
    if e.encoding:
        return math.prod(e.shape) // Q8_0.elements * Q8_0.nbytes
    return e.nbytes


def _rows(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """`shape` with rows of whole blocks, in two dimensions if need be; () if there are none."""
    numel = math.prod(shape)
    if not numel or shape[-1] % elements == 0:
        return shape if numel else ()
    width = next((w for w in (256, elements) if numel % w == 0), 0)
    return (numel // width, width) if width else ()


def _stored(e: Entry) -> tuple[int, ...]:
    """The shape under which the file has `e`."""
    shape = e.shape or (1,)
    if e.encoding:
        shape = _rows(shape, Q8_0.elements)
        if not shape:
            raise Refusal(f"{e.name!r} {list(e.shape)} has no whole blocks of {Q8_0.elements}")
    if len(shape) > _MAX_WRITTEN_RANK:
        fewer = len(shape) - _MAX_WRITTEN_RANK + 1
        shape = (math.prod(shape[:fewer]), *shape[fewer:])
    return shape


def _labelled(text: str, limit: int) -> bytes:
    utf8 = text.encode("utf-8", "surrogatepass")
    if len(utf8) > limit:
        raise Refusal(
            f"{text[:80]!r}... is a name of {len(utf8)} bytes and GGUF allows {limit};"
            " write .safetensors"
        )
    return _U64.pack(len(utf8)) + utf8


def _values(
    entries: Sequence[Entry], metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> list[bytes]:
    """The metadata values, each with its key."""

    def value(key: str, kind: int, content: bytes) -> bytes:
        return _labelled(key, MAX_NAME) + _U32.pack(kind) + content

    found = []
    for key, text in metadata.items():
        if key not in OURS and not key.startswith(ORIGINAL_SHAPE):
            found.append(value(key, _STRING, _labelled(text, MAX_HEADER)))
    encoded = any(e.encoding for e in entries)
    floats = [e for e in entries if e.dtype in FLOATS]
    most = max(floats, key=nbytes).dtype if floats else "F32"
    file_type = _FILE_TYPES.get(Q8_0.name if encoded else most, 0)
    found.append(value("general.alignment", 4, _U32.pack(ALIGNMENT)))
    found.append(value("general.file_type", 4, _U32.pack(file_type)))
    if encoded:
        found.append(value("general.quantization_version", 4, _U32.pack(2)))
    for key, shape in shapes.items():
        numbers = Struct(f"<IQ{len(shape)}i").pack(_INT32, len(shape), *shape)
        found.append(value(ORIGINAL_SHAPE + key, _ARRAY, numbers))
    return found
