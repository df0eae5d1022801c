"""A picture's settings as the text that A1111 writes into its PNGs, and other tools read.

    a cat
    Negative prompt: bad
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: ...

Source: `modules/processing.py`, `create_infotext`, and `infotext_utils.quote`, of A1111's web UI.
"""

from __future__ import annotations

import json

from plymix.images.base import SAMPLERS, Settings


def text(settings: Settings, model: str, version: str) -> str:
    """The text of one picture. `model` is what it was drawn with, for people."""
    fields = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.sampler].a1111,
        "CFG scale": f"{settings.cfg:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": model,
        "Version": f"plymix {version}",
    }
    lines = [settings.prompt]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As JSON where it holds what separates the fields."""
    if any(c in value for c in ',:"\n'):
        return json.dumps(value, ensure_ascii=False)
    return value
