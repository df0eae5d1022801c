"""An open file -> its tensors by names that its architecture knows, in whatever dialect they are.

What a file in another dialect holds is told apart by `archs.dialects`; here its views become places
in the file, so that the rest of plymix sees one spelling and reads nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from plymix import archs
from plymix.archs import Architecture, Detection, Place
from plymix.archs.dialect_tables import tables
from plymix.archs.dialects import HALF, Part, View, Views, canonical, inverse, recognise
from plymix.errors import Refusal, listed
from plymix.expr import Expr, Spelt, elementwise, mapped
from plymix.formats import sharded
from plymix.formats.base import BITS, Source, TensorInfo
from plymix.formats.diffusers import MODEL_INDEX

DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Paired:
    """A file's tensors by names that `detection.arch` knows, if there is one.

    `dialect` says whose names the file itself has ("": the architecture's own). `unpaired` are its
    keys without a counterpart; `left_out` are, by reason, those of components that are no part of a
    checkpoint and those of tensors of which the rest is not there. `names` are those in `tensors`
    by the file's keys (one that is several: its first). `absent` are names (or, with a dot at the
    end, starts of names) that no file of the dialect has, and why. `spelling` is the way back: each
    key's views of `tensors`. In a `folder` a key has its component before it: a single file cannot
    hold them all, since their own names clash.
    """

    detection: Detection
    tensors: Mapping[str, TensorInfo]
    dialect: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    unpaired: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    spelling: Views = field(default_factory=dict)
    folder: bool = False

    def place(self, key: str) -> Place | None:
        """Where the file's key belongs; None for no key of the architecture."""
        name = self.names.get(key) if self.dialect else key
        return self.detection.arch.place(name) if self.detection.arch and name else None


def pair(
    source: Source, arch: Architecture | None = None, own: Architecture | None = None
) -> Paired:
    """The tensors of `source`, which is a model or, where `arch` is given, a component of one.

    `own` is an architecture that a user describes, looked for first. What is neither keeps its
    names. Raises Refusal for shapes that cannot be what their names say.
    """
    if text := sharded.shard_of(source.path.name):
        return Paired(Detection(None, "base", "shard", text), source.tensors)
    groups = _components(source)
    if groups:
        shapes = {name: _shapes(group) for name, group in groups.items()}
        parts = (
            part for name in groups for part in recognise(shapes[name]) if part.component == name
        )
        part = _deciding(list(parts), arch)
        found = _paired(part.arch, groups) if part else _unknown(source, shapes)
        return replace(found, folder=True)
    plain = unpaired(source, own)
    if plain.detection.arch and not plain.detection.dialect:
        return plain
    part = _deciding(recognise(_shapes(source.tensors)), arch)
    return _paired(part.arch, {part.component: source.tensors}) if part else plain


def unpaired(source: Source, own: Architecture | None = None) -> Paired:
    """The tensors of `source` by the names they have, whatever it is."""
    return Paired(archs.detect(_shapes(source.tensors), own), source.tensors)


Group = Mapping[str, TensorInfo]


def _components(source: Source) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of a pipeline's components by their names there; none for a single file."""
    if MODEL_INDEX not in source.configs:
        return {}
    groups: dict[str, dict[str, TensorInfo]] = {}
    for key, info in source.tensors.items():
        component, _, name = key.partition("/")
        groups.setdefault(component, {})[name] = info
    return groups


def _shapes(tensors: Group) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in tensors.items()}


def _deciding(parts: Sequence[Part], arch: Architecture | None) -> Part | None:
    """Of what a file may hold, what tells its architecture: a denoiser, else a part of `arch`."""
    denoisers = [part for part in parts if part.component == part.arch.denoiser.name]
    return next(iter(denoisers or [part for part in parts if part.arch == arch]), None)


def _paired(arch: Architecture, groups: Mapping[str, Group]) -> Paired:
    known = {component for owner, component in tables(DIFFUSERS) if owner == arch.name}
    paired: dict[str, TensorInfo] = {}
    strangers: list[str] = []
    left_out: dict[str, tuple[str, ...]] = {}
    absent: dict[str, str] = {}
    spelling: dict[str, tuple[View, ...]] = {}
    for component, group in groups.items():
        if component not in known:
            why = f"{component} is no part of {arch.short} checkpoints"
            left_out[why] = tuple(info.name for info in group.values())
            continue
        shapes = _shapes(group)
        found = canonical(arch, DIFFUSERS, component, shapes)
        paired.update((name, seen(name, views, group)) for name, views in found.views.items())
        back = inverse(found.views, shapes)
        spelling.update((group[key].name, views) for key, views in back.items())
        for key, why in found.unpaired.items():
            if why.startswith(HALF):
                left_out[why] = (*left_out.get(why, ()), group[key].name)
            else:
                strangers.append(group[key].name)
        absent.update(found.absent)
    return Paired(
        _detection(arch, paired),
        paired,
        DIFFUSERS,
        {key: views[0].key for key, views in spelling.items()},
        tuple(strangers),
        left_out,
        absent,
        spelling,
    )


def _detection(arch: Architecture, tensors: Group) -> Detection:
    """What a file with these tensors is; `arch` is certain, variant and kind are to be found."""
    found = archs.detect(_shapes(tensors))
    if found.arch != arch:
        found = Detection(arch, "base", "denoiser", f"{arch.short} {arch.denoiser.title}")
    return replace(found, title=f"{found.title} ({DIFFUSERS} names)")


def _unknown(source: Source, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Paired:
    """A folder without a denoiser that plymix knows; what it has is said."""
    inside = ((name, archs.detect(group)) for name, group in shapes.items())
    name, found = max(inside, key=lambda at: at[1].kind == "denoiser")
    title = f"a diffusers folder of {listed(shapes)}; its {name} is {found.named}"
    return Paired(Detection(None, "base", "folder", title, seen=found.seen), source.tensors)


# --- the way back


def spelt(expr: Expr, views: Sequence[View]) -> Expr:
    """The tensor that `views` of a canonical one make up, which is `expr`."""
    if all((view.rows, view.transpose, view.shape) == (None, False, None) for view in views):
        return expr
    if elementwise(expr):
        return mapped(expr, lambda info: seen(info.name, views, {views[0].key: info}))
    return Spelt(expr, tuple((view.rows, view.transpose, view.shape) for view in views))


# --- where the numbers lie


def seen(name: str, views: Iterable[View], group: Group) -> TensorInfo:
    """The tensor called `name` that `views` of the tensors in `group` make up."""
    seen = [_view(view, group[view.key]) for view in views]
    first = seen[0]
    if len(seen) == 1:
        return replace(first, name=name)
    kinds = {(info.dtype, info.encoding) for info in seen}
    if len(kinds) > 1:
        text = " and ".join(f"{info.name} ({info.encoding or info.dtype})" for info in seen)
        raise Refusal(f"{text} are parts of one tensor, {name}: they must be of one dtype")
    shape = (sum(info.shape[0] for info in seen), *first.shape[1:])
    parts = tuple(part for info in seen for part in info.parts or (info,))
    return replace(first, name=name, shape=shape, strides=None, parts=parts)


def _view(view: View, info: TensorInfo) -> TensorInfo:
    info = _rows(info, *view.rows) if view.rows else info
    shape, strides = info.shape, info.strides or _row_major(info.shape)
    if view.transpose:
        shape, strides = shape[::-1], strides[::-1]
    in_order = info.strides is None and not view.transpose
    if info.parts and view.transpose:
        raise Refusal(f"{info.name} lies in several pieces; save it as one")
    if view.shape is not None:
        if not in_order and _without_ones(view.shape) != _without_ones(shape):
            raise Refusal(f"{info.name} does not lie in one piece in its file; save it again")
        left = iter(s for n, s in zip(shape, strides, strict=True) if n != 1)
        strides = tuple(1 if n == 1 else next(left, 1) for n in view.shape)
        shape = view.shape
    in_order = in_order or strides == _row_major(shape)
    return replace(info, shape=shape, strides=None if in_order else strides)


def _rows(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of axis 0."""
    shape = (stop - start, *info.shape[1:])
    if info.parts:
        ends = list(accumulate(part.shape[0] for part in info.parts))
        pieces = [
            _rows(part, max(start - end + part.shape[0], 0), min(stop - end, 0) + part.shape[0])
            for part, end in zip(info.parts, ends, strict=True)
            if start < end and stop > end - part.shape[0]
        ]
        first = pieces[0]
        return replace(
            first, name=info.name, shape=shape, parts=tuple(pieces) if len(pieces) > 1 else ()
        )
    strides = info.strides or _row_major(info.shape)
    offset = info.offset + start * strides[0] * BITS[info.dtype] // 8
    return replace(info, shape=shape, offset=offset)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
