"""The strict safetensors reader and its writer: defects, fuzz, and the library both ways."""

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.errors import Failure, FormatError, Refusal
from plymix.formats import open_model, safetensors
from plymix.formats.base import BITS, Entry
from small import load, save
from tiny import decode

library = pytest.importorskip("safetensors")
library_numpy = pytest.importorskip("safetensors.numpy")


def file(tmp_path, header, data=b"", length=None, name="m.safetensors"):
    """A file with this header (JSON-able or bytes), whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / name
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path):
    """The message `path` is refused with: one line, with its name, without using memory."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            open_model(path).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    assert len(said) < 400
    assert caught.value.exit_code == 2
    return said


TWINS = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
DEFECTS = {
    "huge length": ({"a": entry()}, bytes(8), 2**63, "claims"),
    "length beyond the limit": ({"a": entry()}, bytes(8), 100_000_001, "limit"),
    "length beyond the file": ({"a": entry()}, bytes(8), 5000, "claims"),
    "not JSON": (b'{"a": nonsense', b"", None, "JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}    ', b"", None, "JSON"),
    "nested deeply": (b'{"a":' * 100_000 + b"}" * 100_000, b"", None, "deep"),
    "duplicate key": (TWINS + TWINS[1:-1] + b"}", bytes(1), None, "twice"),
    "duplicate field": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        None,
        "twice",
    ),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), None, "F33"),
    "dtype is a number": ({"a": {**entry(), "dtype": 5}}, bytes(8), None, "dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "entry"),
    "extra field": ({"a": {**entry(), "extra": 1}}, bytes(8), None, "entry"),
    "entry is a list": ({"a": [1, 2]}, bytes(8), None, "entry"),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8), None, "shape"),
    "fractional size": ({"a": entry(shape=(2.0,))}, bytes(8), None, "shape"),
    "boolean size": ({"a": entry("U8", (True,), (0, 1))}, bytes(1), None, "shape"),
    "shape is text": ({"a": {**entry(), "shape": "2"}}, bytes(8), None, "shape"),
    "rank too large": ({"a": entry("U8", (1,) * 5000, (0, 1))}, bytes(1), None, "shape"),
    "size overflows": ({"a": entry(shape=(2**62, 2**62))}, bytes(8), None, "needs"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, bytes(8), None, "offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), None, "offsets"),
    "offsets swapped": ({"a": entry(offsets=(8, 0))}, bytes(8), None, "needs"),
    "too few bytes": ({"a": entry(offsets=(0, 7))}, bytes(8), None, "needs"),
    "offsets out of range": ({"a": entry(offsets=(0, 8))}, bytes(4), None, "truncated"),
    "far out of range": ({"a": entry(offsets=(2**60, 2**60 + 8))}, bytes(8), None, "hole"),
    "overlap": (
        {"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))},
        bytes(12),
        None,
        "overlaps",
    ),
    "hole": ({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24), None, "hole"),
    "hole at the start": ({"a": entry(offsets=(8, 16))}, bytes(16), None, "hole"),
    "bytes left over": ({"a": entry()}, bytes(9), None, "follow"),
    "half a byte": ({"a": entry("F4", (3,), (0, 2))}, bytes(2), None, "needs"),
    "metadata number": ({"__metadata__": {"epoch": 3}}, b"", None, "metadata"),
    "metadata list": ({"__metadata__": ["a"]}, b"", None, "metadata"),
    "half a character": ({"\ud800": entry("U8", (1,), (0, 1))}, bytes(1), None, "surrogates"),
    "half a character of text": ({"__metadata__": {"a": "\udfff"}}, b"", None, "surrogates"),
    "null": ({"a": None}, b"", None, "entry"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_named(tmp_path, defect):
    header, data, length, word = DEFECTS[defect]
    assert word in refused(file(tmp_path, header, data, length))


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 64, b"GGUF" * 9])
def test_garbage(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path)


def test_what_is_no_file(tmp_path):
    for path, word in ((tmp_path, "folder"), (tmp_path / "absent.safetensors", "not exist")):
        with pytest.raises(Refusal, match=word):
            open_model(path)


def test_a_truncated_file_is_named_with_numbers(tmp_path):
    path = file(tmp_path, {"a": entry("U8", (1000,), (0, 1000))}, bytes(1000))
    size = path.stat().st_size
    for cut in (size - 1, size - 500):
        with open(path, "r+b") as f:
            f.truncate(cut)
        said = refused(path)
        assert "truncated" in said
        assert f"{size:,}" in said
        assert f"{cut:,}" in said
    for cut in (30, 9, 3):
        with open(path, "r+b") as f:
            f.truncate(cut)
        refused(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = file(tmp_path, {"a": entry("U8", (1000,), (0, 1000))}, bytes(1000))
    with open_model(path) as source:
        with open(path, "r+b") as f:
            f.truncate(500)
        with pytest.raises((FormatError, Failure), match="truncated"):
            source.read(source.tensors["a"])


def test_legal_oddities(tmp_path):
    """Scalars, no elements, unaligned starts and headers, a leading space, no tensors at all."""
    header = {
        "flag": entry("U8", (), (0, 1)),
        "odd": entry("F32", (1,), (1, 5)),
        "none": entry("F16", (0, 7), (5, 5)),
        "six": entry("F6_E2M3", (4,), (5, 8)),
        "half": entry("F4", (2,), (8, 9)),
    }
    text = b" " + json.dumps(header).encode() + b"   "
    data = b"\x07" + np.float32(1.5).tobytes() + b"abc" + b"d"
    with open_model(file(tmp_path, text, data)) as source:
        read = {k: bytes(source.read(t)) for k, t in source.tensors.items()}
    assert read == {
        "flag": b"\x07",
        "odd": data[1:5],
        "none": b"",
        "six": b"abc",
        "half": b"d",
    }
    with open_model(file(tmp_path, b"{}      ")) as source:
        assert source.tensors == {}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_is_refused_or_means_what_it_says(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    header = {f"k{i}": entry("U8", (5,), (5 * i, 5 * i + 5)) for i in range(4)}
    raw = bytearray(file(folder, header, bytes(range(20))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0129,:[]{}" e-.')))
    path = folder / "m.safetensors"
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 3, len(raw)))])
    try:
        source = open_model(path)
    except FormatError:
        return
    with source:
        spans = sorted((t.offset, t.offset + t.nbytes) for t in source.tensors.values())
        assert sum(b - a for a, b in spans) == source.nbytes - spans[0][0] if spans else True
        for info in source.tensors.values():
            source.read(info)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes_never_escape(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("noise") / "m.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with contextlib.suppress(Refusal):
        open_model(path).close()


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda k: k != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
WHOLE = [d for d in BITS if BITS[d] >= 8]


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(WHOLE), shapes), max_size=8),
    st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_a_layout_is_what_the_reader_reads(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("layout") / "m.safetensors"
    entries = [Entry(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    layout = safetensors.layout(entries, metadata)
    rng = np.random.default_rng(1)
    content = {e.name: rng.bytes(e.nbytes) for e in entries}
    raw = bytearray(layout.size)
    for at, piece in layout.pieces:
        raw[at : at + len(piece)] = piece
    for e in entries:
        assert layout.offsets[e.name] % (BITS[e.dtype] // 8) == 0
        raw[layout.offsets[e.name] : layout.offsets[e.name] + e.nbytes] = content[e.name]
    path.write_bytes(raw)
    with open_model(path) as source:
        assert source.metadata == metadata
        assert {k: (t.dtype, t.shape) for k, t in source.tensors.items()} == tensors
        assert {k: bytes(source.read(t)) for k, t in source.tensors.items()} == content


KNOWN = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}


def test_the_library_reads_what_we_write(tmp_path):
    rng = np.random.default_rng(2)
    tensors = {
        f"{d}.{i}": (d, rng.integers(0, 2, (3, i)).astype(n))
        for d, n in KNOWN.items()
        for i in range(3)
    }
    entries = [Entry(k, d, x.shape) for k, (d, x) in tensors.items()]
    layout = safetensors.layout(entries, {"format": "pt", "note": "é \u2028"})
    raw = bytearray(layout.size)
    for at, piece in layout.pieces:
        raw[at : at + len(piece)] = piece
    for key, (_, x) in tensors.items():
        raw[layout.offsets[key] : layout.offsets[key] + x.nbytes] = x.tobytes()
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    theirs = library_numpy.load_file(path)
    assert theirs.keys() == tensors.keys()
    for key, (_, x) in tensors.items():
        np.testing.assert_array_equal(theirs[key], x)
    with library.safe_open(path, framework="numpy") as f:
        assert f.metadata() == {"format": "pt", "note": "é \u2028"}


def test_we_read_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(3)
    tensors = {
        f"{d}{i}": rng.integers(0, 2, (2, i)).astype(n) for d, n in KNOWN.items() for i in (0, 5)
    }
    path = tmp_path / "m.safetensors"
    library_numpy.save_file(tensors, path, metadata={"a": "b"})
    with open_model(path) as source:
        assert source.metadata == {"a": "b"}
        assert source.tensors.keys() == tensors.keys()
        for key, x in tensors.items():
            assert bytes(source.read(source.tensors[key])) == x.tobytes()
            assert source.tensors[key].shape == x.shape


def test_torch_writes_bf16_and_fp8_that_we_read(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.tensor([0.5, -3.0, 0.0, 1.75])
    kinds = {
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    path = tmp_path / "m.safetensors"
    save_file({name: values.to(kind) for name, kind in kinds.items()}, path)
    with open_model(path) as source:
        for name in kinds:
            info = source.tensors[name]
            assert info.dtype == name
            codes = np.frombuffer(source.read(info), np.uint16 if name == "BF16" else np.uint8)
            assert list(decode(codes, name)) == [0.5, -3.0, 0.0, 1.75]


def test_the_same_entries_give_the_same_bytes():
    entries = [Entry("b", "F16", (2,)), Entry("a", "F32", (3,)), Entry("c", "F16", (1,))]
    one, two = (safetensors.layout(entries, {"k": "v"}) for _ in range(2))
    assert one.pieces == two.pieces
    assert list(one.offsets) == ["a", "b", "c"]  # larger elements first, then as given


def test_save_and_load_of_these_tests(tmp_path):
    """The tests' own writer agrees with the library, so it may serve as a reference."""
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = save(tmp_path / "m.safetensors", {"x": ("F16", x)}, {"a": "b"})
    np.testing.assert_array_equal(library_numpy.load_file(path)["x"], x)
    assert load(path)[1] == {"a": "b"}
