"""Pictures on disk: PNG files that carry how they were made.

parameters   the settings in A1111's text, which other tools read
plymix       the cell's record (see `compare.Record`) as JSON, from which it can be made again
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from plymix import outputs
from plymix.engine.files import write_whole
from plymix.errors import Refusal
from plymix.images.base import Picture, need

RECORD = "plymix"

BESIDE = 32
"""Bytes by which names of what goes beside a sheet are longer: "-pictures", a page's number."""


def pillow() -> Any:
    """`PIL.Image`. Raises Refusal where Pillow is missing."""
    need("PIL", "drawing a sheet")
    from PIL import Image

    return Image


def writable(out: str | os.PathLike[str], force: bool) -> Path:
    """The path of a picture to be. Raises Refusal where it cannot or should not be written."""
    pillow()
    path = outputs.path_of(out)
    if path.suffix.lower() != ".png":
        raise Refusal(f"{path} does not end in .png")
    outputs.file(path, True, beside=BESIDE)
    if path.exists() and not force:
        raise Refusal(f"{path} exists; say --force to replace it (pictures that fit are kept)")
    return path


def save(image: Any, path: Path, texts: dict[str, str]) -> None:
    """Write a PNG, whole or not at all."""
    pillow()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)  # as UTF-8 (iTXt) where Latin-1 does not do
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    write_whole(path, data.getvalue())


def load(path: Path) -> Picture:
    """The pixels of a PNG: uint8 [height, width, 3]. Raises Refusal for what is no picture."""
    import numpy as np

    image = pillow()
    try:
        with image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as e:
        raise Refusal(f"cannot read the picture {path}: {e}") from None


def record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG; None if it has none or is damaged."""
    image = pillow()
    try:
        with image.open(path) as opened:
            opened.load()
            found = json.loads(opened.info.get(RECORD, "null"))
    except (OSError, SyntaxError, ValueError):
        return None
    return found if isinstance(found, dict) else None
