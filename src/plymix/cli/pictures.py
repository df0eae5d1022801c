"""`compare` and `blocks`: sheets of pictures, drawn with merges that are never written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from plymix import outputs, urls
from plymix.cli import screen
from plymix.cli.options import Folders, Force, Json, Presets, Whole, argument, option, weight
from plymix.errors import Refusal, amount

if TYPE_CHECKING:
    from plymix.images import Backend, Settings
    from plymix.images.blocks import Moved
    from plymix.images.compare import Kitchen, Place
    from plymix.images.grid import Grid
    from plymix.images.rows import Models

EXAMPLES = {
    "compare": "Examples:\n"
    '  PROG a.safetensors b.safetensors --each A --each B --each 0.5 --each "GRAD_V base=1 vae=b"'
    ' --prompt "a cat" --seeds 1-4 --sampler euler_a --steps 80 --cfg 7 -o sheet.png\n'
    '  PROG a.safetensors b.safetensors --each 0.5 --prompt "a cat" --x "IN05=0,0.5,1" -o x.png\n'
    "  PROG --redo sheet.json --cell 3,2 -o again.png",
    "blocks": 'Example:\n  PROG a.safetensors b.safetensors --prompt "a cat" --prompt "a castle"'
    " --seeds 1-4 -o map.png",
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Picture:
    """The settings of a picture."""

    negative: Annotated[
        str, option("What the picture shall not show.", default=False, metavar="TEXT")
    ] = ""
    sampler: Annotated[
        str,
        option(
            "euler, euler_a, ddim, dpmpp_2m, dpmpp_2m_karras, dpmpp_sde, unipc or lcm.",
            metavar="NAME",
        ),
    ] = "euler_a"
    steps: Annotated[Whole, option("Steps of the sampler.", metavar="N")] = 20
    cfg: Annotated[float, option("Guidance: how strongly the prompt holds.", metavar="F")] = 7.0
    size: Annotated[str, option("Width x height in pixels.", metavar="WxH")] = "512x512"

    def settings(self) -> Settings:
        from plymix.images import Settings, grid

        width, height = grid.size(self.size)
        return Settings(
            negative=self.negative,
            steps=self.steps,
            cfg=self.cfg,
            sampler=self.sampler,
            width=width,
            height=height,
        ).checked()


OF_SERVERS, IN_PROCESS = ("url", "model_folder", "keep"), ("device", "precision", "batch")
VAIN = {"diffusers": OF_SERVERS, "a1111": IN_PROCESS, "comfyui": IN_PROCESS}
"""Options that a backend has no use for."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Who draws, and how."""

    backend: Annotated[
        str,
        option(
            "diffusers (in this process), a1111 (also Forge), comfyui, or fake. [default:"
            " diffusers]",
            default=False,
            metavar="NAME",
        ),
    ] = ""
    url: Annotated[
        str, option("Where the server of a1111 or comfyui is.", default=False, metavar="URL")
    ] = ""
    model_folder: Annotated[
        str,
        option(
            "That server's folder of checkpoints; merged files are written there.",
            default=False,
            metavar="DIR",
        ),
    ] = ""
    keep: Annotated[bool, option("Leave the merged files there.", default=False)] = False
    timeout: Annotated[float, option("Seconds to wait for the server's answer.", metavar="S")] = (
        600.0
    )
    device: Annotated[
        str,
        option(
            "cpu, cuda or cuda:1. [default: a GPU where there is one]", default=False, metavar="D"
        ),
    ] = ""
    precision: Annotated[
        str,
        option(
            "Of the U-Net: fp32, fp16 or bf16. [default: fp16 on a GPU, else fp32]",
            default=False,
            metavar="P",
        ),
    ] = ""
    batch: Annotated[
        Whole,
        option("Pictures made at once. [default: 4 on a GPU, else 1]", default=False, metavar="N"),
    ] = 0

    @contextmanager
    def opened(self, via: str = "diffusers") -> Iterator[tuple[str, Backend]]:
        """The backend's name and the backend itself, closed afterwards."""
        from plymix.images import Options, open_backend

        name = self.backend or via
        if self.batch < 0 or self.timeout <= 0:
            raise Refusal("--batch and --timeout are positive numbers")
        for field in VAIN.get(name, ()):
            if getattr(self, field):
                who = "--backend a1111 or comfyui" if name == "diffusers" else "--backend diffusers"
                raise Refusal(f"--{field.replace('_', '-')} is for {who}, not {name}")
        options = Options(
            self.device,
            self.precision,
            self.batch,
            self.url,
            self.model_folder,
            self.keep,
            self.timeout,
        )
        backend = open_backend(name, options)
        try:
            yield name, backend
        finally:
            backend.close()


Prompts = Annotated[
    tuple[str, ...],
    option("What the picture shows; repeatable.", default=False, metavar="TEXT"),
]
Seeds = Annotated[str, option("Seeds: numbers and ranges.", metavar="1-4,7")]


def compare(
    a: Annotated[str, argument("The first model.")] = "",
    b: Annotated[str, argument("The second model.")] = "",
    /,
    *,
    output: Annotated[
        str, option("The sheet.", "--output", "-o", default=False, metavar="FILE.png")
    ] = "",
    each: Annotated[
        tuple[str, ...],
        weight(
            "A row: A, B, or a weight (share of B) with base=, vae=, method=, IN05= ... beside it;"
            " repeatable.",
            default=False,
            metavar="ROW",
        ),
    ] = (),
    prompt: Prompts = (),
    seeds: Seeds = "1",
    picture: Picture = Picture(),
    x: Annotated[
        str,
        option(
            "Columns: seed, prompt, merge, or NAME=VALUES (IN05=0,0.5,1; cfg=4,7; steps.mix.alpha="
            "0,1).",
            default=False,
            metavar="AXIS",
        ),
    ] = "",
    y: Annotated[str, option("Rows, as --x.", default=False, metavar="AXIS")] = "",
    pages: Annotated[str, option("Pages, as --x.", default=False, metavar="AXIS")] = "",
    against: Annotated[
        Whole,
        option("Draw each row's difference from this one, too.", default=False, metavar="ROW"),
    ] = 0,
    save: Annotated[
        tuple[str, ...],
        option(
            "Write the checkpoint of a row: 2, or 2=FILE; repeatable.",
            default=False,
            metavar="ROW[=FILE]",
        ),
    ] = (),
    from_: Annotated[
        str,
        option(
            "Merge by a recipe; --each and axes then change its values.",
            "--from",
            default=False,
            metavar="RECIPE",
        ),
    ] = "",
    redo: Annotated[
        str,
        option(
            "Draw a cell of a finished sheet (.json or .png) again.", default=False, metavar="SHEET"
        ),
    ] = "",
    cell: Annotated[
        str,
        option(
            "Which cell: row, column and page. [default: 1,1]", default=False, metavar="R,C[,P]"
        ),
    ] = "",
    drawing: Drawing = Drawing(),
    presets: Presets = "",
    models: Folders = (),
    force: Force = False,
    json: Json = False,
) -> None:
    """Draw merges side by side, without writing a checkpoint.

    What comes out is one labelled sheet. Rows are merges, columns seeds, or any two or three of:
    merge, prompt, seed, steps, cfg, sampler, size, and every weight of the merge. Beside the sheet
    come its pictures (with their settings and recipe inside), a .json from which any of them can be
    made again, and an .html page.

    Stopped, the same command goes on where it was.
    """
    if redo:
        others = {"A and B": a or b, "--each": each, "--prompt": prompt, "--seeds": seeds != "1",
                  "settings such as --steps": picture != Picture(), "axes": x or y or pages,
                  "--against": against, "--save": save, "--from": from_}  # fmt: skip
        if said := [name for name, value in others.items() if value]:
            raise Refusal(f"--redo draws a cell as it was: leave out {', '.join(said)}")
        _again(redo, cell or "1,1", output, drawing, models, force, json)
        return
    if cell:
        raise Refusal(f"--cell {cell} is for --redo SHEET")
    from plymix.images import compare as comparing
    from plymix.images import grid as grids

    place = comparing.place(output or "sheet.png", force)
    start = _models(a, b, from_, presets)
    own = {axis.partition("=")[0].strip() for axis in (x, y, pages) if "=" in axis}
    for name, value in (("merge", each), ("seed", seeds != "1"), ("prompt", prompt)):
        if value and name in own:
            raise Refusal(f"the axis {name} is given twice")
    usual = ("",) if from_ or own & {"merge", "alpha"} else ("A", "0.5", "B")
    known = grids.given(start, each or usual, seeds, prompt)
    columns, down, through = grids.placed(x, y, pages, known)
    fixed = [a.values[0] for a in known if a.name not in (columns.name, down.name, through.name)]
    settings = grids.applied(picture.settings(), fixed)
    grid = grids.build(start, fixed, settings, columns, down, through)
    count = len(down.values)
    if not 0 <= against <= count:
        raise Refusal(f"--against {against}: the sheet has rows 1 to {count}")
    title = grids.title(grid, fixed, settings)
    with _kitchen(models) as (kitchen, progress), drawing.opened() as (via, backend):
        wanted = [_saved(s, grid, place, force) for s in save]
        for text in dict.fromkeys(n for c in grid.cells for n in kitchen.plan(c.recipe).notes):
            screen.note(text)
        with progress as line:
            drawn = comparing.draw(grid, kitchen, backend, via, place, progress=line)
        files = comparing.finish(
            drawn, place, kitchen.where(), title=title, against=against - 1 if against else None
        )
        made = [_write(kitchen, row, path) for row, path in wanted]
    if json:
        told = {"files": [str(f) for f in (*files, *made)], "drawn": drawn.fresh,
                "cells": len(grid.cells), "seconds": drawn.seconds}  # fmt: skip
        screen.put_json(told)
        return
    different = len(set(drawn.files))
    kept, equal = different - drawn.fresh, len(grid.cells) - different
    screen.put(
        f"{place.out}: {amount(len(grid.cells), 'picture')},"
        f" {drawn.fresh} drawn in {drawn.seconds:.1f} s"
        + (f", {kept} there already" if kept else "")
        + (f", {equal} the same as others" if equal else "")
    )
    for file in (*files[1:], *made):
        screen.put(f"{file}")


def _models(a: str, b: str, from_: str, presets: str) -> Models:
    from plymix.cli.recipes import load
    from plymix.images.rows import Models

    if from_:
        if a or b:
            raise Refusal("--from says the models; leave out A and B")
        found, _ = load(from_, (), presets)
        return Models(start=found)
    if not a or not b:
        raise Refusal("compare wants two models, or --from RECIPE, or --redo SHEET")
    return Models(a, b, options={"presets": presets} if presets else {})


@contextmanager
def _kitchen(folders: Sequence[str]) -> Iterator[tuple[Kitchen, screen.ProgressLine]]:
    from plymix.images.compare import Kitchen

    line = screen.ProgressLine()
    with Kitchen(folders, line) as kitchen:
        yield kitchen, line


def _saved(text: str, grid: Grid, place: Place, force: bool) -> tuple[Any, Path]:
    """(recipe, file) of `--save 2` or `--save 2=mix.safetensors`."""
    from plymix import api

    number, _, file = text.partition("=")
    if not number.isdecimal() or not 1 <= int(number) <= len(grid.rows.values):
        raise Refusal(f"--save {text}: write a row, 1 to {len(grid.rows.values)}, or ROW=FILE")
    row = int(number) - 1
    found = {id(c.recipe): c.recipe for c in grid.cells if c.row == row}
    if len(found) > 1:
        raise Refusal(f"--save {text}: row {number} is {len(found)} merges; say one in --each")
    path = outputs.path_of(file or place.out.with_name(f"{place.out.stem}-row{number}.safetensors"))
    api.ready(path, force)
    return next(iter(found.values())), path


def _write(kitchen: Kitchen, recipe: Any, path: Path) -> Path:
    from plymix import api

    with screen.ProgressLine() as progress:
        return api.run(kitchen.plan(recipe), path, progress=progress).path


def _again(
    redo: str,
    cell: str,
    output: str,
    drawing: Drawing,
    models: Sequence[str],
    force: bool,
    json: bool,
) -> None:
    from plymix.images import compare as comparing
    from plymix.images.pixels import writable

    path = Path(redo)
    record = comparing.recalled(path, cell)
    out = writable(output or outputs.shortened(path.stem, "-again.png", 200), force)
    folders = [*models, str(path.parent), str(path.parent.parent)]
    with _kitchen(folders) as (kitchen, progress), drawing.opened(record["via"]) as (_, backend):
        kitchen.paths = comparing.known_paths(path)
        with progress as line:
            same = comparing.again(record, kitchen, backend, out, line)
    if json:
        screen.put_json({"file": str(out), "same": same})
        return
    screen.put(f"{out}: " + ("the same pixels" if same else "not the same pixels"))
    if not same and record["backend"] != backend.label:
        screen.note(f"it was drawn with {record['backend']}, and now with {backend.label}")


# --- blocks -------------------------------------------------------------------------------------


def blocks(
    a: Annotated[str, argument("The model whose pictures are moved.")],
    b: Annotated[str, argument("The model whose blocks are put in, one at a time.")],
    /,
    *,
    output: Annotated[str, option("The map.", "--output", "-o", metavar="FILE.png")] = "blocks.png",
    prompt: Prompts = (),
    seeds: Seeds = "1-4",
    picture: Picture = Picture(),
    drawing: Drawing = Drawing(),
    models: Folders = (),
    force: Force = False,
    json: Json = False,
) -> None:
    """Find out which block does what, by pictures.

    Of A, each block in turn is B's; how far the picture moves is measured, for each prompt and
    seed, and drawn as bars and as a map. "structure" is 1 - MS-SSIM of the brightness (shapes and
    edges; 0: no change), "pixel" the root mean square of all differences (colours too). No trained
    network judges.

    Beside the map come FILE-pictures.png with all pictures, a .json and an .html page. Stopped, the
    same command goes on where it was.
    """
    from plymix.engine.files import write_whole
    from plymix.images import blocks as mapping
    from plymix.images import compare as comparing
    from plymix.images import grid as grids
    from plymix.images import pixels
    from plymix.images.rows import Models

    out = pixels.writable(output, force)
    outputs.file(out.with_suffix(".json"), force)
    place = comparing.place(out.with_name(f"{out.stem}-pictures.png"), force)
    start = Models(a, b)
    with _kitchen(models) as (kitchen, progress), drawing.opened() as (via, backend):
        rows = mapping.swaps(start, kitchen)
        _, *others = grids.given(start, ("A",), seeds, prompt)
        several = [axis for axis in others if len(axis.values) > 1]
        columns, pages = (*several, grids.NONE, grids.NONE)[:2]
        fixed = [axis.values[0] for axis in others if axis not in several]
        settings = grids.applied(picture.settings(), fixed)
        grid = grids.build(start, fixed, settings, columns, rows, pages)
        with progress as line:
            drawn = comparing.draw(grid, kitchen, backend, via, place, progress=line)
        title = grids.title(grid, fixed, settings)
        files = comparing.finish(drawn, place, kitchen.where(), title=title)
    moved = mapping.measured(drawn)
    names = [
        "\n".join(filter(None, (page.label, column.label)))
        for page in pages.values
        for column in columns.values
    ]
    heading = f"How far each block of {urls.name(b)} moves the pictures of {urls.name(a)}\n{title}"
    pixels.save(mapping.heat(moved, names, heading), out, {})
    told = {
        "a": urls.name(a),
        "b": urls.name(b),
        "measures": mapping.ABOUT,
        "pictures": [" ".join(name.split("\n")) for name in names],
        "settings": [c.settings for c in grid.cells if c.row == 0],
        "blocks": moved[:-1],
        "whole": moved[-1],
    }
    document = comparing.as_json(told)
    write_whole(out.with_suffix(".json"), document.encode())
    if json:
        screen.put(document)
        return
    _bars(moved)
    for file in (out, out.with_suffix(".json"), *files):
        screen.put(f"{file}")


def _bars(moved: Sequence[Moved]) -> None:
    """The map in the terminal: a bar per block, to the scale of the block that moves most."""
    most = max((m.structure for m in moved[:-1]), default=0.0)
    cells = max(8, screen.width() - 36)
    rows = []
    for m in moved:
        whole = m is moved[-1]
        bar = "" if whole else screen.bar(m.structure / most if most else 0.0, cells, rest=" ")
        label = screen.shortened(m.block, 24) if whole else m.block
        said = (f"{m.structure:.3f}", f"{m.pixel:.3f}")
        rows.append((label, "(all of it)" if whole else bar, *said))
    screen.table(("block", "structure", ">", ">pixel"), rows)
