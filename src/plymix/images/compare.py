"""A grid of merges and settings -> its pictures, a labelled sheet, a side-car to make them again.

`draw` makes what is missing, cell by cell, each as a finished PNG of its own; so a sheet that was
stopped goes on where it was, and one with a row more draws that row. Merges happen in the backend,
one after the other, in the order in which the fewest bytes change.

Beside `sheet.png` (further pages: `sheet-2.png` ...) there are `sheet/` with the pictures,
`sheet.json`, `sheet.html`, and `sheet-difference.png` where that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from plymix import hashes, metadata, outputs
from plymix import plan as planning
from plymix import recipe as recipes
from plymix.engine import ProgressCallback, goes_on
from plymix.engine.files import write_whole
from plymix.errors import Cancelled, Refusal
from plymix.expr import numbered
from plymix.formats import Source, open_model
from plymix.images import page, parameters, pixels, sheet
from plymix.images.base import Backend, Picture, Settings, check
from plymix.images.grid import Cell, Grid
from plymix.plan import Plan
from plymix.recipe import Model, Recipe

PART = 1000
"""Units of progress in one picture."""

Record = dict[str, Any]
"""All that a cell's picture depends on, as JSON:

    plymix, backend, via   versions and device; the backend's name
    recipe                 with size and SHA-256 of every model
    settings               see `Settings`
    pixels                 SHA-256 of the picture's RGB bytes
"""


@dataclass
class Kitchen:
    """The plans of a sheet's merges; their model files are open, and hashed, once each."""

    folders: Sequence[str | os.PathLike[str]] = ()
    progress: ProgressCallback | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)  # SHA-256 -> where it was last
    _open: dict[Path, Source] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _hashes: dict[Path, str] = field(default_factory=dict)

    def plan(self, recipe: Recipe) -> Plan:
        """A recipe's plan. Raises Refusal, also for a model whose SHA-256 is not the recipe's."""
        key = recipes.to_json(recipe)
        if key not in self._plans:
            there = {
                name: self.paths[model.sha256]
                for name, model in recipe.models.items()
                if model.sha256 in self.paths and self.paths[model.sha256].exists()
            }
            plan = planning.build(
                recipe,
                folders=self.folders,
                paths=there,
                open_file=self._opened,
                keep_open=True,
            )
            for i in plan.inputs:
                known = recipe.models[i.name].sha256
                if known and known.lower() != self.sha256(i.source):
                    raise Refusal(
                        f"{i.source.path} is not the {i.label} that this was drawn with: its"
                        f" SHA-256 begins {self.sha256(i.source)[:10]}, not {known[:10]}"
                    )
            self._plans[key] = plan
        return self._plans[key]

    def recorded(self, recipe: Recipe) -> Recipe:
        """The recipe with name, size and SHA-256 of each model that the result is made of."""
        models = {
            i.name: Model(i.label, i.source.nbytes, self.sha256(i.source))
            for i in self.plan(recipe).inputs
        }
        steps = {name: recipe.steps[name] for name in recipe.order()}
        return Recipe(models, steps, recipe.output)

    def where(self) -> dict[str, str]:
        """SHA-256 -> path of every model that was hashed."""
        return {sha: str(path.resolve()) for path, sha in self._hashes.items()}

    def sha256(self, source: Source) -> str:
        if source.path not in self._hashes:
            began = time.monotonic()

            def stopped() -> bool:
                done, total = len(self._hashes), len(self._open)
                return not goes_on(self.progress, "hashing the inputs", done, total, began)

            self._hashes[source.path] = hashes.model_sha256(source.files, stopped)
        return self._hashes[source.path]

    def _opened(self, path: Path) -> Source:
        if path not in self._open:
            self._open[path] = open_model(path)
        return self._open[path]

    def close(self) -> None:
        for source in self._open.values():
            source.close()

    def __enter__(self) -> Kitchen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Place:
    """The files of a sheet, by the name of its first page."""

    out: Path

    @property
    def cells(self) -> Path:
        return self.out.with_suffix("")

    @property
    def json(self) -> Path:
        return self.out.with_suffix(".json")

    @property
    def html(self) -> Path:
        return self.out.with_suffix(".html")

    def page(self, number: int, what: str = "") -> Path:
        parts = [self.out.stem, what, str(number + 1) if number else ""]
        return self.out.with_name("-".join(filter(None, parts)) + self.out.suffix)


def place(out: str | os.PathLike[str], force: bool) -> Place:
    """Where a sheet goes. Raises Refusal where it cannot or should not."""
    found = Place(pixels.writable(out, force))
    for file in (found.json, found.html):
        outputs.file(file, force)
    if found.cells.exists() and not found.cells.is_dir():
        raise Refusal(
            f"{found.cells} is a file, and the pictures of {found.out.name} go into a folder of"
            " that name: choose another name"
        )
    return found


# --- drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The finished pictures of a grid: one file and one record per cell, in the grid's order."""

    grid: Grid
    files: tuple[Path, ...]
    records: tuple[Record, ...]
    fresh: int  # how many were drawn now
    seconds: float

    def picture(self, page: int, row: int, column: int) -> Picture:
        """Its pixels: uint8 [height, width, 3]. Places count from 0."""
        return pixels.load(self.files[self.grid.index(page, row, column)])


def draw(
    grid: Grid,
    kitchen: Kitchen,
    backend: Backend,
    via: str,
    place: Place,
    *,
    progress: ProgressCallback | None = None,
) -> Drawn:
    """Draw every cell that is not there yet.

    Raises Refusal for what cannot be merged or what the backend cannot draw, before anything is
    read; Failure or Cancelled. Finished pictures stay.
    """
    began = drawing = time.monotonic()
    keys = [recipes.to_json(cell.recipe) for cell in grid.cells]
    by_key: dict[str, list[Cell]] = {}
    for key, cell in zip(keys, grid.cells, strict=True):
        by_key.setdefault(key, []).append(cell)
    for cells in by_key.values():
        check(backend, kitchen.plan(cells[0].recipe), [cell.settings for cell in cells])
    said = {
        key: recipes.to_dict(kitchen.recorded(cells[0].recipe)) for key, cells in by_key.items()
    }
    records = [
        {
            "plymix": _version(),
            "backend": backend.label,
            "via": via,
            "recipe": said[key],
            "settings": msgspec.to_builtins(cell.settings),
        }
        for key, cell in zip(keys, grid.cells, strict=True)
    ]
    digests = [fingerprint(record) for record in records]
    place.cells.mkdir(exist_ok=True)
    known = _known(place.cells)
    missing: dict[str, dict[str, int]] = {}  # recipe -> fingerprint -> number of its first cell
    for i, (key, digest) in enumerate(zip(keys, digests, strict=True)):
        if digest not in known:
            missing.setdefault(key, {}).setdefault(digest, i)
    total = sum(map(len, missing.values()))
    done = 0.0

    def tick(pictures: float) -> None:
        nonlocal done
        done += pictures
        if not goes_on(progress, "drawing", int(done * PART), total * PART, drawing):
            raise Cancelled("stopped")

    finished = 0
    groups = list(missing.values())
    plans = [kitchen.plan(grid.cells[min(group.values())].recipe) for group in groups]
    try:
        for i in ordered(plans):
            backend.use(plans[i])
            if not finished:  # how long a model loads is no measure of the pictures to come
                drawing = time.monotonic()
            wanted = sorted(groups[i].values(), key=lambda n: _alike(grid.cells[n].settings))
            drawn = backend.draw([grid.cells[n].settings for n in wanted], tick)
            for n, picture in zip(wanted, drawn, strict=True):
                known[digests[n]] = place.cells / f"{digests[n]}.png"
                _save(
                    known[digests[n]], picture, records[n], metadata.formula(grid.cells[n].recipe)
                )
                finished += 1
                done = float(finished)
    except (KeyboardInterrupt, Cancelled):
        raise Cancelled(
            f"stopped with {finished} of {total} pictures drawn, in {place.cells}; the same command"
            " goes on there"
        ) from None
    files = _named(grid, digests, known, place.cells)
    full = tuple({**r, **(pixels.record(f) or {})} for r, f in zip(records, files, strict=True))
    return Drawn(grid, files, full, finished, time.monotonic() - began)


def fingerprint(record: Record) -> str:
    """Ten digits that tell apart what makes different pictures."""
    said = {name: record[name] for name in ("backend", "recipe", "settings")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


def _known(folder: Path) -> dict[str, Path]:
    """The finished pictures in `folder` by their fingerprint."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.png")):
        record = pixels.record(path)
        if record is not None and digest_of(pixels.load(path)) == record.get("pixels"):
            found[fingerprint(record)] = path
    return found


def _named(
    grid: Grid, digests: Sequence[str], known: Mapping[str, Path], folder: Path
) -> tuple[Path, ...]:
    """The cells' files, named by their place; of several that are alike, by the first."""
    files: dict[str, Path] = {}
    for cell, digest in zip(grid.cells, digests, strict=True):
        if digest in files:
            continue
        number = f"p{cell.page + 1}-" if len(grid.pages.values) > 1 else ""
        path = folder / f"{number}r{cell.row + 1}-c{cell.column + 1}-{digest}.png"
        if known[digest] != path:
            os.replace(known[digest], path)
        files[digest] = path
    return tuple(files[d] for d in digests)


def _save(path: Path, picture: Picture, record: Record, model: str) -> None:
    image = pixels.pillow().fromarray(picture)
    record = {**record, "pixels": digest_of(picture)}
    settings = msgspec.convert(record["settings"], Settings)
    texts = {
        "parameters": parameters.text(settings, model, _version()),
        pixels.RECORD: json.dumps(record, ensure_ascii=False),
    }
    pixels.save(image, path, texts)


def digest_of(picture: Picture) -> str:
    """SHA-256 of a picture's RGB bytes, row by row."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def _alike(s: Settings) -> tuple[Any, ...]:
    return (s.steps, s.cfg, s.sampler, s.width, s.height, len(s.prompt) + len(s.negative))


def ordered(plans: Sequence[Plan]) -> list[int]:
    """The order in which the fewest bytes change from one plan to the next.

    From each plan on, always to the nearest one left; the shortest of these ways.
    """
    if len(plans) < 3:
        return list(range(len(plans)))
    apart = _bytes_apart(plans)
    ways = [_nearest(apart, start) for start in range(len(plans))]
    return min(ways, key=lambda way: sum(apart[a][b] for a, b in pairwise(way)))


def _nearest(apart: Sequence[Sequence[int]], start: int) -> list[int]:
    way, left = [start], set(range(len(apart))) - {start}
    while left:
        way.append(min(left, key=lambda i: (apart[way[-1]][i], i)))
        left.remove(way[-1])
    return way


def _bytes_apart(plans: Sequence[Plan]) -> list[list[int]]:
    """Bytes of the tensors that differ between each two plans."""
    numbers: dict[Path, int] = {}
    made: list[dict[str, tuple[int, int]]] = []
    for plan in plans:
        own = {i.index: numbers.setdefault(i.source.path, len(numbers)) for i in plan.inputs}
        tensors = numbered(plan.tensors, own)
        made.append({t.name: (hash((t.expr, t.dtype)), t.nbytes) for t in tensors})

    def apart(a: Mapping[str, tuple[int, int]], b: Mapping[str, tuple[int, int]]) -> int:
        return sum(n for name, (made, n) in b.items() if a.get(name, (None,))[0] != made)

    return [[apart(a, b) for b in made] for a in made]


# --- the sheet ----------------------------------------------------------------------------------


def finish(
    drawn: Drawn,
    place: Place,
    where: Mapping[str, str],
    *,
    title: str = "",
    against: int | None = None,
) -> list[Path]:
    """Write sheet, side-car and page of finished pictures; returns their files.

    `where` says where the models lie, by SHA-256. `against` is a row, from 0.
    """
    grid = drawn.grid
    written: list[Path] = []
    rows = [v.label for v in grid.rows.values]
    columns = [v.label for v in grid.columns.values]
    for p, each in enumerate(grid.pages.values):
        found = [[drawn.picture(p, r, c) for c in range(len(columns))] for r in range(len(rows))]
        heading = "\n".join(filter(None, (each.label, title)))
        pixels.save(sheet.pictures(found, rows, columns, heading), place.page(p), {})
        written.append(place.page(p))
        if against is not None:
            apart = [list(map(sheet.difference, row, found[against])) for row in found]
            told = f"difference from {rows[against]}, twice as bright\n{heading}".strip()
            image = sheet.pictures(apart, rows, columns, told)
            pixels.save(image, place.page(p, "difference"), {})
            written.append(place.page(p, "difference"))
    side = sidecar(drawn, place, where)
    write_whole(place.json, as_json(side).encode())
    write_whole(place.html, page.html(side, title or place.out.stem).encode())
    return [*written, place.json, place.html]


def sidecar(drawn: Drawn, place: Place, where: Mapping[str, str]) -> dict[str, Any]:
    """All that is known of a sheet, from which any cell can be made again. Places count from 1."""
    grid = drawn.grid
    said: list[Any] = []
    cells = []
    for cell, file, record in zip(grid.cells, drawn.files, drawn.records, strict=True):
        if record["recipe"] not in said:
            said.append(record["recipe"])
        cells.append(
            {
                "page": cell.page + 1,
                "row": cell.row + 1,
                "column": cell.column + 1,
                "file": f"{place.cells.name}/{file.name}",
                "recipe": said.index(record["recipe"]),
                "formula": metadata.formula(cell.recipe),
                "settings": record["settings"],
                "pixels": record["pixels"],
            }
        )
    first = drawn.records[0]
    return {
        "plymix": first["plymix"],
        "backend": first["backend"],
        "via": first["via"],
        "models": dict(where),
        "sheet": place.out.name,
        "axes": {
            name: {"name": axis.name, "values": [v.label for v in axis.values]}
            for name, axis in grid.axes().items()
        },
        "recipes": said,
        "cells": cells,
    }


# --- once more ----------------------------------------------------------------------------------


def recalled(path: Path, cell: str) -> Record:
    """The record of a cell ("3,2": row 3, column 2; "3,2,1": page 1) of a side-car, or of a PNG."""
    if path.suffix.lower() == ".png":
        found = pixels.record(path)
        if found is None:
            raise Refusal(f"{path} carries no record of plymix; name a sheet's .json or its cell")
        return found
    side = opened(path)
    try:
        said = [int(n) for n in cell.split(",")]
        row, column, number = said if len(said) == 3 else [*said, 1]
    except ValueError:
        raise Refusal(f"--cell {cell!r}: write ROW,COLUMN or ROW,COLUMN,PAGE, from 1") from None
    for one in side["cells"]:
        if (one["row"], one["column"], one["page"]) == (row, column, number):
            record = {name: side[name] for name in ("plymix", "backend", "via")}
            record |= {"settings": one["settings"], "pixels": one["pixels"]}
            return {**record, "recipe": side["recipes"][one["recipe"]]}
    raise Refusal(f"--cell {cell}: {path.name} has no such cell (row, column, page count from 1)")


def opened(path: Path) -> dict[str, Any]:
    """A side-car. Raises Refusal for what is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise Refusal(f"cannot read the sheet {path}: {e}") from None
    if not isinstance(found, dict) or not {"cells", "recipes", "via"} <= found.keys():
        raise Refusal(f"{path} is not the side-car of a sheet")
    return found


def known_paths(path: Path) -> dict[str, Path]:
    """Where the models of a side-car were when it was written, by SHA-256."""
    if path.suffix.lower() == ".png":
        return {}
    return {sha: Path(file) for sha, file in opened(path).get("models", {}).items()}


def again(
    record: Record,
    kitchen: Kitchen,
    backend: Backend,
    out: Path,
    progress: ProgressCallback | None = None,
) -> bool:
    """Draw a record's picture into `out` once more; whether its pixels are the same."""
    recipe = recipes.from_dict(record["recipe"])
    settings = msgspec.convert(record["settings"], Settings).checked()
    began, done = time.monotonic(), 0.0

    def tick(pictures: float) -> None:
        nonlocal done
        done += pictures
        if not goes_on(progress, "drawing", int(done * PART), PART, began):
            raise Cancelled("stopped; nothing was written")

    plan = kitchen.plan(recipe)
    check(backend, plan, [settings])
    backend.use(plan)
    (picture,) = backend.draw([settings], tick)
    new = {**record, "plymix": _version(), "backend": backend.label}
    _save(out, picture, new, metadata.formula(recipe))
    return bool(digest_of(picture) == record["pixels"])


def as_json(value: Any) -> str:
    """JSON for people and programs."""
    return json.dumps(msgspec.to_builtins(value), indent=1)


def _version() -> str:
    from plymix import __version__

    return __version__
