"""The tensors of a result in diffusers' names: which there are, and what each is made of.

Canonical names go in, the names of a component's file come out, before them the component. Where
the base model has diffusers' names itself, its own spelling of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plymix.archs import Architecture
from plymix.archs.dialect_tables import table_for, tables
from plymix.archs.dialects import Shapes, View, written
from plymix.pairing import DIFFUSERS, Paired


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
    unwritten = {name: "diffusers has no such tensor" for name in shapes if name not in home}
    for component in dict.fromkeys(home.values()):
        found = written(arch, DIFFUSERS, component, shapes)
        for name, of in found.views.items():
            if of[0].key not in covered:
                views.setdefault(component, {})[name] = of
        unwritten.update((name, why) for name, why in found.unpaired.items() if name not in covered)
    return Respelling(views, unwritten)


def _known(arch: Architecture) -> list[str]:
    """The components of `arch` whose names in diffusers are known, in the order of its files."""
    return [component for owner, component in tables(DIFFUSERS) if owner == arch.name]


def _own(arch: Architecture, component: str, shapes: Shapes) -> list[str]:
    start = table_for(arch, DIFFUSERS, component, shapes).start
    return [name for name in shapes if name.startswith(start)]
