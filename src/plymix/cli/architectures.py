"""`archs`: which architectures there are, and what one is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from plymix.cli import screen
from plymix.cli.options import Json, argument

if TYPE_CHECKING:
    from plymix.archs import Architecture

EXAMPLES = {"archs": "Examples:\n  PROG sdxl\n  PROG my-architecture.toml"}


def archs(
    name: Annotated[str | None, argument("An architecture, or a file (.toml) of one.")] = None,
    /,
    *,
    json: Json = False,
) -> None:
    """List the architectures, or one's blocks and components.

    Of one: its blocks, how many parameters each has in published models, what lists of weights are
    for, finer names for tables, components, the presets that fit, and other tools' blocks.
    """
    from plymix import archs as known

    if name is not None and name.lower().endswith(".toml"):
        found = known.described(name)
        chosen = [found] if found else []
    else:
        chosen = [known.load(n) for n in (known.names() if name is None else (name,))]
    if json:
        documents = [document(a) for a in chosen]
        screen.put_json(documents if name is None else documents[0])
    elif name is not None:
        _explain(chosen[0])
    else:
        _overview(chosen)


def _overview(every: list[Architecture]) -> None:
    rows = []
    for arch in every:
        sizes = [parameters(one, arch.blocks) for one in arch.sizes().values()]
        span = dict.fromkeys(screen.count(n) for n in sorted(filter(None, sizes)))
        names = "yes" if diffusers(arch) else "no"
        rows.append((arch.name, arch.title, str(len(arch.blocks)), " - ".join(span), names))
    ends = [(*row[:3], _ends(row[3]), row[4]) for row in rows]
    screen.table(("name", "title", ">blocks", ">parameters", "diffusers"), ends)


def _ends(span: str) -> str:
    """'1 B - 2 B - 3 B' -> '1 - 3 B'."""
    words = span.split(" - ")
    unit = words[0][-2:]
    first = words[0].removesuffix(unit) if words[-1].endswith(unit) else words[0]
    return words[0] if len(words) == 1 else f"{first} - {words[-1]}"


def parameters(sizes: dict[str, int], blocks: tuple[str, ...]) -> int:
    """Of the denoiser: what a model has in `blocks`."""
    return sum(sizes.get(block, 0) for block in blocks)


def diffusers(arch: Architecture) -> list[str]:
    """The components whose diffusers names are known."""
    from plymix.archs.dialect_tables import tables

    return [component for owner, component in tables("diffusers") if owner == arch.name]


def lists(arch: Architecture) -> dict[int, tuple[str, ...]]:
    """What each accepted length of a list of weights is for."""
    n = len(arch.blocks)
    return {n: arch.blocks, n + 1: ("BASE", *arch.blocks), **arch.lists}


def presets(arch: Architecture) -> tuple[list[str], list[str]]:
    """The presets published for so many blocks, and those that a formula fits to them."""
    from plymix import weights

    every = weights.presets().values()
    own = [p.name for p in every if len(p.blocks) == len(arch.blocks)]
    return own, [p.name for p in every if p.form and p.name not in own]


def denoiser_prefix() -> str:
    from plymix.archs.model import shared_facts

    return shared_facts().prefixes[0]


def _explain(arch: Architecture) -> None:
    from plymix.archs.views import view
    from plymix.errors import listed
    from plymix.weights import spans

    screen.put(f"{arch.name}: {arch.title}")
    if arch.variants:
        kinds = dict.fromkeys(v.title or v.name for v in arch.variants)
        screen.put(f"variants: {', '.join(kinds)}")
    screen.put(f"{len(arch.blocks)} blocks: {spans(arch.blocks)}")
    for length, names in sorted(lists(arch).items()):
        screen.put(f"a list of {length}: {spans(names)}")
    finer = [n for n in (*arch.parts, *arch.outside) if n != "BASE"]
    screen.put(f"finer names, for tables and rules: {', '.join(finer)}")
    for tool in arch.views:
        found = view(arch, tool)
        screen.put(f"--block-view {tool}: {len(found.blocks)} numbers: {spans(found.blocks)}")
    own, fitted = presets(arch)
    if own:
        screen.put(f"presets made for {len(arch.blocks)} blocks: {listed(own)}")
    if fitted:
        screen.put(f"presets that fit by their formula: {listed(fitted)}")
    screen.put("")
    known = diffusers(arch)
    screen.table(
        ("component", "title", "keys begin with", "diffusers"),
        [
            (
                c.name,
                c.title,
                ", ".join(c.prefixes) or denoiser_prefix(),
                "yes" if c.name in known else "no",
            )
            for c in arch.components
        ],
        wrap=2,
    )
    _sizes(arch)


def _sizes(arch: Architecture) -> None:
    """Each block's share of the denoiser's parameters in the first published model; the others."""
    from plymix.weights import spans

    models = arch.sizes()
    if not models:
        return
    (title, first), *others = models.items()
    total = parameters(first, arch.blocks)
    screen.put(f"\n{title}: {screen.count(total)} parameters in the {arch.denoiser.title}")
    cells = max(8, min(40, screen.width() - 30))
    top = max(first.get(block, 0) for block in arch.blocks)
    rows: list[tuple[str, ...]] = []
    for block in dict.fromkeys(b for b in (*arch.blocks, *first) if b in first):
        n = first[block]
        inside = block in arch.blocks
        share = screen.percent(n / total) if inside else ""
        drawn = screen.bar(n / top, cells, rest=" ").rstrip() if inside else ""
        rows.append((block, screen.count(n), share, drawn))
    screen.table(("block", ">parameters", ">share", ""), rows)
    for other, sizes in others:
        there = [block for block in arch.blocks if block in sizes]
        screen.put(
            f"{other}: {screen.count(parameters(sizes, arch.blocks))} in {len(there)} blocks:"
            f" {spans(there)}"
        )


def document(arch: Architecture) -> dict[str, Any]:
    from plymix.archs.views import view

    own, fitted = presets(arch)
    known = diffusers(arch)
    return {
        "name": arch.name,
        "title": arch.title,
        "short": arch.short,
        "blocks": list(arch.blocks),
        "parts": list(arch.parts),
        "lists": {str(n): list(names) for n, names in sorted(lists(arch).items())},
        "views": {tool: list(view(arch, tool).blocks) for tool in arch.views},
        "variants": list(dict.fromkeys(v.name for v in arch.variants)),
        "components": [
            {
                "name": c.name,
                "title": c.title,
                "prefixes": list(c.prefixes),
                "diffusers": c.name in known,
            }
            for c in arch.components
        ],
        "presets": {"published": own, "by_formula": fitted},
        "parameters": arch.sizes(),
        "modelspec": arch.modelspec,
    }
