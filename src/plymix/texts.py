"""What people write, as recipes and presets: read whole, but never a model by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plymix.errors import FormatError, Refusal

MOST = 16 << 20
"""Bytes of a text at most; the largest graphs and histories have a hundredth of it."""


def read(path: Path, what: str, most: int = MOST) -> bytes:
    """The bytes of the file `path`, which is to be `what` ("the recipe"), `most` at most.

    Raises Refusal for what cannot be read, FormatError for what is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as e:
        raise Refusal(f"cannot read {what} {path}: {e.strerror or e}") from None
    if len(data) > most:
        raise FormatError(f"{path.name} has more than {most:,} bytes; it cannot be {what}")
    return data


def text(path: Path, what: str) -> str:
    """The same as text: UTF-8, with a byte order mark or without. Raises FormatError, too."""
    try:
        return read(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FormatError(f"{path.name} is not UTF-8 text (byte {e.start})") from None


class Twins(ValueError):
    """A table of JSON says a key twice."""


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without twins among its keys, for `json.loads`. Raises Twins."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twin = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise Twins(f"key {twin!r} occurs twice")
    return found
