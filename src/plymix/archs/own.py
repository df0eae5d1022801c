"""An architecture that a user describes, in a file of the kind that plymix has in `data/`.

    arch = architecture(read(Path("my-model.toml")))

A recipe carries the table that `read` gives, so it stays complete without the file. Everything in
it is checked here, for it may come with a stranger's model: nothing it says can cost time or memory
that its size does not explain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from plymix import texts
from plymix.archs.model import Architecture, Rule, expanded, names, shared_facts
from plymix.archs.views import CLASSIC
from plymix.errors import FormatError, Refusal, listed

LARGEST = 1 << 20
"""Bytes of a description, at most; plymix's own have up to 4000."""

MOST = 2000
"""Block names, and rows of a component, that a description may have at most."""

RESERVED = ("BASE", "VAE", "EMA", "BUFFER")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")
_RANGE = re.compile(r"([A-Za-z][A-Za-z_]{0,31}?)([0-9]{1,4})\.\.\1([0-9]{1,4})")
_TARGET = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\{i(:0[1-4])?\})?( [A-Za-z][A-Za-z0-9_]*)?")


def read(path: Path) -> dict[str, Any]:
    """The description in the file `path` as a table, with its name: the file's, if it says none.

    Raises Refusal in one line with the file and the field.
    """
    raw = texts.read(path, "the architecture", LARGEST)
    try:
        table = msgspec.toml.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise FormatError(f"{path.name} is not TOML: {str(e).splitlines()[0]}") from None
    table = {"name": path.stem, **table}
    architecture(table, path.name)
    return table


def architecture(table: Mapping[str, Any], where: str = "") -> Architecture:
    """The architecture that a table describes, checked. Raises Refusal naming file and field."""
    where = where or f"the architecture {table.get('name', 'without a name')!r}"
    try:
        _ranges(table)
        found = msgspec.convert(expanded(dict(table)), Architecture, str_keys=True)
    except msgspec.ValidationError as e:
        text, _, at = str(e).partition(" - at `$.")
        raise FormatError(f"{where}: {at.rstrip('`') + ': ' if at else ''}{_told(text)}") from None
    except _Wrong as e:
        raise FormatError(f"{where}: {e}") from None
    problem = next(problems(found), "")
    if problem:
        raise FormatError(f"{where}: {problem}")
    if found.name in names():
        raise Refusal(
            f"{where}: name: plymix has an architecture {found.name!r} of its own;"
            ' rename the file, or write name = "..."'
        )
    return found


class _Wrong(Exception):
    """What is wrong with a field, before its table can be converted."""


def _told(text: str) -> str:
    """msgspec's words in ours: 'Object missing required field `x`' -> 'x is missing'."""
    for pattern, said in (
        (r"Object missing required field `(.+)`", r"\1 is missing"),
        (r"Object contains unknown field `(.+)`", r"there is no field \1"),
        (r"Expected `(.+)`, got `(.+)`", r"\1 is expected, not \2"),
    ):
        if re.fullmatch(pattern, text):
            return re.sub(pattern, said, text)
    return text


def _ranges(table: Mapping[str, Any]) -> None:
    """Refuse block names and ranges that `expanded` would misread. Raises _Wrong."""
    fields = {"blocks": table.get("blocks", [])}
    for kind in ("lists", "lora_lists"):
        lists = table.get(kind, {})
        if not isinstance(lists, Mapping):
            raise _Wrong(f"{kind}: a table is expected: [{kind}]")
        fields |= {f"{kind}.{n}": value for n, value in lists.items()}
    views = table.get("views", {})
    if not isinstance(views, Mapping) or not all(isinstance(v, Mapping) for v in views.values()):
        raise _Wrong("views: tables are expected: [views.comfyui]")
    fields |= {f"views.{tool}.blocks": view.get("blocks", []) for tool, view in views.items()}
    total = 0
    for field, value in fields.items():
        if not isinstance(value, (list, tuple)):
            raise _Wrong(f'{field}: a list of names is expected: ["IN", "B00..B27", "OUT"]')
        for name in value:
            span = isinstance(name, str) and _RANGE.fullmatch(name)
            if not (span or (isinstance(name, str) and _NAME.fullmatch(name))):
                raise _Wrong(f"{field}: {name!r} is neither a name like M00 nor a range B00..B27")
            if span and (len(span[2]) != len(span[3]) or int(span[2]) > int(span[3])):
                raise _Wrong(f"{field}: the range {name!r} does not rise")
            total += 1 + int(span[3]) - int(span[2]) if span else 1
            if total > MOST:
                raise _Wrong(f"{field}: there are more than {MOST} names of blocks")


def problems(arch: Architecture) -> Iterator[str]:
    """What is wrong with an architecture: 'field: what'. Nothing for plymix's own."""
    if not _NAME.fullmatch(arch.name.replace("-", "_").replace(".", "_")):
        yield f'name: {arch.name!r} is not usable; write name = "..." with letters and digits'
    yield from _blocks(arch)
    yield from _components(arch)
    known = {*arch.blocks, *arch.outside, *RESERVED}
    for kind, lists in (("lists", arch.lists), ("lora_lists", arch.lora_lists)):
        for n, names_ in lists.items():
            if len(names_) != n:
                yield f"{kind}.{n}: it names {len(names_)} blocks"
            if strange := [name for name in names_ if name not in known]:
                yield f"{kind}.{n}: {listed(strange, 3)} is no block"
    yield from _views(arch)
    rules = [(f"detect[{i}]", rule.keys) for i, rule in enumerate(arch.detect)]
    rules += [(f"variants[{i}]", v.keys) for i, v in enumerate(arch.variants)]
    rules += [(f"lora[{i}]", rule.keys) for i, rule in enumerate(arch.lora)]
    if not arch.detect:
        yield "detect: no rule tells its files; write [[detect]] and [detect.keys]"
    for field, keys in rules:
        yield from _conditions(field, keys)
    if arch.input_conv and not _in_denoiser(arch, arch.input_conv):
        yield f"input_conv: {arch.input_conv!r} lies in no block of the denoiser"


def _blocks(arch: Architecture) -> Iterator[str]:
    if not arch.blocks:
        yield "blocks: it names none"
    seen: set[str] = set()
    for name in arch.blocks:
        if name.upper() in RESERVED:
            yield f"blocks: {name} is plymix's own name"
        if name.upper() in seen:
            yield f"blocks: {name} stands there twice"
        seen.add(name.upper())


def _components(arch: Architecture) -> Iterator[str]:
    if not arch.components:
        yield "components: it names none; the first is the denoiser"
        return
    seen: set[str] = set()
    for i, part in enumerate(arch.components):
        field = f"components[{i}]"
        if part.name in seen or part.name in ("ema", "extra", ""):
            yield f"{field}.name: {part.name!r} is taken or empty"
        seen.add(part.name)
        if len(part.blocks) > MOST:
            yield f"{field}.blocks: it has more than {MOST} rows"
        for template, target in part.blocks.items():
            if not _TARGET.fullmatch(target):
                yield f"{field}.blocks: {target!r} is not BLOCK, B{{i:02}} or BLOCK PART"
            elif "{i" in target and "{i}" not in template:
                yield f"{field}.blocks: {template!r} has no {{i}} for the block {target}"
        if part.block and not _TARGET.fullmatch(part.block):
            yield f"{field}.block: {part.block!r} is not BLOCK or BLOCK PART"
        if i and not part.prefixes:
            yield f"{field}.prefixes: what do the keys of {part.name} begin with?"
        if i and not (part.block or part.blocks):
            yield f'{field}.block: in which block are its keys? block = "BASE" for a text encoder'
        if any(not prefix.endswith(".") for prefix in part.prefixes):
            yield f"{field}.prefixes: a prefix ends with a dot"
    yield from _denoiser(arch)


def _denoiser(arch: Architecture) -> Iterator[str]:
    part = arch.denoiser
    if part.block or not part.blocks:
        yield f"components[0].blocks: the denoiser ({part.name}) says which key is in which block"
    used: set[str] = set()
    for target in dict.fromkeys(part.blocks.values()):
        pattern = _named(target)
        found = [block for block in arch.blocks if pattern.fullmatch(block)]
        used.update(found)
        if not found:
            template = next(key for key, to in part.blocks.items() if to == target)
            yield f"components[0].blocks: {template!r} goes to {target}, which is not in blocks"
    if lone := [block for block in arch.blocks if block not in used]:
        yield f"blocks: no key of components[0].blocks goes to {listed(lone, 3)}"


def _named(target: str) -> re.Pattern[str]:
    """The block names that a target gives: 'B{i:02} X' -> B followed by two digits or more."""
    stem, _, number = target.split(" ")[0].partition("{i")
    digits = f"[0-9]{{{number[2:3]},}}" if number.startswith(":") else "[0-9]+"
    return re.compile(re.escape(stem) + (digits if number else ""))


def _views(arch: Architecture) -> Iterator[str]:
    """A view moves what there is; its blocks may have a name that no tensor has, as its tool's."""
    tools = [tool for tool in shared_facts().views if tool != CLASSIC]
    names_ = {*arch.blocks, *arch.parts}
    for tool, view in arch.views.items():
        if tool not in tools:
            yield f"views.{tool}: there is no such tool; known: {', '.join(tools)}"
        strange = [part for part in view.moves if part not in names_]
        strange += [to for to in view.moves.values() if to not in {*names_, *RESERVED}]
        if strange:
            yield f"views.{tool}: {listed(strange, 3)} is neither a block nor a part"
        if len(set(view.blocks)) < len(view.blocks):
            yield f"views.{tool}.blocks: a name stands there twice"


def _conditions(field: str, keys: Mapping[str, bool | list[int | str]]) -> Iterator[str]:
    if not keys:
        yield f"{field}.keys: it names no key"
    for key, want in keys.items():
        if not key or key.count("*") > 3:
            yield f"{field}.keys: {key!r} has more than three * or nothing in it"
        if isinstance(want, list):
            for size in want:
                if isinstance(size, str) and not re.fullmatch(r"\*|![0-9]+", size):
                    yield f'{field}.keys.{key}: {size!r} is not a number, "*" or "!768"'
    if field.startswith("detect") and all(want is False for want in keys.values()):
        yield f"{field}.keys: it names no key that must be there"


def _in_denoiser(arch: Architecture, key: str) -> bool:
    place = arch.place(key)
    return place is not None and place.component == arch.denoiser.name


def missing(arch: Architecture, keys: Mapping[str, Any]) -> str:
    """What a file with `keys` lacks of the first rule of `arch`; "" where shapes must differ."""
    rule: Rule = arch.detect[0]
    wanted = (key for key, want in rule.keys.items() if want is not False and "*" not in key)
    return next((w for w in wanted if not any(key.endswith(w) for key in keys)), "")
