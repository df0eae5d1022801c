"""A module and its place in a tensor -> a Delta; a Delta and its factors -> rows of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plymix.adapters.families import Rows, families
from plymix.adapters.families.dora import Norm, dora
from plymix.adapters.files import MAGNITUDE, Module
from plymix.adapters.names import Target
from plymix.expr import Delta, Expr, Leaf, SeenPart
from plymix.methods import Array
from plymix.methods.arrays import as_rows, flatten, namespace

Shape = tuple[int, ...]


def placed(
    module: Module, target: Target, shape: Shape, source: int, of: Expr, norm: Norm
) -> Delta:
    """What `module` of input number `source` adds to a tensor of `shape`.

    `of` is what the tensor is before; it is kept where the change depends on it.
    """
    settings: dict[str, Any] = dict(module.numbers)
    if MAGNITUDE in module.factors:
        settings["norm"] = norm
    return Delta(
        family=module.family,
        factors=tuple((name, Leaf(source, info)) for name, info in module.factors.items()),
        settings=tuple(sorted(settings.items())),
        scale=module.scale,
        shape=shape,
        seen=target.shape,
        pieces=tuple((v.rows, v.transpose, v.shape) for v in target.views),
        of=of if module.on_weight else None,
    )


# --- numbers


def change(delta: Delta, factors: Mapping[str, Array]) -> Callable[[int, int], Array]:
    """The rows [start, stop) that `delta` adds to its tensor, as a matrix.

    For a Delta that does not depend on its tensor. `factors` are its tensors as float32 arrays.
    """
    family = families()[delta.family]
    rows = _scaled(family.function(**factors, **dict(delta.settings)), delta.scale)
    count = delta.shape[0] if delta.shape else 1
    parts = list(_parts(delta))

    def found(start: int, stop: int) -> Array:
        if not delta.pieces:
            return _widened(rows(slice(start, stop)), delta)
        out: Any = None
        for at, stretch, first, last, swapped, seen in parts:
            a, b = max(start, first), min(stop, last)
            if a >= b:
                continue
            if not swapped and stretch == last - first:
                piece = rows(slice(at + a - first, at + b - first))
            else:
                region = (last - first, *delta.shape[1:])
                piece = _back(rows(slice(at, at + stretch)), seen, swapped, region)
                piece = as_rows(piece)[a - first : b - first, :]
            if (a, b) == (start, stop):
                return piece
            if out is None:
                out = _zeros(piece, (stop - start, math.prod(delta.shape[1:])))
            out[a - start : b - start, :] = piece
        if out is not None:
            return out
        one = next(iter(factors.values()))
        return _zeros(one, (min(stop, count) - start, math.prod(delta.shape[1:])))

    return found


def together(
    terms: Sequence[tuple[float, Delta]], factors: Sequence[Mapping[str, Array]]
) -> Callable[[int, int], Array]:
    """As `change`, the sum of several of one tensor. Products of matrices become one product."""
    lefts: list[Array] = []
    rights: list[Array] = []
    others: list[Callable[[int, int], Array]] = []
    for (c, delta), arrays in zip(terms, factors, strict=True):
        product = families()[delta.family].product
        if product is not None and not delta.pieces and delta.seen == delta.shape:
            left, right = product(**arrays)
            lefts.append(left * (c * delta.scale))
            rights.append(right)
        else:
            others.append(_times(c, change(delta, arrays)))
    if lefts:
        xp = namespace(*lefts)
        left, right = xp.concat(lefts, axis=1), xp.concat(rights)
        others.insert(0, lambda start, stop: left[start:stop, :] @ right)

    def found(start: int, stop: int) -> Array:
        total = others[0](start, stop)
        for other in others[1:]:
            total = total + other(start, stop)
        return total

    return found


def _times(c: float, rows: Callable[[int, int], Array]) -> Callable[[int, int], Array]:
    return rows if c == 1 else lambda start, stop: rows(start, stop) * c


def change_of(delta: Delta, w: Array, factors: Mapping[str, Array]) -> Array:
    """What `delta` adds to the tensor `w` that it depends on, in its shape."""
    xp = namespace(w)
    parts = list(_parts(delta))
    if not delta.pieces:
        weight = w if delta.seen == delta.shape else w[:, : delta.seen[1]]
    else:
        weight = xp.concat([_view(w, piece) for piece in delta.pieces])
    changed = _changed(delta, xp.reshape(weight, delta.seen), factors)
    if not delta.pieces:
        return xp.reshape(_widened(as_rows(changed), delta), delta.shape)
    out = _zeros(w, w.shape)
    for at, stretch, first, last, swapped, seen in parts:
        region = (last - first, *delta.shape[1:])
        out[first:last, ...] = _back(changed[at : at + stretch, ...], seen, swapped, region)
    return out


def _changed(delta: Delta, w: Array, factors: Mapping[str, Array]) -> Array:
    family, settings = families()[delta.family], dict(delta.settings)
    if MAGNITUDE not in factors:
        return family.function(w, **factors, **settings) * delta.scale
    norm = settings.pop("norm")
    others = {name: x for name, x in factors.items() if name != MAGNITUDE}
    if family.on_weight:
        inner = family.function(w, **others, **settings)
    else:
        inner = namespace(w).reshape(family.function(**others, **settings)(slice(None)), w.shape)
    return dora(w, inner * delta.scale, factors[MAGNITUDE], norm=norm)


def _scaled(rows: Rows, scale: float) -> Rows:
    return rows if scale == 1 else lambda some: rows(some) * scale


def _parts(delta: Delta) -> Iterator[tuple[int, int, int, int, bool, Shape]]:
    """Of each piece: its first row in the module's weight and how many, the tensor's rows it is
    (first, last + 1), whether its axes are swapped, and the shape it is seen in."""
    at, count = 0, delta.shape[0] if delta.shape else 1
    for rows, swapped, shape in delta.pieces:
        first, last = rows or (0, count)
        region = (last - first, *delta.shape[1:])
        seen = shape or (region[::-1] if swapped else region)
        yield at, seen[0], first, last, swapped, seen
        at += seen[0]


def _view(w: Array, piece: SeenPart) -> Array:
    rows, swapped, shape = piece
    xp = namespace(w)
    seen = w if rows is None else w[rows[0] : rows[1], ...]
    seen = xp.matrix_transpose(seen) if swapped else seen
    return seen if shape is None else xp.reshape(seen, shape)


def _back(piece: Array, seen: Shape, swapped: bool, region: Shape) -> Array:
    """A piece of the module's weight as the region of the tensor that it is."""
    xp = namespace(piece)
    if swapped:
        return xp.matrix_transpose(xp.reshape(piece, region[::-1]))
    return xp.reshape(piece, region)


def _widened(rows: Array, delta: Delta) -> Array:
    """Rows for a tensor with more input channels than the module knows: those get nothing."""
    if delta.seen == delta.shape:
        return rows
    xp, kernel = namespace(rows), math.prod(delta.shape[2:])
    known = delta.seen[1] * kernel
    rest = _zeros(rows, (rows.shape[0], delta.shape[1] * kernel - known))
    return xp.concat([rows, rest], axis=1)


def _zeros(like: Array, shape: Sequence[int]) -> Array:
    from array_api_compat import device

    xp = namespace(like)
    return xp.zeros(tuple(shape), dtype=like.dtype, device=device(like))


def elements(
    delta: Delta, rows: Callable[[int, int], Array], start: int, stop: int, about: int
) -> Array:
    """Elements [start, stop), in a line, of a change of `delta`'s tensor whose rows are `rows`.

    Rows are computed in the same groups, of `about` elements, whatever is asked for.
    """
    count, width = delta.shape[0] if delta.shape else 1, math.prod(delta.shape[1:])
    size = delta.grain(about)
    parts = []
    for first in range(start // size * size, stop, size):
        row = first // width
        group = rows(row, min(row + size // width, count))
        parts.append(flatten(group)[max(start - first, 0) : stop - first])
    return parts[0] if len(parts) == 1 else namespace(*parts).concat(parts)
