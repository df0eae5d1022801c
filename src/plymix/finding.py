"""Where the models of a recipe are that says their content: a stored recipe, or a printed one."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plymix import hashes, urls
from plymix.errors import Refusal, listed
from plymix.formats import Folders, open_model
from plymix.recipe import Model, Recipe

if TYPE_CHECKING:
    from plymix.engine import ProgressCallback


def named(folders: object, name: str) -> tuple[str, ...]:
    """The folders, one or several, that an argument called `name` has. Raises Refusal."""
    several = isinstance(folders, Iterable) and not isinstance(folders, (str, os.PathLike))
    found: Iterable[object] = folders if several else (folders,)  # type: ignore[assignment]
    return tuple(urls.given(folder, name) for folder in found)


def needed(recipe: Recipe) -> dict[str, Model]:
    """The models that `recipe` needs and knows the SHA-256 of, by their names in it."""
    used = {name for step in recipe.order() for name in recipe.uses(step)}
    used |= {recipe.base(), *recipe.parts}
    return {name: model for name, model in recipe.models.items() if name in used and model.sha256}


def find(
    models: Mapping[str, Model],
    folders: Folders = (),
    beside: Folders = (),
    progress: ProgressCallback | None = None,
) -> dict[str, Path]:
    """The files of `models`, whose SHA-256 are known, by their names.

    They are looked for by name as a recipe has it, in `folders` and in `beside`, and by content
    anywhere below `folders`. Raises Refusal that names all that are missing or altered.
    """
    places = [Path(), *(Path(f).expanduser() for f in (*folders, *beside))]
    found: dict[str, Path] = {}
    trouble: list[str] = []
    stopped = hashing(progress, found, len(models))
    for name, model in models.items():
        here = next((c for c in _named(model, places) if _is(model, c, stopped)), None)
        here = here or _by_content(model, folders, stopped)
        web = urls.path(model.file) if urls.is_url(model.file) else None
        if here is None and web is not None and _is(model, web, stopped):
            here = web
        if here is not None:
            found[name] = here
            continue
        altered = next(_named(model, places), None) or _namesake(model, folders) or web
        if altered is not None:
            trouble.append(
                f"{urls.text(altered)} is not the {model.file} that the recipe names (other"
                f" content: the SHA-256 of that begins {model.sha256[:10]})"
            )
        else:
            size = f" ({model.size:,} bytes)" if model.size else ""
            trouble.append(f"{model.file}{size} is missing")
    if trouble:
        raise Refusal(f"{listed(trouble, 4)}; say where the models are with --models FOLDER")
    return found


def hashing(
    progress: ProgressCallback | None, found: Collection[object], total: int
) -> Callable[[], bool]:
    """Tells `progress` of the hashing; whether it wishes to stop."""
    began = time.monotonic()

    def stopped() -> bool:
        if progress is None:
            return False
        from plymix.engine import goes_on

        return not goes_on(progress, "hashing the inputs", len(found), total, began)

    return stopped


def _named(model: Model, places: Sequence[Path]) -> Iterator[Path]:
    """The files of the model's name that there are."""
    if urls.is_url(model.file):
        names = [Path(urls.name(model.file))]
    else:
        path = Path(model.file).expanduser()
        names = [path, Path(path.name)]
    candidates = dict.fromkeys(place / name for place in places for name in names)
    return (candidate for candidate in candidates if os.path.exists(candidate))


def _namesake(model: Model, folders: Folders) -> Path | None:
    """A file of the model's name anywhere below `folders`."""
    name = glob.escape(urls.name(model.file))
    return next((path for f in folders for path in Path(f).expanduser().rglob(name)), None)


def _by_content(model: Model, folders: Folders, stopped: Callable[[], bool]) -> Path | None:
    for folder in folders:
        for candidate in sorted(Path(folder).expanduser().rglob("*")):
            if _is(model, candidate, stopped):
                return candidate
    return None


def _is(model: Model, path: Path, stopped: Callable[[], bool]) -> bool:
    files, size = _files(path)
    if not files or (model.size and size != model.size):
        return False
    return hashes.model_sha256(files, stopped) == model.sha256.lower()


def _files(path: Path) -> tuple[tuple[Path, ...], int]:
    """The files of the model at `path` and their bytes: itself, or those of a folder or an index of
    shards."""
    if os.path.isfile(path) and path.suffix != ".json":
        return (path,), path.stat().st_size
    try:
        with open_model(path) as source:
            return source.files, source.nbytes
    except Refusal:
        if urls.is_url(path):
            raise  # that it cannot be fetched is another matter
        return (), 0
