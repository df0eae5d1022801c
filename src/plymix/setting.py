"""`--set PATH=VALUE`: a recipe with one value replaced, and the last set wins.

A set says what the result has. What it says of a block holds for the whole block whatever gave it
a number before: the weight, in any of its forms, a set before it, a rule of the step for whole
blocks ("IN00-IN05::0.2"). Rules for elements ("IN05:attn2:0.3") are finer and go on to hold for
theirs, unless a rule for the whole block already came after them.

No model is known here, so a range of blocks is taken by its names. What lies between blocks of
different kinds (D00-S05) only a model knows: then a set is written so that it is right in any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from plymix import texts, weights
from plymix.errors import Refusal, unknown
from plymix.recipe import Recipe, from_dict, to_dict
from plymix.registry import Param, get_method
from plymix.weights import Rule

WITH_BASE = (len(weights.SD1_BLOCKS) + 1, len(weights.SDXL_BLOCKS) + 1)
"""Lengths of the lists that have BASE first."""

CURVE = ("curve", "from", "to", "points")


def with_setting(recipe: Recipe, path: str, text: str) -> Recipe:
    """`--set steps.mix.alpha.base=0.3`: the recipe with one value replaced. Raises Refusal.

    `steps.mix.alpha.blocks.IN05=0.3`, and `steps.mix.alpha.IN05=0.3` for short, work for every way
    to write a weight. Where its blocks are a preset, a list or a curve, or ranges that may hold
    this one, it becomes a rule of the step, after those for whole blocks that it overrides.
    """
    found = to_dict(recipe)
    keys = path.split(".")
    value = _value(text, path)
    weight = _weight(recipe, *keys[1:3]) if keys[0] == "steps" and len(keys) > 2 else None
    if weight is not None:
        _set_weight(found["steps"][keys[1]], weight, keys[3:], value, path)
        return from_dict(found)
    at: Any = found
    for key in keys[:-1]:
        if not isinstance(at, dict) or key not in at:
            raise unknown(f"field on the way to {path}", key, at if isinstance(at, dict) else [])
        at = at[key]
    if not isinstance(at, dict):
        raise Refusal(f"--set {path}: {'.'.join(keys[:-1])} is not a table")
    at[keys[-1]] = value
    return from_dict(found)


def _weight(recipe: Recipe, step: str, param: str) -> Param | None:
    """The parameter `param` of `step`, if it is a weight: one that blocks may each have their own.

    None too where it is required and was not written.
    """
    if step not in recipe.steps:
        return None
    params = get_method(recipe.steps[step].method).params
    return next((p for p in params if p.name == param and p.type is float), None)


def _value(text: str, path: str) -> Any:
    """A value of `--set`: JSON, a table or list as a recipe file has it, or the text itself."""
    try:
        return json.loads(text, object_pairs_hook=texts.no_twins)
    except texts.Twins as e:
        raise Refusal(f"--set {path}: {e}") from None
    except (ValueError, RecursionError):
        pass
    if text.startswith(("{", "[")):
        return weights.inline_table(text, f"--set {path}")
    return weights.literal(text)


def _set_weight(step: dict[str, Any], param: Param, keys: list[str], value: Any, path: str) -> None:
    """Set the weight `param` of a step, or what `keys` say of it."""
    if not keys:
        step[param.name] = value
        _drop_rules(step, param, lambda rule: True)
        return
    weight = step[param.name] = _opened(step.get(param.name, param.default))
    blocks = weight.setdefault("blocks", {})
    where = (*weights.path_of(keys[0]), *keys[1:])
    if where[-1].upper() == "BASE" and len(where) < 3:
        where = ("base",)
    match where:
        case ("base",):
            if isinstance(blocks, (list, tuple)) and len(blocks) in WITH_BASE:
                weight["blocks"] = blocks[1:]
            weight["base"] = value
            if _under_rules(step, param, ("BASE",)):
                _add_rule(step, ("BASE",), value, path)
        case ("blocks",):
            weight["blocks"] = value
            if _is_form(value):
                weight.pop("default", None)
            _drop_rules(step, param, lambda rule: not _covers(("BASE",), rule))
        case ("blocks", name) if not (_is_form(blocks) and name in CURVE):
            _set_block(step, param, blocks, name, value, path)
        case (field,) if not (_is_form(blocks) and field in CURVE):
            weight[field] = value
        case ("blocks", field) | (field,) if isinstance(blocks, dict):
            blocks[field] = value
        case _:
            raise Refusal(f"--set {path}: {'.'.join(path.split('.')[:-1])} is not a table")


def _set_block(
    step: dict[str, Any], param: Param, blocks: Any, name: str, value: Any, path: str
) -> None:
    """Set the blocks that `name` says (one, a range, several), in the table or by a rule."""
    if not isinstance(weights.from_toml(value, field=path), float):
        raise Refusal(f"--set {path}: {value!r} is not a number")
    words = tuple(name.split())
    if not words or words[0].upper() == "NOT" or {*name} & {*":,"}:
        raise Refusal(
            f"--set {path}: {name!r} is not the name of a block, such as IN05 or IN00-IN05"
        )
    same = name
    crossed = _is_form(blocks)
    for entry in () if crossed else list(blocks):
        if entry.upper() == name.upper():
            same = entry
        elif _inside(entry.split(), words):
            del blocks[entry]
        else:
            crossed = crossed or _meet(entry.split(), words)
    if crossed and param.name != _ruled(step):
        raise Refusal(
            f"--set {path}: this needs a rule, and rules set {_ruled(step)}, not {param.name}; set"
            f" all of {param.name}, with its blocks by name"
        )
    if not crossed and not _under_rules(step, param, words):
        blocks[same] = value
        return
    if not _is_form(blocks):
        blocks.pop(same, None)
    _add_rule(step, words, value, path)


def _opened(weight: Any) -> dict[str, Any]:
    """A weight in any form as the table that says the same: blocks, base, default."""
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return {"base": weight, "default": weight, "blocks": {}}
    if not isinstance(weight, dict):
        return {"blocks": weight}
    if "curve" in weight:
        base = {"base": weight["base"]} if "base" in weight else {}
        return {**base, "blocks": {k: v for k, v in weight.items() if k != "base"}}
    return weights.under_blocks(weight)


def _is_form(blocks: Any) -> bool:
    """Whether `blocks` is anything but a table of block names: preset, list, or curve."""
    return not isinstance(blocks, dict) or "curve" in blocks


# --- rules for whole blocks ----------------------------------------------------------------------


def _ruled(step: Mapping[str, Any]) -> str:
    """The parameter that the rules of a step set."""
    return next(p.name for p in get_method(step["method"]).params if p.type is float)


def _rules(step: Mapping[str, Any]) -> list[tuple[str, Rule]]:
    said = [one for text in step.get("rules", ()) for one in weights.rule_texts(text)]
    return list(zip(said, weights.parse_rules(said), strict=True))


def _under_rules(step: Mapping[str, Any], param: Param, words: tuple[str, ...]) -> bool:
    """Whether a rule for whole blocks may say another number of `words` than the weight does."""
    return param.name == _ruled(step) and any(_may_meet(r, words) for r in _whole(step))


def _whole(step: Mapping[str, Any]) -> list[Rule]:
    return [rule for _, rule in _rules(step) if not rule.elements]


def _add_rule(step: dict[str, Any], words: tuple[str, ...], value: Any, path: str) -> None:
    """Say the blocks' number by a rule, after every rule for whole blocks that may hold them."""
    kept: list[str] = []
    place = 0
    for text, rule in _rules(step):
        whole = not rule.elements
        if not (whole and _covers(words, rule)):
            kept.append(text)
        if whole and _may_meet(rule, words):
            place = len(kept)
    step["rules"] = [*kept[:place], f"{' '.join(words)}::{value}", *kept[place:]]


def _drop_rules(step: dict[str, Any], param: Param, which: Callable[[Rule], bool]) -> None:
    """Leave out the rules for whole blocks that a set of the weight itself overrides."""
    if param.name == _ruled(step) and any(map(which, _whole(step))):
        step["rules"] = [text for text, rule in _rules(step) if rule.elements or not which(rule)]


def _covers(words: tuple[str, ...], rule: Rule) -> bool:
    """Whether a rule is for no block but those of `words`, in any model."""
    return bool(rule.blocks) and not rule.not_blocks and _inside(rule.blocks, words)


def _may_meet(rule: Rule, words: tuple[str, ...]) -> bool:
    """Whether a rule may be for one of the blocks of `words`, in some model.

    The name of a part, such as TIME, may be of a part of any block.
    """
    if not rule.blocks:
        return True
    if rule.not_blocks:
        return not _inside(words, rule.blocks)
    if any(_is_part(word) for word in words):
        return True
    return _meet(rule.blocks, words)


# --- blocks by their names -----------------------------------------------------------------------

UNET = {"IN": 0, "M": 1, "MID": 1, "OUT": 2}
"""Kinds of a U-Net's blocks, in their order."""

APART = {"BASE", "VAE"}
"""What is before and after all blocks."""

Span = tuple[str, int, int]
"""Blocks from one to another: of what kind, the first, the last."""


def _place(name: str) -> tuple[str, int]:
    """A block's kind, and where it is among those that come in a known order."""
    kind = name.upper().rstrip("0123456789")
    digits = name[len(kind) :]
    if digits and kind in UNET:
        return "U-Net", UNET[kind] * 100 + int(digits)
    return (kind, int(digits)) if len(digits) == 2 else (name.upper(), 0)


def _is_part(word: str) -> bool:
    """Whether a name is not of a numbered block: TIME and OUT may be parts of one."""
    kind, _ = _place(word)
    return "-" not in word and kind == word.upper() and kind not in APART


def _span(word: str) -> Span | None:
    """What a name or a range of names spans; None where only a model knows."""
    first, dash, last = word.partition("-")
    (kind, start), (other, end) = _place(first), _place(last if dash and last else first)
    return (kind, min(start, end), max(start, end)) if kind == other else None


def _meet(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two lists of names and ranges may have a block in common."""
    return any(_spans_meet(one, other) for one in some for other in others)


def _spans_meet(one: str, other: str) -> bool:
    a, b = _span(one), _span(other)
    if a is None or b is None:  # whatever lies between the ends of a range, or nothing apart
        ends = [{*word.upper().split("-")} for word in (one, other)]
        return not any(end <= APART for end in ends) or bool(ends[0] & ends[1])
    return a[0] == b[0] and a[1] <= b[2] and b[1] <= a[2]


def _inside(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether each of some names and ranges certainly lies in one of the others."""
    return all(any(_span_inside(one, other) for other in others) for one in some)


def _span_inside(one: str, other: str) -> bool:
    a, b = _span(one), _span(other)
    if a is None or b is None:
        return one.upper() == other.upper()
    return a[0] == b[0] and b[1] <= a[1] and a[2] <= b[2]
