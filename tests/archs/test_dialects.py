"""Dialects against maps that were made by running other tools on tagged tensors.

The maps (see `maps`) are applied with numpy alone, on tensors in which every element has its own
number.
"""

import math
import time
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maps import ARCH, converted, golden_map, theirs_of
from plymix import archs
from plymix.archs import dialects
from plymix.archs.dialects import View, canonical, inverse, recognise, shape_of, written
from plymix.errors import Refusal
from tiny import UNET, header

TEXT = "cond_stage_model.transformer.text_model."


MAP_OF_VAE = golden_map("sd1")["vae"]
CASES = [(model, component) for model in ARCH for component in golden_map(model)]


@cache
def shapes_of(model, component, full_width=False):
    """The shapes of the canonical tensors that the map of a component has."""
    arch = archs.load(ARCH[model])
    exact = full_width or model == "lumina2"  # its 5 parts of q, k, v shall stay whole
    sizes = {
        arch.place(k).key: s for k, (_, s) in header(model, full_width=exact, dtype=None).items()
    }
    if exact and not full_width:
        sizes = {k: tuple(n if n % 32 else n // 32 for n in s) for k, s in sizes.items()}
    return {key: sizes[key] for key in golden_map(model)[component]}


def numbered(shapes):
    """Tensors all of whose elements differ, from each other's too."""
    out, at = {}, 1
    for key, shape in shapes.items():
        n = math.prod(shape)
        out[key] = np.arange(at, at + n, dtype=np.int64).reshape(shape)
        at += n
    return out


def seen(views, tensors):
    """What `views` say, done."""
    parts = []
    for view in views:
        part = tensors[view.key]
        part = part if view.rows is None else part[slice(*view.rows)]
        part = part.T if view.transpose else part
        parts.append(part if view.shape is None else part.reshape(view.shape))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        assert np.array_equal(found[key], tensor), key


def shapes(tensors):
    return {key: tensor.shape for key, tensor in tensors.items()}


@pytest.mark.parametrize(("model", "component"), CASES)
def test_both_ways_are_those_of_the_map_down_to_the_element(model, component):
    arch = archs.load(ARCH[model])
    ours = numbered(shapes_of(model, component))
    theirs = theirs_of(model, component, ours)
    dropped = {k for k, (names, _) in golden_map(model)[component].items() if not names}

    there = written(arch, "diffusers", component, shapes(ours))
    same({key: seen(views, ours) for key, views in there.views.items()}, theirs)
    assert set(there.unpaired) == dropped
    assert all(there.unpaired.values())

    back = canonical(arch, "diffusers", component, shapes(theirs))
    kept = {key: tensor for key, tensor in ours.items() if key not in dropped}
    same({key: seen(views, theirs) for key, views in back.views.items()}, kept)
    assert back.unpaired == {}
    for key in dropped:
        assert any(key.startswith(name) for name in back.absent), key
    for key in kept:
        assert not any(key.startswith(name) for name in back.absent), key
        place = arch.place(key)
        assert (place.key, place.component) == (key, component)

    for pairing, sources in ((there, ours), (back, theirs)):
        for key, views in pairing.views.items():
            assert shape_of(views, shapes(sources)) == seen(views, sources).shape, key
    assert inverse(back.views, shapes(theirs)) == there.views
    assert inverse(there.views, shapes(kept)) == back.views


@pytest.mark.parametrize(("model", "component"), CASES)
def test_true_widths(model, component):
    # One row of numbers stands for a tensor: what is told apart here is rows and shapes.
    arch = archs.load(ARCH[model])
    sizes = shapes_of(model, component, full_width=True)
    ours = {
        key: np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)
        if shape
        else np.zeros(())
        for key, shape in sizes.items()
    }
    there = written(arch, "diffusers", component, sizes)
    expected = {}
    for key, (names, transform) in golden_map(model)[component].items():
        if transform == "swap_scale_shift":
            half, width = sizes[key][0] // 2, sizes[key][1:]
            (name,) = names
            expected[name] = sizes[key]
            assert there.views[name] == (View(key, (half, 2 * half)), View(key, (0, half)))
            assert shape_of(there.views[name], sizes) == (2 * half, *width)
        else:
            for name, part in converted(ours[key], names, transform).items():
                expected[name] = part.shape
                (view,) = there.views[name]
                got = seen([view], ours)
                assert (view.key, got.shape) == (key, part.shape)
                corner = (slice(None),) + (slice(0, 1),) * (part.ndim - 1)
                assert np.array_equal(got[corner], part[corner]) or view.transpose
    assert there.views.keys() == expected.keys()
    back = canonical(arch, "diffusers", component, expected)
    assert inverse(back.views, expected) == there.views
    for key, views in back.views.items():
        assert shape_of(views, expected) == sizes[key]


# --- other spellings


def test_text_encoder_without_text_model():
    sd1 = archs.load("sd1")
    ours = shapes_of("sd1", "text_encoder")
    theirs = {key.removeprefix(TEXT): s for key, s in ours.items()}
    found = canonical(sd1, "diffusers", "text_encoder", theirs)
    assert found.views == {key: (View(key.removeprefix(TEXT)),) for key in ours}
    assert (found.unpaired, found.absent) == ({}, {})
    # SD2's and SDXL's second may lack it too
    sd2 = archs.load("sd2")
    full = written(sd2, "diffusers", "text_encoder", shapes_of("sd2", "text_encoder"))
    theirs = {k: shape_of(v, shapes_of("sd2", "text_encoder")) for k, v in full.views.items()}
    bare = {key.removeprefix("text_model."): s for key, s in theirs.items()}
    one = canonical(sd2, "diffusers", "text_encoder", theirs)
    other = canonical(sd2, "diffusers", "text_encoder", bare)
    assert one.views.keys() == other.views.keys()
    assert len(one.views) == 280
    # and a file can be written in the spelling that it was read in
    assert inverse(other.views, bare).keys() == bare.keys()


def test_attention_of_old_vae_files():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    sd1 = archs.load("sd1")
    ours = numbered(shapes_of("sd1", "vae"))
    new = theirs_of("sd1", "vae", ours)
    renamed = {}
    for key, tensor in new.items():
        for name, was in old.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{was}.")
        renamed[key] = tensor
    assert len(renamed.keys() - new.keys()) == 16
    found = canonical(sd1, "diffusers", "vae", shapes(renamed))
    same({key: seen(views, renamed) for key, views in found.views.items()}, ours)
    assert [p.arch.name for p in recognise(shapes(renamed))][:1] == ["sd1"]


def test_vae_attention_of_either_rank():
    sd1 = archs.load("sd1")
    ours = shapes_of("sd1", "vae")
    key, name = "first_stage_model.decoder.mid.attn_1.q.weight", "to_q.weight"
    name = "decoder.mid_block.attentions.0." + name
    n = ours[key][0]
    assert written(sd1, "diffusers", "vae", {key: (n, n, 1, 1)}).views == {
        name: (View(key, shape=(n, n)),)
    }
    assert written(sd1, "diffusers", "vae", {key: (n, n)}).views == {name: (View(key),)}
    back = canonical(sd1, "diffusers", "vae", {name: (n, n)}).views
    assert back == {key: (View(name, shape=(n, n, 1, 1)),)}
    assert canonical(sd1, "diffusers", "vae", {name: (n, n, 1, 1)}).views == {key: (View(name),)}


@pytest.mark.parametrize(("arch", "prefix"), [("sd3", "first_stage_model."), ("flux1", "vae.")])
def test_vaes_with_16_channels_have_the_names_of_the_others(arch, prefix):
    home = "first_stage_model."
    four = shapes_of("sd1", "vae")
    ours = {prefix + key.removeprefix(home): s for key, s in four.items() if "quant" not in key}
    there = written(archs.load(arch), "diffusers", "vae", ours).views
    names = {prefix + k.removeprefix(home): names for k, (names, _) in MAP_OF_VAE.items()}
    assert {name: views[0].key for name, views in there.items()} == {
        names[key][0]: key for key in ours
    }
    real = [
        key for key in header({"sd3": "sd3.5-medium", "flux1": "flux-dev"}[arch]) if key in ours
    ]
    assert len(real) == len(ours) == 244
    theirs = {key: shape_of(views, ours) for key, views in there.items()}
    theirs["decoder.conv_in.weight"] = (16, 16, 3, 3)
    assert (arch, "vae") in {(part.arch.name, part.component) for part in recognise(theirs)}


@pytest.mark.parametrize(
    ("model", "component"),
    [
        ("sd3.5-medium", "text_encoder"),
        ("sd3.5-medium", "text_encoder_2"),
        ("sd3.5-medium", "text_encoder_3"),
        ("flux-dev", "text_encoder"),
        ("flux-dev", "text_encoder_2"),
    ],
)
def test_text_encoders_with_transformers_names_in_both(model, component):
    arch = archs.load(ARCH[model])
    every = {key: shape for key, (_, shape) in header(model).items()}
    ours = {key: s for key, s in every.items() if arch.place(key).component == component}
    start = next(iter(ours)).partition(".transformer.")[0] + ".transformer."
    found = written(arch, "diffusers", component, every)
    ids = start + "text_model.embeddings.position_ids"
    assert found.views == {key.removeprefix(start): (View(key),) for key in ours if key != ids}
    assert len(found.views) > 190
    theirs = {key: ours[start + key] for key in found.views}
    assert (arch.name, component) in {(p.arch.name, p.component) for p in recognise(theirs)}


def test_layers_that_sd2_leaves_out():
    sd2 = archs.load("sd2")
    start = "cond_stage_model.model."
    found = written(sd2, "diffusers", "text_encoder", shapes_of("sd2", "text_encoder"))
    last = [k for k in found.unpaired if ".resblocks.23." in k]
    assert len(last) == 12
    assert {found.unpaired[k] for k in last} == {
        "the text encoder of SD2 ends with layer 22 in diffusers"
    }
    absent = canonical(sd2, "diffusers", "text_encoder", {}).absent
    assert absent.keys() == {
        start + "logit_scale",
        start + "text_projection",
        start + "transformer.resblocks.23.",
    }
    # transformers' own CLIP-H has them: what a file holds is read
    more = {
        "text_model.encoder.layers.23.layer_norm1.bias": (32,),
        "text_projection.weight": (32, 32),
    }
    read = canonical(sd2, "diffusers", "text_encoder", more)
    assert read.views == {
        start + "transformer.resblocks.23.ln_1.bias": (View(next(iter(more))),),
        start + "text_projection": (View("text_projection.weight", transpose=True),),
    }
    assert read.absent.keys() == {start + "logit_scale"}


@pytest.mark.parametrize(
    ("arch", "ours", "theirs"),
    [
        ("sd1", "output_blocks.2.1.conv.", "up_blocks.0.upsamplers.0.conv."),
        ("sd1", "output_blocks.5.2.conv.", "up_blocks.1.upsamplers.0.conv."),
        ("sd2", "label_emb.0.2.", "class_embedding.linear_2."),  # unCLIP
        ("sdxl", "output_blocks.2.2.conv.", "up_blocks.0.upsamplers.0.conv."),
        ("sdxl-refiner", "output_blocks.2.1.conv.", "up_blocks.0.upsamplers.0.conv."),
        ("sdxl-refiner", "output_blocks.8.2.conv.", "up_blocks.2.upsamplers.0.conv."),
        ("sdxl-refiner", "label_emb.0.0.", "add_embedding.linear_1."),
    ],
)
def test_where_unets_differ(arch, ours, theirs):
    arch = archs.load(arch)
    found = written(arch, "diffusers", "unet", {UNET + ours + "weight": (8, 8)})
    assert found.views == {theirs + "weight": (View(UNET + ours + "weight"),)}
    back = canonical(arch, "diffusers", "unet", {theirs + "weight": (8, 8)})
    assert inverse(back.views, {theirs + "weight": (8, 8)}) == found.views


def test_refiner_round_trip():
    refiner = archs.load("sdxl-refiner")
    ours = {key: shape for key, (_, shape) in header("sdxl-refiner").items()}
    paired = set()
    for component in ("unet", "text_encoder_2", "vae"):
        there = written(refiner, "diffusers", component, ours)
        theirs = {key: shape_of(views, ours) for key, views in there.views.items()}
        back = canonical(refiner, "diffusers", component, theirs)
        assert back.unpaired == {}
        assert inverse(back.views, theirs) == there.views
        paired |= back.views.keys() | there.unpaired.keys()
    assert paired == ours.keys()


def test_the_last_block_of_sd3_is_the_last_one_there_is():
    sd3 = archs.load("sd3")
    name = "transformer_blocks.{}.norm1_context.linear.bias"
    for depth in (2, 24, 38):
        theirs = {name.format(i): (12,) if i < depth - 1 else (4,) for i in range(depth)}
        views = canonical(sd3, "diffusers", "transformer", theirs).views
        swapped = [key for key, of in views.items() if len(of) > 1]
        assert swapped == [f"{UNET}joint_blocks.{depth - 1}.context_block.adaLN_modulation.1.bias"]
        assert (
            inverse(views, theirs)
            == written(
                sd3, "diffusers", "transformer", {k: shape_of(v, theirs) for k, v in views.items()}
            ).views
        )


def test_pixart():
    # No converter to compare with: the counts are those of diffusers' class, the order of the fused
    # keys and values is that of PixArt's `kv.unbind`.
    pixart = archs.load("pixart")
    ours = {
        UNET + key: shape for key, (_, shape) in header("pixart-sigma", full_width=True).items()
    }
    there = written(pixart, "diffusers", "transformer", ours)
    assert there.unpaired.keys() == ours.keys() - {v[0].key for v in there.views.values()}
    assert {key.removeprefix(UNET) for key in there.unpaired} <= {
        "pos_embed", "y_embedder.y_embedding"
    }  # fmt: skip
    theirs = {key: shape_of(views, ours) for key, views in there.views.items()}
    assert len(theirs) == 603
    start = "blocks.3.cross_attn.kv_linear."
    for name, rows in (("k", (0, 1152)), ("v", (1152, 2304))):
        views = there.views[f"transformer_blocks.3.attn2.to_{name}.bias"]
        assert views == (View(UNET + start + "bias", rows),)
    back = canonical(pixart, "diffusers", "transformer", theirs)
    assert back.unpaired == {}
    assert inverse(back.views, theirs) == there.views
    assert recognise(theirs) == (dialects.Part(pixart, "transformer"),)


def test_components_with_the_same_names():
    qwen = archs.load("qwen-image")
    ours = {key: shape for key, (_, shape) in header("qwen-image").items()}
    bare = {key.removeprefix(UNET): shape for key, shape in ours.items()}
    found = canonical(qwen, "diffusers", "transformer", bare)
    assert found.views == {UNET + key: (View(key),) for key in bare}
    assert recognise(bare) == (dialects.Part(qwen, "transformer"),)


# --- what does not pair


def test_strangers_are_named():
    sd1 = archs.load("sd1")
    strangers = [
        "down_blocks.0.resnets.3.norm1.weight",  # ldm numbers three layers to a level
        "down_blocks.00.resnets.0.norm1.weight",
        "down_blocks.99999.resnets.0.norm1.weight",
        "down_blocks.x.resnets.0.norm1.weight",
        "down_blocks.0.temporal.0.weight",
        "conv_in",
        "",
    ]
    found = canonical(sd1, "diffusers", "unet", dict.fromkeys(strangers, (8,)))
    assert found.views == {}
    assert list(found.unpaired) == strangers
    levels = {"decoder.up_blocks.4.resnets.0.norm1.bias": (8,)}
    assert list(canonical(sd1, "diffusers", "vae", levels).unpaired) == list(levels)
    levels = {"first_stage_model.decoder.up.4.block.0.norm1.bias": (8,)}  # there are 0 to 3
    assert list(written(sd1, "diffusers", "vae", levels).unpaired) == list(levels)
    ours = {UNET + "outer.weight": (8,), "betas": (1000,), "cond_stage_model.logit_scale": ()}
    assert list(written(sd1, "diffusers", "unet", ours).unpaired) == [UNET + "outer.weight"]
    text = written(sd1, "diffusers", "text_encoder", ours)
    assert text.unpaired == {"cond_stage_model.logit_scale": "diffusers has no such tensor"}


def test_a_part_alone_is_no_tensor():
    flux = archs.load("flux1")
    start = "single_transformer_blocks.0."
    theirs = {start + f"attn.to_{x}.weight": (8, 8) for x in "qk"}
    found = canonical(flux, "diffusers", "transformer", theirs)
    assert found.views == {}
    assert found.unpaired == dict.fromkeys(
        theirs, f"the rest of {UNET}single_blocks.0.linear1.weight is not there"
    )


@pytest.mark.parametrize(
    ("arch", "component", "theirs", "message"),
    [
        ("flux1", "transformer", {
            "single_transformer_blocks.0.attn.to_q.bias": (8,),
            "single_transformer_blocks.0.attn.to_k.bias": (8,),
            "single_transformer_blocks.0.attn.to_v.bias": (8,),
            "single_transformer_blocks.0.proj_mlp.bias": (24,),
        }, r"proj_mlp.bias has the shape \[24\]; .* 1:1:1:4"),
        ("flux1", "transformer", {
            "transformer_blocks.0.attn.to_q.weight": (8, 8),
            "transformer_blocks.0.attn.to_k.weight": (8, 6),
            "transformer_blocks.0.attn.to_v.weight": (8, 8),
        }, r"to_k.weight has the shape \[8, 6\]"),
        ("flux1", "transformer", {"norm_out.linear.bias": (7,)}, "two equal halves"),
        ("sdxl", "text_encoder_2", {"text_projection.weight": (8,)}, "a matrix"),
        ("sd1", "vae", {
            "decoder.mid_block.attentions.0.query.bias": (8,),
            "decoder.mid_block.attentions.0.to_q.bias": (8,),
        }, "are the same tensor, first_stage_model.decoder.mid.attn_1.q.bias"),
        ("sd1", "image_encoder", {}, "knows text_encoder, unet, vae"),
        ("krea2", "transformer", {"transformer_blocks.0.scale_shift_table": (12,)}, "6 rows"),
        ("anima", "vae", {}, "knows none of them"),
    ],
)  # fmt: skip
def test_refused(arch, component, theirs, message):
    with pytest.raises(Refusal, match=message):
        canonical(archs.load(arch), "diffusers", component, theirs)


def test_refused_on_the_way_there():
    flux, sd1 = archs.load("flux1"), archs.load("sd1")
    with pytest.raises(Refusal, match=r"linear1.bias has the shape \[20\]; .* 1:1:1:4"):
        written(flux, "diffusers", "transformer", {UNET + "single_blocks.0.linear1.bias": (20,)})
    both = {UNET + f"output_blocks.2.{i}.conv.bias": (8,) for i in (1, 2)}
    with pytest.raises(Refusal, match=r"same tensor, up_blocks.0.upsamplers.0.conv.bias"):
        written(sd1, "diffusers", "unet", both)
    with pytest.raises(Refusal, match="did you mean diffusers"):
        written(sd1, "difusers", "unet", {})


WORDS = ["down_blocks", "up_blocks", "mid_block", "resnets", "attentions", "to_q", "conv1", "norm1"]
WORDS += ["transformer_blocks", "single_transformer_blocks", "attn", "proj_mlp", "norm1_context"]
WORDS += ["linear", "weight", "bias", "text_model", "encoder", "layers", "self_attn", "q_proj"]
WORDS += ["norm_out", "text_projection", "decoder", "0", "1", "3", "23", "9999", "٣", ""]
KEYS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=7).map(".".join)
SHAPES = st.lists(st.integers(0, 8), max_size=4).map(tuple)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(dialects.tables("diffusers"))), st.dictionaries(KEYS, SHAPES))
def test_every_key_is_paired_or_named(whose, theirs):
    name, component = whose
    arch = archs.load(name)
    try:
        found = canonical(arch, "diffusers", component, theirs)
    except Refusal:
        return
    used = [view.key for views in found.views.values() for view in views]
    assert set(used) | found.unpaired.keys() == theirs.keys()
    assert not set(used) & found.unpaired.keys()
    assert recognise(theirs) is not None


# --- whose table


@pytest.mark.parametrize(("model", "component"), CASES)
@pytest.mark.parametrize("full_width", [False, True])
def test_recognised(model, component, full_width):
    arch = archs.load(ARCH[model])
    ours = shapes_of(model, component, full_width)
    there = written(arch, "diffusers", component, ours)
    theirs = {key: shape_of(views, ours) for key, views in there.views.items()}
    names = {(part.arch.name, part.component) for part in recognise(theirs)}
    xl = ("sdxl", "ssd-1b", "vega")
    sharing = {
        "vae": {(a, "vae") for a in ("sd1", "sd2", "sdxl-refiner", *xl)},
        "text_encoder": {(a, "text_encoder") for a in ("sd1", "sd3", "flux1", *xl)},
        "text_encoder_2": {(a, "text_encoder_2") for a in ("sdxl-refiner", "sd3", *xl)},
    }
    alone = {(arch.name, component)}
    assert names == (alone if model == "sd2" and component == "text_encoder"
                     else sharing.get(component, alone))  # fmt: skip
    assert recognise(ours) == ()  # canonical names are not the dialect's


def test_not_recognised():
    for other in ({}, {"vision_model.encoder.layers.11.mlp.fc1.bias": (8,)}, {"emb_params": (1,)}):
        assert recognise(other) == ()


def test_tables_are_of_components_that_exist():
    for (name, component), home in dialects.tables("diffusers").items():
        starts = [p for c in archs.load(name).components for p in c.prefixes]
        assert home.prefix.startswith((UNET, *starts)), (name, component)


def test_sdxl_is_mapped_in_a_blink():
    sdxl = archs.load("sdxl")
    ours = {key: shape for key, (_, shape) in header("sdxl").items()}
    components = golden_map("sdxl")
    files = {}
    for component in components:
        views = written(sdxl, "diffusers", component, ours).views
        files[component] = {key: shape_of(of, ours) for key, of in views.items()}

    def once():
        start = time.process_time()
        for component, theirs in files.items():
            canonical(sdxl, "diffusers", component, theirs)
        return time.process_time() - start

    assert min(once() for _ in range(5)) < 0.04  # about 17 ms
