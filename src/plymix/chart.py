"""Bars with names and numbers, drawn as SVG, or as PNG where Pillow is installed.

A drawing is a list of rectangles and lines of text; each format draws the same list.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union
from xml.sax.saxutils import escape

from plymix import outputs
from plymix.engine.files import write_whole
from plymix.errors import Refusal

INK, SOFT, BAR, PAPER = "#24292f", "#6e7781", "#0969da", "#ffffff"
ROW, TOP, NAME, LENGTH, NUMBER, LETTER = 20, 66, 110, 480, 170, 12
"""Pixels: a row's height, the title's, the widths of names, bars and numbers, a letter's height."""


class Bar(NamedTuple):
    """`share` is the bar's length, from 0 to 1; `said` the numbers beside it."""

    name: str
    share: float
    said: str


@dataclass(frozen=True)
class Rectangle:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Text:
    """A line of text that begins at x, with its middle at the height y."""

    x: float
    y: float
    text: str
    colour: str = INK
    size: int = LETTER


Shape = Union[Rectangle, Text]


@dataclass(frozen=True)
class Chart:
    """A title, lines below it, and bars."""

    title: str
    lines: Sequence[str]
    bars: Sequence[Bar]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        below = ROW * (len(self.lines) + len(self.bars))
        return NAME + LENGTH + NUMBER + 40, TOP + below + 20

    def shapes(self) -> Iterator[Shape]:
        width, height = self.size
        yield Rectangle(0, 0, width, height, PAPER)
        yield Text(20, 30, self.title, size=16)
        y = TOP
        for line in self.lines:
            yield Text(20, y, line, SOFT)
            y += ROW
        for bar in self.bars:
            yield Text(20, y, bar.name)
            length = LENGTH * min(max(bar.share, 0.0), 1.0)
            if length:
                yield Rectangle(NAME, y - 7, max(length, 1.0), 14, BAR)
            yield Text(NAME + LENGTH + 12, y, bar.said, SOFT)
            y += ROW


def check(path: Path, force: bool) -> None:
    """Refuse a picture that cannot or should not be written, before any work."""
    if path.suffix.lower() not in _WRITERS:
        raise Refusal(f"{path}: a plot is written as .svg or .png; choose one of these endings")
    if path.suffix.lower() == ".png":
        _pillow()
    outputs.file(path, force)


def write(chart: Chart, path: Path) -> None:
    """Write `chart` in the format of the ending of `path`: a whole file or none."""
    write_whole(path, _WRITERS[path.suffix.lower()](chart))


def svg(chart: Chart) -> bytes:
    """The drawing as an SVG 1.1 file, with fonts that every system has."""
    width, height = chart.size
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif">'
    ]
    for shape in chart.shapes():
        if isinstance(shape, Rectangle):
            lines.append(
                f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:.6g}"'
                f' height="{shape.height:g}" fill="{shape.colour}"/>'
            )
        else:
            lines.append(
                f'<text x="{shape.x:g}" y="{shape.y:g}" dominant-baseline="central"'
                f' font-size="{shape.size}" fill="{shape.colour}">{_printable(shape.text)}</text>'
            )
    return "\n".join([*lines, "</svg>\n"]).encode()


def _printable(text: str) -> str:
    """Text for XML: what it cannot hold (control characters, lone surrogates) becomes '?'."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def png(chart: Chart) -> bytes:
    """The drawing as a PNG file. Raises Refusal where Pillow is missing."""
    image, draw, font = _pillow()
    made = image.new("RGB", chart.size)
    pen = draw.Draw(made)
    for shape in chart.shapes():
        if isinstance(shape, Rectangle):
            corner = shape.x + shape.width - 1, shape.y + shape.height - 1
            pen.rectangle((shape.x, shape.y, *corner), fill=shape.colour)
        else:
            letters = font.load_default(shape.size)
            pen.text((shape.x, shape.y), shape.text, shape.colour, letters, anchor="lm")
    out = io.BytesIO()
    made.save(out, "PNG")
    return out.getvalue()


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise Refusal(
            "a plot as .png needs Pillow: pip install pillow; .svg needs nothing"
        ) from None
    return Image, ImageDraw, ImageFont


_WRITERS = {".svg": svg, ".png": png}
