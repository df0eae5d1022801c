"""The tensors of a result in diffusers' names: which there are, and what each is made of.

Canonical names go in, the names of a component's file come out, before them the component. Where
the base model has diffusers' names itself, its own spelling of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from plymix.archs import Architecture, load, names
from plymix.archs.dialect_tables import table_for, tables
from plymix.archs.dialects import Part, Shapes, View, canonical, recognise, shape_of, written
from plymix.pairing import DIFFUSERS, Paired

NOT_THERE = f"{DIFFUSERS} has no such tensor"


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
    home = {name: component for component in _known(arch) for name in _own(arch, component, shapes)}
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
        for component in _known(arch):
            if component != arch.denoiser.name and (
                found_there := _own_file(arch, component, shapes)
            ):
                views = found_there if layout == "diffusers" else same
                return Part(arch, component), views
    return None


def _own_file(arch: Architecture, component: str, shapes: Shapes) -> dict[str, tuple[View, ...]]:
    """How diffusers has a file of `component` alone with its own names; {} for what is no such."""
    prefix = table_for(arch, DIFFUSERS, component, shapes).prefix
    full = {prefix + key: shape for key, shape in shapes.items()}
    found = written(arch, DIFFUSERS, component, full)
    foreign = [name for name, why in found.unpaired.items() if why == NOT_THERE]
    there = {name: shape_of(of, full) for name, of in found.views.items()}
    if foreign or Part(arch, component) not in recognise(there):
        return {}
    return {
        name: tuple(replace(view, key=view.key.removeprefix(prefix)) for view in of)
        for name, of in found.views.items()
    }


def _known(arch: Architecture) -> list[str]:
    """The components of `arch` whose names in diffusers are known, in the order of its files."""
    return [component for owner, component in tables(DIFFUSERS) if owner == arch.name]


def _own(arch: Architecture, component: str, shapes: Shapes) -> list[str]:
    start = table_for(arch, DIFFUSERS, component, shapes).start
    return [name for name in shapes if name.startswith(start)]
