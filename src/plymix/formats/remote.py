"""A file on the web, read by ranges into a cache on disk.

What a read needs and the cache lacks is fetched, in whole blocks, and stays for the next time. A
cached file is a folder `remote/KEY` in the user's cache: `data`, as large as the file and filled
only where something was fetched; `blocks`, a checksum for each block that is there; `address`, for
people. The key holds address, size and entity tag, so that another version is another file.

A block's checksum is compared before the first use of what an earlier process left: after a power
cut, a checksum may be there without its data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from plymix import urls
from plymix.cache import cache_folder
from plymix.errors import Failure, FormatError, Refusal
from plymix.formats.base import OpenFile
from plymix.formats.web import Identity, WebFile

BLOCK = 1 << 16
AHEAD = 16 << 20
"""Bytes of one request at most, where it is known that they will be read."""

_THERE = 1 << 32  # beside a block's CRC-32
_MISSING, _STORED, _BUSY, _READY = range(4)

LARGEST = 1 << 38
"""Bytes of a file at most: what a server says is taken for true, and the table has to fit."""

LIMIT = 64 * 10**9
"""Bytes that all cached files may take together; `PLYMIX_CACHE_LIMIT` is another limit, in GB."""


class RemoteFile(OpenFile):
    """A file on the web with thread-safe positioned reads. Its path's first part is the scheme.

    Raises Refusal when there is none, Failure when it changes or cannot be fetched any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _borrow(path)
        self.size = self._file.identity.size
        self.sha256 = self._file.web.sha256
        self.version = "|".join(map(str, self._file.identity))
        self._open = True

    def read_at(self, offset: int, out: Any) -> None:
        self._file.read_at(offset, memoryview(out).cast("B"))

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._file.expect(ranges)

    def stop(self) -> None:
        self._file.web.stop()

    def close(self) -> None:
        if self._open:
            self._open = False
            _give_back(self.path)


_shared: dict[str, tuple[_Cached, int]] = {}
_sharing = threading.Lock()


def _borrow(path: Path) -> _Cached:
    """The one open file of an address: whoever opens it meanwhile sees the same version."""
    with _sharing:
        key = urls.text(path)
        file, users = _shared.get(key) or (_Cached(path), 0)
        _shared[key] = file, users + 1
        return file


def _give_back(path: Path) -> None:
    with _sharing:
        key = urls.text(path)
        file, users = _shared.pop(key)
        if users > 1:
            _shared[key] = file, users - 1
        else:
            file.close()


class _Cached:
    """A file on the web and what is cached of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.web = WebFile(os.fspath(path))
        first = bytearray()
        try:
            self.web.stream(0, BLOCK, lambda at, data: first.extend(data))
            assert self.web.identity is not None
            self.identity: Identity = self.web.identity
            if self.identity.size > LARGEST:
                raise Refusal(f"{self.web.shown} claims to have {self.identity.size:,} bytes")
            self.folder = _folder(self.web.shown, self.identity)
            self._start()
        except BaseException:
            self.web.close()
            raise
        if len(first) == min(BLOCK, self.identity.size) and self._state and not self._state[0]:
            self._keep(0, memoryview(first))

    def _start(self) -> None:
        count = -(-self.identity.size // BLOCK)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            _make_room(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "address").write_text(self.web.shown + "\n", "utf-8")
            self._data = os.open(self.folder / "data", flags, 0o600)
            self._table = os.open(self.folder / "blocks", flags, 0o600)
            os.truncate(self._data, self.identity.size)
            os.truncate(self._table, 8 * count)
            os.utime(self.folder / "blocks")
            known = b"".join(iter(lambda: os.read(self._table, 1 << 20), b""))
        except OSError as e:
            raise Refusal(
                f"cannot keep {self.web.shown} in {self.folder.parent}: {e.strerror};"
                " PLYMIX_CACHE names another folder"
            ) from None
        self._blocks = array("Q", known)
        self._state = bytearray(_STORED if entry & _THERE else _MISSING for entry in self._blocks)
        self._wanted: list[tuple[int, int]] = []  # in blocks, in order, not touching
        self._changed = threading.Condition()
        self._place = threading.Lock()
        self._check = 0

    # ---- reading

    def read_at(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        if end > self.identity.size:
            raise FormatError(
                f"{self.path.name} ends at byte {self.identity.size}, {end - self.identity.size}"
                " bytes too soon: it is truncated; check the address"
            )
        last, began = -(-end // BLOCK), self.web.stops
        for block in range(offset // BLOCK, last):
            while self._state[block] != _READY:
                self.web.goes_on(began)
                self._make_ready(block, last, began)
        self._from_disk(offset, view)

    def _make_ready(self, block: int, last: int, began: int) -> None:
        """Have `block` on disk, whole, by fetching it and those after it that will be needed."""
        with self._changed:
            state = self._state[block]
            if state == _BUSY:
                self._changed.wait(0.2)
                return
            stop = block + 1
            if state == _MISSING:
                limit = self._limit(block, last)
                while stop < limit and self._state[stop] == _MISSING:
                    stop += 1
            if state != _READY:
                self._state[block:stop] = bytes([_BUSY]) * (stop - block)
        try:
            if state == _STORED:
                self._verify(block)
            elif state == _MISSING:
                self._fetch(block, stop, began)
        finally:
            with self._changed:
                for at in range(block, stop):
                    if self._state[at] == _BUSY:
                        self._state[at] = _MISSING
                self._changed.notify_all()

    def _limit(self, block: int, last: int) -> int:
        """How far a request that begins with `block` goes."""
        if not self.web.ranges:
            return len(self._state)
        most = block + AHEAD // BLOCK
        at = bisect_right(self._wanted, (block, len(self._state))) - 1
        wanted = self._wanted[at][1] if at >= 0 else 0
        return min(max(last, wanted), most)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Byte ranges that will be read: a request may go on to the end of one."""
        blocks = sorted((begin // BLOCK, -(-end // BLOCK)) for begin, end in ranges if end > begin)
        with self._changed:
            merged: list[tuple[int, int]] = []
            for begin, end in sorted([*self._wanted, *blocks]):
                if merged and begin <= merged[-1][1]:
                    merged[-1] = merged[-1][0], max(end, merged[-1][1])
                else:
                    merged.append((begin, end))
            self._wanted = merged

    def _verify(self, block: int) -> None:
        view = memoryview(bytearray(self._length(block)))
        self._from_disk(block * BLOCK, view)
        if self._blocks[block] == zlib.crc32(view) | _THERE:
            self._state[block] = _READY

    def _fetch(self, block: int, stop: int, began: int) -> None:
        pieces = bytearray()
        at = block

        def put(offset: int, data: memoryview) -> None:
            nonlocal at
            while len(data):
                n = min(len(data), self._length(at) - len(pieces))
                pieces.extend(data[:n])
                data = data[n:]
                if len(pieces) == self._length(at):
                    self._keep(at, memoryview(bytes(pieces)))
                    pieces.clear()
                    at += 1

        end = min(stop * BLOCK, self.identity.size)
        self.web.stream(block * BLOCK, end, put, began)

    def _length(self, block: int) -> int:
        return min(BLOCK, self.identity.size - block * BLOCK)

    def _keep(self, block: int, data: memoryview) -> None:
        """Store a block, then its checksum."""
        entry = zlib.crc32(data) | _THERE
        try:
            self._to_disk(self._data, block * BLOCK, data)
            self._to_disk(self._table, 8 * block, memoryview(entry.to_bytes(8, "little")))
        except OSError as e:
            free = shutil.disk_usage(self.folder).free
            raise Failure(
                f"no room to keep {self.web.shown} in {self.folder.parent} ({e.strerror}; about"
                f" {free:,} bytes are free); PLYMIX_CACHE names another folder"
            ) from None
        with self._changed:
            self._blocks[block] = entry
            self._state[block] = _READY
            self._changed.notify_all()

    # ---- the disk

    def _from_disk(self, offset: int, view: memoryview) -> None:
        while len(view):
            if hasattr(os, "preadv"):
                n = os.preadv(self._data, [view], offset)
            else:
                with self._place:
                    os.lseek(self._data, offset, os.SEEK_SET)
                    found = os.read(self._data, len(view))
                n = len(found)
                view[:n] = found
            if not n:
                raise Failure(f"{self.folder / 'data'} became shorter while it was read")
            offset, view = offset + n, view[n:]

    def _to_disk(self, fd: int, offset: int, view: memoryview) -> None:
        while len(view):
            if hasattr(os, "pwrite"):
                n = os.pwrite(fd, view, offset)
            else:
                with self._place:
                    os.lseek(fd, offset, os.SEEK_SET)
                    n = os.write(fd, view)
            offset, view = offset + n, view[n:]

    def close(self) -> None:
        self.web.close()
        os.close(self._data)
        os.close(self._table)


# ---- the cache


def _folder(address: str, identity: Identity) -> Path:
    said = "\n".join([address, *map(str, identity)])
    return cache_folder() / "remote" / hashlib.sha256(said.encode()).hexdigest()[:32]


def limit() -> int:
    """Bytes that the cache may take. Raises Refusal for a PLYMIX_CACHE_LIMIT that is no number."""
    said = os.environ.get("PLYMIX_CACHE_LIMIT", "")
    if not said:
        return LIMIT
    try:
        found = float(said)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise Refusal(f"PLYMIX_CACHE_LIMIT = {said!r} is not a number of gigabytes")
    return int(found * 1e9)


def _make_room(but: Path) -> None:
    """Remove what was not used for longest until the rest is within the limit."""
    most = limit()
    entries = []
    with suppress(OSError):
        for folder in but.parent.iterdir():
            with suppress(OSError):
                used = (folder / "blocks").stat().st_mtime
                stat = (folder / "data").stat()
                size = stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
                entries.append((used, size, folder))
    total = sum(size for _, size, _ in entries)
    in_use = {file.folder for file, _ in _shared.values()}
    for _, size, folder in sorted(entries):
        if total <= most:
            return
        if folder != but and folder not in in_use:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
