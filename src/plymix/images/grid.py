"""A sheet's axes -> its cells.

An axis is a name and its values: rows of merges, seeds, prompts, steps, cfg, samplers, sizes, or a
word of a row such as a block's weight. In text:

    merge                     the rows given by --each
    seed  prompt              the values given by --seeds, --prompt
    cfg=4,7,10                one of a picture's settings
    IN05=0,0.25,0.5,1         a word of the merge; so is steps.mix.alpha=0,1 and method=...
    alpha=0.5|GRAD_A          '|' separates where a value holds commas
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from plymix.errors import Refusal, unknown
from plymix.images import rows
from plymix.images.base import Settings
from plymix.recipe import Recipe, to_json

PICTURE = ("prompt", "negative", "seed", "steps", "cfg", "sampler", "size")
"""Axes that are settings of a picture; all others are words of the merge."""

MOST = 10_000
"""Cells of a sheet at most."""


@dataclass(frozen=True)
class Value:
    """One value of an axis: what the sheet calls it, and what it sets."""

    label: str
    words: tuple[str, ...] = ()  # of the merge
    settings: tuple[tuple[str, Any], ...] = ()  # of the picture


@dataclass(frozen=True)
class Axis:
    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet: its place (from 0), its model and its settings."""

    page: int
    row: int
    column: int
    recipe: Recipe
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """Rows, columns and pages. An axis that is not there has one value without a label."""

    rows: Axis
    columns: Axis
    pages: Axis
    cells: tuple[Cell, ...]

    def index(self, page: int, row: int, column: int) -> int:
        """The number of the cell at a place; all from 0."""
        return (page * len(self.rows.values) + row) * len(self.columns.values) + column

    def axes(self) -> dict[str, Axis]:
        return {"rows": self.rows, "columns": self.columns, "pages": self.pages}


NONE = Axis("", (Value(""),))


def numbers(text: str, what: str = "--seeds") -> tuple[int, ...]:
    """'1-4,7' -> (1, 2, 3, 4, 7). Raises Refusal."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first > MOST:
            raise Refusal(f"{what} {text!r}: write numbers and ranges such as 1-4,7")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def size(text: str) -> tuple[int, int]:
    """'512x768' -> (512, 768), width first. Raises Refusal."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip())
    if match is None:
        raise Refusal(f"size {text!r}: write width x height, such as 512x768")
    return int(match[1]), int(match[2])


def axis(text: str) -> Axis:
    """An axis said as NAME=VALUES. Raises Refusal."""
    name, equals, said = text.partition("=")
    name = name.strip()
    if not equals or not said.strip():
        raise Refusal(f"axis {text!r}: write NAME=VALUE,VALUE,... (IN05=0,0.5,1 or cfg=4,7)")
    if name == "seed":
        values: Sequence[str] = [str(n) for n in numbers(said, "seed")]
    else:
        values = [v.strip() for v in said.split("|" if "|" in said else ",")]
    return Axis(name, tuple(_value(name, v) for v in values))


def merge(row: str, models: rows.Models) -> Value:
    """A row of --each as a value of the axis "merge"."""
    return Value(rows.label(row, models), words=rows.split(row))


def _value(name: str, text: str) -> Value:
    if name == "merge":
        return Value(text, words=rows.split(text))
    if name not in PICTURE:
        return Value(f"{name} {text}", words=(f"{name}={text}",))
    if name == "size":
        width, height = size(text)
        return Value(f"{width}x{height}", settings=(("width", width), ("height", height)))
    kind = Settings.__annotations__[name]
    if kind == "str":
        return Value(text, settings=((name, text),))
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        raise Refusal(
            f"axis {name}: {text!r} is not a {'whole ' * (kind == 'int')}number"
        ) from None
    return Value(f"{name} {text}", settings=((name, number),))


def given(
    models: rows.Models, each: Sequence[str], seeds: str, prompts: Sequence[str]
) -> tuple[Axis, Axis, Axis]:
    """The axes that options of their own give values: merges, seeds, prompts."""
    return (
        Axis("merge", tuple(merge(row, models) for row in each)),
        Axis("seed", tuple(_value("seed", str(n)) for n in numbers(seeds))),
        Axis("prompt", tuple(_value("prompt", p) for p in prompts or ("",))),
    )


def placed(x: str, y: str, pages: str, known: Sequence[Axis]) -> tuple[Axis, Axis, Axis]:
    """(columns, rows, pages). `known` are the axes that other options have given values.

    Those with several values that are placed nowhere go where there is room: merges to the rows,
    seeds to the columns, else to rows, columns, pages in this order. Raises Refusal for a fourth.
    """
    by_name = {a.name: a for a in known}
    found: dict[str, Axis | None] = {}
    for place, text in (("columns", x), ("rows", y), ("pages", pages)):
        if not text:
            found[place] = None
        elif "=" in text:
            found[place] = axis(text)
        elif text in by_name:
            found[place] = by_name[text]
        else:
            raise unknown("axis", text, by_name, help="or write NAME=VALUE,VALUE")
    used = [a.name for a in found.values() if a]
    if twice := {name for name in used if used.count(name) > 1}:
        raise Refusal(f"the axis {', '.join(twice)} is given twice")
    left = [a for a in known if a.name not in used and len(a.values) > 1]
    for one in left:
        wish = {"merge": "rows", "seed": "columns"}.get(one.name, "rows")
        free = next((p for p in (wish, "rows", "columns", "pages") if found[p] is None), None)
        if free is None:
            raise Refusal(
                f"a sheet has rows, columns and pages; {one.name} would be a fourth axis: give it"
                " one value"
            )
        found[free] = one
    return tuple(found[p] or NONE for p in ("columns", "rows", "pages"))  # type: ignore[return-value]


def applied(settings: Settings, values: Sequence[Value]) -> Settings:
    """`settings` with what `values` set, checked. Raises Refusal."""
    said = {name: value for each in values for name, value in each.settings}
    return msgspec.structs.replace(settings, **said).checked()


def title(grid: Grid, fixed: Sequence[Value], settings: Settings) -> str:
    """What all pictures of a sheet have in common, for its head."""
    moving = {axis.name for axis in grid.axes().values()}
    numbers = {
        "sampler": settings.sampler,
        "steps": f"{settings.steps} steps",
        "cfg": f"CFG {settings.cfg:g}",
        "size": f"{settings.width}x{settings.height}",
    }
    told = [v.label for v in fixed if v.label and v.label != settings.prompt]
    told += [text for name, text in numbers.items() if name not in moving]
    prompt = "" if "prompt" in moving else settings.prompt
    return "\n".join(filter(None, (prompt, ", ".join(told))))


def build(
    models: rows.Models,
    fixed: Sequence[Value],
    settings: Settings,
    columns: Axis,
    rows_: Axis,
    pages: Axis,
) -> Grid:
    """The grid of all combinations. `fixed` and `settings` hold where no axis says otherwise."""
    count = len(pages.values) * len(rows_.values) * len(columns.values)
    if count > MOST:
        raise Refusal(f"{count:,} pictures are more than a sheet has room for ({MOST:,})")
    made: dict[tuple[str, ...], Recipe] = {}
    equal: dict[str, Recipe] = {}

    def recipe(words: tuple[str, ...]) -> Recipe:
        if words not in made:
            found = rows.made(words, models)
            made[words] = equal.setdefault(to_json(found), found)
        return made[words]

    def cells() -> Iterator[Cell]:
        for p, page in enumerate(pages.values):
            for r, row in enumerate(rows_.values):
                for c, column in enumerate(columns.values):
                    parts = (row, column, page)
                    model = recipe(tuple(w for part in (*fixed, *parts) for w in part.words))
                    yield Cell(p, r, c, model, applied(settings, parts))

    return Grid(rows_, columns, pages, tuple(cells()))
