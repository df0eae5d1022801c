"""Configurations made from shapes: against those published with the models.

Where diffusers is installed, tests/test_diffusers_library.py has its classes load them.
"""

import json

import pytest
from test_archs import expected, spelled

import plymix
from plymix import archs, pairing, respelling
from plymix.archs import configs
from plymix.archs.dialects import shape_of
from plymix.errors import Refusal
from small import data
from tiny import UNET, header, state, write_safetensors

WAN = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "attention_head_dim": 128,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "eps": 1e-6,
    "image_dim": None, "added_kv_proj_dim": None,
}  # fmt: skip
PUBLISHED = {  # config.json of the models' own repositories; `transformer`, but of the refiner
    "wan2.1-t2v-1.3b": WAN
    | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "in_channels": 16},
    "wan2.1-t2v-14b": WAN
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 16},
    "wan2.1-i2v-14b": WAN
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36}
    | {"image_dim": 1280, "added_kv_proj_dim": 5120},
    "wan2.2-ti2v-5b": WAN
    | {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48}
    | {"out_channels": 48},
    "wan2.1-vace-14b": WAN
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 16}
    | {"_class_name": "WanVACETransformer3DModel", "vace_in_channels": 96}
    | {"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]},
    "flux2-dev": {
        "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128,
        "num_attention_heads": 48, "joint_attention_dim": 15360, "mlp_ratio": 3.0,
        "timestep_guidance_channels": 256, "guidance_embeds": True,
        "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000,
    },
    "flux2-klein-4b": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
        "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    "chroma": {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "axes_dims_rope": [16, 56, 56],
        "approximator_num_channels": 64, "approximator_hidden_dim": 5120, "approximator_layers": 5,
    },
    "z-image": {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840,
        "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5,
        "qk_norm": True, "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0,
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    },
    "lumina2": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "hidden_size": 2304,
        "num_layers": 26, "num_refiner_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8,
        "multiple_of": 256, "norm_eps": 1e-5, "axes_dim_rope": [32, 32, 32],
        "axes_lens": [300, 512, 512], "cap_feat_dim": 2304,
    },
    "auraflow": {
        "sample_size": 64, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 4,
        "num_single_dit_layers": 32, "attention_head_dim": 256, "num_attention_heads": 12,
        "joint_attention_dim": 2048, "caption_projection_dim": 3072, "out_channels": 4,
        "pos_embed_max_size": 9216,
    },
    "ltx-video-2b": {
        "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "num_layers": 28,
        "attention_head_dim": 64, "cross_attention_dim": 2048, "caption_channels": 4096,
    },
    "ltx-video-13b": {
        "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "num_layers": 48,
        "attention_head_dim": 128, "cross_attention_dim": 4096, "caption_channels": 4096,
    },
    "sdxl-refiner": {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280, "attention_head_dim": [6, 12, 24, 24], "in_channels": 4,
        "projection_class_embeddings_input_dim": 2560, "addition_time_embed_dim": 256,
        "down_block_types": [
            "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"
        ],
        "transformer_layers_per_block": [1, 4, 4, 4],  # 4 in all, where there are any
    },
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_ones(model):
    arch = archs.load(expected(model)[0])
    shapes = {arch.place(k).key: s for k, (_, s) in header(model, full_width=True).items()}
    spelt = respelling.in_diffusers(arch, shapes, pairing.Paired(archs.detect(shapes), {}))
    name = arch.denoiser.name
    mine = {n: shape_of(v, {v[0].key: shapes[v[0].key]}) for n, v in spelt.views[name].items()}
    found = configs.component(arch, name, mine)
    assert {key: found.get(key) for key in PUBLISHED[model]} == PUBLISHED[model]


@pytest.mark.parametrize("prefix", ["", UNET])
def test_a_transformer_becomes_a_folder_and_comes_back(tmp_path, prefix):
    made = spelled(header("wan2.1-t2v-1.3b"), prefix)
    path = write_safetensors(tmp_path / "a.safetensors", made, state(made))
    plymix.convert(path, tmp_path / "folder", shard="100KB")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["num_layers"] == 30
    assert len([*(tmp_path / "folder").glob("*.safetensors")]) > 1
    plymix.convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="ldm")
    assert data(tmp_path / "back.safetensors") == data(path)


@pytest.mark.parametrize(
    ("model", "beside", "said"),
    [
        ("pixart-sigma", "", "shapes of PixArt models do not tell.*--configs FOLDER"),
        ("chroma", "first_stage_model.", "not know the pipeline of Chroma, only transformer, vae"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path, model, beside, said):
    made = {UNET + k: v for k, v in spelled(header(model), "").items()}
    if beside:
        vae = {k: v for k, v in header("flux-dev").items() if k.startswith("vae.")}
        made |= {beside + k.removeprefix("vae."): v for k, v in vae.items()}
    path = write_safetensors(tmp_path / "a.safetensors", made, state(made))
    with pytest.raises(Refusal, match=said):
        plymix.convert(path, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    if beside:
        plymix.extract(path, "transformer", tmp_path / "t")
        assert "ChromaTransformer2DModel" in (tmp_path / "t" / "config.json").read_text()
