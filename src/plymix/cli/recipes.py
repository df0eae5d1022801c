"""`run`, `recipe show`, `replay` and `verify`."""

from __future__ import annotations

import json as text_json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plymix.cli import screen
from plymix.cli.options import (
    Folders,
    Force,
    Json,
    OnDevice,
    Output,
    Presets,
    Settings,
    Strict,
    Threads,
    argument,
    option,
)
from plymix.errors import Refusal

if TYPE_CHECKING:
    from plymix.plan import Plan
    from plymix.recipe import Recipe

EXAMPLES = {
    "run": "Example:\n  PROG recipe.toml -o final.safetensors --set steps.mix.alpha.base=0.3"
    " --models ~/models",
    "replay": "Example:\n  PROG final.safetensors -o again.safetensors --models ~/models",
    "verify": "Example:\n  PROG final.safetensors --models ~/models",
    "recipe show": "Example:\n  PROG final.safetensors > recipe.toml",
}


def load(
    file: str, settings: Sequence[str], folders: Sequence[str], presets: str = ""
) -> tuple[Recipe, list[str]]:
    """A recipe file with `--set` and `--presets` applied, and where its models are looked for."""
    from plymix import api
    from plymix import recipe as recipes

    path = Path(file).expanduser()
    if not path.exists():
        raise Refusal(f"{file} does not exist; name a recipe file (.toml)")
    found = recipes.load(path)
    for setting in settings:
        at, equals, value = setting.partition("=")
        if not equals or not at:
            raise Refusal(f"--set {setting}: write PATH=VALUE, as in steps.mix.alpha=0.3")
        found = recipes.with_setting(found, at.strip(), value.strip())
    found = api.with_own_presets(found, api.own_presets(presets))
    return found, [*folders, str(path.parent)]


def planned(recipe: Recipe, folders: Sequence[str] = (), *, strict: bool = False) -> Plan:
    from plymix import plan

    for folder in folders:
        if not Path(folder).is_dir():
            raise Refusal(f"--models {folder} is not a folder")
    return plan.build(recipe, folders=folders, strict=strict)


def run(
    recipe: Annotated[str, argument("The recipe file.")],
    /,
    *,
    output: Output = "",
    set: Settings = (),
    presets: Presets = "",
    models: Folders = (),
    strict: Strict = False,
    force: Force = False,
    threads: Threads = 0,
    device: OnDevice = "cpu",
    dry_run: Annotated[
        bool, option("Show what would be done, as plymix explain does.", default=False)
    ] = False,
    json: Json = False,
) -> None:
    """Run a recipe (TOML) into one file.

    Models are looked for as the recipe names them, then in --models, then beside the recipe. In
    every step alpha is the share of the second model.
    """
    from plymix import api
    from plymix.cli import merging

    found, folders = load(recipe, set, models, presets)
    if output or not dry_run:
        path = api.output_path(found, output)
        api.ready(path, force)
    with planned(found, folders, strict=strict) as plan:
        if dry_run:
            merging.show_plan(plan, json)
        else:
            merging.show_result(plan, merging.carry_out(plan, path, threads, device), json)


def replay(
    file: Annotated[str, argument("A result of plymix.")],
    /,
    *,
    output: Output = "",
    models: Folders = (),
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a result again from the recipe in it, byte for byte.

    The models are found by name or by content; a missing or changed one is refused by name. Without
    --output the result is called FILE-replay, in the current folder.
    """
    from plymix import replay as replaying
    from plymix.cli.merging import made

    with screen.ProgressLine() as progress:
        result = replaying.replay(
            file, output or None, folders=models, force=force, progress=progress
        )
    for text in result.notes:
        screen.note(text)
    if json:
        screen.put_json(result.to_dict())
    else:
        screen.put(made(result, result.formula))


def verify(
    file: Annotated[str, argument("A result of plymix.")],
    /,
    *,
    models: Folders = (),
    json: Json = False,
) -> int:
    """Tell whether a result is what its recipe says.

    Exit code 0 if it is, 1 if not.
    """
    from plymix import replay as replaying

    with screen.ProgressLine() as progress:
        verdict = replaying.verify(file, folders=models, progress=progress)
    if json:
        screen.put_json({"ok": verdict.ok, "text": verdict.text})
    else:
        screen.put(verdict.text)
    return 0 if verdict.ok else 1


def show(file: Annotated[str, argument("A result of plymix.")], /, *, json: Json = False) -> None:
    """Print the recipe that a result carries.

    As TOML that plymix run takes, or as JSON.
    """
    from plymix import api
    from plymix import recipe as recipes

    with api.open(file) as source:
        found = recipes.from_metadata(source.metadata, source.path.name)
    if json:
        screen.put_json(recipes.to_dict(found))
    else:
        screen.put(to_toml(recipes.to_dict(found)))


# --- TOML ---------------------------------------------------------------------------------------


def to_toml(recipe: dict[str, Any]) -> str:
    """A recipe, as `plymix.recipe.to_dict` gives it, as TOML for people."""
    tables: list[tuple[str, dict[str, Any]]] = [("models", recipe["models"])]
    tables += [(f"steps.{_key(name)}", step) for name, step in recipe["steps"].items()]
    tables.append(("output", recipe["output"]))
    return "\n\n".join("\n".join(_table(*table)) for table in tables)


def _table(name: str, fields: dict[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    for key, value in fields.items():
        yield f"{_key(key)} = {_value(value)}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    """A value on one line. JSON's spelling is TOML's for all but tables and unprintable letters."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    text = text_json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
