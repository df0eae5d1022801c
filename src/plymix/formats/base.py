"""What every file format gives and takes.

Reading: a `Source` is an open model; each of its tensors is a `TensorInfo`: (file, offset, dtype,
shape). Sources hand out byte ranges, never arrays, so that the engine decides what is in memory.

Writing: `layout()` of a format says, before any data exists, where each tensor's bytes go in the
finished file and what else the file holds. The engine then writes tensors in any order.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Union

from plymix import urls
from plymix.errors import FormatError, Refusal

BITS: dict[str, int] = {
    # safetensors names (https://github.com/huggingface/safetensors, format section), 0.8.0
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype a file may hold, by its safetensors name."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""The dtypes plymix computes with; everything else is only ever copied."""

WHOLE = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
"""The dtypes of whole numbers."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as it lies in a file.

    `offset` is the absolute byte offset of its first element in `files[file]`. `strides` is in
    elements and None for a row-major contiguous tensor (the usual case). `encoding` names how a
    tensor is packed on disk ("Q8_0") when its `dtype` is only what reading it gives.

    A tensor may lie in several `parts`, one after the other along axis 0, all of its dtype; `file`
    and `offset` are the first one's then.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    file: int = 0
    strides: tuple[int, ...] | None = None
    encoding: str = ""
    parts: tuple[TensorInfo, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scattered(self) -> bool:
        """Whether its elements do not lie in row-major order, in one piece or several."""
        return self.strides is not None or any(part.scattered for part in self.parts)

    @property
    def extent(self) -> tuple[int, int]:
        """The byte range of its file in which it lies, if it lies in one piece."""
        numel = self.numel
        if numel and self.strides is not None:
            steps = zip(self.shape, self.strides, strict=True)
            numel = 1 + sum((n - 1) * step for n, step in steps)
        return self.offset, self.offset + (numel * BITS[self.dtype] + 7) // 8

    @property
    def ends(self) -> tuple[int, ...]:
        """The number of elements up to the end of each piece."""
        return tuple(accumulate(part.numel for part in self.parts)) or (self.numel,)

    def cut(self, start: int, stop: int) -> TensorInfo:
        """Elements [start, stop) in a line. They must lie in order and in one piece."""
        piece, first = self, 0
        for part, end in zip(self.parts, self.ends, strict=False):
            if end > start:
                piece, first = part, end - part.numel
                break
        offset = piece.offset + (start - first) * BITS[self.dtype] // 8
        return replace(self, shape=(stop - start,), file=piece.file, offset=offset, parts=())

    @property
    def nbytes(self) -> int:
        """Bytes of the elements laid out contiguously."""
        return (self.numel * BITS[self.dtype] + 7) // 8

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass
class Source:
    """An open model: its tensors, its metadata, and positioned reads.

    `notes` are sentences a user should see ("optimizer state ignored: 412 entries").
    `root` says what the tensors were nested under in a pickle ("state_dict"), if anything.
    `configs` are a folder's small files that go along with the weights, by their path in it.
    `left_out` are tensors of the file that are about how it stores its weights, by what they are.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    root: str = ""
    handles: tuple[Readable, ...] = ()
    configs: Mapping[str, Path] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once."""
        return tuple(dict.fromkeys(h.path for h in self.handles))

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(h.size for h in self.handles)

    def read_at(self, file: int, offset: int, out: Any) -> None:
        """Fill the buffer `out` from `files[file]` at `offset`. Raises Failure at end of file."""
        self.handles[file].read_at(offset, out)

    def read(self, info: TensorInfo) -> bytearray:
        """The whole tensor as contiguous row-major bytes (scattered tensors are gathered)."""
        if info.parts:
            return bytearray().join(map(self.read, info.parts))
        if info.strides is None:
            out = bytearray(info.nbytes)
            self.read_at(info.file, info.offset, out)
            return out
        return _gather(self, info)

    def expect(self, infos: Iterable[TensorInfo]) -> None:
        """Say which tensors will be read, before they are: what is on the web comes faster then."""
        if not self.remote:
            return
        ranges: dict[int, list[tuple[int, int]]] = {}
        for info in infos:
            for part in info.parts or (info,):
                begin, end = part.extent
                ranges.setdefault(part.file, []).append((begin, end))
        for file, found in ranges.items():
            self.handles[file].expect(found)

    @property
    def remote(self) -> bool:
        """Whether any of its files is on the web."""
        return any(urls.is_url(path) for path in self.files)

    def stop(self) -> None:
        """Have reads that wait for something end with Cancelled."""
        for handle in self.handles if self.remote else ():
            handle.stop()

    def close(self) -> None:
        for handle in self.handles:
            handle.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _gather(source: Source, info: TensorInfo) -> bytearray:
    import numpy as np

    size = BITS[info.dtype] // 8
    assert info.strides is not None
    if info.numel == 0:
        return bytearray()
    last = sum((d - 1) * s for d, s in zip(info.shape, info.strides, strict=True))
    stored = np.empty(last + 1, dtype=f"V{size}")
    source.read_at(info.file, info.offset, stored.view(np.uint8))
    view = np.lib.stride_tricks.as_strided(
        stored, info.shape, [s * size for s in info.strides], writeable=False
    )
    return bytearray(np.ascontiguousarray(view).view(np.uint8).data)


def joined(
    parts: Iterable[tuple[str, Source]],
) -> tuple[dict[str, TensorInfo], dict[str, str], tuple[Readable, ...]]:
    """Tensors, metadata and handles of several sources as if they were one.

    Each part comes with a prefix for its names, which must not clash. Where parts differ in a value
    of the metadata, the first one's counts.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    handles: list[Readable] = []
    for prefix, part in parts:
        for key, info in part.tensors.items():
            tensors[prefix + key] = replace(info, name=prefix + key, file=info.file + len(handles))
        metadata = {**part.metadata, **metadata}
        handles += part.handles
    return tensors, metadata, tuple(handles)


class Readable(Protocol):
    """What a source reads from: an open file, or what an open file means once it is decoded.

    `size` counts in the size of the model; it is 0 for what is not itself on disk. `read_at` is
    thread-safe.
    """

    path: Path
    size: int

    def read_at(self, offset: int, out: Any) -> None: ...

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Byte ranges that will be read, for what can fetch several reads at once."""

    def stop(self) -> None:
        """Have reads that wait for something end with Cancelled."""

    def close(self) -> None: ...


class OpenFile:
    """An open file, wherever it is, with thread-safe positioned reads."""

    path: Path
    size: int

    def read_at(self, offset: int, out: Any) -> None:
        """Fill the buffer `out` from `offset`. Raises FormatError at the end of the file."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Byte ranges that will be read."""

    def stop(self) -> None:
        """Have reads that wait for something end with Cancelled."""

    def head(self, n: int, offset: int = 0) -> bytes:
        """Up to `n` bytes at `offset`."""
        out = bytearray(max(0, min(n, self.size - offset)))
        self.read_at(offset, out)
        return bytes(out)


class Handle(OpenFile):
    """A file on this machine.

    `os.preadv` where the system has it; elsewhere (Windows) seek and readinto under a lock.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)
        except IsADirectoryError:
            raise Refusal(f"{path.name} is a folder; name the model file in it") from None
        except OSError as e:
            raise Refusal(f"cannot read {path}: {e.strerror or e}") from None
        self.path = path
        self.stat = os.fstat(self._file.fileno())
        self.size = self.stat.st_size
        self._lock = threading.Lock()

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def read_at(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        positioned = hasattr(os, "preadv")
        while len(view):
            if positioned:
                n = os.preadv(self.fd, [view], offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    n = self._file.readinto(view)  # type: ignore[attr-defined]
            if n <= 0:
                raise FormatError(
                    f"{self.path.name} ends at byte {offset}, {len(view)} bytes too soon:"
                    " it is truncated or changed while it was read; fetch it again"
                )
            offset += n
            view = view[n:]

    def close(self) -> None:
        self._file.close()


def open_handle(path: Path) -> OpenFile:
    """The file `path`, which may be on the web. Raises Refusal when it cannot be had."""
    if urls.is_url(path):
        from plymix.formats.remote import RemoteFile

        return RemoteFile(path)
    return Handle(path)


def opened(path: Path, read: Callable[[OpenFile], Source]) -> Source:
    """What `read` makes of the file `path`, which stays open; it is closed again if that fails."""
    handle = open_handle(path)
    try:
        return read(handle)
    except BaseException:
        handle.close()
        raise


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written.

    `dtype` is what the engine delivers; `encoding` is what becomes of it in the file ("Q8_0"), for
    the formats that have such.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * BITS[self.dtype] + 7) // 8


Piece = tuple[int, bytes]
"""(absolute offset, bytes) of something in a file that is not tensor data."""

Content = Union[bytes, Path]
"""A small file that goes along: its bytes, or the file to copy."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a layout of several: its path, and the bytes of the layout that are its own."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where everything goes in a file that does not exist yet.

    `pieces` are known now. `finish`, if there is one, is called once all tensor bytes are written,
    with a function `read_at(offset, buffer)` over the written file, and gives the pieces that
    depend on them (checksums).

    Metadata values that become known late (hashes of the inputs) are written as place-holders of
    their final length, which the engine replaces in `pieces` before it writes them.

    `through`, if there is one, wraps the engine's target: encoded tensors have offsets beyond
    `size`, and what is written there is encoded and put where it belongs: `encoded` has the place
    and the bytes of each in the file, by its name.

    A model in several files has one layout too (see `together`): `parts` are its files, `others`
    the small ones that go along, by their path. Nothing is in the gaps between the parts. `index`
    is the file that makes a model of them where they do not lie in a folder of their own.
    """

    offsets: Mapping[str, int]
    size: int
    pieces: Sequence[Piece]
    finish: Callable[[Callable[[int, Any], None]], Iterable[Piece]] | None = None
    through: Callable[[Any], Any] | None = None
    encoded: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    others: Mapping[str, Content] = field(default_factory=dict)
    index: str = ""


GAP = 4096
"""Bytes at least between two parts of a layout, so that no range reaches from one to the next; each
begins at a multiple of it, so that what is aligned in the layout is aligned in the file."""


def together(
    files: Sequence[tuple[str, Layout]], others: Mapping[str, Content], index: str = ""
) -> Layout:
    """Several files, whose layouts have no late or encoded parts, as one layout."""
    offsets: dict[str, int] = {}
    pieces: list[Piece] = []
    parts: list[Part] = []
    at = 0
    for file, layout in files:
        assert layout.finish is layout.through is None
        parts.append(Part(file, at, layout.size))
        offsets.update((key, at + offset) for key, offset in layout.offsets.items())
        pieces += ((at + offset, data) for offset, data in layout.pieces)
        at += (layout.size // GAP + 2) * GAP
    size = sum(part.size for part in parts)
    return Layout(offsets, size, pieces, parts=parts, others=others, index=index)
