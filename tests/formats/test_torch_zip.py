"""torch zip archives: against torch where it is installed, hand-made archives, and attacks.

What torch writes is read in both of its formats here; `test_torch_legacy` has the rest of the old.
"""

import contextlib
import io
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.errors import Failure, FormatError, Refusal
from plymix.formats import torch_legacy, torch_zip
from plymix.formats.base import BITS, Entry, Handle

GOLDEN_PICKLE = (
    b"\x80\x02}q\x00(X\x0a\x00\x00\x00state_dictq\x01}q\x02X\x01\x00\x00\x00wq\x03"
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x04((X\x07\x00\x00\x00storageq\x05"
    b"ctorch\nHalfStorage\nq\x06X\x01\x00\x00\x000q\x07X\x03\x00\x00\x00cpuq\x08K\x06tq\x09Q"
    b"K\x00K\x02K\x03\x86q\x0aK\x03K\x01\x86q\x0b\x89ccollections\nOrderedDict\nq\x0c)Rq\x0d"
    b"tq\x0eRq\x0fsX\x0b\x00\x00\x00global_stepq\x10K\x07u."
)
GOLDEN_DATA = bytes(range(12))
GOLDEN = {"m/data.pkl": GOLDEN_PICKLE, "m/data/0": GOLDEN_DATA, "m/version": b"3\n"}


def zipped(path, members, **options):
    """An archive by Python's zipfile: another writer than torch's, without padding."""
    with zipfile.ZipFile(path, "w", **options) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


def opened(path):
    with torch_zip.open_file(path) as source:
        return {name: bytes(source.read(info)) for name, info in source.tensors.items()}


def refusal(path, module=torch_zip):
    """Why `path` is refused, "" when it is not; any other error fails the test."""
    try:
        with module.open_file(path) as source:
            for info in source.tensors.values():
                assert info.nbytes <= 1 << 23
                source.read(info)
        return ""
    except FormatError as e:
        said = str(e)
    assert "\n" not in said
    assert path.name in said
    return said


@contextlib.contextmanager
def at_most(nbytes):
    """Fails when more than `nbytes` are taken from Python's heap at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


def written(path, entries, metadata, data):
    """The file that an engine makes of a layout: tensors last to first, then what is finished."""
    layout = torch_zip.layout(entries, metadata)
    covered = [(at, len(piece)) for at, piece in layout.pieces]
    covered += [(layout.offsets[e.name], e.nbytes) for e in entries]
    end = 0
    for at, n in sorted(covered):
        assert at == end, "a hole or an overlap"
        end = at + n
    assert end == layout.size
    with open(path, "wb") as f:
        for at, piece in layout.pieces:
            f.seek(at)
            f.write(piece)
        for e in reversed(entries):
            assert layout.offsets[e.name] % 64 == 0
            f.seek(layout.offsets[e.name])
            f.write(data[e.name])
    handle = Handle(path)
    patches = list(layout.finish(handle.read_at))
    handle.close()
    with open(path, "r+b") as f:
        for at, piece in patches:
            f.seek(at)
            f.write(piece)
    assert path.stat().st_size == layout.size
    return path


# ---- reading archives by other hands


def test_sniff():
    assert torch_zip.sniff(b"PK\x03\x04" + bytes(12))
    assert not torch_zip.sniff(b"PK\x05\x06" + bytes(12))
    assert not torch_zip.sniff(b"")


def test_a_hand_made_archive(tmp_path):
    path = zipped(tmp_path / "m.ckpt", GOLDEN)
    with torch_zip.open_file(path) as source:
        info = source.tensors["w"]
        assert (info.dtype, info.shape, info.strides) == ("F16", (2, 3), None)
        assert path.read_bytes()[info.offset :][:12] == GOLDEN_DATA
        assert source.read(info) == GOLDEN_DATA
        assert source.root == "state_dict"
        assert source.notes == ("beside the weights, ignored: global_step",)


@pytest.mark.parametrize("top", ["", "archive/", "a model (1) é/"])
def test_any_top_folder(tmp_path, top):
    members = {name.replace("m/", top): content for name, content in GOLDEN.items()}
    assert opened(zipped(tmp_path / "m.ckpt", members)) == {"w": GOLDEN_DATA}


def test_zip64_records_of_another_writer(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as z:
        for name, content in GOLDEN.items():
            with z.open(name, "w", force_zip64=True) as member:
                member.write(content)
    assert opened(tmp_path / "m.ckpt") == {"w": GOLDEN_DATA}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.npy": b"x"}, r"no torch checkpoint \(no data.pkl\): it holds 'a.npy'"),
        ({"a/model.ckpt": b"x"}, "unpack it"),
        ({**GOLDEN, "n/data.pkl": b"x"}, "several models"),
        ({**GOLDEN, "m/constants.pkl": b"x", "m/code/a.py": b""}, "TorchScript"),
        ({**GOLDEN, "m/byteorder": b"big"}, "big"),
        ({**GOLDEN, "m/data/0": b"x" * 11}, "should have 12 bytes and has 11"),
        ({"m/data.pkl": GOLDEN_PICKLE}, "storage '0' is not in the archive"),
        ({"m/data.pkl": b"\x80\x02]."}, "holds no state dict"),
        ({"m/data.pkl": b"\x80\x02cos\nsystem\n."}, "os.system"),
        ({"m/data.pkl": b""}, "ends too soon"),
    ],
)
def test_archives_that_are_refused(tmp_path, members, said):
    with pytest.raises(FormatError, match=said):
        torch_zip.open_file(zipped(tmp_path / "m.ckpt", members))


def test_compressed_members_are_refused(tmp_path):
    path = zipped(tmp_path / "m.ckpt", GOLDEN, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        torch_zip.open_file(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    members = {"m/data.pkl": bytes(1 << 28), "m/data/0": b""}
    path = zipped(tmp_path / "m.ckpt", members, compression=zipfile.ZIP_DEFLATED)
    with at_most(1 << 20):
        assert "compressed" in refusal(path)


def local(label, content, **changed):
    fields = {"flags": 0, "method": 0, "crc": zlib.crc32(content), "size": len(content), **changed}
    numbers = (20, fields["flags"], fields["method"], 0, 33, fields["crc"])
    sizes = (fields.get("packed", fields["size"]), fields["size"])
    name = fields.get("name", label)
    lengths = (len(name), fields.get("extra", 0))
    fixed = struct.pack("<4s5H3I2H", b"PK\x03\x04", *numbers, *sizes, *lengths)
    return fixed + name + content


def record(name, content, begin, **changed):
    fields = {"flags": 0, "method": 0, "crc": zlib.crc32(content), "size": len(content), **changed}
    numbers = (20, 20, fields["flags"], fields["method"], 0, 33, fields["crc"])
    sizes = (fields.get("packed", fields["size"]), fields["size"])
    lengths = (len(name), 0, 0, 0, 0, 0)
    at = fields.get("at", begin)
    return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *numbers, *sizes, *lengths, at) + name


def lying(path, locals_={}, records={}, end={}, members=GOLDEN):  # noqa: B006
    """The golden archive with fields changed in the headers of one member, or in the end."""
    body, directory = b"", b""
    for name, content in members.items():
        directory += record(name.encode(), content, len(body), **records.get(name, {}))
        body += local(name.encode(), content, **locals_.get(name, {}))
    said = {"count": len(members), "size": len(directory), "offset": len(body), **end}
    counts = (said["count"], said["count"], said["size"], said["offset"], 0)
    path.write_bytes(body + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *counts))
    return path


def test_the_lying_archive_is_sound_without_lies(tmp_path):
    assert opened(lying(tmp_path / "m.ckpt")) == {"w": GOLDEN_DATA}


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("records", {"flags": 1}, "encrypted"),
        ("records", {"method": 8}, "compressed"),
        ("records", {"at": 0}, "overlaps"),
        ("records", {"at": 1 << 31}, "overlaps"),
        ("records", {"size": 1 << 20}, "overlaps"),
        ("records", {"size": 1 << 20, "packed": 12}, "differs from the directory"),
        ("records", {"size": 0xFFFFFFFF}, "overlaps"),
        ("locals_", {"flags": 1}, "differs from the directory"),
        ("locals_", {"method": 8}, "differs from the directory"),
        ("locals_", {"size": 13}, "differs from the directory"),
        ("locals_", {"name": b"m/data/1"}, "differs from the directory"),
        ("locals_", {"extra": 4}, "overlaps"),
        ("end", {"count": 4}, "cut short"),
        ("end", {"count": 1}, "not in the archive"),
        ("end", {"size": 10}, "cut short"),
        ("end", {"size": 0xFFFFFF}, "outside the file"),
        ("end", {"size": 0xFFFFFFFF}, "claims"),
        ("end", {"offset": 3}, "damaged"),
        ("end", {"offset": 0xFFFFFFF0}, "outside the file"),
    ],
)
def test_directories_that_lie_are_refused(tmp_path, where, change, said):
    lie = change if where == "end" else {"m/data/0": change}
    path = lying(tmp_path / "m.ckpt", **{where: lie})
    with pytest.raises(FormatError, match=said):
        torch_zip.open_file(path)


def test_names_that_recur_are_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    zipped(path, GOLDEN)
    with zipfile.ZipFile(path, "a") as z, pytest.warns(UserWarning, match="Duplicate"):
        z.writestr("m/data/0", GOLDEN_DATA)
    with pytest.raises(FormatError, match="occurs twice"):
        torch_zip.open_file(path)


def test_a_wrong_checksum_of_the_pickle_is_refused_unless_it_was_left_out(tmp_path):
    path = lying(tmp_path / "m.ckpt", records={"m/data.pkl": {"crc": 1}})
    with pytest.raises(FormatError, match="checksum"):
        torch_zip.open_file(path)
    assert opened(lying(path, records={"m/data.pkl": {"crc": 0}})) == {"w": GOLDEN_DATA}


def test_a_directory_beyond_the_limits_is_not_read(tmp_path):
    path = tmp_path / "m.ckpt"
    directory = record(b"m/x", b"", 0) * 200_000
    record64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 200_000, 200_000, len(directory), 0
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(directory + record64 + locator + end)
    with at_most(1 << 20):
        assert "claims 200,000 members" in refusal(path)


def test_every_truncation_is_refused(tmp_path):
    whole = zipped(tmp_path / "m.ckpt", GOLDEN).read_bytes()
    cut = tmp_path / "cut.ckpt"
    for n in range(len(whole)):
        cut.write_bytes(whole[:n])
        assert "truncated" in refusal(cut)


@given(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=500)
def test_flipped_bytes_give_a_model_or_a_format_error(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp()
    data = bytearray(lying(folder / "m.ckpt", records={"m/data.pkl": {"crc": 0}}).read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    (folder / "flipped.ckpt").write_bytes(data)
    refusal(folder / "flipped.ckpt")


# ---- writing

dtypes = sorted(set(BITS) - {"F4", "F6_E2M3", "F6_E3M2"})
entries = st.lists(
    st.builds(
        Entry,
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(dtypes),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=6,
    unique_by=lambda e: e.name,
).filter(len)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
    max_size=3,
)


@given(entries, metadata, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(tmp_path_factory, entries, metadata, random):
    path = tmp_path_factory.getbasetemp() / "round.ckpt"
    data = {e.name: random.randbytes(e.nbytes) for e in entries}
    written(path, entries, metadata, data)
    assert opened(path) == data
    with torch_zip.open_file(path) as source:
        kept = [Entry(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        assert kept == entries
        assert source.metadata == metadata
        assert (source.root, source.notes) == ("state_dict", ())
    with zipfile.ZipFile(path) as z:  # an independent reader, and its own checksums
        assert z.testzip() is None
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        for i, e in enumerate(entries):
            assert z.read(f"archive/data/{i}") == data[e.name]
    first = path.read_bytes()
    assert written(path, entries, metadata, data).read_bytes() == first


def test_placeholders_replaced_in_the_pieces_keep_the_checksum_right(tmp_path):
    layout = torch_zip.layout([Entry("w", "F32", (2,))], {"hash": "#" * 64})
    path = tmp_path / "m.ckpt"
    with open(path, "wb") as f:
        for at, piece in layout.pieces:
            f.seek(at)
            f.write(piece.replace(b"#" * 64, b"a" * 64))
    handle = Handle(path)
    patches = list(layout.finish(handle.read_at))
    with open(path, "r+b") as f:
        for at, piece in patches:
            f.seek(at)
            f.write(piece)
    handle.close()
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    with torch_zip.open_file(path) as source:
        assert source.metadata == {"hash": "a" * 64}


def test_checksums_over_several_chunks(tmp_path):
    data = {"a": os.urandom(5 << 19), "b": os.urandom(1 << 20)}
    entries = [Entry(name, "U8", (len(content),)) for name, content in data.items()]
    with zipfile.ZipFile(written(tmp_path / "m.ckpt", entries, {}, data)) as z:
        assert z.testzip() is None


def test_a_failing_read_ends_the_checksums():
    def fail(_offset, _buffer):
        raise Failure("disk gone")

    layout = torch_zip.layout([Entry(str(i), "F32", (2,)) for i in range(9)], {})
    with pytest.raises(Failure, match="disk gone"):
        list(layout.finish(fail))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_a_dtype_that_torch_has_not_is_refused_by_name(dtype):
    with pytest.raises(Refusal, match=f"'w' is {dtype}"):
        torch_zip.layout([Entry("w", dtype, (8,))], {})


def beyond_4_gib(path, monkeypatch):
    """A sparse file with a tensor larger than 4 GiB and one after it; its data is zeros."""
    real = torch_zip._crc
    monkeypatch.setattr(torch_zip, "_crc", lambda r, at, n: real(r, at, n) if n < 1 << 20 else 0)
    big, small = Entry("big", "F16", (3, 1 << 30)), Entry("small", "F32", (3,))
    layout = torch_zip.layout([big, small], {})
    with open(path, "w+b") as f:
        f.truncate(layout.size)
        for at, piece in layout.pieces:
            f.seek(at)
            f.write(piece)
        f.seek(layout.offsets["big"] + big.nbytes - 2)
        f.write(b"\x00\x3c")  # 1.0
        f.seek(layout.offsets["small"])
        f.write(struct.pack("<3f", 1, 2, 3))
        f.flush()
        handle = Handle(path)
        for at, piece in list(layout.finish(handle.read_at)):
            f.seek(at)
            f.write(piece)
        handle.close()
    if os.stat(path).st_blocks * 512 > 1 << 28:
        path.unlink()
        pytest.skip("this disk has no sparse files")
    return layout


def test_beyond_4_gib(tmp_path, monkeypatch):
    path = tmp_path / "big.ckpt"
    layout = beyond_4_gib(path, monkeypatch)
    with torch_zip.open_file(path) as source:
        big, small = source.tensors["big"], source.tensors["small"]
        assert (big.offset, small.offset) == (layout.offsets["big"], layout.offsets["small"])
        assert small.offset > 1 << 32
        assert source.read(small) == struct.pack("<3f", 1, 2, 3)
    with zipfile.ZipFile(path) as z:
        assert z.getinfo("archive/data/0").file_size == 6 << 30
        assert z.read("archive/data/1") == struct.pack("<3f", 1, 2, 3)
        header = z.getinfo("archive/data/0").header_offset
    with open(path, "rb") as f:  # APPNOTE 4.5.3: both sizes stand in the local zip64 field
        f.seek(header + 18)
        assert f.read(8) == b"\xff" * 8
        f.seek(header + 30 + len("archive/data/0"))
        assert f.read(20) == struct.pack("<2H2Q", 1, 16, 6 << 30, 6 << 30)
    try:
        import torch
    except ImportError:
        return
    state = torch.load(path, mmap=True, weights_only=True)["state_dict"]
    assert state["big"][2, -1] == 1
    assert state["small"].tolist() == [1, 2, 3]


# ---- torch itself


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def raw(tensor):
    """The bytes of a torch tensor in row-major order."""
    import torch

    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage())


def zoo(torch):
    base = torch.arange(60.0)
    tied = torch.randn(3, 4)
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 uint32"
        " uint64 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
    )
    return {
        **{n: torch.arange(6).reshape(2, 3).to(getattr(torch, n)) for n in names.split()},
        "slice": base[10:20],
        "columns": base.reshape(6, 10)[:, 3:5],
        "transposed": base.reshape(6, 10).t(),
        "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3).expand(4, 3),
        "row": base[7].expand(1, 1),
        "tied_a": tied,
        "tied_b": tied,
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided_empty": base[60:],
        "v_pred": torch.tensor([]),
    }


@pytest.fixture(params=[torch_zip, torch_legacy], ids=["zip", "legacy"])
def saved(request, tmp_path, torch):
    """(the module for a format, a function that saves an object in it)"""

    def save(value, **options):
        path = tmp_path / "m.ckpt"
        new = request.param is torch_zip
        torch.save(value, path, _use_new_zipfile_serialization=new, **options)
        assert [m.sniff(path.read_bytes()[:262]) for m in (torch_zip, torch_legacy)] == [
            new,
            not new,
        ]
        return path

    return request.param, save


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_writes(saved, torch, protocol):
    module, save = saved
    state = zoo(torch)
    path = save({"state_dict": state}, pickle_protocol=protocol)
    with module.open_file(path) as source:
        assert list(source.tensors) == list(state)
        for name, tensor in state.items():
            info = source.tensors[name]
            assert info.shape == tuple(tensor.shape), name
            assert (info.strides is None) == (tensor.is_contiguous() or not info.numel), name
            assert bytes(source.read(info)) == raw(tensor), name
        assert source.tensors["tied_a"].offset == source.tensors["tied_b"].offset
        assert source.tensors["float8_e4m3fn"].dtype == "F8_E4M3"
        assert source.tensors["bfloat16"].dtype == "BF16"


def test_a_lightning_checkpoint(saved, torch, monkeypatch):
    import sys
    import types
    from collections import defaultdict

    import numpy as np

    foreign = types.ModuleType("pytorch_lightning.fake")

    class ModelCheckpoint:
        def __init__(self):
            self.best = torch.tensor(3.0)

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = foreign.__name__, "ModelCheckpoint"
    foreign.ModelCheckpoint = ModelCheckpoint
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "global_step": np.int64(7),
        "loss": np.float32(0.5),
        "history": np.arange(5),
        "callbacks": {ModelCheckpoint: ModelCheckpoint(), "set": {1, 2}},
        "junk": defaultdict(list, {"a": [[[{(1, 2): [None] * 50}]]] * 100}),
        "optimizer_states": [optimizer.state_dict()],
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "state_dict": model.state_dict(),
    }
    module, save = saved
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", foreign)
        patch.setitem(sys.modules, "pytorch_lightning.fake", foreign)
        path = save(value)
    with module.open_file(path) as source:
        for name, tensor in model.state_dict().items():
            assert bytes(source.read(source.tensors[name])) == raw(tensor)
        assert source.notes == ("beside the weights, ignored: " + ", ".join(list(value)[:10]),)
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.filterwarnings("ignore")  # some of these kinds are on their way out of torch
@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested", "conjugate", "whole model"])
def test_other_kinds_of_tensors_are_refused_by_name(saved, torch, kind):
    if kind == "sparse":
        value = {"w": torch.eye(3).to_sparse()}
    elif kind == "quantized":
        value = {"w": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)}
    elif kind == "nested":
        value = {"w": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}
    elif kind == "conjugate":
        value = {"w": torch.zeros(3, dtype=torch.complex64).conj()}
    else:
        value = torch.nn.Linear(2, 2)
    module, save = saved
    with pytest.raises(FormatError, match=r"'w' is|torch.nn.modules.linear.Linear"):
        module.open_file(save(value))


def test_an_attack_by_reduce(saved, torch, tmp_path):
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    module, save = saved
    path = save({"state_dict": {"w": torch.zeros(2)}, "extra": Attack()})
    with pytest.raises(FormatError, match=r"(posix|nt)\.system"):
        module.open_file(path)
    assert not marker.exists()


def test_checksums_left_out_by_torch(tmp_path, torch):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "m.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert opened(tmp_path / "m.ckpt") == {"w": struct.pack("<4f", 0, 1, 2, 3)}


@pytest.mark.parametrize("cut", range(20))
def test_truncated_files_by_torch(saved, torch, cut):
    module, save = saved
    path = save({"state_dict": zoo(torch)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * cut // 20])
    assert refusal(path, module)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path, torch, mmap):
    state = {n: t.contiguous() for n, t in zoo(torch).items()}
    path = tmp_path / "from torch.ckpt"
    torch.save(state, path)
    with torch_zip.open_file(path) as source:
        entries = [Entry(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        data = {t.name: bytes(source.read(t)) for t in source.tensors.values()}
    about = {"sd_merge_recipe": '{"é": 1}', "format": "pt"}
    path = written(tmp_path / "written.ckpt", entries, about, data)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["metadata"] == about
    assert list(loaded["state_dict"]) == list(state)
    for name, tensor in state.items():
        got = loaded["state_dict"][name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert raw(got) == raw(tensor), name
        assert got.is_contiguous()
    loaded = torch.load(path, weights_only=False)
    assert list(loaded["state_dict"]) == list(state)
    path = written(tmp_path / "plain.ckpt", entries, {}, data)
    assert list(torch.load(path, weights_only=True)) == ["state_dict"]


def test_the_pickle_is_protocol_2_with_known_opcodes():
    import pickletools

    entries = [Entry("a", "F8_E4M3", (70_000,)), Entry("b", "F32", (1 << 33,))]
    piece = next(p for _, p in torch_zip.layout(entries, {"k": "v"}).pieces if b"data.pkl" in p)
    code = piece[piece.index(b"\x80\x02") :]
    out = io.StringIO()
    pickletools.dis(code, out)
    assert "highest protocol among opcodes = 2" in out.getvalue()
    assert str(1 << 33) in out.getvalue()
    assert math.prod(entries[1].shape) == 1 << 33
    assert pickle.PROTO == b"\x80"
