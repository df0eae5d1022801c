"""Validation pictures as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plymix.images.pixels import save

GAP = 4


def array(picture: Any) -> Any:
    """A picture [3, h, w] in -1..1 as uint8 [h, w, 3]."""
    levels = ((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return levels.permute(1, 2, 0).byte().cpu().numpy()


def mosaic(pictures: Sequence[Any], columns: int, path: Path) -> None:
    """Pictures [3, h, w] in rows of `columns`, without labels."""
    made = [array(p) for p in pictures]
    height, width = (n + GAP for n in made[0].shape[:2])
    rows = -(-len(made) // columns)
    sheet = np.full((rows * height, columns * width, 3), 128, np.uint8)
    for i, picture in enumerate(made):
        y, x = height * (i // columns), width * (i % columns)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    save(Image.fromarray(sheet), path, {})
