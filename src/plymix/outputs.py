"""Where a result goes, and whether it can: asked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from plymix.errors import Refusal

NAME, WHOLE = 255, 4095
"""Bytes of a name and of a whole path, where the system does not tell its own limits."""

TEMPORARY = 64
"""Bytes by which a temporary's path may be longer than that of the file it becomes."""


def path_of(out: str | os.PathLike[str]) -> Path:
    """The file or folder that is written for `out`: what a link leads to, never the link."""
    path = Path(out).expanduser()
    return path.resolve() if os.path.islink(path) else path


def writable(path: Path, *, beside: int = 0) -> None:
    """Refuse a path whose name is too long, or whose folder is missing or read-only.

    `beside` is by how many bytes the names of what goes beside it are longer.
    """
    most, whole = _limits(path)
    limits = [(f"the name {shortened(name, '...', 40)}", name, most) for name in path.parts]
    limits += [(f"the name {shortened(path.name, '...', 40)}", path.name, most - beside)]
    limits += [(f"the path of {path.name}", os.fspath(path), whole - beside - TEMPORARY)]
    for what, text, limit in limits:
        if (n := _bytes(text)) > limit:
            raise Refusal(
                f"{what} has {n:,} bytes, and it may have {limit:,} here; choose a shorter one"
            )
    if not path.parent.is_dir():
        raise Refusal(f"the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise Refusal(f"the folder {path.parent} is read-only; choose another place")


def file(path: Path, force: bool, *, beside: int = 0) -> None:
    """Refuse a path that cannot become a file, or that only `force` may replace."""
    writable(path, beside=beside)
    if os.path.isdir(path):
        raise Refusal(f"{path} is a folder; name a file in it")
    free(path, force)


def free(path: Path, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse a path that something has already, which is replaced only with `force`.

    Of one of the `inputs` it is said that it would be lost.
    """
    if force or not os.path.exists(path):
        return
    if any(os.path.exists(x) and os.path.samefile(x, path) for x in inputs):
        raise Refusal(
            f"{path} is an input itself; choose another name, or say --force to have the"
            " result in its place"
        )
    raise Refusal(f"{path} exists; say --force to replace it, or choose another name")


def shortened(stem: str, ending: str, most: int = NAME) -> str:
    """`stem` and `ending` as one name of at most `most` bytes: the stem is cut where it must be."""
    return stem.encode(errors="replace")[: most - len(ending)].decode(errors="ignore") + ending


def _bytes(name: str) -> int:
    """The length of a name as the system counts it: in bytes, on Windows in characters."""
    return len(name) if os.name == "nt" else len(name.encode(errors="replace"))


def _limits(path: Path) -> tuple[int, int]:
    """Bytes that a name and a whole path may have on the file system of `path`."""
    there = next((folder for folder in path.parents if os.path.isdir(folder)), Path())
    try:
        name, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX") - 1
    except (AttributeError, OSError, ValueError):
        return NAME, WHOLE
    return name if name > 0 else NAME, whole if whole > 0 else WHOLE
