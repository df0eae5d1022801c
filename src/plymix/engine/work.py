"""The plan cut into work items: ranges of the output, and what each is made of.

* copies: neighbouring tensors that come from one file unchanged are one range;
* sums: neighbouring tensors with the same coefficients are one span;
* chunks of element-wise methods; whole tensors for methods that need them.

A tensor that lies in several pieces in an input is cut where they meet, so that each goes its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Union

from plymix.expr import Leaf, Tensor, chunkable, cut, deltas, plain_terms, streamed
from plymix.formats.base import BITS

SPAN = 16 << 20
"""Bytes of output per work item at most."""

CHUNK = 3 << 16
"""Elements read, computed and written at a time where the arithmetic is in float32. More of them
leave the processor's cache; with fewer, threads take turns more often than they compute."""


@dataclass(frozen=True, slots=True)
class CopyItem:
    source: int
    file: int
    offset: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Operand:
    """One contiguous input of a sum: coefficient, where it lies, dtype."""

    c: float
    source: int
    file: int
    offset: int
    dtype: str

    @property
    def size(self) -> int:
        return BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class SumItem:
    operands: tuple[Operand, ...]
    dtype: str
    numel: int
    at: int

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ChunkItem:
    """Elements [start, start + numel) of a tensor made by element-wise methods."""

    tensor: Tensor
    start: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.tensor.dtype] // 8


@dataclass(frozen=True, slots=True)
class WholeItem:
    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


Item = Union[CopyItem, SumItem, ChunkItem, WholeItem]


def items(tensors: Sequence[Tensor]) -> list[Item]:
    """The work that `tensors` need, joined where neighbours allow it and cut to SPAN."""
    joined: list[Item] = []
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if not tensor.nbytes:
            continue
        for item in map(_item, _pieces(tensor)):
            both = _join(joined[-1], item) if joined else None
            if both is not None:
                joined[-1] = both
            else:
                joined.append(item)
    return [part for item in joined for part in _cut(item)]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor`, cut where its inputs go on elsewhere, unless it needs them whole."""
    ends = sorted({end for leaf in streamed(tensor.expr) for end in leaf.info.ends})
    if len(ends) < 2 or not chunkable(tensor.expr):
        yield tensor
        return
    for start, stop in zip([0, *ends], ends, strict=False):
        at = tensor.offset + start * BITS[tensor.dtype] // 8
        part = cut(tensor.expr, start, stop)
        yield replace(tensor, shape=(stop - start,), expr=part, offset=at, first=start)


def _item(tensor: Tensor) -> Item:
    expr = tensor.expr
    if isinstance(expr, Leaf) and expr.info.dtype == tensor.dtype and not expr.info.scattered:
        info = expr.info
        return CopyItem(expr.source, info.file, info.offset, tensor.offset, tensor.nbytes)
    terms = plain_terms(expr)
    if terms and tensor.noise is None:
        operands = tuple(
            Operand(c, x.source, x.info.file, x.info.offset, x.info.dtype) for c, x in terms
        )
        return SumItem(operands, tensor.dtype, tensor.numel, tensor.offset)
    if chunkable(expr):
        return ChunkItem(tensor, 0, tensor.numel)
    return WholeItem(tensor)


def _join(a: Item, b: Item) -> Item | None:
    """`a` and `b` as one item when `b` goes on where `a` ends, on every side."""
    if isinstance(a, CopyItem) and isinstance(b, CopyItem):
        here = (a.source, a.file, a.offset + a.nbytes, a.at + a.nbytes)
        if here == (b.source, b.file, b.offset, b.at):
            return replace(a, nbytes=a.nbytes + b.nbytes)
    if isinstance(a, SumItem) and isinstance(b, SumItem):
        after = tuple(replace(o, offset=o.offset + a.numel * o.size) for o in a.operands)
        if (a.dtype, a.at + a.nbytes, after) == (b.dtype, b.at, b.operands):
            return replace(a, numel=a.numel + b.numel)
    return None


def _cut(item: Item) -> Iterator[Item]:
    if isinstance(item, CopyItem):
        for start in range(0, item.nbytes, SPAN):
            n = min(SPAN, item.nbytes - start)
            yield replace(item, offset=item.offset + start, at=item.at + start, nbytes=n)
    elif isinstance(item, SumItem):
        size = BITS[item.dtype] // 8
        step = SPAN // size
        for start in range(0, item.numel, step):
            operands = tuple(replace(o, offset=o.offset + start * o.size) for o in item.operands)
            n = min(step, item.numel - start)
            yield SumItem(operands, item.dtype, n, item.at + start * size)
    elif isinstance(item, ChunkItem):
        chunk = chunk_of(item.tensor)
        step = max(1, SPAN // 4 // chunk) * chunk
        for start in range(0, item.numel, step):
            yield ChunkItem(item.tensor, start, min(step, item.numel - start))
    else:
        yield item


def chunk_of(tensor: Tensor) -> int:
    """Elements of a chunk: CHUNK, or about as many in whole rows where a LoRA is at work.

    Where a product of matrices is cut can show in its last bits; so it is cut at the same rows,
    counted from the tensor's first, whatever a chunk is.
    """
    return next((d.grain(CHUNK) for d in deltas(tensor.expr)), CHUNK)
