"""A LoRA file and a model -> what it changes there; every refusal of one that does not fit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from plymix.adapters.families.dora import Norm
from plymix.adapters.files import Adapter, Module, read
from plymix.adapters.names import Names, Target, check_once, component
from plymix.adapters.placing import placed
from plymix.archs import Architecture
from plymix.errors import Refusal, amount, listed
from plymix.expr import Delta, Expr
from plymix.formats.base import Source

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

SNIFFED = 1 << 20
"""Bytes from a file's start that tell it from others: its header and first numbers."""


@dataclass(frozen=True)
class Model:
    """What a LoRA is to be applied to: its tensors by canonical key. `named` and `label` are for
    people, `given` says whose the components are that come whole from another file."""

    arch: Architecture
    shapes: Shapes
    label: str
    named: str
    given: Mapping[str, str]


@dataclass(frozen=True)
class Applied:
    """An adapter, and the modules of it that change each of a model's tensors.

    `order` places it among others whatever the recipe's order. `dropped` and `unmatched` are the
    file's keys that change nothing, the former by the rule that says why.
    """

    adapter: Adapter
    index: int
    order: str
    at: Mapping[str, tuple[tuple[Module, Target], ...]]
    dropped: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    def deltas(self, key: str, shape: Shape, of: Expr, norm: Norm) -> Iterator[Delta]:
        """What it adds, at strength 1, to the tensor `key`, which is `of` and has `shape`."""
        for module, target in self.at.get(key, ()):
            yield placed(module, _fitted(target, shape), shape, self.index, of, norm)


def apply_to(source: Source, index: int, model: Model) -> Applied:
    """The LoRA `source`, input number `index`, on `model`.

    Raises Refusal for what is no LoRA, for one made for another architecture, for shapes that do
    not fit, and where nothing matches.
    """
    adapter = read(source)
    names = Names(model.arch, model.shapes)
    at: dict[str, list[tuple[Module, Target]]] = {}
    dropped: dict[str, list[str]] = {}
    lost: list[Module] = []
    targets = [names.find(module) for module in adapter.modules]
    check_once(source.path.name, zip(adapter.modules, targets, strict=True))
    for module, target in zip(adapter.modules, targets, strict=True):
        if target is None:
            part = component(model.arch, module)
            if part and not any(_in(model.arch, part, key) for key in model.shapes):
                dropped.setdefault(f"{model.label} has no {part}", []).extend(module.keys)
            else:
                lost.append(module)
            continue
        target = _with_channels(module, target, model.arch)
        _check_shape(module, target, adapter, model)
        place = model.arch.place(target.key)
        if place is not None and place.component in model.given:
            why = f"{place.component} is {model.given[place.component]}'s"
            dropped.setdefault(why, []).extend(module.keys)
            continue
        at.setdefault(target.key, []).append((module, target))
    name = source.path.name
    theirs = adapter.detection.arch
    if not at or (lost and theirs not in (None, model.arch)):
        raise _nothing(adapter, model, [m.name for m in lost])
    notes = list(_said_beside(adapter))
    if lost:
        notes.append(
            f"{name}: {len(lost)} of {len(adapter.modules)} modules match nothing in"
            f" {model.label}: {listed(m.name for m in lost)}"
        )
    for why, keys in (*dropped.items(), *adapter.others.items()):
        notes.append(f"{name}: {amount(len(keys))} left out: {why}: {listed(keys, 3)}")
    embeddings = {why: keys for why, keys in adapter.others.items() if "embedding" in why}
    unknown = [key for why in adapter.others.keys() - embeddings for key in adapter.others[why]]
    return Applied(
        adapter=adapter,
        index=index,
        order=_digest(source),
        at={key: tuple(found) for key, found in at.items()},
        dropped={why: tuple(keys) for why, keys in dropped.items()} | embeddings,
        unmatched=(*(key for module in lost for key in module.keys), *unknown),
        notes=tuple(notes),
    )


def _said_beside(adapter: Adapter) -> Iterator[str]:
    """What PEFT's configuration beside a file says of alpha, which the file itself does not tell.

    A second file is no part of the recipe, so it is told and not used. PEFT scales its LoKr even
    where both factors are whole.
    """
    scaled = [m for m in adapter.modules if (m.rank or m.family == "LoKr")
              and m.alpha is None and m.scale == 1]  # fmt: skip
    beside = adapter.source.path.with_name("adapter_config.json")
    if not scaled or not beside.is_file():
        return
    try:
        said = json.loads(beside.read_text("utf-8"))
        alpha = float(said["lora_alpha" if "lora_alpha" in said else "alpha"])
        rank = float(said["r"])
        factor = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError):
        return
    if factor != 1:
        yield (
            f"{adapter.source.path.name} tells no alpha and is taken with alpha = rank;"
            f" {beside.name} beside it says {factor:g} times as much: multiply its strength by"
            f" {factor:g}"
        )


def _in(arch: Architecture, part: str, key: str) -> bool:
    place = arch.place(key)
    return place is not None and place.component == part


def _nothing(adapter: Adapter, model: Model, names: list[str]) -> Refusal:
    name, theirs = adapter.source.path.name, adapter.detection.arch
    if theirs not in (None, model.arch):
        return Refusal(
            f"{name} is {adapter.detection.named} and {model.label} is {model.named}: they do not"
            f" fit; choose a LoRA made for {model.arch.short}"
        )
    named = f" ({listed(names, 3)})" if names else ""
    return Refusal(
        f"none of the {len(adapter.modules)} modules of {name}{named} is in {model.label}, which is"
        f" {model.named}: nothing would change; choose a LoRA made for it"
    )


def _with_channels(module: Module, target: Target, arch: Architecture) -> Target:
    """For the input convolution, which may be wider than the one a LoRA was made for."""
    columns = module.size[1]
    if target.key != arch.input_conv or columns is None or len(target.shape) < 2:
        return target
    kernel = math.prod(target.shape[2:])
    if columns % kernel or target.views:
        return target
    return replace(target, shape=(target.shape[0], columns // kernel, *target.shape[2:]))


def _check_shape(module: Module, target: Target, adapter: Adapter, model: Model) -> None:
    shape = target.shape
    wanted = (shape[0] if shape else 1, math.prod(shape[1:]))
    fits = all(n in (None, w) for n, w in zip(module.size, wanted, strict=True))
    known = model.shapes[target.key]
    if fits and target.key == model.arch.input_conv and shape[1:2] > known[1:2]:
        fits = False
    if not fits:
        if adapter.detection.arch not in (None, model.arch):
            raise _nothing(adapter, model, [])
        made = " x ".join("any" if n is None else str(n) for n in module.size)
        of = adapter.detection.named
        raise Refusal(
            f"{adapter.source.path.name}: {module.name} changes a weight of {made}; in"
            f" {model.label} it is {' x '.join(map(str, wanted))} ({target.key}): {of} does not fit"
            f" {model.named}"
        )


def _fitted(target: Target, shape: Shape) -> Target:
    """The target in a model whose tensor has another shape: 1x1 convolution or linear layer."""
    same = [n for n in target.shape if n != 1] == [n for n in shape if n != 1]
    return replace(target, shape=shape) if same and not target.views else target


def _digest(source: Source) -> str:
    handle = source.handles[0]
    data = bytearray(min(SNIFFED, handle.size))
    handle.read_at(0, data)
    return hashlib.sha256(data).hexdigest()
