"""Bytes on disk to tensors and back: one file per format.

A format that can be read has `name`, `suffixes`, `sniff(head)` and `open_file(path)`; one that can
be written has `layout(entries, metadata)` too. The kind of a file is told from its first bytes,
never from its name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from plymix import urls
from plymix.errors import FormatError, Refusal
from plymix.formats.base import (
    BITS,
    FLOATS,
    Entry,
    Handle,
    Layout,
    Source,
    TensorInfo,
    open_handle,
)

__all__ = [
    "BITS",
    "FLOATS",
    "Entry",
    "Folders",
    "Handle",
    "Layout",
    "Source",
    "TensorInfo",
    "is_folder_name",
    "open_file",
    "open_model",
    "writer_for",
]

Folders = Sequence["str | os.PathLike[str]"]
"""Folders to look for model files in, in their order."""

WEIGHTS = ("safetensors", "torch_zip", "torch_legacy")
"""Modules of this package that read one file of weights, which may be part of a larger model."""

READERS = (*WEIGHTS, "gguf", "sharded")
"""Modules of this package, each imported when the ones before it do not know the file."""

WRITERS = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "torch_zip",
    ".pt": "torch_zip",
    ".pth": "torch_zip",
}
"""A file's ending -> the module that writes it."""


def _module(name: str) -> ModuleType:
    return import_module(f"plymix.formats.{name}")


def open_model(path: str | os.PathLike[str]) -> Source:
    """Open a model file or folder, or a file on the web, and read its headers.

    Raises Refusal or FormatError, in well under 1 s where the web has no part in it.
    """
    path = urls.path(urls.given(path, "path"))
    if urls.is_url(path):
        if path.name == "model_index.json":
            raise Refusal(
                f"{urls.text(path)}: a folder on the web cannot be listed; name one file, such as"
                " the transformer's or unet's weights, or its *.index.json"
            )
        return _unpacked(open_file(path))
    path = path.expanduser()
    if not os.path.exists(path):
        raise Refusal(f"{path} does not exist{_nearest(path)}")
    if path.is_dir() or path.name == "model_index.json":
        from plymix.formats import diffusers

        return _unpacked(diffusers.open_folder(path if path.is_dir() else path.parent))
    return _unpacked(open_file(path))


def _unpacked(source: Source) -> Source:
    """`source` with the numbers its weights stand for; it is closed again if that fails."""
    from plymix.formats import packed

    try:
        return packed.unpacked(source)
    except BaseException:
        source.close()
        raise


def open_file(path: Path, readers: Sequence[str] = READERS) -> Source:
    """Open one file by the first of `readers` that knows its first bytes."""
    if not urls.is_url(path) and not path.is_file():
        raise Refusal(f"{path} is not a regular file; plymix needs positioned reads")
    handle = open_handle(path)
    try:
        head = handle.head(512)
        if not head:
            raise FormatError(f"{path.name} is empty (0 bytes); fetch it again")
        for reader in map(_module, readers):
            if reader.sniff(head):
                source: Source = reader.open_file(path)
                return source
    finally:
        handle.close()
    raise FormatError(
        f"{path.name} is neither safetensors nor a torch checkpoint nor GGUF: {_looks_like(head)}"
    )


def writer_for(path: Path) -> ModuleType:
    """The format that a file of this name is written in. Raises Refusal for another ending."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise Refusal(
            f"{path.name}: cannot tell the format from the ending {path.suffix!r};"
            " use .safetensors or .ckpt (or .gguf), or no ending for a diffusers folder"
        )
    return _module(writer)


def is_folder_name(path: Path) -> bool:
    """Whether a result of this name is a folder: it has no ending, or one like 'v1.5'."""
    ending = path.suffix.lower()
    return ending not in WRITERS and (not ending[1:2].isalpha() or os.path.isdir(path))


def _nearest(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = [p.name for p in path.parent.iterdir() if p.is_file()]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _looks_like(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the real file with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it looks like a web page; fetch the model itself"
    if head[:6] in (b"\x1f\x8b\x08", b"7z\xbc\xaf'\x1c") or head[:2] == b"\x1f\x8b":
        return "it is a compressed archive; unpack it first"
    return f"it begins with {head[:8].hex(' ')}"
