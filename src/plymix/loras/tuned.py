"""Two models -> the parts of a LoRA that makes one of the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from plymix import pairing
from plymix.adapters.spelling import Dialect, Spelt, spelt
from plymix.archs import Architecture
from plymix.errors import Refusal, listed
from plymix.expr import Leaf
from plymix.formats.base import Source, TensorInfo
from plymix.loras.parts import Change, Gathered, Part, finite, widest

EMBEDDINGS = (
    "embedding.weight",
    "embed_tokens.weight",
    "shared.weight",
    "embedding_table.weight",
    "relative_attention_bias.weight",
    "embed.weight",
)
"""Ends of tables that are looked up, not multiplied with: nothing loads a LoRA of one."""


def gather(
    tuned: Source, base: Source, how: Dialect, *, text_encoders: bool, conv: bool, diffs: bool
) -> Gathered:
    """A part for each weight that `tuned` and `base` have in common.

    Those of linear layers, with `conv` of convolutions, with `diffs` norms and biases. The notes
    tell what differs and cannot be in a LoRA. Raises Refusal where the models do not fit.
    """
    after, arch, named = tensors_of(tuned)
    before, other, base_named = tensors_of(base)
    if arch != other:
        raise Refusal(
            f"{tuned.path.name} is {named} and {base.path.name} is {base_named}:"
            " the difference of models of one architecture can be extracted"
        )
    shapes = {key: info.shape for key, info in after.items()}
    names = spelt(arch, shapes, how)
    found: list[Part] = []
    alone, unequal, unsaid = [], [], []
    for key, info in after.items():
        place = arch.place(key)
        if place is None or place.buffer or place.component in ("vae", "ema", "extra"):
            continue
        text = place.component.startswith("text_encoder")
        if (text and not text_encoders) or not info.is_float or not _wanted(info, conv, diffs):
            continue
        if key not in before:
            alone.append(key)
        elif before[key].shape != info.shape:
            unequal.append(key)
        elif key not in names or (not diffs and any(n.param != "weight" for n in names[key])):
            unsaid.append(key)
        else:
            pair = (tuned, info, base, before[key])
            found += _parts(key, place.block, names[key], pair)
    if not found:
        raise Refusal(f"{tuned.path.name} and {base.path.name} have no weights in common")
    notes = []
    for keys, what in (
        (alone, f"are not in {base.path.name}"),
        (unequal, f"have another shape in {base.path.name}"),
        (unsaid, f"have no names in {how.title} LoRAs"),
    ):
        if keys:
            notes.append(f"{len(keys)} tensors {what} and are left out: {listed(keys, 3)}")
    return Gathered(arch, how, tuple(found), tuple(notes))


def tensors_of(source: Source) -> tuple[dict[str, TensorInfo], Architecture, str]:
    """A model's tensors by canonical key, its architecture, and what it is in a sentence.

    Raises Refusal for what is no model.
    """
    paired = pairing.pair(source)
    arch = paired.detection.arch
    if arch is None or paired.detection.kind not in ("checkpoint", "denoiser"):
        raise Refusal(
            f"{source.path.name} is {paired.detection.named}; name a model, whole or its"
            " denoiser, of an architecture that plymix knows"
        )
    places = {key: arch.place(key) for key in paired.tensors}
    tensors = {p.key: paired.tensors[key] for key, p in places.items() if p}
    return tensors, arch, paired.detection.named


def _wanted(info: TensorInfo, conv: bool, diffs: bool) -> bool:
    if len(info.shape) < 2:
        return diffs
    kernel = math.prod(info.shape[2:]) > 1
    return (conv or not kernel) and not info.name.endswith(EMBEDDINGS) and info.numel > 0


Pair = tuple[Source, TensorInfo, Source, TensorInfo]


def _parts(key: str, block: str, names: Sequence[Spelt], pair: Pair) -> Iterator[Part]:
    tuned, after, base, before = pair
    for one in names:
        seen = [_seen(info, key, one) for info in (after, before)]

        def change(seen: Sequence[TensorInfo] = seen) -> Change:
            return difference(tuned, seen[0], base, seen[1])

        yield Part(
            name=one.name,
            param=one.param,
            key=f"{key} {one.name}" if one.views else key,
            block=block,
            shape=seen[0].shape,
            dtype=widest([after.dtype]),
            nbytes=8 * seen[0].numel,
            change=change,
        )


def _seen(info: TensorInfo, key: str, one: Spelt) -> TensorInfo:
    """The part of a tensor that a module of this name changes."""
    if not one.views:
        return info
    found = pairing.spelt(Leaf(0, replace(info, name=key)), one.views)
    assert isinstance(found, Leaf)
    return found.info


def difference(tuned: Source, after: TensorInfo, base: Source, before: TensorInfo) -> Change:
    """tuned - base in float32, as rows; nothing where the bytes are the same."""
    from plymix import kernels

    a, b = tuned.read(after), base.read(before)
    if a == b and after.dtype == before.dtype:
        return Change()
    d: Any = kernels.float32(a, after.dtype)
    del a
    d -= kernels.float32(b, before.dtype)
    finite(d, f"{after.name} of {tuned.path.name} - {base.path.name}")
    return Change(whole=d.reshape(after.shape[0] if after.shape else 1, -1))
