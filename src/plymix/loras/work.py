"""Parts -> a file: threads compute, a temporary holds what they found, ranks are settled, written.

A part is computed whole by one thread, seeded by its key, so the bytes do not depend on how many
there are. In memory is one part for each thread, and the singular values.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from plymix import kernels, stops
from plymix.adapters import lowrank
from plymix.adapters.spelling import Dialect
from plymix.engine import ProgressCallback, goes_on
from plymix.engine.files import FULL, AtomicFile, FileTarget, finished
from plymix.engine.worker import generator
from plymix.errors import Cancelled, Failure, Refusal
from plymix.formats import safetensors
from plymix.formats.base import BITS, Entry, Layout
from plymix.loras.parts import Change, Kept, Part
from plymix.plan import available_cpus

SLACK = 4
"""Of a LoRA of a given size a module may have so many times the rank that all would share."""

NOISE = 1e-6
"""Singular values below so much of the largest are what rounding left."""


@dataclass(frozen=True)
class Policy:
    """What a result may keep: `rank`, a share of each part's `energy`, or a `size` in bytes.

    Nothing said: all of it. `conv_rank` is for convolution kernels (0: as `rank`). With `factor`
    (-1: found) parts are Kronecker products.
    """

    rank: int = 0
    conv_rank: int = 0
    energy: float = 0.0
    size: int = 0
    factor: int = 0

    @property
    def exact(self) -> bool:
        return not (self.rank or self.energy or self.size or self.factor)

    def rank_of(self, part: Part) -> int:
        kernel = math.prod(part.shape[2:]) > 1
        return self.conv_rank if kernel and self.conv_rank else self.rank


class Spool:
    """Arrays of float32 in a temporary file of `folder`, appended by any thread.

    Raises Failure where it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._lock = threading.Lock()
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as e:
            raise self._failed(e, 0) from None

    def put(self, x: Any) -> tuple[int, tuple[int, ...]]:
        data = np.ascontiguousarray(x, np.float32)
        left = data.reshape(-1).view(np.uint8).data
        with self._lock:
            at, self._end = self._end, self._end + data.nbytes
            try:
                self._file.seek(at)
                while left:
                    left = left[self._file.write(left) :]
            except OSError as e:
                raise self._failed(e, self._end) from None
        return at, data.shape

    def get(self, slot: Slot, rows: int | None = None) -> Any:
        at, shape = slot
        shape = shape if rows is None else (rows, *shape[1:])
        out = np.empty(shape, np.float32)
        left = out.reshape(-1).view(np.uint8).data
        with self._lock:
            self._file.seek(at)
            while n := self._file.readinto(left):
                left = left[n:]
        return out

    def _failed(self, e: OSError, size: int) -> Failure:
        """What to tell of a disk that does not take the first `size` bytes."""
        what = f"the temporary file in {self._folder}"
        if e.errno not in FULL:
            return Failure(f"cannot write {what}: {e.strerror}; nothing was written")
        if e.errno == errno.EFBIG:
            room = f"more than a file may have there ({e.strerror}; `ulimit -f` may set it)"
        else:
            room = f"{shutil.disk_usage(self._folder).free:,} are free ({e.strerror})"
        return Failure(
            f"no room for what is computed: {what} needs {size:,} bytes or more, {room}; choose"
            " another disk (-o; TMPDIR where no file is asked for) or a lower rank; nothing was"
            " written"
        )

    def close(self) -> None:
        self._file.close()


Slot = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """What became of a part. `slots` are arrays in the spool by factor: of "up" transposed, so that
    a lower rank is fewer rows. `s` are the singular values, `energy` their squares' sum with those
    that are not kept. `error` is of |D - result|, squared."""

    part: Part
    kind: str  # "lora", "diff", "lokr", "kept" or "nothing"
    slots: Mapping[str, Slot] = field(default_factory=dict)
    s: Any = ()
    energy: float = 0.0
    error: float = 0.0
    rank: int = 0
    alpha: float = 0.0


# --- computing -----------------------------------------------------------------------------------


def computed(
    parts: Sequence[Part],
    policy: Policy,
    spool: Spool,
    *,
    seed: int,
    threads: int,
    what: str,
    progress: ProgressCallback | None,
) -> list[Found]:
    """Every part's change, factored as `policy` has it, in the order of `parts`.

    Raises Cancelled.
    """
    cap = _cap(parts, policy)
    found: list[Found | None] = [None] * len(parts)
    total, began = sum(part.nbytes for part in parts), time.monotonic()
    # The longest first: none of them is left over for one thread at the end.
    order = iter(sorted(range(len(parts)), key=lambda i: -math.prod(parts[i].shape)))
    lock, stop, errors, done = threading.Lock(), threading.Event(), [], [0]

    def loop() -> None:
        while not stop.is_set():
            with lock:
                i = next(order, None)
            if i is None:
                return
            try:
                found[i] = _found(parts[i], policy, cap, spool, seed)
            except BaseException as e:
                errors.append(e)
                stop.set()
            with lock:
                done[0] += parts[i].nbytes

    count = min(threads or available_cpus(), max(1, len(parts)))
    with stops.running([loop] * count, stop.set) as ended:
        while not ended.is_set():
            if not goes_on(progress, what, done[0], total, began):
                errors.append(Cancelled("stopped; nothing was written"))
                stop.set()
            ended.wait(0.1)
    if errors:
        raise errors[0]
    return [f for f in found if f is not None]


def _cap(parts: Sequence[Part], policy: Policy) -> int:
    """With a size: the largest rank that a part may get."""
    if not policy.size:
        return 0
    of_one = sum(_cost(part) for part in parts if _matrix(part))
    return max(1, SLACK * policy.size // max(1, of_one))


def _matrix(part: Part) -> bool:
    return len(part.shape) > 1 and part.param in ("weight", "") and not part.kept


def _cost(part: Part) -> int:
    """Bytes of one rank."""
    return (part.shape[0] + math.prod(part.shape[1:])) * BITS[part.dtype] // 8


def _found(part: Part, policy: Policy, cap: int, spool: Spool, seed: int) -> Found:
    if part.kept:
        return Found(part, "kept")
    with np.errstate(all="ignore"):
        change = part.change()
        return _factored(part, change, policy, cap, spool, seed)


def _factored(
    part: Part, change: Change, policy: Policy, cap: int, spool: Spool, seed: int
) -> Found:
    whole = change.whole
    if whole is None and not change.products:
        return Found(part, "nothing")
    if not _matrix(part) or (policy.exact and whole is not None):
        d = _sum(change)
        if not d.any():
            return Found(part, "nothing")
        return Found(
            part, "diff", {"diff": spool.put(d.reshape(part.shape))}, energy=lowrank.energy(d)
        )
    if policy.exact:
        if lowrank.vanishes(*lowrank.beside(change.products)):
            return Found(part, "nothing")
        up, down = change.products[0] if change.alpha else lowrank.joined(change.products)
        alpha = change.alpha or float(up.shape[1])
        slots = {"up": spool.put(up.T), "down": spool.put(down)}
        return Found(part, "lora", slots, energy=1.0, rank=up.shape[1], alpha=alpha)
    rng = generator(seed, part.key, 0)
    if policy.factor:
        return _kronecker(part, _sum(change), policy, spool, rng)
    most = min(part.shape[0], math.prod(part.shape[1:]))
    rank = min(cap or policy.rank_of(part) or most, most)
    floor = 0.0
    if whole is None:
        up, down = lowrank.beside(change.products)
        up = up.astype(np.float64) * (change.alpha / up.shape[1] if change.alpha else 1.0)
        floor = lowrank.CANCELLED * math.sqrt(lowrank.energy(up) * lowrank.energy(down))
        f = lowrank.of_product(up, down)
    elif policy.energy:
        f = lowrank.with_energy(_sum(change), policy.energy, most, rng)
    else:
        f = lowrank.leading(_sum(change), rank, rng)
    wanted = lowrank.rank_for(f, policy.energy) if policy.energy else rank
    real = int((f.s > max(floor, NOISE * float(f.s[0]))).sum()) if len(f.s) and f.s[0] > 0 else 0
    k = min(wanted, real)
    if not k:
        return Found(part, "nothing")
    up, down = f.balanced(k)
    slots = {"up": spool.put(up.T), "down": spool.put(down)}
    return Found(part, "lora", slots, f.s[:k], f.energy, rank=k, alpha=float(k))


def _sum(change: Change) -> Any:
    d = change.whole
    for up, down in change.products:
        product = up @ down
        if change.alpha:
            product *= np.float32(change.alpha / up.shape[1])
        d = product if d is None else d + product
    return d


def _kronecker(part: Part, d: Any, policy: Policy, spool: Spool, rng: Any) -> Found:
    """LoKr: the nearest Kronecker product; its larger factor is a product where a rank is said."""
    kernel = math.prod(part.shape[2:])
    p, q = (lowrank.divided(n, policy.factor) for n in part.shape[:2])
    w1, w2, energy = lowrank.nearest_kronecker(d, (p, q), rng)
    if energy == 0:
        return Found(part, "nothing")
    kept = lowrank.energy(w1) * lowrank.energy(w2)
    shape = (part.shape[0] // p, part.shape[1] // q, *part.shape[2:])
    rank = policy.rank_of(part)
    error = max(0.0, energy - kept)
    if rank and rank < min(w2.shape):
        f = lowrank.leading(w2, rank, rng)
        a, b = f.balanced(rank)
        error += lowrank.energy(w1) * f.error(rank) ** 2
        slots = {"w1": spool.put(w1), "w2_a": spool.put(a), "w2_b": spool.put(b)}
        return Found(part, "lokr", slots, energy=energy, error=error, rank=rank, alpha=float(rank))
    w2 = w2.reshape(shape) if kernel > 1 or len(shape) > 2 else w2
    slots = {"w1": spool.put(w1), "w2": spool.put(w2)}
    # Whole factors have no scale; LyCORIS wants the number all the same.
    return Found(part, "lokr", slots, energy=energy, error=error, alpha=1.0)


def ranked(found: Sequence[Found], policy: Policy, nbytes: int) -> list[Found]:
    """The ranks that are kept, and what is lost by them.

    With a size these are the ones that fit into it; `nbytes` is the size of the file with all.
    """
    if policy.size:
        loras = [f for f in found if f.kind == "lora"]
        costs = [_cost(f.part) for f in loras]
        fixed = nbytes - sum(f.rank * c for f, c in zip(loras, costs, strict=True))
        ranks = lowrank.ranks_for([f.s for f in loras], costs, policy.size - fixed)
        if not any(ranks) or policy.size < fixed:
            raise Refusal(
                f"{policy.size:,} bytes are too few: with a rank of 1 in every module the file has"
                f" {fixed + sum(costs):,}"
            )
        given = iter(ranks)
        found = [replace(f, rank=next(given)) if f.kind == "lora" else f for f in found]
    return [_with_error(f) for f in found]


def _with_error(f: Found) -> Found:
    if f.kind != "lora" or not len(f.s):
        return f
    if not f.rank:
        return replace(f, kind="nothing", error=f.energy)
    kept = math.fsum(float(x) ** 2 for x in f.s[: f.rank])
    return replace(f, error=max(0.0, f.energy - kept), alpha=float(f.rank))


# --- writing -------------------------------------------------------------------------------------

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Piece:
    """A tensor of the result: an array by name, made when it is written."""

    entry: Entry
    array: Callable[[], Any]


def pieces(found: Sequence[Found], spool: Spool, how: Dialect, dtype: str) -> list[Piece]:
    """The tensors of the file, by name. Raises Refusal for what the dialect cannot say."""
    out = [piece for f in found for piece in _pieces(f, spool, how, dtype)]
    out.sort(key=lambda piece: piece.entry.name)
    return out


def _pieces(f: Found, spool: Spool, how: Dialect, dtype: str) -> Iterator[Piece]:
    part = f.part
    ends, only_lora = how.ends, how.only_lora
    kind = DTYPES.get(dtype, part.dtype)

    def piece(end: str, shape: tuple[int, ...], array: Callable[[], Any], type: str) -> Piece:
        return Piece(Entry(part.name + end, type, shape), array)

    def number(end: str, value: float) -> Piece:
        if end == ".on_input":
            return piece(end, (), lambda: np.array(int(value), np.uint8), "U8")
        return piece(end, (), lambda: np.array(value), "F32")

    if f.kind == "kept":
        for kept in part.kept:
            own = DTYPES.get(dtype, kept.info.dtype)
            yield piece(kept.end, kept.shape, _copying(kept), own)
        for end, value in part.numbers.items():
            yield number(end, value)
    elif f.kind == "lora":
        rank, ones = f.rank, (1,) * len(part.shape[2:])
        scale = f.alpha / rank if only_lora else 1.0
        up, down = f.slots["up"], f.slots["down"]
        yield piece(
            ends["up"],
            (part.shape[0], rank, *ones),
            lambda: spool.get(up, rank).T * np.float32(scale),
            kind,
        )
        yield piece(ends["down"], (rank, *part.shape[1:]), lambda: spool.get(down, rank), kind)
        if not only_lora:
            yield number(".alpha", f.alpha)
    elif f.kind == "diff" or f.kind == "lokr":
        if only_lora:
            what = "a LoKr" if f.kind == "lokr" else "a whole difference"
            raise Refusal(
                f"{how.title} knows LoRA only, and {part.name} is {what} of {part.param or 'it'};"
                " write kohya, lycoris or comfyui, or say --rank"
            )
        for name, slot in f.slots.items():
            end = f".lokr_{name}" if f.kind == "lokr" else _DIFFERENCES[part.param]
            yield piece(end, slot[1], lambda slot=slot: spool.get(slot), kind)  # type: ignore[misc]
        if f.alpha:
            yield number(".alpha", f.alpha)


_DIFFERENCES = {"weight": ".diff", "": ".diff", "bias": ".diff_b"}


def _copying(kept: Kept) -> Callable[[], Any]:
    def read() -> Any:
        data = kept.source.read(kept.info)
        x = kernels.float32(data, kept.info.dtype)
        return x if kept.times == 1 else x * np.float32(kept.times)

    return read


def written(
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    path: Path,
    *,
    progress: ProgressCallback | None,
) -> int:
    """Write the file `path`, with kohya's hashes of what is in it; its size in bytes.

    Raises Failure or Cancelled, and leaves nothing then.
    """
    entries = [piece.entry for piece in pieces]
    words = {**metadata, **{key: "0" * digits for key, digits in HASHES.items()}}
    layout = safetensors.layout(entries, words)
    began = time.monotonic()
    file = AtomicFile(path, layout.size, read_back=True, shards=False)
    with stops.held(finished(path)), file as target:
        done = 0
        for piece in sorted(pieces, key=lambda p: layout.offsets[p.entry.name]):
            data = _encoded(piece)
            target.write_at(layout.offsets[piece.entry.name], data)
            done += piece.entry.nbytes
            if not goes_on(progress, "writing", done, layout.size, began):
                raise Cancelled("stopped; nothing was written")
        words.update(_hashes(entries, metadata, layout, target))
        for at, data in safetensors.layout(entries, words).pieces:
            target.write_at(at, data)
        file.commit()
    return layout.size


def _encoded(piece: Piece) -> Any:
    x = np.ascontiguousarray(piece.array())
    if piece.entry.dtype == "U8":
        return x.data
    with np.errstate(over="ignore"):
        flat = x.reshape(-1).astype(np.float32, copy=False)
    out = np.empty(flat.size, kernels.NUMPY[piece.entry.dtype])
    kernels.best_backend().narrow(flat, piece.entry.dtype, out)
    if kernels.nonfinite(out.data, piece.entry.dtype):
        if not np.isfinite(x).all():
            raise Refusal(f"{piece.entry.name} holds infinities or NaN; see plymix check")
        hint = "; say --dtype bf16 or fp32" if piece.entry.dtype == "F16" else ""
        raise Refusal(
            f"{piece.entry.name} has numbers beyond what {piece.entry.dtype} can hold{hint}"
        )
    return out.data


HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}


def _hashes(
    entries: Sequence[Entry], metadata: Mapping[str, str], layout: Layout, target: FileTarget
) -> dict[str, str]:
    """kohya's `sshs_*`: SHA-256 of all that follows the header, and of 64 KiB at 1 MiB of the file
    as it would be with no metadata but `ss_*`.

    Source: sd-scripts `precalculate_safetensors_hashes`.
    """
    start = layout.size - sum(entry.nbytes for entry in entries)
    digest = hashlib.sha256()
    for at in range(start, layout.size, 1 << 20):
        data = bytearray(min(1 << 20, layout.size - at))
        target.read_at(at, data)
        digest.update(data)
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ((_, header),) = safetensors.layout(entries, own).pieces
    first, last = 0x100000, 0x110000
    old = bytearray(header[first:last])
    at = start + max(first - len(header), 0)
    rest = bytearray(max(0, min(start + last - len(header), layout.size) - at))
    target.read_at(at, rest)
    legacy = hashlib.sha256(old + rest).hexdigest()[:8]
    return {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": legacy}


def size_of(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `written` would write."""
    words = {**metadata, **{key: "0" * digits for key, digits in HASHES.items()}}
    return safetensors.layout([piece.entry for piece in pieces], words).size
