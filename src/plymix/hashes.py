"""Hashes of model files, as the tools of the field define them, with a cache.

SHA-256 of a file costs more than merging it, so it is computed once and remembered by (path, size,
modification time, inode, time of change) in the user's cache folder (`PLYMIX_CACHE` names another).
The time of change (ctime) is the system's own: whoever writes to a file and sets its modification
time back cannot set it. Windows has the time of creation there, which adds nothing and costs none.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from plymix import urls
from plymix.cache import cache_folder
from plymix.errors import Cancelled
from plymix.formats.base import open_handle

CHUNK = 1 << 18

KEPT = 1000
"""Files that the cache knows at most, the last ones: it is read whole, into memory that is counted.
"""

_lock = threading.Lock()


def identity(path: Path) -> str:
    """What tells one content of a file from another, as far as the system or server says it."""
    if urls.is_url(path):
        with _opened(path) as file:
            return f"{urls.text(path)}|{file.version}"
    stat = path.stat()
    times = f"{stat.st_mtime_ns}|{stat.st_ino}|{stat.st_ctime_ns}"
    return f"{path.resolve()}|{stat.st_size}|{times}"


def _load() -> dict[str, str]:
    try:
        found = json.loads((cache_folder() / "sha256.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def known_sha256(path: Path) -> str | None:
    """The SHA-256 of `path` if it was computed before and the file has not changed since."""
    value = _load().get(identity(path))
    return value if isinstance(value, str) and len(value) == 64 else None


def sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of the whole file, lower-case hex; from the cache when it is known there.

    `stopped` is asked between chunks; when it says True, Cancelled is raised.
    """
    if found := known_sha256(path) or _stated(path):
        return found
    before = identity(path)
    value = _digest(path, 0, None, stopped)
    if identity(path) == before:
        _remember(before, value)
    return value


def _stated(path: Path) -> str:
    """The SHA-256 that a server says a file has; "" where none does."""
    if not urls.is_url(path):
        return ""
    with _opened(path) as file:
        return str(file.sha256)


def _opened(path: Path) -> Any:
    return closing(open_handle(path))


def model_sha256(files: Sequence[Path], stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a model: of its file, or of a list of its files' SHA-256 where it has several.

    The list is what `sha256sum` prints in the folder that holds them all, in the order of `files`.
    """
    if len(files) == 1:
        return sha256(files[0], stopped)
    import hashlib

    folder = Path(os.path.commonpath([f.parent for f in files]))
    lines = [f"{sha256(f, stopped)}  {f.relative_to(folder).as_posix()}\n" for f in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def data_sha256(path: Path, start: int) -> str:
    """SHA-256 of the file from byte `start` on.

    With the end of a safetensors header as `start` it is kohya's `sshs_model_hash`, whose first 12
    digits are AutoV3.
    """
    return _digest(path, start, None, lambda: False)


def in_background(files: Sequence[Path], stopped: Callable[[], bool]) -> str:
    """`model_sha256` for who waits for it: `stopped` is heard even while a server does not answer.

    Raises Cancelled when it says True.
    """
    found: Queue[str | BaseException] = Queue()

    def work() -> None:
        try:
            found.put(model_sha256(files))
        except BaseException as e:
            found.put(e)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            value = found.get(timeout=0.05)
        except Empty:
            if stopped():
                raise Cancelled("stopped; nothing was written") from None
        else:
            if isinstance(value, BaseException):
                raise value
            return value


def legacy_hash(path: Path) -> str:
    """A1111's old short hash (AutoV1): 64 KiB at offset 1 MiB, 8 hex digits."""
    return _digest(path, 0x100000, 0x10000, lambda: False)[:8]


def _digest(path: Path, start: int, length: int | None, stopped: Callable[[], bool]) -> str:
    import hashlib

    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with _opened(path) as file:
        end = file.size if length is None else min(file.size, start + length)
        file.expect([(start, end)])
        for at in range(start, end, CHUNK):
            part = buffer[: min(CHUNK, end - at)]
            file.read_at(at, part)
            digest.update(part)
            if stopped():
                raise Cancelled("stopped; nothing was written")
    return digest.hexdigest()


def _remember(identity: str, value: str) -> None:
    """Best effort: a cache that cannot be written is no reason to fail."""
    import tempfile

    with _lock:
        known = _load()
        path = identity.split("|", 1)[0]
        known = {k: v for k, v in known.items() if k.split("|", 1)[0] != path}
        known = {**dict([*known.items()][1 - KEPT :]), identity: value}
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(known, file)
            os.replace(file.name, folder / "sha256.json")
        except OSError:
            pass
