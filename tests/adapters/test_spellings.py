"""The same change in every spelling: what tools call a module, from the golden maps.

The reference is numpy alone: the canonical tensors are converted to the dialect's by the maps of
tests/golden, changed there, and compared with the converted result of a bake.
"""

from dataclasses import dataclass

import numpy as np
import pytest

import plymix
from loras import lora
from maps import converted, golden_map
from plymix.recipe import from_dict
from small import load, save
from tiny import header, state

UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Dialect:
    """`start` before a module's name, how its name is written, and the ends of a LoRA's keys."""

    start: str
    own: bool = False  # the architecture's own names, not diffusers'
    plain: bool = False  # "_" in place of "."
    ends: tuple[str, str, str] = ("lora_up.weight", "lora_down.weight", "alpha")
    respell: tuple[tuple[str, str], ...] = ()

    def name(self, key):
        name = key.removesuffix(".weight")
        for a, b in self.respell:
            name = name.replace(a, b)
        return self.start + (name.replace(".", "_") if self.plain else name)


AB = ("lora_B.weight", "lora_A.weight", "alpha")
DENOISER = {
    "kohya": Dialect("lora_unet_", own=True, plain=True),
    "kohya, diffusers' names": Dialect("lora_unet_", plain=True),
    "LyCORIS": Dialect("lycoris_", plain=True),
    "LyCORIS, own names": Dialect("lycoris_", own=True, plain=True),
    "OneTrainer": Dialect("lora_transformer_", plain=True),
    "diffusers": Dialect("unet.", ends=AB),
    "diffusers, ai-toolkit": Dialect("transformer.", ends=AB),
    "old diffusers": Dialect(
        "unet.",
        ends=("up.weight", "down.weight", "alpha"),
        respell=((".to_out.0", ".to_out"), (".to_", ".processor.to_")),
    ),
    "PEFT": Dialect("base_model.model.", ends=AB),
    "PEFT's model": Dialect(
        "base_model.model.", ends=("lora_B.default.weight", "lora_A.default.weight", "alpha")
    ),
    "ComfyUI": Dialect("diffusion_model.", own=True, ends=AB),
    "BFL": Dialect("", own=True, ends=AB),
}
MODELS = ("sd1", "sdxl", "sd3.5-medium", "flux-dev", "chroma", "flux2-klein-4b", "z-image")
ONE_PART = ("chroma", "flux2-klein-4b", "z-image")
"""Those whose golden header is the transformer's alone, without a prefix."""
TEXTS = {  # model, component of the map -> what its modules' names begin with
    ("sd1", "text_encoder"): (
        "lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.",
    ),
    ("sd2", "text_encoder"): ("lora_te_", "text_encoder."),
    ("sdxl", "text_encoder"): ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
    ("sdxl", "text_encoder_2"): (
        "lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def get(model):
        if model not in made:
            h = header(model, dtype="F32")
            if model in ONE_PART:
                h = {UNET + key: row for key, row in h.items()}
            s = state(h)
            path = folder / f"{model}.safetensors"
            made[model] = save(path, {k: (d, s[k]) for k, (d, _) in h.items()})
        return made[model]

    return get


def picked(model, component, tensors):
    """One key of each kind of module of a component, with its names and transform in diffusers."""
    found = {}
    for key, (theirs, transform) in golden_map(model)[component].items():
        if theirs and key in tensors and key.endswith("weight") and tensors[key][1].ndim in (2, 4):
            if "embed" in key and "proj" not in key and component.startswith("text"):
                continue  # embeddings are no modules that LoRAs change
            kind = "".join(c for c in key if not c.isdigit())
            found.setdefault(kind, (key, theirs, transform))
    return list(found.values())


def lora_file(path, changes, ends):
    """A file of {module's name: Change}, with `ends` in place of kohya's."""
    tensors = {}
    for name, change in changes.items():
        for end, x in zip(ends, change.tensors.values(), strict=True):
            tensors[f"{name}.{end}"] = ("F32", x)
    return save(path, tensors)


def baked(base, path, out):
    steps = {"x": {"method": "lora", "model": "a", "loras": "l"}}
    found = from_dict({"models": {"a": str(base), "l": str(path)}, "steps": steps, "output": {}})
    plymix.merge(found, out=out, force=True)
    return load(out)[0]


def check(model, component, name_of, ends, own, base, tmp_path):
    """Change one module of each kind; every tensor is then what numpy makes of it."""
    before = load(base)[0]
    changes, wanted = {}, {}
    for i, (key, theirs, transform) in enumerate(picked(model, component, before)):
        w = before[key][1].astype(np.float64)
        parts = {key: w} if own else converted(w, theirs, transform)
        for j, (name, part) in enumerate(parts.items()):
            change = lora(part.shape, seed=100 * i + j)
            changes[name_of(name)] = change
            wanted.setdefault(key, (theirs, transform, {}))[2][name] = part + change.delta(part)
    after = baked(
        base, lora_file(tmp_path / "l.safetensors", changes, ends), tmp_path / "o.safetensors"
    )
    assert wanted
    for key in before:
        if key not in wanted:
            assert before[key][1].tobytes() == after[key][1].tobytes(), key
            continue
        theirs, transform, parts = wanted[key]
        got = after[key][1].astype(np.float64)
        found = {key: got} if own else converted(got, theirs, transform)
        for name, want in parts.items():
            np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


SOME = ("kohya", "kohya, diffusers' names", "diffusers, ai-toolkit", "PEFT's model", "ComfyUI")
"""Spellings of models that come in few; SD1 and SDXL are tried in all."""
CASES = [
    (model, name) for model in MODELS for name in (DENOISER if model in ("sd1", "sdxl") else SOME)
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_every_spelling_of_the_denoiser(model, name, bases, tmp_path):
    dialect = DENOISER[name]
    component = next(c for c in golden_map(model) if c in ("unet", "transformer"))

    def spelt(key):
        return dialect.name(key.removeprefix(UNET))

    check(model, component, spelt, dialect.ends, dialect.own, bases(model), tmp_path)


@pytest.mark.parametrize(("model", "component"), TEXTS)
def test_every_spelling_of_the_text_encoders(model, component, bases, tmp_path):
    for start in TEXTS[model, component]:
        plain = start.endswith("_")
        dialect = Dialect(start, plain=plain)
        ends = dialect.ends if plain else AB
        check(model, component, dialect.name, ends, False, bases(model), tmp_path)


def test_x_fluxs_processors(bases, tmp_path):
    """One q, k, v for each side of a double block; of a single block's, the first rows only."""
    double, single = UNET + "double_blocks.0.", UNET + "single_blocks.0."
    names = {
        "double_blocks.0.processor.qkv_lora1": double + "img_attn.qkv.weight",
        "double_blocks.0.processor.qkv_lora2": double + "txt_attn.qkv.weight",
        "double_blocks.0.processor.proj_lora1": double + "img_attn.proj.weight",
        "double_blocks.0.processor.proj_lora2": double + "txt_attn.proj.weight",
        "single_blocks.0.processor.qkv_lora": single + "linear1.weight",
        "single_blocks.0.processor.proj_lora": single + "linear2.weight",
    }
    before = load(bases("flux-dev"))[0]
    tensors, wanted = {}, {}
    for i, (module, key) in enumerate(names.items()):
        want = before[key][1].astype(np.float64)
        rows = len(want) * 3 // 7 if module.endswith("qkv_lora") else len(want)
        change = lora((rows, want.shape[1]), i, alpha=None)
        up, down = change.tensors.values()
        tensors |= {f"{module}.up.weight": ("F32", up), f"{module}.down.weight": ("F32", down)}
        want[:rows] += change.delta(None)
        wanted[key] = want
    after = baked(
        bases("flux-dev"), save(tmp_path / "l.safetensors", tensors), tmp_path / "o.safetensors"
    )
    for key, want in wanted.items():
        np.testing.assert_allclose(after[key][1], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["sd1", "sdxl", "flux-dev", "sd3.5-medium", "z-image"])
def test_a_name_means_one_tensor(model, bases):
    """No two tensors of a model answer to one name, whatever stands before it."""
    from plymix import archs, pairing
    from plymix.adapters.names import Names
    from plymix.formats import open_model

    with open_model(bases(model)) as source:
        paired = pairing.pair(source)
        arch = paired.detection.arch
        shapes = {k: info.shape for k, info in paired.tensors.items() if not archs.is_buffer(k)}
    known = {}
    for starts, targets in Names(arch, shapes)._parts:
        for name, target in targets.items():
            for start in starts:
                assert known.setdefault(start + name, target) == target, start + name
