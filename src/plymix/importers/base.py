"""What every importer uses: names of models, numbers, and an account of what was read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from plymix import weights
from plymix.errors import Refusal
from plymix.expression import Expression, File, Merge
from plymix.recipe import Recipe

HASHES = r"[0-9a-fA-F]{8}|[0-9a-fA-F]{10}|[0-9a-fA-F]{64}"


@dataclass(frozen=True)
class Imported:
    """A recipe made from another tool's record, and what of it the recipe does not say."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass
class Record:
    """A record being read: settings are taken from it one by one, and those left over are noted.

    `files` says where models are, by their name or hash in the record. `known` is A1111's account
    of models: sha256 -> {"name": ...}.
    """

    tool: str
    fields: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> Any:
        """The first of the fields `names` that says something; "" when none does."""
        found = [self.fields.pop(name, None) for name in names]
        return next((v for v in found if v not in (None, "", "None", [], {})), "")

    def note(self, text: str) -> None:
        self.notes.append(f"{self.tool}: {text}")

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.take(*names)
        if value == "" and default is not None:
            return default
        return number(value, f"{self.tool}: {names[0]}")

    def truth(self, *names: str) -> bool:
        return str(self.take(*names)).strip().lower() in ("true", "1", "yes")

    def model(self, said: Any, what: str) -> Expression:
        """The model that the record calls `said`: a name, a hash, or 'name [hash]'."""
        text = str(said).strip()
        if not text:
            raise Refusal(f"{self.tool}: {what} is not named")
        named = re.fullmatch(rf"(.*?)\s*\[({HASHES})\]", text)
        name, token = named.groups() if named else ("", text)
        if not named and not re.fullmatch(HASHES, text):
            name, token = text, ""
        sha256 = token.lower() if len(token) == 64 else ""
        told = self.known.get(token.lower(), {}) if token else {}
        if isinstance(told, Mapping):
            name = str(told.get("name") or name)
            if told.get("sd_merge_recipe"):
                self.note(f"{name or token} is itself a merge; it is taken as a file")
        plain = re.split(r"[\\/]", name)[-1]
        keys = (text, name, plain, plain.rpartition(".")[0], token, sha256[:10], sha256)
        file = next((self.files[k] for k in keys if k and k in self.files), name)
        if not file:
            self.note(f"{what} is known by its hash alone, {token}: put its file's name there")
        return File(file or token, sha256=sha256)

    def part(self, said: Any, what: str) -> str:
        """The file of a VAE that the record names."""
        found = self.model(said, what)
        assert isinstance(found, File)
        return found.file

    def blended_vae(self) -> None:
        self.note(
            "it blends the VAEs too; here the result has the first model's"
            ' (vae = "blend" in [output] repeats it)'
        )

    def done(self, expression: Expression, output: Mapping[str, Any]) -> Imported:
        for name, value in self.fields.items():
            if value not in (None, "", "None", False, [], {}, "False", "Off", 0):
                self.note(f"{name} = {shown(value)} has no place in the recipe")
        return Imported(expression.recipe(**output), tuple(dict.fromkeys(self.notes)))


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def number(value: Any, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Refusal(f"{where} is {shown(value)}, not a number") from None
    if isinstance(value, bool) or not math.isfinite(found):
        raise Refusal(f"{where} is {shown(value)}, not a number")
    return found


def complement(share: float) -> float:
    """1 - share in decimals, as the number was typed: 0.9 gives 0.1, not 0.09999999999999998."""
    return float(1 - Decimal(repr(share)))


def _said(value: Any, where: str) -> list[Any]:
    """The words of a list of block weights. Raises Refusal where one is drawn by chance."""
    if isinstance(value, str):
        value = [word for word in re.split(r"[\s,]+", value.strip("[]() \t")) if word]
    if not isinstance(value, Iterable):
        raise Refusal(f"{where} is {value!r}, not a list of numbers")
    words = list(value)
    for i, word in enumerate(words, 1):
        if weights.is_random(word):
            raise Refusal(
                f"{where}: value {i} is {word!r}, {weights.NO_RANDOM}; put the number there that"
                " it had"
            )
    return words


def numbers(value: Any, where: str) -> list[float]:
    """A list of block weights: a list, or numbers separated by commas, in brackets or not."""
    return [number(v, where) for v in _said(value, where)]


def block_weights(value: Any, base: float | None, where: str) -> Any:
    """Another tool's block weights as a weight setting: BASE apart, then the blocks.

    Lists of 25 and 26 numbers are SD1's, of 19 to 21 SDXL's; the longer ones have BASE first, which
    `base` (if the record says it apart) replaces, and the VAE last. 61 are Flux.1's, CLIP and T5
    first.
    """
    if isinstance(value, str) and len(_said(value, where)) == 1:
        return _with_base(weights.from_toml(value, field=where), base)
    found = numbers(value, where)
    if len(found) in (20, 21, 26):
        base, found = (found[0] if base is None else base), found[1:]
    if len(found) == 20:  # no tool gives the VAE the weight that the list has for it
        found = found[:19]
    if len(found) not in (19, 25, 61):
        raise Refusal(
            f"{where} has {len(found)} numbers; 25 or 26 (SD1), 19 to 21 (SDXL) and 61 (Flux.1) fit"
        )
    return _with_base(found, base)


def _with_base(blocks: Any, base: float | None) -> dict[str, Any]:
    return {"blocks": blocks} if base is None else {"base": base, "blocks": blocks}


def merged(method: str, *inputs: Expression, rules: Any = "", **params: Any) -> Merge:
    """A merge whose element rules, a text or a list, are checked here.

    So an error names its record.
    """
    from plymix.expression import merge_method

    said = rules if isinstance(rules, (list, tuple)) else str(rules)
    made = merge_method(
        method, *inputs, rules=[str(r) for r in weights.parse_rules(said)], **params
    )
    assert isinstance(made, Merge)
    return made
