"""Which tensors a model of an architecture must have: `missing(arch, keys)` names those it lacks.

The tables are in `expected.toml`, which explains how they are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

import msgspec

from plymix.archs.model import Architecture, decode, shared_facts

Highest = Callable[[str], int]
"""The highest number that the file has right after the start of a name; -1 for none."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`of` are its components ("sd1 vae")."""

    of: tuple[str, ...]
    keys: tuple[str, ...]


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`expected.toml`."""

    parts: dict[str, str]
    components: tuple[Table, ...]


@cache
def tables() -> dict[str, tuple[str, ...]]:
    """'sd1 vae' -> its rows, with <parts> written out."""
    found = decode(Path(__file__).with_name("expected.toml"), Tables)

    def written(row: str) -> str:
        while "<" in row:
            row = re.sub(r"<(\w+)>", lambda m: found.parts[m[1]], row)
        return row

    return {name: tuple(map(written, t.keys)) for t in found.components for name in t.of}


def missing(arch: Architecture, keys: Collection[str]) -> Iterator[str]:
    """Canonical names that a model with `keys` (canonical, too) lacks, component by component.

    A component without any key is not asked for more; nor is one that no table is known for.
    """
    for component in arch.components:
        prefix = (component.prefixes or shared_facts().prefixes)[0]
        own = {key[len(prefix) :] for key in keys if key.startswith(prefix)}
        if own:
            rows = tables().get(f"{arch.name} {component.name}", ())
            lost = dict.fromkeys(name for row in rows for name in _lacking(row, own))
            yield from (prefix + name for name in lost)


def _lacking(row: str, own: Collection[str]) -> list[str]:
    pattern = row.removeprefix("? ")
    names = list(expand(pattern, lambda start: highest(start, own)))
    lacking = [name for name in names if name not in own]
    return [] if row != pattern and len(lacking) == len(names) else lacking


def highest(start: str, keys: Collection[str]) -> int:
    """The highest number that follows `start` in any of `keys`; -1 for none."""
    ends = (key[len(start) :].partition(".")[0] for key in keys if key.startswith(start))
    return max((int(end) for end in ends if end.isdecimal()), default=-1)


def expand(pattern: str, highest: Highest = lambda _: -1, start: str = "") -> Iterator[str]:
    """The names that a pattern with braces stands for: 'a.{0..2}.{x,y}' -> 'a.0.x', 'a.0.y' ..."""
    open_ = pattern.find("{")
    if open_ < 0:
        yield start + pattern
        return
    start += pattern[:open_]
    close, commas, depth = open_, [open_], 0
    for at in range(open_, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 1 and pattern[at] == ",":
            commas.append(at)
        if depth == 0:
            close = at
            break
    inner, rest = pattern[open_ + 1 : close], pattern[close + 1 :]
    if numbers := re.fullmatch(r"(\d+)\.\.(-?\d*)", inner):
        last = numbers[2] if numbers[2] and numbers[2][0] != "-" else None
        stop = int(last) if last else highest(start) + int(numbers[2] or 0)
        choices = [str(i) for i in range(int(numbers[1]), stop + 1)]
    else:
        choices = [pattern[a + 1 : b] for a, b in zip(commas, [*commas[1:], close], strict=True)]
    for choice in choices:
        yield from expand(choice + rest, highest, start)
