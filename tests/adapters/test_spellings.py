"""Spellings that are not those of tests/lora_matrix.py, and what names must not do."""

import numpy as np
import pytest

import plymix
from loras import lora
from plymix.recipe import from_dict
from small import load, save
from tiny import header, state

UNET = "model.diffusion_model."
ONE_PART = ("z-image",)
"""Those whose golden header is the transformer's alone, without a prefix."""


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


def baked(base, path, out):
    steps = {"x": {"method": "lora", "model": "a", "loras": "l"}}
    found = from_dict({"models": {"a": str(base), "l": str(path)}, "steps": steps, "output": {}})
    plymix.merge(found, out=out, force=True)
    return load(out)[0]


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
