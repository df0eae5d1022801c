"""Recipe + headers -> Plan: every tensor of the result, and exactly what must be read to make it.

Every refusal happens here, before the first tensor is read. A plan accounts for every key of every
input, folds nests of linear steps to one sum per tensor, and fixes the output's header.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from plymix import urls
from plymix.archs import Architecture
from plymix.errors import Refusal
from plymix.formats import Folders, open_model
from plymix.formats.base import Source
from plymix.plan.accounting import Planner
from plymix.plan.opening import fitted
from plymix.plan.values import ANY, MAX_IDS, Fate, Input, Plan, counts
from plymix.recipe import Recipe, asking

__all__ = [
    "ANY",
    "MAX_IDS",
    "Fate",
    "Input",
    "Plan",
    "available_cpus",
    "build",
    "counts",
    "fitted",
    "locate",
    "own_architecture",
]


def build(
    recipe: Recipe,
    *,
    folders: Folders = (),
    paths: Mapping[str, Path] | None = None,
    strict: bool = False,
    open_file: Callable[[Path], Source] = open_model,
    keep_open: bool = False,
) -> Plan:
    """Plan `recipe`. Model files are looked for as named, then in each of `folders`.

    `paths` says where a model is (by its name in the recipe) for those already found.

    With `strict`, keys that some models have and others lack are refused. Raises Refusal; every
    file it opened is closed again then, but with `keep_open`.
    """
    opened: list[Source] = []

    def open_counted(name: str) -> Source:
        known = (paths or {}).get(name)
        model = recipe.models[name]
        with asking(recipe, name):
            source = open_file(known or locate(model.file, folders))
        opened.append(source)
        if model.size and source.nbytes != model.size:
            raise Refusal(
                f"{urls.text(source.path)} has {source.nbytes:,} bytes; the recipe was written for"
                f" a {model.file} of {model.size:,}"
            )
        return source

    try:
        recipe, own = own_architecture(recipe, folders)
        return Planner(recipe, open_counted, strict, own).plan()
    except BaseException:
        for source in () if keep_open else opened:
            source.close()
        raise


def own_architecture(recipe: Recipe, folders: Folders = ()) -> tuple[Recipe, Architecture | None]:
    """The architecture that `recipe` describes, and the recipe with it in place of its file's name.

    Raises Refusal that names the file and the field.
    """
    said = recipe.output.arch
    if said in ("", "any"):
        return recipe, None
    from plymix.archs import own

    if isinstance(said, str):
        said = own.read(locate(said, folders))
        recipe = msgspec.structs.replace(
            recipe, output=msgspec.structs.replace(recipe.output, arch=said)
        )
    return recipe, own.architecture(said)


def locate(file: str, folders: Folders) -> Path:
    """`file` as named, or in one of `folders` (by its whole relative path, then by its name)."""
    if urls.is_url(file):
        return urls.path(file)
    path = Path(file).expanduser()
    if os.path.exists(path) or path.is_absolute():
        return path
    for folder in (Path(folder).expanduser() for folder in folders):
        for candidate in (folder / path, folder / path.name):
            if os.path.exists(candidate):
                return candidate
    return path


def available_cpus() -> int:
    """Processors this process may use, at most 8: beyond that the disk is the limit."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)
