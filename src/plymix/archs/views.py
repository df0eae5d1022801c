"""The blocks by which weights are given: a model's own, or those that another tool sees in it.

Tools disagree about what belongs to which block: the time embedding, `out.`, the middle. A view is
one tool's division. Its blocks are the order in which the tool's lists have their numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from plymix.archs.model import Architecture, OwnView, Place, shared_facts
from plymix.errors import Refusal, unknown

CLASSIC = "classic"
"""The view that `Architecture.blocks` is: the community's names, kohya's leftovers."""


@dataclass(frozen=True)
class View:
    """A division of an architecture's tensors into blocks.

    `blocks` are what a list of weights has numbers for; `lists` says the same of lists of other
    lengths, which may name BASE, VAE, CLIP, T5 too. `names` are what a table of weights and a rule
    may name besides: parts of blocks, text encoders, the VAE. Of a tensor whose name has none of
    `words` (if there are any) the tool leaves the first model's.
    """

    tool: str
    title: str
    blocks: tuple[str, ...]
    lists: Mapping[int, tuple[str, ...]]
    names: tuple[str, ...]
    words: tuple[str, ...] = ()
    moves: Mapping[str, str] = field(default_factory=dict)
    denoiser: str = ""

    def place(self, place: Place) -> Place:
        """`place` with the block that the view has it in."""
        if place.buffer or place.component == "ema":
            return place
        if to := self.moves.get(place.part):
            return replace(place, block=to, part=to)
        block = place.block
        if place.part in self.blocks:
            block = place.part
        elif block not in self.blocks and place.component == self.denoiser:
            block = self.blocks[0]
        return place if block == place.block else replace(place, block=block)

    def merges(self, name: str) -> bool:
        """Whether the tool merges a tensor of this name."""
        return not self.words or any(word in name for word in self.words)


def view(arch: Architecture, tool: str, blocks: Collection[str] | None = None) -> View:
    """How `tool` (a name, as in `tools`) divides `arch`.

    `blocks` are those that a model has (by default all): an architecture's models differ in depth.
    Raises Refusal where there is no such tool, or where it has no blocks for the architecture.
    """
    known = shared_facts().views
    if tool not in known:
        raise unknown("block view", tool, known)
    facts = known[tool]
    if tool != CLASSIC and tool not in arch.views:
        others = [CLASSIC, *arch.views]
        raise Refusal(
            f"{facts.title} has no blocks of its own for {arch.short};"
            f" say --block-view {' or '.join(others)}"
        )
    own = arch.views.get(tool, OwnView())
    there = arch.blocks if blocks is None else _as_deep(arch.blocks, blocks)
    gone = {*arch.blocks} - {*there}
    chosen = tuple(name for name in own.blocks or arch.blocks if name not in gone)
    names = (*arch.parts, *arch.outside)
    return View(
        tool,
        facts.title,
        chosen,
        {} if own.blocks else {n: row for n, row in arch.lists.items() if not gone & {*row}},
        tuple(dict.fromkeys(n for n in names if n not in chosen and n != "BASE")),
        facts.words,
        {**facts.moves, **own.moves},
        arch.denoiser.name,
    )


def _as_deep(blocks: tuple[str, ...], there: Collection[str]) -> tuple[str, ...]:
    """`blocks` without the ends of numbered runs that a model does not have at all."""
    last: dict[str, int] = {}
    for i, name in enumerate(blocks):
        if name in there:
            last[name.rstrip("0123456789")] = i
    return tuple(n for i, n in enumerate(blocks) if i <= last.get(n.rstrip("0123456789"), -1))


def tools() -> tuple[str, ...]:
    """The names of the views."""
    return tuple(shared_facts().views)
