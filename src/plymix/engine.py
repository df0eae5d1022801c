"""Plan -> file: read, compute, cast, write, in any number of threads, in bounded memory.

The plan is cut into work items. An item owns a range of the output, so threads never meet and
the bytes do not depend on who does what, or when:

* copies: neighbouring tensors that come from one file unchanged are one range, moved by the kernel
  (`copy_file_range`) where it can;
* sums: neighbouring tensors with the same coefficients are one span, computed in chunks that stay
  in the processor's cache;
* chunks of element-wise methods; whole tensors for methods that need them.

A tensor that lies in several pieces in an input is cut where they meet, so that each goes its way.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np

from plymix import kernels, temporary
from plymix.errors import Cancelled, Failure, PlymixError
from plymix.expr import (
    Call,
    Const,
    Expr,
    Leaf,
    Narrow,
    Patch,
    Spelt,
    Sum,
    Tensor,
    calls,
    chunkable,
    cut,
    leaf_terms,
    leaves,
    plain_terms,
    positional,
)
from plymix.formats.base import BITS, Handle, Layout, Piece, Source
from plymix.methods.arrays import Pool, empty
from plymix.plan import available_cpus
from plymix.registry import get_method

SPAN = 16 << 20
"""Bytes of output per work item at most."""

CHUNK = 1 << 17
"""Elements read, computed and written at a time where the arithmetic is in float32."""

WRITTEN = 1 << 18
"""Elements of a whole tensor cast and written at a time: what the file takes is still in cache."""

ROOM = 2 << 20
"""Bytes of all buffers together that a sum is computed in; they stay in the processor's cache."""


@dataclass(frozen=True)
class Progress:
    """How far a merge is. `phase` is a word for people: "merging", "hashing" ..."""

    phase: str
    done: int
    total: int
    seconds: float


ProgressCallback = Callable[[Progress], object]
"""Called a few times a second from the calling thread. Returning False stops the merge cleanly."""


# --- work items ---------------------------------------------------------------------------------


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
    ends = sorted({end for leaf in leaves(tensor.expr) for end in leaf.info.ends})
    if len(ends) < 2 or not chunkable(tensor.expr):
        yield tensor
        return
    for start, stop in zip([0, *ends], ends, strict=False):
        at = tensor.offset + start * BITS[tensor.dtype] // 8
        part = cut(tensor.expr, start, stop)
        yield replace(tensor, shape=(stop - start,), expr=part, offset=at)


def _item(tensor: Tensor) -> Item:
    expr = tensor.expr
    if isinstance(expr, Leaf) and expr.info.dtype == tensor.dtype and not expr.info.scattered:
        info = expr.info
        return CopyItem(expr.source, info.file, info.offset, tensor.offset, tensor.nbytes)
    terms = plain_terms(expr)
    if terms:
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
        step = SPAN // 4
        for start in range(0, item.numel, step):
            yield ChunkItem(item.tensor, start, min(step, item.numel - start))
    else:
        yield item


# --- where the bytes go -------------------------------------------------------------------------


class Target(Protocol):
    """Somewhere the output's bytes can be put at any offset."""

    def write_at(self, offset: int, data: Any) -> None: ...

    def read_at(self, offset: int, out: Any) -> None: ...

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        """Move bytes without touching them; returns how many were moved (0: not possible)."""
        ...


class MemoryTarget:
    """The finished file's bytes in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write_at(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.data[offset : offset + len(view)] = view

    def read_at(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        view[:] = self.data[offset : offset + len(view)]

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        handle.read_at(offset, memoryview(self.data)[at : at + nbytes])
        return nbytes


class FileTarget:
    """An open file written at positions: `pwrite` where the system has it, seek elsewhere."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._can_copy = hasattr(os, "copy_file_range")

    def write_at(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        positioned = hasattr(os, "pwrite")
        while len(view):
            if positioned:
                n = os.pwrite(self.fd, view, offset)
            else:
                with self._lock:
                    os.lseek(self.fd, offset, os.SEEK_SET)
                    n = os.write(self.fd, view)
            offset += n
            view = view[n:]

    def read_at(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        while len(view):
            with self._lock:
                os.lseek(self.fd, offset, os.SEEK_SET)
                data = os.read(self.fd, len(view))
            if not data:
                raise Failure("the file being written became shorter meanwhile")
            view[: len(data)] = data
            offset += len(data)
            view = view[len(data) :]

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        if not self._can_copy or not isinstance(handle, Handle):
            return 0
        try:
            return os.copy_file_range(handle.fd, self.fd, nbytes, offset, at)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                raise
            self._can_copy = False  # another file system, an old kernel: read and write instead
            return 0


# --- doing it -----------------------------------------------------------------------------------


@dataclass
class Job:
    """What the workers share: inputs, target, `prepare` states, progress, the wish to stop."""

    sources: Sequence[Source]
    target: Target
    state: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    spoilt: list[tuple[int, int]] = field(default_factory=list)  # ranges with infinities or NaN
    done: int = 0
    stop: bool = False
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
        if self.stop:
            raise Cancelled("stopped; nothing was written")


class Worker:
    """One thread's reusable buffers and its way through the items."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._buffers: list[bytearray] = []
        self._pool = Pool()
        self._sums: dict[Any, kernels.Sum] = {}

    def buffer(self, i: int, nbytes: int) -> memoryview:
        """Scratch number `i`. Reused: fresh memory costs more than the arithmetic."""
        while len(self._buffers) <= i:
            self._buffers.append(bytearray())
        if len(self._buffers[i]) < nbytes:
            self._buffers[i] = bytearray(nbytes)
        return memoryview(self._buffers[i])[:nbytes]

    def run(self, item: Item) -> None:
        match item:
            case CopyItem():
                self._copy(item)
            case SumItem() if self.job.device == "cpu":
                self._sum(item)
            case SumItem():
                self._sum_on_device(item)
            case ChunkItem():
                self._chunk(item)
            case WholeItem():
                tensor = item.tensor
                match tensor.expr:
                    case Const(known):
                        self.job.target.write_at(tensor.offset, known)
                    case Leaf(source, info) if info.dtype == tensor.dtype:  # gathered
                        data = self.job.sources[source].read(info)
                        self.job.target.write_at(tensor.offset, data)
                    case expr if terms := leaf_terms(expr):
                        data = self._sum_gathered(tensor, terms)
                        self._put(tensor.offset, data, tensor.dtype)
                    case expr:
                        self._store(tensor, 0, self.evaluate(expr))
                self.job.add(tensor.nbytes)

    def _copy(self, item: CopyItem) -> None:
        handle = self.job.sources[item.source].handles[item.file]
        moved = 0
        while moved < item.nbytes:
            left = item.nbytes - moved
            n = self.job.target.copy_from(handle, item.offset + moved, item.at + moved, left)
            if not n:
                n = min(left, 1 << 20)
                buffer = self.buffer(0, n)
                handle.read_at(item.offset + moved, buffer)
                self.job.target.write_at(item.at + moved, buffer)
            moved += n
            self.job.add(n)

    def _total(self, terms: tuple[tuple[float, str], ...], dtype: str) -> kernels.Sum:
        key = (terms, dtype)
        if key not in self._sums:
            self._sums.clear()  # spans with equal coefficients come one after the other
            self._sums[key] = kernels.Sum(*key)
        return self._sums[key]

    def _sum(self, item: SumItem) -> None:
        total = self._total(tuple((o.c, o.dtype) for o in item.operands), item.dtype)
        size = BITS[item.dtype] // 8
        fits = ROOM // (size + sum(o.size for o in item.operands))
        chunk = max(kernels.BLOCK, fits - fits % kernels.BLOCK)
        for start in range(0, item.numel, chunk):
            n = min(chunk, item.numel - start)
            inputs = []
            for i, o in enumerate(item.operands):
                buffer = self.buffer(i + 1, n * o.size)
                source = self.job.sources[o.source]
                source.read_at(o.file, o.offset + start * o.size, buffer)
                inputs.append(buffer)
            out = self.buffer(0, n * size)
            _add(total, n, inputs, out)
            self._put(item.at + start * size, out, item.dtype)
            self.job.add(n * size)

    def _sum_on_device(self, item: SumItem) -> None:
        """The same sum in float64 by torch; inputs and result cross the bus in their own dtype."""
        from plymix import gpu

        inputs = []
        for i, o in enumerate(item.operands):
            buffer = self.buffer(i + 1, item.numel * o.size)
            self.job.sources[o.source].read_at(o.file, o.offset, buffer)
            inputs.append((o.c, o.dtype, buffer))
        out = gpu.linear_sum(inputs, item.dtype, self.job.device)
        self._put(item.at, out, item.dtype)
        self.job.add(item.nbytes)

    def _sum_gathered(self, tensor: Tensor, terms: Sequence[tuple[float, Leaf]]) -> Any:
        """The sum of tensors that do not lie in order; the bytes are those of a sum in order."""
        inputs = [memoryview(self.job.sources[x.source].read(x.info)) for _, x in terms]
        kinds = tuple((c, x.info.dtype) for c, x in terms)
        if self.job.device != "cpu":
            from plymix import gpu

            given = [(*kind, data) for kind, data in zip(kinds, inputs, strict=True)]
            return gpu.linear_sum(given, tensor.dtype, self.job.device)
        out = memoryview(bytearray(tensor.nbytes))
        _add(self._total(kinds, tensor.dtype), tensor.numel, inputs, out)
        return out

    def _chunk(self, item: ChunkItem) -> None:
        tensor = item.tensor
        size = BITS[tensor.dtype] // 8
        for start in range(item.start, item.start + item.numel, CHUNK):
            n = min(CHUNK, item.start + item.numel - start)
            self._store(tensor, start, self.evaluate(tensor.expr, (start, n)))
            self.job.add(n * size)

    def _put(self, at: int, data: Any, dtype: str) -> None:
        """Write what was computed, and remember where it holds infinities or NaN."""
        self.job.target.write_at(at, data)
        if kernels.nonfinite(data, dtype):
            self.job.spoilt.append((at, at + len(memoryview(data).cast("B"))))

    def _store(self, tensor: Tensor, start: int, value: Any) -> None:
        """Write `value`, elements of `tensor` from `start` on: cast and written piece by piece."""
        flat = np.ascontiguousarray(_to_numpy(value), np.float32).reshape(-1)
        size = BITS[tensor.dtype] // 8
        for at in range(0, flat.size, WRITTEN):
            piece = flat[at : at + WRITTEN]
            data = self.buffer(0, piece.size * size)
            out = np.frombuffer(data, kernels.NUMPY[tensor.dtype])
            for i in range(0, piece.size, CHUNK):
                kernels.best_backend().narrow(
                    piece[i : i + CHUNK], tensor.dtype, out[i : i + CHUNK]
                )
            self._put(tensor.offset + (start + at) * size, data, tensor.dtype)

    def evaluate(self, expr: Expr, part: tuple[int, int] | None = None) -> Any:
        """`expr` as a float32 array: whole, or elements [start, start + n) of it, flat."""
        match expr:
            case Leaf():
                return self._load(expr, part)
            case Sum():
                return self._sum_of_arrays(expr, part)
            case Call():
                return self._call(expr, [self.evaluate(arg, part) for arg in expr.args])
            case Patch():
                wide = _to_numpy(self.evaluate(expr.wide)).copy()
                wide[:, : expr.channels] = _to_numpy(self.evaluate(expr.inner))
                return wide
            case Narrow():
                return self.evaluate(expr.wide)[:, : expr.channels]
            case Spelt():
                whole = _to_numpy(self.evaluate(expr.whole))
                return np.concatenate([_spelt(whole, *piece) for piece in expr.pieces])
            case Const():
                return kernels.float32(expr.data, expr.dtype).reshape(expr.shape)

    def _load(self, leaf: Leaf, part: tuple[int, int] | None) -> Any:
        info, source = leaf.info, self.job.sources[leaf.source]
        if part is None and (info.parts or info.scattered):
            array = kernels.float32(source.read(info), info.dtype).reshape(info.shape)
        else:
            first, n = part or (0, info.numel)
            size = BITS[info.dtype] // 8
            array = self._pool.empty((n,) if part else info.shape, np.float32)
            flat = array.reshape(-1)
            for at in range(0, n, CHUNK):
                out = flat[at : at + CHUNK]
                data = self.buffer(1, out.size * size)
                source.read_at(info.file, info.offset + (first + at) * size, data)
                _widen(data, info.dtype, out)
        if self.job.device != "cpu":
            from plymix import gpu

            return gpu.to_device(array, self.job.device)
        return array

    def _sum_of_arrays(self, expr: Sum, part: tuple[int, int] | None) -> Any:
        arrays = [self.evaluate(term, part) for _, term in expr.terms]
        return weighted(arrays, [c for c, _ in expr.terms])

    def _call(self, call: Call, args: list[Any]) -> Any:
        method = get_method(call.method)
        params = dict(call.params)
        if "key" in method.given:
            params["key"] = call.key
        if "rng" in method.given:
            params["rng"] = lambda i: generator(call.seed, call.key, call.models[i])
        if "state" in method.given:
            params["state"] = self.job.state[call.step]
        with self._pool.serving():
            return method.function(*positional(method, args, call.models), **params)


def _widen(data: Any, dtype: str, out: Any) -> None:
    """Bytes of `dtype` into the float32 array `out`."""
    x, do = np.frombuffer(data, kernels.NUMPY[dtype]), kernels.best_backend()
    if dtype == "F32":
        np.copyto(out, x)
    elif dtype == "F64":
        do.single(x, out)
    else:
        do.widen(x, dtype, out)


def _add(total: kernels.Sum, n: int, inputs: Sequence[memoryview], out: memoryview) -> None:
    """`total` of n elements, in blocks."""
    sizes = [BITS[dtype] // 8 for _, dtype in total.terms]
    size = BITS[total.out] // 8
    for a in range(0, n, kernels.BLOCK):
        b = min(a + kernels.BLOCK, n)
        parts = [x[a * s : b * s] for x, s in zip(inputs, sizes, strict=True)]
        total(b - a, parts, out[a * size : b * size])


def _spelt(
    array: Any, rows: tuple[int, int] | None, swapped: bool, shape: tuple[int, ...] | None
) -> Any:
    array = array[slice(*rows)] if rows else array
    array = array.T if swapped else array
    return array if shape is None else array.reshape(shape)


def weighted(arrays: Sequence[Any], coefficients: Sequence[float]) -> Any:
    """sum(c * x) of float32 arrays, accumulated block by block in float64, rounded once."""
    if isinstance(arrays[0], np.ndarray):
        out = empty(arrays[0].shape, np.float32)
        total = kernels.Sum([(c, "F32") for c in coefficients], "F32")
        flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
        for at in range(0, out.size, kernels.BLOCK):
            n = min(kernels.BLOCK, out.size - at)
            total(n, [x[at : at + n] for x in flat], out.reshape(-1)[at : at + n])
        return out
    result = sum(c * x.double() for c, x in zip(coefficients, arrays, strict=True))
    return result.float()


def generator(seed: int, key: str, model: int) -> np.random.Generator:
    """The random stream of one model's tensor: Philox, from (seed, key, model) alone."""
    import hashlib

    digest = hashlib.sha256(f"{seed}\0{key}\0{model}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _to_numpy(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()


class PlanTensors:
    """What a method's `prepare` sees: all its calls in the plan, their inputs read when asked."""

    def __init__(self, worker: Worker, found: dict[str, Call]) -> None:
        self._worker = worker
        self._calls = found

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __contains__(self, key: object) -> bool:
        return key in self._calls

    def __getitem__(self, key: str) -> tuple[Any, ...]:
        self._worker.job.add(0)
        return tuple(self._worker.evaluate(arg) for arg in self._calls[key].args)

    def shape(self, key: str) -> tuple[int, ...]:
        return next(leaves(self._calls[key])).info.shape


def prepare(job: Job, tensors: Sequence[Tensor]) -> None:
    """Run the `prepare` of every step that has one, inner steps first."""
    found: dict[str, dict[str, Call]] = {}
    for tensor in tensors:
        for call in calls(tensor.expr):
            if get_method(call.method).prepare is not None:
                found.setdefault(call.step, {})[call.key] = call
    for step, by_key in sorted(found.items(), key=lambda s: _depth(next(iter(s[1].values())))):
        first = next(iter(by_key.values()))
        first_pass = get_method(first.method).prepare
        assert first_pass is not None
        job.state[step] = first_pass(PlanTensors(Worker(job), by_key), **dict(first.params))


def _depth(expr: Expr) -> int:
    return sum(1 for _ in calls(expr))


def perform(
    job: Job,
    tensors: Sequence[Tensor],
    *,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> None:
    """Write every one of `tensors` to the job's target. Raises Cancelled or Failure."""
    work = items(tensors)
    if any(isinstance(item, ChunkItem) for item in work):
        _keep_memory()
    total = sum(item.nbytes for item in work)
    began = time.monotonic()
    prepare(job, tensors)
    position = iter(work)

    def loop() -> None:
        worker = Worker(job)
        try:
            while not job.stop:
                with job.lock:
                    item = next(position, None)
                if item is None:
                    return
                worker.run(item)
        except BaseException as e:
            with job.lock:
                job.error = job.error or e
                job.stop = True

    count = min(threads or available_cpus(), max(1, len(work)))
    pool = [threading.Thread(target=loop, daemon=True) for _ in range(count)]
    for thread in pool:
        thread.start()
    try:
        working = pool
        while working:
            working = [thread for thread in pool if thread.is_alive()]
            now = Progress("merging", job.done, total, time.monotonic() - began)
            if progress is not None and not job.stop and progress(now) is False:
                job.stop = True
            for thread in working[:1]:
                thread.join(0.1)
    except BaseException as e:  # Ctrl-C, or the callback's own error
        job.error = job.error or e
    finally:
        if job.error is not None:
            job.stop = True
        for thread in pool:
            thread.join()
    if job.error is not None:
        raise job.error
    if job.stop:
        raise Cancelled("stopped; nothing was written")


def _keep_memory() -> None:
    """Have glibc keep what is freed: a method's temporaries come and go with every chunk, and fresh
    pages cost more than its arithmetic. Other C libraries are left alone."""
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 64 << 20)


# --- the finished file --------------------------------------------------------------------------


class AtomicFile:
    """A file that gets its name when it is finished: temporary name, fsync, rename.

    Use it as a context manager; `commit()` makes it real. Without it nothing is left behind. What
    killed runs left behind in the folder is removed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.replaces = path.exists()

    def __enter__(self) -> FileTarget:
        temporary.sweep(self.path.parent)
        try:
            self.fd, self.temporary = temporary.create(self.path)
        except OSError as e:
            raise Failure(f"cannot write in {self.path.parent}: {e.strerror}") from None
        try:
            self._reserve()
        except BaseException:
            self._discard()
            raise
        return FileTarget(self.fd)

    def _reserve(self) -> None:
        """Have the disk promise the whole size now, not fail at 90 %."""
        try:
            if hasattr(os, "posix_fallocate") and self.size:
                os.posix_fallocate(self.fd, 0, self.size)
            else:
                os.truncate(self.fd, self.size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self.full(e) from None
            os.truncate(self.fd, self.size)  # a file system that cannot promise

    def full(self, e: OSError) -> Failure:
        import shutil

        free = shutil.disk_usage(self.path.parent).free
        return Failure(
            f"no room for {self.path.name}: it needs {self.size:,} bytes and"
            f" {self.path.parent} has about {free:,} free ({e.strerror}); nothing was written"
        )

    def commit(self) -> None:
        os.fsync(self.fd)
        if os.name == "nt":  # an open file cannot be renamed there
            os.close(self.fd)
            self.fd = -1
        self._name()
        if self.fd >= 0:  # closed last: its lock says that it has an owner
            os.close(self.fd)
            self.fd = -1
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            except OSError:
                pass  # some network file systems refuse; the rename is done all the same
            finally:
                os.close(folder)

    def _name(self) -> None:
        """Give the file its name; one that appeared since the start is not overwritten."""
        if not self.replaces:
            try:
                os.link(self.temporary, self.path)
            except FileExistsError:
                self.temporary.unlink()
                raise Failure(
                    f"{self.path} appeared while this was computed and was left as it is;"
                    " say --force to replace it"
                ) from None
            except OSError:
                pass  # a file system without hard links
            else:
                self.temporary.unlink()
                return
        os.replace(self.temporary, self.path)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.fd >= 0:
            self._discard()
        if isinstance(error, OSError) and not isinstance(error, PlymixError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.full(error) from None
            raise Failure(f"writing {self.path.name} failed: {error.strerror}") from None

    def _discard(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self.temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Written:
    """A finished file."""

    path: Path
    nbytes: int
    seconds: float
    nonfinite: Mapping[str, int] = field(default_factory=dict)  # tensor -> infinities and NaN


def write(
    tensors: Sequence[Tensor],
    sources: Sequence[Source],
    layout: Layout,
    path: Path,
    *,
    threads: int = 0,
    device: str = "cpu",
    late: Mapping[str, Callable[[Callable[[], bool]], str]] | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write a whole file: tensors, then the pieces around them, then its name.

    `late` gives, for each place-holder in the layout's pieces, a function that computes its value
    (of the same length); they run beside the merge. Raises Failure or Cancelled; then nothing is
    left behind and a file that had the name before is as it was.
    """
    began = time.monotonic()
    file = AtomicFile(path, layout.size)
    with file as target:
        within = target if layout.through is None else layout.through(target)
        job = Job(sources, within, device=device)
        values = _Late(late or {}, lambda: job.stop)
        try:
            with _flushing(target.fd):
                perform(job, tensors, threads=threads, progress=progress)
            found = values.wait(progress, began)
        except BaseException:
            job.stop = True
            values.join()
            raise
        for at, piece in patched(layout.pieces, found):
            target.write_at(at, piece)
        if layout.finish is not None:
            for at, piece in layout.finish(target.read_at):
                target.write_at(at, piece)
        for source in sources:
            if _same_file(source, path):
                source.close()  # an open file cannot be replaced on Windows
        nonfinite = _nonfinite(job, tensors)
        file.commit()
    return Written(path, layout.size, time.monotonic() - began, nonfinite)


def _nonfinite(job: Job, tensors: Sequence[Tensor]) -> dict[str, int]:
    """How many infinities and NaN each computed tensor holds, where there are any."""
    found: dict[str, int] = {}
    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if any(a < end and tensor.offset < b for a, b in job.spoilt):
            count = 0
            for at in range(tensor.offset, end, SPAN):
                data = bytearray(min(SPAN, end - at))
                job.target.read_at(at, data)
                count += kernels.nonfinite(data, tensor.dtype)
            if count:
                found[tensor.name] = count
    return found


@contextmanager
def _flushing(fd: int) -> Iterator[None]:
    """Have the disk write along: the fsync at the end then finds little left to do."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.05):
            try:
                os.fdatasync(fd)
            except OSError:
                return  # the fsync at the end meets the same error and tells it

    thread = threading.Thread(target=loop, daemon=True)
    if hasattr(os, "fdatasync"):
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def patched(pieces: Sequence[Piece], values: Mapping[str, str]) -> Iterator[Piece]:
    """`pieces` with every place-holder replaced by its value, which has the same length."""
    for at, piece in pieces:
        for placeholder, value in values.items():
            piece = piece.replace(placeholder.encode(), value.encode())
        yield at, piece


def _same_file(source: Source, path: Path) -> bool:
    return path.exists() and any(os.path.samefile(h.path, path) for h in source.handles)


class _Late:
    """Values computed by two threads of their own while the merge runs."""

    def __init__(
        self,
        late: Mapping[str, Callable[[Callable[[], bool]], str]],
        stopped: Callable[[], bool],
    ) -> None:
        self.found: dict[str, str] = {}
        self.error: BaseException | None = None
        self._stopped = stopped
        self._total = len(late)
        work = iter(late.items())
        lock = threading.Lock()

        def loop() -> None:
            try:
                while True:
                    with lock:
                        entry = next(work, None)
                    if entry is None:
                        return
                    self.found[entry[0]] = entry[1](self._stopped)
            except BaseException as e:
                self.error = e

        self._threads = [
            threading.Thread(target=loop, daemon=True) for _ in range(min(2, len(late)))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, progress: ProgressCallback | None, began: float) -> dict[str, str]:
        while alive := [t for t in self._threads if t.is_alive()]:
            alive[0].join(0.1)
            seconds = time.monotonic() - began
            now = Progress("hashing the inputs", len(self.found), self._total, seconds)
            if progress is not None and progress(now) is False:
                raise Cancelled("stopped; nothing was written")
        if self.error is not None:
            raise self.error
        return self.found

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
