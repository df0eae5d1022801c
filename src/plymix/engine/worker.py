"""The arithmetic of one thread: read, compute, cast, in buffers that are used again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from plymix import kernels
from plymix.adapters import placing
from plymix.engine import ProgressCallback, goes_on, rounding
from plymix.engine.files import PAGE, Buffers, Outbox, steps
from plymix.engine.work import CHUNK, ChunkItem, SumItem, WholeItem, chunk_of
from plymix.expr import (
    Call,
    Const,
    Delta,
    Expr,
    Leaf,
    Narrow,
    Patch,
    Spelt,
    Sum,
    Tensor,
    calls,
    computed,
    leaf_terms,
    leaves,
    positional,
)
from plymix.formats.base import BITS
from plymix.methods.arrays import Pool, empty
from plymix.registry import get_method

if TYPE_CHECKING:
    from plymix.engine import Job

WRITTEN = 1 << 20
"""Bytes written at a time of what is computed in float32: fewer take the disk longer in all."""

HELD = 1 << 21
"""Elements of LoRAs' factors that a worker keeps for the chunks that follow; of those for a larger
tensor, as many as it has."""

ROOM = 2 << 20
"""Bytes of all buffers together that a sum is computed in; they stay in the processor's cache. Sums
of more than two have twice that: they are many calls, between which threads take turns, and the
fewer the better. Not those in float64, whose own rows take the rest."""


class Worker:
    """One thread's buffers and its way through what has to be computed."""

    def __init__(self, job: Job, buffers: Buffers) -> None:
        self.job = job
        self.buffers = buffers
        self.out = Outbox(job.target)
        self._row: _Row | None = None  # what of the output is being filled
        self._pool = Pool()
        self._sums: dict[Any, kernels.Sum] = {}
        self._changes: dict[Any, Callable[[int, int], Any]] = {}
        self._held = 0  # elements of the factors in `_changes`
        self._changing = ""  # the tensor that they change

    def run(self, item: SumItem | ChunkItem | WholeItem) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN of the result are counted and told
            self._run(item)
        self._flush()

    def close(self) -> None:
        """Wait until all that was computed is written."""
        self.out.close()

    def _run(self, item: SumItem | ChunkItem | WholeItem) -> None:
        match item:
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
                    case expr if tensor.noise is None and (terms := leaf_terms(expr)):
                        data = self._sum_gathered(tensor, terms)
                        self._put(tensor.offset, data, tensor.dtype)
                    case expr:
                        self._store(tensor, 0, self.evaluate(expr))
                self.job.add(tensor.nbytes)

    def _total(self, terms: tuple[tuple[float, str], ...], dtype: str) -> kernels.Sum:
        key = (terms, dtype)
        if key not in self._sums:
            self._sums.clear()  # spans with equal coefficients come one after the other
            self._sums[key] = kernels.Sum(*key)
        return self._sums[key]

    def _sum(self, item: SumItem) -> None:
        total = self._total(tuple((o.c, o.dtype) for o in item.operands), item.dtype)
        size = BITS[item.dtype] // 8
        room = 2 * ROOM if total.fused and len(item.operands) > 2 else ROOM
        fits = room // (size + sum(o.size for o in item.operands))
        chunk = fits - fits % kernels.BLOCK or fits
        at = item.at if self.job.target.waits and item.at % size == 0 else 0
        for start, nbytes in steps(at, item.nbytes, chunk * size):
            first, n = start // size, nbytes // size
            inputs = []
            for i, o in enumerate(item.operands):
                buffer = self.buffers(i + 1, n * o.size)
                source = self.job.sources[o.source]
                source.read_at(o.file, o.offset + first * o.size, buffer)
                inputs.append(buffer)
            out = self.out.room(nbytes, item.at + start)
            finite = total(n, inputs, out)
            if not finite:
                self._look(item.at + start, out, item.dtype)
            self.out.put(item.at + start, out)
            self.job.add(nbytes)

    def _sum_on_device(self, item: SumItem) -> None:
        """The same sum in float64 by torch; inputs and result cross the bus in their own dtype."""
        from plymix import gpu

        inputs = []
        for i, o in enumerate(item.operands):
            buffer = self.buffers(i + 1, item.numel * o.size)
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
        self._total(kinds, tensor.dtype)(tensor.numel, inputs, out)
        return out

    def _chunk(self, item: ChunkItem) -> None:
        tensor = item.tensor
        size = BITS[tensor.dtype] // 8
        _keep_memory()
        if tensor.name != self._changing:  # the others' are done with, and in the cache's way
            self._changing = tensor.name
            self._changes.clear()
            self._held = 0
        chunk = chunk_of(tensor)
        for start in range(item.start, item.start + item.numel, chunk):
            n = min(chunk, item.start + item.numel - start)
            self._store(tensor, start, self.evaluate(tensor.expr, (start, n)))
            self.job.add(n * size)

    def _put(self, at: int, data: Any, dtype: str) -> None:
        """Write what was computed in memory of its own."""
        self._look(at, data, dtype)
        self.job.target.write_at(at, data)

    def _look(self, at: int, data: Any, dtype: str) -> None:
        """Remember where the result holds infinities or NaN."""
        if kernels.nonfinite(data, dtype):
            self.job.spoilt.append((at, at + len(memoryview(data).cast("B"))))

    def _store(self, tensor: Tensor, start: int, value: Any) -> None:
        """Cast `value`, elements of `tensor` from `start` on, and write it with what follows."""
        flat = np.ascontiguousarray(_to_numpy(value), np.float32).reshape(-1)
        size = BITS[tensor.dtype] // 8
        done = 0
        while done < flat.size:
            offset = tensor.offset + (start + done) * size
            row = self._row
            if row is None or (row.end, row.dtype) != (offset, tensor.dtype):
                self._flush()
                room = max(WRITTEN, 2 * PAGE) - offset % PAGE  # so that it ends where a page does
                row = self._row = _Row(offset, self.out.room(room, offset), tensor.dtype)
            out = np.frombuffer(row.rest, kernels.NUMPY[tensor.dtype], len(row.rest) // size)
            values = flat[done : done + min(out.size, CHUNK)]
            if tensor.noise is not None:
                first = tensor.first + start + done
                values = rounding.by_chance(values, tensor.dtype, tensor.noise, first)
            kernels.best_backend().narrow(values, tensor.dtype, out[: values.size])
            done += values.size
            row.filled += values.size * size
            if len(row.rest) < size:
                self._flush()

    def _flush(self) -> None:
        """Have written what `_store` has cast."""
        row, self._row = self._row, None
        if row is not None:
            data = row.data[: row.filled]
            self._look(row.at, data, row.dtype)
            self.out.put(row.at, data)

    def evaluate(self, expr: Expr, part: tuple[int, int] | None = None) -> Any:
        """`expr` as a float32 array: whole, or elements [start, start + n) of it, flat.

        What several nodes use is computed once, and dropped after its last use. What is read is
        read for each: it would take as much memory to keep.
        """
        inner, uses = computed(expr)
        values: dict[int, Any] = {}

        def value(node: Expr) -> Any:
            if id(node) not in values:
                return self._given(node, part)
            uses[id(node)] -= 1
            return values[id(node)] if uses[id(node)] else values.pop(id(node))

        for node in inner:
            values[id(node)] = self._computed(node, value, part)
        return value(expr)

    def _given(self, expr: Expr, part: tuple[int, int] | None) -> Any:
        """The value of what is made of no other expression."""
        match expr:
            case Leaf():
                return self._load(expr, part)
            case Const():
                return kernels.float32(expr.data, expr.dtype).reshape(expr.shape)
            case Delta():
                return self._added(((1.0, expr),), part)
        raise AssertionError(f"{type(expr).__name__} is not computed yet")

    def _computed(
        self, expr: Expr, value: Callable[[Expr], Any], part: tuple[int, int] | None
    ) -> Any:
        """The value of `expr`, whose children's are asked for once each."""
        match expr:
            case Sum():
                return self._sum_of_arrays(expr, value, part)
            case Call():
                return self._call(expr, [value(arg) for arg in expr.args])
            case Patch():
                wide = _to_numpy(value(expr.wide)).copy()
                wide[:, : expr.channels] = _to_numpy(value(expr.inner))
                return wide
            case Narrow():
                return value(expr.wide)[:, : expr.channels]
            case Spelt():
                whole = _to_numpy(value(expr.whole))
                return np.concatenate([_spelt(whole, *piece) for piece in expr.pieces])
            case Delta(of=of) if of is not None:
                factors = {name: self._load(leaf, None) for name, leaf in expr.factors}
                return placing.change_of(expr, value(of), factors)
        raise AssertionError(f"{type(expr).__name__} is not computed from others")

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
                data = self.buffers(1, out.size * size)
                source.read_at(info.file, info.offset + (first + at) * size, data)
                _widen(data, info.dtype, out)
        if self.job.device != "cpu":
            from plymix import gpu

            return gpu.to_device(array, self.job.device)
        return array

    def _sum_of_arrays(
        self, expr: Sum, value: Callable[[Expr], Any], part: tuple[int, int] | None
    ) -> Any:
        added = [(c, x) for c, x in expr.terms if isinstance(x, Delta) and x.of is None]
        others = [(c, x) for c, x in expr.terms if not (isinstance(x, Delta) and x.of is None)]
        arrays = [value(term) for _, term in others]
        coefficients = [c for c, _ in others]
        for group in _held_together(added):
            arrays.append(self._added(group, part))
            coefficients.append(1.0)
        if coefficients == [1.0, 1.0] and added:
            if not others or not isinstance(others[0][1], Leaf):
                return arrays[0] + arrays[1]  # rounds once, too
            arrays[0] += arrays[1]  # what was read is nobody else's
            return arrays[0]
        return weighted(arrays, coefficients)

    def _added(self, terms: tuple[tuple[float, Delta], ...], part: tuple[int, int] | None) -> Any:
        """The sum of what LoRAs add to one tensor, in float32."""
        delta = terms[0][1]
        start, stop = delta.span or (0, math.prod(delta.shape))
        if part is not None:
            start, stop = start + part[0], start + sum(part)
        found = placing.elements(delta, self._rows(terms), start, stop, CHUNK)
        return found if part else found.reshape(delta.shape)

    def _rows(self, terms: tuple[tuple[float, Delta], ...]) -> Callable[[int, int], Any]:
        """The rows of a sum of changes; its factors stay in memory for the chunks that follow."""
        key = tuple((c, x.factors) for c, x in terms)
        if key not in self._changes:
            size = sum(map(_factors, terms))
            if self._held + size > _limit(terms[0]):
                self._changes.clear()
                self._held = 0
            factors = [{n: self._load(leaf, None) for n, leaf in x.factors} for _, x in terms]
            self._changes[key] = placing.together(terms, factors)
            self._held += size
        return self._changes[key]

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


@dataclass
class _Row:
    """Bytes of the output from `at` on, of which the first `filled` are there."""

    at: int
    data: memoryview
    dtype: str
    filled: int = 0

    @property
    def end(self) -> int:
        return self.at + self.filled

    @property
    def rest(self) -> memoryview:
        return self.data[self.filled :]


def _factors(term: tuple[float, Delta]) -> int:
    """How many elements the factors of a change have."""
    return sum(leaf.info.numel for _, leaf in term[1].factors)


def _limit(term: tuple[float, Delta]) -> int:
    return max(HELD, math.prod(term[1].shape))


def _held_together(
    terms: Sequence[tuple[float, Delta]],
) -> Iterator[tuple[tuple[float, Delta], ...]]:
    """Changes of one tensor in groups whose factors are in memory at a time, or of one."""
    group: list[tuple[float, Delta]] = []
    for term in terms:
        if group and sum(map(_factors, (*group, term))) > _limit(term):
            yield tuple(group)
            group = []
        group.append(term)
    if group:
        yield tuple(group)


def _widen(data: Any, dtype: str, out: Any) -> None:
    """Bytes of `dtype` into the float32 array `out`."""
    x, do = np.frombuffer(data, kernels.NUMPY[dtype]), kernels.best_backend()
    if dtype == "F32":
        np.copyto(out, x)
    elif dtype == "F64":
        do.single(x, out)
    else:
        do.widen(x, dtype, out)


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
        total(out.size, [np.ascontiguousarray(x).reshape(-1) for x in arrays], out.reshape(-1))
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

    def __init__(
        self, worker: Worker, found: dict[str, Call], progress: ProgressCallback | None
    ) -> None:
        self._worker = worker
        self._calls = found
        self._progress = progress
        self._asked: set[str] = set()
        self._began = self._told = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __contains__(self, key: object) -> bool:
        return key in self._calls

    def __getitem__(self, key: str) -> tuple[Any, ...]:
        self._tell()
        self._asked.add(key)
        self._worker.job.add(0)
        return tuple(self._worker.evaluate(arg) for arg in self._calls[key].args)

    def _tell(self) -> None:
        if time.monotonic() - self._told < 0.1:
            return
        self._told = time.monotonic()
        phase, done, total = "first pass over the tensors", len(self._asked), len(self._calls)
        if not goes_on(self._progress, phase, done, total, self._began):
            self._worker.job.halt()

    def shape(self, key: str) -> tuple[int, ...]:
        return next(leaves(self._calls[key])).info.shape


def prepare(job: Job, tensors: Sequence[Tensor], progress: ProgressCallback | None = None) -> None:
    """Before any work with methods in it: run the `prepare` of every step, inner steps first.

    Not of those that it ran for already: what is made in several goes is prepared for once.
    """
    _keep_memory()
    found: dict[str, dict[str, Call]] = {}
    for tensor in tensors:
        for call in calls(tensor.expr):
            if call.step not in job.state and get_method(call.method).prepare is not None:
                found.setdefault(call.step, {})[call.key] = call
    for step, by_key in sorted(found.items(), key=lambda s: _depth(next(iter(s[1].values())))):
        first = next(iter(by_key.values()))
        first_pass = get_method(first.method).prepare
        assert first_pass is not None
        job.state[step] = first_pass(
            PlanTensors(Worker(job, Buffers()), by_key, progress), **dict(first.params)
        )


def _depth(expr: Expr) -> int:
    return sum(1 for _ in calls(expr))


@cache
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
