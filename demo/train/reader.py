"""The text encoder, taught beside a small image tower to tell which caption is of which picture.

That is CLIP (Radford et al. 2021, figure 3) on the concepts. The tower then judges the pictures
that the finished models draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import nets
from loop import fit
from plymix.images.tokens import END
from world import STYLES, World

SHORT = 0.75
"""Share of the steps that read captions cut off soon after their end. CLIP's text encoder is
causal: what it says of the tokens before is the same, at a quarter of the work."""

PAST = 4
"""Ends that such a caption keeps."""


def train(w: World) -> tuple[Any, Any]:
    """(text encoder, image tower)."""
    s, run = w.settings, w.run
    torch.manual_seed(s.seed + 1)
    encoder = nets.text(s, run.device)
    tower = nets.Tower(s.tower_widths, s.tower_features).to(run.device)
    head = nets.Reader(s.text_width, s.tower_features).to(run.device)
    drawn = cache(partial(seen_before, w))

    def loss(generator: Any) -> Any:
        which = w.different(s.text.batch, generator)
        style, place = torch.rand((2, len(which)), generator=generator, device=run.device)
        known = drawn()
        pictures = known[(style * 2).long(), (place * known.shape[1]).long(), which]
        ids = w.said(which, generator)
        if torch.rand((), generator=generator, device=run.device) < SHORT:
            ids = ids[:, : int((ids != END).sum(1).amax()) + PAST]
        with run.autocast():
            seen = tower(blurred(pictures / 127.5 - 1, generator))
            read = head(nets.read(encoder, ids), ids)
        scores = head.scale.clamp(max=4.6).exp() * seen @ read.T
        right = torch.arange(len(which), device=run.device)
        return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2

    def show(path: Path) -> Mapping[str, float]:
        """Of captions: the share whose nearest picture, in either style, is the right one."""
        every: Any = torch.arange(len(w.concepts), device=run.device)
        generator = run.generator("text-show")
        ids = w.said(every, generator)
        parts = [nets.read(encoder, i) for i in ids.split(256)]
        read = head(torch.cat(parts), ids)
        found = {}
        for style, name in enumerate(STYLES):
            pictures = [nets.half(w.pictures(i, style, generator)) for i in every.split(128)]
            seen = torch.cat([tower(p) for p in pictures])
            found[f"top1 {name}"] = float(((read @ seen.T).argmax(1) == every).float().mean())
        return found

    modules = {"text": encoder, "tower": tower, "head": head}
    fit(run, "text", s.text, modules, loss, show, ema=s.ema, warmup=s.warmup)
    return encoder, tower


def seen_before(w: World) -> Any:
    """All concepts in both styles, drawn once: uint8 [2, placements, n, 3, size / 2, size / 2]."""
    every: Any = torch.arange(len(w.concepts), device=w.run.device)
    made = []
    for style in range(2):
        for k in range(w.settings.placements):
            generator = w.run.generator("seen", k)
            parts = [nets.half(w.pictures(i, style, generator)) for i in every.split(32)]
            made.append(((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8))
            w.run.check()
    stacked: Any = torch.stack(made)
    return stacked.unflatten(0, (2, w.settings.placements))


def blurred(pictures: Any, generator: Any) -> Any:
    """As soft and noisy as drawn pictures are: the tower shall not need fine detail."""
    soft = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    n = len(pictures)
    share, noise = torch.rand((2, n, 1, 1, 1), generator=generator, device=pictures.device)
    drawn = torch.randn(pictures.shape, generator=generator, device=pictures.device)
    return torch.lerp(pictures, soft, share) + 0.15 * noise * drawn
