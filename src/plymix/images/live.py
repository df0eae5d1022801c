"""A merge as the tensors of a running pipeline: which ones there are, and which a change touches.

A plan makes tensors under its architecture's names. A pipeline of diffusers and transformers has
others, some of them parts of one (`archs.dialects` knows which); `parts` gives the plan's tensors
in that spelling, so that the engine computes them straight into the modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from plymix import engine, pairing
from plymix.archs.dialects import Views, shape_of, written
from plymix.archs.model import load
from plymix.engine.worker import prepare
from plymix.errors import Refusal
from plymix.expr import Tensor, changed, numbered
from plymix.formats.base import Source
from plymix.metadata import CONFIG_KEY
from plymix.plan import Plan

COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
"""The parts of a pipeline, by architecture."""

ROOM = 64 << 20
"""Bytes of tensors computed before they are handed on."""


def parts(plan: Plan) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of each component of the pipeline, by their names there. Raises Refusal."""
    arch = plan.arch
    if arch is None or arch.name not in COMPONENTS:
        known = ", ".join(name.upper() for name in COMPONENTS)
        raise Refusal(
            f"{plan.base.label} is {plan.base.detection.named}; pictures in this process are for"
            f" {known}: use --backend comfyui or a1111 for others"
        )
    if plan.base.detection.variant != "base":
        raise Refusal(
            f"{plan.base.label} is {plan.base.detection.named}, which paints on pictures; compare"
            " draws from text alone"
        )
    home = {plan.places[t.name].key: t for t in plan.tensors}
    shapes = {key: t.shape for key, t in home.items()}
    told = tuple(shapes.items())
    found: dict[str, tuple[Tensor, ...]] = {}
    for component in COMPONENTS[arch.name]:
        views = _views(arch.name, component, told)
        if not views:
            raise Refusal(
                f"{plan.base.label} has no {component.replace('_', ' ')}; take a whole checkpoint"
                + (', or give one: "... vae=FILE"' if component == "vae" else "")
            )
        found[component] = tuple(
            replace(
                home[of[0].key],
                name=f"{component}/{name}",
                shape=shape_of(of, shapes),
                expr=pairing.spelt(home[of[0].key].expr, of),
            )
            for name, of in views.items()
        )
    return found


@lru_cache(maxsize=8)
def _views(arch: str, component: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Views:
    """Which parts of a checkpoint's tensors a component's are: alike for all merges of a sheet."""
    return written(load(arch), pairing.DIFFUSERS, component, dict(shapes)).views


def hints(plan: Plan) -> dict[str, dict[str, Any]]:
    """What is known of the components beyond their shapes: config files, or CONFIG_KEY.

    {"unet": {"norm_num_groups": 8, "attention_head_dim": 8},
     "text_encoder": {"num_attention_heads": 4}, "vae": {"norm_num_groups": 8}}
    """
    source = plan.base.source
    found: dict[str, dict[str, Any]] = {}
    for name, path in source.configs.items():
        component, _, file = name.partition("/")
        if file == "config.json":
            found[component] = json.loads(path.read_text("utf-8"))
    if said := source.metadata.get(CONFIG_KEY):
        found |= json.loads(said)
    return found


class Sources:
    """The open files of any number of plans, each with one number for all of them."""

    def __init__(self) -> None:
        self.all: list[Source] = []
        self._stamps: list[Any] = []

    def numbered(self, plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A plan's tensors with these numbers."""
        return numbered(tensors, {i.index: self._number(i.source) for i in plan.inputs})

    def _number(self, source: Source) -> int:
        """A file that was opened again has the number it had, unless it changed meanwhile."""
        stats = ((file, file.stat()) for file in source.files)
        stamp = tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        if stamp in self._stamps:
            at = self._stamps.index(stamp)
            self.all[at] = source
            return at
        self._stamps.append(stamp)
        self.all.append(source)
        return len(self.all) - 1


class Live:
    """A set of tensors somewhere, kept equal to what the last plan makes.

    `put(tensor, data)` is called with every tensor whose value may have changed and its bytes in
    row-major order, in the plan's dtype; so what arrives is what a written file would hold.
    """

    def __init__(
        self, put: Callable[[Tensor, memoryview], None], *, device: str = "cpu", threads: int = 0
    ) -> None:
        self._put = put
        self._device = device
        self._threads = threads
        self._sources = Sources()
        self._made: tuple[Tensor, ...] = ()
        self.moved = 0  # bytes put by the last `become`

    def become(self, plan: Plan, tensors: Sequence[Tensor]) -> None:
        """Compute what differs from the last call. Raises Failure; then everything is made anew."""
        tensors = self._sources.numbered(plan, tensors)
        names = set(changed(self._made, tensors))
        self._made = ()
        self.make(self._sources.all, [t for t in tensors if t.name in names])
        self._made = tensors

    def make(self, sources: Sequence[Source], touched: Sequence[Tensor]) -> None:
        """Compute tensors whose leaves count `sources`, whatever was made before."""
        self.moved = 0
        job = engine.Job(sources, engine.MemoryTarget(0), device=self._device)
        prepare(job, touched)
        for batch in _batches(touched):
            target = engine.MemoryTarget(batch[-1].offset + batch[-1].nbytes)
            engine.perform(replace(job, target=target), batch, threads=self._threads)
            data = memoryview(target.data)
            for tensor in batch:
                self._put(tensor, data[tensor.offset : tensor.offset + tensor.nbytes])
                self.moved += tensor.nbytes


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in lists of about ROOM bytes, each with its offsets from 0 on."""
    batch: list[Tensor] = []
    at = 0
    for tensor in tensors:
        if batch and at + tensor.nbytes > ROOM:
            yield batch
            batch, at = [], 0
        batch.append(replace(tensor, offset=at))
        at += tensor.nbytes
    if batch:
        yield batch
