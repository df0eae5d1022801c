"""Every planted fault is found, named with its key and counted; sound files are left alone."""

import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import health
from plymix.errors import Cancelled, Refusal
from plymix.formats.base import TensorInfo
from plymix.health import BITWISE, check, scan

UNET = "model.diffusion_model."
CONV = UNET + "input_blocks.1.0.in_layers.2.weight"
PROJ = UNET + "middle_block.1.proj_out.weight"
IDS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
}


def made(path, arch="sd1", change=None, drop=(), **options):
    """A small checkpoint with `change(header, state)` applied and `drop` left out."""
    header = tiny.header(arch, **options)
    state = {key: value.copy() for key, value in tiny.state(header).items()}
    if change:
        change(header, state)
    header = {key: entry for key, entry in header.items() if not key.startswith(tuple(drop))}
    return tiny.write_safetensors(path / "model.safetensors", header, state)


def one(found, kind):
    """The single finding of a kind."""
    (finding,) = (f for f in found.findings if f.kind == kind)
    return finding


# --- sound files --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sd1", "sd1-inpainting", "sd2", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_a_sound_checkpoint(tmp_path, arch, dtype):
    found = check(made(tmp_path, arch, dtype=dtype))
    assert found.ok
    assert found.exit_code == 0
    assert not [f for f in found.findings if f.severity != "note"]
    assert found.tensors == len(tiny.header(arch, dtype=dtype))


@pytest.mark.parametrize("arch", ["flux-dev", "sd3.5-medium", "pixart-sigma", "wan2.1-t2v-1.3b"])
def test_transformers_of_any_depth_are_complete(tmp_path, arch):
    """SD3.5 medium has fewer blocks than the architecture's table, which holds the deepest's."""
    assert check(made(tmp_path, arch)).ok


def test_biases_and_markers_may_be_zero(tmp_path):
    def change(header, state):
        for key in state:
            if key.endswith("bias"):
                state[key][...] = 0

    found = check(made(tmp_path, change=change, markers=("v_pred", "ztsnr"), ema=True))
    assert found.findings == ()


# --- planted faults -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_nan_is_counted_and_named(tmp_path, dtype):
    nan = {"BF16": 0x7FC0, "F8_E4M3": 0x7F, "F8_E5M2": 0x7E}.get(dtype, np.nan)

    def change(header, state):
        state[CONV].reshape(-1)[[0, 7]] = nan
        state[PROJ].reshape(-1)[-1] = nan

    found = check(made(tmp_path, change=change, dtype=dtype))
    assert not found.ok
    assert found.exit_code == 1
    finding = one(found, "nan")
    assert (finding.severity, finding.elements) == ("error", 3)
    assert set(finding.keys) == {CONV, PROJ}
    assert CONV in finding.text


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E5M2"])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity(tmp_path, dtype, sign):
    bits = {"BF16": (0x7F80, 0xFF80), "F8_E5M2": (0x7C, 0xFC)}
    value = bits[dtype][sign < 0] if dtype in bits else sign * math.inf

    def change(header, state):
        state[PROJ].reshape(-1)[3] = value

    found = check(made(tmp_path, change=change, dtype=dtype))
    finding = one(found, "infinity")
    assert (finding.severity, finding.keys, finding.elements) == ("error", (PROJ,), 1)
    assert not [f for f in found.findings if f.kind == "nan"]


@pytest.mark.parametrize("value", [7e4, -7e4])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_too_large_for_fp16(tmp_path, dtype, value):
    def change(header, state):
        state[CONV].reshape(-1)[5] = tiny.encode(np.float32(value), dtype)

    path = made(tmp_path, change=change, dtype=dtype)
    finding = one(check(path), "overflow")
    assert (finding.severity, finding.keys, finding.elements) == ("warning", (CONV,), 1)
    assert check(path).ok
    asked = check(path, dtype="fp16")
    assert one(asked, "overflow").severity == "error"
    assert asked.exit_code == 1
    assert "bf16" in one(asked, "overflow").text
    assert check(path, dtype="bf16").findings == ()
    assert check(path, dtype="fp32").findings == ()


def test_too_large_for_bf16_only_beyond_its_largest(tmp_path):
    """3.39e38 is finite in bf16, 3.4e38 rounds to infinity."""

    def change(header, state):
        state[CONV].reshape(-1)[:2] = 3.39e38, 3.4e38

    found = check(made(tmp_path, change=change, dtype="F32"), dtype="bf16")
    assert one(found, "overflow").elements == 1


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_weights(tmp_path, zero):
    def change(header, state):
        state[PROJ][...] = zero

    found = check(made(tmp_path, change=change))
    finding = one(found, "zeros")
    assert (finding.severity, finding.keys) == ("warning", (PROJ,))
    assert found.ok


def test_zeros_of_an_adapter_are_a_note(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    header = {
        f"{name}.lora_down.weight": ("F16", (4, 768)),
        f"{name}.lora_up.weight": ("F16", (320, 4)),
    }
    state = tiny.state(header)
    state[f"{name}.lora_up.weight"][...] = 0
    found = check(tiny.write_safetensors(tmp_path / "lora.safetensors", header, state))
    assert (one(found, "zeros").severity, found.ok) == ("note", True)
    assert "LoRA" in found.title


def test_all_faults_at_once(tmp_path):
    def change(header, state):
        state[CONV].reshape(-1)[0] = np.nan
        state[PROJ][...] = 0
        state[UNET + "out.2.weight"].reshape(-1)[0] = 7e4
        state[IDS["sd1"]][0, 9] = 8

    found = check(made(tmp_path, change=change, dtype="F32"), dtype="fp16")
    assert [f.kind for f in found.findings] == ["nan", "overflow", "position_ids", "zeros"]


# --- position ids -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_wrong_position_ids(tmp_path, arch):
    def change(header, state):
        state[IDS[arch]][0, [41, 53]] = 40, 52

    found = check(made(tmp_path, arch, change=change))
    finding = one(found, "position_ids")
    assert (finding.severity, finding.keys, finding.elements) == ("error", (IDS[arch],), 2)
    assert "41, 53" in finding.text
    assert "0..76" in finding.text


@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_position_ids(tmp_path, arch, dtype):
    """With the right values they are a warning; with 76.0 blended to 75.94 an error."""

    def as_float(header, state):
        key = IDS[arch]
        header[key] = (dtype, header[key][1])
        state[key] = tiny.encode(np.arange(77, dtype=np.float32).reshape(1, 77), dtype)

    def blended(header, state):
        as_float(header, state)
        state[IDS[arch]][0, 76] = tiny.encode(np.float32(75.5), dtype)

    finding = one(check(made(tmp_path, arch, change=as_float)), "position_ids")
    assert finding.severity == "warning"
    assert dtype in finding.text
    found = check(made(tmp_path, arch, change=blended))
    assert (one(found, "position_ids").severity, one(found, "position_ids").elements) == (
        "error",
        1,
    )


def test_nan_position_ids_are_wrong_and_not_reported_twice(tmp_path):
    def change(header, state):
        header[IDS["sd1"]] = ("F32", (1, 77))
        state[IDS["sd1"]] = np.full((1, 77), np.nan, np.float32)

    found = check(made(tmp_path, change=change))
    assert [f.kind for f in found.findings] == ["position_ids"]
    assert found.findings[0].elements == 77


# --- damaged and incomplete files ---------------------------------------------------------------


def test_a_tensor_under_two_names(tmp_path):
    header = tiny.header("sd1")
    key = tiny.UNET + "out.0.bias"
    header["out.0.bias"] = header[key]
    path = tiny.write_safetensors(tmp_path / "a.safetensors", header, tiny.state(header))
    found = check(path)
    finding = one(found, "twice")
    assert (finding.severity, set(finding.keys)) == ("error", {key, "out.0.bias"})
    assert not found.ok
    with pytest.raises(Refusal, match="twice"):
        plymix.convert(path, tmp_path / "b.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated(tmp_path, keep):
    path = made(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    found = check(path)
    assert found.exit_code == 1
    assert [f.kind for f in found.findings] == ["damaged"]
    assert path.name in found.findings[0].text


def test_a_file_without_tensors(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(tiny.to_bytes({}, {}))
    found = check(tmp_path / "m.safetensors")
    assert [(f.severity, f.kind) for f in found.findings] == [("error", "empty")]
    assert found.exit_code == 1


def test_no_such_file(tmp_path):
    with pytest.raises(Refusal, match="does not exist"):
        check(tmp_path / "none.safetensors")


def test_unknown_dtype(tmp_path):
    with pytest.raises(Refusal, match="fp16"):
        check(made(tmp_path), dtype="fp61")


@pytest.mark.parametrize("block", ["input_blocks.3.", "input_blocks.11.", "output_blocks.4."])
def test_missing_unet_block(tmp_path, block):
    found = check(made(tmp_path, drop=[UNET + block]))
    finding = one(found, "incomplete")
    name = ("IN" if block.startswith("in") else "OUT") + f"{int(block.split('.')[1]):02}"
    assert finding.severity == "error"
    assert f"without the blocks {name}:" in finding.text


def test_missing_transformer_block(tmp_path):
    found = check(made(tmp_path, "flux-dev", drop=["double_blocks.7.", UNET + "double_blocks.7."]))
    assert "D07" in one(found, "incomplete").text


def test_missing_vae_is_a_note(tmp_path):
    found = check(made(tmp_path, drop=["first_stage_model."]))
    assert (one(found, "incomplete").severity, found.ok) == ("note", True)
    assert "VAE" in one(found, "incomplete").text


def test_infinite_schedule_is_a_note_and_masks_are_meant_to_be(tmp_path):
    def change(header, state):
        state["sqrt_recip_alphas_cumprod"] = np.full(1000, np.inf, np.float32)
        header["cond_stage_model.model.attn_mask"] = ("F32", (2, 2))
        state["cond_stage_model.model.attn_mask"] = np.float32([[0, -np.inf], [0, 0]])

    found = check(made(tmp_path, change=change))
    assert [(f.severity, f.keys) for f in found.findings] == [
        ("note", ("sqrt_recip_alphas_cumprod",))
    ]


def test_quantised_and_rare_dtypes_are_named(tmp_path):
    table = {
        "layer.weight": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]},
        "layer.weight_scale": {"dtype": "F32", "shape": [1, 4], "data_offsets": [16, 32]},
        "mx": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [32, 36]},
    }
    text = json.dumps(table).encode()
    path = tmp_path / "q.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x3c" * 36)
    found = [f for f in check(path).findings if f.kind == "unchecked"]
    assert {key for f in found for key in f.keys} == {"layer.weight_scale", "mx"}
    assert {f.severity for f in found} == {"note"}


# --- the whole file, in bounded memory ----------------------------------------------------------


def test_progress_and_stop(tmp_path):
    seen = []
    path = made(tmp_path)
    check(path, progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0
    with pytest.raises(Cancelled):
        check(path, progress=lambda now: False)


def test_json(tmp_path):
    found = json.loads(json.dumps(check(made(tmp_path, drop=["first_stage_model."])).to_dict()))
    assert found["ok"] is True
    assert found["findings"][0]["kind"] == "incomplete"


def test_a_fault_in_any_chunk_of_a_large_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "CHUNK", 4096)
    values = np.ones(5000, np.float32)
    values[[0, 1023, 1024, 4999]] = np.nan
    header = {"w": ("F32", (5000,))}
    found = check(tiny.write_safetensors(tmp_path / "w.safetensors", header, {"w": values}))
    assert one(found, "nan").elements == 4


def test_strided_tensors_are_scanned_whole_and_only_their_own(tmp_path, monkeypatch):
    """A transposed tensor, a column and an expanded scalar of one stored array."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(health, "CHUNK", 256)
    stored = torch.ones(40, 30)
    stored[5, 0] = math.nan
    stored[6, 1] = math.inf
    path = tmp_path / "views.ckpt"
    torch.save(
        {
            "transposed": stored.T,
            "column0": stored[:, 0],
            "column1": stored[:, 1],
            "column2": stored[:, 2],
            "rows": stored[:, 1:29:3],
            "many": torch.ones(1).expand(50, 60),
        },
        path,
    )
    found = check(path)
    assert set(one(found, "nan").keys) == {"transposed", "column0"}
    assert set(one(found, "infinity").keys) == {"transposed", "column1", "rows"}


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strides=st.lists(st.integers(0, 40), min_size=4, max_size=4),
)
def test_halves_hold_every_element_once(shape, strides):
    info = TensorInfo("x", "F32", tuple(shape), 100, 0, tuple(strides[: len(shape)]))
    old, health.CHUNK = health.CHUNK, 64
    try:
        parts = list(health._halves(info))
    finally:
        health.CHUNK = old

    def places(part):
        steps = zip(part.shape, part.strides, strict=True)
        grid = np.ix_(*(np.arange(d) * s * 4 for d, s in steps))
        return (part.offset + sum(grid) + np.zeros(part.shape, int)).ravel().tolist()

    assert sorted(x for part in parts for x in places(part)) == sorted(places(info))
    assert all(part.nbytes <= 64 for part in parts)


# --- one buffer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("dtype", BITWISE)
def test_scan_against_values(dtype, target):
    """Random bits of every dtype against what ml_dtypes and numpy say of their values."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    }  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(f"{dtype} {target}".encode()))
    raw = rng.integers(0, 256, 40_000).astype(np.uint8)
    x = raw.view(kinds[dtype])
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        narrow = wide.astype(kinds[target]).astype(np.float64)
    found = scan(raw, dtype, target)
    assert found.nan == np.isnan(wide).sum()
    assert found.infinite == np.isinf(wide).sum()
    assert found.large == (np.isinf(narrow) & np.isfinite(wide)).sum()
    assert found.zeros == (wide == 0).all()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32), max_size=20))
def test_scan_of_float32_lists(values):
    x = np.array(values, np.float32)
    found = scan(x, "F32")
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    assert found.nan == np.isnan(x).sum()
    assert found.infinite == np.isinf(x).sum()
    assert found.large == (np.isinf(halves) & np.isfinite(x)).sum()
    assert found.zeros == (x == 0).all()


def test_boundaries_of_fp16():
    """65519 rounds to 65504; 65520, half a step above, rounds to infinity."""
    x = np.float32([65504, np.nextafter(np.float32(65520), np.float32(0)), 65520, -65520])
    assert scan(x, "F32").large == 2
