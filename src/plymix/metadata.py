"""What a result says about itself: its recipe, ModelSpec, and A1111's merge records.

Names and hashes of the inputs only, never a path; of files on the web, their address without what
may be secret in it. Hashes that are not known yet stand in as
place-holders of the same length (`pending`), which the engine replaces when they are.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from msgspec.structs import replace

from plymix import hashes, urls
from plymix.archs import Architecture
from plymix.errors import Refusal
from plymix.formats.base import Readable
from plymix.plan import Input, Plan
from plymix.recipe import METADATA_KEY, PARTS, Model, Recipe, Step, from_json, to_json
from plymix.respelling import NAMES_KEY, habits, remembered

CONFIG_KEY = "plymix.model_config"
"""What shapes cannot tell of a model's networks, as JSON: `plymix.images.live` reads it."""

_WHOLE = re.compile(r"(?:[A-Za-z]:|~)?[/\\][^\n]*[^/\\\n]").fullmatch
"""Matches a whole path, of Windows or of others."""

SAMPLES = 16
"""Places at which files are looked at that may be one."""

A1111_METHODS = {"weighted_sum": "Weighted sum", "add_difference": "Add difference"}


def pending(i: Input) -> str:
    """The place-holder of an input's SHA-256: 64 characters that occur nowhere else."""
    return f"<plymix: sha256 of input {i.index:>4} is not known yet>".ljust(64, "-")


def today() -> str:
    """The date a result carries (ISO 8601, UTC), or that of SOURCE_DATE_EPOCH."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    import datetime

    utc = datetime.timezone.utc
    if epoch and not epoch.isdecimal():
        raise Refusal(f"SOURCE_DATE_EPOCH = {epoch!r} is not a number of seconds")
    now = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch else None
    return (now or datetime.datetime.now(utc)).date().isoformat()


def recorded(plan: Plan) -> Recipe:
    """The recipe as it is stored: file names without folders, sizes, hashes, the date.

    It comes back from its canonical JSON, so that a replay starts from the very same value.
    """
    models = dict(plan.recipe.models)
    for i in plan.inputs:
        file = i.file if urls.is_url(i.file) else i.label
        models[i.name] = Model(file, i.source.nbytes, pending(i))
    used = {i.name for i in plan.inputs}
    output = replace(plan.recipe.output, file="", date=plan.recipe.output.date or today())
    steps = {name: plan.recipe.steps[name] for name in plan.recipe.order()}
    stored = Recipe({n: m for n, m in models.items() if n in used}, steps, output)
    return from_json(to_json(stored))


def build(plan: Plan, stopped: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """The result's metadata: text to text.

    Inputs that look like one file, or like an ancestor of another, are hashed for it; `stopped` is
    asked meanwhile. Raises Cancelled when it says True.
    """
    recipe = recorded(plan)
    found = {**_carried(plan), METADATA_KEY: to_json(recipe), "format": "pt"}
    if config := plan.base.source.metadata.get(CONFIG_KEY):
        found[CONFIG_KEY] = config
    if plan.components and plan.arch and (names := _names(plan.base, plan.arch)):
        found[NAMES_KEY] = json.dumps(names)
    found.update(_modelspec(plan, recipe))
    found.update(_a1111(plan, recipe, stopped))
    return found


def _names(base: Input, arch: Architecture) -> dict[str, str]:
    """The habits by which the base model's file has its own names, or once had."""
    once = remembered(base.source.metadata)
    if once or base.paired.dialect:
        return once
    return habits({key: info.name for key, info in base.tensors.items()}, arch)


def _carried(plan: Plan) -> dict[str, str]:
    """What the base says of itself and still holds where nothing was merged: author, licence ..."""
    if plan.recipe.steps:
        return {}
    output = plan.recipe.output
    spec_only = output.component or "metadata" in output.drop
    own = ("plymix.", "modelspec.hash", "sshs_")
    return {
        key: value
        for key, value in plan.base.source.metadata.items()
        if not key.startswith(own) and (key.startswith("modelspec.") or not spec_only)
    }


def _modelspec(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """SAI ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec)."""
    names = [PurePath(i.label).stem for i in plan.inputs]
    found = {
        "sai_model_spec": "1.0.1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": recipe.output.title or f"plymix merge of {' + '.join(dict.fromkeys(names))}",
        "date": recipe.output.date,
        "merged_from": ", ".join(dict.fromkeys(names)),
        "description": f"Merged with plymix: {formula(recipe)}",
        **_own_words(plan, recipe),
    }
    if plan.arch is not None:
        found["architecture"] = plan.arch.modelspec_id(plan.denoiser.detection.variant)
    other = plan.alone and plan.arch and plan.alone != plan.arch.denoiser.name
    if other:
        found["architecture"] += f"/{plan.alone}"
    if plan.denoiser.prediction and not other:
        found["prediction_type"] = plan.denoiser.prediction
    if resolution := plan.base.source.metadata.get("modelspec.resolution"):
        found["resolution"] = resolution
    return {f"modelspec.{key}": value for key, value in found.items() if value}


def _own_words(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """Title and description of a model that nothing was merged into: its own."""
    if recipe.steps:
        return {}
    said = plan.base.source.metadata
    title = said.get("modelspec.title") or PurePath(plan.base.label).stem
    words = {"title": recipe.output.title or f"{title} {plan.alone}".rstrip()}
    own = said.get("modelspec.description", "")
    return {**words, "description": own or f"Made with plymix: {formula(recipe)}"}


def _a1111(plan: Plan, recipe: Recipe, stopped: Callable[[], bool]) -> dict[str, str]:
    """`sd_merge_recipe` and `sd_merge_models` as A1111's checkpoint merger writes them."""
    last = recipe.steps.get(recipe.final)
    by_name = {i.name: i for i in plan.inputs}
    # A step among the inputs has no hash; its place stays empty.
    inputs = [by_name.get(n) for n in (last.inputs if last else (recipe.final,))]
    tokens = [pending(i) if i else None for i in inputs] + [None] * 3
    alpha = last.params.get("alpha", 0.5) if last else 0.0
    said = {
        "type": "plymix",
        "primary_model_hash": tokens[0],
        "secondary_model_hash": tokens[1],
        "tertiary_model_hash": tokens[2],
        "interp_method": A1111_METHODS.get(last.method, last.method)
        if last
        else "No interpolation",
        "multiplier": alpha if isinstance(alpha, (int, float)) else json.dumps(alpha),
        "save_as_half": recipe.output.dtype == "fp16",
        "custom_name": recipe.output.title,
        "config_source": 0,
        "bake_in_vae": by_name[recipe.output.vae].label if recipe.output.vae in by_name else "None",
        "discard_weights": "",
        "is_inpainting": plan.denoiser.detection.variant == "inpainting",
        "is_instruct_pix2pix": plan.denoiser.detection.variant == "pix2pix",
        "formula": formula(recipe),
    }
    models = _a1111_models(plan, stopped)
    return {"sd_merge_recipe": json.dumps(said), "sd_merge_models": json.dumps(models)}


def _a1111_models(plan: Plan, stopped: Callable[[], bool]) -> dict[str, Any]:
    """The inputs and their ancestors by their SHA-256, each once, whatever its names are.

    An input's SHA-256 is computed here only where it may be that of another record.
    """

    @cache
    def sha256(index: int) -> str:
        i = plan.inputs[index]
        known = plan.recipe.models[i.name].sha256.lower()
        return known or hashes.in_background(i.source.files, stopped)

    ancestors: dict[str, Any] = {}
    for i in plan.inputs:
        ancestors.update(_ancestors(i.source.metadata))
    short = {m.get("legacy_hash") for m in ancestors.values() if isinstance(m, dict)}
    models: dict[str, Any] = {}
    for i in plan.inputs:
        twins = (j.index for j in plan.inputs[: i.index] if _may_be_one(i, j))
        if any(sha256(i.index) == sha256(twin) for twin in twins):
            continue
        files = i.source.files
        legacy = hashes.legacy_hash(files[0]) if len(files) == 1 else ""
        if legacy in short:
            ancestors.pop(sha256(i.index), None)
        models[pending(i)] = {
            "name": i.label,
            "legacy_hash": legacy,
            "sd_merge_recipe": _parsed(i.source.metadata.get("sd_merge_recipe")),
        }
    return ancestors | models


def _may_be_one(a: Input, b: Input) -> bool:
    """False where two inputs have not the same content: by their sizes, and some of their bytes."""
    pairs = list(zip(a.source.handles, b.source.handles, strict=False))
    if [x.size for x in a.source.handles] != [y.size for y in b.source.handles]:
        return False
    if a.source.remote or b.source.remote:
        return True
    places = ((x, y, x.size * k // SAMPLES) for x, y in pairs for k in range(SAMPLES))
    return all(_piece(x, at) == _piece(y, at) for x, y, at in places)


def _piece(file: Readable, at: int) -> bytearray:
    piece = bytearray(min(512, file.size - at))
    file.read_at(at, piece)
    return piece


def _ancestors(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The flat ancestry an input carries itself."""
    found = _parsed(metadata.get("sd_merge_models"))
    return found if isinstance(found, dict) else {}


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text, object_hook=_without_folders)
    except (ValueError, RecursionError):
        return text


def _without_folders(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object whose texts name files without their folders: some tools record whole paths."""
    return {
        key: re.split(r"[/\\]", value)[-1] if isinstance(value, str) and _WHOLE(value) else value
        for key, value in fields.items()
    }


# --- the formula, for people --------------------------------------------------------------------


LONGEST = 2_000
"""Characters of a step's formula at most, where it is part of another's: then its name stands."""


def formula(recipe: Recipe) -> str:
    """The merge as one line with file names: '(1 - a) sd.ckpt + a wd.ckpt, a = GRAD_V'.

    Settings stand in the order of their names, as a stored recipe has them: the formula of a replay
    is that of the merge. A step that would be too long to read is called by its name.
    """
    output = recipe.output
    given = {what: getattr(output, part) for part, what in PARTS.items()}
    parts = [
        f"; {what} of {urls.name(recipe.models[n].file)}"
        for what, n in given.items()
        if n in recipe.models and n != recipe.base()
    ]
    parts += ["; EMA weights used"] if output.ema == "use" else []
    adjusted = ", ".join(f"{k} = {_weight(v)}" for k, v in sorted(output.adjust.items()))
    parts += [f"; adjusted {adjusted}"] if adjusted else []
    parts += [f"; {output.component} alone"] if output.component else []
    parts += [f"; without {', '.join(output.drop)}"] if output.drop else []
    parts += [f"; repaired {', '.join(output.repair)}"] if output.repair else []
    operands = {name: urls.name(model.file) for name, model in recipe.models.items()}
    text = operands.get(recipe.final, "")
    for name in recipe.order():
        step = recipe.steps[name]
        text = _step_formula(step, [operands[n] for n in step.inputs if n])
        operands[name] = f"({text})" if len(text) <= LONGEST else f"steps.{name}"
    return text + "".join(parts)


def _step_formula(step: Step, names: Sequence[str]) -> str:
    alpha = step.params.get("alpha", 0.5 if step.method == "weighted_sum" else 1.0)
    rules = f", rules = {', '.join(step.rules)}" if step.rules else ""
    if step.method == "weighted_sum":
        if isinstance(alpha, (int, float)):
            return _signed([1 - alpha, alpha], names) + rules
        return f"(1 - α) × {names[0]} + α × {names[1]}, α = {_weight(alpha)}{rules}"
    if step.method == "add_difference" and len(names) == 3:
        difference = f"({names[1]} - {names[2]})"
        if isinstance(alpha, (int, float)):
            return _signed([1, alpha], [names[0], difference]) + rules
        return f"{names[0]} + α × {difference}, α = {_weight(alpha)}{rules}"
    if step.method == "lora":
        return _lora_formula(step, names) + rules
    coefficients = _coefficients(step)
    if coefficients and len(coefficients) == len(names):
        text = _signed(coefficients, names)
        if step.method != "subtract" or abs(coefficients[0]) == 1:
            return text
        return _signed(coefficients[:1], [f"({_signed([1, -1], names)})"])
    params = "".join(f", {k} = {_weight(v)}" for k, v in sorted(step.params.items()))
    return f"{step.method}({', '.join(names)}{params}{rules})"


def _lora_formula(step: Step, names: Sequence[str]) -> str:
    """'a.safetensors + 0.8 × style.safetensors, te_strength = 0.5'"""
    strength = step.params.get("strength", 1.0)
    each = strength if isinstance(strength, (list, tuple)) else [strength] * (len(names) - 1)
    rest = (f", {k} = {_weight(v)}" for k, v in sorted(step.params.items()) if k != "strength")
    return _signed([1.0, *each], names) + "".join(rest)


def _coefficients(step: Step) -> list[float]:
    """Those of a step that is a sum of its inputs, where they are plain numbers; else []."""
    if step.rules:
        return []
    scale = step.params.get("scale", 1.0)
    match step.method:
        case "linear" | "n_average":
            found = list(step.params.get("weights", ())) or [1.0] * len(step.inputs)
        case "subtract" if isinstance(scale, (int, float)):
            return [scale, -scale]
        case "scale" if isinstance(scale, (int, float)):
            return [scale]
        case "sum":
            return [1.0, 1.0]
        case _:
            return []
    if not all(isinstance(w, (int, float)) for w in found):
        return []
    total = math.fsum(found) if step.params.get("normalize", True) else 1.0
    return [w / total for w in found] if total else []


def _signed(coefficients: Sequence[float], names: Sequence[str]) -> str:
    """'0.5 × a.ckpt - b.ckpt'"""
    terms = zip(coefficients, names, strict=True)
    return signed_sum((c, n if abs(c) == 1 else f"{abs(c):.4g} × {n}") for c, n in terms)


def signed_sum(terms: Iterable[tuple[float, str]]) -> str:
    """Texts of sizes joined by the signs of their numbers: (2, "2 a"), (-1, "b") -> '2 a - b'."""
    text = "".join(f"{' - ' if number < 0 else ' + '}{size}" for number, size in terms)
    return ("-" if text.startswith(" - ") else "") + text[3:]


def _weight(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"{len(value)} weights"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_weight(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_weight(v)}" for k, v in sorted(value.items())) + "}"
    return str(value)
