"""Bring what you have: merges that other tools recorded, as plymix recipes.

    found = import_recipe("old-merge.safetensors")
    found.recipe, found.notes

One file per tool says which formats it reads and how sure their description is. Directions are
converted (plymix's alpha is the share of the second model), and what a recipe cannot say is told in
the notes; a method that plymix does not know is refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plymix import recipe as recipes
from plymix import texts, urls
from plymix.errors import Refusal, unknown
from plymix.importers import a1111, comfyui, mbw_gui, model_mixer, supermerger
from plymix.importers.base import Imported, Record

READERS = {
    "a1111": ("A1111", a1111.read),
    "chattiori": ("Chattiori", a1111.read),
    "comfyui": ("ComfyUI", comfyui.read),
    "mbw-gui": ("MBW-GUI", mbw_gui.read),
    "model-mixer": ("model-mixer", model_mixer.read),
    "supermerger": ("supermerger", supermerger.read),
}
"""Kind of record -> the tool's name, and what reads it."""

TYPES = {
    "webui": "a1111",
    "sd-webui-supermerger": "supermerger",
    "merge-models-chattiori": "chattiori",
}
"""What tools call themselves in `sd_merge_recipe`."""

__all__ = ["Imported", "import_recipe"]


def import_recipe(
    path_or_text: str | os.PathLike[str],
    *,
    kind: str | None = None,
    models: Mapping[str, str] | None = None,
    entry: int = -1,
) -> Imported:
    """The recipe of a merge by another tool.

    Takes a result (.safetensors, by its metadata), a ComfyUI graph (.json), a history
    (`mergehistory.csv`, `history.tsv`; `entry` is the line, -1 the last), an image's parameters
    (.txt), or the text of one of these. `kind` says whose it is where that is not plain. `models`
    says where models are, by the name or the hash that the record has. Raises Refusal.
    """
    if kind is not None and kind not in READERS:
        raise unknown("kind of record", kind, READERS)
    files = models or {}
    if not isinstance(files, Mapping):
        raise Refusal(f"models is {files!r}, not a table of names or hashes and files")
    text = urls.given(path_or_text, "path_or_text")
    looks_like_text = isinstance(path_or_text, str) and (
        "\n" in text or text.lstrip().startswith("{") or model_mixer.PREFIX in text
    )
    if looks_like_text:
        return _from_text(text, "text", kind, files, entry)
    path = Path(text).expanduser()
    if not os.path.exists(path):
        raise Refusal(f"{path} does not exist; name a merged model, a graph or a history")
    if path.suffix.lower() == ".toml":
        raise Refusal(f"{path} is a recipe already: plymix run takes it")
    if path.is_dir() or path.suffix.lower() in (".safetensors", ".ckpt", ".pt"):
        from plymix.formats import open_model

        if entry != -1:
            raise Refusal(f"entry {entry} is for a history of merges; {path.name} is none")
        with open_model(path) as source:
            return _from_metadata(dict(source.metadata), path.name, kind, files)
    return _from_text(texts.text(path, "the record"), path.name, kind, files, entry)


def _from_metadata(
    metadata: Mapping[str, Any], where: str, kind: str | None, files: Mapping[str, str]
) -> Imported:
    """What a result's metadata says, plymix's own record first."""
    if kind is None and metadata.keys() & {recipes.METADATA_KEY, recipes.LORA_KEY}:
        return Imported(recipes.from_metadata(metadata, where))
    said = _parsed(metadata.get("sd_merge_recipe"))
    if isinstance(said, dict) and kind != "comfyui":
        known = _parsed(metadata.get("sd_merge_models"))
        return _read(said, where, kind, files, known if isinstance(known, dict) else {})
    for name in ("prompt", "workflow"):
        graph = _parsed(metadata.get(name))
        if isinstance(graph, dict):
            return _read(graph, where, "comfyui", files)
    raise Refusal(
        f"{where} carries no record of a merge (plymix.recipe, sd_merge_recipe, prompt, workflow)"
    )


def _from_text(
    text: str, where: str, kind: str | None, files: Mapping[str, str], entry: int
) -> Imported:
    if text.lstrip().startswith("{"):
        found = _parsed(text)
        if not isinstance(found, dict):
            raise Refusal(f"{where} is not JSON")
        if {"models", "output"} <= found.keys():
            return Imported(recipes.from_dict(found))
        if found.keys() & {recipes.METADATA_KEY, "sd_merge_recipe", "prompt", "workflow"}:
            return _from_metadata(found, where, kind, files)
        return _read(found, where, kind, files)
    if model_mixer.PREFIX in text:
        return _read(model_mixer.settings(text), where, "model-mixer", files)
    rows = [row for row in csv.reader(io.StringIO(text), dialect=_dialect(text)) if any(row)]
    if len(rows) < 2 or len(rows[0]) < 4:
        raise Refusal(
            f"{where} is no history of merges; a file of presets goes to --presets of a merge"
        )
    lines = [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
    try:
        chosen = lines[entry]
    except IndexError:
        raise Refusal(f"{where} has {len(lines)} entries; there is no entry {entry}") from None
    heads = {h.strip().lower() for h in rows[0]}
    if kind is None:
        kind = "mbw-gui" if "weight_values" in heads else "supermerger"
    if kind == "supermerger":
        chosen = supermerger.from_row(chosen)
    found_recipe = _read(chosen, where, kind, files)
    if len(lines) == 1:
        return found_recipe
    at = range(len(lines))[entry] + 1
    return Imported(
        found_recipe.recipe, (f"{where}: entry {at} of {len(lines)}", *found_recipe.notes)
    )


def _dialect(text: str) -> type[csv.Dialect]:
    return csv.excel_tab if "\t" in text.partition("\n")[0] else csv.excel


def _read(
    fields: Mapping[str, Any],
    where: str,
    kind: str | None,
    files: Mapping[str, str],
    known: Mapping[str, Any] | None = None,
) -> Imported:
    kind = kind or _kind(fields, where)
    tool, read = READERS[kind]
    return read(Record(tool, dict(fields), files, known or {}))


def _kind(fields: Mapping[str, Any], where: str) -> str:
    """Whose record it is, by what it says of itself or by its shape."""
    said = fields.get("type")
    if isinstance(said, str):
        if said in TYPES:
            return TYPES[said]
        raise unknown(f"writer of the record in {where}", said, TYPES)
    if "nodes" in fields or any(
        isinstance(node, Mapping) and "class_type" in node for node in fields.values()
    ):
        return "comfyui"
    if any(str(name).startswith(model_mixer.PREFIX) for name in fields):
        return "model-mixer"
    if "weight_values" in fields:
        return "mbw-gui"
    if "primary_model_hash" in fields:
        return "a1111"
    raise Refusal(f"{where} is not a record that plymix knows; say its kind: {', '.join(READERS)}")


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
