"""Faults that merges are known for: each is planted, found, and told with what mends it."""

import json

import numpy as np
import pytest

import plymix
import tiny
from small import save
from test_dialect_merges import folder, weights

UNET = "model.diffusion_model."


def findings(path, kind=None):
    return [f for f in plymix.check(path).findings if kind in (None, f.kind)]


def one(path, kind):
    (found,) = findings(path, kind)
    return found


def without(path, arch, *lost):
    rows = {k: v for k, v in weights(arch, 1).items() if not k.startswith(lost)}
    return save(path / "m.safetensors", rows)


# --- missing tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "key"),
    [
        ("sd1", UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_v.weight"),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.bias"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias"),
        ("sdxl", UNET + "label_emb.0.2.weight"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.30.ln_2.weight"),
        ("sdxl", "first_stage_model.decoder.conv_out.bias"),
        ("flux-dev", UNET + "single_blocks.20.linear1.weight"),
        ("flux-dev", "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.layer_norm.weight"),
        ("flux-dev", UNET + "guidance_in.in_layer.bias"),
        ("sd3.5-medium", UNET + "joint_blocks.23.context_block.attn.qkv.weight"),
    ],
)
def test_one_tensor(tmp_path, arch, key):
    found = one(without(tmp_path, arch, key), "incomplete")
    assert (found.severity, found.keys) == ("error", (key,))
    assert key in found.text


def test_what_files_may_lack(tmp_path):
    """CLIP's unused last layer; guidance (schnell); the other norm of Flux's two spellings."""
    last = "conditioner.embedders.0.transformer.text_model."
    path = without(tmp_path, "sdxl", last + "encoder.layers.11.", last + "final_layer_norm.")
    assert not findings(path, "incomplete")
    assert not findings(without(tmp_path, "flux-dev", UNET + "guidance_in."), "incomplete")
    rows = {k.replace("norm.scale", "norm.weight"): v for k, v in weights("flux-dev", 1).items()}
    assert not findings(save(tmp_path / "f.safetensors", rows), "incomplete")


@pytest.mark.parametrize("options", [{"nai": True}, {"ema": True}, {"bare": True}])
def test_every_spelling_is_whole(tmp_path, options):
    path = tiny.write(tmp_path / "m.safetensors", "sd1", 1, **options)
    assert plymix.check(path).ok


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl"])
def test_diffusers_folders_are_whole(tmp_path, arch):
    """Their way is not to have some tensors (OpenCLIP's last layer)."""
    assert not findings(folder(tmp_path / "f", arch, 1), "incomplete")


def test_one_text_encoder_of_two(tmp_path):
    path = without(tmp_path, "sdxl", "conditioner.embedders.1.")
    found = [f for f in findings(path, "incomplete") if f.severity == "warning"]
    assert "--text-encoder-2 FILE" in found[0].text


# --- VAE ----------------------------------------------------------------------------------------


def test_sdxl_vae_in_half_precision(tmp_path):
    def half(arch, dtype):
        path = tiny.write(tmp_path / f"{arch}-{dtype}.safetensors", arch, 1, dtype=dtype)
        return any("fp16-fixed" in f.text for f in findings(path, "vae"))

    assert half("sdxl", "F16")
    assert not half("sdxl", "BF16")
    assert not half("sd1", "F16")


def test_a_vae_with_nan_or_zeros(tmp_path):
    key = "first_stage_model.decoder.conv_out.weight"
    for value, kind in ((np.nan, "nan"), (np.inf, "infinity"), (0, "zeros")):
        rows = weights("sd1", 1)
        rows[key] = ("F16", np.full_like(rows[key][1], value))
        found = one(save(tmp_path / "m.safetensors", rows), kind)
        assert found.keys == (key,)
        assert "--vae FILE" in found.text
    assert "grey" in found.text


def recipe_of_a1111(**changes):
    said = {"type": "webui", "interp_method": "Weighted sum", "multiplier": 0.3}
    return {"sd_merge_recipe": json.dumps(said | {"bake_in_vae": "None"} | changes)}


def with_metadata(path, arch, metadata, **options):
    header = tiny.header(arch, **options)
    return tiny.write_safetensors(path / "m.safetensors", header, tiny.state(header), metadata)


@pytest.mark.parametrize(
    ("changes", "averaged"),
    [
        ({}, True),
        ({"multiplier": 0}, False),
        ({"multiplier": 1}, False),
        ({"bake_in_vae": "good.vae.pt"}, False),
        ({"interp_method": "No interpolation"}, False),
        ({"type": "plymix"}, False),
    ],
)
def test_an_averaged_vae(tmp_path, changes, averaged):
    found = findings(with_metadata(tmp_path, "sd1", recipe_of_a1111(**changes)), "vae")
    assert bool(found) is averaged
    assert all("grey" in f.text and "--vae FILE" in f.text for f in found)


def test_a_vae_that_plymix_blended(tmp_path):
    a, b = (tiny.write(tmp_path / f"{n}.safetensors", "sd1", s) for n, s in (("a", 1), ("b", 2)))
    for vae in ("a", "blend"):
        out = plymix.merge(a, b, tmp_path / f"{vae}-vae.safetensors", vae=vae).path
        assert bool(findings(out, "vae")) is (vae == "blend")


# --- predictions --------------------------------------------------------------------------------


def test_two_predictions_in_one_file(tmp_path):
    said = {"modelspec.prediction_type": "epsilon"}
    path = with_metadata(tmp_path, "sdxl", said, markers=("v_pred",))
    found = one(path, "prediction")
    assert found.severity == "warning"
    assert "epsilon" in found.text
    path = with_metadata(tmp_path, "sdxl", {"modelspec.prediction_type": "v"}, markers=("v_pred",))
    assert not findings(path, "prediction")


def test_a_marker_that_lost_the_other(tmp_path):
    found = one(tiny.write(tmp_path / "m.safetensors", "sdxl", 1, markers=("ztsnr",)), "prediction")
    assert found.keys == ("ztsnr",)


def test_a_merge_of_both_kinds(tmp_path):
    a = tiny.write(tmp_path / "a.safetensors", "sdxl", 1)
    v = tiny.write(tmp_path / "v.safetensors", "sdxl", 2, markers=("v_pred", "ztsnr"))
    out = plymix.merge(a, v, tmp_path / "o.safetensors", allow_mixed_prediction=True).path
    assert "its recipe allowed" in one(out, "prediction").text


@pytest.mark.parametrize(("spread", "guess"), [(0.02, "epsilon"), (0.3, "v")])
def test_what_programs_guess_of_sd2(tmp_path, spread, guess):
    """ComfyUI's rule: v-prediction above a standard deviation of 0.09."""
    key = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    rows = weights("sd2", 1)
    n = rows[key][1].size
    rows[key] = ("F32", np.tile([-spread, spread], n)[:n].astype(np.float32))
    for said in ("epsilon", "v"):
        path = save(tmp_path / "m.safetensors", rows, {"modelspec.prediction_type": said})
        assert [f.keys for f in findings(path, "prediction")] == ([(key,)] if said != guess else [])


# --- the rest -----------------------------------------------------------------------------------


def test_what_repair_and_prune_mend(tmp_path):
    """What a finding names as its cure does cure it."""
    path = tiny.write(tmp_path / "old.safetensors", "sd1", 1, nai=True)
    assert "plymix repair" in one(path, "names").text
    plymix.repair(path, tmp_path / "new.safetensors")
    assert not findings(tmp_path / "new.safetensors", "names")
    rows = weights("sd1", 1)
    rows["betas"] = ("F16", rows["betas"][1].astype(np.float16))
    path = save(tmp_path / "m.safetensors", rows)
    assert one(path, "schedules").keys == ("betas",)
    plymix.prune(path, tmp_path / "p.safetensors", drop=["schedules"])
    assert not findings(tmp_path / "p.safetensors", "schedules")
    ids = next(k for k in rows if k.endswith("position_ids"))
    rows[ids] = ("F16", np.full((1, 77), 3, np.float16))
    path = save(tmp_path / "i.safetensors", rows)
    assert "plymix repair" in one(path, "position_ids").text
    plymix.repair(path, tmp_path / "r.safetensors")
    assert not findings(tmp_path / "r.safetensors", "position_ids")
