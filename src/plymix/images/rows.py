"""A row of a sheet -> its recipe.

A row is a few words, as they would be said to `plymix merge`:

    A                            the first model as it is (B: the second)
    0.5                          the share of B, or a preset's name, or a list of block weights
    GRAD_V base=1 vae=b          and options of `merge` beside it
    0 IN05=0.3 OUT00-OUT03=0.7   and blocks with a share of their own, which win

With a recipe to start from, a weight is the alpha of its last step, blocks are rules of that step,
`vae=`, `dtype=` ... are fields of its output, and `steps.mix.alpha=0.3` is any value in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import PurePath
from typing import Any

from plymix import api, recipe
from plymix.errors import Refusal, unknown
from plymix.recipe import Output, Recipe
from plymix.setting import with_setting

ASIS = ("A", "B")
"""Rows that are one of the models, and no merge."""

_BLOCKS = re.compile(r"[A-Z][A-Z]*[0-9]*(?![a-z_])")


@dataclass(frozen=True)
class Models:
    """What the rows of a sheet are made of: two models, or a recipe.

    `options` are those of `api.two_models` that hold for all rows.
    """

    a: str = ""
    b: str = ""
    start: Recipe | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        if self.start is not None:
            return {name: model.file for name, model in self.start.models.items()}
        return {"A": self.a, "B": self.b}


def split(row: str) -> tuple[str, ...]:
    """The words of a row; quotes keep a file name with spaces together. A backslash is a letter."""
    words = shlex.shlex(row, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters, words.escape = True, "", ""
    try:
        return tuple(words)
    except ValueError as e:
        raise Refusal(f"row {row!r}: {e}") from None


def label(row: str, models: Models) -> str:
    """What a row is called on the sheet: 'A: anime.safetensors'."""
    if row in ASIS and models.start is None:
        return f"{row}: {PurePath(models.files()[row]).name}"
    return row or ("the recipe" if models.start else "")


def made(words: Sequence[str], models: Models) -> Recipe:
    """The recipe of a row. Later words win over earlier ones; what is said of blocks holds beside
    what is said of all. Raises Refusal.
    """
    weight, said, blocks, paths = "", dict[str, str](), dict[str, str](), dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            weight = word
        elif key == "alpha":
            if weight in ASIS and models.start is None:
                raise Refusal(f"{weight} is a model as it is, without alpha={value}; leave out one")
            weight = value
        elif key.count(".") in (1, 2):  # output.vae, steps.mix.alpha; no steps.mix.alpha.IN05
            paths[key] = value
        elif "." in key or _BLOCKS.match(key):
            blocks.pop(key, None)
            blocks[key] = value
        else:
            said[key] = value
    if models.start is None:
        found = _of_two(weight, said, blocks, models)
    else:
        found = _of_recipe(models.start, weight, said)
    for key, value in (paths | blocks).items():
        if "." in key:
            found = with_setting(found, key, value)
        else:
            found = _with_rule(found, f"{key}{':' if ':' in key else '::'}{value}", words)
    return found


def _of_two(
    weight: str, said: Mapping[str, str], blocks: Mapping[str, str], models: Models
) -> Recipe:
    if weight.upper() in ASIS:
        name = weight.lower()
        if not said and not blocks:
            return recipe.from_dict({"models": {name: getattr(models, name)}})
        weight = "0" if name == "a" else "1"
        said = {"vae": name, **said}
    known = signature(api.two_models).parameters
    options = dict(models.options)
    if weight:
        options["alpha"] = weight
    for key, value in said.items():
        if key not in known or key in ("a", "b", "presets"):
            raise unknown("word in a row", key, [k for k in known if k not in ("a", "b")])
        options[key] = _typed(key, value, known[key].default)
    return api.two_models(models.a, models.b, **options)


def _typed(key: str, value: str, default: Any) -> Any:
    """A word's value in the type that `two_models` takes."""
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise Refusal(f"{key}={value} is not true or false")
        return value == "true"
    if key == "base" or type(default) is int:
        try:
            return float(value) if key == "base" else int(value)
        except ValueError:
            raise Refusal(f"{key}={value} is not a number") from None
    return value


def _of_recipe(start: Recipe, weight: str, said: Mapping[str, str]) -> Recipe:
    found = start
    if weight:
        if start.final not in start.steps:
            raise Refusal(f"the recipe has no step whose alpha could be {weight}")
        alpha = api.with_base(weight, None)
        found = _changed(found, start.final, {"alpha": alpha})
    fields = [name.rstrip("_") for name in Output.__struct_fields__]
    for key, value in said.items():
        if key == "method" and start.final in start.steps:
            found = _changed(found, start.final, {"method": value})
        elif key in fields:
            found = with_setting(found, f"output.{key}", value)
        else:
            raise unknown("word in a row", key, ["method", *fields])
    return found


def _with_rule(found: Recipe, rule: str, words: Sequence[str]) -> Recipe:
    if found.final not in found.steps:
        raise Refusal(f"{' '.join(words)}: blocks have weights in a merge, and this is none")
    return _changed(found, found.final, {"rules": [*found.steps[found.final].rules, rule]})


def _changed(found: Recipe, step: str, fields: Mapping[str, Any]) -> Recipe:
    said = recipe.to_dict(found)
    said["steps"][step].update(fields)
    return recipe.from_dict(said)
