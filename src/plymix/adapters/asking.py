"""What a user writes to ask for a LoRA: words of a command line, or the tags of a prompt.

    style.safetensors:0.8:0.5          file, strength, strength of the text encoder
    <lora:style:0.8:lbw=IND>           a tag, as A1111 and its extensions read it

In a tag the *text encoder's* strength is the first number and the U-Net's the second, as in A1111;
one number is for both.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plymix import recipe as recipes
from plymix.adapters.strengths import presets
from plymix.errors import Refusal, listed, nearest, unknown
from plymix.formats import Folders
from plymix.recipe import Recipe

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
"""Of the files that a tag may mean, the first that is there."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I | re.A)
_TAG = re.compile(r"<(?:lora|lyco):([^<>]+)>")
_SAMPLING = ("start", "stop", "step", "in", "out", "mid")
"""Fields of tags that tell when a LoRA works while an image is drawn."""


@dataclass(frozen=True)
class Asked:
    """A LoRA, how strong, and the factors of its blocks as a recipe writes them (None: all 1)."""

    file: str
    strength: float = 1.0
    te_strength: float | None = None
    blocks: Any = None
    rules: tuple[str, ...] = ()


def asked(words: Iterable[str], folders: Folders) -> tuple[Asked, ...]:
    """The LoRAs that words of a command line name. Tags are looked for in `folders`.

    Raises Refusal.
    """
    found: list[Asked] = []
    for word in words:
        tags = _TAG.findall(word)
        if not os.path.exists(word):
            if open_ := re.search(r"<(?:lora|lyco):.*", _TAG.sub("", word), re.S):
                raise Refusal(f"{open_[0]!r} is no whole tag; write <lora:name:0.8>")
            if tags:
                found += (_tag(tag, folders) for tag in tags)
                continue
        found.append(_word(word))
    return tuple(found)


def _exists(file: str) -> bool:
    return os.path.exists(Path(file).expanduser())


def _word(word: str) -> Asked:
    """'C:\\loras\\a:b.safetensors:0.8:0.5': numbers are taken off the end, two at most."""
    file, numbers = word, list[float]()
    while len(numbers) < 2 and not _exists(file):
        head, colon, tail = file.rpartition(":")
        if not colon or not head or not _NUMBER.fullmatch(tail.strip()):
            break
        file, numbers = head, [float(tail), *numbers]
    if not file or file.startswith(":"):
        raise Refusal(f"{word!r} names no LoRA file; write FILE:STRENGTH")
    if not _exists(file):
        head = file
        while ":" in head:
            head = head.rpartition(":")[0]
            if head and os.path.isfile(Path(head).expanduser()):
                raise Refusal(
                    f"{word!r}: {word[len(head) + 1 :]!r} is no strength; write FILE:0.8, or"
                    " FILE:0.8:0.5 with the text encoder's"
                )
    if not all(map(math.isfinite, numbers)):
        raise Refusal(f"{word!r}: a strength that large is no number")
    strength, te_strength = (*numbers, None, None)[:2]
    return Asked(file, 1.0 if strength is None else strength, te_strength)


def _tag(text: str, folders: Folders) -> Asked:
    """The inside of <lora:...>: a name, up to two numbers, fields."""
    name, *rest = _parts(text)
    numbers = [float(x) for x in rest if _NUMBER.fullmatch(x)]
    fields = dict(x.split("=", 1) for x in rest if "=" in x)
    others = [x for x in rest if "=" not in x and not _NUMBER.fullmatch(x)]
    if len(others) == 1 and "lbw" not in fields:  # the older way to write block weights
        fields["lbw"] = others.pop()
    where = f"<lora:{text}>"
    if others or len(numbers) > 2:
        raise Refusal(f"{where}: {listed(others or rest)} is not a strength; write name:0.8")
    for field in fields:
        if field in _SAMPLING:
            raise Refusal(
                f"{where}: {field} tells when the LoRA works while an image is drawn, which a model"
                " cannot hold; leave it out"
            )
        if field not in ("te", "unet", "lbw", "lbwe"):
            raise unknown(f"field in {where}", field, ("te", "unet", "lbw", "lbwe"))
    te = _number(fields, "te", numbers[0] if numbers else 1.0, where)
    unet = _number(fields, "unet", numbers[1] if len(numbers) > 1 else te, where)
    blocks = factors(fields["lbw"], "lbw") if "lbw" in fields else None
    rules = tuple(filter(None, fields.get("lbwe", "").split(",")))
    return Asked(_named(name, folders), unet, None if te == unet else te, blocks, rules)


def _parts(text: str) -> Iterator[str]:
    """The parts between colons; a name may stand in quotes. Rules (lbwe) have colons themselves."""
    text, _, rules = text.partition(":lbwe=")
    quoted = re.match(r"\s*(['\"])(.*?)\1\s*(?::|$)", text)
    if quoted:
        yield quoted[2]
        text = text[quoted.end() :]
    yield from (part.strip() for part in text.split(":") if part.strip())
    if rules:
        yield f"lbwe={rules}"


def _number(fields: dict[str, str], field: str, default: float, where: str) -> float:
    text = fields.get(field)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text.strip()):
        raise Refusal(f"{where}: {field}={text} is not a number")
    return float(text)


def _named(name: str, folders: Folders) -> str:
    """The file that a tag's name means: NAME.safetensors or the like, in a folder or below it."""
    seen: list[Path] = []
    for folder in map(Path, folders):
        files = sorted(p for p in folder.expanduser().rglob("*") if p.suffix.lower() in ENDINGS)
        seen += files
        here = [p for p in files if name in (p.stem, p.name)]
        here.sort(key=lambda p: ENDINGS.index(p.suffix.lower()))
        kinds = [p for p in here if p.suffix == here[0].suffix]
        if len(kinds) > 1:
            raise Refusal(
                f"{name} may be {listed(map(str, kinds))}; name the file in place of the tag"
            )
        if here:
            return str(here[0])
    near = nearest(name, [p.stem for p in seen])
    hint = f"did you mean {near[0]}?" if near else "say where they are with --lora-dir DIR"
    places = listed(dict.fromkeys(str(folder) for folder in folders))
    raise Refusal(f"no LoRA called {name} in {places}: {hint}")


def factors(text: str, field: str = "--lbw") -> Any:
    """Block weights as a recipe writes them: 'IND', '1,0,0,...', 'IN05-OUT03=0.5,M00'.

    A block without a number has 1, those that are not named 0. Raises Refusal.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise Refusal(f"{field} is empty; give a preset, a list of numbers or block names")
    if all(map(_NUMBER.fullmatch, words)):
        return [float(word) for word in words] if len(words) > 1 else float(words[0])
    if _NUMBER.fullmatch(words[0]):
        odd = next(word for word in words if not _NUMBER.fullmatch(word))
        raise Refusal(f"{field}: {odd!r} is no number, as the others of the list are")
    if len(words) == 1 and words[0].upper() in presets():
        return words[0].upper()
    table: dict[str, float] = {}
    for word in words:
        name, equals, number = (part.strip() for part in word.partition("="))
        if equals and not _NUMBER.fullmatch(number):
            raise Refusal(f"{field}: {word} is not BLOCK=NUMBER")
        if not equals and not re.fullmatch(r"[A-Za-z]+\d*(-[A-Za-z]+\d*)?", name):
            hint = f"presets are {', '.join(presets())}; or give numbers, or block names"
            raise unknown(f"preset for {field}", word, presets(), help=hint)
        if name in table:
            raise Refusal(f"{field}: {name} is there twice")
        table[name] = float(number) if equals else 1.0
    return table


def recipe(base: str, loras: Iterable[Asked], *, dora: str = "trained", **output: Any) -> Recipe:
    """The recipe of a bake. Raises Refusal.

    The LoRAs are sorted, so that their order on the command line changes nothing; those with rules
    of their own are added in steps of their own.
    """
    models = {recipes.model_name(base, ()): base}
    (before,) = models
    groups: dict[tuple[str, ...], list[Asked]] = {}
    for lora in sorted(loras, key=lambda a: (Path(a.file).name, a.strength, a.file)):
        groups.setdefault(lora.rules, []).append(lora)
    if not groups:
        raise Refusal("no LoRA is named; write plymix lora bake BASE LORA:0.8 -o OUT")
    steps: dict[str, Any] = {}
    for number, (rules, group) in enumerate(sorted(groups.items()), 1):
        names = []
        for lora in group:
            name = recipes.model_name(lora.file, (*models, "bake"))
            models[name] = lora.file
            names.append(name)
        step: dict[str, Any] = {"method": "lora", "model": before, "loras": names}
        step["strength"] = [lora.strength for lora in group]
        if any(lora.te_strength is not None for lora in group):
            step["te_strength"] = [
                lora.strength if lora.te_strength is None else lora.te_strength for lora in group
            ]
        if any(lora.blocks is not None for lora in group):
            step["blocks"] = [1.0 if lora.blocks is None else lora.blocks for lora in group]
        if rules:
            step["rules"] = list(rules)
        if dora != "trained":
            step["dora"] = dora
        before = "bake" if number == len(groups) else f"bake-{number}"
        steps[before] = step
    return recipes.from_dict({"models": models, "steps": steps, "output": output})
