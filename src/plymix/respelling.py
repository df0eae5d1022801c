"""The tensors of a result in diffusers' names: which there are, and what each is made of.

Canonical names go in, the names of a component's file come out, before them the component. Where
the base model has diffusers' names itself, its own spelling of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from plymix.archs import Architecture, load, names
from plymix.archs.dialect_tables import table_for, tables
from plymix.archs.dialects import Part, Shapes, View, canonical, recognise, shape_of, written
from plymix.pairing import DIFFUSERS, Paired

NOT_THERE = f"{DIFFUSERS} has no such tensor"

NAMES_KEY = "plymix.names"
"""Where a result in diffusers' names says by which `habits` the base model's file had its own."""

MOST_HABITS = 64
"""More rules than this are no habits of a tool but names that someone made up."""


@dataclass(frozen=True)
class Respelling:
    """`views` says what makes up each tensor of each component, by its name there.

    `unwritten` are the canonical names that diffusers has no tensor for, and why.
    """

    views: Mapping[str, Mapping[str, tuple[View, ...]]]
    unwritten: Mapping[str, str]


def in_diffusers(arch: Architecture, shapes: Shapes, base: Paired) -> Respelling:
    """How diffusers spells tensors of `arch` with these canonical names and shapes.

    Raises Refusal for shapes that cannot be what their names say.
    """
    views: dict[str, dict[str, tuple[View, ...]]] = {}
    home = {
        name: component for component in components(arch) for name in _own(arch, component, shapes)
    }
    covered: set[str] = set()
    if base.dialect == DIFFUSERS:
        for key, of in base.spelling.items():
            if of[0].key in shapes:
                component, _, name = (
                    key.partition("/") if base.folder else (home[of[0].key], "", key)
                )
                views.setdefault(component, {})[name] = of
                covered.add(of[0].key)
    unwritten = {name: NOT_THERE for name in shapes if name not in home}
    for component in dict.fromkeys(home.values()):
        found = written(arch, DIFFUSERS, component, shapes)
        for name, of in found.views.items():
            if of[0].key not in covered:
                views.setdefault(component, {})[name] = of
        unwritten.update((name, why) for name, why in found.unpaired.items() if name not in covered)
    return Respelling(views, unwritten)


def habits(names: Mapping[str, str], arch: Architecture) -> dict[str, str]:
    """What a file writes for starts ("vae.") and ends ("*norm.scale") of canonical names.

    `names` says what it calls each. Nothing for names that do not follow from a few such rules;
    those of the denoiser's start are said where only it tells them from diffusers' names.
    """
    rules: dict[str, str] = {}
    for key, name in names.items():
        ours, theirs = key.split("."), name.split(".")
        if ours[-1] != theirs[-1]:
            rules["*" + ".".join(ours[-2:])] = "*" + ".".join(theirs[-2:])
            del ours[-2:], theirs[-2:]
        while ours and theirs and ours[-1] == theirs[-1]:
            del ours[-1], theirs[-1]
        if ours or theirs:
            rules["".join(f"{word}." for word in ours)] = "".join(f"{word}." for word in theirs)
        if len(rules) > MOST_HABITS:
            return {}
    home = tables(DIFFUSERS).get((arch.name, arch.denoiser.name))
    if not rules and home and home.file.same:
        rules[home.prefix] = home.prefix
    found = dict(sorted(rules.items(), key=lambda rule: (-len(rule[0]), rule[0])))
    return found if all(habitual(found, key) == name for key, name in names.items()) else {}


def habitual(habits: Mapping[str, str], key: str) -> str:
    """The canonical `key` as a file with these `habits` calls it."""
    ends = ((old[1:], new[1:]) for old, new in habits.items() if old[:1] == "*")
    starts = ((old, new) for old, new in habits.items() if old[:1] != "*")
    old, new = next(((old, new) for old, new in ends if key.endswith(old)), ("", ""))
    name = key.removesuffix(old) + new
    old, new = next(((old, new) for old, new in starts if key.startswith(old)), ("", ""))
    return new + name.removeprefix(old)


def remembered(metadata: Mapping[str, str]) -> dict[str, str]:
    """The habits that a file in diffusers' names had before, as its metadata says; {} for none."""
    try:
        said = msgspec.json.decode(metadata.get(NAMES_KEY, "{}"), type=dict[str, str])
    except (msgspec.DecodeError, RecursionError):
        return {}
    return said if len(said) <= MOST_HABITS else {}


def lone(shapes: Shapes, layout: str) -> tuple[Part, Mapping[str, tuple[View, ...]]] | None:
    """A component's own file in `layout`: what it is, and the views of its tensors there.

    For a VAE or text encoder with these names and shapes, in either layout; None for other files.
    Where several architectures share it, the first; one that has other names before one that has
    diffusers' for its own.
    """
    same: dict[str, tuple[View, ...]] = {key: (View(key),) for key in shapes}
    parts = recognise(shapes)
    if parts and layout == "diffusers":
        return parts[0], same
    own: list[tuple[Part, Mapping[str, tuple[View, ...]]]] = []
    for part in parts:
        found = canonical(part.arch, DIFFUSERS, part.component, shapes)
        prefix = table_for(part.arch, DIFFUSERS, part.component, shapes).prefix
        if not found.unpaired and layout in ("ldm", part.arch.layout):
            views = {name.removeprefix(prefix): of for name, of in found.views.items()}
            own.append((part, views))
    if own:
        return next((each for each in own if each[1].keys() != same.keys()), own[0])
    for arch in map(load, names()):
        for component in components(arch):
            if component != arch.denoiser.name and (
                found_there := _own_file(arch, component, shapes)
            ):
                views = found_there if layout == "diffusers" else same
                return Part(arch, component), views
    return None


def _own_file(arch: Architecture, component: str, shapes: Shapes) -> dict[str, tuple[View, ...]]:
    """How diffusers has a file of `component` alone with its own names; {} for what is no such.

    They may have before them what they have in a checkpoint.
    """
    prefix = table_for(arch, DIFFUSERS, component, shapes).prefix
    keys = {prefix + key: key for key in shapes}
    for home, *others in (c.prefixes for c in arch.components if c.prefixes):
        for held in (home, *others) if prefix.startswith(home) else ():
            if all(key.startswith(held) for key in shapes):
                keys = {home + key.removeprefix(held): key for key in shapes}
    full = {name: shapes[key] for name, key in keys.items()}
    found = written(arch, DIFFUSERS, component, full)
    foreign = [name for name, why in found.unpaired.items() if why == NOT_THERE]
    there = {name: shape_of(of, full) for name, of in found.views.items()}
    if foreign or Part(arch, component) not in recognise(there):
        return {}
    return {
        name: tuple(replace(view, key=keys[view.key]) for view in of)
        for name, of in found.views.items()
    }


def components(arch: Architecture) -> list[str]:
    """The components of `arch` whose names in diffusers are known, in the order of its files."""
    return [component for owner, component in tables(DIFFUSERS) if owner == arch.name]


def _own(arch: Architecture, component: str, shapes: Shapes) -> list[str]:
    start = table_for(arch, DIFFUSERS, component, shapes).start
    return [name for name in shapes if name.startswith(start)]
