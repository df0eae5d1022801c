"""torch checkpoints before 1.6: five pickles in a row, then the storages.

A magic number, the protocol (1001), facts about the machine, the object (see `unpickle`), the list
of storage keys; then per key a 64-bit count of elements and the elements. Source: torch's
`torch/serialization.py` (`_legacy_save`), which still writes it on request.
"""

from __future__ import annotations

import io
import pickle as op
from pathlib import Path
from typing import Any

from plymix.errors import FormatError
from plymix.formats.base import OpenFile, Source, opened
from plymix.formats.unpickle import (
    Storage,
    Unpickled,
    damaged,
    element_size,
    find_state_dict,
    load,
    tensor_infos,
)

name = "torch legacy"
suffixes = (".ckpt", ".pt", ".pth", ".bin")

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_BLOCK = 64 << 10  # bytes read ahead


def sniff(head: bytes) -> bool:
    """Whether `head` (its first 262 bytes, if possible) begins this format or a near relative.

    The relatives (a plain pickle, the tar archives of torch 0.1) are claimed to be refused by
    name. A safetensors file whose header has 0x280 bytes begins as a pickle does.
    """
    pickled = head[:1] == op.PROTO and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    safetensors = head[4:8] == bytes(4) and head[8:10].lstrip()[:1] == b"{"
    return (pickled and not safetensors) or _is_tar(head)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def open_file(path: Path) -> Source:
    """Read the pickles of `path` and place its storages. Nothing in the file is run.

    Raises FormatError when the file is damaged, hostile, of another kind or not a state dict.
    """
    return opened(path, _open)


def _open(handle: OpenFile) -> Source:
    file = handle.path.name
    if _is_tar(handle.head(262)):
        raise FormatError(
            f"{file} is a tar archive, as torch 0.1 wrote; load it with an old torch and save its"
            " state_dict() again"
        )
    stream = io.BufferedReader(_Bytes(handle), _BLOCK)
    at = 0

    def following() -> Unpickled:
        nonlocal at
        read = load(stream, file, handle.size - at)
        at += read.nbytes
        return read

    if following().value != MAGIC:
        raise FormatError(
            f"{file} is a plain pickle, not a checkpoint by torch.save;"
            " load it where it comes from and save its tensors with torch or safetensors"
        )
    protocol, machine = following().value, following().value
    if protocol != PROTOCOL or type(machine) is not dict:
        raise damaged(file, "its first pickles are not those of torch")
    if machine.get("little_endian") is False:
        raise FormatError(
            f"{file} was written on a big-endian machine; only little-endian files are read:"
            " load and save it on an ordinary computer"
        )
    written = following()
    keys = following().value
    starts = _starts(handle, at, keys, written)
    found = find_state_dict(written.value, file)

    def start(storage: Storage) -> int:
        if storage.key not in starts:
            raise damaged(file, f"storage {storage.key[:80]!r} is missing")
        return starts[storage.key]

    tensors = tensor_infos(found, start)
    return Source(handle.path, name, tensors, found.metadata, found.notes, found.root, (handle,))


def _starts(handle: OpenFile, at: int, keys: Any, written: Unpickled) -> dict[str, int]:
    """Where each storage's bytes begin, by key. Raises FormatError where the sizes disagree."""
    file = handle.path.name
    if type(keys) is not list:
        raise damaged(file, "its list of storages is none")
    starts: dict[str, int] = {}
    for key in keys:
        if type(key) is not str or key not in written.storages or key in starts:
            raise damaged(file, "its list of storages differs from those of its tensors")
        storage = written.storages[key]
        counted = int.from_bytes(handle.head(8, at), "little") * element_size(storage.kind)
        starts[key] = at + 8
        at += 8 + storage.nbytes
        if at > handle.size:
            raise FormatError(
                f"{file} is truncated: its storages end at byte {at:,} or later and the file has"
                f" {handle.size:,}; fetch it again"
            )
        if counted != storage.nbytes:
            raise damaged(file, f"storage {key[:80]!r} has another size than its tensors say")
    return starts


class _Bytes(io.RawIOBase):
    """A file from its first byte on, for `io.BufferedReader`."""

    def __init__(self, handle: OpenFile) -> None:
        self._handle = handle
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        n = min(len(out), self._handle.size - self._at)
        self._handle.read_at(self._at, memoryview(out)[:n])
        self._at += n
        return n
