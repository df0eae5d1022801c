"""Temporary files beside a result, and the sweeping of those that killed runs left behind.

A temporary is locked (`flock`) for as long as its writer lives; the system takes the lock away with
the process, however it ends. A lock of this kernel is always seen by this kernel. That of another
host is seen only where the file system passes locks on, so a name tells the kernel it was made by,
and what others made is swept only when nobody has written to it for a day as well. So is everything
where locks are unknown (Windows, some network mounts).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ENDING = ".plymix-tmp"

ABANDONED = 24 * 3600.0
"""Seconds without a write after which a file that may be another host's has no writer."""

_FLAGS = os.O_RDWR | getattr(os, "O_BINARY", 0)


def create(path: Path) -> tuple[int, Path]:
    """A new temporary for `path`, open and locked, and its name. Raises OSError."""
    temporary = _name(path)
    while True:
        fd = os.open(temporary, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(fd, wait=True)
        if _is(temporary, fd):
            return fd, temporary
        os.close(fd)  # swept between its making and its lock


def create_folder(path: Path) -> tuple[int, Path]:
    """A new temporary folder for `path`, locked by a descriptor, or -1. Raises OSError."""
    temporary = _name(path)
    while True:
        temporary.mkdir()
        if not hasattr(os, "O_DIRECTORY"):
            return -1, temporary
        with contextlib.suppress(FileNotFoundError):  # swept between its making and its lock
            fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
            _lock(fd, wait=True)
            if _is(temporary, fd):
                return fd, temporary
            os.close(fd)


def _name(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.{_kernel()}-{os.getpid()}{ENDING}")


def sweep(folder: Path) -> None:
    """Remove every temporary in `folder` whose writer is gone (a kill -9, a power cut)."""
    for found in folder.glob(f".*{ENDING}"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            _sweep(found)


def _sweep(found: Path) -> None:
    whole = found.is_dir() and not found.is_symlink()
    fd = os.open(found, (os.O_RDONLY if whole else _FLAGS) | getattr(os, "O_NOFOLLOW", 0))
    try:
        locked = _lock(fd)
        ours = f".{_kernel()}-" in found.name
        idle = time.time() - os.fstat(fd).st_mtime > ABANDONED
        gone = idle if locked is None else locked and (ours or idle)
        if gone and fcntl is not None and _is(found, fd):
            _remove(found, whole)
    finally:
        os.close(fd)
    if gone and fcntl is None:  # Windows removes no file that anybody has open
        _remove(found, whole)


def _remove(found: Path, whole: bool) -> None:
    if whole:
        shutil.rmtree(found, ignore_errors=True)
    else:
        found.unlink()


def _lock(fd: int, wait: bool = False) -> bool | None:
    """Lock a file; False: somebody else has it locked, None: nobody can say."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        return False if e.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is(path: Path, fd: int) -> bool:
    """Whether `path` is the open file, not one that took its name since."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


@cache
def _kernel() -> str:
    """Eight letters for the running kernel; no other host has them."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except (OSError, UnicodeError):
        import uuid

        text = str(uuid.getnode())  # a network card's number; a random one where there is none
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _short(name: str) -> str:
    """`name`, cut so that the temporary's is no longer than a name may be."""
    return name.encode(errors="replace")[:180].decode(errors="ignore")
