"""The names that other tools give an architecture's tensors, key by key and both ways.

`canonical` says which canonical tensors the tensors of a file make up, `written` which tensors of
such a file the canonical ones make up; both from names and shapes alone. What differs besides the
names is told by views: fused q, k and v are three views, exchanged halves two.

What the names are stands in tables: see `plymix.archs.dialect_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plymix.archs.detection import _Keys, detect
from plymix.archs.dialect_tables import File, Row, table_for, tables
from plymix.archs.model import Architecture, load
from plymix.errors import Refusal

HALF = "the rest of"
"""How the reason begins for which a part of a tensor is unpaired."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class View:
    """A part of the tensor `key`, seen as the other side has it.

    `rows` is a range of axis 0 (None: all). With `transpose` a matrix is seen with its axes
    swapped. `shape` is what the same numbers in the same order are seen in.
    """

    key: str
    rows: tuple[int, int] | None = None
    transpose: bool = False
    shape: Shape | None = None


Views = Mapping[str, tuple[View, ...]]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Names of one side, each with the views whose concatenation along axis 0 it is.

    `unpaired` are the keys given that are in no view, each with the reason. `absent` are canonical
    names (or, with a dot at the end, starts of names) that no file of the dialect has, and why.
    """

    views: Views
    unpaired: Mapping[str, str]
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """What a file holds: a component, by its folder's name in a pipeline, of an architecture."""

    arch: Architecture
    component: str


def canonical(arch: Architecture, dialect: str, component: str, shapes: Shapes) -> Pairing:
    """The canonical tensors that a component file in `dialect` holds.

    `component` is the name of its folder in a pipeline ("unet", "text_encoder_2", ...); `shapes`
    are the file's. Raises Refusal where no table is known, where two keys are one tensor, and for
    shapes that cannot be what their names say.
    """
    table = table_for(arch, dialect, component, shapes)
    slots: dict[str, tuple[Row, dict[int, str]]] = {}  # canonical name -> its row, its parts' keys
    unpaired: dict[str, str] = {}
    for key in shapes:
        hit = table.theirs.find(table.file.respelled(key))
        name = hit.row.name.fill(hit) if hit else None
        if hit is None or name is None:
            unpaired[key] = f"no tensor of {arch.short} is called so in {dialect}"
            continue
        _, keys = slots.setdefault(table.prefix + name, (hit.row, {}))
        if hit.slot in keys:
            raise _twice(table.prefix + name, keys[hit.slot], key)
        keys[hit.slot] = key
    views: dict[str, tuple[View, ...]] = {}
    for name, (row, keys) in slots.items():
        if len(keys) == len(row.parts):
            views[name] = _whole(row, [keys[slot] for slot in range(len(keys))], shapes)
        else:
            unpaired.update(dict.fromkeys(keys.values(), f"{HALF} {name} is not there"))
    return Pairing(views, unpaired, _absent(table.prefix, table.file, views))


def absent(arch: Architecture, dialect: str, names: Collection[str]) -> dict[str, str]:
    """Canonical names that no file in `dialect` has and that are not among `names`, and why.

    A name with a dot at the end stands for all that begin so. A file with the architecture's own
    names lacks them too where it was made from one in `dialect`.
    """
    found: dict[str, str] = {}
    for (owner, _), (file, prefix) in tables(dialect).items():
        if owner == arch.name:
            found |= _absent(prefix, file, names)
    return found


def _absent(prefix: str, file: File, names: Collection[str]) -> dict[str, str]:
    rows = {prefix + name: why for name, why in file.unwritten.items()}
    return {name: why for name, why in rows.items() if not any(meant(name, key) for key in names)}


def meant(name: str, key: str) -> bool:
    """Whether the canonical `key` is the one called `name` or, with a dot at its end, begins so."""
    return key.startswith(name) if name.endswith(".") else key == name


def written(arch: Architecture, dialect: str, component: str, shapes: Shapes) -> Pairing:
    """The file in `dialect` that the canonical tensors of `component` make up.

    `shapes` are those of canonical tensors; other components' are not looked at. Raises Refusal as
    `canonical` does.
    """
    table = table_for(arch, dialect, component, shapes)
    views: dict[str, tuple[View, ...]] = {}
    unpaired: dict[str, str] = {}
    for key, shape in shapes.items():
        if not key.startswith(table.start):
            continue
        own = key.startswith(table.prefix)
        hit = table.ours.find(key[len(table.prefix) :]) if own else None
        if hit is None or hit.row.unwritten:
            unpaired[key] = hit.row.unwritten if hit else f"{dialect} has no such tensor"
            continue
        # The dialects' numbers are single variables, which have no impossible values.
        names = (part.fill(hit) or "" for part in hit.row.parts)
        for name, view in zip(names, _parts(hit.row, key, shape), strict=True):
            if name in views:
                raise _twice(name, views[name][0].key, key)
            views[name] = view
    return Pairing(views, unpaired)


def checkpoint_name(arch: Architecture, dialect: str, component: str, key: str) -> str | None:
    """What a checkpoint calls `key` of a file of `component` alone, under its canonical names.

    None where the component has no such key. Where no table says more than the prefix, any key is
    taken for one.
    """
    if (arch.name, component) not in tables(dialect):
        return next((home + key for home in arch.homes(component)), None)
    table = table_for(arch, dialect, component, (key,))
    return table.prefix + key if table.ours.find(key) else None


def inverse(views: Views, shapes: Shapes) -> dict[str, tuple[View, ...]]:
    """The way back of `views`, whose keys' shapes are `shapes`: each key's views of the names.

    With what `canonical` gave for a file, this writes tensors in just that file's spelling.
    """
    pieces: dict[str, list[tuple[int, View]]] = {}
    for name, of in views.items():
        at = 0
        for view in of:
            shape = shapes[view.key]
            start, stop = view.rows or (0, shape[0] if shape else 1)
            rows = (at, at + stop - start) if len(of) > 1 else None
            back = View(name, rows, view.transpose, shape if view.shape else None)
            pieces.setdefault(view.key, []).append((start, back))
            at += stop - start
    return {
        key: tuple(view for _, view in sorted(of, key=lambda piece: piece[0]))
        for key, of in pieces.items()
    }


def shape_of(views: Sequence[View], shapes: Shapes) -> Shape:
    """The shape of the concatenation of `views` along axis 0."""
    seen = [_seen_shape(view, shapes[view.key]) for view in views]
    if len(seen) == 1:
        return seen[0]
    return (sum(shape[0] for shape in seen), *seen[0][1:])


def recognise(shapes: Shapes, dialect: str = "diffusers") -> tuple[Part, ...]:
    """What a component file in `dialect` may be.

    Several for one that architectures share (a VAE, CLIP-L), none for a file that is no component.
    """
    known = tables(dialect)
    found = detect(shapes)
    if found.arch and found.kind == "denoiser" and not found.prefix:
        name = found.arch.denoiser.name
        home = known.get((found.arch.name, name))
        if home and found.dialect == ("" if home.file.same else dialect):
            return (Part(found.arch, name),)
    parts: list[Part] = []
    for (arch, component), (file, _) in known.items():
        if file.keys and _Keys(_respelled(file, shapes)).holds(file.keys):
            parts.append(Part(load(arch), component))
    return tuple(parts)


def _respelled(file: File, shapes: Shapes) -> Shapes:
    if not file.aliases:
        return shapes
    return {file.respelled(key): shape for key, shape in shapes.items()}


# --- views


def _views(how: str, key: str, shape: Shape, *, canonical: bool) -> tuple[View, ...]:
    """How one tensor is seen from the other side; `canonical`: that side is the canonical one."""
    if how == "swap":
        if not shape or shape[0] % 2:
            raise _misshapen(key, shape, "two equal halves")
        half = shape[0] // 2
        return View(key, (half, shape[0])), View(key, (0, half))
    if how == "transpose":
        if len(shape) != 2:
            raise _misshapen(key, shape, "a matrix")
        return (View(key, transpose=True),)
    if how.startswith("fold"):
        rows, size = int(how[4:]), math.prod(shape)
        if len(shape) != (2 if canonical else 1) or size % rows:
            raise _misshapen(key, shape, f"{rows} rows" + ("" if canonical else " in a line"))
        return (View(key, shape=(size,) if canonical else (rows, size // rows)),)
    if how == "1x1" and canonical and len(shape) == 2:
        return (View(key, shape=(*shape, 1, 1)),)
    if how == "1x1" and not canonical and shape[2:] == (1, 1):
        return (View(key, shape=shape[:2]),)
    return (View(key),)


def _parts(row: Row, key: str, shape: Shape) -> Iterator[tuple[View, ...]]:
    """Of the canonical tensor `key`, the views that each of the row's parts is."""
    if len(row.shares) == 1:
        yield _views(row.how, key, shape, canonical=False)
        return
    if not shape or shape[0] % sum(row.shares):
        raise _misshapen(key, shape, f"rows in the ratio {_ratio(row.shares)}")
    one, at = shape[0] // sum(row.shares), 0
    for share in row.shares:
        yield (View(key, (at, at + share * one)),)
        at += share * one


def _whole(row: Row, keys: Sequence[str], shapes: Shapes) -> tuple[View, ...]:
    """The views of the tensors `keys`, the row's parts, that are the canonical tensor."""
    if len(keys) == 1:
        return _views(row.how, keys[0], shapes[keys[0]], canonical=True)
    first = shapes[keys[0]]
    for key, share in zip(keys, row.shares, strict=True):
        shape = shapes[key]
        fits = shape and first and shape[0] * row.shares[0] == first[0] * share
        if not fits or shape[1:] != first[1:]:
            beside = f"{keys[0]} with its {[*first]}"
            raise _misshapen(key, shape, f"rows in the ratio {_ratio(row.shares)} beside {beside}")
    return tuple(map(View, keys))


def _seen_shape(view: View, shape: Shape) -> Shape:
    if view.rows:
        shape = (view.rows[1] - view.rows[0], *shape[1:])
    return view.shape or (shape[::-1] if view.transpose else shape)


def _ratio(shares: Iterable[int]) -> str:
    return ":".join(map(str, shares))


def _misshapen(key: str, shape: Shape, expected: str) -> Refusal:
    return Refusal(f"{key} has the shape {[*shape]}; its name asks for {expected}")


def _twice(name: str, one: str, other: str) -> Refusal:
    return Refusal(f"{one} and {other} are the same tensor, {name}; remove one of them")
