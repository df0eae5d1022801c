"""How far two models are from each other: `diff(a, b)` reads both once and gives a `Difference`.

Tensors pair by what they are, not by what they are called, so that a checkpoint compares with a
diffusers folder. Sums are of float64. With a and b the numbers of a group of tensors:

    relative = |b - a| / |a|            0: the same numbers; 1: as far as a is from zero
    cosine   = a.b / (|a| |b|)          1: the same direction
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Union

import msgspec
import numpy as np

from plymix import kernels, pairing, urls
from plymix.archs import Architecture, Place, described, is_schedule
from plymix.archs.dialects import absent, meant
from plymix.engine import ProgressCallback
from plymix.errors import Refusal, amount, listed
from plymix.formats import open_model
from plymix.formats.base import BITS, Source, TensorInfo
from plymix.pairing import DIFFUSERS, Paired
from plymix.plan import fitted
from plymix.recipe import DTYPES
from plymix.respelling import lone
from plymix.sweep import sweep

CHUNK = 1 << 16
"""Elements that a thread reads and compares at a time; all of it stays in the processor's cache."""

State = Literal["same", "equal", "rounded", "changed"]
"""Same bytes; same numbers in another format; one is the other, rounded once to its format."""

SAME = ("same", "equal")


class Distance(msgspec.Struct, frozen=True):
    """How far a group of tensors is apart.

    `changed` of its `tensors` have other numbers. `relative` and `cosine` are those of the module's
    text, over the floating-point ones; None where they have no meaning (nothing but zeros).
    """

    name: str
    component: str
    tensors: int
    changed: int
    relative: float | None
    cosine: float | None


class Compared(msgspec.Struct, frozen=True):
    """One tensor that both models have, by its name in a checkpoint."""

    key: str
    block: str
    component: str
    state: State
    relative: float | None
    cosine: float | None


class Difference(msgspec.Struct, frozen=True):
    """What `diff` found. `verdicts` are sentences, the most telling first."""

    a: str
    b: str
    title_a: str
    title_b: str
    verdicts: tuple[str, ...]
    total: Distance
    components: tuple[Distance, ...]
    blocks: tuple[Distance, ...]
    only_a: tuple[str, ...]  # keys, as the file has them
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...]  # tensors of two shapes
    tensors: tuple[Compared, ...]

    @property
    def same(self) -> bool:
        """Whether both hold the same numbers under the same meaning, and nothing else."""
        apart = self.only_a or self.only_b or self.reshaped
        return not apart and all(t.state in SAME for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The difference as dicts, lists, strings and numbers, with `same`."""
        return {"same": self.same, **msgspec.to_builtins(self)}


PathLike = Union[str, "os.PathLike[str]"]


def diff(
    a: PathLike,
    b: PathLike,
    *,
    arch: PathLike = "",
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Difference:
    """Compare two models, or parts of models, tensor by tensor.

    They may differ in format, names and number formats. `arch` is a file that describes an
    architecture of your own, looked for first. Raises Refusal for two architectures and
    for files that share no tensor, Cancelled when `progress` returns False.
    """
    own = described(arch)
    files = (urls.given(a, "a"), urls.given(b, "b"))
    with ExitStack() as stack:
        sources = [stack.enter_context(open_model(file)) for file in files]
        for source in sources:
            source.expect(source.tensors.values())
        return _difference(*_sides(sources[0], sources[1], own), threads, progress)


# --- what belongs together ----------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two: its tensors by canonical key."""

    label: str
    source: Source
    paired: Paired
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    alone: tuple[str, ...]  # keys that no other file could have

    @property
    def title(self) -> str:
        return self.paired.detection.title

    def without(self, other: Side, arch: Architecture | None) -> tuple[list[str], list[str]]:
        """The keys that `other` lacks: those that say something, and those that do not.

        Files in diffusers' names never have some tensors, nor do files made of them; and the noise
        schedule is in a folder's configuration.
        """
        lacking = [key for key in self.tensors if key not in other.tensors]
        if arch is None or not lacking:
            return lacking, []
        rows, held = absent(arch, DIFFUSERS, other.tensors.keys()), other.components
        folder = other.paired.dialect == DIFFUSERS and arch.denoiser.name in held

        def is_never(key: str) -> bool:
            if folder and is_schedule(key):
                return True
            return self.places[key].component in held and any(meant(name, key) for name in rows)

        saying: list[str] = []
        never: list[str] = []
        for key in lacking:
            (never if is_never(key) else saying).append(key)
        return saying, never

    @property
    def named(self) -> str:
        return self.paired.detection.named

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.component for p in self.places.values() if not p.buffer))


def _sides(a: Source, b: Source, own: Architecture | None) -> tuple[Side, Side]:
    found = [pairing.pair(source, own=own) for source in (a, b)]
    archs = [p.detection.arch if _is_model(p) else None for p in found]
    if archs[0] and archs[1] and archs[0] != archs[1]:
        titles = " and ".join(
            f"{s.path.name} is {p.detection.named}" for s, p in zip((a, b), found, strict=True)
        )
        raise Refusal(f"{titles}: they cannot be compared; choose two models of one architecture")
    arch = archs[0] or archs[1]
    if arch:  # a part of a model is read as that model spells it
        found = [
            p if _is_model(p) else replace(pairing.pair(source, arch), detection=p.detection)
            for source, p in zip((a, b), found, strict=True)
        ]
    elif found[0].tensors.keys() != found[1].tensors.keys():  # perhaps two spellings of one part
        alike = [_in_diffusers(source, p) for source, p in zip((a, b), found, strict=True)]
        found = [p for p in alike if p] if all(alike) else found
    there = {key for p in found if _is_model(p) for key in p.tensors}
    one, other = (_side(s, p, arch, there) for s, p in zip((a, b), found, strict=True))
    if not one.tensors.keys() & other.tensors.keys():
        raise Refusal(
            f"{one.label} is {one.named} and {other.label} is {other.named}: they share no tensor,"
            " so there is nothing to compare"
        )
    return one, other


def _is_model(paired: Paired) -> bool:
    found = paired.detection
    return found.arch is not None and found.kind in ("checkpoint", "denoiser")


def _in_diffusers(source: Source, paired: Paired) -> Paired | None:
    """A VAE or text encoder alone by its names in diffusers; None for any other file."""
    known = lone({key: info.shape for key, info in source.tensors.items()}, "diffusers")
    if known is None:
        return None
    names = known[1]
    tensors = {name: pairing.seen(name, of, source.tensors) for name, of in names.items()}
    used = {view.key for of in names.values() for view in of}
    strangers = tuple(key for key in source.tensors if key not in used)
    return replace(paired, tensors=tensors, unpaired=strangers)


def _side(
    source: Source, paired: Paired, arch: Architecture | None, there: Collection[str]
) -> Side:
    """`there` are the keys of the model, which those of a part of it may have without a prefix."""
    homes: list[str] = []
    if arch and not _is_model(paired):
        homes = [home for c in arch.components for home in arch.homes(c.name) if c.prefixes]
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    for key, info in paired.tensors.items():
        place = arch.place(key) if arch else None
        if arch and place is None:
            full = next((home + key for home in homes if home + key in there), "")
            place = arch.place(full) if full else None
        place = place or Place(key, "extra" if arch else "model", "OTHER", "OTHER")
        if place.key not in tensors:
            tensors[place.key] = info
            places[place.key] = place
    left_out = (key for keys in paired.left_out.values() for key in keys)
    alone = (*paired.unpaired, *left_out)
    return Side(source.path.name, source, paired, tensors, places, alone)


# --- two tensors --------------------------------------------------------------------------------


class Tally(NamedTuple):
    """Sums over pairs of elements, and what holds for all of them."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0  # of (b - a)^2
    same: bool = True
    equal: bool = True
    rounded: bool = True

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
            self.dd + other.dd,
            self.same and other.same,
            self.equal and other.equal,
            self.rounded and other.rounded,
        )

    @property
    def state(self) -> State:
        if self.same:
            return "same"
        return "equal" if self.equal else "rounded" if self.rounded else "changed"

    @property
    def relative(self) -> float | None:
        """None for what has no length: no numbers, zeros only, or NaN and infinities."""
        if self.dd == 0.0:
            return 0.0 if self.aa else None
        ratio = math.sqrt(self.dd / self.aa) if self.aa else math.inf
        return ratio if math.isfinite(ratio) else None

    @property
    def cosine(self) -> float | None:
        lengths = math.sqrt(self.aa) * math.sqrt(self.bb)
        if not lengths or not math.isfinite(lengths):
            return None
        return max(-1.0, min(1.0, self.ab / lengths))


class _Comparer:
    """Compares pairs of tensors; buffers per thread, reused."""

    def __init__(self, a: Source, b: Source) -> None:
        self.sources = a, b
        self.stop = threading.Event()
        self._local = threading.local()

    def __call__(self, pair: tuple[TensorInfo, TensorInfo]) -> Tally:
        total = Tally()
        for x, y in self._chunks(pair):
            if self.stop.is_set():
                break
            total += self._tally(x, y, *(info.dtype for info in pair))
        return total

    def _chunks(self, pair: tuple[TensorInfo, TensorInfo]) -> Iterator[tuple[Any, Any]]:
        """Both tensors' bytes, a few elements at a time, in one order."""
        whole = [
            memoryview(source.read(info)) if info.scattered or BITS[info.dtype] % 8 else None
            for source, info in zip(self.sources, pair, strict=True)
        ]
        ends = sorted({end for info in pair for end in info.ends})
        for first, last in zip([0, *ends], ends, strict=False):
            for start in range(first, last, CHUNK):
                stop = min(start + CHUNK, last)
                x, y = (self._bytes(i, pair[i], whole[i], start, stop) for i in (0, 1))
                yield x, y

    def _bytes(self, i: int, info: TensorInfo, whole: Any, start: int, stop: int) -> Any:
        if whole is not None:
            size = BITS[info.dtype]
            return whole[start * size // 8 : (stop * size + 7) // 8]
        part = info.cut(start, stop)
        buffer = self._buffer(f"raw{i}", np.uint8, CHUNK * 8)[: part.nbytes]
        self.sources[i].read_at(part.file, part.offset, buffer)
        return buffer.data

    def _buffer(self, name: str, dtype: Any, size: int) -> Any:
        held = self._local.__dict__
        if name not in held:
            held[name] = np.empty(size, dtype)
        return held[name]

    def _numbers(self, i: int, data: Any, dtype: str, wide: bool) -> Any:
        """A row of float32, or of float64 where one of the two tensors is."""
        x = np.frombuffer(data, kernels.NUMPY[dtype])
        backend = kernels.best_backend()
        single = self._buffer(f"single{i}", np.float32, CHUNK)[: x.size]
        if wide:
            out = self._buffer(f"double{i}", np.float64, CHUNK)[: x.size]
            backend.double(x, dtype, single, out)
            return out
        if dtype == "F32":
            return x
        backend.widen(x, dtype, single)
        return single

    def _tally(self, x: Any, y: Any, of_a: str, of_b: str) -> Tally:
        same = of_a == of_b and bytes(x[:64]) == bytes(y[:64]) and bytes(x) == bytes(y)
        if of_a not in kernels.NUMPY or of_b not in kernels.NUMPY:
            return Tally(same=same, equal=same, rounded=same)
        backend = kernels.best_backend()
        wide = "F64" in (of_a, of_b)
        a = self._numbers(0, x, of_a, wide)
        aa = backend.dot(a, a)
        if same:
            return Tally(aa, aa, aa, 0.0)
        b = self._numbers(1, y, of_b, wide)
        sums = (aa, backend.dot(b, b), backend.dot(a, b), backend.apart(b, a))
        equal = sums[3] == 0.0 and np.array_equal(a, b)
        return Tally(*sums, False, equal, equal or self._rounded(x, y, a, b, of_a, of_b))

    def _rounded(self, x: Any, y: Any, a: Any, b: Any, of_a: str, of_b: str) -> bool:
        """Whether the numbers of the narrower format are the others', rounded."""
        if of_a == of_b:
            return False
        wide, narrow, dtype = (a, y, of_b) if BITS[of_b] <= BITS[of_a] else (b, x, of_a)
        backend = kernels.best_backend()
        if wide.dtype == np.float64:
            single = np.empty(wide.size, np.float32)
            backend.single(wide, single)
            wide = single
        out = np.empty(wide.size, kernels.NUMPY[dtype])
        backend.narrow(wide, dtype, out)
        return bool(np.array_equal(out, np.frombuffer(narrow, out.dtype)))


# --- the whole ----------------------------------------------------------------------------------


def _difference(a: Side, b: Side, threads: int, progress: ProgressCallback | None) -> Difference:
    pairs: dict[tuple[TensorInfo, TensorInfo], str] = {}
    reshaped: list[str] = []
    for key, info in a.tensors.items():
        if key in b.tensors:
            other = fitted(b.tensors[key], info.shape)
            if other is None:
                reshaped.append(key)
            else:
                pairs[info, other] = key
    comparer = _Comparer(a.source, b.source)
    found = sweep(
        comparer,
        list(pairs),
        lambda pair: pair[0].nbytes + pair[1].nbytes,
        phase="comparing",
        stop=comparer.stop,
        threads=threads,
        progress=progress,
    )
    tallies = {pairs[pair]: tally for pair, tally in found}
    rows = [(key, a.places[key], tally) for key, tally in tallies.items()]
    arch = a.paired.detection.arch or b.paired.detection.arch
    components = [c.name for c in arch.components] if arch else []
    blocks = [*(arch.blocks if arch else ()), "BASE", "VAE", "EMA", "BUFFER"]
    more_a, more_b = a.without(b, arch), b.without(a, arch)
    return Difference(
        a=a.label,
        b=b.label,
        title_a=a.title,
        title_b=b.title,
        verdicts=tuple(_verdicts(a, b, rows, reshaped, (more_a, more_b))),
        total=_distance("total", "", [t for _, _, t in rows]),
        components=tuple(_grouped(rows, lambda p: (p.component, p.component), components)),
        blocks=tuple(_grouped(rows, lambda p: (p.block, "" if p.buffer else p.component), blocks)),
        only_a=(*(a.tensors[key].name for key in more_a[0]), *a.alone),
        only_b=(*(b.tensors[key].name for key in more_b[0]), *b.alone),
        reshaped=tuple(reshaped),
        tensors=tuple(
            Compared(key, p.block, p.component, t.state, t.relative, t.cosine) for key, p, t in rows
        ),
    )


Row = tuple[str, Place, Tally]


def _grouped(rows: Sequence[Row], name: Any, order: Sequence[str]) -> Iterator[Distance]:
    groups: dict[tuple[str, str], list[Tally]] = {}
    for _, place, tally in rows:
        groups.setdefault(name(place), []).append(tally)
    known = {name: at for at, name in enumerate(order)}
    for group in sorted(groups, key=lambda g: known.get(g[0], len(known))):
        yield _distance(*group, groups[group])


def _distance(name: str, component: str, tallies: Sequence[Tally]) -> Distance:
    total = sum(tallies, start=Tally())
    changed = sum(t.state not in SAME for t in tallies)
    return Distance(name, component, len(tallies), changed, total.relative, total.cosine)


def _verdicts(
    a: Side,
    b: Side,
    rows: Sequence[Row],
    reshaped: Sequence[str],
    more_keys: Sequence[tuple[Sequence[str], Sequence[str]]],
) -> Iterator[str]:
    """What the numbers mean, in sentences; `more_keys` is what `without` gave for each side."""
    arch = a.paired.detection.arch or b.paired.detection.arch
    titles = {c.name: c.title for c in arch.components} if arch else {}
    titles |= {"ema": "EMA weights", "extra": "other tensors", "model": "weights"}
    states: dict[str, set[str]] = {}
    for _, place, tally in rows:
        if not place.buffer:
            states.setdefault(place.component, set()).add(tally.state)
    for side, (lacking, _) in zip((a, b), more_keys, strict=True):
        weights = (side.places[k] for k in lacking if not side.places[k].buffer)
        for component in {place.component for place in weights} & states.keys():
            states[component].add("changed")
    for key in reshaped:
        states.setdefault(a.places[key].component, set()).add("changed")
    more = {
        side.label: [titles.get(c, c) for c in side.components if c not in other.components]
        for side, other in ((a, b), (b, a))
    }
    held = set().union(*states.values())
    kept = held <= {"same", "equal", "rounded"}
    if kept and "rounded" in held:
        yield _rounding(a, b, rows)
    elif kept and not any(more.values()):
        yield f"{b.label} holds the same weights as {a.label}"
    if kept and not any(more.values()):
        if a.paired.dialect != b.paired.dialect or any(
            info.name != b.tensors[key].name for key, info in a.tensors.items() if key in b.tensors
        ):
            yield "same weights, other names"
        if "equal" in held:
            yield "same weights, other number formats"
    if not kept:
        for component, of in states.items():
            name = titles.get(component, component)
            if of <= {"same", "equal"}:
                yield f"same {name}"
            elif of <= {"same", "equal", "rounded"}:
                yield f"same {name} but for rounding"
    for one, other in ((a, b), (b, a)):
        if more[one.label]:
            what = " and ".join(more[one.label])
            whole = kept and not more[other.label]
            yield (
                f"{one.label} is {other.label} plus {what}"
                if whole
                else (f"{one.label} alone has {what}")
            )
    for side, (_, never) in zip((a, b), more_keys, strict=True):
        if never:
            yield (
                f"not counted, as files in {DIFFUSERS}' names never have them:"
                f" {amount(len(never))} of {side.label}:"
                f" {listed((side.tensors[key].name for key in never), 3)}"
            )
    buffers = [k for k, p, t in rows if p.buffer and t.state not in SAME]
    if buffers:
        yield f"not the same, though no weights: {listed(buffers, 5)}"


def _rounding(a: Side, b: Side, rows: Sequence[Row]) -> str:
    """'b is a, rounded once to fp16', of rows some of which are so."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    said: dict[tuple[str, str], list[str]] = {}
    for key, _, tally in rows:
        if tally.state == "rounded":
            kinds = a.tensors[key].dtype, b.tensors[key].dtype
            back = BITS[kinds[1]] > BITS[kinds[0]]
            one, other, dtype = (a, b, kinds[0]) if back else (b, a, kinds[1])
            said.setdefault((one.label, other.label), []).append(names.get(dtype, dtype))
    return "; ".join(
        f"{one} is {other}, rounded once to {' and '.join(dict.fromkeys(dtypes))}"
        for (one, other), dtypes in said.items()
    )
