"""Make a result again from the recipe it carries, or check that it is what its recipe says."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plymix import api, engine, metadata, outputs, urls
from plymix import plan as planning
from plymix import recipe as recipes
from plymix.engine import ProgressCallback
from plymix.errors import Refusal, amount, listed
from plymix.finding import find, named, needed
from plymix.folder import configs
from plymix.formats import Folders, Handle, is_folder_name, open_model, sharded
from plymix.formats.base import Part
from plymix.plan import Plan
from plymix.recipe import LORA_KEY, METADATA_KEY, Model, Recipe

if TYPE_CHECKING:
    from plymix.loras import Made
    from plymix.loras.record import Record


@dataclass(frozen=True)
class Verdict:
    """Whether a file is what its recipe makes; `text` says so or names what differs."""

    ok: bool
    text: str


def embedded(path: str | os.PathLike[str]) -> Recipe | Record:
    """The recipe that the file `path` carries, or the record of a LoRA file made of others.

    Raises Refusal when it carries none.
    """
    if Path(path).suffix.lower() == ".toml":
        raise Refusal(f"{path} is a recipe, and a result is wanted: plymix run makes one of it")
    with open_model(path) as source:
        said, name = source.metadata, source.path.name
    if LORA_KEY in said and METADATA_KEY not in said:
        from plymix.loras import record

        return record.from_metadata(said, name)
    return recipes.from_metadata(said, name)


def replay(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    folders: Folders = (),
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> api.Result | Made:
    """Rebuild the result `path`, byte for byte, into `out` (default: NAME-replay in this folder).

    Inputs are found by name beside `path`, in this folder and in `folders`, and by content
    anywhere below `folders`. A model gives an `api.Result`, a LoRA file made of others a
    `loras.Made`. Raises Refusal that names an input that is missing or altered.
    """
    path = Path(urls.given(path, "path")).expanduser()
    folders = named(folders, "folders")
    own, recipe = _own_name(path), embedded(path)
    out = outputs.path_of(out or outputs.shortened(own.stem, f"-replay{own.suffix}"))
    if is_folder_name(out) != is_folder_name(own):
        kinds = ("a file", "a folder") if is_folder_name(out) else ("a folder", "a file")
        raise Refusal(
            f"{own.name} is {kinds[0]}, and {out} would be {kinds[1]}, which has other names:"
            " plymix convert makes one of the other"
        )
    places: Folders = (*folders, path.parent)
    inputs = (planning.locate(model.file, places) for model in recipe.models.values())
    api.ready(out, force, (path, *inputs))
    if not isinstance(recipe, Recipe):
        from plymix import loras

        files = _found(recipe.models, path, folders, progress)
        return loras.remade(recipe, files, out, force=force, threads=threads, progress=progress)
    with _planned(recipe, path, folders, progress) as plan:
        return api.run(plan, out, threads=threads, progress=progress)


def _own_name(path: Path) -> Path:
    """The name that a result was written under: of shards, that of their index without its end."""
    match = sharded.INDEX.fullmatch(path.name)
    return path.with_name(f"{match['stem']}.{match[2]}") if match else path


def _planned(
    recipe: Recipe, path: Path, folders: Folders, progress: ProgressCallback | None
) -> Plan:
    return planning.build(recipe, paths=_found(needed(recipe), path, folders, progress))


def _found(
    models: Mapping[str, Model], path: Path, folders: Folders, progress: ProgressCallback | None
) -> dict[str, Path]:
    return find(models, folders, (path.parent,), progress)


def verify(
    path: str | os.PathLike[str],
    *,
    folders: Folders = (),
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Verdict:
    """Whether `path` holds exactly what its recipe makes. Nothing is written.

    A LoRA file made of others is made again into a temporary file. Inputs are found as by `replay`.
    Raises Refusal when there is no recipe, or an input is missing or altered.
    """
    path = Path(urls.given(path, "path")).expanduser()
    folders = named(folders, "folders")
    recipe = embedded(path)
    if not isinstance(recipe, Recipe):
        from plymix.loras import again

        files = _found(recipe.models, path, folders, progress)
        return Verdict(*again.verified(path, recipe, files, threads=threads, progress=progress))
    with _planned(recipe, path, folders, progress) as plan:
        return _compare(plan, recipe, path, threads, progress)


def _compare(
    plan: Plan,
    recipe: Recipe,
    path: Path,
    threads: int,
    progress: ProgressCallback | None,
) -> Verdict:
    own = _own_name(path)
    tensors, layout = plan.layout(own, metadata.build(plan), configs)
    home = own if is_folder_name(own) else own.parent
    parts = layout.parts or (Part(own.name, 0, layout.size),)
    if missing := [part.name for part in parts if not (home / part.name).is_file()]:
        return Verdict(False, f"{path.name} lacks {listed(missing)}, which its recipe makes")
    with ExitStack() as stack:
        handles = [Handle(home / part.name) for part in parts]
        for handle, part in zip(handles, parts, strict=True):
            stack.callback(handle.close)
            if handle.size != part.size:
                return Verdict(
                    False,
                    f"{part.name} has {handle.size:,} bytes; its recipe makes {part.size:,}",
                )
        places = {t.name: layout.encoded.get(t.name, (t.offset, t.nbytes)) for t in tensors}
        target = _Comparison(parts, handles, sorted(at for at, _ in places.values()))
        within = target if layout.through is None else layout.through(target)
        job = engine.Job(plan.sources, within)
        engine.perform(job, tensors, threads=threads, progress=progress)
        wrong = [name for name, place in places.items() if target.differs(*place)]
        if wrong:
            return Verdict(
                False,
                f"{len(wrong)} of {amount(len(tensors))} of {path.name} differ from what its"
                f" recipe makes: {listed(wrong)}",
            )
        known = {metadata.pending(i): recipe.models[i.name].sha256 for i in plan.inputs}
        pieces = [(at, bytearray(piece)) for at, piece in engine.patched(layout.pieces, known)]
        for at, patch in layout.finish(target.read_at) if layout.finish else ():
            for start, piece in pieces:
                if start <= at < start + len(piece):
                    piece[at - start : at - start + len(patch)] = patch
        for at, piece in pieces:
            target.write_at(at, piece)
        if target.wrong:
            return Verdict(False, f"the tensors of {path.name} are right, its header differs")
    return Verdict(True, f"{path.name} is exactly what its recipe makes ({amount(len(tensors))})")


class _Comparison:
    """An engine target that compares with files instead of writing them.

    `offsets` are those of the tensors, in order: several may come in one write.
    """

    def __init__(
        self, parts: Sequence[Part], handles: Sequence[Handle], offsets: Sequence[int]
    ) -> None:
        self.waits = False
        self._starts = [part.start for part in parts]
        self._handles = handles
        self._offsets = offsets
        self._lock = threading.Lock()
        self.wrong: list[tuple[int, int]] = []

    def write_at(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        there = bytearray(len(view))
        self.read_at(offset, there)
        if there == view:
            return
        end = offset + len(view)
        inside = slice(bisect_right(self._offsets, offset), bisect_left(self._offsets, end))
        for a, b in pairwise((offset, *self._offsets[inside], end)):
            if there[a - offset : b - offset] != view[a - offset : b - offset]:
                with self._lock:
                    self.wrong.append((a, b))

    def read_at(self, offset: int, out: Any) -> None:
        i = bisect_right(self._starts, offset) - 1
        self._handles[i].read_at(offset - self._starts[i], out)

    def copy_from(self, handle: Any, offset: int, at: int, nbytes: int) -> int:
        return 0

    def differs(self, offset: int, nbytes: int) -> bool:
        """Whether a written range that differs touches [offset, offset + nbytes)."""
        return any(a < offset + nbytes and offset < b for a, b in self.wrong)
