"""Scaled fp8 and 4-bit weights: values against the formula, merges, what stays refused."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import plan
from plymix.errors import Refusal
from plymix.formats import open_model, virtual
from plymix.recipe import from_dict
from small import deviation, draw, load, recipe, save
from tiny import decode, header, state, write

GOLDEN = Path(__file__).parent.parent / "golden" / "bitsandbytes.json"
UNET = "model.diffusion_model."
F = np.float32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def codes(shape, seed=0, dtype="F8_E4M3"):
    """fp8 codes without NaN and infinity, for `save`."""
    found = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    odd = np.isin(found & 0x7F, range(0x7C, 0x80))
    return dtype, np.where(odd, 0x30, found).astype(np.uint8)


def numbers(values, dtype="F32"):
    kinds = {"F32": F, "F16": np.float16, "U8": np.uint8}
    return dtype, np.asarray(values, kinds[dtype])


def text(said):
    return "U8", np.frombuffer(json.dumps(said).encode(), np.uint8)


def values(path):
    """{key: (encoding, array)} of what a file holds, as plymix reads it."""
    with open_model(path) as source:
        return {
            key: (info.encoding, decode(np.frombuffer(source.read(info), KINDS[info.dtype]),
                                        info.dtype).reshape(info.shape))
            for key, info in source.tensors.items()
        }  # fmt: skip


def planned(path):
    return plan.build(recipe({"a": path, "b": path}))


KINDS = {"F32": F, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8, "U8": np.uint8}


# --- scaled fp8 ---------------------------------------------------------------------------------

SCALES = {
    "one": ((), 1),
    "one in a list": ((1,), 1),
    "one in a matrix": ((1, 1), 1),
    "per row": ((6,), 6),
    "per row, as a column": ((6, 1), 6),
    "three runs per row": ((6, 3), 18),
    "three runs per row, as a column": ((6, 3, 1), 18),
}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("name", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("case", SCALES)
def test_a_number_is_its_code_times_its_scale(tmp_path, dtype, name, case):
    shape, count = SCALES[case]
    scale = np.random.default_rng(1).uniform(0.001, 0.3, count).astype(F)
    weight = codes((6, 12), dtype=dtype)
    path = save(
        tmp_path / "s.safetensors",
        {
            "x.weight": weight,
            "x" + name: numbers(scale.reshape(shape)),
            "x.scale_input": numbers([1.0]),
            "x.bias": draw("F16", (6,)),
            "scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8)),
        },
    )
    found = values(path)
    plain = decode(weight[1], dtype)
    want = [
        [F(plain[r][c]) * scale[(r * 12 + c) * count // 72] for c in range(12)] for r in range(6)
    ]
    assert found.keys() == {"x.weight", "x.bias"}
    assert found["x.weight"][0] == f"scaled {dtype}"
    np.testing.assert_array_equal(found["x.weight"][1], np.array(want, F))


def test_scales_of_16_bits_and_convolutions(tmp_path):
    weight = codes((4, 2, 3, 3))
    scale = np.float16([0.5, 0.25, 0.1, 3])
    path = save(tmp_path / "s.safetensors", {"x.weight": weight, "x.weight_scale": ("F16", scale)})
    want = decode(weight[1], "F8_E4M3").astype(F) * scale.astype(F).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(values(path)["x.weight"][1], want)


def test_every_code(tmp_path):
    """All 256 codes, the NaN ones too, against the dtype's definition."""
    for dtype in ("F8_E4M3", "F8_E5M2"):
        every = dtype, np.arange(256, dtype=np.uint8)
        path = save(
            tmp_path / f"{dtype}.safetensors", {"x.weight": every, "x.weight_scale": numbers([1])}
        )
        np.testing.assert_array_equal(values(path)["x.weight"][1], decode(every[1], dtype))


def scaled(path, seed, arch="sd1", scales=True):
    """A small checkpoint whose attention weights are scaled fp8; returns its true values too."""
    rows = header(arch)
    tensors = {k: (rows[k][0], v) for k, v in state(rows, seed).items()}
    true = {k: decode(v, d).astype(np.float64) for k, (d, v) in tensors.items() if d == "F16"}
    for i, key in enumerate([k for k in tensors if k.endswith("to_q.weight")]):
        scale = F(0.001 * (seed + i + 1))
        tensors[key] = codes(tensors[key][1].shape, seed + i)
        true[key] = (decode(tensors[key][1], "F8_E4M3").astype(F) * scale).astype(np.float64)
        stem = key.removesuffix("weight")
        if scales:
            tensors[stem + "scale_weight"] = numbers([scale])
            tensors[stem + "scale_input"] = numbers([7.0])
    tensors[UNET + "scaled_fp8"] = numbers([0.0])
    return save(path, tensors), true


def test_a_merge_of_two_scaled_models(tmp_path):
    (a, one), (b, two) = (scaled(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("ab"))
    out = tmp_path / "out.safetensors"
    plymix.merge(a, b, out, alpha=0.25)
    found, _ = load(out)
    assert not [k for k in found if "scale_" in k or "scaled_fp8" in k]
    keys = [k for k in found if k.endswith("to_q.weight")]
    assert keys
    for key in keys:
        want = 0.75 * one[key] + 0.25 * two[key]
        assert found[key][0] == "F16"
        share, largest = deviation(found[key], want, "F16")
        assert share <= 0.001
        assert largest <= 1


def test_ends_are_the_models_themselves(tmp_path):
    (a, one), (b, two) = (scaled(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("ab"))
    for alpha, true in ((0.0, one), (1.0, two)):
        out = tmp_path / "out.safetensors"
        plymix.merge(a, b, out, alpha=alpha, dtype="fp32", force=True)
        for key, (_, x) in load(out)[0].items():
            if key.endswith("to_q.weight"):
                np.testing.assert_array_equal(x.astype(np.float64), true[key])


def test_methods_that_are_no_sums_see_numbers_too(tmp_path):
    weights = [codes((6, 12), i) for i in range(2)]
    files = {
        n: save(
            tmp_path / f"{n}.safetensors", {"x.weight": w, "x.scale_weight": numbers([i + 0.5])}
        )
        for i, (n, w) in enumerate(zip("ab", weights, strict=True))
    }
    a, b = (decode(w[1], "F8_E4M3") * F(i + 0.5) for i, w in enumerate(weights))
    out = tmp_path / "out.safetensors"
    for method, function in (("maximum", np.maximum), ("minimum", np.minimum)):
        plymix.merge(
            from_dict(
                {
                    "models": {n: str(path) for n, path in files.items()},
                    "steps": {"mix": {"method": method, "a": "a", "b": "b"}},
                    "output": {"arch": "any", "dtype": "fp32"},
                }
            ),
            out=out,
            force=True,
        )
        np.testing.assert_array_equal(load(out)[0]["x.weight"][1], function(a, b))


def test_every_key_is_accounted_for(tmp_path):
    a, _ = scaled(tmp_path / "a.safetensors", 0)
    with plan.build(plymix.two_models(a, write(tmp_path / "b.safetensors", "sd1", 1))) as planned:
        rules = planned.dropped["a"]
    assert {"scales of scaled fp8", "marker of scaled fp8"} <= rules.keys()
    stored = set(load(a)[0])
    assert {k for keys in rules.values() for k in keys} | {t.name for t in planned.tensors} >= {
        k for k in stored if not k.startswith("model_ema")
    }
    assert any("scaled F8_E4M3" in note for note in planned.notes)


def test_inspect_says_scaled_fp8(tmp_path):
    a, _ = scaled(tmp_path / "a.safetensors", 0)
    found = plymix.inspect(a)
    assert found.architecture == "sd1"
    assert found.total.dtypes["scaled F8_E4M3"] > 0
    assert any("scaled F8_E4M3" in note for note in found.notes)
    assert found.quantised == 0


def test_other_containers(tmp_path):
    """The scales may lie in another shard than the weights, and the file may be a .ckpt."""
    weight, scale = codes((4, 8)), numbers([0.125])
    want = decode(weight[1], "F8_E4M3") * F(0.125)
    save(tmp_path / "m-00001-of-00002.safetensors", {"x.weight": weight})
    save(tmp_path / "m-00002-of-00002.safetensors", {"x.scale_weight": scale})
    homes = {"x.weight": "m-00001-of-00002.safetensors"}
    homes["x.scale_weight"] = "m-00002-of-00002.safetensors"
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    np.testing.assert_array_equal(values(index)["x.weight"][1], want)
    torch = pytest.importorskip("torch")
    eight = torch.from_numpy(weight[1].copy()).view(torch.float8_e4m3fn)
    torch.save({"x.weight": eight, "x.scale_weight": torch.tensor(0.125)}, tmp_path / "m.ckpt")
    np.testing.assert_array_equal(values(tmp_path / "m.ckpt")["x.weight"][1], want)


REFUSED = {
    "a scale per column": {"weight_scale": numbers(np.ones((1, 12)))},
    "too many scales": {"weight_scale": numbers(np.ones(5))},
    "a scale of another dtype": {"weight_scale": ("U8", np.ones(1, np.uint8))},
    "int8": {"weight_scale": numbers([1]), "comfy_quant": text({"format": "int8_tensorwise"})},
    "no json": {"weight_scale": numbers([1]), "comfy_quant": ("U8", np.ones(4, np.uint8))},
    "two levels": {"weight_scale": numbers([1]), "weight_scale_2": numbers([1])},
    "a smoothed input": {"weight_scale": numbers([1]), "pre_quant_scale": numbers([1])},
    "a scale without a weight": {"other.weight_scale": numbers([1])},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, case):
    sides = {f"x.{k}": v for k, v in REFUSED[case].items()}
    path = save(tmp_path / "s.safetensors", {"x.weight": codes((6, 12))} | sides)
    with pytest.raises(Refusal, match=r"x.*scale"), planned(path):
        pass


def test_a_marker_whose_scales_are_lost_is_refused(tmp_path):
    a, _ = scaled(tmp_path / "a.safetensors", 0, scales=False)
    with (
        pytest.raises(Refusal, match="scaled_fp8"),
        plan.build(plymix.two_models(a, write(tmp_path / "b.safetensors", "sd1", 1))),
    ):
        pass


# --- bitsandbytes -------------------------------------------------------------------------------


def golden(case, tmp_path):
    found = json.loads(GOLDEN.read_text())[case]
    kinds = {"uint8": ("U8", np.uint8), "float32": ("F32", F)}
    tensors = {
        key: (kinds[d][0], np.frombuffer(base64.b64decode(raw), kinds[d][1]).reshape(shape))
        for key, (d, shape, raw) in found["tensors"].items()
    }
    want = np.frombuffer(base64.b64decode(found["values"]), F).reshape(3, 50)
    return save(tmp_path / f"{case}.safetensors", tensors), want


@pytest.mark.parametrize("case", ["nf4", "nf4-nested", "fp4", "fp4-nested"])
def test_four_bits_are_what_bitsandbytes_makes_of_them(tmp_path, case):
    """Made by bitsandbytes 0.50: quantize_4bit, QuantState.as_dict, dequantize_4bit to float32."""
    path, want = golden(case, tmp_path)
    (found,) = values(path).values()
    assert found[0] == f"bitsandbytes {case[:3]}"
    np.testing.assert_array_equal(found[1], want)


def four_bits(shape, group, nested=0, seed=0):
    """The tensors of a 4-bit weight, and its values by a loop over the elements."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    count = -(-n // group)
    packed = rng.integers(0, 256, (-(-n // 2), 1)).astype(np.uint8)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(F)
    said = {"quant_type": "nf4", "blocksize": group, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {"x.weight": ("U8", packed), "x.weight.quant_map": ("F32", table)}
    absmax = rng.uniform(0.1, 1, count).astype(F)
    if nested:
        steps, inner = rng.integers(0, 256, count).astype(np.uint8), rng.random(256).astype(F)
        outer = rng.uniform(0.1, 1, -(-count // nested)).astype(F)
        said |= {"nested_blocksize": nested, "nested_offset": 0.5, "nested_dtype": "float32"}
        absmax = np.array([inner[s] * outer[i // nested] + F(0.5) for i, s in enumerate(steps)], F)
        tensors["x.weight.absmax"] = ("U8", steps)
        tensors["x.weight.nested_quant_map"] = ("F32", inner)
        tensors["x.weight.nested_absmax"] = ("F32", outer)
    else:
        tensors["x.weight.absmax"] = ("F32", absmax)
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = text(said)
    want = []
    for i in range(n):
        byte = int(packed[i // 2, 0])
        want.append(table[byte >> 4 if i % 2 == 0 else byte & 15] * absmax[i // group])
    return tensors, np.array(want, F).reshape(shape)


@pytest.mark.parametrize("nested", [0, 5, 256])
@pytest.mark.parametrize(("shape", "group"), [((7, 9), 64), ((33, 64), 64), ((5, 31), 4)])
def test_groups_that_end_anywhere(tmp_path, shape, group, nested):
    tensors, want = four_bits(shape, group, nested)
    found = values(save(tmp_path / "q.safetensors", tensors))
    assert found.keys() == {"x.weight"}
    np.testing.assert_array_equal(found["x.weight"][1], want)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_range_can_be_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("range")
    tensors, want = four_bits((41, 11), 64, 3)
    weight = codes((9, 14))
    tensors |= {"y.weight": weight, "y.weight_scale": numbers(np.arange(1, 10) / 8)}
    path = save(folder / "q.safetensors", tensors)
    other = decode(weight[1], "F8_E4M3") * (np.arange(1, 10, dtype=F) / 8)[:, None]
    with open_model(path) as source:
        for key, wanted in (("x.weight", want), ("y.weight", other)):
            info = source.tensors[key]
            begin = data.draw(st.integers(0, info.nbytes))
            end = data.draw(st.integers(begin, info.nbytes))
            out = bytearray(end - begin)
            source.read_at(info.file, info.offset + begin, out)
            assert out == wanted.astype(F).tobytes()[begin:end]


def test_reads_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(virtual, "BATCH", 64)
    tensors, want = four_bits((50, 31), 64, 3)
    np.testing.assert_array_equal(
        values(save(tmp_path / "q.safetensors", tensors))["x.weight"][1], want
    )


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [7, 10]}, {"shape": "7"}, {"shape": [-7, -9]}, {"blocksize": 0},
        {"blocksize": 63}, {"blocksize": "64"}, {"quant_type": "int8"}, {"shape": [1 << 70]},
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path, change):
    tensors, _ = four_bits((7, 9), 64)
    key = "x.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(tensors[key][1].tobytes())
    path = save(tmp_path / "q.safetensors", tensors | {key: text(said | change)})
    with (
        pytest.raises(Refusal, match="bitsandbytes 4-bit"),
        plan.build(recipe({"a": path, "b": path})),
    ):
        pass


# --- what is not read ---------------------------------------------------------------------------

KINDS_REFUSED = {
    "GPTQ or AWQ": ("qweight", "qzeros", "g_idx"),
    r"SVDQuant \(nunchaku\)": ("qweight_", "wscales", "smooth"),
    "bitsandbytes int8": ("weight", "SCB"),
    "quanto": ("weight._data", "weight._scale"),
    "nvfp4": ("weight", "weight_scale", "weight_scale_2"),
}


@pytest.mark.parametrize("kind", KINDS_REFUSED)
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    rows = header("sd1")
    tensors = {k: (rows[k][0], v) for k, v in state(rows, 0).items()}
    key = next(k for k in tensors if k.endswith("to_q.weight"))
    del tensors[key]
    stem = key.removesuffix("weight")
    for side in KINDS_REFUSED[kind]:
        tensors[stem + side] = ("U8", np.ones((4, 4), np.uint8))
    path = save(tmp_path / "q.safetensors", tensors)
    good = write(tmp_path / "b.safetensors", "sd1", 1)
    for pair in ((path, good), (good, path)):
        with (
            pytest.raises(Refusal, match=f"q.safetensors.*{kind}.*use the fp16"),
            plan.build(plymix.two_models(*pair)),
        ):
            pass


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "I8", "U8"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, dtype):
    rows = header("sd1")
    tensors = {k: (rows[k][0], v) for k, v in state(rows, 0).items()}
    key = next(k for k in tensors if k.endswith("to_q.weight"))
    path = tmp_path / "q.safetensors"
    raw(path, tensors, key, dtype)
    good = write(tmp_path / "b.safetensors", "sd1", 1)
    with (
        pytest.raises(Refusal, match=f"1 weights as {dtype} .*to_q.weight"),
        plan.build(plymix.two_models(good, path)),
    ):
        pass
    with open_model(path) as source:  # they are read as bytes all the same
        info = source.tensors[key]
        assert info.dtype == dtype
        assert len(source.read(info)) == info.nbytes


def raw(path, tensors, key, dtype):
    """A file in which `key` has 48 bytes of `dtype`."""
    bits = {"F4": 4, "F6_E2M3": 6}.get(dtype, 8)
    table, data = {}, b""
    for name, (kind, x) in tensors.items():
        content = bytes(48) if name == key else x.tobytes()
        shape = [48 * 8 // bits] if name == key else list(x.shape)
        table[name] = {
            "dtype": dtype if name == key else kind,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    said = json.dumps(table).encode()
    path.write_bytes(len(said).to_bytes(8, "little") + said + data)


def test_a_result_asked_for_as_fp8_is_plain_fp8(tmp_path):
    """No scale and no marker is left that would multiply it once more."""
    (a, one), (b, two) = (scaled(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("ab"))
    out = tmp_path / "out.safetensors"
    plymix.merge(a, b, out, alpha=0.5, dtype="fp8_e4m3fn")
    found = load(out)[0]
    assert not [k for k in found if "scale_" in k or "scaled_fp8" in k]
    for key in (k for k in found if k.endswith("to_q.weight")):
        assert found[key][0] == "F8_E4M3"
        want = 0.5 * one[key] + 0.5 * two[key]
        step = np.maximum(
            np.exp2(np.floor(np.log2(np.maximum(np.abs(want), 2.0**-6))) - 3), 2.0**-9
        )
        assert (np.abs(decode(found[key][1], "F8_E4M3") - want) <= step / 2 * (1 + 1e-6)).all()
