"""What a LoRA file is and holds: for people, and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from plymix.adapters.files import Adapter, Module
from plymix.adapters.names import DIFFUSERS, Names, component, plain, spellings
from plymix.archs import Architecture
from plymix.archs.dialect_tables import Hit, Name, Number, Row, tables
from plymix.archs.model import load, shared_facts

TOLD = (
    "ss_output_name", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_base_model_version", "ss_sd_model_name", "ss_v2", "ss_training_comment",
    "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.date",
    "modelspec.license", "modelspec.trigger_phrase",
)  # fmt: skip
"""Metadata that says what a LoRA is, in the order it is shown."""


@dataclass(frozen=True)
class Found:
    """What a file is. Counters are by name, ranks and alphas by value.

    `blocks` counts modules by block ("?" where the name does not tell), `metadata` is what says
    something of the LoRA, `others` how many keys are no part of it, by what they are. With a base:
    `matched` modules of it are in the base, `unmatched` are the names of the others.
    """

    file: str
    nbytes: int
    title: str
    architecture: str
    algorithms: Mapping[str, int]
    modules: int
    dtypes: Mapping[str, int]
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    blocks: Mapping[str, int]
    metadata: Mapping[str, str]
    others: Mapping[str, int]
    base: str = ""
    matched: int = 0
    unmatched: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "unmatched": list(self.unmatched)}


def report(adapter: Adapter, names: Names | None = None, base: str = "") -> Found:
    """What `adapter` is and holds; with `names` of a model called `base`, what fits it."""
    arch = names.arch if names else adapter.detection.arch
    modules = adapter.modules
    metadata = adapter.source.metadata
    targets = {m.name: names.find(m) for m in modules} if names else {}
    ranks = Counter(m.rank for m in modules if m.rank)
    alphas = Counter(m.alpha for m in modules if m.rank and m.alpha is not None)
    blocks = Counter(_block(arch, module, targets) for module in modules)
    dtypes = Counter(info.dtype for m in modules for info in m.factors.values())
    return Found(
        file=adapter.source.path.name,
        nbytes=adapter.source.nbytes,
        title=adapter.detection.title,
        architecture=arch.name if arch else "",
        algorithms=dict(adapter.algorithms),
        modules=len(modules),
        dtypes=dict(dtypes),
        ranks={str(rank): n for rank, n in sorted(ranks.items())},
        alphas={f"{alpha:g}": n for alpha, n in sorted(alphas.items())},
        blocks=_ordered(blocks, arch),
        metadata={key: metadata[key] for key in TOLD if metadata.get(key)} | _tags(metadata),
        others={why: len(keys) for why, keys in adapter.others.items()},
        base=base,
        matched=sum(target is not None for target in targets.values()),
        unmatched=tuple(name for name, target in targets.items() if target is None),
    )


def _block(arch: Architecture | None, module: Module, targets: Mapping[str, Any]) -> str:
    if arch is None:
        return "?"
    target = targets.get(module.name)
    if target is not None:
        place = arch.place(target.key)
        return place.block if place else "?"
    return block(arch, module) or "?"


def _ordered(blocks: Counter[str], arch: Architecture | None) -> dict[str, int]:
    order = ["BASE", "CLIP", "T5", *(arch.blocks if arch else ()), "?"]
    known = [name for name in order if name in blocks]
    return {name: blocks[name] for name in dict.fromkeys((*known, *blocks))}


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's count of training tags: how many, and the most frequent."""
    try:
        found = json.loads(metadata.get("ss_tag_frequency", "{}"))
        tags: Counter[str] = Counter()
        for folder in found.values():
            tags.update({str(tag).strip(): int(n) for tag, n in folder.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return {}
    if not tags:
        return {}
    named = ", ".join(f"{tag} ({n})" for tag, n in tags.most_common(5))
    return {"tags": f"{len(tags)}: {named}"}


# --- blocks, where no base model is at hand


def block(arch: Architecture, module: Module) -> str:
    """The block that a module's name begins with; "" if it does not tell."""
    part = component(arch, module)
    if part and part != arch.denoiser.name:
        return next(c.block.split()[0] for c in arch.components if c.name == part)
    name = plain(module.name)
    starts = sorted(map(plain, spellings().denoiser), key=len, reverse=True)
    rest = next(name[len(start) :] for start in starts if name.startswith(start))
    for pattern, theirs, ours in _beginnings(arch.name):
        if (match := pattern.match(rest)) and (own := _filled(theirs, ours, match.groups())):
            place = arch.place(f"{shared_facts().prefixes[0]}{own}.weight")
            if place is not None:
                return place.block
    return ""


@cache
def _beginnings(arch: str) -> list[tuple[re.Pattern[str], Name, Name]]:
    """Beginnings of module names, and the architecture's own names for them; longest first."""
    found = load(arch)
    pairs = {template: template for template in found.denoiser.blocks}
    home = tables(DIFFUSERS).get((arch, found.denoiser.name))
    for ours, theirs in home.file.rows() if home else ():
        pairs |= {text.rpartition(" ")[2]: ours for text in theirs}
    names = [(Name.parse(theirs), Name.parse(ours)) for theirs, ours in pairs.items()]
    parsed = [(_pattern(theirs), theirs, ours) for theirs, ours in names]
    return sorted(parsed, key=lambda entry: -len(entry[1].words))


def _pattern(name: Name) -> re.Pattern[str]:
    words = (r"(\d+)" if isinstance(w, Number) else re.escape(plain(w)) for w in name.words)
    return re.compile("_".join(words) + r"(?![^_])")


def _filled(theirs: Name, ours: Name, numbers: tuple[str, ...]) -> str | None:
    values: dict[str, int] = {}
    asked = (word for word in theirs.words if isinstance(word, Number))
    for number, text in zip(asked, numbers, strict=True):
        found = number.solve(int(text))
        if found is None:
            return None
        values |= found
    return ours.fill(Hit(Row(ours), 0, values, []))
