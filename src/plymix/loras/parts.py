"""LoRA files -> the parts of one: which module each becomes, and what it adds to its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plymix.adapters import Adapter, Module, change, factor
from plymix.adapters.files import MAGNITUDE
from plymix.adapters.names import Target, check_once, component
from plymix.adapters.report import block
from plymix.adapters.spelling import DIALECTS, KOHYA, PEFT, Dialect, Spelt, located, spelt, spoken
from plymix.adapters.strengths import Strength
from plymix.archs import Architecture, Place
from plymix.archs.dialects import View
from plymix.errors import Refusal, amount, listed
from plymix.formats.base import Source, TensorInfo

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
WIDEST = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes by what they can hold. Results are F32 at most; fp8 is not written."""


@dataclass(frozen=True)
class Change:
    """What a part adds to its weight: the sum of products up @ down, and a matrix (or line).

    With `alpha` there is one product, which is to be kept as it is.
    """

    products: tuple[tuple[Any, Any], ...] = ()
    whole: Any = None
    alpha: float | None = None


@dataclass(frozen=True)
class Kept:
    """A tensor to be copied: times `times`, in `shape`, as `end` of the module's keys."""

    end: str
    source: Source
    info: TensorInfo
    shape: Shape
    times: float = 1.0


@dataclass(frozen=True)
class Part:
    """A module of the result: a change of the parameter `param` of the module `name`.

    `key` is what it changes, canonically where that is known, for seeds and messages; `shape` the
    changed weight's. `nbytes` are read to compute the change, in float32; the result has `dtype`.
    With `kept` the module is copied: its tensors, and numbers by their ends.
    """

    name: str
    param: str
    key: str
    block: str
    shape: Shape
    dtype: str
    nbytes: int
    change: Callable[[], Change]
    kept: tuple[Kept, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """A module of an input, and what its change counts."""

    source: Source
    module: Module
    target: Target | None
    weight: float

    @property
    def title(self) -> str:
        return f"{self.module.name} ({self.source.path.name})"


@dataclass(frozen=True)
class Gathered:
    """The modules of one or several LoRAs by what they change.

    `how` is the dialect that the result is written in.
    """

    arch: Architecture | None
    how: Dialect
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def gather(
    adapters: Sequence[Adapter],
    strengths: Sequence[Strength],
    *,
    arch: Architecture | None,
    model: Shapes | None = None,
    to: Dialect | None = None,
    copy: bool = False,
    strict: bool = False,
) -> Gathered:
    """The parts of what `adapters` make together.

    `arch` is what they are for, `model` a model's tensors by canonical key where one is named. `to`
    is the dialect to write; None for the first one's. With `copy` modules are only renamed where
    that can be. `strict` refuses tensors and modules of which plymix does not know what they are.
    Raises Refusal.
    """
    modules = [module for adapter in adapters for module in adapter.modules]
    shapes, targets = located(arch, modules, model)
    first = len(adapters[0].modules)
    same = spoken(modules[:first], targets[:first], arch, shapes) if arch else None
    if same is None and not any(targets):
        same = _as_it_is(adapters[0])
    how = to or same or DIALECTS["kohya"]
    terms = list(_terms(adapters, strengths, targets, arch))
    names = spelt(arch, shapes, how) if arch else {}
    parts: list[Part] = []
    others: list[Term] = []
    for key, group in _grouped(terms, arch).items():
        on = shapes.get(key) if group[0].target else None
        if on is None:
            others += group
            parts.append(_as_named(key, group, arch, how, copy))
            continue
        if key not in names:
            if not any(term.weight for term in group):
                continue
            raise Refusal(
                f"{how.title} cannot say {group[0].title}, which is {key}; choose another spelling"
                + ("" if how.encoder else ", or leave the text encoder out: lora merge FILE:1:0")
            )
        parts += _spelt(key, on, group, names[key], arch, how, copy)
    if others and (how is not same or (len(adapters) > 1 and _respelt(adapters))):
        raise _unknown(others, arch, how)
    _check(parts, how)
    notes = [
        f"{adapter.source.path.name}: {amount(len(keys))} left out: {why}: {listed(keys, 3)}"
        for adapter in adapters
        for why, keys in adapter.others.items()
    ]
    if others and (arch or strict):
        kind = f"{arch.short} model" if arch else "model"
        notes.append(
            f"{len(others)} modules are in no {kind} that plymix knows, and are taken by their"
            f" names: {listed((term.title for term in others), 3)}"
        )
    if strict and notes:
        raise Refusal(f"{notes[0]}; leave out --strict to go on")
    return Gathered(arch, how, tuple(parts), tuple(notes))


def _terms(
    adapters: Sequence[Adapter],
    strengths: Sequence[Strength],
    targets: Sequence[Target | None],
    arch: Architecture | None,
) -> Iterator[Term]:
    found = iter(targets)
    for adapter, strength in zip(adapters, strengths, strict=True):
        pairs = list(zip(adapter.modules, found))  # noqa: B905 (targets go on)
        check_once(adapter.source.path.name, pairs)
        for module, target in pairs:
            place = _place(module, target, arch)
            weight = strength.of(place) * strength.factor(place) if place else strength.model
            yield Term(adapter.source, module, target, weight)


def _place(module: Module, target: Target | None, arch: Architecture | None) -> Place | None:
    """Where a module's weight belongs; by the beginning of its name if no more is known."""
    if arch is None:
        return None
    if target is not None:
        return arch.place(target.key)
    name = block(arch, module)
    return Place("", component(arch, module), name, name) if name else None


def _grouped(terms: Iterable[Term], arch: Architecture | None) -> dict[str, list[Term]]:
    groups: dict[str, list[Term]] = {}
    for term in terms:
        module = term.module
        key = term.target.key if term.target else f"{module.name}.{module.param}"
        groups.setdefault(key, []).append(term)
    return groups


def _respelt(adapters: Sequence[Adapter]) -> bool:
    """Whether files that are told apart by their names alone have them in several dialects."""
    return len({adapter.detection.dialect for adapter in adapters}) > 1


def _unknown(others: Sequence[Term], arch: Architecture | None, how: Dialect) -> Refusal:
    named = listed((term.title for term in others), 3)
    if arch is None:
        why = "it cannot be told for which architecture they are"
    else:
        why = f"plymix knows no such modules of {arch.short}"
    return Refusal(
        f"{len(others)} modules cannot be written in another spelling, since {why}: {named}; name a"
        " model that they fit with --base"
    )


def _as_it_is(adapter: Adapter) -> Dialect:
    """The names of a file of which plymix knows no model."""
    peft = any(".lora_A" in key for module in adapter.modules for key in module.keys)
    return Dialect("", "its own spelling", "", "", ends=PEFT if peft else KOHYA, only_lora=peft)


def _as_named(
    key: str, group: Sequence[Term], arch: Architecture | None, how: Dialect, copy: bool
) -> Part:
    first = group[0].module
    place = block(arch, first) if arch else ""
    shape = max((_shape(term.module) for term in group), key=len)
    for term in group[1:]:
        if term.module.size != first.size:
            raise Refusal(
                f"{term.title} and {group[0].title} change weights of different sizes: they are for"
                " different models"
            )
    return _part(Spelt(first.name, first.param, ()), key, place or "?", shape, group, (), how, copy)


def _spelt(
    key: str,
    on: Shape,
    group: Sequence[Term],
    spellings: Sequence[Spelt],
    arch: Architecture | None,
    how: Dialect,
    copy: bool,
) -> Iterator[Part]:
    place = arch.place(key) if arch else None
    for one in spellings:
        there, rows = [], []
        for term in group:
            assert term.target is not None
            map_ = _rows(term.target.views, one.views, on, term.title)
            if map_ is not None:
                there.append(term)
                rows.append(map_)
        if there:
            shape = _seen(one.views, on)
            yield _part(one, key, place.block if place else "?", shape, there, rows, how, copy)


@dataclass(frozen=True)
class _Rows:
    """How a module's matrix lies in a part's: with its axes swapped, and for each of the part's
    rows the row of the module, or -1; None for all in their order."""

    swapped: bool = False
    rows: Any = None


SAME = _Rows()


def _rows(theirs: tuple[View, ...], ours: tuple[View, ...], on: Shape, title: str) -> _Rows | None:
    """The way from a module's rows to a part's, both views of a tensor of shape `on`.

    None where they have no rows in common.
    """
    if theirs == ours:
        return SAME
    swapped = any(v.transpose for v in theirs) != any(v.transpose for v in ours)
    views = [v for v in (*theirs, *ours) if v.shape is not None]
    if any(v.shape[:1] != on[:1] for v in views if v.shape) or (swapped and views):
        raise Refusal(f"{title} lies in its tensor in a way that the other dialect cannot say")
    import numpy as np

    count = on[0] if on else 1

    def numbers(views: tuple[View, ...]) -> Any:
        ranges = [v.rows or (0, count) for v in views] or [(0, count)]
        return np.concatenate([np.arange(*r) for r in ranges])

    theirs_at, ours_at = numbers(theirs), numbers(ours)
    if swapped or (len(theirs_at) == len(ours_at) and (theirs_at == ours_at).all()):
        return _Rows(swapped)
    at = np.full(count, -1)
    at[theirs_at] = np.arange(len(theirs_at))
    found = at[ours_at]
    return _Rows(False, found) if (found >= 0).any() else None


def _seen(views: tuple[View, ...], on: Shape) -> Shape:
    if not views:
        return on
    shapes = [v.shape or (((v.rows[1] - v.rows[0]) if v.rows else on[0]), *on[1:]) for v in views]
    if views[0].transpose:
        return on[::-1]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def _shape(module: Module) -> Shape:
    """The shape of a module's weight as far as its factors tell."""
    shapes = module.shapes
    if "diff" in shapes:
        return shapes["diff"]
    rows, columns = module.size
    if "down" in shapes and rows:
        return (rows, *shapes["down"][1:2], *shapes.get("mid", shapes["down"])[2:])
    return (rows or 1, columns or 1)


def _part(
    one: Spelt,
    key: str,
    place: str,
    shape: Shape,
    group: Sequence[Term],
    rows: Sequence[_Rows],
    how: Dialect,
    copy: bool,
) -> Part:
    maps = list(rows) or [SAME] * len(group)
    infos = [info for term in group for info in term.module.factors.values()]
    part = Part(
        name=one.name,
        param=one.param,
        key=key if len(one.views) == 0 else f"{key} {one.name}",
        block=place,
        shape=shape,
        dtype=widest(info.dtype for info in infos),
        nbytes=sum(4 * info.numel for info in infos),
        change=lambda: _change(group, maps),
    )
    if copy:
        term = group[0]
        if len(group) == 1 and maps[0] is SAME:
            return replace(part, **_renamed(term, how))
        if dependent := [t for t in group if t.module.on_weight]:
            raise Refusal(
                f"{listed((t.title for t in dependent), 3)}: {how.title} has that weight in other"
                f" parts, and {_told(term.module)} cannot be taken apart"
            )
    return part


def widest(dtypes: Iterable[str]) -> str:
    found = min(dtypes, key=WIDEST.index)
    return {"F64": "F32", "F8_E4M3": "F16", "F8_E5M2": "F16"}.get(found, found)


def _check(parts: Sequence[Part], how: Dialect) -> None:
    seen: dict[tuple[str, str], Part] = {}
    for part in parts:
        other = seen.setdefault((part.name, part.param), part)
        if other is not part:
            raise Refusal(f"{part.name} would be there twice, for {part.key} and for {other.key}")


# --- numbers


def _change(group: Sequence[Term], maps: Sequence[_Rows]) -> Change:
    """The sum of what the terms add, in float32 factors."""
    import numpy as np

    found, whole = [], None
    for term, map_ in zip(group, maps, strict=True):
        module = term.module
        if module.on_weight:
            raise _dependent(term)
        weight = term.weight * module.scale
        if weight == 0:
            continue
        pair = _product(term)
        if pair is None:
            d = change(term.source, module) * term.weight
            d = _taken(d.T if map_.swapped else d, map_.rows)
            finite(d, term.title)
            whole = d if whole is None else whole + d
            continue
        up, down = (pair[1].T, pair[0].T) if map_.swapped else pair
        up = _taken(up, map_.rows)
        alone = len(group) == 1 and weight > 0
        up = up if alone else up * np.float32(weight)
        finite(up, term.title)
        finite(down, term.title)
        if alone:
            return Change(((up, down),), alpha=weight * up.shape[1])
        found.append((up, down))
    return Change(tuple(found), whole)


def finite(x: Any, what: str) -> None:
    """Raises Refusal for infinities or NaN in what `what` adds to a weight."""
    import numpy as np

    if not np.isfinite(x).all():
        raise Refusal(f"{what}: infinities or NaN in what it adds; see plymix check")


def _product(term: Term) -> tuple[Any, Any] | None:
    """The change of a module, but for its scale, as up @ down; None where it is none."""
    from plymix.adapters import lowrank
    from plymix.adapters.families.lora import core
    from plymix.methods.arrays import as_rows

    module = term.module
    if module.family not in ("LoRA", "LoHa", "LoKr") or "w2" in module.factors:
        return None
    got = {name: factor(term.source, module, name) for name in module.factors}
    x = {name: as_rows(array) for name, array in got.items()}

    def cored(a: str, b: str, t: str) -> tuple[Any, Any]:
        return (x[a].T, core(got[t], x[b])) if t in got else (x[a], x[b])

    if module.family == "LoRA":
        return x["up"], core(got["mid"], x["down"]) if "mid" in got else x["down"]
    if module.family == "LoHa":
        return lowrank.hadamard(cored("w1_a", "w1_b", "t1"), cored("w2_a", "w2_b", "t2"))
    w1 = x["w1"] if "w1" in got else x["w1_a"] @ x["w1_b"]
    return lowrank.kronecker(w1, cored("w2_a", "w2_b", "t2"))


def _taken(x: Any, rows: Any) -> Any:
    """Rows of a matrix by number; zeros for -1."""
    if rows is None:
        return x
    import numpy as np

    return np.where((rows >= 0)[:, None], x[rows], np.float32(0))


def _dependent(term: Term) -> Refusal:
    return Refusal(
        f"{term.title}: what {term.module.algorithm} changes depends on the weight, so it cannot be"
        " added to others or reduced; plymix lora bake puts it into a model, from which plymix lora"
        " extract makes a LoRA"
    )


# --- renaming


def _renamed(term: Term, how: Dialect) -> dict[str, Any]:
    """A module's own tensors by the ends that `how` has for them; {} where it has to be computed.

    Raises Refusal for what the dialect cannot say.
    """
    module = term.module
    lora = module.family == "LoRA"
    if how.only_lora and (not lora or (MAGNITUDE in module.factors and not _by_row(module))):
        raise Refusal(
            f"{how.title} knows LoRA only, and {term.title} is {_told(module)}; write kohya,"
            " lycoris or comfyui, or with --rank a LoRA that comes near it"
        )
    if lora and "mid" in module.factors and how.only_lora:
        return {}
    folded = module.scale if lora and how.only_lora else 1.0
    kept = []
    for name, info in module.factors.items():
        end = how.ends.get(name) if lora or name == MAGNITUDE else None
        shape = info.shape
        if name == MAGNITUDE:
            shape = (info.numel,) if how.ends is PEFT else _column(info)
        times = folded if name == "up" else 1.0
        if module.family == "full":
            times, end = module.scale, _difference(info.name, module)
        kept.append(Kept(end or info.name[len(module.name) :], term.source, info, shape, times))
    numbers: dict[str, float] = {}
    if module.rank and not how.only_lora:
        numbers[".alpha"] = module.scale * module.rank
    elif "constraint" in module.numbers:
        numbers[".alpha"] = module.numbers["constraint"]
    if "on_input" in module.numbers:
        numbers[".on_input"] = module.numbers["on_input"]
    return {"kept": tuple(kept), "numbers": numbers}


def _told(module: Module) -> str:
    return "a DoRA by columns" if module.algorithm == "DoRA" else module.algorithm


def _by_row(module: Module) -> bool:
    info = module.factors[MAGNITUDE]
    return info.numel == info.shape[0] == module.size[0]


def _column(info: TensorInfo) -> Shape:
    return (*info.shape, 1) if len(info.shape) == 1 else info.shape


def _difference(key: str, module: Module) -> str:
    """The end of a difference's key: LyCORIS' own kept, PEFT's replaced."""
    end = key[len(module.name) :]
    known = (".diff", ".diff_b", ".w_norm", ".b_norm")
    return end if end in known else (".diff_b" if module.param == "bias" else ".diff")
