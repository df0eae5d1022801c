"""The tables behind `plymix.archs.dialects`: whose names are which.

One file in `diffusers/` per kind of component. Its rows are canonical name = name in the dialect:

    "input_blocks.{3*l+j+1}.0.<resnet>" = "down_blocks.{l}.resnets.{j}.<resnet>"

A name with a dot at its end stands for all that begin so. {...} is a number, {last} the highest one
there is; <resnet> stands for each row of [parts.resnet]. Where two names fit a key, the one with
more words and fewer numbers wins. A word before the dialect's name says how its tensor differs:

    "swap x."        the halves of its axis 0 are exchanged
    "transpose x"    its two axes are
    "1x1 x."         it is a matrix where the canonical tensor is a 1x1 convolution
    "fold6 x."       it has six rows, which the canonical tensor has in a line
    ["q.", "k.", "4 m."]   together, one after the other along axis 0, they are the canonical
                           tensor; m has four times the rows of q

[prefixes] says whose table it is ("sdxl vae") and what stands before its canonical names, [aliases]
what else a name of the dialect may begin with, [unwritten] which canonical names the dialect leaves
out and why, and [keys] what a file of the kind is known by (see `plymix.archs.detection`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, Union

import msgspec

from plymix.archs.model import Architecture, decode, load, shared_facts
from plymix.errors import Refusal, listed, unknown

_HERE = Path(__file__).parent
DIALECTS = ("diffusers",)
"""The dialects there are tables of, each a folder here."""

_INTEGER = re.compile(r"0|[1-9][0-9]{0,3}")


# --- names


class Number(NamedTuple):
    """A number in a name: the sum of factor * variable, and `plus`; largest factors first."""

    terms: tuple[tuple[int, str], ...]
    plus: int

    @classmethod
    def parse(cls, text: str) -> Number:
        """'3*l+j+1' or '3-l'."""
        terms, plus = [], 0
        for sign, factor, what in re.findall(r"([+-]?)(?:([0-9]+)\*)?([a-z]+|[0-9]+)", text):
            value = int(f"{sign}{factor or 1}")
            if what.isdigit():
                plus += value * int(what)
            else:
                terms.append((value, what))
        return cls(tuple(sorted(terms, key=lambda term: -abs(term[0]))), plus)

    def at(self, values: Mapping[str, int]) -> int | None:
        """The number for these values; None if it is not one that `solve` gives them for."""
        n = self.plus + sum(factor * values[name] for factor, name in self.terms)
        found = self.solve(n)
        return n if found and all(values[name] == v for name, v in found.items()) else None

    def solve(self, n: int) -> dict[str, int] | None:
        """The variables' values for the number `n`, each less than the next larger factor."""
        rest, values = n - self.plus, {}
        for factor, name in self.terms:
            values[name], rest = divmod(rest, factor)
            if values[name] < 0:
                return None
        return values if n >= 0 and rest == 0 else None


@dataclass(frozen=True, slots=True)
class Name:
    """A name, or with `start` all that begin with it; its words stand between dots."""

    words: tuple[str | Number, ...]
    start: bool

    @classmethod
    def parse(cls, template: str) -> Name:
        *words, last = template.split(".")
        words += [last] if last else []
        return cls(tuple(Number.parse(w[1:-1]) if w[:1] == "{" else w for w in words), not last)

    def fill(self, hit: Hit) -> str | None:
        """The name with the values of `hit`; None where it has no number for them."""
        out: list[str] = []
        for word in self.words:
            if isinstance(word, Number):
                n = word.at(hit.values)
                if n is None:
                    return None
                word = str(n)
            out.append(word)
        return ".".join((*out, *hit.rest))


@dataclass(frozen=True, slots=True)
class Row:
    """A canonical name and the names in the dialect of what makes it up.

    `how` is "", "swap", "transpose", "1x1" or "fold" and a number; `shares` are the parts' relative
    numbers of rows. `unwritten` says why the dialect has no such tensor, if it has none.
    """

    name: Name
    parts: tuple[Name, ...] = ()
    how: str = ""
    shares: tuple[int, ...] = ()
    unwritten: str = ""

    @classmethod
    def parse(cls, name: str, targets: Iterable[str]) -> Row:
        words, _, names = zip(*(text.rpartition(" ") for text in targets), strict=True)
        shares = tuple(int(word) if word.isdigit() else 1 for word in words)
        how = "" if words[0].isdigit() else words[0]
        return cls(Name.parse(name), tuple(map(Name.parse, names)), how, shares)


class Hit(NamedTuple):
    """What a key means: part number `slot` of `row`, at these values, and `rest` after the name."""

    row: Row
    slot: int
    values: dict[str, int]
    rest: list[str]


class Names:
    """Names to be looked up: a tree of their words."""

    def __init__(self) -> None:
        self._words: dict[str, Names] = {}
        self._numbers: dict[Number, Names] = {}
        self._exact: tuple[Row, int] | None = None
        self._start: tuple[Row, int] | None = None

    def add(self, name: Name, row: Row, slot: int = 0) -> None:
        node = self
        for word in name.words:
            if isinstance(word, str):
                node = node._words.setdefault(word, Names())
            else:
                node = node._numbers.setdefault(word, Names())
        if name.start:
            node._start = row, slot
        else:
            node._exact = row, slot

    def find(self, key: str) -> Hit | None:
        return self._find(key.split("."), 0, {})

    def _find(self, words: list[str], at: int, values: dict[str, int]) -> Hit | None:
        if at == len(words):
            return Hit(*self._exact, values, []) if self._exact else None
        word = words[at]
        node = self._words.get(word)
        if node and (hit := node._find(words, at + 1, values)):
            return hit
        if self._numbers and _INTEGER.fullmatch(word):
            for number, node in self._numbers.items():
                found = number.solve(int(word))
                if found and (hit := node._find(words, at + 1, {**values, **found})):
                    return hit
        return Hit(*self._start, values, words[at:]) if self._start else None


# --- tables

_Target = Union[str, list[str]]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table's file. Of the file it `extends` it takes all that is about names."""

    prefixes: dict[str, str]
    extends: str = ""
    keys: dict[str, bool | list[int | str]] = {}
    names: dict[str, _Target] = {}
    parts: dict[str, dict[str, _Target]] = {}
    aliases: dict[str, str] = {}
    unwritten: dict[str, str] = {}

    @property
    def same(self) -> bool:
        """Whether the dialect's names are the architecture's own."""
        return "" in self.names

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """Every canonical name with its names in the dialect, <...> written out."""
        for name, target in self.names.items():
            yield from self._expanded(name, _listed(target))

    def _expanded(self, name: str, targets: list[str]) -> Iterator[tuple[str, list[str]]]:
        """'in.<resnet>', ['down.<resnet>'] -> 'in.conv.', ['down.conv1.'] and so on."""
        head, found, part = name.partition("<")
        if not found:
            yield name, targets
            return
        stem = targets[0].partition("<")[0]
        for inner, target in self.parts[part[:-1]].items():
            split = [text.rpartition(" ") for text in _listed(target)]
            full = [f"{word}{space}{stem}{tail}" for word, space, tail in split]
            yield from self._expanded(head + inner, full)

    def respelled(self, key: str) -> str:
        """A key of the dialect in the spelling that the table has."""
        for old, new in self.aliases.items():
            if key.startswith(old):
                return new + key[len(old) :]
        return key


def _listed(target: _Target) -> list[str]:
    return [target] if isinstance(target, str) else target


class Home(NamedTuple):
    """A table's file and what stands before its canonical names in one architecture."""

    file: File
    prefix: str


class Table:
    """The names of one component of one architecture, ready to be looked up in.

    `ours` are the canonical names without `prefix`, `theirs` the dialect's; the component's
    canonical keys all begin with `start`.
    """

    def __init__(self, arch: Architecture, home: Home, last: int) -> None:
        self.file, self.prefix = home
        starts = [shared_facts().prefixes[0], *(p for c in arch.components for p in c.prefixes)]
        self.start = next(start for start in starts if self.prefix.startswith(start))
        self.ours, self.theirs = Names(), Names()
        for name, targets in self.file.rows():
            name, *targets = (text.replace("{last}", str(last)) for text in (name, *targets))
            row = Row.parse(name, targets)
            self.ours.add(row.name, row)
            for slot, part in enumerate(row.parts):
                self.theirs.add(part, row, slot)
        for name, reason in self.file.unwritten.items():
            row = Row(Name.parse(name), unwritten=reason)
            self.ours.add(row.name, row)


def table_for(arch: Architecture, dialect: str, component: str, keys: Iterable[str]) -> Table:
    """The table of a component, for a file with `keys`. Raises Refusal where there is none."""
    home = tables(dialect).get((arch.name, component))
    if home is None:
        known = listed(sorted(c for a, c in tables(dialect) if a == arch.name)) or "none of them"
        raise Refusal(
            f"plymix does not know the {dialect} names of {component!r} of {arch.short}; of its"
            f" components it knows {known}"
        )
    return _table(dialect, arch.name, component, _last(home, keys))


@lru_cache(maxsize=256)
def _table(dialect: str, arch: str, component: str, last: int) -> Table:
    return Table(load(arch), tables(dialect)[arch, component], last)


def _last(home: Home, keys: Iterable[str]) -> int:
    """What {last} is: the highest number in its place in `keys` of either side; -1 for none."""
    texts = [text for name, target in home.file.names.items() for text in (name, *_listed(target))]
    stems = [text.partition("{last}")[0].rpartition(" ")[2] for text in texts if "{last}" in text]
    if not stems:
        return -1
    either = "|".join(map(re.escape, stems))
    pattern = re.compile(rf"(?:{re.escape(home.prefix)})?(?:{either})({_INTEGER.pattern})\.")
    return max((int(m[1]) for m in map(pattern.match, keys) if m), default=-1)


@cache
def tables(dialect: str) -> Mapping[tuple[str, str], Home]:
    """(architecture, component) -> its table's file. Raises Refusal for an unknown dialect."""
    if dialect not in DIALECTS:
        raise unknown("dialect", dialect, DIALECTS)
    found: dict[tuple[str, str], Home] = {}
    for path in sorted((_HERE / dialect).glob("*.toml")):
        file = _file(path)
        for whose, prefix in file.prefixes.items():
            arch, component = whose.split()
            found[arch, component] = Home(file, prefix)
    return found


@cache
def _file(path: Path) -> File:
    own = decode(path, File)
    if not own.extends:
        return own
    base = _file(path.with_name(f"{own.extends}.toml"))
    inherited = ("names", "parts", "aliases", "unwritten")
    both = {field: getattr(base, field) | getattr(own, field) for field in inherited}
    return msgspec.structs.replace(own, **both)
