"""GGUF: blocks against ggml's loops and the gguf package, files both ways, defects, merges."""

import contextlib
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import plymix
from plymix import archs, engine, plan, replay
from plymix.errors import Failure, FormatError, Refusal
from plymix.formats import gguf, open_model, virtual
from plymix.formats.base import Entry
from plymix.formats.gguf_blocks import Q8_0, QUANTS, encode_q8_0
from small import deviation, draw, load, real, recipe, save
from tiny import write

F = np.float32
KIND = {q.name: number for number, q in QUANTS.items()}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


# ---- a writer of the tests' own


def text(s):
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, x):
    layout = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q"}
    if kind == STRING:
        return text(x)
    if kind == ARRAY:
        item, items = x
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, i) for i in items)
    return struct.pack(layout[kind], x)


def built(tensors, values=(), version=3, alignment=32, counts=None):
    """A file's bytes. tensors: (name, shape, kind, bytes[, offset]); values: (key, kind, x)."""
    data, descriptions = b"", b""
    for label, shape, kind, raw, *offset in tensors:
        at = offset[0] if offset else len(data)
        descriptions += text(label) + struct.pack("<I", len(shape))
        descriptions += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        descriptions += struct.pack("<IQ", kind, at)
        data += raw + bytes(-len(raw) % alignment)
    n, m = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, n, m)
    head += b"".join(text(k) + struct.pack("<I", kind) + value(kind, x) for k, kind, x in values)
    head += descriptions
    return head + bytes(-len(head) % alignment) + data


def file(tmp_path, *args, name="m.gguf", **options):
    path = tmp_path / name
    path.write_bytes(built(*args, **options))
    return path


def contents(path):
    """{name: (dtype, shape, encoding, bytes)} as plymix reads them."""
    with open_model(path) as source:
        return {
            k: (t.dtype, t.shape, t.encoding, bytes(source.read(t)))
            for k, t in source.tensors.items()
        }


def random_blocks(kind, n, seed=0):
    """Blocks with random codes and finite scales."""
    quant = QUANTS[kind]
    rng = np.random.default_rng(seed)
    b = rng.integers(0, 256, (n, quant.nbytes), dtype=np.uint8)
    halves = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 10: [80, 82], 11: [108]}
    halves |= {12: [0, 2], 13: [0, 2], 14: [208]}
    for at in halves.get(kind, []):
        scales = (rng.standard_normal(n) * 0.1).astype(np.float16)
        b[:, at : at + 2] = scales.view(np.uint8).reshape(n, 2)
    if kind == KIND["Q8_K"]:
        b[:, :4] = rng.standard_normal(n).astype(F).view(np.uint8).reshape(n, 4)
    return b


# ---- blocks, element by element as ggml's C loops go through them


def half(block, at):
    return F(np.frombuffer(block[at : at + 2].tobytes(), np.float16)[0])


def signed(byte):
    return int(byte) - 256 if byte > 127 else int(byte)


def small_block(block, name):
    """Q4_0 to Q8_0: element j and j + 16 share a byte."""
    y = [F(0)] * 32
    d = half(block, 0)
    if name == "Q8_0":
        return [d * F(signed(q)) for q in block[2:]]
    with_minimum, five = name.endswith("_1"), name.startswith("Q5")
    m = half(block, 2) if with_minimum else F(0)
    at = 4 if with_minimum else 2
    high = int.from_bytes(block[at : at + 4].tobytes(), "little") if five else 0
    codes = block[at + 4 :] if five else block[at:]
    for j in range(16):
        x0, x1 = int(codes[j]) & 15, int(codes[j]) >> 4
        x0 |= (high >> j & 1) << 4
        x1 |= (high >> (j + 16) & 1) << 4
        if with_minimum:
            y[j], y[j + 16] = d * F(x0) + m, d * F(x1) + m
        else:
            middle = 16 if five else 8
            y[j], y[j + 16] = d * F(x0 - middle), d * F(x1 - middle)
    return y


def q2_k(block):
    y, at, step = [], 16, 0
    d, least = half(block, 80), half(block, 82)
    for _ in range(2):
        for shift in (0, 2, 4, 6):
            for part in (0, 16):
                scale = int(block[step])
                step += 1
                dl, ml = d * F(scale & 15), least * F(scale >> 4)
                y += [dl * F(int(block[at + part + i]) >> shift & 3) - ml for i in range(16)]
        at += 32
    return y


def q3_k(block):
    words = list(struct.unpack("<3I", block[96:108].tobytes()))
    low, high = 0x0F0F0F0F, 0x03030303
    top = words[2]
    aux = [
        words[0] & low | (top >> 0 & high) << 4,
        words[1] & low | (top >> 2 & high) << 4,
        words[0] >> 4 & low | (top >> 4 & high) << 4,
        words[1] >> 4 & low | (top >> 6 & high) << 4,
    ]
    scales = struct.unpack("16b", struct.pack("<4I", *aux))
    d, y, at, step, mask = half(block, 108), [], 32, 0, 1
    for _ in range(2):
        for shift in (0, 2, 4, 6):
            for part in (0, 16):
                dl = d * F(scales[step] - 32)
                step += 1
                for i in range(16):
                    code = int(block[at + part + i]) >> shift & 3
                    y.append(dl * F(code - (0 if block[part + i] & mask else 4)))
            mask <<= 1
        at += 32
    return y


def scale_and_minimum(j, q):
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def q4_or_5_k(block, five):
    d, least, packed = half(block, 0), half(block, 2), [int(x) for x in block[4:16]]
    y, at, one, two = [], 48 if five else 16, 1, 2
    for j in range(0, 8, 2):
        for half_, shift, bit in ((0, 0, one), (1, 4, two)):
            sc, m = scale_and_minimum(j + half_, packed)
            d1, m1 = d * F(sc), least * F(m)
            for i in range(32):
                code = int(block[at + i]) >> shift & 15
                code += 16 if five and block[16 + i] & bit else 0
                y.append(d1 * F(code) - m1)
        at, one, two = at + 32, one << 2, two << 2
    return y


def q6_k(block):
    d, y = half(block, 208), [F(0)] * 256
    for n in (0, 1):
        ql, qh, sc = block[64 * n :], block[128 + 32 * n :], block[192 + 8 * n :]
        for i in range(32):
            s, h = i // 16, int(qh[i])
            codes = [
                int(ql[i]) & 15 | (h & 3) << 4,
                int(ql[i + 32]) & 15 | (h >> 2 & 3) << 4,
                int(ql[i]) >> 4 | (h >> 4 & 3) << 4,
                int(ql[i + 32]) >> 4 | (h >> 6 & 3) << 4,
            ]
            for k, code in enumerate(codes):
                y[128 * n + 32 * k + i] = d * F(signed(sc[s + 2 * k])) * F(code - 32)
    return y


def q8_k(block):
    d = np.frombuffer(block[:4].tobytes(), F)[0]
    return [d * F(signed(q)) for q in block[4:260]]


def by_loops(name, block):
    large = {"Q2_K": q2_k, "Q3_K": q3_k, "Q6_K": q6_k, "Q8_K": q8_k}
    if name in large:
        return large[name](block)
    if name in ("Q4_K", "Q5_K"):
        return q4_or_5_k(block, name == "Q5_K")
    return small_block(block, name)


@pytest.mark.parametrize("kind", QUANTS, ids=lambda k: QUANTS[k].name)
def test_blocks_mean_what_ggmls_loops_make_of_them(kind):
    quant = QUANTS[kind]
    blocks = random_blocks(kind, 7)
    want = np.array([by_loops(quant.name, b) for b in blocks], F)
    got = quant.decode(blocks)
    assert got.dtype == F
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("kind", [k for k in QUANTS if QUANTS[k].name != "Q8_K"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the package's own, at infinite scales
def test_blocks_mean_what_the_package_makes_of_them(kind):
    package = pytest.importorskip("gguf")
    quant = QUANTS[kind]
    known = package.GGMLQuantizationType(kind)
    assert (known.name, package.GGML_QUANT_SIZES[known]) == (quant.name, (quant[1], quant[2]))
    blocks = np.random.default_rng(kind).integers(0, 256, (300, quant.nbytes), dtype=np.uint8)
    want = package.quants.dequantize(blocks, known)
    np.testing.assert_array_equal(quant.decode(blocks), want)


def test_names_of_what_is_refused_are_the_packages():
    package = pytest.importorskip("gguf")
    known = {k.value: k.name for k in package.GGMLQuantizationType}
    assert {**gguf.PLAIN, **{k: q.name for k, q in QUANTS.items()}, **gguf.REFUSED} == known


# ---- packing


def rows(seed=0, n=500):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, 32)) * np.exp2(rng.integers(-12, 12, (n, 1)))).astype(F)


def test_packing_is_ggmls():
    package = pytest.importorskip("gguf")
    x = rows()
    x[0] = 0
    want = package.quants.quantize(x, package.GGMLQuantizationType.Q8_0)
    scale = want[:, :2].copy().view(np.float16)[:, 0]
    assert (scale[1:] != 0).all()
    np.testing.assert_array_equal(encode_q8_0(x), want)


def test_packing_halves_goes_away_from_zero():
    x = np.zeros((1, 32), F)
    x[0, :5] = 127, 0.5, -0.5, 1.5, np.nextafter(F(0.5), F(0))
    assert list(encode_q8_0(x).view(np.int8)[0, 2:7]) == [127, 1, -1, 2, 0]


@given(st.lists(st.floats(-8e6, 8e6, width=32), min_size=32, max_size=32))
@example([1e-8] * 32)  # the scale is 0 in float16
@settings(max_examples=200, deadline=None)
def test_packing_is_near_and_settles(values):
    x = np.array([values], F)
    blocks = encode_q8_0(x)
    back = Q8_0.decode(blocks)
    # half a step, and the error of the scale in float16 (relative 2**-11, absolute 2**-25)
    largest = np.abs(x).max().astype(np.float64)
    bound = largest / 127 * 0.5 + largest * 2.0**-11 + 127 * 2.0**-24
    assert np.abs(back.astype(np.float64) - x).max() <= bound
    np.testing.assert_array_equal(encode_q8_0(back), blocks)


# ---- reading


def test_a_hand_made_file(tmp_path):
    q8, q6 = random_blocks(8, 4), random_blocks(14, 3)
    half_values = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = file(
        tmp_path,
        [
            ("x.weight", (2, 3), 1, half_values.tobytes()),
            ("q8.weight", (2, 64), 8, q8.tobytes()),
            ("ids", (1, 2), 27, np.array([0, 1], np.int64).tobytes()),
            ("q6.weight", (3, 256), 14, q6.tobytes()),
            ("conv.weight", (8, 96), 1, bytes(8 * 96 * 2)),
            ("flag", (1,), 24, b"\x07"),
        ],
        [
            ("general.architecture", STRING, "flux"),
            ("general.alignment", UINT32, 64),
            ("general.quantization_version", UINT32, 2),
            ("words", ARRAY, (STRING, ["a", "bc", ""])),
            ("numbers", ARRAY, (UINT64, [1, 2, 3])),
            ("pi", FLOAT32, 3.5),
            ("yes", BOOL, True),
            ("comfy.gguf.orig_shape.conv.weight", ARRAY, (INT32, [16, 16, 3])),
            ("comfy.gguf.orig_shape.flag", ARRAY, (INT32, [])),
        ],
        alignment=64,
    )
    found = contents(path)
    assert {k: v[:3] for k, v in found.items()} == {
        "x.weight": ("F16", (2, 3), ""),
        "q8.weight": ("F32", (2, 64), "Q8_0"),
        "ids": ("I64", (1, 2), ""),
        "q6.weight": ("F32", (3, 256), "Q6_K"),
        "conv.weight": ("F16", (16, 16, 3), ""),
        "flag": ("I8", (), ""),
    }
    assert found["x.weight"][3] == half_values.tobytes()
    assert found["flag"][3] == b"\x07"
    want = np.array([by_loops("Q8_0", b) for b in q8], F)
    assert found["q8.weight"][3] == want.tobytes()
    want = np.array([by_loops("Q6_K", b) for b in q6], F)
    assert found["q6.weight"][3] == want.tobytes()
    with open_model(path) as source:
        assert source.format == "gguf"
        assert source.metadata == {"general.architecture": "flux", "pi": "3.5", "yes": "true"}
        assert source.nbytes == path.stat().st_size
        assert source.files == (path,)


def test_version_2_is_read_alike(tmp_path):
    tensors = [("x", (2,), 0, F([1, 2]).tobytes())]
    two = file(tmp_path, tensors, version=2, name="two.gguf")
    assert contents(two) == contents(file(tmp_path, tensors))


def test_we_read_what_the_package_writes(tmp_path):
    package = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 5, 64)).astype(F)
    packed = package.quants.quantize(x, package.GGMLQuantizationType.Q8_0)
    w = package.GGUFWriter(path, "sdxl")
    w.add_description("a file")
    w.add_file_type(7)
    w.add_array("tokenizer.ggml.tokens", ["a", "b"] * 5000)
    w.add_array("comfy.gguf.orig_shape.r", [4, 2, 2])
    w.add_tensor("q", packed, raw_dtype=package.GGMLQuantizationType.Q8_0)
    w.add_tensor("f", x)
    w.add_tensor("h", x.astype(np.float16))
    w.add_tensor("r", x.reshape(-1)[:16].reshape(2, 8).copy())
    w.add_tensor("i", np.arange(4, dtype=np.int32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    found = contents(path)
    assert found["q"][:3] == ("F32", (3, 5, 64), "Q8_0")
    back = package.quants.dequantize(packed, package.GGMLQuantizationType.Q8_0)
    assert found["q"][3] == back.tobytes()
    assert found["f"] == ("F32", x.shape, "", x.tobytes())
    assert found["h"] == ("F16", x.shape, "", x.astype(np.float16).tobytes())
    assert found["r"][1] == (4, 2, 2)
    assert found["i"] == ("I32", (4,), "", np.arange(4, dtype=np.int32).tobytes())
    with open_model(path) as source:
        assert source.metadata == {
            "general.architecture": "sdxl",
            "general.description": "a file",
        }


def packed_file(tmp_path, kinds=("Q4_0", "Q6_K", "Q8_0", "Q3_K"), n=5):
    tensors = []
    for i, kind in enumerate(kinds):
        quant = QUANTS[KIND[kind]]
        raw = random_blocks(KIND[kind], n + i, i).tobytes()
        tensors.append((f"t{i}", (n + i, quant.elements), KIND[kind], raw))
    return file(tmp_path, tensors)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_packed_tensors_can_be_read(tmp_path_factory, data):
    """Also ranges that begin within an element, and that go on into the next tensor."""
    path = packed_file(tmp_path_factory.mktemp("range"))
    with open_model(path) as source:
        infos = list(source.tensors.values())
        whole = b"".join(bytes(source.read(t)) for t in infos)
        begin = data.draw(st.integers(0, len(whole)))
        out = bytearray(data.draw(st.integers(0, len(whole) - begin)))
        source.read_at(infos[0].file, begin, out)
        assert out == whole[begin : begin + len(out)]


def test_reading_a_large_tensor_needs_little_more_than_its_result(tmp_path):
    n = 40_000  # 10 million elements
    raw = np.zeros((n, 144), np.uint8)
    path = file(tmp_path, [("x", (n, 256), KIND["Q4_K"], raw.tobytes())])
    with open_model(path) as source:
        out = bytearray(source.tensors["x"].nbytes)
        tracemalloc.start()
        try:
            source.read_at(1, 0, out)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


# ---- what is refused


def refused(path):
    """The message `path` is refused with: one line, with its name, without using memory."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            open_model(path).close()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    assert len(said) < 400
    return said


GOOD = ("x", (2,), 0, bytes(8))
ONE_VALUE = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
SHAPE = "comfy.gguf.orig_shape.x"
DEFECTS = {
    "version 1": (built([GOOD], version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "truncated magic": (b"GGUF\x03\0", "truncated"),
    "many tensors": (built([], counts=(2**63, 0)), "claims"),
    "many values": (built([], counts=(0, 2**63)), "claims"),
    "tensors beyond the end": (built([GOOD], counts=(9000, 0)), "truncated"),
    "long name": (built([("x" * 70_000, (2,), 0, bytes(8))]), "claims"),
    "huge text": (ONE_VALUE + struct.pack("<IQ", STRING, 2**60), "claims"),
    "text beyond the end": (ONE_VALUE + struct.pack("<IQ", STRING, 1 << 20), "truncated"),
    "not UTF-8": (built([(b"\xff\xfe", (2,), 0, bytes(8))]), "UTF-8"),
    "value of unknown type": (ONE_VALUE + struct.pack("<I", 77), "unknown type 77"),
    "array of arrays": (built([], [("k", ARRAY, (ARRAY, []))]), "array of the unknown type 9"),
    "huge array": (ONE_VALUE + struct.pack("<IIQ", ARRAY, UINT32, 2**60), "claims"),
    "endless texts": (ONE_VALUE + struct.pack("<IIQ", ARRAY, STRING, 2**60), "claims"),
    "value twice": (built([], [("k", BOOL, True), ("k", BOOL, False)]), "twice"),
    "tensor twice": (built([GOOD, ("x", (2,), 0, bytes(8))]), "twice"),
    "alignment 0": (built([GOOD], [("general.alignment", UINT32, 0)]), "alignment"),
    "alignment 12": (built([GOOD], [("general.alignment", UINT32, 12)]), "alignment"),
    "alignment is text": (built([GOOD], [("general.alignment", STRING, "32")]), "alignment"),
    "unaligned tensor": (built([("x", (2,), 0, bytes(8), 4)]), "aligned"),
    "many dimensions": (built([("x", (1,) * 9, 0, bytes(4))]), "dimensions"),
    "size overflows": (built([("x", (2**62, 2**62), 0, bytes(8))]), "truncated"),
    "far away": (built([("x", (2,), 0, bytes(8), 2**62)]), "truncated"),
    "cut short": (built([GOOD])[:-28], "truncated"),
    "overlap": (built([("x", (9,), 0, bytes(64), 0), ("y", (2,), 0, b"", 32)]), "overlaps"),
    "rows of half a block": (built([("x", (2, 48), 8, bytes(102))]), "multiple of 32"),
    "scalar in blocks": (built([("x", (), 8, bytes(34))]), "multiple of 32"),
    "IQ4_XS": (built([("x", (256,), 23, bytes(136))]), "IQ4_XS"),
    "MXFP4": (built([("x", (32,), 39, bytes(17))]), "MXFP4"),
    "a type removed from ggml": (built([("x", (32,), 4, bytes(18))]), "unknown type 4"),
    "shape of another size": (built([GOOD], [(SHAPE, ARRAY, (INT32, [3]))]), "original shape"),
    "negative shape": (built([GOOD], [(SHAPE, ARRAY, (INT32, [-1, -2]))]), "original shape"),
    "shape is text": (built([GOOD], [(SHAPE, STRING, "2")]), "original shape"),
    "shape of other numbers": (built([GOOD], [(SHAPE, ARRAY, (UINT64, [2]))]), "not a shape"),
    "shape of many numbers": (built([GOOD], [(SHAPE, ARRAY, (INT32, [1] * 9))]), "not a shape"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_named(tmp_path, defect):
    raw, word = DEFECTS[defect]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert word in refused(path)


def test_a_header_without_end(tmp_path):
    """A sparse file of 4 GB that is all header, of arrays of 8 MiB."""
    path = tmp_path / "m.gguf"
    with open(path, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 10_000))
        for i in range(10):
            f.write(text(f"k{i}") + struct.pack("<IIQ", ARRAY, 0, 8 << 20))
            f.seek(8 << 20, 1)
        f.truncate(4 << 30)
    assert "goes on beyond" in refused(path)


def test_texts_in_arrays_are_counted_together(tmp_path, monkeypatch):
    words = [(f"k{i}", ARRAY, (STRING, ["w"] * 6)) for i in range(2)]
    assert contents(file(tmp_path, [GOOD], words)).keys() == {"x"}
    monkeypatch.setattr(gguf, "MAX_STRINGS", 11)
    assert "claims 6 texts" in refused(file(tmp_path, [GOOD], words))


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_a_damaged_file_is_refused_or_means_what_it_says(tmp_path_factory, data):
    raw = bytearray(
        built(
            [
                ("a", (2, 64), KIND["Q8_0"], random_blocks(8, 4).tobytes()),
                ("b", (3,), 1, bytes(6)),
                ("c", (256,), KIND["Q2_K"], random_blocks(10, 1).tobytes()),
            ],
            [("comfy.gguf.orig_shape.b", ARRAY, (INT32, [1, 3])), ("k", STRING, "v")],
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 330))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 2, 8, 9, 255])))
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 40, 200]))])
    with contextlib.suppress(Refusal), open_model(path) as source:
        assert sum(t.nbytes for t in source.tensors.values()) < 1 << 16
        for info in source.tensors.values():
            source.read(info)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_escape(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("noise") / "m.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + raw)
    with contextlib.suppress(Refusal):
        open_model(path).close()


# ---- writing


def written(path, entries, data, metadata=None, order=reversed, step=None):
    """The file an engine makes of a layout; tensors in `order`, `step` bytes at a time."""
    layout = gguf.layout(entries, metadata or {})
    target = engine.MemoryTarget(layout.size)
    within = layout.through(target) if layout.through else target
    for at, piece in layout.pieces:
        target.write_at(at, piece)
    for e in order(entries):
        n = step or len(data[e.name]) or 1
        for at in range(0, len(data[e.name]), n):
            within.write_at(layout.offsets[e.name] + at, data[e.name][at : at + n])
    path.write_bytes(target.data)
    return path


def entries_and_data():
    rng = np.random.default_rng(5)
    shapes = {"scalar": (), "none": (0, 3), "bias": (7,), "five": (2, 3, 1, 2, 5), "w": (3, 64)}
    entries, data = [], {}
    for dtype, n in {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I8": 1}.items():
        for label, shape in shapes.items():
            entries.append(Entry(f"{label}.{dtype}", dtype, shape))
            data[entries[-1].name] = rng.bytes(int(np.prod(shape)) * n)
    return entries, data


def test_a_layout_is_what_the_reader_reads(tmp_path):
    entries, data = entries_and_data()
    metadata = {"general.architecture": "flux", "plymix.é": '{"a": 1}', "general.file_type": "7"}
    path = written(tmp_path / "m.gguf", entries, data, metadata)
    found = contents(path)
    assert found == {e.name: (e.dtype, e.shape, "", data[e.name]) for e in entries}
    assert list(found) == [e.name for e in entries]
    with open_model(path) as source:
        assert source.metadata == {k: v for k, v in metadata.items() if "file_type" not in k}


def test_the_package_reads_what_we_write(tmp_path):
    package = pytest.importorskip("gguf")
    entries, data = entries_and_data()
    x = rows(6, 96).reshape(3, 32, 32)
    wide = rows(7, 27).reshape(32, 3, 3, 3)  # rows of 3: stored as blocks, with the shape aside
    entries = gguf.packed([*entries, Entry("q", "F32", x.shape), Entry("conv", "F32", wide.shape)])
    data |= {"q": x.tobytes(), "conv": wide.tobytes()}
    encoded = {e.name for e in entries if e.encoding}
    assert encoded == {"q", "conv", "w.F32"}
    data["w.F32"] = rows(8, 6).tobytes()
    path = written(tmp_path / "m.gguf", entries, data, {"general.architecture": "flux"}, step=640)
    reader = package.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.file_type").contents() == 7
    assert reader.get_field("comfy.gguf.orig_shape.conv").contents() == [32, 3, 3, 3]
    by_name = {t.name: t for t in reader.tensors}
    assert list(by_name) == [e.name for e in entries]
    for e in entries:
        theirs = by_name[e.name]
        raw = theirs.data.tobytes()
        if e.encoding:
            values = np.frombuffer(data[e.name], F).reshape(-1, 32)
            q8 = package.GGMLQuantizationType.Q8_0
            assert theirs.tensor_type == q8
            assert raw == package.quants.quantize(values, q8).tobytes()
        else:
            assert theirs.tensor_type.name == e.dtype
            assert raw == data[e.name]
        if 0 < len(e.shape) <= 4 and e.name != "conv":
            assert tuple(theirs.shape) == e.shape[::-1]
    assert contents(path)["conv"][:3] == ("F32", (32, 3, 3, 3), "Q8_0")


@pytest.mark.parametrize("step", [128, 1280, 4 * virtual.BATCH])
def test_packed_bytes_do_not_depend_on_how_they_come(tmp_path, step):
    x = {f"t{i}": rows(i, 7000).tobytes() for i in range(3)}
    entries = gguf.packed([Entry(k, "F32", (7000, 32)) for k in x])
    one = written(tmp_path / "one.gguf", entries, x)
    other = written(tmp_path / "other.gguf", entries, x, order=list, step=step)
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_written():
    for e, word in (
        (Entry("x", "F8_E4M3", (2,)), "F8_E4M3"),
        (Entry("x", "U8", (2,)), "U8"),
        (Entry("x" * 128, "F16", (2,)), "name"),
        (Entry("x", "F16", (2, 32), "Q8_0"), "Q8_0"),
        (Entry("x", "F32", (2, 32), "Q4_K"), "Q4_K"),
        (Entry("x", "F32", (2, 3), "Q8_0"), "blocks"),
    ):
        with pytest.raises(Refusal, match=word):
            gguf.layout([e], {})


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e30])
def test_what_a_packed_tensor_cannot_hold_is_a_failure(tmp_path, bad):
    x = rows(0, 2)
    x[1, 3] = bad
    entries = gguf.packed([Entry("w", "F32", x.shape)])
    with pytest.raises(Failure, match="w holds values"):
        written(tmp_path / "m.gguf", entries, {"w": x.tobytes()})


# ---- merging


def test_a_merge_with_a_packed_model(tmp_path):
    """Its values enter as float32 and are rounded once; an F16 file keeps F16."""
    n = 700  # more than one chunk
    blocks = random_blocks(KIND["Q4_K"], n)
    values = QUANTS[KIND["Q4_K"]].decode(blocks)
    other = draw("F16", (n, 256), seed=3)
    bias = draw("F32", (40,), seed=4)
    save(tmp_path / "a.safetensors", {"w": other, "b": bias})
    packed = file(
        tmp_path,
        [("w", (n, 256), KIND["Q4_K"], blocks.tobytes()), ("b", (40,), 0, bias[1].tobytes())],
    )
    want = 0.7 * real(other).astype(np.float64) + 0.3 * values.astype(np.float64)
    files = {"a": tmp_path / "a.safetensors", "b": packed}
    for threads in (1, 3):
        out = tmp_path / f"out{threads}.safetensors"
        plymix.merge(recipe(files, 0.3), out=out, threads=threads)
        found, _ = load(out)
        assert found["w"][0] == "F16"
        share, largest = deviation(found["w"], want, "F16")
        assert share <= 0.001
        assert largest <= 1
        np.testing.assert_array_equal(found["b"][1], bias[1])


def test_a_packed_base_is_kept_in_fp16(tmp_path):
    blocks = random_blocks(8, 64)
    values = Q8_0.decode(blocks)
    packed = file(tmp_path, [("w", (16, 128), 8, blocks.tobytes())])
    save(tmp_path / "b.safetensors", {"w": draw("F16", (16, 128))})
    files = {"a": packed, "b": tmp_path / "b.safetensors"}
    for alpha, dtype, kind in ((0.0, "keep", np.float16), (0.0, "fp32", F)):
        out = tmp_path / f"{dtype}.safetensors"
        plymix.merge(recipe(files, alpha, dtype=dtype), out=out)
        np.testing.assert_array_equal(
            load(out)[0]["w"][1].ravel(), values.astype(kind).ravel(), strict=True
        )
    out = tmp_path / "out.gguf"
    plymix.merge(recipe(files, 0.0), out=out)
    dtype, shape, encoding, raw = contents(out)["w"]
    assert (dtype, shape, encoding) == ("F16", (16, 128), "")
    assert raw == values.astype(np.float16).tobytes()
    with open_model(out) as source:
        assert any(k.startswith("plymix.") for k in source.metadata)


def test_the_engine_packs_what_it_only_copies(tmp_path):
    """Also a tensor at the file's end that is followed, in its source, by one to be packed."""
    x, bias = rows(1, 128).reshape(64, 64), draw("F32", (64,))
    save(tmp_path / "a.safetensors", {"b": bias, "w": ("F32", x)})
    files = dict.fromkeys("ab", tmp_path / "a.safetensors")
    with plan.build(recipe(files, 0.0)) as planned:
        entries = [Entry("w", "F32", x.shape), Entry("b", "F32", (64,))]
        layout = gguf.layout(gguf.packed(entries), {})
        placed = [replace(t, offset=layout.offsets[t.name]) for t in planned.tensors]
        assert len(engine.items(placed)) == 2
        engine.write(placed, planned.sources, layout, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").stat().st_size == layout.size
    found = contents(tmp_path / "m.gguf")
    assert found["b"][3] == bias[1].tobytes()
    assert found["w"][3] == Q8_0.decode(encode_q8_0(x.reshape(-1, 32))).tobytes()


def test_the_engine_writes_packed_tensors(tmp_path):
    """A merge of three tensors into Q8_0: as if its float32 result had been packed."""
    shapes = {"a.weight": (600, 256), "b.weight": (64, 32, 3, 3), "c.bias": (33,)}
    files = {}
    for i, label in enumerate("ab"):
        tensors = {k: draw("F16", s, seed=10 * i + j) for j, (k, s) in enumerate(shapes.items())}
        files[label] = save(tmp_path / f"{label}.safetensors", tensors)
    found = recipe(files, 0.25, dtype="fp32")
    plymix.merge(found, out=tmp_path / "plain.safetensors")
    plain = load(tmp_path / "plain.safetensors")[0]
    made = []
    for threads in (1, 4):
        with plan.build(found) as planned:
            layout = gguf.layout(
                gguf.packed([Entry(t.name, t.dtype, t.shape) for t in planned.tensors]), {}
            )
            placed = [replace(t, offset=layout.offsets[t.name]) for t in planned.tensors]
            out = tmp_path / f"q{threads}.gguf"
            engine.write(placed, planned.sources, layout, out, threads=threads)
        made.append(out.read_bytes())
    assert made[0] == made[1]
    result = contents(out)
    assert {k: v[2] for k, v in result.items()} == dict.fromkeys(shapes, "Q8_0") | {"c.bias": ""}
    for key, (_, x) in plain.items():
        want = x
        if key != "c.bias":
            want = Q8_0.decode(encode_q8_0(x.reshape(-1, 32)))
        assert result[key][3] == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize(("arch", "known"), [("sd1", "sd1"), ("sdxl", "sdxl"), ("flux1", "flux")])
def test_a_result_says_its_architecture_as_comfyui_gguf_reads_it(tmp_path, arch, known):
    package = pytest.importorskip("gguf")
    golden = {"flux1": "flux-dev"}.get(arch, arch)
    files = [write(tmp_path / f"{n}.safetensors", golden, i) for i, n in enumerate("ab")]
    plymix.merge(*files, tmp_path / "m.gguf", alpha=0.5, dtype="fp16")
    reader = package.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.architecture").contents() == known
    assert plymix.inspect(tmp_path / "m.gguf").metadata["general.architecture"] == known
    del reader
    assert replay.verify(tmp_path / "m.gguf").ok


def test_packed_to_packed_is_copied_in_whole_blocks(tmp_path):
    """Q8_0 again is the same Q8_0 (its largest code is 127), more than one step of a copy long."""
    shapes = {"a.weight": (33, 64), "b.weight": (2048, 1024), "c.bias": (33,)}
    tensors = {k: draw("F16", s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    first, second = tmp_path / "one.gguf", tmp_path / "two.gguf"
    plymix.convert(save(tmp_path / "a.safetensors", tensors), first, dtype="q8_0")
    plymix.convert(first, second, dtype="q8_0")
    assert {k: v[3] for k, v in contents(second).items()} == {
        k: v[3] for k, v in contents(first).items()
    }
    assert replay.verify(second).ok


def test_verify_reads_packed_results_where_they_lie(tmp_path):
    """A changed byte in a block of Q8_0 is told by the tensor that it belongs to."""
    shapes = {"a.weight": (40, 64), "b.weight": (64, 32), "c.bias": (33,)}
    tensors = {k: draw("F16", s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    model, out = save(tmp_path / "a.safetensors", tensors), tmp_path / "q.gguf"
    plymix.convert(model, out, dtype="q8_0")
    assert replay.verify(out).ok
    placed = contents(out)
    last = bytearray(out.read_bytes())
    last[last.rindex(placed["c.bias"][3]) - 100] ^= 1  # the end of b.weight, in whole blocks
    out.write_bytes(last)
    verdict = replay.verify(out)
    assert not verdict.ok
    assert "1 of 3 tensors" in verdict.text
    assert verdict.text.endswith(": b.weight")


def test_every_architecture_has_a_name_in_gguf():
    for name in archs.names():
        arch = archs.load(name)
        assert (arch.gguf or arch.name).isprintable()
        assert arch.gguf != arch.name  # said once
