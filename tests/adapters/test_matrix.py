"""Every family, in every spelling, for every architecture: bakes against the formulas in float64.

One file changes every kind of tensor of a model, each by another family. The reference is numpy
alone: tensors are taken apart by the maps of tests/golden, as the spelling has them, and changed by
the formulas of tests/loras.py. What is tried, and the page that says so, is tests/lora_matrix.py.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import numpy as np
import pytest

from lora_matrix import (
    ENCODERS,
    MODELS,
    SPELLINGS,
    UNET,
    Drawn,
    Spelling,
    component_of,
    parts,
    picked,
)
from loras import CONV, LINEAR, lora
from plymix import archs, engine, loras, pairing, plan
from plymix.adapters import Module, Names, families, read
from plymix.adapters import change as changed
from plymix.adapters.files import COMMON, PEFT_BIAS
from plymix.formats import open_model
from plymix.recipe import from_dict
from small import save
from tiny import header, state

STRENGTH = 0.7


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def get(model):
        """A small model's file, and its tensors."""
        h = header(model, dtype="F32")
        if model == "lumina2":  # its q, k and v have rows as 3 to 1 to 1
            h |= {k: (d, (80, s[1])) for k, (d, s) in h.items() if k.endswith("qkv.weight")}
        x = state(h)
        start = "" if any(key.startswith(UNET) for key in h) else UNET
        tensors = {start + key: x[key] for key in h}
        kinds = {np.dtype("f4"): "F32", np.dtype("i8"): "I64"}
        path = folder / f"{model}.safetensors"
        return save(path, {k: (kinds[v.dtype], v) for k, v in tensors.items()}), tensors

    return get


BUFFERS = ("pos_embed", "accum_")
"""Tables of sines and counters, which no merge changes."""
TABLES = ("embed", "shared.weight", "attention_bias", "logit_scale")
"""What no tool trains a LoRA of, in text encoders."""


@dataclass(frozen=True)
class Part:
    """The part of a model that is tried: its keys begin with `start`, the maps of tests/golden call
    it `component`; without one its names are those of its keys."""

    model: str
    start: str
    component: str = ""

    def apart(self, key, x):
        if self.component:
            return parts(self.model, self.component, key, x)
        return {key.removeprefix(self.start): x}

    def __call__(self, get):
        """{key: {part's name: its change}} for one tensor of each kind."""
        tensors = {key: x for key, x in get(self.model)[1].items() if key.startswith(self.start)}
        text, draw, found = self.start != UNET, Drawn(), {}
        for key in picked({key: x.shape for key, x in tensors.items()}):
            name = key.removeprefix(self.start)
            table = archs.is_buffer(key) or name.startswith(BUFFERS)
            if not table and not (text and any(t in name for t in TABLES)):
                named = self.apart(key, tensors[key])
                found[key] = {name: draw(name, part.shape) for name, part in named.items()}
        return {key: changes for key, changes in found.items() if changes}


drawn = cache(Part.__call__)


def spelt_file(path, spelling, changes):
    kinds, tensors = {"f": "F32", "i": "I64"}, {}
    for name, change in chain.from_iterable(found.items() for found in changes.values()):
        tensors |= spelling.keys(module_of(name)[0], change)
    return save(path, {k: (kinds[np.asarray(x).dtype.kind], x) for k, x in tensors.items()})


def module_of(name):
    """('a.b.weight') -> ('a.b', 'weight'); ('a.table') -> ('a.table', 'weight')."""
    stem, _, end = name.rpartition(".")
    return (stem, end) if end in ("weight", "bias") else (name, "weight")


def check(part, spelling, bases, tmp_path, to=""):
    """A bake: what is to be changed is as wanted, all else is copied. `to` converts the file."""
    changes = drawn(part, bases)
    lora = spelt_file(tmp_path / "l.safetensors", spelling, changes)
    if to:
        lora = loras.convert(lora, tmp_path / "c.safetensors", to=to).path
    base, tensors = bases(part.model)
    steps = {"x": {"method": "lora", "model": "a", "loras": "l", "strength": STRENGTH}}
    models = {"a": str(base), "l": str(lora)}
    with plan.build(from_dict({"models": models, "steps": steps, "output": {}})) as planned:
        assert not planned.unmatched["l"]
        assert planned.dropped.get("l", {}).keys() <= {"read when planning"}
        assert planned.merged == len(changes)
        placed, at = [], 0
        for tensor in planned.tensors:
            if tensor.name in changes:
                placed.append(replace(tensor, offset=at))
                at += tensor.nbytes
        target = engine.MemoryTarget(at)
        engine.perform(engine.Job(planned.sources, target), placed, threads=1)
        for tensor in placed:
            got = np.frombuffer(target.data, "<f4", math.prod(tensor.shape), tensor.offset)
            got = part.apart(tensor.name, got.reshape(tensor.shape).astype(np.float64))
            before = part.apart(tensor.name, tensors[tensor.name].astype(np.float64))
            for name, change in changes[tensor.name].items():
                want = before[name] + STRENGTH * change.delta(before[name])
                np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=2e-6, err_msg=name)
                assert np.abs(want - before[name]).max() > 1e-4


def denoiser(model, spelling):
    """None for a model of which the other program's names are not known."""
    if spelling.own:
        return Part(model, UNET)
    known = component_of(model)
    return Part(model, UNET, known) if known else None


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_family_in_every_spelling(name, bases, tmp_path):
    check(denoiser("sd1", SPELLINGS[name]), SPELLINGS[name], bases, tmp_path)


@pytest.mark.parametrize("to", ["kohya-diffusers", "lycoris", "comfyui"])
def test_every_family_is_written(to, bases, tmp_path):
    spelling = SPELLINGS["kohya"]
    check(denoiser("sd1", spelling), spelling, bases, tmp_path, to)


# With dots the keys of (IA)^3 are those of a model, and few of them tell AuraFlow or Cosmos.
ONE_EACH = [
    (model, name)
    for model in MODELS
    for name in ("LyCORIS, own names", "ai-toolkit")
    if model != "sd1" and denoiser(model, SPELLINGS[name])
]


@pytest.mark.parametrize(("model", "name"), ONE_EACH)
def test_every_family_for_every_architecture(model, name, bases, tmp_path):
    check(denoiser(model, SPELLINGS[name]), SPELLINGS[name], bases, tmp_path)


@pytest.mark.parametrize(("model", "component", "start"), ENCODERS)
def test_every_family_for_every_text_encoder(model, component, start, bases, tmp_path):
    name, *_ = ENCODERS[model, component, start]
    check(Part(model, start, component), encoder(name), bases, tmp_path)


def encoder(start):
    plain = start.endswith("_")
    return Spelling(start, "", plain=plain, ends=SPELLINGS["kohya" if plain else "PEFT"].ends)


# --- the names alone, of every module


@pytest.mark.parametrize("model", MODELS)
def test_every_spelling_means_the_same(model, bases):
    """Of all modules of every model: what the bakes above did not try is what they did."""
    base, tensors = bases(model)
    with open_model(base) as source:
        paired = pairing.pair(source)
        known = Names(paired.detection.arch, {k: info.shape for k, info in paired.tensors.items()})

    def found(spelling, name):
        stem, param = module_of(name)
        return known.find(Module(spelling.name(stem), param, "full", {}))

    tried = [
        (part, spellings)
        for own in (True, False)
        if (part := denoiser(model, SPELLINGS["ComfyUI" if own else "ai-toolkit"]))
        and (spellings := [s for s in SPELLINGS.values() if s.own == own])
    ]
    tried += [
        (Part(model, start, component), [encoder(name) for name in names])
        for (of, component, start), names in ENCODERS.items()
        if of == model
    ]
    for part, spellings in tried:
        for key in tensors:
            if key.startswith(part.start) and not archs.is_buffer(key):
                for name in part.apart(key, tensors[key]):
                    one, *others = (found(spelling, name) for spelling in spellings)
                    assert one is not None, name
                    assert one.key == key
                    assert all(other == one for other in others), name


OTHER_ENDS = [
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
]
"""Of a LoRA's keys, beside those of the spellings."""
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER_KEY = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize("ends", OTHER_ENDS)
@pytest.mark.parametrize("scalar", [None, 0.25])
def test_other_ends_of_keys(ends, scalar, bases, tmp_path):
    _, tensors = bases("sd1")
    change = lora(tensors[LAYER_KEY].shape, 3)
    up, down, alpha = change.tensors.values()
    found = {LAYER + ends[0]: up, LAYER + ends[1]: down, f"{LAYER}.alpha": alpha}
    if scalar:
        found[f"{LAYER}.scalar"] = np.float32(scalar)
    file = save(tmp_path / "l.safetensors", {k: ("F32", x) for k, x in found.items()})
    with open_model(file) as source:
        (module,) = read(source).modules
        got = changed(source, module)
    np.testing.assert_allclose(got, (scalar or 1) * change.delta(None), rtol=1e-5, atol=1e-6)


def test_a_bias_has_the_scale_of_its_lora_in_pefts_spelling_alone(tmp_path):
    """PEFT's `lora_bias` is one of the layer `up`; LyCORIS' `diff_b` is a difference as it is."""
    bias, pair = np.ones(8, "f4"), lora((8, 8), 3, rank=3, alpha=1.5).tensors
    up, down, alpha = pair.values()
    for end, scale in ((".lora_B.bias", 0.5), (".diff_b", 1.0), (".b_norm", 1.0)):
        found = {".lora_B.weight": up, ".lora_A.weight": down, ".alpha": alpha, end: bias}
        tensors = {LAYER + e: ("F32", x) for e, x in found.items()}
        with open_model(save(tmp_path / "l.safetensors", tensors)) as source:
            module = next(m for m in read(source).modules if m.param == "bias")
            assert module.scale == scale


def test_everything_that_plymix_reads_is_tried():
    """The ends of keys of every family, and what may stand in any."""
    draw = [f((8, 8), 1) for f in LINEAR.values()] + [f((8, 8, 3, 3), 1) for f in CONV.values()]
    tried = {f".{end}" for change in draw for end in change.tensors}
    tried |= {f".{end}" for spelling in SPELLINGS.values() for end in spelling.ends.values()}
    tried |= {".w_norm", ".b_norm", ".diff_b", ".scalar", *chain.from_iterable(OTHER_ENDS)}
    known = {end for family in families().values() for end in family.suffixes} | set(COMMON)
    by_libraries = {".lora_magnitude_vector.weight"}  # test_runtime: what PEFT's state has
    refused = {".reshape_weight"}
    assert known - tried == by_libraries | refused | PEFT_BIAS
