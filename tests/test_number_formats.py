"""Number formats of results: per component, fp8 with and without chance, Q8_0.

The references are ml_dtypes' float8 types, the packed blocks as the gguf package reads them, and
the definition of stochastic rounding.
"""

from itertools import pairwise

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import archs, recipe
from plymix import plan as planning
from plymix.engine import rounding, work, worker
from plymix.errors import Refusal
from plymix.recipe import from_dict, from_json, from_toml, to_json, to_toml
from small import coded, data, draw, load, real, save

FP8 = {
    "fp8_e4m3fn": ("F8_E4M3", ml_dtypes.float8_e4m3fn, 448.0),
    "fp8_e5m2": ("F8_E5M2", ml_dtypes.float8_e5m2, 57344.0),
}


def converted(tmp_path, tensors, out="out.safetensors", **options):
    """What `plymix.convert` makes of {key: (dtype, array)}."""
    save(tmp_path / "in.safetensors", tensors)
    plymix.convert(tmp_path / "in.safetensors", tmp_path / out, force=True, **options)
    return load(tmp_path / out)[0]


# --- settings


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("fp16", "fp16"),
        ("fp16,vae=fp32", {"default": "fp16", "vae": "fp32"}),
        (" unet = fp16 , vae=keep", {"unet": "fp16", "vae": "keep"}),
        ({"default": "bf16"}, "bf16"),
        ({"vae": "fp32"}, {"vae": "fp32"}),
    ],
)
def test_dtypes_in_their_shortest_form(text, want):
    found = from_dict({"models": {"a": "a.ckpt"}, "output": {"dtype": text}})
    assert found.output.dtype == want
    assert from_toml(to_toml(found)) == found == from_json(to_json(found))


@pytest.mark.parametrize(
    ("size", "want"),
    [
        (0, 0), (1234, 1234), ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("2GiB", 2 << 30),
        ("4.5 GB", 4_500_000_000), ("700MB", 7 * 10**8), ("1KiB", 1024), ("12", 12),
    ],
)  # fmt: skip
def test_sizes_of_shards(size, want):
    assert recipe.nbytes(size) == want


SAID = [
    ({"dtype": "fp9"}, "unknown output.dtype 'fp9'"),
    ({"dtype": "fp16,fp32"}, "says default twice"),
    ({"dtype": {"vae": "half"}}, "unknown output.dtype 'half'"),
    ({"rounding": "up"}, "unknown output.rounding 'up'"),
    ({"rounding": "stochastic"}, "is for fp8"),
    ({"layout": "hf"}, "unknown output.layout 'hf'"),
    ({"shard": "5 apples"}, "no size of a shard"),
]


@pytest.mark.parametrize(("output", "said"), SAID)
def test_settings_that_are_none(output, said):
    with pytest.raises(Refusal, match=said):
        from_dict({"models": {"a": "a.ckpt"}, "output": output})


# --- per component


def test_each_component_has_its_own(tmp_path):
    file = tiny.write(tmp_path / "a.safetensors", "sd1", dtype="F16", ema=True)
    plymix.convert(file, tmp_path / "o.safetensors", dtype="bf16,vae=fp32,text_encoder=keep")
    was, now = load(file)[0], load(tmp_path / "o.safetensors")[0]
    wanted = {"unet": "BF16", "ema": "BF16", "vae": "F32", "text_encoder": "F16"}
    arch = archs.load("sd1")
    for key, (dtype, values) in now.items():
        place = arch.place(key)
        want = was[key][0] if place.buffer or dtype[0] == "I" else wanted[place.component]
        if not key.endswith(("decay", "num_updates")):
            assert dtype == want, key
        if dtype == "F32" and not place.buffer:
            assert (values == was[key][1].astype("f4")).all()
    with pytest.raises(Refusal, match=r"unknown component of SD1 in output\.dtype 'vea'.*vae\?"):
        plymix.convert(file, tmp_path / "x.safetensors", dtype={"vea": "fp32"})
    save(tmp_path / "any.safetensors", {"w": draw("F16", (4, 4))})
    with pytest.raises(Refusal, match=r"not know the components of any\.safetensors"):
        plymix.convert(tmp_path / "any.safetensors", tmp_path / "x.safetensors", dtype="vae=fp32")


# --- fp8


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_fp8_rounds_to_nearest_and_saturates(tmp_path, name, source):
    dtype, reference, largest = FP8[name]
    rng = np.random.default_rng(1)
    values = rng.standard_normal((64, 64)) * np.exp2(rng.integers(-20, 12, (64, 64)))
    values[0, :4] = largest, -largest, largest * 1.1, -largest * 1.1
    tensor = coded(values, source)
    made = converted(tmp_path, {"w": tensor, "bias": coded(values[0], source)}, dtype=name)
    assert made["bias"][0] == source  # vectors stay as they are
    got_dtype, got = made["w"]
    assert got_dtype == dtype
    exact = np.clip(real(tensor).astype(np.float32), -largest, largest)
    assert got.tobytes() == exact.astype(reference).tobytes()


@pytest.mark.parametrize("name", FP8)
def test_what_is_no_number_in_fp8(tmp_path, name):
    _, reference, largest = FP8[name]
    values = np.array([[np.inf, -np.inf, np.nan, 0.0, -0.0, 1e30]], np.float32)
    got = converted(tmp_path, {"w": ("F32", values)}, dtype=name)["w"][1].view(reference)
    infinity = np.inf if name == "fp8_e5m2" else largest
    want = [infinity, -infinity, np.nan, 0.0, -0.0, largest]
    np.testing.assert_array_equal(got.astype(np.float32)[0], want)
    assert np.signbit(got.astype(np.float32)[0, 4])


def test_a_merge_into_fp8_is_rounded_once_from_the_sum(tmp_path):
    a, b = (draw("F16", (40, 70), seed) for seed in (1, 2))
    for name, tensor in (("a", a), ("b", b)):
        save(tmp_path / f"{name}.safetensors", {"w": tensor})
    plymix.merge(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "o.safetensors",
        alpha=0.3, arch="any", dtype="fp8_e4m3fn",
    )  # fmt: skip
    want = (0.7 * real(a) + 0.3 * real(b)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert load(tmp_path / "o.safetensors")[0]["w"][1].tobytes() == want.tobytes()


def test_a_vae_in_fp8_is_told(tmp_path):
    file = tiny.write(tmp_path / "a.safetensors", "sd1")
    noted = plymix.convert(file, tmp_path / "o.safetensors", dtype="fp8_e4m3fn").notes
    assert any("VAE becomes fp8" in note for note in noted)
    options = {"dtype": "fp8_e4m3fn,vae=keep", "force": True}
    noted = plymix.convert(file, tmp_path / "o.safetensors", **options).notes
    assert not any("VAE" in note for note in noted)


# --- by chance


def neighbours(values, reference, largest):
    """The numbers of the format at or below, and at or above each value (within its range)."""
    codes = np.arange(256, dtype=np.uint8).view(reference).astype(np.float64)
    grid = np.unique(codes[np.isfinite(codes)])
    values = np.clip(values.astype(np.float64), -largest, largest)
    above = np.searchsorted(grid, values)
    below = np.maximum(np.where(grid[above] == values, above, above - 1), 0)
    return grid[below], grid[above]


@pytest.mark.parametrize("name", FP8)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_chance_takes_a_neighbour(name, values, seed):
    dtype, reference, largest = FP8[name]
    x = np.array(values, np.float32)
    got = np.clip(rounding.by_chance(x, dtype, (seed, "k"), 0), -largest, largest)
    low, high = neighbours(x, reference, largest)
    assert ((got == low) | (got == high)).all()


@pytest.mark.parametrize("name", FP8)
def test_chance_has_no_bias(name):
    """The mean of many draws is the value, within five standard errors; subnormals too."""
    dtype, reference, largest = FP8[name]
    for value in (0.3, -1.7, 3e-3, -5e-5, 1.0, 200.3):
        x = np.full(100_000, value, np.float32)
        got = rounding.by_chance(x, dtype, (3, "k"), 0).astype(np.float64)
        low, high = neighbours(x[:1], reference, largest)
        step = high[0] - low[0]
        assert abs(got.mean() - np.float64(x[0])) <= 5 * step / 2 / np.sqrt(x.size), value


@given(cuts=st.lists(st.integers(0, 999), max_size=6), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_draws_are_the_elements_own(cuts, seed):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    whole = rounding.by_chance(x, "F8_E4M3", (seed, "name"), 0)
    edges = sorted({0, 1000, *cuts})
    parts = [rounding.by_chance(x[a:b], "F8_E4M3", (seed, "name"), a) for a, b in pairwise(edges)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert rounding.by_chance(x, "F8_E4M3", (seed + 1, "name"), 0).tobytes() != whole.tobytes()
    assert rounding.by_chance(x, "F8_E4M3", (seed, "other"), 0).tobytes() != whole.tobytes()


def test_the_draws_are_philox_by_sha256():
    """As it is written down: key from SHA-256 of "seed, zero byte, name", 32 bits per element."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"7\0unet.w").digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(50).view("<u4")[:100]
    x = np.linspace(0.25, 0.4999, 100, dtype=np.float32)  # between 2^-2 and 2^-1: steps of 2^-5
    low = np.floor(x * 32) / 32
    want = np.where(raw * 2.0**-32 < (x - low) * 32, low + 1 / 32, low)
    np.testing.assert_array_equal(rounding.by_chance(x, "F8_E4M3", (7, "unet.w"), 0), want)


RANDOM = {"dtype": "fp8_e4m3fn", "rounding": "stochastic", "seed": 5}


def test_the_same_bytes_for_any_threads_and_pieces(tmp_path, monkeypatch):
    tensors = {f"w{i}": draw("F16", (300, 700 + i), seed=i) for i in range(3)}
    tensors["t"] = draw("F16", (1, 3), seed=9)
    want = converted(tmp_path, tensors, **RANDOM)
    for threads, span, chunk, written in ((1, 1 << 12, 999, 2048), (3, 5000, 64, 64)):
        monkeypatch.setattr(work, "SPAN", span)
        monkeypatch.setattr(worker, "CHUNK", chunk)
        monkeypatch.setattr(worker, "WRITTEN", written)
        got = converted(tmp_path, tensors, **RANDOM, threads=threads)
        assert {k: x.tobytes() for k, (_, x) in got.items()} == {
            k: x.tobytes() for k, (_, x) in want.items()
        }
    other = converted(tmp_path, tensors, **RANDOM | {"seed": 6})
    assert other["w0"][1].tobytes() != want["w0"][1].tobytes()
    nearest = converted(tmp_path, tensors, dtype="fp8_e4m3fn")
    assert nearest["w0"][1].tobytes() != want["w0"][1].tobytes()


def test_the_same_bytes_from_a_tensor_in_pieces(tmp_path):
    """A fused tensor that lies in three places of a folder is drawn as the one in a file is."""
    file = tiny.write(tmp_path / "a.safetensors", "sd2", dtype="F32")
    plymix.convert(file, tmp_path / "folder")
    plymix.convert(file, tmp_path / "one.safetensors", **RANDOM)
    plymix.convert(tmp_path / "folder", tmp_path / "two.safetensors", **RANDOM)
    one, two = data(tmp_path / "one.safetensors"), data(tmp_path / "two.safetensors")
    fused = [key for key in two if key.endswith("in_proj_weight")]
    assert len(fused) == 23
    assert all(one[key] == two[key] for key in two)


def test_what_is_fp8_already_is_copied(tmp_path):
    tensors = {"w": ("F8_E4M3", np.arange(96, dtype=np.uint8).reshape(8, 12))}
    got = converted(tmp_path, tensors, **RANDOM)
    assert got["w"][1].tobytes() == tensors["w"][1].tobytes()


# --- q8_0


def test_q8_0(tmp_path):
    tensors = {
        "w": draw("F16", (6, 64), 1),
        "conv": draw("F32", (4, 8, 3, 3), 2),  # in 9 blocks, though no row is whole ones
        "odd": draw("F16", (3, 5), 3),
        "bias": draw("F16", (64,), 4),
        "ids": ("I64", np.arange(4, dtype="i8")),
    }
    save(tmp_path / "in.safetensors", tensors)
    plymix.convert(tmp_path / "in.safetensors", tmp_path / "o.gguf", dtype="q8_0")
    kind = gguf.GGMLQuantizationType
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    kinds = {"w": kind.Q8_0, "conv": kind.Q8_0, "odd": kind.F32, "bias": kind.F32}
    assert {key: found[key].tensor_type for key in kinds} == kinds
    for key in ("w", "conv"):
        blocks = real(tensors[key]).astype(np.float32).reshape(-1, 32)
        want = gguf.quants.quantize(blocks, kind.Q8_0)
        assert found[key].data.tobytes() == want.tobytes()
    for key in ("odd", "bias"):
        got = np.asarray(found[key].data, np.float32).reshape(-1)
        assert (got == real(tensors[key]).astype(np.float32).reshape(-1)).all()
    assert not plymix.convert(tmp_path / "o.gguf", tmp_path / "again.gguf", dtype="q8_0").notes
    for make in (plymix.convert, plymix.prune):
        larger = make(tmp_path / "o.gguf", tmp_path / f"{make.__name__}.gguf")
        assert [n for n in larger.notes if "takes more room" in n] == [
            "2 tensors packed as Q8_0 will be fp16, which takes more room; --dtype q8_0, in a"
            " .gguf, keeps their size"
        ]
    again = {t.name: t for t in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert all(again[key].data.tobytes() == found[key].data.tobytes() for key in kinds)


@pytest.mark.parametrize(("model", "name"), [("sd1", "sd1"), ("sdxl", "sdxl"), ("chroma", "flux")])
def test_a_gguf_says_what_it_is(tmp_path, model, name):
    """The key that ComfyUI-GGUF refuses files without, and the names it knows."""
    plymix.convert(tiny.write(tmp_path / "a.safetensors", model), tmp_path / "o.gguf")
    for _ in range(2):
        field = gguf.GGUFReader(tmp_path / "o.gguf").get_field("general.architecture")
        assert field.contents() == name
        plymix.convert(tmp_path / "o.gguf", tmp_path / "again.gguf", force=True)
        (tmp_path / "again.gguf").replace(tmp_path / "o.gguf")


def test_q8_0_of_one_component(tmp_path):
    file = tiny.write(tmp_path / "a.safetensors", "sd1")
    plymix.convert(file, tmp_path / "o.gguf", dtype="unet=q8_0")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    packed = {key for key, kind in found.items() if kind == "Q8_0"}
    assert len(packed) > 200
    assert all(key.startswith(tiny.UNET) for key in packed)


@pytest.mark.parametrize("name", ["o.safetensors", "o.ckpt", "folder"])
def test_q8_0_is_for_gguf(tmp_path, name):
    file = tiny.write(tmp_path / "a.safetensors", "sd1")
    with pytest.raises(Refusal, match=rf"q8_0 is a dtype of GGUF files; {name} is none"):
        plymix.convert(file, tmp_path / name, dtype="q8_0")
    with pytest.raises(Refusal, match=r"F8_E4M3, which GGUF cannot hold"):
        plymix.convert(file, tmp_path / "o.gguf", dtype="unet=fp8_e4m3fn")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- what the formats' own libraries say


def test_other_libraries_load_them(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    file = tiny.write(tmp_path / "a.safetensors", "sd1", dtype="F32")
    plymix.convert(file, tmp_path / "o.safetensors", dtype="fp16,unet=fp8_e4m3fn")
    plymix.convert(file, tmp_path / "o.ckpt", dtype="fp16,unet=fp8_e5m2")
    plymix.convert(file, tmp_path / "s.safetensors", shard="1MB")
    key = tiny.UNET + "input_blocks.1.1.proj_in.weight"
    value = torch.from_numpy(load(file)[0][key][1].copy())
    assert torch.equal(
        load_file(tmp_path / "o.safetensors")[key].float(), value.to(torch.float8_e4m3fn).float()
    )
    loaded = torch.load(tmp_path / "o.ckpt", weights_only=True)
    state = loaded.get("state_dict", loaded)
    assert torch.equal(state[key].float(), value.to(torch.float8_e5m2).float())
    parts = [load_file(p) for p in sorted(tmp_path.glob("s-*.safetensors"))]
    assert len(parts) == 3
    assert torch.equal(next(p[key] for p in parts if key in p), value)


def test_a_session_makes_them_too(tmp_path):
    """The preview of a tensor is what the file gets."""
    file = tiny.write(tmp_path / "a.safetensors", "sd1")
    said = {"models": {"a": str(file)}, "output": RANDOM | {"layout": "diffusers"}}
    with plymix.Session(from_dict(said)) as session:
        session.write(tmp_path / "folder")
        name = "unet/conv_in.weight"
        preview = session.tensor(name)
    held = load(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")[0]
    got = held["conv_in.weight"][1].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(got, preview)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("o.safetensors", RANDOM, RANDOM | {"seed": 8}),
        ("o.safetensors", RANDOM, RANDOM | {"rounding": "nearest", "seed": 0}),
        ("o.gguf", {"dtype": "q8_0"}, {"dtype": "fp32"}),
        ("o.gguf", {"dtype": "fp32"}, {"dtype": "q8_0"}),
    ],
)
def test_a_session_rounds_and_packs_anew(tmp_path, name, before, after):
    """Another seed, rounding or packing is another tensor, also where nothing else changes."""
    models = {"a": str(tiny.write(tmp_path / "a.safetensors", "sd1", dtype="F32"))}
    (tmp_path / "whole").mkdir()
    with plymix.Session(from_dict({"models": models, "output": before})) as session:
        session.write(tmp_path / name)
        assert session.change(from_dict({"models": models, "output": after}))
        session.write(tmp_path / name, force=True)
        plymix.merge(session.recipe, tmp_path / "whole" / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_plan_says_of_its_size(tmp_path):
    file = tiny.write(tmp_path / "a.safetensors", "sd1")
    for dtype, out in (("q8_0", "o.gguf"), ("fp8_e4m3fn", "o.safetensors")):
        with planning.build(
            from_dict({"models": {"a": str(file)}, "output": {"dtype": dtype}})
        ) as plan:
            said = plan.nbytes
        result = plymix.convert(file, tmp_path / out, dtype=dtype)
        assert said < result.nbytes < said + 400_000  # the header
