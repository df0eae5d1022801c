"""Every family against its formula in float64, through a bake of a file."""

import numpy as np
import pytest

import plymix
from loras import CONV, LINEAR, dora, lora
from plymix.recipe import from_dict
from small import load, real, save
from tiny import header, state

Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
V = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
CONV_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
NAMES = {
    Q: "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    V: "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v",
    CONV_KEY: "lora_unet_input_blocks_1_0_in_layers_2",
}
HEADER = header("sd1", dtype="F32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = state(HEADER)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    return save(path, {key: (dtype, made[key]) for key, (dtype, _) in HEADER.items()})


def dtype_of(x):
    return {"f": "F32", "i": "I64"}[np.asarray(x).dtype.kind]


def write(path, changes, metadata=None):
    """A LoRA file of {module's name: Change}."""
    tensors = {
        f"{name}.{end}": (dtype_of(x), x)
        for name, change in changes.items()
        for end, x in change.tensors.items()
    }
    return save(path, tensors, metadata)


def bake(base, lora_file, out, strength=1.0, **fields):
    step = {"method": "lora", "model": "a", "loras": "l", "strength": strength, **fields}
    found = from_dict(
        {"models": {"a": str(base), "l": str(lora_file)}, "steps": {"x": step}, "output": {}}
    )
    plymix.merge(found, out=out, force=True)
    return load(out)[0]


CASES = [(name, key, s) for name in LINEAR for key, s in ((Q, -0.35), (V, 1.0))]
CASES += [(name, CONV_KEY, 0.6) for name in CONV]


@pytest.mark.parametrize(("name", "key", "strength"), CASES)
def test_a_bake_is_the_formula(name, key, strength, base, tmp_path):
    shape = HEADER[key][1]
    change = (CONV if key == CONV_KEY else LINEAR)[name](shape, seed=3)
    file = write(tmp_path / "l.safetensors", {NAMES[key]: change})
    before, after = load(base)[0], bake(base, file, tmp_path / "out.safetensors", strength)
    w = real(before[key]).astype(np.float64)
    want = w + strength * change.delta(w)
    np.testing.assert_allclose(real(after[key]), want, rtol=2e-6, atol=3e-7)
    assert np.abs(want - w).max() > 1e-4  # it is a change
    for other in before:
        if other != key:
            assert before[other][1].tobytes() == after[other][1].tobytes(), other


def test_comfyuis_dora_divides_by_the_norms_of_the_unchanged_weight(base, tmp_path):
    shape = HEADER[Q][1]
    change = dora(lora(shape, 3), shape, 3, norm="comfyui")
    file = write(tmp_path / "l.safetensors", {NAMES[Q]: change})
    after = bake(base, file, tmp_path / "out.safetensors", 0.7, dora="comfyui")
    w = real(load(base)[0][Q]).astype(np.float64)
    np.testing.assert_allclose(real(after[Q]), w + 0.7 * change.delta(w), rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize(
    "end", ["oft_R.weight", "oft_R.default.weight", "boft_R", "ia3_l", "hra_u"]
)
def test_pefts_other_methods_are_refused_by_name(end, base, tmp_path):
    """PEFT's OFT turns one way or the other by a setting that its weights do not tell."""
    start = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    x, up, down = (np.ones(shape, np.float32) for shape in ((2, 6), (8, 2), (2, 8)))
    lora_too = {
        f"{start}to_k.lora_A.weight": ("F32", down),
        f"{start}to_k.lora_B.weight": ("F32", up),
    }
    file = save(tmp_path / "p.safetensors", {f"{start}to_q.{end}": ("F32", x), **lora_too})
    with pytest.raises(plymix.Refusal, match=r"p.safetensors .*PEFT's own: .*adapter_config.json"):
        bake(base, file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
