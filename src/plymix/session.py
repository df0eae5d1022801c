"""A recipe kept open: change one value, and only the tensors it touches are made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from plymix import api, engine, hashes, kernels, outputs, urls
from plymix import plan as planning
from plymix.engine import ProgressCallback
from plymix.engine.worker import prepare
from plymix.errors import Refusal
from plymix.expr import calls
from plymix.expression import Expression
from plymix.finding import find, named, needed
from plymix.formats import Folders, Source, open_model
from plymix.plan import Plan
from plymix.recipe import Model, Recipe
from plymix.setting import with_setting


class Session:
    """A recipe kept open, to be changed and made again with as little work as possible.

        with Session(recipe) as session:
            session.write("out.safetensors")
            session.set("steps.mix.alpha.blocks.IN05", 0.3)   # re-plans
            session.changed                                   # names of the tensors it touches
            session.tensor(name)                              # one of them, as an array
            session.write("out.safetensors", force=True)      # computes only those

    What `write` makes is byte-equal to a full merge of the changed recipe.

    Models are found as `plymix run` and `replay` find them: as the recipe names them, then by name
    in `folders`; those whose SHA-256 the recipe says by content too, anywhere below `folders`, of
    which `progress` is told. Raises Refusal that names what is missing or altered.
    """

    def __init__(
        self,
        recipe: Recipe | Expression,
        *,
        folders: Folders = (),
        progress: ProgressCallback | None = None,
    ) -> None:
        self._folders = named(folders, "folders")
        self._progress = progress
        self._open: dict[Path, Source] = {}
        self._found: dict[Model, Path] = {}  # those that the recipe knows the content of
        self._written: tuple[str, Plan] | None = None  # the file's identity, what was made
        self.changed: tuple[str, ...] = ()
        try:
            self.plan = self._build(_whole(recipe))
        except BaseException:
            self.close()
            raise

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def set(self, path: str, value: Any) -> tuple[str, ...]:
        """Change one value of the recipe; returns the names of the tensors that it changes."""
        if not isinstance(path, str):
            raise Refusal(f"path is {path!r}, not a text such as steps.mix.alpha.base")
        return self.change(with_setting(self.recipe, path, json.dumps(value, default=_plain)))

    def change(self, recipe: Recipe | Expression) -> tuple[str, ...]:
        """Go on with another recipe; returns the names of the tensors that differ.

        Raises Refusal where it cannot be merged; the session is as it was then.
        """
        before, self.plan = self.plan, self._build(_whole(recipe))
        self.changed = before.changes(self.plan)
        return self.changed

    def tensor(self, name: str) -> Any:
        """One tensor of the result as a float32 array (rounded to the output's dtype first)."""
        tensor = next((t for t in self.plan.tensors if t.name == name), None)
        if tensor is None:
            raise Refusal(f"the result has no tensor {name!r}")
        target = engine.MemoryTarget(tensor.nbytes)
        job = engine.Job(self.plan.sources, target)
        if any(True for _ in calls(tensor.expr)):
            prepare(job, self.plan.tensors)  # what a method learns, it learns from all of them
        engine.perform(job, [tensor], threads=1)
        return kernels.float32(target.data, tensor.dtype).reshape(tensor.shape)

    def write(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool = False,
        threads: int = 0,
        progress: ProgressCallback | None = None,
    ) -> api.Result:
        """Write the result. Tensors that the last write to `out` already made are copied."""
        path = outputs.path_of(urls.given(out, "out"))
        api.ready(path, force)
        local = [known for known in self._open if not urls.is_url(known)]
        if any(path.exists() and path.samefile(known) for known in local):
            raise Refusal(f"{path} is an input of this session; choose another name")
        last = self._written
        if last is not None and path.is_file() and last[0] == hashes.identity(path):
            with open_model(path) as source:
                made = (source, last[1])
                result = api.run(self.plan, path, threads=threads, progress=progress, made=made)
        else:
            result = api.run(self.plan, path, threads=threads, progress=progress)
        # Shards and folders are made whole each time.
        self._written = (hashes.identity(path), self.plan) if path.is_file() else None
        return result

    def _build(self, recipe: Recipe) -> Plan:
        def kept(path: Path) -> Source:
            if path not in self._open:
                self._open[path] = open_model(path)
            return self._open[path]

        known = needed(recipe)
        new = {name: model for name, model in known.items() if model not in self._found}
        for name, path in find(new, self._folders, progress=self._progress).items():
            self._found[new[name]] = path
        return planning.build(
            recipe,
            folders=self._folders,
            paths={name: self._found[model] for name, model in known.items()},
            open_file=kept,
            keep_open=True,
        )

    def close(self) -> None:
        for source in self._open.values():
            source.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(recipe: Recipe | Expression) -> Recipe:
    found = recipe.recipe() if isinstance(recipe, Expression) else recipe
    if not isinstance(found, Recipe):
        raise Refusal(f"{recipe!r} is no Recipe or expression, of which a session is made")
    return found


def _plain(value: Any) -> Any:
    """A number or an array of numpy as JSON has them."""
    if not hasattr(value, "tolist"):
        raise Refusal(f"{value!r} is no value of a recipe: give numbers, texts, lists or dicts")
    return value.tolist()
