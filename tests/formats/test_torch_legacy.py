"""The old torch format: a hand-assembled file and its variations.

Files by torch itself are read in `test_torch_zip`, in both formats.
"""

import contextlib
import io
import pickle
import struct
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.errors import FormatError
from plymix.formats import safetensors, torch_legacy, torch_zip

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = b"\x80\x02M\xe9\x03."
MACHINE = (
    b"\x80\x02}(X\x10\x00\x00\x00protocol_versionM\xe9\x03X\x0d\x00\x00\x00little_endian\x88u."
)


def text(s):
    return b"X" + len(s).to_bytes(4, "little") + s.encode()


def tensor(kind, key, numel, length, view=b"N", offset=0):
    """A tensor of one dimension; `view` is the sixth field of the persistent id."""
    pid = b"(" + text("storage") + b"ctorch\n%s\n" % kind.encode() + text(key) + text("cuda:0")
    pid += b"K%c" % numel + view + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    rest = b"K%cK%c\x85K\x01\x85\x89" % (offset, length) + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + rest + b"tR"


STATE = (
    b"\x80\x02}(" + text("epoch") + b"K\x03" + text("state_dict") + b"}("
    + text("half") + tensor("HalfStorage", "111", 4, 4)
    + text("part") + tensor("LongStorage", "222", 3, 2, offset=1)
    + text("view") + tensor("HalfStorage", "111", 4, 2, b"(" + text("v") + b"K\x02K\x02t")
    + b"uu."
)  # fmt: skip
KEYS = b"\x80\x02](" + text("222") + text("111") + b"e."
DATA = struct.pack("<4q", 3, -1, 5, 6) + struct.pack("<q4e", 4, 1, 2, 3, 4)
GOLDEN = MAGIC + PROTOCOL + MACHINE + STATE + KEYS + DATA


def opened(path, data=GOLDEN):
    path.write_bytes(data)
    with torch_legacy.open_file(path) as source:
        return {name: bytes(source.read(info)) for name, info in source.tensors.items()}


def test_a_hand_made_file(tmp_path):
    assert opened(tmp_path / "m.ckpt") == {
        "half": struct.pack("<4e", 1, 2, 3, 4),
        "part": struct.pack("<2q", 5, 6),
        "view": struct.pack("<2e", 3, 4),
    }
    with torch_legacy.open_file(tmp_path / "m.ckpt") as source:
        assert [t.dtype for t in source.tensors.values()] == ["F16", "I64", "F16"]
        assert source.root == "state_dict"
        assert source.notes == ("beside the weights, ignored: epoch",)


def test_sniff_tells_the_neighbours_apart():
    assert torch_legacy.sniff(GOLDEN[:64])
    for protocol in (2, 3, 4, 5):
        assert torch_legacy.sniff(pickle.dumps({"a": 1}, protocol)[:64])
    for length in (0x280, 0x380, 0x480, 0x580, 0x50280):  # headers that begin as a pickle does
        head = length.to_bytes(8, "little") + b'{"a":{"dtype":"F32"'
        assert safetensors.sniff(head)
        assert not torch_legacy.sniff(head)
    assert not torch_legacy.sniff(b"")
    assert not torch_legacy.sniff(b"PK\x03\x04")
    assert not torch_zip.sniff(GOLDEN[:64])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps({"w": [1.0, 2.0]}, 4), "plain pickle"),
        (b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR.", "posix.system"),
        (MAGIC + b"\x80\x02M\xea\x03." + GOLDEN[len(MAGIC + PROTOCOL) :], "not those of torch"),
        (GOLDEN.replace(b"little_endian\x88", b"little_endian\x89"), "big-endian"),
        (GOLDEN.replace(KEYS, b"\x80\x02}."), "its list of storages"),
        (GOLDEN.replace(KEYS, b"\x80\x02](" + text("222") * 2 + b"e."), "its list of storages"),
        (GOLDEN.replace(KEYS, b"\x80\x02](" + text("333") + b"e."), "its list of storages"),
        (GOLDEN.replace(KEYS, b"\x80\x02](" + text("222") + b"e."), "storage '111' is missing"),
        (GOLDEN.replace(DATA[:8], b"\x02" + bytes(7)), "another size"),
        (GOLDEN.replace(DATA[:8], b"\xff" * 8), "another size"),
        (GOLDEN[:-1], "truncated"),
    ],
)
def test_files_that_are_refused(tmp_path, data, said):
    with pytest.raises(FormatError, match=said):
        opened(tmp_path / "m.ckpt", data)


def test_the_tar_form_is_refused_by_name(tmp_path):
    path = tmp_path / "m.pt"
    with tarfile.open(path, "w") as tar:
        for member in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    assert torch_legacy.sniff(path.read_bytes()[:262])
    with pytest.raises(FormatError, match=r"tar archive, as torch 0\.1 wrote"):
        torch_legacy.open_file(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    for n in range(1, len(GOLDEN)):
        with pytest.raises(FormatError) as e:
            opened(path, GOLDEN[:n])
        assert "m.ckpt" in str(e.value)
        assert "\n" not in str(e.value)


@given(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=500)
def test_flipped_bytes_give_a_model_or_a_format_error(tmp_path_factory, changes):
    data = bytearray(GOLDEN)
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(FormatError):
        opened(tmp_path_factory.getbasetemp() / "flipped.ckpt", bytes(data))
