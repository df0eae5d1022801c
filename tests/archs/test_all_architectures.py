"""What must hold of every architecture there is, by the golden header of each of its models.

Blocks are expected as the golden headers have them, which were assigned without plymix.
"""

import json
import math
import time
from functools import cache

import numpy as np
import pytest
from test_archs import MODELS, expected, shapes_of, spelled

import plymix
from plymix import api, archs, plan
from plymix.errors import Refusal
from plymix.expr import leaf_terms
from plymix.formats import open_model
from small import data
from tiny import UNET, golden, header, narrow, read_safetensors, state, write_safetensors

FIRST = {}  # architecture -> one of its models
for each in MODELS:
    FIRST.setdefault(expected(each)[0], each)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small files: models(name, "a" or "b")."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def give(model, which="a"):
        made = header(model)
        zeros = {key: np.zeros(shape) for key, (_, shape) in made.items()}
        return write_safetensors(folder / f"{model}-{which}.safetensors", made, zeros)

    return give


def block_of(model, key):
    """The golden block; the fixed tables of sines are buffers."""
    block = golden(model)[key][3]
    return "BUFFER" if key.endswith("pos_embed") else block


def shares(made):
    """{key: share of B} of everything but buffers."""
    return {
        t.name: sum(c for c, leaf in leaf_terms(t.expr) if leaf.source == 1)
        for t in made.tensors
        if not made.places[t.name].buffer
    }


def planned(files, **options):
    return plan.build(api.two_models(*files, **options))


def test_every_architecture_has_a_golden_header():
    assert set(FIRST) == set(archs.names())


@pytest.mark.parametrize("model", MODELS)
def test_each_block_has_the_weight_of_its_name(model, models):
    """All blocks at once, each with a share of its own: what one weight reaches is one block."""
    arch = archs.load(expected(model)[0])
    there = {block_of(model, key) for key in golden(model)}
    blocks = [block for block in arch.blocks if block in there]
    share = {block: (i + 1) / 128 for i, block in enumerate(blocks)}
    outside = dict.fromkeys(there & {"BASE", "CLIP", "T5", "VAE"}, 0.875)
    alpha = [0.875, *share.values()]
    with planned((models(model), models(model, "b")), alpha=alpha, vae="blend") as made:
        assert made.view.blocks == tuple(blocks)
        for key, found in shares(made).items():
            assert found == (share | outside)[block_of(model, key)], key


@pytest.mark.parametrize("name", archs.names())
def test_one_hot_weights_change_their_block_alone(name, models):
    model = FIRST[name]
    files = models(model), models(model, "b")
    blocks = {block_of(model, key) for key in golden(model)} & set(archs.load(name).blocks)
    ordered = [block for block in archs.load(name).blocks if block in blocks]
    some = {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
    with planned(files, alpha={"default": 0.0, "blocks": {}}) as without:
        for block in some:
            with planned(files, alpha={"blocks": {block: 1.0}}) as made:
                mine = {key for key in golden(model) if block_of(model, key) == block}
                assert set(without.changes(made)) == mine


@pytest.mark.parametrize(("model", "block"), [("vega", "IN04"), ("ltx-video-2b", "T05")])
def test_one_hot_weights_in_bytes(model, block, tmp_path):
    made = header(model)
    files = [
        write_safetensors(tmp_path / f"{x}.safetensors", made, state(made, i))
        for i, x in enumerate("ab")
    ]
    plymix.merge(*files, tmp_path / "o.safetensors", alpha={"blocks": {block: 1.0}})
    a, b, got = (data(tmp_path / f"{x}.safetensors") for x in "abo")
    for key in made:
        assert got[key] == (b if block_of(model, key) == block else a)[key], key


# --- models of one architecture that are not all alike -------------------------------------------


def variant_of(model, *, without=(), first=None):
    """The denoiser of a golden model without some keys, its first layer with other columns."""
    shapes = {k: s for k, (_, s) in header(model, full_width=True).items() if k.startswith(UNET)}
    out = {k: s for k, s in shapes.items() if not any(f".{w}." in k for w in without)}
    if first:
        key, columns = first
        out[UNET + key] = (out[UNET + key][0], columns, *out[UNET + key][2:])
    return out


FLEX = [f"double_blocks.{i}" for i in range(8, 19)]
PATCH = "patch_embedding.weight"
VARIANTS = [
    ("flux1", "schnell", variant_of("flux-dev", without=["guidance_in"])),
    ("flux1", "fill", variant_of("flux-dev", first=("img_in.weight", 384))),
    ("flux1", "control", variant_of("flux-dev", first=("img_in.weight", 128))),
    ("flux1", "base", variant_of("flux-dev", without=FLEX)),
    ("hunyuan-video", "i2v", variant_of("hunyuan-video", first=("img_in.proj.weight", 33))),
    ("hunyuan-video", "base", variant_of("hunyuan-video")),
]


@pytest.mark.parametrize(("name", "variant", "shapes"), VARIANTS)
@pytest.mark.parametrize("prefix", [UNET, "", "net."])
@pytest.mark.parametrize("tiny", [False, True])
def test_variants_are_told(name, variant, shapes, prefix, tiny):
    if tiny:
        keep = "img_in"
        shapes = {k: s if keep in k else tuple(map(narrow, s)) for k, s in shapes.items()}
    found = archs.detect(spelled(shapes, prefix))
    assert (found.arch, found.variant) == (archs.load(name), variant)


def test_wan_2_2_image_to_video_has_no_image_embedding():
    shapes = {k: s for k, (_, s) in header("wan2.1-t2v-14b", full_width=True).items()}
    shapes[PATCH] = (5120, 36, 1, 2, 2)
    assert archs.detect(shapes).variant == "i2v"
    assert archs.detect(shapes).title == "Wan image-to-video transformer"


def test_a_bare_unet_is_what_it_is():
    for model in ("sd1", "sd2", "sdxl", "sdxl-refiner", "ssd-1b", "vega"):
        for full_width in (True, False):
            shapes = shapes_of(header(model, full_width=full_width, bare=True))
            found = archs.detect(shapes)
            assert (found.arch, found.kind) == (archs.load(model), "denoiser")


@pytest.mark.parametrize(
    ("model", "key", "plain", "wide"),
    [
        ("flux-dev", "img_in.weight", 64, 384),
        ("flux-dev", "img_in.weight", 64, 128),
        ("wan2.1-t2v-1.3b", PATCH, 16, 36),
        ("hunyuan-video", "img_in.proj.weight", 16, 33),
    ],
)
def test_input_channels_of_variants(model, key, plain, wide, tmp_path):
    """A plain model and one with more input channels: shared ones merged, the others kept."""
    made = {k: s for k, s in header(model).items() if "blocks." not in k or "blocks.0." in k}
    made = {k: s for k, s in made.items() if not k.startswith(("text_encoders.", "vae."))}
    key = key if key in made else UNET + key
    files = {}
    for name, seed, columns in (("plain", 0, plain), ("wide", 1, wide)):
        rows = made | {key: ("F32", (8, columns, *made[key][1][2:]))}
        values = state(rows, seed)
        files[name] = write_safetensors(tmp_path / f"{name}.safetensors", rows, values), values[key]
    for a, b in (("plain", "wide"), ("wide", "plain")):
        plymix.merge(files[a][0], files[b][0], tmp_path / "o.safetensors", alpha=0.25, force=True)
        got = read_safetensors(tmp_path / "o.safetensors")[1][key]
        one, two = files[a][1], files[b][1]
        expected_ = 0.75 * one[:, :plain].astype(float) + 0.25 * two[:, :plain].astype(float)
        assert abs(got[:, :plain] - expected_).max() < 1e-8
        assert (got[:, plain:] == files["wide"][1][:, plain:]).all()


# --- wrong mixes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """A model of each architecture in its true size, without data: holes on the disk."""
    folder = tmp_path_factory.mktemp("headers")
    files = {}
    for name, model in FIRST.items():
        made = header(model, full_width=True, dtype="F16")
        files[name] = folder / f"{name}.safetensors"
        text, size = head(made)
        with files[name].open("wb") as f:
            f.write(text)
            f.truncate(len(text) + size)
    opened = {path: open_model(path) for path in files.values()}
    yield files, opened
    for source in opened.values():
        source.close()


def head(made):
    """The first bytes of a safetensors file, and how many of data follow."""
    table, at = {}, 0
    widths = {"F16": 2, "F32": 4, "I64": 8}
    for key, (dtype, shape) in made.items():
        end = at + math.prod(shape) * widths[dtype]
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


@pytest.mark.parametrize("name", archs.names())
def test_mixes_of_two_architectures_are_refused_naming_both(name, headers):
    files, opened = headers
    others = [other for other in archs.names() if other > name]
    for other in others:
        recipe = api.two_models(files[name], files[other])
        began = time.monotonic()
        with pytest.raises(Refusal) as refusal:
            plan.build(recipe, open_file=opened.__getitem__, keep_open=True)
        assert time.monotonic() - began < 1
        text = str(refusal.value)
        for arch in (name, other):
            assert archs.load(arch).short in text
            assert f"{arch}.safetensors" in text
