"""Methods that are sums of the models with fixed numbers: folded, then run in one pass.

Only `+`, `-` and `*` between arrays and numbers stand here, because the planner calls these same
functions on symbols to learn the coefficient of each model. Nothing is read for a coefficient 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Literal

from plymix.errors import Refusal
from plymix.methods import Array, model_weights
from plymix.registry import Share, method


@method("linear")
def weighted_sum(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Weighted Sum

    R = (1 - alpha) A + alpha B

    alpha is the share of B: 0 is exactly A, 1 exactly B; outside 0..1 it extrapolates.
    Source: "Weighted sum" of the AUTOMATIC1111 checkpoint merger, MBW, supermerger, meh, sd-mecha.
    ComfyUI's `ratio` is the share of the first model, so alpha = 1 - ratio there.
    """
    return a * (1 - alpha) + b * alpha


@method("linear", name="linear", min_models=1)
@method("linear")
def n_average(*models: Array, weights: tuple[float, ...] = (), normalize: bool = True) -> Array:
    """Average of Any Number of Models

    R = sum_i w_i X_i / sum_i w_i

    weights: one number per model, equal when left out. normalize: divide by the sum of the
    weights (refused when that is 0); switched off, weights that do not sum to 1 scale the model.
    A model with weight 0 is not read. `linear` and `n_average` are one method under two names.
    Source: model soups, arXiv:2203.05482; mergekit `linear`, sd-mecha `n_average`.
    """
    return _total(models, model_weights(weights, len(models), normalize=normalize))


@method("linear")
def add_difference(a: Array, b: Array, c: Array, *, alpha: float = 1.0) -> Array:
    """Add Difference

    R = A + alpha (B - C)

    Puts onto A what was trained into B, where C is the model B was trained from. alpha 0 is
    exactly A; 1 adds the whole difference.
    Source: "Add difference" of the AUTOMATIC1111 checkpoint merger, supermerger, MBW; the two-delta
    case of task arithmetic, arXiv:2212.04089.
    """
    return a + (b - c) * alpha


@method("linear")
def task_arithmetic(
    base: Array,
    *models: Array,
    weights: tuple[float, ...] = (),
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """Task Arithmetic

    R = X_0 + scale * sum_i w_i (X_i - X_0)

    weights: one number per model after the base, each 1 when left out. normalize: divide the
    weights by their sum (by 1 where |sum| < 1e-8). scale 0 is exactly the base.
    Source: Editing models with task arithmetic, arXiv:2212.04089; mergekit `task_arithmetic`.
    """
    ws = model_weights(weights, len(models))
    total = math.fsum(ws)
    if normalize and abs(total) >= 1e-8:
        ws = [w / total for w in ws]
    ws = [scale * w for w in ws]
    return _total((base, *models), [1 - math.fsum(ws), *ws])


@method("linear", delta=True)
def subtract(a: Array, b: Array, *, scale: float = 1.0) -> Array:
    """Subtract

    D = scale (A - B)

    The result is a difference, to be added to a model by a later step.
    Source: ComfyUI `ModelSubtract` (its multiplier is `scale`); sd-mecha `subtract`.
    """
    return a * scale - b * scale


@method("linear", name="scale")
def scaled(a: Array, *, scale: float = 1.0) -> Array:
    """Scale

    R = scale A

    Meant for differences: it makes them stronger, weaker (0..1) or inverse (negative).
    Source: delta algebra of task vectors, arXiv:2212.04089.
    """
    return a * scale


@method("linear", name="sum")
def added(a: Array, b: Array) -> Array:
    """Sum

    R = A + B

    Adds two differences, or a difference to a model. Two whole models added give a model of twice
    the strength, which is hardly ever meant.
    Source: ComfyUI `ModelAdd`, `CLIPAdd`.
    """
    return a + b


@method("linear", adapters=True)
def lora(
    model: Array,
    *loras: Array,
    strength: tuple[float, ...] = (),
    te_strength: tuple[float, ...] = (),
    blocks: tuple[float, ...] = (),
    dora: Literal["trained", "comfyui"] = "trained",
) -> Array:
    """Add LoRAs

    R = M + sum_i s_i D_i

    D_i is what LoRA i, of any family, adds to M; where it depends on M (DoRA, OFT, IA3, GLoRA), on
    the M of this step, so that the order of the LoRAs changes nothing. `strength` is one number for
    all or one per LoRA, 1 when left out; `te_strength` the text encoders', `strength` when left
    out. `blocks` are factors of both in each block: a preset of LoRA block weights, a list of 12,
    17, 20, 26 or 61 numbers, or numbers by block name. A LoRA with strength 0 is not read.
    dora: a DoRA's rows are divided by the norms they were trained with, or by those of M, as
    ComfyUI does.
    Source: LoRA, arXiv:2106.09685; sd-webui-lora-block-weight for `blocks`.
    """
    return _total((model, *loras), [1.0, *model_weights(strength, len(loras))])


@method("linear")
def triple_sum(a: Array, b: Array, c: Array, *, alpha: float = 0.5, beta: float = 0.25) -> Array:
    """Triple Sum

    R = (1 - alpha - beta) A + alpha B + beta C

    alpha is the share of B, beta that of C; A keeps the rest, which is negative beyond
    alpha + beta = 1. alpha = beta = 0 is exactly A, alpha 1 with beta 0 exactly B.
    Source: supermerger "Triple sum", meh and SD.Next `triple_sum`.
    """
    return a * (1 - (alpha + beta)) + b * alpha + c * beta


@method("linear")
def sum_twice(a: Array, b: Array, c: Array, *, alpha: float = 0.5, beta: float = 0.5) -> Array:
    """Sum Twice

    R = (1 - beta) ((1 - alpha) A + alpha B) + beta C

    Two weighted sums in a row: alpha is the share of B in the first, beta that of C in the second.
    Source: supermerger "sum Twice", meh and SD.Next `sum_twice`.
    """
    return (a * (1 - alpha) + b * alpha) * (1 - beta) + c * beta


@method("linear")
def weighted_subtraction(a: Array, b: Array, *, alpha: float = 0.5, beta: float = 0.5) -> Array:
    """Weighted Subtraction

    R = (A - alpha beta B) / (1 - alpha beta)

    Takes B out of A again: if A was made as (1 - t) X + t B, then alpha beta = t gives X back.
    alpha beta must be below 1 (refused otherwise); above 0.9 rounding errors of A grow tenfold and
    more. alpha beta = 0 is exactly A.
    Source: meh and SD.Next `weighted_subtraction`.
    """
    share = alpha * beta
    if share >= 1:
        raise Refusal(
            f"weighted_subtraction: alpha * beta = {share:g}, expected below 1: "
            "A cannot hold all of B; lower alpha or beta"
        )
    return a * (1 / (1 - share)) - b * (share / (1 - share))


@method("linear")
def smoothstep_sum(a: Array, b: Array, *, alpha: Share = 0.5) -> Array:
    """Smoothstep Sum

    t = alpha^2 (3 - 2 alpha);  R = (1 - t) A + t B

    A weighted sum that moves slowly near both ends: alpha 0 is exactly A, 1 exactly B, 0.5 the
    middle. Only the meaning of alpha changes.
    Source: `sigmoid` of the diffusers checkpoint merger and InvokeAI.
    """
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha))


@method("linear")
def inv_smoothstep_sum(a: Array, b: Array, *, alpha: Share = 0.5) -> Array:
    """Inverse Smoothstep Sum

    t = 1/2 - sin(asin(1 - 2 alpha) / 3);  R = (1 - t) A + t B

    A weighted sum that moves fast near both ends, the inverse of `smoothstep_sum`: alpha 0 is
    exactly A, 1 exactly B, 0.5 the middle.
    Source: `inv_sigmoid` of the diffusers checkpoint merger and InvokeAI.
    """
    if alpha in (0, 1):  # the sine of asin(1) / 3 is 1/2 only up to rounding
        return weighted_sum(a, b, alpha=alpha)
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * alpha) / 3))


@method("linear")
def affine_sum(a: Array, b: Array, *, weight_a: float = 0.5, weight_b: float = 0.5) -> Array:
    """Affine Sum

    R = weight_a A + weight_b B

    Independent weights for both models, block by block. Where they do not sum to 1 the model is
    scaled as a whole.
    Source: MBW "Each" (merge-block-weighted-gui).
    """
    return a * weight_a + b * weight_b


@method("linear", name="self")
def self_scale(a: Array, *, alpha: float = 1.0, key: str) -> Array:
    """Self

    R = alpha A

    Scales a model's own layers. Keys that contain to_out, proj_out or norm stay as they are, and so
    does everything at alpha = 0 or 1.
    Source: supermerger calcmode `self`.
    """
    return a if alpha == 0 or keeps_scale(key) else a * alpha


@method("linear")
def replace(a: Array, b: Array, *, alpha: float = 1.0, key: str) -> Array:
    """Replace

    R = B at alpha 1, A at alpha 0, alpha B otherwise

    Takes the layers of B, scaled. Keys that contain to_out, proj_out or norm stay A.
    Source: model-mixer `Replace`.
    """
    return a if alpha == 0 or keeps_scale(key) else b * alpha


@method("linear")
def passthrough(a: Array, *, scale: float = 1.0) -> Array:
    """Pass Through

    R = scale A

    Copies a model's layers, scaled if wanted; scale 1 is exactly A.
    Source: mergekit `passthrough`.
    """
    return a * scale


@method("linear")
def extrapolate(a: Array, b: Array, *, k: float = 0.5) -> Array:
    """Extrapolate (ExPO)

    R = B + k (B - A)

    Goes on from A (earlier, for instance before fine-tuning) through B (later) by k more steps:
    a weighted sum with alpha = 1 + k. k 0 is exactly B.
    Source: Model extrapolation expedites alignment, arXiv:2404.16792; fusion_bench ExPO.
    """
    return weighted_sum(a, b, alpha=1 + k)


@method("linear")
def logistic_sum(a: Array, b: Array, *, alpha: float = 0.5) -> Array:
    """Logistic Sum (Legacy)

    s(x) = 1 / (1 + exp(-x));  R = s(4 alpha) (A + B) - s(alpha) A

    Kept only to repeat old merges. It does not interpolate: alpha 0 gives B / 2 and alpha 1 gives
    0.251 A + 0.982 B.
    Source: `SIG` of Chattiori-Model-Merger, from idelairre's merger.
    """
    outer, inner = _logistic(4 * alpha), _logistic(alpha)
    return a * (outer - inner) + b * outer


def keeps_scale(key: str) -> bool:
    """Whether `self`, `replace` and `plus_random` leave this key alone."""
    return any(part in key for part in ("to_out", "proj_out", "norm"))


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))


def _total(arrays: Sequence[Array], coefficients: Sequence[float]) -> Array:
    return reduce(add, (x * c for x, c in zip(arrays, coefficients, strict=True)))
