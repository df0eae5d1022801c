"""Which block does what? Each block of A alone exchanged for B's, and how far the picture moves.

The rows are A, A with one block of B at a time, and B; drawn as any sheet is (`compare`), so a
stopped map goes on. How far each picture is from A's, for the same prompt and seed, is measured by
`distance` and averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plymix.images import distance, grid, rows
from plymix.images.compare import Drawn, Kitchen
from plymix.images.sheet import GAP, INK, PAPER, Pen

MEASURES = ("structure", "pixel")

ABOUT = {
    "structure": "1 - MS-SSIM of the brightness (Wang et al. 2003): 0 no change, 1 unrelated",
    "pixel": "root mean square of the differences of all pixels, of full scale",
}


@dataclass(frozen=True)
class Moved:
    """How far a block moves the picture: means over all pictures, and each one (see `distance`)."""

    block: str
    structure: float
    pixel: float
    each: tuple[dict[str, float], ...]


def swaps(models: rows.Models, kitchen: Kitchen) -> grid.Axis:
    """The rows: A, each block, text encoder and VAE exchanged alone, and B."""
    plan = kitchen.plan(rows.made(("0.5", "vae=b"), models))
    assert plan.arch is not None
    used = {place.block for place in plan.places.values() if not place.buffer}
    blocks = [b for b in (*plan.arch.blocks, "BASE") if b in used]
    values = [grid.merge("A", models)]
    values += [grid.Value(b, words=("A", f"{b}=1")) for b in blocks]
    if "VAE" in used:
        values.append(grid.Value("VAE", words=("0", "vae=b")))
    return grid.Axis("block", (*values, grid.merge("B", models)))


def measured(drawn: Drawn) -> tuple[Moved, ...]:
    """Each row's distance from the first, over all columns and pages; B's is the last."""
    found = []
    pages, columns = (range(len(a.values)) for a in (drawn.grid.pages, drawn.grid.columns))
    first = {(p, c): drawn.picture(p, 0, c) for p in pages for c in columns}
    for r, value in enumerate(drawn.grid.rows.values[1:], 1):
        each = []
        for at, picture in first.items():
            other = drawn.picture(at[0], r, at[1])
            each.append({name: getattr(distance, name)(picture, other) for name in MEASURES})
        means = {name: sum(e[name] for e in each) / len(each) for name in MEASURES}
        found.append(Moved(value.label, means["structure"], means["pixel"], tuple(each)))
    return tuple(found)


def heat(moved: Sequence[Moved], columns: Sequence[str], title: str) -> Any:
    """The map as a Pillow image: a row per block, a column per picture, the mean in front.

    The darker, the farther; scaled to the farthest block (B, the last row, apart). Each line of a
    column's name may become three.
    """
    from PIL import Image, ImageDraw

    pen = Pen(14)
    side, high = 72, 22
    left = max(pen.width(m.block) for m in moved) + 3 * GAP
    names = ["mean", *columns]
    lines = [pen.parts(name, side - GAP, 3) for name in names]
    width = left + side * len(names) + GAP
    heading = pen.wrapped(title, max(width, 360) - 2 * GAP, 6)
    top = GAP + pen.line * (len(heading) + max(map(len, lines))) + 2 * GAP
    image = Image.new("RGB", (max(width, 360), top + high * len(moved) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(heading):
        pen.write(draw, (GAP, GAP + i * pen.line), line)
    for c, name in enumerate(lines):
        for i, line in enumerate(name):
            at = (left + c * side, GAP + pen.line * (len(heading) + i) + GAP)
            pen.write(draw, at, line)
    most = max((e["structure"] for m in moved[:-1] for e in m.each), default=0.0)
    for r, row in enumerate(moved):
        y = top + r * high
        pen.write(draw, (GAP, y + 2), row.block)
        for c, value in enumerate((row.structure, *(e["structure"] for e in row.each))):
            share = min(value / most, 1.0) if most else 0.0
            x = left + c * side
            draw.rectangle((x, y, x + side - 2, y + high - 2), fill=colour(share))
            ink = PAPER if share > 0.5 else INK
            pen.write(draw, (x + GAP, y + 2), f"{value:.3f}", ink)
    return image


HEAT = ((255, 255, 255), (254, 217, 142), (236, 112, 20), (153, 52, 4), (70, 20, 0))
"""From nothing to all: white, sand, orange, brown."""


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share 0..1."""
    at = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(at), len(HEAT) - 2)
    part = at - low
    r, g, b = (round(x + (y - x) * part) for x, y in zip(HEAT[low], HEAT[low + 1], strict=True))
    return r, g, b
