"""torch checkpoints since 1.6 (.ckpt, .pt, .pth, .bin): a zip archive of a pickle and raw storages.

Under one top folder: `data.pkl` describes the tensors (see `unpickle`), `data/<key>` is a storage,
stored and not compressed, so that a tensor is a byte range of the archive. Sources: torch's
`torch/serialization.py` and PKWARE's APPNOTE.TXT 6.3.10 for zip and zip64.

The archive's own directory is read here rather than with `zipfile`, which loads one of any size
and believes it: entries that overlap, lie outside the file or differ from their local header are
refused, and nothing is ever decompressed.
"""

from __future__ import annotations

import io
import math
import pickle as op
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from plymix.errors import FormatError, Refusal, listed
from plymix.formats.base import BITS, Entry, Layout, OpenFile, Piece, Source, opened
from plymix.formats.unpickle import (
    DTYPES,
    MAX_BYTES,
    STORAGES,
    Storage,
    damaged,
    find_state_dict,
    load,
    tensor_infos,
)

name = "torch zip"
suffixes = (".ckpt", ".pt", ".pth", ".bin")

MAX_MEMBERS = 100_000
MAX_DIRECTORY = 64 << 20
ALIGNMENT = 64  # of storages, as in torch's own files
U16, U32 = 0xFFFF, 0xFFFFFFFF  # a field with this value has its real one in a zip64 record

# signature, version, flags, method, time, date, CRC-32, packed and real size, lengths of name and
# extra field; the name and the extra field follow
_LOCAL = Struct("<4s5H3I2H")
# signature, made by, version, flags, method, time, date, CRC-32, packed and real size, lengths of
# name, extra field and comment, disk, attributes inside and outside, offset of the local header
_RECORD = Struct("<4s6H3I5H2I")
# signature, disk, directory's disk, entries here, entries, size and offset of the directory,
# length of the comment
_END = Struct("<4s4H2IH")
# signature, size of the rest, made by, version, disk, directory's disk, entries here, entries,
# size and offset of the directory
_END64 = Struct("<4sQ2H2I4Q")
_LOCATOR64 = Struct("<4sIQI")  # signature, disk, offset of the record above, disks
_LOCAL_SIGN, _RECORD_SIGN, _END_SIGN = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64_SIGN, _LOCATOR64_SIGN = b"PK\x06\x06", b"PK\x06\x07"
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 8, 0x800  # flags
_ZIP64, _PADDING = 1, 0x4246  # ids of extra fields; torch pads with "FB"
_FIELD = Struct("<2H")  # of an extra field: id, bytes
_LOCAL_CRC, _RECORD_CRC = 14, 16  # where the CRC-32 stands in the two headers
_VERSION = 45  # of zip, the one with zip64
_CHUNK = 1 << 20
_DATE = 1 << 5 | 1  # 1980-01-01, the first day a zip can name: the same input, the same bytes


def sniff(head: bytes) -> bool:
    """Whether `head` (the first 16 bytes or more) begins a zip archive."""
    return head[:4] == _LOCAL_SIGN


# ---- reading


class _Member(NamedTuple):
    header: int  # offset of its local header
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    nbytes: int
    limit: int = 0  # where the next member or the directory begins


def open_file(path: Path) -> Source:
    """Read the directory and the pickle of `path`. Nothing in the file is run.

    Raises FormatError when the archive is damaged, hostile, compressed or not a state dict.
    """
    return opened(path, _open)


def _open(handle: OpenFile) -> Source:
    file = handle.path.name
    members = _directory(handle)
    top = _top(members, file)
    order = members.get(f"{top}byteorder")
    if order and (said := _content(handle, order)) != b"little":
        raise FormatError(
            f"{file} holds {said[:16]!r}-endian numbers; only little-endian files are read:"
            " load and save it on an ordinary computer"
        )
    pickle = _content(handle, members[f"{top}data.pkl"])
    found = find_state_dict(load(io.BytesIO(pickle), file, len(pickle)).value, file)
    starts: dict[str, int] = {}

    def start(storage: Storage) -> int:
        if storage.key not in starts:
            member = members.get(f"{top}data/{storage.key}")
            if member is None:
                raise FormatError(f"{file}: storage {storage.key[:80]!r} is not in the archive")
            if member.nbytes < storage.start + storage.nbytes:
                raise FormatError(
                    f"{file}: storage {storage.key[:80]!r} should have {storage.nbytes:,} bytes"
                    f" and has {member.nbytes:,}; fetch the file again"
                )
            starts[storage.key] = _start(handle, member)
        return starts[storage.key]

    tensors = tensor_infos(found, start)
    return Source(handle.path, name, tensors, found.metadata, found.notes, found.root, (handle,))


def _directory(handle: OpenFile) -> dict[str, _Member]:
    """The members by name, checked against each other and the size of the file."""
    file = handle.path.name
    tail_at = max(0, handle.size - _END.size - U16 - _LOCATOR64.size)
    tail = handle.head(handle.size, tail_at)
    end_at = tail.rfind(_END_SIGN)
    if end_at < 0 or len(tail) - end_at < _END.size:
        raise FormatError(
            f"{file} is truncated: the directory at the end of the zip archive is missing;"
            " fetch it again"
        )
    *_, count, size, offset, _ = _END.unpack_from(tail, end_at)
    end = tail_at + end_at
    locator = tail[max(0, end_at - _LOCATOR64.size) : end_at]
    if locator[:4] == _LOCATOR64_SIGN:
        end = _LOCATOR64.unpack(locator)[2]
        record = handle.head(_END64.size, end) if end < handle.size else b""
        if len(record) < _END64.size or record[:4] != _END64_SIGN:
            raise damaged(file, "its zip64 record is missing")
        *_, count, size, offset = _END64.unpack(record)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise damaged(file, f"it claims {count:,} members in a directory of {size:,} bytes")
    if offset + size > end:
        raise damaged(file, "its directory lies outside the file")
    try:
        members = _parsed(handle.head(size, offset), count)
        return _placed(members, offset)
    except (StructError, ValueError) as e:
        what = str(e) if type(e) is ValueError else "its directory is cut short"
        raise damaged(file, what) from None


def _parsed(directory: bytes, count: int) -> list[_Member]:
    """The directory's records. Raises ValueError or struct's error when they are unsound."""
    members = []
    at = 0
    for _ in range(count):
        sign, _, _, flags, method, _, _, crc, *rest = _RECORD.unpack_from(directory, at)
        packed, nbytes, n_name, n_extra, n_comment, _, _, _, header = rest
        if sign != _RECORD_SIGN:
            raise ValueError("its directory is damaged")
        at += _RECORD.size
        label = _decoded(directory[at : at + n_name], flags)
        extra = directory[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if U32 in (packed, nbytes, header):
            nbytes, packed, header = _widened(extra, nbytes, packed, header)
        members.append(_Member(header, label, flags, method, crc, packed, nbytes))
    return members


def _decoded(raw_name: bytes, flags: int) -> str:
    return raw_name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")


def _widened(extra: bytes, *fields: int) -> tuple[int, ...]:
    """`fields` with those that do not fit 32 bits taken from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, n = _FIELD.unpack_from(extra, at)
        if kind == _ZIP64:
            wide = iter(Struct(f"<{n // 8}Q").unpack_from(extra, at + 4))
            return tuple(next(wide, f) if f == U32 else f for f in fields)
        at += 4 + n
    return fields


def _placed(members: Sequence[_Member], end: int) -> dict[str, _Member]:
    """The members by name. Raises ValueError for names that recur and ranges that overlap."""
    placed: dict[str, _Member] = {}
    ordered = sorted(members)
    limits = [*(m.header for m in ordered[1:]), end]
    for member, limit in zip(ordered, limits, strict=False):
        if member.name in placed:
            raise ValueError(f"member {member.name[:80]!r} occurs twice")
        if member.header + _LOCAL.size + len(member.name) + member.packed > limit:
            raise ValueError(f"member {member.name[:80]!r} overlaps what follows it")
        placed[member.name] = member._replace(limit=limit)
    return placed


def _top(members: Mapping[str, _Member], file: str) -> str:
    """The folder in the archive that holds everything, with its slash."""
    tops = [m[: -len("data.pkl")] for m in members if m in ("data.pkl", _folder(m) + "data.pkl")]
    if len(tops) != 1:
        what = "several models" if tops else "no torch checkpoint (no data.pkl)"
        held = listed((repr(m[:40]) for m in members), 5)
        raise FormatError(
            f"{file} is a zip archive with {what}: it holds {held};"
            " unpack it and name the model file in it"
        )
    if f"{tops[0]}constants.pkl" in members:
        raise FormatError(
            f"{file} is a TorchScript program, not a checkpoint: save the model's state_dict()"
        )
    return tops[0]


def _folder(member: str) -> str:
    return member.partition("/")[0] + "/"


def _start(handle: OpenFile, member: _Member) -> int:
    """Where the member's bytes begin, by its local header. Raises FormatError when it differs."""
    file, label = handle.path.name, member.name[:80]
    if member.flags & _ENCRYPTED:
        raise FormatError(f"{file}: member {label!r} is encrypted; save the model without")
    if member.method:
        raise FormatError(
            f"{file}: member {label!r} is compressed, which torch never does;"
            " unpack the archive and zip it stored (zip -0 -r), or save the model again with torch"
        )
    # in UTF-8 a name takes up to four bytes per character
    head = handle.head(_LOCAL.size + 4 * len(member.name), member.header)
    sign, _, flags, method, _, _, _, packed, nbytes, n_name, n_extra = _LOCAL.unpack_from(head)
    same_name = _decoded(head[_LOCAL.size : _LOCAL.size + n_name], flags) == member.name
    same_size = flags & _SIZES_FOLLOW or {packed, nbytes} <= {member.nbytes, U32}
    if sign != _LOCAL_SIGN or method or flags & _ENCRYPTED or not same_name or not same_size:
        raise damaged(file, f"the header of member {label!r} differs from the directory")
    start = int(member.header + _LOCAL.size + n_name + n_extra)
    if member.packed != member.nbytes or start + member.nbytes > member.limit:
        raise damaged(file, f"member {label!r} overlaps what follows it")
    return start


def _content(handle: OpenFile, member: _Member) -> bytes:
    """All bytes of a small member."""
    file, label = handle.path.name, member.name[:80]
    start = _start(handle, member)
    if member.nbytes > MAX_BYTES:
        raise damaged(file, f"member {label!r} has {member.nbytes:,} bytes")
    content = handle.head(member.nbytes, start)
    # torch leaves the checksum 0 under torch.serialization.set_crc32_options(False)
    if member.crc and zlib.crc32(content) != member.crc:
        raise damaged(file, f"the checksum of member {label!r} is wrong")
    return content


# ---- writing

_CLASSES = {dtype: storage for storage, dtype in STORAGES.items()}
_ATTRIBUTES = {dtype: attribute for attribute, dtype in DTYPES.items()}


def layout(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Layout:
    """Where everything goes in an archive that torch.load(weights_only=True, mmap=...) opens.

    It holds {"state_dict": {name: tensor}, "metadata": {...}}, the latter where there is any; each
    storage begins at a multiple of 64 bytes. `finish` reads the whole file for its checksums, by
    four threads. Raises Refusal for a dtype that torch has not.
    """
    contents: list[tuple[str, int, bytes]] = [  # label, bytes, those known now
        *((label, len(c), c) for label, c in _known(entries, metadata)),
        *((f"data/{i}", e.nbytes, b"") for i, e in enumerate(entries)),
    ]
    pieces: list[Piece] = []
    members: list[tuple[bytes, int, int, int]] = []  # name, offsets of header and data, bytes
    at = 0
    for label, nbytes, known in contents:
        member = f"archive/{label}".encode()
        header = _local_header(member, nbytes, at)
        pieces.append((at, header + known))
        members.append((member, at, at + len(header), nbytes))
        at += len(header) + nbytes
    records = [_record(member, nbytes, header) for member, header, _, nbytes in members]
    places = list(accumulate((len(r) for r in records), initial=at))
    pieces.append((at, b"".join(records) + _end(len(records), at, places[-1])))

    def finish(read_at: Callable[[int, Any], None]) -> Iterable[Piece]:
        with ThreadPoolExecutor(4) as pool:
            crcs = pool.map(lambda m: _crc(read_at, m[2], m[3]), members)
            for crc, (_, header, _, _), place in zip(crcs, members, places[:-1], strict=True):
                yield header + _LOCAL_CRC, crc.to_bytes(4, "little")
                yield place + _RECORD_CRC, crc.to_bytes(4, "little")

    storages = members[len(members) - len(entries) :]
    offsets = {e.name: data for e, (_, _, data, _) in zip(entries, storages, strict=True)}
    return Layout(offsets, at + len(pieces[-1][1]), pieces, finish)


def _known(entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[tuple[str, bytes]]:
    """The members that are not storages. torch takes the top folder's name from the first."""
    return [("data.pkl", _pickle(entries, metadata)), ("byteorder", b"little"), ("version", b"3\n")]


def _local_header(member: bytes, nbytes: int, at: int) -> bytes:
    """The local header at offset `at`, padded so that the member's bytes are aligned."""
    extra = _wide_field(nbytes, nbytes) if nbytes >= U32 else b""
    padding = -(at + _LOCAL.size + len(member) + len(extra) + 4) % ALIGNMENT
    extra += _FIELD.pack(_PADDING, padding) + bytes(padding)
    size = min(nbytes, U32)
    fixed = _LOCAL.pack(
        _LOCAL_SIGN, _VERSION, 0, 0, 0, _DATE, 0, size, size, len(member), len(extra)
    )
    return fixed + member + extra


def _record(member: bytes, nbytes: int, header: int) -> bytes:
    """The member's record in the directory."""
    wide = [nbytes] * 2 * (nbytes >= U32) + [header] * (header >= U32)
    extra = _wide_field(*wide) if wide else b""
    size = min(nbytes, U32)
    lengths = (len(member), len(extra), 0)
    fixed = _RECORD.pack(
        _RECORD_SIGN, _VERSION, _VERSION, 0, 0, 0, _DATE, 0, size, size, *lengths, 0, 0, 0,
        min(header, U32),
    )  # fmt: skip
    return fixed + member + extra


def _wide_field(*values: int) -> bytes:
    return _FIELD.pack(_ZIP64, 8 * len(values)) + Struct(f"<{len(values)}Q").pack(*values)


def _end(count: int, directory: int, end: int) -> bytes:
    """What follows the directory, which lies from `directory` to `end`."""
    size = end - directory
    wide = b""
    if count >= U16 or end >= U32:
        rest = _END64.size - 12
        counts = (count, count, size, directory)
        wide = _END64.pack(_END64_SIGN, rest, _VERSION, _VERSION, 0, 0, *counts)
        wide += _LOCATOR64.pack(_LOCATOR64_SIGN, 0, end, 1)
    short = min(count, U16)
    return wide + _END.pack(_END_SIGN, 0, 0, short, short, min(size, U32), min(directory, U32), 0)


def _crc(read_at: Callable[[int, Any], None], at: int, nbytes: int) -> int:
    """CRC-32 of a range of the file."""
    crc = 0
    buffer = memoryview(bytearray(min(nbytes, _CHUNK)))
    while nbytes:
        chunk = buffer[: min(nbytes, _CHUNK)]
        read_at(at, chunk)
        crc = zlib.crc32(chunk, crc)
        at += len(chunk)
        nbytes -= len(chunk)
    return crc


def _pickle(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """{"state_dict": {name: tensor}, "metadata": {text: text}} as torch itself would pickle it."""
    memo: dict[bytes, int] = {}

    def once(code: bytes) -> bytes:
        if code in memo:
            return op.BINGET + bytes([memo[code]])
        memo[code] = len(memo)
        return code + op.BINPUT + bytes([memo[code]])

    def known(dotted: str) -> bytes:
        module, _, attribute = dotted.rpartition(".")
        return once(op.GLOBAL + f"{module}\n{attribute}\n".encode())

    def tensor(i: int, e: Entry) -> bytes:
        typed = e.dtype in _CLASSES
        if not typed and e.dtype not in _ATTRIBUTES:
            raise Refusal(
                f"{e.name!r} is {e.dtype}, which a torch checkpoint cannot hold;"
                " write .safetensors, or choose another output dtype"
            )
        storage = _tuple(
            once(_text("storage")),
            known(f"torch.{_CLASSES[e.dtype]}" if typed else "torch.storage.UntypedStorage"),
            _text(str(i)),
            once(_text("cpu")),
            _integer(e.nbytes * 8 // BITS[e.dtype] if typed else e.nbytes),
        )
        row = [math.prod(e.shape[d + 1 :]) for d in range(len(e.shape))]
        arguments = [
            storage + op.BINPERSID,
            _integer(0),
            _tuple(*map(_integer, e.shape)),
            _tuple(*map(_integer, row)),
            op.NEWFALSE,
            known("collections.OrderedDict") + op.EMPTY_TUPLE + op.REDUCE,
        ]
        if not typed:
            arguments.append(known(f"torch.{_ATTRIBUTES[e.dtype]}"))
        rebuild = known(f"torch._utils._rebuild_tensor_v{2 if typed else 3}")
        return rebuild + _tuple(*arguments) + op.REDUCE

    tensors = _dict((_text(e.name), tensor(i, e)) for i, e in enumerate(entries))
    about = _dict((_text(k), _text(v)) for k, v in metadata.items())
    top = [(_text("state_dict"), tensors), (_text("metadata"), about)]
    return op.PROTO + b"\x02" + _dict(top if metadata else top[:1]) + op.STOP


def _text(text: str) -> bytes:
    utf8 = text.encode("utf-8", "surrogatepass")
    return op.BINUNICODE + len(utf8).to_bytes(4, "little") + utf8


def _integer(n: int) -> bytes:
    if n < 1 << 8:
        return op.BININT1 + n.to_bytes(1, "little")
    if n < 1 << 31:
        return op.BININT + n.to_bytes(4, "little")
    return op.LONG1 + b"\x09" + n.to_bytes(9, "little")


def _tuple(*items: bytes) -> bytes:
    return op.MARK + b"".join(items) + op.TUPLE


def _dict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return op.EMPTY_DICT + op.MARK + b"".join(k + v for k, v in items) + op.SETITEMS
