"""Results of several files, which are there as a whole or not at all: folders, and shards.

A folder is written under a temporary name beside its own and renamed once. Shards have to lie in
a folder that is there already, so their index, which alone makes them a model, comes last.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plymix import temporary
from plymix.engine.files import FULL, AtomicFile, FileTarget
from plymix.errors import Failure, PlymixError
from plymix.formats import sharded
from plymix.formats.base import Content, Layout, Part
from plymix.formats.diffusers import CONFIG, MODEL_INDEX


def several(path: Path, layout: Layout) -> AtomicFolder | AtomicShards:
    """What makes `path` appear when all files of `layout` are written."""
    return AtomicShards(path, layout) if layout.index else AtomicFolder(path, layout)


def is_model(folder: Path) -> bool:
    """Whether a folder is one that a result may replace: a pipeline or a component of one."""
    return any((folder / name).is_file() for name in (MODEL_INDEX, CONFIG))


class PartsTarget:
    """The files of a layout, written at the layout's offsets."""

    def __init__(self, parts: Sequence[Part], targets: Sequence[FileTarget]) -> None:
        self._starts = [part.start for part in parts]
        self.files = targets

    @property
    def waits(self) -> bool:
        return any(file.waits for file in self.files)

    def _at(self, offset: int) -> tuple[FileTarget, int]:
        i = bisect_right(self._starts, offset) - 1
        return self.files[i], offset - self._starts[i]

    def write_at(self, offset: int, data: Any) -> None:
        target, at = self._at(offset)
        target.write_at(at, data)

    def read_at(self, offset: int, out: Any) -> None:
        target, at = self._at(offset)
        target.read_at(at, out)

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        target, here = self._at(at)
        return target.copy_from(handle, offset, here, nbytes)


class AtomicFolder:
    """A folder that gets its name when it is finished. Use it as `AtomicFile`.

    An existing folder is replaced as a whole; an empty one may be there.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self._layout = layout
        self._files: list[AtomicFile] = []
        self._replaces = path.exists() and any(path.iterdir())

    def __enter__(self) -> PartsTarget:
        temporary.sweep(self.path.parent)
        try:
            self._fd, self.temporary = temporary.create_folder(self.path)
        except OSError as e:
            raise Failure(f"cannot write in {self.path.parent}: {e.strerror}") from None
        try:
            for name, content in self._layout.others.items():
                file = self.temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                _put(file, content)
            targets = []
            for part in self._layout.parts:
                file = self.temporary / part.name
                file.parent.mkdir(parents=True, exist_ok=True)
                one = AtomicFile(file, part.size)
                targets.append(one.__enter__())
                self._files.append(one)
        except BaseException as e:
            self._discard()
            _tell(e, self.path, self._layout.size)
            raise
        return PartsTarget(self._layout.parts, targets)

    def commit(self) -> None:
        for file in self._files:
            file.commit()
        for folder, _, _ in os.walk(self.temporary):
            _sync(Path(folder))
        if not self._replaces:
            with contextlib.suppress(OSError):
                self.path.rmdir()  # an empty folder; any other stays
        if self._replaces:
            _exchange(self.temporary, self.path)
        elif self.path.exists():
            raise Failure(
                f"{self.path} appeared while this was computed and was left as it is;"
                " say --force to replace it"
            )
        else:
            os.rename(self.temporary, self.path)
        _sync(self.path.parent)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._discard()
        if error is not None:
            _tell(error, self.path, self._layout.size)

    def _discard(self) -> None:
        """Remove the temporary folder: what was not finished, or what was replaced."""
        for file in self._files:
            file.__exit__(None, None, None)
        shutil.rmtree(self.temporary, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)  # last: its lock says that the temporary has an owner
            self._fd = -1


class AtomicShards:
    """Shards that become a model by their index, the last file to get its name.

    An older index is removed before the first shard is, and its shards after: in between there
    is no model of that name, but never one of old and new shards.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self._layout = layout
        self._stack = contextlib.ExitStack()
        self._files: list[AtomicFile] = []

    def __enter__(self) -> PartsTarget:
        targets = []
        try:
            for part in self._layout.parts:
                file = AtomicFile(self.path.with_name(part.name), part.size)
                targets.append(self._stack.enter_context(file))
                self._files.append(file)
        except BaseException as e:
            self._stack.close()
            _tell(e, self.path, self._layout.size)
            raise
        return PartsTarget(self._layout.parts, targets)

    def commit(self) -> None:
        content = self._layout.others[self._layout.index]
        assert isinstance(content, bytes)
        index = AtomicFile(self.path.with_name(self._layout.index), len(content))
        old, new = {self.path} | _shards(index.path), {file.path for file in self._files}
        with index as target:
            target.write_at(0, content)
            for file in self._files:
                os.fsync(file.fd)
            index.path.unlink(missing_ok=True)
            placed: list[Path] = []
            try:
                for file in self._files:
                    file.commit()
                    placed.append(file.path)
                index.commit()
            except BaseException:
                for path in placed:
                    path.unlink(missing_ok=True)
                raise
        for path in old - new:
            path.unlink(missing_ok=True)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        if error is not None:
            _tell(error, self.path, self._layout.size)


def _shards(index: Path) -> set[Path]:
    """The files that an index names; none for one that is not there or cannot be read."""
    with contextlib.suppress(PlymixError):
        homes, _ = sharded.index(index)
        return {index.with_name(name) for name in homes.values()}
    return set()


def _put(file: Path, content: Content) -> None:
    data = content if isinstance(content, bytes) else content.read_bytes()
    with open(file, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    """Have the disk know the names in a folder, where the system can be told so."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(fd)
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Give two folders each other's name, at once where the system can (Linux)."""
    at, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (linux/fs.h)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        renameat2 = None
    if renameat2 and renameat2(at, os.fsencode(new), at, os.fsencode(old), both) == 0:
        return
    aside = old.with_name(f"{old.name[:40]}.replaced-{os.getpid()}")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _tell(error: BaseException, path: Path, size: int) -> None:
    """Raise what an error of the disk means for people."""
    if not isinstance(error, OSError) or isinstance(error, PlymixError):
        return
    if error.errno in FULL:
        raise AtomicFile(path, size).full(error) from None
    raise Failure(f"writing {path.name} failed: {error.strerror}") from None
