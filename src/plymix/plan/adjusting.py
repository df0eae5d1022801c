"""`output.adjust`: what is done to named tensors after the merge."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from typing import Any

from plymix.archs import Architecture
from plymix.errors import Refusal, unknown
from plymix.expr import (
    Call,
    Const,
    Expr,
    Linear,
)


class Adjustment:
    """`output.adjust`: what is done to named tensors after the merge (see methods/tuning.py)."""

    def __init__(self, asked: Mapping[str, Any], arch: Architecture | None) -> None:
        self.said, self.arch = asked, arch
        self.scales: dict[str, float] = {}
        self.offsets: dict[str, tuple[float, ...]] = {}
        self.saturation = self.cfg = 1.0
        self.asked = bool(asked)
        if not asked:
            return
        from plymix.methods import tuning

        fields = ("detail", "contrast", "brightness", "colour", "saturation", "cfg")
        for name in asked:
            if name not in fields:
                raise unknown("field of output.adjust", name, fields)
        if arch is None or arch.name not in tuning.COLOURS_OF:
            raise Refusal("output.adjust works on SD1, SD2 and SDXL models; leave it out here")
        detail = _numbers("detail", asked.get("detail", 0.0), 3)
        contrast, brightness = (
            _numbers(f, asked.get(f, 0.0), 1)[0] for f in ("contrast", "brightness")
        )
        colour = _numbers("colour", asked.get("colour", 0.0), 3)
        values = (*detail, contrast, brightness, *colour)
        for key, (scale, offsets) in tuning.adjust(values, tuning.COLOURS_OF[arch.name]).items():
            self.scales[key] = scale
            self.offsets[key] = offsets
        self.saturation, self.cfg = (
            _numbers(f, asked.get(f, 1.0), 1)[0] for f in ("saturation", "cfg")
        )

    def scale(self, key: str) -> float:
        """What the tensor is multiplied by."""
        scale = self.scales.get(key, 1.0)
        if self.cfg != 1.0:
            from plymix.methods import tuning

            scale *= tuning.cfg_sensitivity(key, self.cfg)
        return scale

    def idle(self, keys: Collection[str]) -> list[str]:
        """The fields that change tensors of which none is among `keys`; detail = 0 changes none."""
        fields = {name: Adjustment({name: value}, self.arch) for name, value in self.said.items()}
        return [
            name
            for name, only in fields.items()
            if only.changes and not any(map(only._meant, keys))
        ]

    @property
    def changes(self) -> bool:
        """Whether any tensor would be changed, if it were there."""
        return bool(self.scales or self.offsets) or (self.saturation, self.cfg) != (1.0, 1.0)

    def _meant(self, key: str) -> bool:
        saturated = self.saturation != 1.0 and key in _saturated()
        return saturated or key in self.offsets or self.scale(key) != 1.0

    def __call__(self, key: str, expr: Expr, shape: tuple[int, ...]) -> Expr:
        if not self.asked:
            return expr
        total = Linear.of(expr) * self.scale(key)
        if offsets := self.offsets.get(key):
            data = struct.pack(f"<{len(offsets)}f", *offsets)
            if len(offsets) != math.prod(shape):
                raise Refusal(f"output.adjust: {key} has the shape {list(shape)}, not 4 values")
            total += Linear.of(Const(data, "F32", shape))
        if self.saturation != 1.0 and key in _saturated():
            return Call(
                step="output.adjust",
                method="vae_saturation",
                args=(total.expr(),),
                params=(("saturation", self.saturation),),
                key=key,
                seed=0,
                models=(0,),
            )
        return total.expr()


def _saturated() -> tuple[str, ...]:
    from plymix.methods import tuning

    return tuning.VAE_OUTPUTS


def _numbers(field: str, value: Any, count: int) -> tuple[float, ...]:
    """`value` as `count` finite numbers; one number stands for all of them."""
    values = value if isinstance(value, (list, tuple)) else [value] * count
    good = len(values) == count and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not good:
        what = "a number" if count == 1 else f"{count} numbers"
        raise Refusal(f"output.adjust.{field} = {value!r} is not {what}")
    return tuple(map(float, values))
