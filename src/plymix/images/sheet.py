"""Drawing: labelled sheets of pictures, pixel for pixel.

Text is drawn in the font that Pillow brings; letters it lacks come from the first font of this
machine that is known to have them, and are written as their code (U+65E5) where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from plymix.images.base import Picture
from plymix.images.pixels import pillow

INK, PAPER, FAINT = (24, 24, 27), (255, 255, 255), (113, 113, 122)
GAP = 4
"""Pixels between two pictures."""
HEADING = 320
"""Pixels that a title has room for at least, over a small picture alone."""

OTHER_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc", "DroidSansFallbackFull.ttf",  # Linux
    "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "seguisym.ttf",  # Windows
    "Hiragino Sans GB.ttc", "PingFang.ttc", "Arial Unicode.ttf",  # macOS
    "DejaVuSans.ttf", "unifont.otf",
)  # fmt: skip


class Pen:
    """A font size, and what text measures in it."""

    def __init__(self, size: int) -> None:
        pillow()
        self.size = size
        self.line = round(size * 1.3)
        self._fonts = [*_fonts(size)]

    def runs(self, text: str) -> Iterable[tuple[str, Any]]:
        """`text` in pieces, each with a font that has its letters."""
        run, font = "", self._fonts[0]
        for letter in text:
            found = next((f for f in self._fonts if _has(f, letter)), None)
            shown = letter if found else f"U+{ord(letter):04X}"
            found = found or self._fonts[0]
            if found is not font and run:
                yield run, font
                run = ""
            run, font = run + shown, found
        if run:
            yield run, font

    def width(self, text: str) -> int:
        return sum(round(font.getlength(run)) for run, font in self.runs(text))

    def write(self, draw: Any, at: tuple[int, int], text: str, ink: Any = INK) -> None:
        x, y = at
        for run, font in self.runs(text):
            draw.text((x, y), run, font=font, fill=ink)
            x += round(font.getlength(run))

    def wrapped(self, text: str, width: int, lines: int) -> list[str]:
        """`text` in at most `lines` lines of at most `width` pixels; the rest is '...'."""
        found: list[str] = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split(" "):
                both = f"{line} {word}".lstrip() if line else word
                if self.width(both) <= width:
                    line = both
                    continue
                if line:
                    found.append(line)
                line = word
                while line and self.width(line) > width:  # a word longer than a line
                    n = max(1, self._fitting(line, width))
                    found.append(line[:n])
                    line = line[n:]
            found.append(line)
        if len(found) > lines:
            last = found[lines - 1]
            while last and self.width(last + "...") > width:
                last = last[:-1]
            found = [*found[: lines - 1], last + "..."]
        return found

    def parts(self, text: str, width: int, lines: int) -> list[str]:
        """As `wrapped`, with at most `lines` lines for each line of `text`."""
        return [one for part in text.split("\n") for one in self.wrapped(part, width, lines)]

    def _fitting(self, text: str, width: int) -> int:
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle]) <= width else (low, middle - 1)
        return low


@cache
def _fonts(size: int) -> tuple[Any, ...]:
    from PIL import ImageFont

    found = [ImageFont.load_default(size)]
    for name in OTHER_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


@cache
def _blank(font: Any) -> bytes:
    """What `font` draws for a letter that no font has."""
    return _drawn(font, chr(0x10FFFF))


def _drawn(font: Any, letter: str) -> bytes:
    mask = font.getmask(letter)
    return repr(mask.size).encode() + bytes(mask)


@cache
def _has(font: Any, letter: str) -> bool:
    return letter == " " or (letter.isprintable() and _drawn(font, letter) != _blank(font))


def pictures(
    cells: Sequence[Sequence[Picture]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> Any:
    """A sheet as a Pillow image: pictures [rows][columns] with their labels, left and above.

    Pictures keep their pixels; smaller ones lie in the middle of their column and row. Each line of
    the title may become three.
    """
    from PIL import Image, ImageDraw

    heights = [max(p.shape[0] for p in row) for row in cells]
    widths = [max(row[i].shape[1] for row in cells) for i in range(len(columns))]
    pen = Pen(min(28, max(12, min(widths) // 20)))
    left = 0
    if any(rows):
        longest = max(pen.width(word) for label in rows for word in label.split("\n"))
        left = min(longest, max(160, min(widths) // 2)) + 3 * GAP
    names = (
        [pen.wrapped(c, w, 6) for c, w in zip(columns, widths, strict=True)] if any(columns) else []
    )
    width = left + sum(widths) + GAP * (len(columns) + 1)
    width = max(width, HEADING) if title else width
    heading = pen.parts(title, width - 2 * GAP, 3) if title else []
    top = GAP + pen.line * len(heading) + (GAP if heading else 0)
    below = pen.line * max((len(n) for n in names), default=0) + (GAP if names else 0)
    height = top + below + sum(heights) + GAP * (len(rows) + 1)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        pen.write(draw, (GAP, GAP + i * pen.line), line, FAINT)
    x = left + GAP
    for name, w in zip(names, widths, strict=False):
        for i, line in enumerate(name):
            pen.write(draw, (x + (w - pen.width(line)) // 2, top + i * pen.line), line)
        x += w + GAP
    y = top + below + GAP
    for r, row in enumerate(cells):
        lines = pen.wrapped(rows[r], left - 3 * GAP, max(1, heights[r] // pen.line)) if left else []
        start = y + max(0, (heights[r] - pen.line * len(lines)) // 2)
        for i, line in enumerate(lines):
            pen.write(draw, (GAP, start + i * pen.line), line)
        x = left + GAP
        for picture, w in zip(row, widths, strict=True):
            at = (x + (w - picture.shape[1]) // 2, y + (heights[r] - picture.shape[0]) // 2)
            sheet.paste(Image.fromarray(picture), at)
            x += w + GAP
        y += heights[r] + GAP
    return sheet


def difference(picture: Picture, other: Picture, gain: int = 2) -> Picture:
    """|picture - other| * gain in each channel; a picture of another size is as it is."""
    import numpy as np

    if picture.shape != other.shape:
        return picture
    apart = np.abs(picture.astype(np.int16) - other.astype(np.int16)) * gain
    return np.minimum(apart, 255).astype(np.uint8)
