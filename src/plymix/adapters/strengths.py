"""How strong a LoRA is in each block: its strength times a factor.

Factors are told as sd-webui-lora-block-weight tells them: a preset of its, a list of 12, 17, 20, 26
or 61 numbers that stand for named blocks (a block that a list does not name gets 0), or numbers by
block name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any

import msgspec

from plymix import weights
from plymix.archs import Architecture, Place, load
from plymix.errors import Refusal, unknown

SD_LISTS = ("sd1", "sdxl")
"""The architectures whose lists others with blocks of the same names may use."""


@dataclass(frozen=True)
class Strength:
    """One LoRA's: of the denoiser and of the text encoders, and the factor of each block."""

    model: float
    text_encoder: float
    factors: Mapping[str, float]

    def of(self, place: Place) -> float:
        """The strength in a place's component."""
        return self.text_encoder if place.component.startswith("text_encoder") else self.model

    def factor(self, place: Place) -> float:
        """What a place's block multiplies it by; 1 beside all blocks (VAE)."""
        return self.factors.get(place.block, 1.0)


def read(
    params: Mapping[str, Any], count: int, arch: Architecture, where: str
) -> tuple[Strength, ...]:
    """The strengths of `count` LoRAs, from a step's fields. Raises Refusal that names the field."""
    model = _numbers(params.get("strength", 1.0), count, f"{where}.strength")
    said = params.get("te_strength")
    text = model if said is None else _numbers(said, count, f"{where}.te_strength")
    field = f"{where}.blocks"
    blocks = params.get("blocks", 1.0)
    one_each = isinstance(blocks, (list, tuple)) and len(blocks) == count
    each = [factors(b, arch, field) for b in (blocks if one_each else [blocks])]
    if not one_each:
        each *= count
    return tuple(map(Strength, model, text, each))


def _numbers(value: Any, count: int, field: str) -> list[float]:
    """One number per LoRA; one that stands alone is for all."""
    if isinstance(value, (list, tuple)) and len(value) != count:
        raise Refusal(f"{field} has {len(value)} numbers for {count} LoRAs")
    found = []
    for v in value if isinstance(value, (list, tuple)) else [value] * count:
        number = weights.from_toml(v, field=field)
        if not isinstance(number, float):
            raise Refusal(f"{field} is {v!r}, not a number; factors of blocks go into `blocks`")
        found.append(number)
    return found


@cache
def presets() -> Mapping[str, tuple[float, ...]]:
    """The presets of LoRA block weights by name: 17 numbers, or one for every block."""
    text = (files("plymix") / "presets" / "lora.toml").read_bytes()
    found: dict[str, list[float]] = msgspec.toml.decode(text)
    return {name: tuple(map(float, values)) for name, values in found.items()}


def text_blocks(arch: Architecture) -> tuple[str, ...]:
    """The names that blocks of text encoders have: BASE, or CLIP and T5."""
    found = (c.block.split()[0] for c in arch.components if c.name.startswith("text_encoder"))
    return tuple(dict.fromkeys(found))


def factors(setting: Any, arch: Architecture, field: str = "blocks") -> dict[str, float]:
    """A factor for each block of `arch` and each block of its text encoders.

    `setting` is a number, a preset's name, a list, or a table of block names (with "base" and
    "default" as in other weights). Raises Refusal that names `field`.
    """
    text = text_blocks(arch)
    if isinstance(setting, (list, tuple)):
        return _listed(setting, arch, text, field)
    if isinstance(setting, str):
        if (preset := presets().get(setting.strip().upper())) is not None:
            if len(preset) == 1:
                return dict.fromkeys((*text, *arch.blocks), preset[0])
            return _listed(preset, arch, text, f"{field} = {setting}")
        raise _unknown(setting, arch, text, field)
    if isinstance(setting, Mapping) and "curve" not in setting and "blocks" not in setting:
        named = {k: v for k, v in setting.items() if k not in ("base", "default")}
        setting = {k: v for k, v in setting.items() if k not in named} | {"blocks": named}
    if isinstance(setting, Mapping) and isinstance(setting.get("blocks"), Mapping):
        return _named(setting, arch, text, field)
    found = weights.resolve(
        weights.from_toml(setting, field=field, blocks=arch.blocks),
        arch.blocks,
        arch_title=arch.short,
        field=field,
    )
    return dict.fromkeys(text, 1.0 if found.base is None else found.base) | found.blocks


def _named(
    setting: Mapping[str, Any], arch: Architecture, text: tuple[str, ...], field: str
) -> dict[str, float]:
    """Numbers by name; "base", and names of text encoders' blocks, are the text encoders'."""
    default = setting.get("default", 0.0)
    own = {name.upper(): name for name in text} | {"BASE": ""}
    said = {name: setting.get("base", default) for name in text}
    others = {}
    for name, value in setting["blocks"].items():
        if (mine := own.get(str(name).upper())) is None:
            others[name] = value
        else:
            said |= dict.fromkeys([mine] if mine else text, value)
    for name in others:
        if not re.search(r"[\d-]", name) and name.upper() not in arch.blocks:
            raise _unknown(name, arch, text, field)
    found = weights.resolve(
        weights.from_toml({"blocks": others, "default": default}, field=field),
        arch.blocks,
        arch_title=arch.short,
        field=field,
    )
    for name, value in said.items():
        number = weights.from_toml(value, field=f"{field}: {name}")
        if not isinstance(number, float):
            raise Refusal(f"{field}: {name} is {value!r}, not a number")
        said[name] = number
    return said | found.blocks


def _unknown(name: str, arch: Architecture, text: tuple[str, ...], field: str) -> Refusal:
    blocks = f"{', '.join(text)}, {weights.spans(arch.blocks)}"
    return unknown(
        f"preset or block in {field}",
        name,
        (*presets(), *text, *arch.blocks),
        help=f"presets are {', '.join(presets())}; blocks are {blocks}",
    )


def _listed(
    values: Sequence[Any], arch: Architecture, text: tuple[str, ...], field: str
) -> dict[str, float]:
    names = lists(arch).get(len(values))
    if names is None:
        counts = ", ".join(str(n) for n in sorted(lists(arch)))
        raise Refusal(
            f"{field}: {len(values)} numbers given; for {arch.short} a list of LoRA block weights"
            f" has {counts} (BASE, the text encoder, comes first)"
        )
    numbers = weights.from_toml(list(values), field=field, blocks=names)
    assert isinstance(numbers, tuple)
    by_name = dict(zip(names, numbers, strict=True))
    base = by_name.get("BASE", 1.0)
    return {n: by_name.get(n, base if n in text else 0.0) for n in (*text, *arch.blocks)}


def lists(arch: Architecture) -> dict[int, tuple[str, ...]]:
    """The blocks that a list of each length stands for.

    Architectures without lists of their own take one number per block, or BASE and those; blocks
    called as those of Stable Diffusion may also be told by its lists.
    """
    if not arch.lora_lists:
        return {len(arch.blocks): arch.blocks, len(arch.blocks) + 1: ("BASE", *arch.blocks)}
    found = dict(arch.lora_lists)
    if set(arch.blocks) <= set(weights.SD1_BLOCKS):
        others = chain.from_iterable(load(name).lora_lists.items() for name in SD_LISTS)
        found = dict(others) | found
    return found
