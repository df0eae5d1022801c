"""safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes.

Source: https://github.com/huggingface/safetensors ("Format"). The reader is stricter than the
library in one point: a key that occurs twice is refused, as the format text demands.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from plymix.errors import FormatError
from plymix.formats.base import BITS, Entry, Layout, OpenFile, Source, TensorInfo, opened
from plymix.texts import no_twins

name = "safetensors"
suffixes = (".safetensors", ".sft")
MAX_HEADER = 100_000_000  # the library's limit
MAX_RANK = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def sniff(head: bytes) -> bool:
    """Whether `head` (the first 16 bytes or more) can begin a safetensors file."""
    return len(head) >= 9 and head[8:10].lstrip()[:1] == b"{"


def open_file(path: Path) -> Source:
    """Read the header of `path`. Raises FormatError when the file is not what the format allows."""
    return opened(path, _open)


def _open(handle: OpenFile) -> Source:
    metadata, tensors = _parse(handle)
    return Source(handle.path, name, tensors, metadata, handles=(handle,))


def _parse(handle: OpenFile) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    file = handle.path.name

    def bad(what: str) -> FormatError:
        return FormatError(f"{file} is not a sound safetensors file: {what}; fetch it again")

    if handle.size < 10:
        raise bad(f"it has {handle.size} bytes")
    length = int.from_bytes(handle.head(8), "little")
    if length > MAX_HEADER:
        raise bad(f"its header claims {length:,} bytes (limit {MAX_HEADER:,})")
    if 8 + length > handle.size:
        raise bad(f"its header claims {length:,} bytes and the file has {handle.size:,}")
    try:
        text = handle.head(length, 8).decode("utf-8")
        header = json.loads(text, object_pairs_hook=no_twins)
        if _SURROGATE.search(text):  # half a character alone is none, and no other program reads it
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise bad(f"its header is not JSON ({reason[:120]})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise bad("its __metadata__ is not a map of strings to strings")
    start = 8 + length
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        key = sys.intern(key)  # models of one recipe share their keys
        info, end = _entry(key, entry, start, bad)
        tensors[key] = info
        spans.append((info.offset, end, key))
    at = start
    for begin, end, key in sorted(spans):
        if begin != at:
            what = "overlaps its neighbour" if begin < at else "leaves a hole before it"
            raise bad(f"tensor {key!r} {what}")
        at = end
    if at > handle.size:
        raise FormatError(
            f"{file} is truncated: its tensors end at byte {at:,} and the file has"
            f" {handle.size:,}; fetch it again"
        )
    if at != handle.size:
        raise bad(f"{handle.size - at:,} bytes follow its last tensor")
    return metadata, tensors


_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape`, one and the same object for equal ones: many inputs have thousands of them."""
    return shape


def _natural(values: list[object]) -> bool:
    """Whether all are whole numbers from 0 on."""
    for v in values:  # noqa: SIM110 (thrice as fast as a generator, and headers have thousands)
        if type(v) is not int or v < 0:
            return False
    return True


def _entry(key: str, entry: Any, start: int, bad: Any) -> tuple[TensorInfo, int]:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise bad(f"entry {key!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad(f"tensor {key!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not _natural(shape):
        raise bad(f"tensor {key!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _natural(offsets):
        raise bad(f"tensor {key!r} has the offsets {str(offsets)[:80]}")
    begin, end = offsets
    nbytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest or end - begin != nbytes:
        raise bad(
            f"tensor {key!r} ({dtype} {shape}) needs {nbytes + bool(rest):,} bytes"
            f" and has {end - begin:,}"
        )
    return TensorInfo(key, sys.intern(dtype), _shared(tuple(shape)), start + begin), start + end


def layout(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Layout:
    """Where everything goes. Tensors keep the order of `entries` within their dtype's size class.

    Larger element sizes come first, as in files by the library, so that every tensor is aligned
    to its element size.
    """
    ordered = sorted(entries, key=lambda e: -BITS[e.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    at = 0
    for e in ordered:
        header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [at, at + e.nbytes]}
        offsets[e.name] = at
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FormatError(
            f"the header would have {len(text):,} bytes; safetensors allows {MAX_HEADER:,}"
        )
    start = 8 + len(text)
    return Layout(
        offsets={key: start + offset for key, offset in offsets.items()},
        size=start + at,
        pieces=[(0, len(text).to_bytes(8, "little") + text)],
    )
