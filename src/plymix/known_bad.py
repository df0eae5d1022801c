"""Faults that merges are known for, each with what mends it.

Told from names, number formats, metadata and a few small tensors; `health` looks at the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from plymix import archs, kernels
from plymix.archs import Architecture
from plymix.archs.expected import missing
from plymix.errors import amount, listed
from plymix.formats.base import Source
from plymix.health import TAKE_A_VAE, Finding
from plymix.inspection import has_places, json_object, placed
from plymix.pairing import Paired

SD2_GUESS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_V = 0.09
"""ComfyUI takes an SD2 model for a v-prediction one when this tensor's standard deviation is larger
(comfy/supported_models.py, SD20.model_type)."""


def known_bad(source: Source, paired: Paired) -> Iterator[Finding]:
    """What is known to be wrong with a model; nothing for other files."""
    arch = paired.detection.arch
    if arch is None or not has_places(paired.detection):
        return
    yield from _twice(source, arch)
    yield from _lacking(source, paired, arch)
    yield from _half_a_text_encoder(source, paired, arch)
    yield from _old_names(source, arch)
    yield from _schedules(source)
    yield from _predictions(source, arch)
    yield from _vae(source, paired, arch)


def _twice(source: Source, arch: Architecture) -> Iterator[Finding]:
    """Tensors that are there under two names."""
    keys: dict[str, list[str]] = {}
    for key in source.tensors:
        place = arch.place(key)
        if place:
            keys.setdefault(place.key, []).append(key)
    twins = {name: of for name, of in keys.items() if len(of) > 1}
    if twins:
        text = (
            f"{amount(len(twins))} in it twice, by two names:"
            f" {listed((' and '.join(of) for of in twins.values()), 3)}; programs take one of the"
            " two: remove the other"
        )
        yield Finding("error", "twice", text, tuple(key for of in twins.values() for key in of))


def _lacking(source: Source, paired: Paired, arch: Architecture) -> Iterator[Finding]:
    """Tensors that every model of the architecture has, in blocks that are there."""
    places = [place for _, place in placed(source, paired) if place and not place.buffer]
    there = {(place.component, place.block) for place in places}
    lost = []
    for key in missing(arch, {place.key for place in places}):
        place = arch.place(key)
        if place and (place.component, place.block) in there:
            lost.append(key)
    if lost:
        text = (
            f"{amount(len(lost))} that every {arch.short} model has, missing: {listed(lost)};"
            " the file is incomplete: fetch it again, or make it again from whole ones"
        )
        yield Finding("error", "incomplete", text, tuple(lost))


def _half_a_text_encoder(source: Source, paired: Paired, arch: Architecture) -> Iterator[Finding]:
    there = {place.component for _, place in placed(source, paired) if place and not place.buffer}
    encoders = [c for c in arch.components if c.name.startswith("text_encoder")]
    gone = [c for c in encoders if c.name not in there]
    if gone and len(gone) < len(encoders):
        options = " and ".join(f"--{c.name.replace('_', '-')} FILE" for c in gone)
        text = (
            f"no {' and no '.join(c.title for c in gone)}, though another text encoder is in it;"
            f" plymix merge takes it from elsewhere: {options}"
        )
        yield Finding("warning", "incomplete", text)


def _old_names(source: Source, arch: Architecture) -> Iterator[Finding]:
    old = [key for key in source.tensors if arch.old_name(key)]
    if old:
        text = (
            f"{amount(len(old), 'text encoder tensor')} named as in the NovelAI era:"
            f" {listed(old, 3)}; some programs do not find them; plymix repair names them anew"
        )
        yield Finding("note", "names", text, tuple(old))


def _schedules(source: Source) -> Iterator[Finding]:
    """Noise schedules have five digits that count; 16 bits hold three."""
    coarse = [
        key
        for key, info in source.tensors.items()
        if archs.is_schedule(key) and info.dtype in ("F16", "BF16") and info.numel > 1
    ]
    if coarse:
        text = (
            f"{len(coarse)} noise schedules were rounded to 16 bits: {listed(coarse, 3)}; programs"
            " that use them draw other pictures; plymix prune --drop schedules leaves them out"
        )
        yield Finding("warning", "schedules", text, tuple(coarse))


# --- what it predicts ---------------------------------------------------------------------------


def _predictions(source: Source, arch: Architecture) -> Iterator[Finding]:
    marked = archs.prediction(source.tensors, {}, arch)
    said = archs.prediction((), source.metadata, None)
    both = marked.told == "marker tensor" and said.kind and said.kind != marked.kind
    if both:
        text = (
            f"a tensor says that it predicts {marked.kind}, its metadata {said.kind}: a merge of"
            " both kinds looks like this, and gives noise; look at what it was made of"
        )
        yield Finding("warning", "prediction", text)
    if "ztsnr" in source.tensors and "v_pred" not in source.tensors:
        text = (
            "the marker ztsnr stands without v_pred, so programs do not look at it: a merge with"
            " an epsilon model loses one of them; make it again from v-prediction models"
        )
        yield Finding("warning", "prediction", text, ("ztsnr",))
    recipe = json_object(source.metadata.get("plymix.recipe"))
    if _table(recipe, "output").get("allow_mixed_prediction"):
        text = "its recipe allowed a merge of epsilon and v-prediction models, which gives noise"
        yield Finding("warning", "prediction", text)
    yield from _guess(source, arch, said.kind)


def _guess(source: Source, arch: Architecture, said: str) -> Iterator[Finding]:
    """Programs guess what SD2 models predict; a declared one may be guessed wrongly."""
    info = source.tensors.get(SD2_GUESS)
    if arch.name != "sd2" or not said or info is None or not info.is_float or not info.numel:
        return
    spread = float(kernels.float32(source.read(info), info.dtype).std())
    guess = "v" if spread > SD2_V else "epsilon"
    if guess != said:
        text = (
            f"its metadata says {said}, but ComfyUI takes it for {guess} (by the spread of one"
            f" tensor, {spread:.3g}): merges of both kinds look like this; set the sampling by hand"
        )
        yield Finding("note", "prediction", text, (SD2_GUESS,))


# --- VAE ----------------------------------------------------------------------------------------


def _vae(source: Source, paired: Paired, arch: Architecture) -> Iterator[Finding]:
    dtypes = {
        info.dtype
        for info, place in placed(source, paired)
        if place and place.component == "vae" and not place.buffer
    }
    if arch.name in ("sdxl", "sdxl-refiner") and "F16" in dtypes:
        text = (
            "its VAE is stored as fp16, and SDXL's published one overflows when it is run so"
            f" (black pictures) unless it is the fp16-fixed one: run it in fp32 or bf16, or"
            f" {TAKE_A_VAE}"
        )
        yield Finding("note", "vae", text)
    if dtypes and (how := _averaged(source.metadata)):
        text = f"{how}: its VAE may be an average, which draws grey, hazy pictures; {TAKE_A_VAE}"
        yield Finding("note", "vae", text)


def _averaged(metadata: Mapping[str, str]) -> str:
    """How a merge that averages VAEs too says that it made the file; "" for none.

    plymix with `vae = "blend"`; A1111 (modules/extras.py) always, unless a VAE was baked in.
    """
    output = _table(json_object(metadata.get("plymix.recipe")), "output")
    if output:
        return 'plymix blended it (vae = "blend")' if output.get("vae") == "blend" else ""
    said = json_object(metadata.get("sd_merge_recipe"))
    share, baked = said.get("multiplier"), said.get("bake_in_vae")
    if said.get("type") != "webui" or baked not in (None, "", "None"):
        return ""
    if said.get("interp_method") != "Weighted sum" or not isinstance(share, (int, float)):
        return ""
    return f"A1111 merged it, with multiplier {share:g}" if 0 < share < 1 else ""


def _table(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = found.get(name)
    return inner if isinstance(inner, dict) else {}
