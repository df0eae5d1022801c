"""Architectures: what a key means, and what a file is, from keys and shapes alone.

One file in `data/` per architecture; this module is their small interpreter.

    sdxl = load("sdxl")
    sdxl.place("model.diffusion_model.input_blocks.4.1.norm.weight")  # block IN04 of the unet
    detect({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3), ...}).title
    # "SD1 inpainting checkpoint"

To add an architecture, add its file and the golden header of one of its models in the tests.
"""

from __future__ import annotations

import os
from pathlib import Path

from plymix.archs.detection import Detection, detect
from plymix.archs.model import (
    Architecture,
    Component,
    Place,
    ema_key,
    is_buffer,
    is_leftover,
    is_schedule,
    load,
    markers,
    names,
    quantised,
)
from plymix.archs.predicts import Prediction, prediction, zero_terminal_snr


def described(file: str | os.PathLike[str]) -> Architecture | None:
    """The architecture that a user's file describes; None for no file. Raises Refusal."""
    if not file:
        return None
    from plymix.archs import own

    return own.architecture(own.read(Path(file).expanduser()))


__all__ = [
    "Architecture",
    "Component",
    "Detection",
    "Place",
    "Prediction",
    "described",
    "detect",
    "ema_key",
    "is_buffer",
    "is_leftover",
    "is_schedule",
    "load",
    "markers",
    "names",
    "prediction",
    "quantised",
    "zero_terminal_snr",
]
