"""Models in several files: `X.safetensors.index.json` and the shards it names (also of .bin files).

Source: what transformers and diffusers write: {"metadata": {"total_size": bytes of all tensors},
"weight_map": {tensor: file}}, shards named `X-00001-of-00003.safetensors` beside the index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plymix import urls
from plymix.errors import FormatError, Refusal, amount, listed
from plymix.formats import WEIGHTS, safetensors
from plymix.formats import open_file as open_shard
from plymix.formats.base import Entry, Layout, Source, joined, open_handle
from plymix.texts import no_twins

name = "sharded"
suffixes = (".index.json",)
MAX_INDEX = 64 << 20
MAX_SHARDS = 1_000
INDEX = re.compile(r"(?P<stem>.+)\.(safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json")
"""Names of index files."""


def sniff(head: bytes) -> bool:
    """Whether `head` can begin an index: a JSON object."""
    return head.lstrip()[:1] == b"{"


def open_file(path: Path) -> Source:
    """Read the index `path` and the header of every shard; `TensorInfo.file` counts the shards.

    Raises FormatError when the index is damaged, names a file outside its folder, or does not
    agree with the shards about what lies where.
    """
    file = path.name
    homes, total = index(path)
    shards = sorted(set(homes.values()))
    if len(shards) > MAX_SHARDS:
        raise FormatError(f"{file} names {len(shards):,} shards (limit {MAX_SHARDS:,})")
    missing = [s for s in shards if not _may_be(path.parent / s)]
    if missing:
        raise FormatError(
            f"{file} names {amount(len(missing), 'shard')} not beside it: {listed(missing, 3)};"
            " fetch them"
        )
    with ExitStack() as opened:
        parts = [opened.enter_context(open_shard(path.parent / s, WEIGHTS)) for s in shards]
        found: dict[str, str] = {}
        for shard, part in zip(shards, parts, strict=True):
            for key in part.tensors:
                if key in found:
                    raise FormatError(
                        f"{file}: tensor {key[:80]!r} is in two shards, {found[key]} and {shard};"
                        " fetch the model again"
                    )
                found[key] = shard
        for key, shard in homes.items():
            if found.get(key) != shard:
                where = f"it is in {found[key]}" if key in found else "no shard has it"
                raise FormatError(
                    f"{file}: tensor {key[:80]!r} should be in {shard} and {where};"
                    " fetch the model again"
                )
        tensors, metadata, handles = joined(("", part) for part in parts)
        notes = [note for part in parts for note in part.notes]
        if extra := [key for key in found if key not in homes]:
            notes.append(
                f"{file} does not name {amount(len(extra))} of its shards: {listed(extra)}"
            )
        nbytes = sum(info.nbytes for info in tensors.values())
        if total is not None and total != nbytes:
            notes.append(f"{file} says {total:,} bytes of tensors; the shards hold {nbytes:,}")
        opened.pop_all()
    return Source(path, name, tensors, metadata, tuple(notes), handles=handles)


SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.(?P<kind>safetensors|bin)")
"""Names of shards."""


def shard_of(file: str) -> str:
    """What a file with a shard's name is: 'shard 1 of 3 of x.safetensors.index.json'; or ""."""
    found = SHARD.fullmatch(file)
    if found is None or int(found["parts"]) < 2:
        return ""
    index = f"{found['stem']}.{found['kind']}.index.json"
    return f"shard {int(found['part'])} of {int(found['parts'])} of {index}"


def _may_be(path: Path) -> bool:
    """Whether there is such a file; on the web that is found out by opening it."""
    return urls.is_url(path) or path.is_file()


def index(path: Path) -> tuple[dict[str, str], int | None]:
    """The shard of every tensor, and the size of all if the index says one."""
    handle = open_handle(path)
    try:
        if handle.size > MAX_INDEX:
            raise FormatError(
                f"{path.name} is no index of shards: it has {handle.size:,} bytes"
                f" (limit {MAX_INDEX:,})"
            )
        said = parsed(handle.head(handle.size), path.name)
    finally:
        handle.close()
    homes = said.get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise FormatError(
            f"{path.name} is JSON without a weight_map, so no index of shards; name the model file"
        )
    for key, shard in homes.items():
        if not isinstance(shard, str) or not is_plain(shard):
            raise FormatError(
                f"{path.name} has the tensor {key[:80]!r} in {str(shard)[:80]!r}, which is not the"
                " name of a file beside it"
            )
    about = said.get("metadata")
    total = about.get("total_size") if isinstance(about, dict) else None
    return homes, int(total) if isinstance(total, (int, float)) and 0 <= total < 1 << 63 else None


def parsed(text: bytes, file: str) -> dict[str, Any]:
    """A JSON object; twins among its keys are refused. Raises FormatError naming `file`."""
    try:
        said = json.loads(text.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise FormatError(f"{file} is not sound JSON ({reason[:120]}); fetch it again") from None
    if not isinstance(said, dict):
        raise FormatError(f"{file} is not a JSON object; fetch it again")
    return said


def is_plain(file: str) -> bool:
    """Whether a name that a file gives is that of something in its own folder, on any system."""
    return (
        0 < len(file) <= 255
        and file not in (".", "..")
        and file.isprintable()
        and not set(file) & set('/\\:*?"<>|')
    )


# ---- writing


@dataclass(frozen=True)
class Shards:
    """The files of a model to be written: (name, layout) each, and the other files' bytes.

    A model that needs one shard only is that one file, without an index.
    """

    files: Sequence[tuple[str, Layout]]
    others: Mapping[str, bytes]


def layout_shards(
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    limit: int,
    stem: str = "model",
    variant: str = "",
) -> Shards:
    """The shards of a model: tensors in the order of `entries`, `limit` bytes of them per shard.

    No tensor is split; one larger than `limit` has a shard of its own. `metadata` is in every
    shard's header. Raises Refusal when `limit` would give more shards than are read again.
    """
    if limit <= 0:
        raise Refusal(f"a shard of {limit:,} bytes holds nothing; say how many bytes one may have")
    groups: list[list[Entry]] = [[]]
    filled = 0
    for e in entries:
        if groups[-1] and filled + e.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(e)
        filled += e.nbytes
    if len(groups) > MAX_SHARDS:
        raise Refusal(
            f"{len(groups):,} shards of {limit:,} bytes are too many (limit {MAX_SHARDS:,});"
            " allow larger ones"
        )
    stem += f".{variant}" if variant else ""
    if len(groups) == 1:
        return Shards([(f"{stem}.safetensors", safetensors.layout(entries, metadata))], {})
    names = [f"{stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    pairs = zip(names, groups, strict=True)
    files = [(file, safetensors.layout(group, metadata)) for file, group in pairs]
    homes = {e.name: file for file, group in zip(names, groups, strict=True) for e in group}
    return Shards(files, {_index_name(stem, variant): _index_text(entries, homes)})


def _index_name(stem: str, variant: str) -> str:
    if variant:
        return f"{stem[: -len(variant) - 1]}.safetensors.index.{variant}.json"
    return f"{stem}.safetensors.index.json"


def _index_text(entries: Sequence[Entry], homes: Mapping[str, str]) -> bytes:
    total = sum(e.nbytes for e in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
