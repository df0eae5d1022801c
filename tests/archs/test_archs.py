"""Architectures against golden headers.

The headers in tests/golden/headers hold {key: [dtype, shape, component, block]} of one model each:
made by instantiating published configurations, the blocks assigned by the community's conventions;
SD1, SDXL, Flux.1 and SD3 key sets were also compared with those of real files.
"""

import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix import archs
from plymix.archs.detection import _Keys
from plymix.archs.model import families
from plymix.errors import Refusal
from tiny import GOLDEN, INPUT_CHANNELS, UNET, ema_name, golden, header

MODELS = sorted(path.name.removesuffix(".json.gz") for path in GOLDEN.glob("*.json.gz"))
ARCH = {  # golden header -> architecture and variant, where not simply its name and "base"
    "cosmos-predict2-2b": ("cosmos2", "base"),
    "cosmos-predict2-14b": ("cosmos2", "base"),
    "flux-dev": ("flux1", "base"),
    "flux2-dev": ("flux2", "base"),
    "flux2-klein-4b": ("flux2", "klein"),
    "flux2-klein-9b": ("flux2", "klein"),
    "hidream-i1": ("hidream", "base"),
    "pixart-sigma": ("pixart", "base"),
    "sd3.5-medium": ("sd3", "3.5-medium"),
    "wan2.1-t2v-1.3b": ("wan", "base"),
    "wan2.1-t2v-14b": ("wan", "base"),
    "wan2.1-i2v-14b": ("wan", "i2v"),
    "wan2.2-ti2v-5b": ("wan", "ti2v"),
    "wan2.1-vace-14b": ("wan", "vace"),
    "ltx-video-2b": ("ltx-video", "base"),
    "ltx-video-13b": ("ltx-video", "base"),
}
COMPONENT = {  # golden component -> ours, per model where the text encoder is not the first
    "clip_l": "text_encoder",
    "clip_h": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
    "schedule": "extra",
}
OWN_COMPONENT = {
    ("sdxl-refiner", "clip_g"): "text_encoder",
    ("flux-dev", "t5xxl"): "text_encoder_2",
}
SINE_TABLE = UNET + "pos_embed"  # listed as IN; it is never trained, so ours is a buffer


def expected(model):
    return ARCH.get(model, (model, "base"))


def shapes_of(some_header):
    return {key: shape for key, (_, shape) in some_header.items()}


def spelled(shapes, prefix):
    """A model's denoiser with another prefix, everything else left out."""
    bare = {k.removeprefix(UNET): v for k, v in shapes.items() if k.startswith(UNET)} or shapes
    return {prefix + key: shape for key, shape in bare.items()}


# --- places


@pytest.mark.parametrize("model", MODELS)
def test_every_key_has_one_place(model):
    arch = archs.load(expected(model)[0])
    blocks = set()
    for key, (_, _, component, block) in golden(model).items():
        place = arch.place(key)
        assert place is not None, key
        component = OWN_COMPONENT.get((model, component), COMPONENT.get(component, component))
        block = "BUFFER" if key == SINE_TABLE else block
        own = key if component not in ("unet", "transformer") else UNET + key.removeprefix(UNET)
        assert (place.key, place.component, place.block) == (own, component, block)
        assert place.buffer == (block == "BUFFER")
        blocks.add(block)
    assert blocks & set(arch.blocks)
    outside = {"BASE", "CLIP", "T5", "VAE", "BUFFER"}
    assert blocks - set(arch.blocks) <= outside


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl", "sdxl-refiner", "flux-dev", "z-image"])
def test_blocks_of_the_deepest_model_are_all_met_and_ordered(model):
    arch = archs.load(expected(model)[0])
    met = {arch.place(key).block for key in golden(model)}
    assert set(arch.blocks) <= met
    assert len(set(arch.blocks)) == len(arch.blocks)


def test_counts_per_block_are_the_published_ones():
    # tensors of IN00.., M00, OUT00.. as counted on the original checkpoints
    sd1 = [6, 36, 36, 2, 38, 36, 2, 38, 36, 2, 10, 10, 46]
    sd1 += [12, 12, 14, 38, 38, 40, 38, 38, 40, 38, 38, 42]
    sdxl = [10, 10, 10, 2, 58, 56, 2, 218, 216, 226, 218, 218, 220, 58, 58, 60, 12, 12, 16]
    for name, counts in [("sd1", sd1), ("sd2", sd1), ("sdxl", sdxl)]:
        arch = archs.load(name)
        met = Counter(arch.place(key).block for key in golden(name))
        assert [met[block] for block in arch.blocks] == counts
    assert len(golden("sd1")) == 1143
    assert len(golden("sd2")) == 1240
    assert len(golden("sdxl")) == 2515


@pytest.mark.parametrize(
    ("name", "key", "block", "part"),
    [
        ("sd1", UNET + "time_embed.0.weight", "IN00", "TIME"),
        ("sd1", UNET + "input_blocks.1.0.in_layers.0.weight", "IN01", "IN01"),
        ("sd1", UNET + "input_blocks.10.0.in_layers.0.weight", "IN10", "IN10"),
        ("sd1", UNET + "out.0.weight", "OUT11", "OUT"),
        ("sd1", UNET + "output_blocks.0.0.in_layers.0.weight", "OUT00", "OUT00"),
        ("sdxl", UNET + "label_emb.0.0.weight", "IN00", "LABEL"),
        ("sdxl", UNET + "out.2.bias", "OUT08", "OUT"),
        ("sdxl", "conditioner.embedders.1.model.logit_scale", "BASE", "CLIP_G"),
        ("sd1", "cond_stage_model.logit_scale", "BASE", "CLIP_L"),
        ("sd1", "cond_stage_model.transformer.brand_new", "BASE", "CLIP_L"),
        ("sd1", "first_stage_model.loss.logvar", "VAE", "VAE"),
        ("sd1", "model_ema.diffusion_modelout0bias", "EMA", "EMA"),
        ("sd1", "model_ema.decay", "BUFFER", "BUFFER"),
        ("sd1", "betas", "BUFFER", "BUFFER"),
        ("sd2", "cond_stage_model.model.attn_mask", "BUFFER", "BUFFER"),
        ("sd2", "depth_model.model.scratch.layer1_rn.weight", "BUFFER", "BUFFER"),
        ("sdxl", "denoiser.sigmas", "BUFFER", "BUFFER"),
        ("sdxl", "v_pred", "BUFFER", "BUFFER"),
        ("sdxl", "edm_vpred.sigma_max", "BUFFER", "BUFFER"),
        ("sd3", "model.model_sampling.sigmas", "BUFFER", "BUFFER"),
        ("sd3", "pos_embed", "BUFFER", "BUFFER"),
        ("cosmos2", "net.pos_embedder.dim_spatial_range", "BUFFER", "BUFFER"),
        ("cosmos2", "net.accum_image_sample_counter", "BUFFER", "BUFFER"),
        ("chroma", "distilled_guidance_layer.in_proj.bias", "IN", "MOD"),
        ("flux1", "text_encoders.t5xxl.logit_scale", "T5", "T5"),
    ],
)
def test_places_by_hand(name, key, block, part):
    place = archs.load(name).place(key)
    assert place is not None
    assert (place.block, place.part) == (block, part)
    assert place.buffer == (block == "BUFFER")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sd1", UNET + "input_blocks.12.0.in_layers.0.weight"),  # SD1 ends with 11
        ("sd1", UNET + "label_emb.0.0.weight"),
        ("sd1", UNET + "input_blocks.x.weight"),
        ("sd1", UNET + "outer.weight"),
        ("sd1", UNET + "input_blocks.01.0.weight"),
        ("sd1", UNET + "input_blocks." + "9" * 5000 + ".0.weight"),
        ("sd3", "pos_embed\n"),
        ("sd1", "conditioner.embedders.1.model.ln_final.weight"),
        ("sd1", "optimizer.state"),
        ("sd1", ""),
        ("sdxl", UNET + "input_blocks.9.0.op.weight"),  # SDXL ends with 8
        ("sdxl", "cond_stage_model.model.ln_final.weight"),
        ("flux1", "double_blocks.19.img_attn.qkv.weight"),
        ("flux1", "pos_embed"),
        ("sd3", "pos_embedding"),
    ],
)
def test_foreign_keys_have_no_place(name, key):
    assert archs.load(name).place(key) is None


def same_places(arch, one, other):
    return [arch.place(k) for k in one] == [arch.place(k) for k in other]


def test_spellings_of_one_tensor_have_one_place():
    sd1, sd2, flux, chroma = map(archs.load, ("sd1", "sd2", "flux1", "chroma"))
    keys = list(header("sd1"))
    assert same_places(sd1, header("sd1", nai=True), keys)
    assert same_places(sd1, [k.replace("first_stage_model.", "vae.") for k in keys], keys)
    assert same_places(sd1, [k.removeprefix("first_stage_model.") for k in keys], keys)
    assert same_places(sd1, [k.removeprefix(UNET) for k in keys], keys)
    text = [k for k in keys if ".text_model." in k]
    assert same_places(sd1, [k.removeprefix("cond_stage_model.transformer.") for k in text], text)
    keys = list(golden("sd2"))
    sgm = [k.replace("cond_stage_model.model.", "conditioner.embedders.0.model.") for k in keys]
    assert sgm != keys
    assert same_places(sd2, sgm, keys)
    for arch, name in ((flux, "flux-dev"), (chroma, "chroma")):
        keys = list(golden(name))
        renamed = [k.removesuffix("scale") + "weight" if k.endswith(".scale") else k for k in keys]
        assert renamed != keys
        assert same_places(arch, renamed, keys)
        own = [k for k in keys if k.startswith(UNET)] or [UNET + k for k in keys]
        assert same_places(arch, ["net." + k.removeprefix(UNET) for k in own], own)


@pytest.mark.parametrize("name", archs.names())
def test_lists_name_known_blocks_once(name):
    arch = archs.load(name)
    known = {*arch.blocks, "BASE", "VAE", "CLIP", "T5"}
    for n, blocks in [*arch.lists.items(), *arch.lora_lists.items()]:
        assert len(blocks) == n == len(set(blocks))
        assert set(blocks) <= known
    assert arch.components[-1].name == "vae"
    assert arch.input_conv is None or arch.place(arch.input_conv).block in arch.blocks


def test_lists_of_the_community():
    assert archs.load("sd1").lists[26][:3] == ("BASE", "IN00", "IN01")
    assert archs.load("sd1").lists[25][12] == "M00"
    assert archs.load("sd1").lists[25][24] == "OUT11"
    assert archs.load("sdxl").lists[20][10] == "M00"
    assert archs.load("sdxl").lists[21][20] == "VAE"
    assert archs.load("flux1").lists[61][3] == "D00"
    # the blocks of SD1 without attention are just those that the list of 17 leaves out
    attends = {archs.load("sd1").place(k).block for k in golden("sd1") if ".attn2." in k}
    assert set(archs.load("sd1").lora_lists[17]) == {"BASE", *attends}
    attends = {archs.load("sdxl").place(k).block for k in golden("sdxl") if ".attn2." in k}
    assert set(archs.load("sdxl").lora_lists[12]) == {"BASE", *attends}


def test_ema_names_come_from_keys_and_are_distinct():
    for model in ("sd1", "sd2", "sdxl"):
        keys = [k for k in golden(model) if k.startswith(UNET)]
        made = [archs.ema_key(k) for k in keys]
        assert made == [ema_name(k) for k in keys]
        assert len(set(made)) == len(keys)
    first = archs.ema_key(UNET + "input_blocks.0.0.bias")
    assert first == "model_ema.diffusion_modelinput_blocks00bias"  # as in v1-5-pruned.ckpt


def test_markers_and_quantised():
    keys = ["a.weight", "v_pred", "ztsnr"]
    assert archs.markers(keys) == {"v_pred": "v-prediction", "ztsnr": "zero-terminal SNR"}
    keys = ["x.weight", "x.scale_weight", "scaled_fp8", "y.comfy_quant", "y.weight_scale"]
    assert list(archs.quantised(keys)) == keys[1:]
    assert set(archs.quantised(keys).values()) == {"scaled weights"}
    for model in MODELS:
        assert archs.quantised(golden(model)) == {}


@pytest.mark.parametrize("name", archs.names())
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_place_is_stable(name, data):
    arch = archs.load(name)
    words = ["model", "diffusion_model", "net", "vae", "encoder", "decoder", "text_model", "0", "1"]
    words += ["img_in", "input_blocks", "blocks", "weight", "position_ids", "cond_stage_model"]
    key = ".".join(data.draw(st.lists(st.sampled_from(words) | st.text(max_size=5), max_size=6)))
    place = arch.place(key)
    if place is not None:
        assert arch.place(place.key) == place


# --- detection


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("narrow", [False, True])
def test_each_model_is_detected_in_every_spelling(model, narrow):
    name, variant = expected(model)
    if narrow and name in ("wan", "sd3"):
        variant = None  # these variants are told by widths or keep them; the family must hold
    shapes = shapes_of(header(model, full_width=not narrow, dtype=None))
    whole = any(not k.startswith(UNET) for k in shapes) and any(k.startswith(UNET) for k in shapes)
    found = archs.detect(shapes)
    assert found.arch is archs.load(name)
    assert found.kind == ("checkpoint" if whole else "denoiser")
    assert found.seen in shapes
    assert variant in (None, found.variant)
    for prefix in ("", UNET, "net.", "model."):
        found = archs.detect(spelled(shapes, prefix))
        assert (found.arch, found.kind, found.prefix) == (archs.load(name), "denoiser", prefix)
    renamed = {k.replace("_norm.scale", "_norm.weight"): s for k, s in shapes.items()}
    assert archs.detect(renamed).arch is archs.load(name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("narrow", [False, True])
def test_one_family_claims_each_model(model, narrow):
    keys = _Keys(spelled(shapes_of(header(model, full_width=not narrow)), ""))
    claims = [f.short for f in families() if any(keys.holds(r.keys) for r in f.detect)]
    assert claims == [archs.load(expected(model)[0]).short]


def test_families_known_by_name_claim_their_own_keys_alone():
    for family in families():
        for rule in family.detect:
            shapes = {}
            for key, want in rule.keys.items():
                if want is not False:
                    sizes = [1, 1] if want is True else want
                    name = key.replace("*", "x")
                    shapes[name] = tuple(n if isinstance(n, int) else 1 for n in sizes)
            claims = [f.short for f in families()
                      if any(_Keys(shapes).holds(r.keys) for r in f.detect)]  # fmt: skip
            assert claims == [family.short]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize(
    ("model", "variant", "title"),
    [
        ("sd1", "base", "SD1"),
        ("sd1", "inpainting", "SD1 inpainting"),
        ("sd1", "pix2pix", "SD1 instruct-pix2pix"),
        ("sd2", "base", "SD2"),
        ("sd2", "inpainting", "SD2 inpainting"),
        ("sd2", "depth", "SD2 depth"),
        ("sdxl", "base", "SDXL"),
        ("sdxl", "inpainting", "SDXL inpainting"),
        ("sdxl", "pix2pix", "SDXL instruct-pix2pix"),
    ],
)
def test_variants(model, variant, title, full_width, bare):
    shapes = shapes_of(header(model, variant, full_width=full_width, bare=bare))
    found = archs.detect(shapes)
    assert (found.arch, found.variant) == (archs.load(model), variant)
    assert found.title == f"{title} {'U-Net' if bare else 'checkpoint'}"
    assert found.prefix == ("" if bare else UNET)
    assert found.require("a.safetensors") is archs.load(model)
    first = archs.load(model).input_conv
    assert shapes[first.removeprefix(UNET) if bare else first][1] == INPUT_CHANNELS[variant]


def test_published_widths_outweigh_the_kind_of_proj_in():
    # Some converters store SD2's linear proj_in as a 1x1 convolution, or SD1's the other way.
    def with_rank(model, rank):
        shapes = shapes_of(header(model, full_width=True))
        return {
            k: (*s[:2], 1, 1)[:rank] if k.endswith(("proj_in.weight", "proj_out.weight")) else s
            for k, s in shapes.items()
        }

    for model in ("sd1", "sd2"):
        for rank in (2, 4):
            assert archs.detect(with_rank(model, rank)).arch is archs.load(model)


def test_extras_do_not_disturb_detection():
    shapes = shapes_of(header("sd1", ema=True, nai=True, markers=("v_pred", "ztsnr")))
    assert archs.detect(shapes).title == "SD1 checkpoint"
    schnell = {k: s for k, s in shapes_of(header("flux-dev")).items() if "guidance_in" not in k}
    assert archs.detect(schnell).variant == "schnell"


def test_modelspec_ids():
    assert archs.load("sd1").modelspec_id("inpainting") == "stable-diffusion-v1-inpainting"
    assert archs.load("sd1").modelspec_id() == "stable-diffusion-v1"
    assert archs.load("sdxl").modelspec_id("pix2pix") == "stable-diffusion-xl-v1-edit"
    assert archs.load("flux1").modelspec_id("schnell") == "flux-1-schnell"


# keys as the named tools write them
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA_XL = "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q"
PEFT = "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k.lora_A.weight"
OTHERS = [
    ({KOHYA + ".lora_down.weight": (8, 768)}, "lora", "LoRA for SD1 (kohya names)", "sd1"),
    ({KOHYA + ".lora_down.weight": (8, 1024)}, "lora", "LoRA for SD2 (kohya names)", "sd2"),
    ({KOHYA + ".hada_w1_a": (320, 8)}, "lora", "LoHa for SD1 (kohya names)", "sd1"),
    ({KOHYA_XL + ".lokr_w1": (8, 8)}, "lora", "LoKr for SDXL (kohya names)", "sdxl"),
    ({PEFT: (8, 2048)}, "lora", "LoRA for SDXL (diffusers names)", "sdxl"),
    (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 768)},
        "lora",
        "LoRA for SD1 (kohya names)",
        "sd1",
    ),
    (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (8, 3072)},
        "lora",
        "LoRA for Flux.1 (kohya names)",
        "flux1",
    ),
    (
        {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": (8, 9)},
        "lora",
        "LoRA for SD1 (ComfyUI names)",
        "sd1",
    ),
    ({"foo.lora_down.weight": (8, 8)}, "lora", "LoRA for an unknown model", None),
    ({"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}, "vae",
     "VAE file (4 latent channels)", None),
    ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "vae", "VAE file (16 latent channels)", None),
    ({"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid_block.resnets.0.conv1.weight": (1,)},
     "vae", "VAE file (4 latent channels) (diffusers names)", None),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": (1, 1)}, "text_encoder",
     "CLIP text encoder file", None),
    ({"encoder.block.0.layer.0.SelfAttention.q.weight": (1, 1)}, "text_encoder",
     "T5 text encoder file", None),
    ({"emb_params": (4, 768)}, "embedding", "textual-inversion embedding", None),
    ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "embedding", "textual-inversion embedding", None),
    ({"control_model.input_blocks.0.0.weight": (1,)}, "controlnet", "ControlNet", None),
    ({"controlnet_cond_embedding.conv_in.weight": (1,)}, "controlnet", "ControlNet", None),
    ({"joint_blocks.0.context_block.attn.qkv.weight": (1, 1)}, "denoiser",
     "SD3 transformer", "sd3"),
    ({UNET + "txt_in.individual_token_refiner.blocks.0.norm1.weight": (1,)}, "denoiser",
     "HunyuanVideo (ComfyUI's names) denoiser", None),
    ({}, "unknown", "unknown (no tensors)", None),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "kind", "title", "arch"), OTHERS)
def test_other_files_are_named(shapes, kind, title, arch):
    found = archs.detect(shapes)
    assert (found.kind, found.title) == (kind, title)
    assert found.arch is (archs.load(arch) if arch else None)
    if kind != "denoiser":
        with pytest.raises(Refusal, match=r"x\.pt is not a model that can be merged"):
            found.require("x.pt")


@pytest.mark.parametrize(
    "named",
    [
        "an SD1 checkpoint",
        "an SDXL checkpoint",
        "a VAE file",
        "a video VAE file",
        "a LoRA for SD1",
        "an IA3 for SD1",
        "an OFT for SD1",
        "a GLoRA for SD1",
        "a CLIP text encoder file",
        "an OpenCLIP text encoder file",
        "a T5 text encoder file",
        "an LTX-Video transformer",
        "a Lumina 2 transformer",
        "an IP-Adapter",
        "an upscaler (ESRGAN family)",
        "a HiDream transformer",
        "an AuraFlow transformer",
    ],
)
def test_sentences_say_what_a_file_is_with_its_article(named):
    detection = archs.Detection(None, "base", "unknown", named.split(" ", 1)[1])
    assert detection.named == named


def test_what_nobody_knows_has_no_article():
    assert archs.detect({}).named == "unknown (no tensors)"


def test_diffusers_components_are_named_and_refused():
    names = {
        "down_blocks.0.attentions.0.proj_in.weight": (320, 320, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "up_blocks.3.resnets.2.conv1.weight": (320, 640, 3, 3),
        "conv_in.weight": (320, 9, 3, 3),
    }
    found = archs.detect(names)
    assert found.title == "SD1 inpainting U-Net (diffusers names)"
    assert found.dialect == "diffusers"
    with pytest.raises(Refusal, match="diffusers names"):
        found.require("unet.safetensors")


def test_refusals_say_what_was_seen():
    found = archs.detect({"clf.1.weight": (4, 4)})
    with pytest.raises(Refusal, match=r"Stable Cascade .*it has clf\.1\.weight.* SDXL"):
        found.require("a.safetensors")


def test_parts_of_a_known_model_are_guessed():
    shapes = {k: (1,) for k in golden("sdxl") if ".output_blocks.7." in k}
    assert archs.detect(shapes).kind == "unknown"
    shapes |= {k: (1,) for k in golden("sdxl") if ".embedders.1." in k}
    found = archs.detect({k: s for k, s in shapes.items() if "resblocks.0." not in k})
    assert found.title.endswith("; looks like part of SDXL)")
    assert f"{sum('resblocks.0.' not in k for k in shapes)} tensors; first keys: " in found.title


KEY = st.text("ab._0*?\n<>", max_size=12) | st.sampled_from([k for s, *_ in OTHERS for k in s])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(KEY, st.lists(st.integers(0, 9), max_size=5).map(tuple), max_size=6))
def test_detection_never_raises(shapes):
    assert archs.detect(shapes).title


@settings(deadline=None, max_examples=300)
@given(st.text("ab.*?", min_size=1, max_size=8), st.lists(st.text("ab.", max_size=8), max_size=6))
def test_globs_are_those_of_fnmatch(glob, keys):
    like = set(_Keys(dict.fromkeys(keys, ())).like((glob,)))
    assert like == {key for key in keys if fnmatchcase(key, glob)}
    assert set(_Keys(dict.fromkeys(keys, ())).like((glob, "b*a*"))) == like | {
        key for key in keys if fnmatchcase(key, "b*a*")
    }


def test_hostile_names_stay_out_of_messages():
    found = archs.detect({"a" * 100_000: (1,), "\x1b[2J\nb": (1,)})
    assert found.kind == "unknown"
    assert len(found.title) < 300
    assert found.title.isprintable()
    found = archs.detect({"\x1b[2J.lora_up.weight": (1,), "\x1b[2J.lora_down.weight": (1, 1)})
    with pytest.raises(Refusal) as refusal:
        found.require("x.safetensors")
    assert str(refusal.value).isprintable()


def test_architectures_are_values():
    fresh = archs.model.decode(archs.model._HERE / "data" / "sd1.toml", archs.Architecture)
    assert fresh is not archs.load("sd1")
    assert fresh == archs.load("sd1")
    assert {fresh: 1}[archs.load("sd1")] == 1
    assert archs.detect({}) == archs.detect({})


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(Refusal, match="did you mean sdxl"):
        archs.load("sdlx")


def test_detection_needs_no_arrays():
    code = "import sys, plymix.archs as a; a.detect({'x': (1,)}); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "rich", "cyclopts"} & set(run.stdout.split())
