"""Concepts and what is said of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from plymix.images.tokens import END, START, WINDOW, tokens

TEMPLATES = (
    "{x}",
    "{a}",
    "one {x}",
    "a picture of {a}",
    "a drawing of {a}",
    "an emoji of {a}",
    "{x}, emoji, icon",
    "{a} on a plain ground",
    "{a}, best quality",
    "masterpiece, best quality, {a}",
)
"""{x} is a word for the concept, {a} the same with its article."""

EMPTY = (
    "", "", "", "",
    "lowres, bad anatomy",
    "lowres, bad anatomy, worst quality, low quality, blurry",
    "worst quality, low quality, jpeg artifacts, signature, watermark, text",
)  # fmt: skip
"""What stands for no caption. Usual negative prompts are among it, so that they do no harm."""

SHOWN = ("apple", "rocket", "penguin", "cat", "sunflower", "guitar", "house", "car")
"""What the validation pictures ask for."""


class Concept(NamedTuple):
    """An icon's name in both sets, and the words for it: its own first."""

    name: str
    words: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return with_article(self.words[0])


def table() -> dict[str, Any]:
    with open(Path(__file__).with_name("concepts.toml"), "rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return found


def concepts(
    known: Iterable[str], categories: Mapping[str, Sequence[str]], which: str, most: int = 0
) -> list[Concept]:
    """The concepts of the set "core" or "all" among the names in `known`.

    Raises ValueError for an unknown set, a listed name that is not known, a word used twice.
    """
    told, there = table(), set(known)
    if which == "core":
        names = list(dict.fromkeys(told["core"].split()))
        if lost := [name for name in names if name not in there]:
            raise ValueError(f"concepts.toml: no such icons in both sets: {', '.join(lost)}")
    elif which == "all":
        listed = (name for category in told["categories"] for name in categories[category])
        names = [n for n in listed if n in there and not re.search(told["without"], n)]
        first = [name for name in told["core"].split() if name in names]
        names = list(dict.fromkeys([*first, *names]))
    else:
        raise ValueError(f"unknown concepts {which!r}; use core or all")
    return named(names[: most or None], told["words"])


def named(names: Sequence[str], words: Mapping[str, Sequence[str]]) -> list[Concept]:
    """Names with their words. A concept's own name wins over another's further word."""
    own = {name.replace("-", " ") for name in names}
    found, taken = [], set(own)
    for name in names:
        more = [word for word in words.get(name, ()) if word not in own]
        if twice := taken.intersection(more):
            raise ValueError(f"concepts.toml: {', '.join(twice)}: a word for two concepts")
        taken.update(more)
        found.append(Concept(name, (name.replace("-", " "), *more)))
    return found


def with_article(word: str) -> str:
    """'apple' -> 'an apple'."""
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def captions(concept: Concept) -> list[str]:
    return [t.format(x=w, a=with_article(w)) for w in concept.words for t in TEMPLATES]


def ids(text: str) -> list[int]:
    """The 77 tokens that SD1's text encoder reads: start, the text's, then ends."""
    own = tokens(text)[:WINDOW]
    return [START, *own, *[END] * (WINDOW + 1 - len(own))]


def used(every: Iterable[Concept]) -> list[int]:
    """The tokens that any caption has, in order."""
    texts = [*EMPTY, *(text for concept in every for text in captions(concept))]
    return sorted({token for text in texts for token in ids(text)})


def shown(every: Sequence[Concept]) -> list[Concept]:
    """Those of `SHOWN` that there are, else the first."""
    found = [c for word in SHOWN for c in every if word in c.words]
    return (found or list(every))[: len(SHOWN)]
