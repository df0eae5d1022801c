"""`run`, `recipe show`, `recipe import`, `replay` and `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from plymix.cli import screen
from plymix.cli.options import (
    Arch,
    BlockView,
    Configs,
    DryRun,
    Folders,
    Force,
    Json,
    OnDevice,
    Output,
    Presets,
    Settings,
    Strict,
    Threads,
    Whole,
    argument,
    option,
)
from plymix.cli.showing import finish, made
from plymix.errors import Refusal, listed

if TYPE_CHECKING:
    from plymix.plan import Plan
    from plymix.recipe import Recipe

Kind = Literal["a1111", "chattiori", "comfyui", "mbw-gui", "model-mixer", "supermerger"]
"""The keys of `importers.READERS`, which is not loaded for a help page; a test compares them."""

EXAMPLES = {
    "run": "Example:\n  PROG recipe.toml -o final.safetensors --set steps.mix.alpha.base=0.3"
    " --models ~/models",
    "replay": "Example:\n  PROG final.safetensors -o again.safetensors --models ~/models",
    "verify": "Example:\n  PROG final.safetensors --models ~/models",
    "recipe show": "Example:\n  PROG final.safetensors > recipe.toml",
    "recipe import": "Example:\n  PROG old-merge.safetensors -o recipe.toml",
}


def load(
    file: str,
    settings: Sequence[str],
    presets: str = "",
    **output: str,
) -> tuple[Recipe, list[str]]:
    """A recipe file with the options said with it, and the folder it lies in.

    `output` are fields of its [output]; those that say nothing leave the recipe's.
    """
    from plymix import api
    from plymix import recipe as recipes
    from plymix.setting import with_setting

    path = Path(file).expanduser()
    if not os.path.exists(path):
        raise Refusal(f"{file} does not exist; name a recipe file (.toml)")
    found = recipes.load(path)
    for setting in settings:
        at, equals, value = setting.partition("=")
        if not equals or not at:
            raise Refusal(f"--set {setting}: write PATH=VALUE, as in steps.mix.alpha=0.3")
        found = with_setting(found, at.strip(), value.strip())
    if any(output.values()):
        found = recipes.with_output(found, **{k: v for k, v in output.items() if v})
    note_presets(presets)
    found = api.with_own_presets(found, api.own_presets(presets))
    return found, [str(path.parent)]


def note_presets(file: str) -> None:
    """Say which presets of a user's file are used in place of plymix's of the same name."""
    from plymix import api, weights

    if names := weights.overridden(api.own_presets(file)):
        screen.note(f"{file}: its {listed(names)} is used, not plymix's, which has other numbers")


def planned(
    recipe: Recipe,
    folders: Sequence[str] = (),
    beside: Sequence[str] = (),
    *,
    strict: bool = False,
    words: Callable[[str], str] = str,
) -> Plan:
    """The plan of a recipe. `words` says its notes as the command's user would."""
    from dataclasses import replace

    from plymix import finding, plan

    _checked(folders)
    with screen.ProgressLine() as progress:
        paths = finding.find(finding.needed(recipe), folders, beside, progress)
    found = plan.build(recipe, folders=(*folders, *beside), paths=paths, strict=strict)
    return replace(found, notes=tuple(map(words, found.notes)))


def _checked(folders: Sequence[str]) -> Sequence[str]:
    for folder in folders:
        if not os.path.isdir(Path(folder).expanduser()):
            raise Refusal(f"--models {folder} is not a folder")
    return folders


def run(
    recipe: Annotated[str, argument("The recipe file.")],
    /,
    *,
    output: Output = "",
    set: Settings = (),
    presets: Presets = "",
    arch: Arch = "",
    block_view: BlockView = None,
    models: Folders = (),
    strict: Strict = False,
    configs: Configs = "",
    force: Force = False,
    threads: Threads = 0,
    device: OnDevice = "cpu",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run a recipe (TOML) into a file or folder.

    Models are looked for as the recipe names them, then in --models, then beside the recipe. In
    every step alpha is the share of the second model.
    """
    from plymix import api

    found, beside = load(recipe, set, presets, arch=arch, block_view=block_view or "")
    found, path = api.target(found, output, force, (*models, *beside), dry=dry_run)
    with planned(found, models, beside, strict=strict) as plan:
        finish(plan, path, json, dry_run, threads, device, configs)


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
    from plymix import api
    from plymix import replay as replaying
    from plymix.cli import lora_files

    with screen.ProgressLine() as progress:
        result = replaying.replay(
            file, output or None, folders=_checked(models), force=force, progress=progress
        )
    for text in result.notes:
        screen.note(text)
    if json:
        screen.put_json(result.to_dict())
    elif isinstance(result, api.Result):
        screen.put(made(result, result.formula))
    else:
        lora_files.show(result)


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
        verdict = replaying.verify(file, folders=_checked(models), progress=progress)
    if json:
        screen.put_json({"ok": verdict.ok, "text": verdict.text})
    else:
        screen.put(verdict.text)
    return 0 if verdict.ok else 1


def show(file: Annotated[str, argument("A result of plymix.")], /, *, json: Json = False) -> None:
    """Print the recipe that a result carries.

    As TOML that plymix run takes, or as JSON. Of a LoRA file made of others: what it was made of
    and how.
    """
    from plymix import recipe as recipes
    from plymix import replay as replaying

    found = replaying.embedded(Path(file))
    if isinstance(found, recipes.Recipe):
        said, toml = recipes.to_dict(found), recipes.to_toml(found)
    else:
        from plymix.loras import record

        said, toml = record.to_dict(found), record.to_toml(found)
    if json:
        screen.put_json(said)
    else:
        screen.put(toml.rstrip())


def import_(
    file: Annotated[str, argument("A merged model, a ComfyUI graph, a history or its text.")],
    /,
    *,
    output: Annotated[
        str, option("The recipe: .toml or .json.", "--output", "-o", default=False, metavar="FILE")
    ] = "",
    kind: Annotated[
        Kind | None, option("Whose record it is, where that is not plain.", default=False)
    ] = None,
    entry: Annotated[Whole, option("Line of a history; -1 is the last.", metavar="N")] = -1,
    model: Annotated[
        tuple[str, ...],
        option(
            "Where a model is, by its name or hash in the record; repeatable.",
            default=False,
            metavar="NAME=FILE",
        ),
    ] = (),
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn another tool's record of a merge into a recipe.

    Reads what A1111, supermerger, Chattiori, MBW-GUI, model-mixer and ComfyUI left in a result, a
    graph or a history. Weights become the share of the second model; what a recipe cannot say is
    told.
    """
    from plymix import outputs, urls
    from plymix import recipe as recipes
    from plymix.engine.files import write_whole
    from plymix.importers import import_recipe

    path = outputs.path_of(output)
    if output:
        if path.suffix.lower() not in (".toml", ".json"):
            raise Refusal(f"{output}: a recipe is a .toml or .json; name it {path.stem}.toml")
        outputs.file(path, force)
    models = {}
    for text in model:
        name, _, where = text.partition("=")
        if not name or not where:
            raise Refusal(
                f"--model {text}: write NAME=FILE, as in --model a1b2c3d4e5=a.safetensors"
            )
        models[name] = where
    found = import_recipe(file, kind=kind, models=models, entry=entry)
    known = {model.file for model in found.recipe.models.values()}
    if idle := [name for name, where in models.items() if urls.public(where) not in known]:
        raise Refusal(
            f"--model {idle[0]}={models[idle[0]]}: no model of the record is called so; it has"
            f" {listed(sorted(known))}"
        )
    for note in found.notes:
        screen.note(note)
    toml = recipes.to_toml(found.recipe)
    if output:
        as_json = path.suffix.lower() == ".json"
        write_whole(path, (recipes.to_json(found.recipe) if as_json else toml).encode())
    if json:
        screen.put_json({"recipe": recipes.to_dict(found.recipe), "notes": list(found.notes)})
    elif not output:
        screen.put(toml.rstrip())
