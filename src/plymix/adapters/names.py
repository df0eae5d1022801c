"""Which tensor of a model a module of a LoRA means, whatever its file's spelling.

A module's name cannot be taken apart: "_" stands for "." and for itself. So all names that the
model's own tensors may have are written down, and looked up; see `names.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import msgspec

from plymix.adapters.files import Module
from plymix.archs import Architecture
from plymix.archs.dialect_tables import tables
from plymix.archs.dialects import View, shape_of, written
from plymix.archs.model import shared_facts
from plymix.errors import Refusal

DIFFUSERS = "diffusers"

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Target:
    """The weight that a module changes: the canonical tensor `key`, or parts of it.

    The module's weight, of shape `shape`, is `views` of the tensor, one after the other along axis
    0; none stand for the whole tensor as it is.
    """

    key: str
    shape: Shape
    views: tuple[View, ...] = ()


class _Spellings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`names.toml`."""

    denoiser: tuple[str, ...]
    text_encoders: dict[int, tuple[str, ...]]
    encoders: dict[str, tuple[str, ...]]
    also: dict[str, str]
    modules: dict[str, dict[str, str]]


@cache
def spellings() -> _Spellings:
    text = (Path(__file__).parent / "names.toml").read_bytes()
    return msgspec.toml.decode(text, type=_Spellings, strict=False)


def plain(name: str) -> str:
    """A name with nothing in it that spellings differ by."""
    return name.replace(".", "_")


class Names:
    """All names by which LoRA files may call the tensors of a model.

    `shapes` are the model's tensors by canonical key.
    """

    def __init__(self, arch: Architecture, shapes: Shapes) -> None:
        self.arch = arch
        self.shapes = shapes
        self._parts = [
            (tuple(map(plain, starts)), targets)
            for starts, targets in (_denoiser(arch, shapes), *_encoders(arch, shapes))
        ]
        self._own = {plain(key): Target(key, shape) for key, shape in shapes.items()}

    def find(self, module: Module) -> Target | None:
        """What `module` changes; None for nothing in this model."""
        full = plain(f"{module.name}.{module.param}" if module.param else module.name)
        found = self._find(full)
        if found is None and module.param == "weight":  # a parameter that is no module's weight
            found = self._find(plain(module.name))
        return found

    def _find(self, full: str) -> Target | None:
        for starts, targets in self._parts:
            for start in starts:
                if full.startswith(start) and (target := targets.get(full[len(start) :])):
                    return target
        return self._own.get(full)


def check_once(source: str, pairs: Iterable[tuple[Module, Target | None]]) -> None:
    """Raises Refusal for a file that changes one weight twice, under two names."""
    seen: dict[tuple[str, tuple[View, ...]], Module] = {}
    for module, target in pairs:
        if target is not None and module is not (
            other := seen.setdefault((target.key, target.views), module)
        ):
            raise Refusal(
                f"{source} changes {target.key} twice, as {other.name} and as {module.name}: two"
                " adapters are in it; save them apart"
            )


def component(arch: Architecture, module: Module) -> str:
    """The component that a module's name says it is for, told from its start; "" if it does not."""
    name = plain(module.name)
    for number, kind in enumerate(text_encoders(arch), 1):
        if name.startswith(tuple(map(plain, _starts(arch, kind, number)))):
            return kind
    starts = [plain(start) for start in spellings().denoiser if start]
    return arch.denoiser.name if name.startswith(tuple(starts)) else ""


Named = tuple[tuple[str, ...], dict[str, Target]]
"""What names begin with, and the targets by the rest."""


def _denoiser(arch: Architecture, shapes: Shapes) -> Named:
    prefix = shared_facts().prefixes[0]
    own = {key[len(prefix) :]: key for key in shapes if key.startswith(prefix)}
    targets = {plain(name): Target(key, shapes[key]) for name, key in own.items()}
    for name, target in dialect(arch, arch.denoiser.name, shapes):
        for spelt in _also(name):
            targets.setdefault(plain(spelt), target)
    for theirs, ours in spellings().modules.get(arch.name, {}).items():
        targets.update(_renamed(theirs, ours, own, shapes))
    return spellings().denoiser, targets


def _encoders(arch: Architecture, shapes: Shapes) -> Iterator[Named]:
    for number, kind in enumerate(text_encoders(arch), 1):
        prefix = next(c.prefixes[0] for c in arch.components if c.name == kind)
        targets: dict[str, Target] = {}
        for key, shape in shapes.items():
            if key.startswith(prefix):  # in transformers' names, for encoders of no other
                rest = key[len(prefix) :].partition("transformer.")[2] or key[len(prefix) :]
                for name in (rest, rest.removeprefix("model.")):
                    targets.setdefault(plain(name), Target(key, shape))
        for name, target in dialect(arch, kind, shapes):
            for spelt in (name, name.removeprefix("text_model.")):
                targets[plain(spelt)] = target
        yield _starts(arch, kind, number), targets


def text_encoders(arch: Architecture) -> list[str]:
    return [c.name for c in arch.components if c.name.startswith("text_encoder")]


def _starts(arch: Architecture, kind: str, number: int) -> tuple[str, ...]:
    """What the names of a text encoder's modules begin with."""
    block = next(c.block for c in arch.components if c.name == kind)
    known = spellings()
    special = (known.encoders.get(name, ()) for name in (block.split()[-1], f"{arch.name} {kind}"))
    return (*known.text_encoders.get(number, ()), *(start for found in special for start in found))


def dialect(arch: Architecture, kind: str, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    """The tensors of a component by the names that diffusers or transformers give them."""
    start = next(
        (c.prefixes[0] for c in arch.components if c.name == kind and c.prefixes),
        shared_facts().prefixes[0],
    )
    for (owner, theirs), home in tables(DIFFUSERS).items():
        if owner == arch.name and home.prefix.startswith(start):
            own = {key: shape for key, shape in shapes.items() if key.startswith(start)}
            for name, views in written(arch, DIFFUSERS, theirs, own).views.items():
                whole = len(views) == 1 and views[0] == View(views[0].key)
                yield name, Target(views[0].key, shape_of(views, shapes), () if whole else views)


def _also(name: str) -> Iterator[str]:
    """A name of diffusers, and its other spellings."""
    found = [name]
    for one, other in spellings().also.items():
        found += [spelt.replace(one, other) for spelt in found if one in spelt]
    yield from found


def _renamed(
    theirs: str, ours: str, own: Mapping[str, str], shapes: Shapes
) -> Iterator[tuple[str, Target]]:
    """Modules with names of their own, for each number that `{i}` is in the model."""
    share, _, ours = ours.rpartition(" ")
    pattern = re.compile(re.escape(ours).replace(r"\{i\}", "([0-9]+)") + r"\.(weight|bias)")
    for name, key in own.items():
        if match := pattern.fullmatch(name):
            target = Target(key, shapes[key])
            if share:
                rows = int(shapes[key][0] * Fraction(share))
                shape = (rows, *shapes[key][1:])
                target = replace(target, shape=shape, views=(View(key, (0, rows)),))
            yield plain(f"{theirs.replace('{i}', match[1])}.{match[2]}"), target
