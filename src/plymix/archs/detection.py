"""What a file is, from its keys and shapes.

A rule (`keys` in the data files) holds when all its entries do:

    "label_emb.0.0.weight" = true            the key is there (false: it is not)
    "conv_in.weight" = ["*", 9, "*", "*"]    it is there with this shape; "*" any size, "!768" any
                                             but 768; the number of entries is the rank
    "*to_k.lora_down.weight" = [...]         a name with "*" or "?" is a glob: true/false as above,
                                             a shape must be that of every key that fits the glob

Names are those of the denoiser without prefix. No rule needs a published width to hold, so models
of any size are recognised; at most one family's rules hold for any model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count, islice

from plymix.archs.model import (
    Architecture,
    Family,
    Names,
    Rule,
    families,
    load,
    names,
    shared_facts,
)
from plymix.errors import Refusal, amount, listed

Shapes = Mapping[str, tuple[int, ...]]
Conditions = Mapping[str, bool | list[int | str]]


@dataclass(frozen=True, slots=True)
class Detection:
    """What a file is.

    `arch` is None for what plymix cannot merge as a model: unknown files, and families it knows
    only by name. `kind` is "checkpoint", "denoiser" (nothing but the U-Net or transformer), "vae",
    "text_encoder", "lora", "embedding", "controlnet", "adapter", "upscaler" or "unknown". `title`
    is for people. `prefix` stands before the denoiser's keys. `dialect` is "" for the names that
    `Architecture.place` knows, else whose names they are ("diffusers"; "kohya" for a LoRA).
    `seen` is a key that told.
    """

    arch: Architecture | None
    variant: str
    kind: str
    title: str
    prefix: str = ""
    dialect: str = ""
    seen: str = ""

    @property
    def named(self) -> str:
        """`title` with its article: what a file is, in a sentence."""
        return _articled(self.title)

    def require(self, file: str) -> Architecture:
        """The architecture of `file`, which is to be merged as a model.

        Raises Refusal, naming what the file is, for anything else.
        """
        if self.arch is not None and self.kind in ("checkpoint", "denoiser") and not self.dialect:
            return self.arch
        known = ", ".join(load(name).short for name in names())
        seen = f" (it has {_shown(self.seen)})" if self.seen else ""
        raise Refusal(
            f"{file} is not a model that can be merged: it is {self.named}{seen};"
            f" plymix merges {known}"
        )


def _articled(title: str) -> str:
    """'an SD1 checkpoint', 'a VAE file': as it is said, with letters by their names."""
    if title.startswith(("unknown", "a ", "shard ")):
        return title
    spelt = not title[1:2].islower()  # SDXL, U-Net, T5
    vowel = title[0] in "AEFHILMNORSX" if spelt else title[0].lower() in "aeiou"
    return f"{'an' if vowel else 'a'} {title}"


def detect(shapes: Shapes, own: Architecture | None = None) -> Detection:
    """What a file with these keys and shapes is. Never raises.

    `own` is an architecture that a user describes; it is looked for before all others.
    """
    keys = _Keys(shapes)
    found = _model(keys, lambda: (own,)) if own is not None else None
    return found or _model(keys, families) or _lora(keys) or _other(keys) or _unknown(keys)


class _Keys:
    """A file's keys and shapes, to be asked for names and globs."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    @cached_property
    def _lines(self) -> str:
        # No real file has more or longer names; a hostile one shall not cost time.
        some = islice(self.shapes, 20_000)
        return "\n".join(key for key in some if len(key) < 512 and "\n" not in key)

    def like(self, globs: Iterable[str], prefix: str = "") -> Iterator[str]:
        """The keys that fit one of `globs`, in the file's order."""
        found = (m.group() for m in _regex(tuple(globs), prefix).finditer(self._lines))
        return (key for key in found if key in self.shapes)

    def holds(self, conditions: Conditions, prefix: str = "") -> bool:
        return all(self._holds(name, want, prefix) for name, want in conditions.items())

    def _holds(self, name: str, want: bool | list[int | str], prefix: str) -> bool:
        if "*" in name or "?" in name:
            found = self.like((name,), prefix)
            if isinstance(want, bool):
                return want is (next(found, None) is not None)
            return all(_fits(self.shapes[key], want) for key in found)
        shape = self.shapes.get(prefix + name)
        if isinstance(want, bool):
            return want is (shape is not None)
        return shape is not None and _fits(shape, want)


@cache
def _regex(globs: tuple[str, ...], prefix: str) -> re.Pattern[str]:
    groups = count()
    one = "|".join(_pattern(glob, groups) for glob in globs)
    return re.compile(f"^{re.escape(prefix)}(?:{one})$", re.MULTILINE)


def _pattern(glob: str, groups: Iterator[int]) -> str:
    """A glob as a regular expression that never goes back over what a "*" took.

    What stands between two of them is found where it first occurs, which is as good as anywhere
    later; a look-ahead and a reference to it hold the place (as `fnmatch` does).
    """
    first, *others = (re.escape(part).replace(r"\?", "[^\n]") for part in glob.split("*"))
    if not others:
        return first
    middle = ""
    for part in others[:-1]:
        name = f"g{next(groups)}"
        middle += f"(?=(?P<{name}>[^\n]*?{part}))(?P={name})"
    return f"{first}{middle}[^\n]*{others[-1]}"


def _fits(shape: tuple[int, ...], want: list[int | str]) -> bool:
    return len(shape) == len(want) and all(
        w == n or w == "*" or (isinstance(w, str) and w != f"!{n}")
        for n, w in zip(shape, want, strict=True)
    )


def _model(keys: _Keys, known: Callable[[], Iterable[Family]]) -> Detection | None:
    for prefix in (*shared_facts().prefixes, ""):
        for family in known():
            for rule in family.detect:
                if keys.holds(rule.keys, prefix):
                    return _found(keys, family, prefix, rule)
    return None


def _found(keys: _Keys, family: Family, prefix: str, rule: Rule) -> Detection:
    variant = next((v for v in family.variants if keys.holds(v.keys, prefix)), None)
    parts = Names(shared_facts().parts)
    whole = any(key in parts for key in keys.shapes)
    arch = family if isinstance(family, Architecture) else None
    part = arch.denoiser.title if arch else "denoiser"
    words = [family.short, (variant.title or variant.name) if variant else ""]
    words += ["checkpoint" if whole else part, f"({rule.dialect} names)" if rule.dialect else ""]
    there = (k for k, want in rule.keys.items() if want is not False and "*" not in k)
    return Detection(
        arch,
        variant.name if variant else "base",
        "checkpoint" if whole else "denoiser",
        " ".join(filter(None, words)),
        prefix,
        rule.dialect,
        prefix + next(there, ""),
    )


def _lora(keys: _Keys) -> Detection | None:
    facts = shared_facts().lora
    found = ((name, key) for name, globs in facts.algorithms.items() for key in keys.like(globs))
    algorithm, seen = next(found, ("", ""))
    if not seen:
        return None
    spellings = (d for d, globs in facts.dialects.items() if next(keys.like(globs), None))
    dialect = next(spellings, "")
    match = (f for f in families() if any(keys.holds(rule.keys) for rule in f.lora))
    family = next(match, None)
    title = f"{algorithm} for {family.short if family else 'an unknown model'}"
    return Detection(
        family if isinstance(family, Architecture) else None,
        "base",
        "lora",
        f"{title} ({dialect} names)" if dialect else title,
        dialect=dialect,
        seen=seen,
    )


def _other(keys: _Keys) -> Detection | None:
    for row in shared_facts().kinds:
        if seen := next(keys.like(row.keys), None):
            title = row.title
            at = next(keys.like((row.channels,)), "") if row.channels else ""
            if len(shape := keys.shapes.get(at, ())) > 1:
                title += f" ({shape[1]} latent channels)"
            if row.dialect:
                title += f" ({row.dialect} names)"
            return Detection(None, "base", row.kind, title, dialect=row.dialect, seen=seen)
    return None


def _unknown(keys: _Keys) -> Detection:
    if not keys.shapes:
        return Detection(None, "base", "unknown", "unknown (no tensors)")
    some = f"{amount(len(keys.shapes))}; first keys: {listed(map(_shown, keys.shapes), 3)}"
    return Detection(None, "base", "unknown", f"unknown ({some}{_guess(keys)})")


def _shown(key: str) -> str:
    """A key as it may stand in a message: 80 printable characters at most."""
    short = key if len(key) <= 80 else key[:77] + "..."
    return short if short.isprintable() else repr(short)


def _guess(keys: _Keys) -> str:
    """'; looks like part of SD1' for keys most of which one architecture knows."""
    some = list(keys.shapes)[:: 1 + len(keys.shapes) // 200]
    share = {name: sum(load(name).place(key) is not None for key in some) for name in names()}
    best = max(share, key=lambda name: share[name])
    return f"; looks like part of {load(best).short}" if 2 * share[best] > len(some) else ""
