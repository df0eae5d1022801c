"""Dialects against diffusers' own converters, where it is installed (extra `dev`).

Every element of the tensors has a number of its own, so a part in the wrong place is seen, not only
one of the wrong shape. Transformers have their true numbers of rows (some converters have widths
written into them) and one column; U-Nets, VAEs and text encoders are small.
"""

import math

import numpy as np
import pytest
from test_dialects import numbered, seen

from plymix import archs
from plymix.archs.dialects import canonical, inverse, shape_of, written
from tiny import UNET, golden, header

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# Golden header -> architecture and the name of the transformer's converter.
TRANSFORMERS = {
    "flux-dev": ("flux1", "convert_flux_transformer_checkpoint_to_diffusers"),
    "sd3.5-medium": ("sd3", "convert_sd3_transformer_checkpoint_to_diffusers"),
    "chroma": ("chroma", "convert_chroma_transformer_checkpoint_to_diffusers"),
    "auraflow": ("auraflow", "convert_auraflow_transformer_checkpoint_to_diffusers"),
    "lumina2": ("lumina2", "convert_lumina2_to_diffusers"),
    "z-image": ("z-image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    "wan2.1-i2v-14b": ("wan", "convert_wan_transformer_to_diffusers"),
    "wan2.1-vace-14b": ("wan", "convert_wan_transformer_to_diffusers"),
    "flux2-klein-4b": ("flux2", "convert_flux2_transformer_checkpoint_to_diffusers"),
    "cosmos-predict2-2b": ("cosmos2", "convert_cosmos_transformer_checkpoint_to_diffusers"),
    "krea2": ("krea2", "convert_krea2_transformer_checkpoint_to_diffusers"),
    "ltx-video-2b": ("ltx-video", "convert_ltx_transformer_checkpoint_to_diffusers"),
    "hunyuan-video": ("hunyuan-video", "convert_hunyuan_video_transformer_to_diffusers"),
}
LEVELS = {"sd1": 4, "sd2": 4, "sdxl": 3, "ssd-1b": 3, "vega": 3}


def convert(name, tensors, *arguments, **options):
    """What a converter of diffusers makes of arrays."""
    from diffusers.loaders import single_file_utils

    state = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    got = getattr(single_file_utils, name)(*arguments, state, **options)
    return {key: value.numpy() for key, value in got.items()}


def shapes(tensors):
    return {key: tensor.shape for key, tensor in tensors.items()}


def agree(name, component, ours, theirs):
    """Our file of a component is diffusers', but for what we say that it leaves out; and back."""
    arch = archs.load(name)
    there = written(arch, "diffusers", component, shapes(ours))
    made = {key: seen(views, ours) for key, views in there.views.items()}
    assert made
    for key, tensor in made.items():
        assert key in theirs, key
        assert theirs[key].shape == tensor.shape, key
        assert np.array_equal(theirs[key], tensor), key
    left = {x.reshape(-1)[:1].tobytes() for key, x in ours.items() if key in there.unpaired}
    extra = {k: x for k, x in theirs.items() if k not in made}
    assert all(x.reshape(-1)[:1].tobytes() in left for x in extra.values()), list(extra)
    back = canonical(arch, "diffusers", component, shapes(made))
    assert back.unpaired == {}
    assert inverse(back.views, shapes(made)) == there.views
    for key, views in back.views.items():
        assert np.array_equal(seen(views, made), ours[key]), key
        assert shape_of(views, shapes(made)) == ours[key].shape, key


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_transformers(model):
    name, converter = TRANSFORMERS[model]
    rows = {}
    for key, (_, shape, component, _) in golden(model).items():
        if component == "transformer":
            own = UNET + key.removeprefix(UNET)
            rows[own] = (*shape[:1], *[1] * (len(shape) - 1))
    ours = numbered(rows)
    bare = {key.removeprefix(UNET): tensor for key, tensor in ours.items()}
    agree(name, "transformer", ours, convert(converter, bare))


@pytest.mark.parametrize("model", LEVELS)
def test_unets(model):
    ours = numbered({k: s for k, (_, s) in header(model).items() if k.startswith(UNET)})
    xl = LEVELS[model] == 3
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if xl else None}
    agree(model, "unet", ours, convert("convert_ldm_unet_checkpoint", ours, config=config))


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl", "flux-dev", "sd3.5-medium"])
def test_vaes(model):
    name = {"flux-dev": "flux1", "sd3.5-medium": "sd3"}.get(model, model)
    arch = archs.load(name)
    every = {k: s for k, (_, s) in header(model).items() if arch.place(k).component == "vae"}
    ours = numbered(every)
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    start = next(iter(every)).partition(".")[0] + "."
    bare = {"first_stage_model." + k.removeprefix(start): x for k, x in ours.items()}
    agree(name, "vae", ours, convert("convert_ldm_vae_checkpoint", bare, config=config))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_clip(model):
    arch = archs.load(model)
    every = {k: s for k, (_, s) in header(model).items()}
    ours = numbered({k: s for k, s in every.items() if arch.place(k).component == "text_encoder"})
    start = arch.components[1].prefixes[0] + "transformer."
    theirs = convert("convert_ldm_clip_checkpoint", ours, remove_prefix=start)
    agree(model, "text_encoder", ours, theirs)


@pytest.mark.parametrize(
    ("model", "component"), [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_open_clip(model, component):
    arch = archs.load(model)
    every = {k: s for k, (_, s) in header(model).items()}
    ours = numbered({k: s for k, s in every.items() if arch.place(k).component == component})
    prefix = next(c.prefixes[0] for c in arch.components if c.name == component) + "model."
    width = every[prefix + "ln_final.weight"][0]

    class Model:
        class config:
            hidden_size = width

    from diffusers.loaders import single_file_utils

    state = {key: torch.from_numpy(value.copy()) for key, value in ours.items()}
    got = single_file_utils.convert_open_clip_checkpoint(Model, state, prefix=prefix)
    theirs = {key: value.numpy() for key, value in got.items()}
    agree(model, component, ours, theirs)


@pytest.mark.parametrize(
    ("config", "variant", "parameters"),
    [
        ({"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
         "base", 2_084_951_104),
        ({"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384,
          "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
         "3.5-medium", 2_469_663_936),
        ({"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192,
          "qk_norm": "rms_norm"}, "3.5-large", 8_146_280_768),
    ],
)  # fmt: skip
def test_every_size_of_sd3(config, variant, parameters):
    """diffusers' class in its published sizes, read in its names: every key is one of ours."""
    from diffusers import SD3Transformer2DModel

    heads = config["num_attention_heads"]
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, joint_attention_dim=4096, pooled_projection_dim=2048, out_channels=16,
            attention_head_dim=64, caption_projection_dim=64 * heads, **config,
        )  # fmt: skip
    theirs = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    sd3 = archs.load("sd3")
    found = canonical(sd3, "diffusers", "transformer", theirs)
    assert found.unpaired == {}
    ours = {key: shape_of(views, theirs) for key, views in found.views.items()}
    assert sum(map(math.prod, ours.values())) == parameters
    seen_as = archs.detect(ours)
    assert (seen_as.arch, seen_as.variant) == (sd3, variant)
    blocks = {sd3.place(key).block for key in ours}
    assert blocks == {"IN", "OUT", "BUFFER", *(f"J{i:02}" for i in range(config["num_layers"]))}
