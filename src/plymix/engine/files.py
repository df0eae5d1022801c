"""Where the bytes of a result go: memory, or a file that gets its name when it is finished."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from plymix import stops, temporary
from plymix.errors import Failure, PlymixError
from plymix.formats.base import Handle

DIRECT = 64 << 20
"""Files of so many bytes go to the disk past the system's cache, where the system can."""

PAGE = 4096
"""What direct writes are aligned to, in the file and in memory."""

DIRECT_LEAST = 1 << 16
"""Bytes that are worth a direct write."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, an account or a file that takes no more."""

FLUSHED = 32 << 20
"""Bytes in the system's cache that are worth having the disk take."""


class Target(Protocol):
    """Somewhere the output's bytes can be put at any offset."""

    @property
    def waits(self) -> bool:
        """Whether a write takes until the disk has it; such want to begin where pages do."""
        ...

    def write_at(self, offset: int, data: Any) -> None: ...

    def read_at(self, offset: int, out: Any) -> None: ...

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        """Move bytes without touching them; returns how many were moved (0: not possible)."""
        ...


class MemoryTarget:
    """The finished file's bytes in memory."""

    waits = False

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write_at(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.data[offset : offset + len(view)] = view

    def read_at(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        view[:] = self.data[offset : offset + len(view)]

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        handle.read_at(offset, memoryview(self.data)[at : at + nbytes])
        return nbytes


class FileTarget:
    """An open file written at positions: `pwrite` where the system has it, seek elsewhere.

    `direct` is the same file opened for writes that go straight to the disk, or -1. They cost a
    fraction of the time: no copy into the system's cache, and nothing left to wait for at the end.
    """

    def __init__(self, fd: int, direct: int = -1) -> None:
        self.fd = fd
        self.files: Sequence[FileTarget] = (self,)
        self.direct = direct
        self.cached = 0  # bytes written by way of the system's cache, about
        self._lock = threading.Lock()
        self._can_copy = hasattr(os, "copy_file_range") and direct < 0

    @property
    def waits(self) -> bool:
        return self.direct >= 0

    def write_at(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        if self.direct >= 0 and len(view) >= DIRECT_LEAST:
            head = -offset % PAGE
            whole = (len(view) - head) // PAGE * PAGE
            done = head + self._write_direct(offset + head, view[head : head + whole])
            self._write(offset, view[:head])
            self._write(offset + done, view[done:])
        else:
            self._write(offset, view)

    def _write_direct(self, offset: int, view: memoryview) -> int:
        """How much of `view` went to the disk; 0 where the system wants it aligned otherwise."""
        try:
            return os.pwrite(self.direct, view, offset)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return 0

    def _write(self, offset: int, view: memoryview) -> None:
        self.cached += len(view)
        positioned = hasattr(os, "pwrite")
        while len(view):
            if positioned:
                n = os.pwrite(self.fd, view, offset)
            else:
                with self._lock:
                    os.lseek(self.fd, offset, os.SEEK_SET)
                    n = os.write(self.fd, view)
            offset += n
            view = view[n:]

    def read_at(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        while len(view):
            with self._lock:
                os.lseek(self.fd, offset, os.SEEK_SET)
                data = os.read(self.fd, len(view))
            if not data:
                raise Failure("the file being written became shorter meanwhile")
            view[: len(data)] = data
            offset += len(data)
            view = view[len(data) :]

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        if not self._can_copy or not isinstance(handle, Handle):
            return 0
        try:
            n = os.copy_file_range(handle.fd, self.fd, nbytes, offset, at)
            self.cached += n
            return n
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                raise
            self._can_copy = False  # another file system, an old kernel: read and write instead
            return 0


class Buffers:
    """One thread's scratch memory, used again: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._rows: list[mmap.mmap] = []

    def __call__(self, i: int, nbytes: int, at: int = 0) -> memoryview:
        """Scratch number `i`, which lies in its page of memory as offset `at` does in the file's.

        That is what direct writes need of what is written at `at`.
        """
        start = at % PAGE
        while len(self._rows) <= i:
            self._rows.append(_pages(PAGE))
        if len(self._rows[i]) < start + nbytes:
            self._rows[i] = _pages(nbytes + PAGE)
        return memoryview(self._rows[i])[start : start + nbytes]


class Outbox:
    """One thread's results on their way: the disk takes one while the next is computed.

    Fill what `room` gives and hand it to `put`; `close` waits until all are written. What went
    wrong meanwhile is raised by the next call.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._rows = Buffers()
        self._free: SimpleQueue[int] = SimpleQueue()
        for row in range(2):
            self._free.put(row)
        self._row = -1  # the one that is being filled
        self._sent: SimpleQueue[tuple[int, int, memoryview] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def room(self, nbytes: int, at: int) -> memoryview:
        """Memory for what is to be written at `at`, which lies there as the file's pages do."""
        if self._row < 0:
            self._row = self._free.get()
        self._check()
        return self._rows(self._row, nbytes, at)

    def put(self, at: int, data: memoryview) -> None:
        """Have the start of what `room` gave written at `at`."""
        row, self._row = self._row, -1
        if not self.target.waits:
            self.target.write_at(at, data)
            self._free.put(row)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()
        self._sent.put((row, at, data))

    def close(self) -> None:
        if self._thread is not None:
            self._sent.put(None)
            self._thread.join()
            self._thread = None
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (sent := self._sent.get()) is not None:
            row, at, data = sent
            try:
                if self._error is None:
                    self.target.write_at(at, data)
            except BaseException as e:
                self._error = e
            self._free.put(row)


def _pages(nbytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def steps(at: int, nbytes: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, length) of pieces of `nbytes` at `at` that end where the file's pages do."""
    start, most = 0, max(most // PAGE, 2) * PAGE
    while start < nbytes:
        n = min(most - (at + start) % PAGE, nbytes - start)
        yield start, n
        start += n


@contextmanager
def flushing(targets: Sequence[FileTarget]) -> Iterator[None]:
    """Have the disk write along: the fsync at the end then finds little left to do."""
    done = threading.Event()

    def loop() -> None:
        flushed = dict.fromkeys(targets, 0)
        while not done.wait(0.05):
            for target in targets:
                if target.cached - flushed[target] < FLUSHED:
                    continue
                flushed[target] = target.cached
                try:
                    os.fdatasync(target.fd)
                except OSError:
                    return  # the fsync at the end meets the same error and tells it

    with stops.running([loop] if hasattr(os, "fdatasync") else [], done.set):
        yield
        done.set()


class AtomicFile:
    """A file that gets its name when it is finished: temporary name, fsync, rename.

    Use it as a context manager; `commit()` makes it real. Without it nothing is left behind. What
    killed runs left behind in the folder is removed.

    Files that are `read_back` are left in the system's cache. `shards`: whether one that is too
    large could be written in several.
    """

    def __init__(
        self, path: Path, size: int, *, read_back: bool = False, shards: bool = True
    ) -> None:
        self.path = path
        self.size = size
        self.replaces = path.exists()
        self.read_back = read_back
        self.shards = shards
        self.direct = -1

    def __enter__(self) -> FileTarget:
        temporary.sweep(self.path.parent)
        try:
            self.fd, self.temporary = temporary.create(self.path)
        except OSError as e:
            raise Failure(f"cannot write in {self.path.parent}: {e.strerror}") from None
        try:
            self._reserve()
            if self.size >= DIRECT and not self.read_back and hasattr(os, "pwrite"):
                with suppress(OSError, AttributeError):  # a file system, a system that cannot
                    self.direct = os.open(self.temporary, os.O_WRONLY | os.O_DIRECT)
        except BaseException:
            self._discard()
            raise
        return FileTarget(self.fd, self.direct)

    def _reserve(self) -> None:
        """Have the disk promise the whole size now, not fail at 90 %."""
        try:
            if hasattr(os, "posix_fallocate") and self.size:
                os.posix_fallocate(self.fd, 0, self.size)
            else:
                os.truncate(self.fd, self.size)
        except OSError as e:
            if e.errno in FULL:
                raise self.full(e) from None
            os.truncate(self.fd, self.size)  # a file system that cannot promise

    def full(self, e: OSError) -> Failure:
        import shutil

        if e.errno == errno.EFBIG:
            whole = self.path.suffix.lower() == ".safetensors"
            shards = "split it" if whole else "make it a .safetensors, split"
            advice = f"{shards} (--shard 4GB), or " if self.shards else ""
            return Failure(
                f"{self.path.name} has {self.size:,} bytes, more than a file may have in"
                f" {self.path.parent} ({e.strerror}; FAT32 takes 4 GiB, `ulimit -f` may set less);"
                f" {advice}choose another disk; nothing was written"
            )
        free = shutil.disk_usage(self.path.parent).free
        return Failure(
            f"no room for {self.path.name}: it needs {self.size:,} bytes and"
            f" {self.path.parent} has about {free:,} free ({e.strerror}); nothing was written"
        )

    def commit(self) -> None:
        os.fsync(self.fd)
        if os.name == "nt":  # an open file cannot be renamed there
            self._close()
        self._name()
        self._close()  # last: its lock says that it has an owner
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            except OSError:
                pass  # some network file systems refuse; the rename is done all the same
            finally:
                os.close(folder)

    def _name(self) -> None:
        """Give the file its name; one that appeared since the start is not overwritten."""
        if not self.replaces:
            try:
                os.link(self.temporary, self.path)
            except FileExistsError:
                self.temporary.unlink()
                raise Failure(
                    f"{self.path} appeared while this was computed and was left as it is;"
                    " say --force to replace it"
                ) from None
            except OSError:
                pass  # a file system without hard links
            else:
                self.temporary.unlink()
                return
        os.replace(self.temporary, self.path)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.fd >= 0:
            self._discard()
        if isinstance(error, OSError) and not isinstance(error, PlymixError):
            if error.errno in FULL:
                raise self.full(error) from None
            raise Failure(f"writing {self.path.name} failed: {error.strerror}") from None

    def _close(self) -> None:
        for fd in (self.fd, self.direct):
            if fd >= 0:
                _let_go(fd)
        self.fd = self.direct = -1

    def _discard(self) -> None:
        self._close()
        self.temporary.unlink(missing_ok=True)


def _let_go(fd: int) -> None:
    """Close `fd`; where threads may still write to it, its number stays, and leads nowhere."""
    if stops.astray():
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, fd)
        os.close(nowhere)
    else:
        os.close(fd)


def finished(path: Path) -> str:
    """What to tell of a stop that came when there was nothing left to stop."""
    return f"stopped; {path.name} was finished before"


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file as a whole; one that has the name is replaced. Raises Failure."""
    with stops.held(finished(path)), (file := AtomicFile(path, len(data), shards=False)) as target:
        target.write_at(0, data)
        file.commit()
