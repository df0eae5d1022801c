"""Files that are not there: packed tensors of a real file, read as the float32 they stand for.

A packed tensor lies in a second, virtual file of its source. So all the rest of plymix reads it as
it reads any tensor, and nothing can take its codes for its values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

BATCH = 1 << 16
"""Elements unpacked or packed at a time."""


class Span(Protocol):
    """A packed tensor: where its float32 elements begin in the virtual file, in bytes."""

    @property
    def start(self) -> int: ...

    @property
    def numel(self) -> int: ...


S = TypeVar("S", bound=Span)


class Spans(Generic[S]):
    """Spans in the order of their starts, with the way from a virtual range to parts of them."""

    def __init__(self, spans: Sequence[S]) -> None:
        self._spans = [s for s in spans if s.numel]
        self._starts = [s.start for s in self._spans]

    def parts(self, offset: int, nbytes: int) -> Iterator[tuple[S, int, int]]:
        """(span, first byte in it, bytes) for every part of a range, of BATCH elements at most."""
        while nbytes:
            span = self._spans[bisect_right(self._starts, offset) - 1]
            begin = offset - span.start
            n = min(nbytes, 4 * span.numel - begin, 4 * BATCH - begin % (4 * BATCH))
            yield span, begin, n
            offset += n
            nbytes -= n

    def within(self, begin: int, end: int) -> Iterator[S]:
        """The spans of a range, which is not empty."""
        at = bisect_right(self._starts, begin) - 1
        while at < len(self._spans) and self._starts[at] < end:
            yield self._spans[at]
            at += 1


class Virtual(Generic[S]):
    """Packed tensors as a virtual file of float32.

    `unpack(span, first, count)` gives elements [first, first + count) of a span, flat, as float32;
    it is called from several threads. `expect(span)` says that a span will be read.
    """

    size = 0  # on disk there is only the real file

    def __init__(
        self,
        path: Path,
        spans: Sequence[S],
        unpack: Callable[[S, int, int], Any],
        expect: Callable[[S], None],
    ) -> None:
        self.path = path
        self._spans = Spans(spans)
        self._unpack = unpack
        self._expect = expect

    def read_at(self, offset: int, out: Any) -> None:
        import numpy as np

        view = memoryview(out).cast("B")
        for span, begin, n in self._spans.parts(offset, len(view)):
            first = begin // 4
            with np.errstate(all="ignore"):  # a hostile scale may be infinite; so is the value then
                values = self._unpack(span, first, -(-(begin + n) // 4) - first)
            skip = begin - 4 * first
            view[:n] = np.ascontiguousarray(values).view(np.uint8)[skip : skip + n].data
            view = view[n:]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        for begin, end in ranges:
            for span in self._spans.within(begin, end):
                self._expect(span)

    def stop(self) -> None:
        """Nothing of its own to wait for."""

    def close(self) -> None:
        """Nothing of its own to close."""
