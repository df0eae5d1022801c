"""What all stages look at: the icons on the device, and their captions as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import captions
import scenes
from icons import Icons
from loop import Run
from settings import Settings

STYLES = ("A", "B")


@dataclass
class World:
    """icons: uint8 [2, n, 4, s, s]; ids: [n, most captions, 77] with `counts` [n] of them true;
    empty: [kinds, 77], what stands for no caption."""

    settings: Settings
    run: Run
    concepts: list[captions.Concept]
    icons: Any
    ids: Any
    counts: Any
    empty: Any

    def pictures(self, which: Any, style: int, generator: Any) -> Any:
        """Concepts [n] in a style at random places: [n, 3, size, size] in -1..1."""
        rgba = scenes.placed(self.icons[style, which], generator, self.settings.size)
        return scenes.in_style(style, rgba)

    def both(self, which: Any, generator: Any) -> Any:
        """Concepts [n], the first half of them in style A and the others in B."""
        half = (len(which) + 1) // 2
        parts = (which[:half], which[half:])
        return torch.cat([self.pictures(p, i, generator) for i, p in enumerate(parts) if len(p)])

    def some(self, n: int, generator: Any) -> Any:
        """n concepts at random, with repetitions: [n]."""
        return self._below(len(self.concepts), (n,), generator)

    def different(self, n: int, generator: Any) -> Any:
        """At most n concepts, none of them twice: [n or fewer]."""
        every = torch.randperm(len(self.concepts), generator=generator, device=self.run.device)
        return every[:n]

    def said(self, which: Any, generator: Any, empty: float = 0.0) -> Any:
        """A random caption for each of the concepts [n], or one that says nothing: [n, 77]."""
        draw = torch.rand((2, len(which)), generator=generator, device=self.run.device)
        counts = self.counts[which]
        ids = self.ids[which, (draw[0] * counts).long().clamp(max=counts - 1)]
        none = self.empty[self._below(len(self.empty), (len(which),), generator)]
        return torch.where((draw[1] < empty)[:, None], none, ids)

    def asked(self, texts: list[str]) -> Any:
        return torch.tensor([captions.ids(text) for text in texts], device=self.run.device)

    def _below(self, n: int, shape: tuple[int, ...], generator: Any) -> Any:
        return torch.randint(n, shape, generator=generator, device=self.run.device)


def world(settings: Settings, run: Run, icons: Icons) -> World:
    texts = [captions.captions(concept) for concept in icons.concepts]
    most = max(map(len, texts))
    ids = [[captions.ids(each[i % len(each)]) for i in range(most)] for each in texts]
    return World(
        settings,
        run,
        icons.concepts,
        torch.from_numpy(icons.pixels).to(run.device),
        torch.tensor(ids, device=run.device),
        torch.tensor([len(each) for each in texts], device=run.device),
        torch.tensor([captions.ids(text) for text in captions.EMPTY], device=run.device),
    )
