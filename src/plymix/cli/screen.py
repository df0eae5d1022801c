"""What is written to the terminal, and how: any encoding, any width, any file name.

Nothing here needs more than this file: a library for tables takes longer to import than a plan.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from plymix.engine import Progress

ASCII = str.maketrans(
    {"×": "x", "α": "alpha", "β": "beta", "…": "~", "█": "#", "░": ".", "–": "-", "±": "+-"}
    | dict.fromkeys("▏▎▍▌▋▊▉", "")
)
"""What stands for plymix's own signs on a terminal that lacks them."""

EIGHTHS = ("", *"▏▎▍▌▋▊▉")
WIDE = 100
"""Columns where there is no terminal to ask, and the most that tables use."""

GAP = "  "
"""Between two columns of a table."""

LEAST = 16
"""Columns that a column which folds has in any case."""


def prepare() -> None:
    """Make both streams take any text: what they cannot encode is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def plain(text: str) -> str:
    """`text` with what could move the cursor or break the encoding written as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() or c in "\n\u00a0\u3000"
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def encodable(text: str, stream: TextIO) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


def fit(text: str, stream: TextIO) -> str:
    """`text` as `stream` can show it."""
    text = plain(text)
    return text if encodable(text, stream) else text.translate(ASCII)


def put(text: str, stream: TextIO | None = None) -> None:
    """Write a line, by default to stdout."""
    stream = stream or sys.stdout
    stream.write(fit(text, stream) + "\n")


def put_json(document: Any) -> None:
    """The one document of `--json`, in ASCII."""
    put(json.dumps(document, indent=2))


def note(text: str) -> None:
    put(f"note: {text}", sys.stderr)


def error(text: str) -> None:
    """An error's text, of which no more than two lines are its own."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["failed"]
    put("\n".join(["plymix: " + lines[0], *lines[1:2]]), sys.stderr)


def width() -> int:
    """Columns that tables may use."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return WIDE
    return max(40, min(WIDE, shutil.get_terminal_size().columns))


def bar(share: float, cells: int, *, rest: str = "░") -> str:
    """`share` (0..1, clamped) of `cells`, to an eighth of a cell: '█████▌░░░░'."""
    blocks = bool(encodable("█▌░", sys.stdout))
    filled = min(max(share, 0.0), 1.0) * cells
    whole, eighth = divmod(round(filled * 8), 8) if blocks else (round(filled), 0)
    text = "█" * whole + EIGHTHS[eighth]
    return fit(text + rest * (cells - len(text)), sys.stdout)


def percent(share: float) -> str:
    """0.9166666667 -> '91.67 %', 1 -> '100 %'."""
    return f"{round(100 * share, 2) + 0.0:g} %"


def count(n: int) -> str:
    """A number of parameters: 859520964 -> '859.5 M'."""
    for unit, one in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= one:
            return f"{n / one:.4g} {unit}"
    return str(n)


def cells(text: str) -> int:
    """Columns that `text` takes on a terminal: two for wide letters, none for marks on others."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(
        0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text
    )


def shortened(name: str, most: int) -> str:
    """A name in `most` columns at most, its middle left out where it is longer."""
    name = fit(name, sys.stdout).replace("\n", "\\n")
    if cells(name) <= most:
        return name
    tail = name[-max(1, most // 2 - 1) :]
    while cells(tail) > most // 2:
        tail = tail[1:]
    gap = fit("…", sys.stdout)
    return f"{_start(name, most - 1 - cells(tail))}{gap}{tail}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: int = -1) -> None:
    """A table of plain text; a heading that begins with '>' is right-aligned.

    The column number `wrap` takes what is left of the width and folds. Nothing is cut: where that
    is too little, lines are longer than the terminal, which folds them.
    """
    shown = [[column.lstrip(">") for column in columns]]
    shown += ([fit(text, sys.stdout).replace("\n", "\\n") for text in row] for row in rows)
    widths = [max(map(cells, column)) for column in zip(*shown, strict=True)]
    wrap %= len(columns)
    others = sum(widths) - widths[wrap] + len(GAP) * (len(columns) - 1)
    widths[wrap] = min(widths[wrap], max(LEAST, width() - others))
    for row in shown:
        first = True
        for line in _folded(row[wrap], widths[wrap]) or [""]:
            texts = (line if i == wrap else text if first else "" for i, text in enumerate(row))
            padded = (
                " " * (wide - cells(text)) + text
                if column.startswith(">")
                else text + " " * (wide - cells(text))
                for text, wide, column in zip(texts, widths, columns, strict=True)
            )
            sys.stdout.write(GAP.join(padded).rstrip() + "\n")
            first = False


def _folded(text: str, most: int) -> list[str]:
    """`text` in lines of at most `most` columns, between words where that can be."""
    lines: list[str] = []
    while cells(text) > most:
        start = _start(text, most) or text[:1]
        space = start.rfind(" ") if text[len(start) : len(start) + 1] != " " else len(start)
        line = start[:space] if space > 0 else start
        lines.append(line)
        text = text[len(line) :].lstrip(" ")
    return [*lines, text] if text else lines


def _start(text: str, most: int) -> str:
    """As much of the beginning of `text` as has `most` columns."""
    while cells(text) > most:
        text = text[: min(most, len(text) - 1)]
    return text


# --- progress -----------------------------------------------------------------------------------

PATIENCE = 0.5
"""Seconds before a progress line appears."""

EVERY = {True: 0.1, False: 10.0}
"""Seconds between two lines, on a terminal and elsewhere."""

COUNTED = ("hashing the inputs", "first pass over the tensors")
"""Phases that count things rather than bytes."""

TELLING = 0.005
"""Share of the work from which on its speed says how long the rest takes."""


class ProgressLine:
    """A progress callback: one line on stderr, redrawn in place and gone when the work is done.

    Where stderr is no terminal, a line now and then. No thread, no memory to speak of.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = 0
        self._last = 0.0 if self._live else PATIENCE

    def __call__(self, now: Progress) -> None:
        if now.seconds < self._last:  # another phase has begun
            self._last = 0.0
        if now.seconds < max(PATIENCE, self._last + EVERY[self._live]):
            return
        self._last = now.seconds
        text = fit(describe(now), sys.stderr)
        if self._live:
            room = max(20, shutil.get_terminal_size().columns - 3)
            self._write(text[:room])
        else:
            put(text, sys.stderr)

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._shown))
        sys.stderr.flush()
        self._shown = len(text)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._shown += len("^C")  # which a terminal may have added
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()


def describe(now: Progress) -> str:
    """'merging  45 %  0.96 of 2.13 GB, 1.2 GB/s, 1 s left'"""
    from plymix.api import size

    if now.phase in COUNTED:
        return f"{now.phase}: {now.done} of {now.total}"
    share = now.done / now.total if now.total else 1.0
    if now.phase == "drawing":  # thousandths of pictures
        text = f"drawing: {now.done // 1000} of {now.total // 1000} pictures"
        left = now.seconds * (1 / share - 1) if share else 0.0
        return text + (f", {_duration(left)} left" if share else "")
    text = f"{now.phase} {share:4.0%} of {size(now.total)}"
    if share >= TELLING and now.seconds:
        speed = now.done / now.seconds
        text += f", {size(speed)}/s, {_duration((now.total - now.done) / speed)} left"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
