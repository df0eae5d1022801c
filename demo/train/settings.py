"""What decides a training run, as one frozen value; presets are tables of it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import msgspec
from msgspec.structs import replace

from plymix.errors import Refusal


class Stage(msgspec.Struct, frozen=True):
    """One training stage: until `steps` are made, or, where that is 0, `seconds` have passed."""

    batch: int
    lr: float
    steps: int = 0
    seconds: float = 0.0

    def done(self, steps: int, seconds: float) -> float:
        """The share of it that so many steps in so many seconds are, at most 1."""
        return min(1.0, steps / self.steps if self.steps else seconds / max(self.seconds, 1e-9))


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides the weights but for the kind of device. Sizes are in pixels.

    concepts     "core" or "all" (`concepts.toml`); `most` of them, 0 for no limit
    placements   pictures of a concept in each style that the U-Nets see
    crop         of the pictures that the autoencoder learns from; 0 is none
    empty        share of captions that say nothing, for guidance
    tune         learning rate of the text encoder beside U-Net A, as a share of the U-Net's
    ema          of the weights that each stage keeps

    Widths grow where SD1's do, and only there: else the files would have other keys than SD1's.
    """

    vae: Stage
    text: Stage
    a: Stage
    b: Stage
    seed: int = 0
    concepts: str = "core"
    most: int = 0
    size: int = 128
    crop: int = 0
    placements: int = 8
    empty: float = 0.12
    tune: float = 0.1
    ema: float = 0.999
    warmup: int = 100
    unet_widths: tuple[int, ...] = (32, 64, 80, 80)
    unet_groups: int = 8
    unet_heads: int = 2
    vae_widths: tuple[int, ...] = (16, 32, 48, 48)
    vae_groups: int = 8
    text_width: int = 48
    text_layers: int = 12
    text_heads: int = 4
    tower_widths: tuple[int, ...] = (24, 48, 96, 128, 128)
    tower_features: int = 64


SHARES = {"vae": 0.19, "text": 0.08, "a": 0.46, "b": 0.24}
"""Of the time asked for; what is left is for drawing, encoding and writing."""

BATCHES = {
    "cpu": {"vae": 8, "text": 96, "a": 24, "b": 24},
    "cuda": {"vae": 64, "text": 512, "a": 512, "b": 512},
}
RATES = {
    "cpu": {"vae": 2e-3, "text": 1e-3, "a": 1e-3, "b": 6e-4},
    "cuda": {"vae": 1e-3, "text": 1e-3, "a": 1.2e-3, "b": 6e-4},
}
HOURS = {"cpu": {"quick": 0.75, "full": 3.0}, "cuda": {"quick": 0.1, "full": 0.45}}

CPU_ONLY = {"concepts": "core", "crop": 64, "placements": 4}
CUDA_ONLY = {"concepts": "all", "crop": 0, "placements": 16}


def preset(device: str, hours: float, seed: int = 0) -> Settings:
    """The settings for a kind of device ("cpu", "cuda") and about so many hours."""
    stages = {
        name: Stage(BATCHES[device][name], RATES[device][name], seconds=hours * 3600 * share)
        for name, share in SHARES.items()
    }
    own = CPU_ONLY if device == "cpu" else CUDA_ONLY
    return msgspec.convert({**stages, **own, "seed": seed}, Settings)


def further(settings: Settings, hours: float) -> Settings:
    """U-Net A is trained so much longer, and then B, anew, in proportion. Raises Refusal."""
    if settings.a.steps or hours <= 0:
        raise Refusal("--further wants hours above 0, for a run that was given hours, not steps")
    seconds = settings.a.seconds + 3600 * hours
    factor = seconds / settings.a.seconds
    longer = replace(settings.b, seconds=settings.b.seconds * factor)
    return replace(settings, a=replace(settings.a, seconds=seconds), b=longer)


def needed(module: str) -> Any:
    """An imported library of the extra `train`. Raises Refusal saying what to install."""
    try:
        return import_module(module)
    except ImportError as e:
        raise Refusal(f'training needs {module} ({e}): pip install "plymix[train]"') from None
