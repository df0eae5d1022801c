"""Methods that tune one model, and the small adjustments made to named tensors after a merge.

The merge methods are registered. The adjustments are plain functions and tables about single keys
(`adjust`, `vae_saturation`, `cfg_sensitivity`): the planner decides which tensors they touch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from plymix.errors import Refusal, unknown
from plymix.methods import Array
from plymix.methods.arrays import (
    blockwise,
    clip,
    flatten,
    gram,
    lerp,
    magnitude,
    match_spread,
    moments,
    namespace,
    numel,
)
from plymix.methods.selection import largest
from plymix.registry import Range, Share, method


@method("tensor")
def clip_xor(a: Array, b: Array, *, hardness: Share = 0.7) -> Array:
    """CLIP XOR: Add What Only B Has

    O = sign(A) min(|A|, |B|) where the signs agree, else 0;  U = A + B - O;  d = U - A, of which
    the top 0.10 + 0.45 h by |d| are kept;
    g = sigmoid((cos(A, U) - (0.35 - 0.20 h)) / (0.12 + 0.08 (1 - h)));  s = 0.12 + 0.38 h;
    R = A + s g d, where ||R - A|| is limited to s ||A||;  last, mean and standard deviation are
    moved by 0.65 - 0.30 h towards those of A

    hardness: h; Chattiori uses 0.7 for CLIP and 0.6 for T5. At least one element is kept. cos is 0
    for a zero tensor. The last step is left out where R has no spread.
    Source: Chattiori-Model-Merger CLIPXOR.
    """
    if not numel(a):
        return a
    xp, h = namespace(a, b), hardness

    def lacking(x: Array, y: Array) -> Array:  # B - O: O is A limited to what lies between 0 and B
        return y - xp.minimum(xp.maximum(x, clip(y, high=0)), clip(y, 0))

    def size(x: Array, y: Array) -> Array:
        return magnitude(lacking(x, y))

    products = gram(a, b, of=lambda x, y: (x, x + lacking(x, y)))
    lengths = math.sqrt(products[0, 0] * products[1, 1])
    cosine = products[0, 1] / lengths if lengths else 0.0
    gate = 1 / (1 + math.exp(-(cosine - (0.35 - 0.20 * h)) / (0.12 + 0.08 * (1 - h))))
    limit = 0.12 + 0.38 * h
    kept = largest(max(1, int((0.10 + 0.45 * h) * numel(a))), size, a, b).masks()
    power: Any = 0.0

    def step_of(x: Array, y: Array) -> Array:
        nonlocal power
        d = lacking(x, y)
        d *= xp.astype(kept(xp.abs(d)), d.dtype)
        power = power + gram(d)
        return d

    d = blockwise(step_of, a, b)
    length = math.sqrt(power[0, 0])
    most, strength = limit * math.sqrt(products[0, 0]), limit * gate
    if length * strength > most:
        strength *= most / (length * strength)

    def stepped(x: Array, d: Array) -> Array:
        r = d * strength
        r += x
        return r

    r = blockwise(stepped, a, d, out=d)
    return _towards_spread(r, a, 0.65 - 0.30 * h) if length * gate else r


def _towards_spread(r: Array, a: Array, share: float) -> Array:
    """`r`, which is overwritten, blended by `share` with itself at the mean and standard deviation
    of `a`."""
    (mean_r, std_r), (mean_a, std_a) = moments(r), moments(a)
    if std_r < 1e-6:
        return r
    gain = 1 - share + share * std_a / std_r
    offset = share * (mean_a - mean_r * std_a / std_r)
    return blockwise(lambda x: x * gain + offset, r, out=r)


SAMPLES = 2048
"""How many evenly spaced elements `turbo` and `deturbo` compare two tensors by."""


def _ratio(b: Array, c: Array, upper: float) -> float:
    """clip(B.C / C.C, 1/4, upper) on at most `SAMPLES` evenly spaced elements; 1 where C is 0."""
    step = max(1, -(-numel(b) // SAMPLES))
    products = gram(flatten(b)[::step], flatten(c)[::step])
    if products[1, 1] == 0:
        return 1.0
    return min(max(float(products[0, 1] / products[1, 1]), 0.25), upper)


@method("tensor")
def turbo(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: float = 1.0,
    upper: Annotated[float, Range(0.25)] = 4.0,
) -> Array:
    """Add a Turbo Model's Speed

    s = clip(B.C / C.C, 1/4, upper);  R = A (1 - alpha + alpha s) + alpha (B - s C)

    A is the custom model, B the turbo (few-step) model, C the base both come from. alpha: strength;
    0 is exactly A. s, from at most 2048 evenly spaced elements, is how much the turbo model scaled
    the tensor; with s = 1 this is Add Difference, the canonical alternative. upper: largest s.
    Source: Chattiori-Model-Merger TURBO.
    """
    s = _ratio(b, c, upper)
    gain, damp = 1 - alpha + alpha * s, alpha * s
    return blockwise(lambda x, y, z: x * gain + (y * alpha - z * damp), a, b, c)


@method("tensor")
def deturbo(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: float = 1.0,
    upper: Annotated[float, Range(0.25)] = 4.0,
    damping: Share = 0.0,
    match: bool = False,
) -> Array:
    """Take a Turbo Model's Speed out Again

    s = clip(B.C / C.C, 1/4, upper);  R = A (1 - alpha + alpha / s) + alpha (C - B / s), then
    R <- lerp(R, C, damping)

    A is a custom model that holds the turbo model B, C the base. alpha: strength; 0 (with no
    damping) is exactly A. upper: largest s. damping: share of C. match: move mean and standard
    deviation half-way to those of C at the end. On attention and conditioning tensors Chattiori
    uses upper 6, damping 0.35 and match: set them there by rule.
    Source: Chattiori-Model-Merger DETURBO.
    """
    s = _ratio(b, c, upper)
    gain, part = 1 - alpha + alpha / s, alpha / s
    r = blockwise(lambda x, y, z: x * gain + (z * alpha - y * part), a, b, c)
    r = lerp(r, c, damping, out=r)
    return match_spread(r, c, out=r) if match else r


# -- adjustments after a merge --------------------------------------------------------------------

FINE = ("IN", "OUT", "OUT2", "CONT", "BRI", "COL1", "COL2", "COL3")
"""The eight values of an adjustment: detail in, detail out (two), contrast, brightness, and the
colour axes cyan-red, magenta-green, yellow-blue."""

FINE_RANGES = (6, 6, 6, 10, 10, 10, 10, 10)
"""The values run from minus to plus these in the tools' sliders; others are allowed."""

FINE_SCALES: Mapping[str, tuple[str, float]] = {
    "model.diffusion_model.input_blocks.0.0.weight": ("IN", -0.01),
    "model.diffusion_model.input_blocks.0.0.bias": ("IN", 0.02),
    "model.diffusion_model.out.0.weight": ("OUT", -0.01),
    "model.diffusion_model.out.0.bias": ("OUT", 0.02),
    "model.diffusion_model.out.2.weight": ("OUT2", -0.01),
}
"""key -> (value, rate): the tensor is multiplied by 1 + rate * value."""

FINE_BIAS = "model.diffusion_model.out.2.bias"
"""The four latent channels' bias: 0.02 times CONT and the colour vector is added to it."""

COLOURS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "sd": ((-1, 1 / 3, 2 / 3), (1, 1, 0), (0, -1, -1), (1, 0, 1)),
    "sdxl": ((0, 0, 1), (1, 0, 0), (-1, -1, 0), (-1, 1, 0)),
    "direct": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)),
}
"""What BRI, COL1, COL2 and COL3 (rows) add to latent channels 1, 2 and 3 (columns): SD1 and SD2,
SDXL, and the older seven-value form, which has no BRI (supermerger, model-mixer, CD-Tuner)."""


def adjust(
    values: Sequence[float], colours: Literal["sd", "sdxl", "direct"] = "sd"
) -> dict[str, tuple[float, tuple[float, ...]]]:
    """What an adjustment of detail, contrast and colour does: key -> (factor, offsets).

    values: the eight values named in `FINE`, or seven without BRI (the older form, which takes
    `direct`). The tensor at a key becomes tensor * factor + offsets, the offsets being one per
    element or none; a key that would not change is left out. Keys are those of an SD1, SD2 or SDXL
    U-Net. Raises Refusal for another count of values or an unknown `colours`.
    Source: CD-Tuner; supermerger, model-mixer and Chattiori "adjust" / "fine".
    """
    if colours not in COLOURS:
        raise unknown("colour table", colours, COLOURS)
    if len(values) == 7:
        values = (*values[:4], 0.0, *values[4:])
        colours = "direct"
    if len(values) != len(FINE):
        raise Refusal(
            f"adjust has {len(values)} values; give eight ({', '.join(FINE)}) or seven without BRI"
        )
    named = dict(zip(FINE, map(float, values), strict=True))
    changes: dict[str, tuple[float, tuple[float, ...]]] = {
        key: (1 + rate * named[name], ())
        for key, (name, rate) in FINE_SCALES.items()
        if named[name]
    }
    tones = [named[name] for name in FINE[4:]]
    rows = COLOURS[colours]
    shift = [sum(t * row[j] for t, row in zip(tones, rows, strict=True)) for j in range(3)]
    offsets = tuple(0.02 * v for v in (named["CONT"], *shift))
    if any(offsets):
        changes[FINE_BIAS] = (1.0, offsets)
    return changes


VAE_OUTPUTS = (
    "first_stage_model.decoder.conv_out.weight",
    "first_stage_model.decoder.conv_out.bias",
)
"""The tensors that `vae_saturation` changes."""


COLOURS_OF: Mapping[str, Literal["sd", "sdxl", "direct"]] = {
    "sd1": "sd",
    "sd2": "sd",
    "sdxl": "sdxl",
}
"""Architecture -> its table of `COLOURS`."""


@method("tensor")
def vae_saturation(a: Array, *, key: str, saturation: float = 1.0) -> Array:
    """Colour Saturation of the VAE

    R = G + saturation (A - G) on the RGB axis of `VAE_OUTPUTS`, G the mean of the three colours

    Each colour moves from its grey, the mean of the three, by the factor `saturation`: 1 changes
    nothing, 0 decodes to grey. This is s I + (1 - s)/3 ones(3, 3) times the RGB axis, exact for
    every image. All other tensors stay as they are. Raises Refusal where the first axis is not RGB.
    Source: Chattiori-Model-Merger `vae_sat`.
    """
    if key not in VAE_OUTPUTS or saturation == 1:
        return a
    if a.shape[0] != 3:
        raise Refusal(f"saturation needs three colour channels; {key} has the shape {a.shape}")
    grey = namespace(a).mean(a, axis=0, keepdims=True)
    return grey + saturation * (a - grey)


CFG_PROJECTIONS: Mapping[str, str] = {
    "q": ".attn2.to_q.weight",
    "k": ".attn2.to_k.weight",
    "v": ".attn2.to_v.weight",
    "out": ".attn2.to_out.0.weight",
}
"""The cross-attention projections that `cfg_sensitivity` may scale, by their short names."""


def cfg_sensitivity(key: str, gain: float, projections: Sequence[str] = ("k", "v", "out")) -> float:
    """The factor for the tensor at `key`: `gain` for the chosen cross-attention tensors, else 1.

    Above 1 the image follows the prompt more strongly at the same CFG scale. Raises Refusal for an
    unknown projection.
    Source: Chattiori-Model-Merger `cfg_sens`.
    """
    for p in projections:
        if p not in CFG_PROJECTIONS:
            raise unknown("cross-attention projection", p, CFG_PROJECTIONS)
    return gain if key.endswith(tuple(CFG_PROJECTIONS[p] for p in projections)) else 1.0


@method("linear")
def cfg_sens(a: Array, *, key: str, gain: float = 1.0) -> Array:
    """Sensitivity to the Prompt

    R = gain A for the key, value and output projections of cross-attention, else A

    See `cfg_sensitivity`; gain 1 changes nothing.
    Source: Chattiori-Model-Merger `cfg_sens`.
    """
    return a * cfg_sensitivity(key, gain)
