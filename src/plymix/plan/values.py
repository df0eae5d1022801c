"""What a plan is: open inputs, every tensor of the result, the account of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath

from plymix import archs, urls, weights
from plymix.archs import Architecture, Detection, Place
from plymix.archs.views import View
from plymix.errors import Refusal, listed
from plymix.expr import (
    Call,
    Expr,
    Tensor,
    changed,
    children,
    chunkable,
    deltas,
    leaves,
    numbered,
    plain_terms,
    waiting,
)
from plymix.formats import is_folder_name, writer_for
from plymix.formats.base import Content, Entry, Layout, Source, TensorInfo, together
from plymix.formats.diffusers import MODEL_INDEX
from plymix.pairing import Paired
from plymix.recipe import Recipe
from plymix.registry import get_method

MAX_IDS = 1 << 16
"""More position ids than this are none: CLIP has 77."""

READ = "read when planning"
"""What becomes of keys whose numbers are in the plan itself: a LoRA's alphas."""

ANY = "ALL"
"""The one block of a plain merge by key (`arch = "any"`)."""


@dataclass(frozen=True)
class Input:
    """An open file of the recipe, its tensors by canonical key."""

    index: int
    name: str
    file: str
    source: Source
    paired: Paired
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    strangers: tuple[str, ...] = ()  # keys its architecture does not know

    @property
    def detection(self) -> Detection:
        return self.paired.detection

    @property
    def label(self) -> str:
        """The file's name as the recipe has it, without folders; what is not text becomes '?'."""
        path = PurePath(urls.name(self.file) if urls.is_url(self.file) else self.file)
        path = path.parent if path.name == MODEL_INDEX and path.parent.name else path
        return path.name.encode("utf-8", "replace").decode()

    @cached_property
    def components(self) -> frozenset[str]:
        return frozenset(p.component for p in self.places.values() if not p.buffer)

    @property
    def prediction(self) -> str:
        """ "v", "epsilon", "edm" or "" (not declared)."""
        source = self.source
        return archs.prediction(source.tensors, source.metadata, self.detection.arch).kind


@dataclass(frozen=True)
class Fate:
    """What became of one tensor of the output, for people: `how` is "merged" or "copied"."""

    how: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Everything decided. Values only, but for the open `inputs`; close them when done."""

    recipe: Recipe
    inputs: tuple[Input, ...]
    base: Input
    denoiser: Input  # whose U-Net or transformer the result has: the base, or output.unet
    arch: Architecture | None
    tensors: tuple[Tensor, ...]
    places: Mapping[str, Place]  # by output name
    fates: Mapping[str, Fate]  # by output name
    dropped: Mapping[str, Mapping[str, tuple[str, ...]]]  # input name -> rule -> keys
    unmatched: Mapping[str, tuple[str, ...]]  # input name -> keys that another model lacks
    notes: tuple[str, ...]
    view: View  # the blocks by which weights are given
    alone: str = ""  # the one component that the result holds; "": all
    weights: Mapping[str, Mapping[str, weights.Resolved]] = field(default_factory=dict)
    components: tuple[str, ...] = ()  # whose tensors it has by diffusers' names; (): by others
    folder: bool = False  # whether the tensors' names begin with their component

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(i.source for i in self.inputs)

    @property
    def merged(self) -> int:
        return sum(f.how == "merged" for f in self.fates.values())

    @property
    def copied(self) -> int:
        return sum(f.how == "copied" for f in self.fates.values())

    @property
    def unused(self) -> int:
        """Keys of the inputs that a rule left out of the result."""
        rules = (rule for by_rule in self.dropped.values() for rule in by_rule.items())
        return sum(len(keys) for why, keys in rules if why != READ)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of tensor data the engine reads (each use of a tensor counted once)."""
        seen = {leaf for t in self.tensors for leaf in leaves(t.expr)}
        return sum(leaf.info.nbytes for leaf in seen)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        entries = self._entries()
        if any(e.encoding for e in entries):
            from plymix.formats import gguf

            return sum(map(gguf.nbytes, entries))
        return sum(e.nbytes for e in entries)

    def memory(self, threads: int) -> int:
        """An upper bound of the memory the merge needs with so many threads, in bytes."""
        most, least = 0, 64
        for t in self.tensors:
            if plain_terms(t.expr):
                continue
            if chunkable(t.expr):
                least = 96
                factors = [sum(x.info.numel for _, x in d.factors) for d in deltas(t.expr)]
                if factors:  # of LoRAs: in float32, twice over while they are joined
                    held = min(sum(factors), max(t.numel, 1 << 21))
                    most = max(most, 8 * max(held, *factors))
                continue
            largest = max((leaf.info.numel for leaf in leaves(t.expr)), default=t.numel)
            needed = max((waits + _room(x) for x, waits in waiting(t.expr)), default=3)
            most = max(most, largest * 4 * needed)
        return (least << 20) + threads * most

    def layout(
        self,
        path: Path,
        metadata: Mapping[str, str],
        configs: Callable[[Plan], Mapping[str, Content]] = lambda plan: {},
    ) -> tuple[tuple[Tensor, ...], Layout]:
        """The tensors with their offsets in what is to be written as `path`, and its layout.

        `configs` gives what else a diffusers folder holds. Raises Refusal for a path that the
        tensors cannot go to.
        """
        if any(t.encoding for t in self.tensors) and path.suffix.lower() != ".gguf":
            raise Refusal(f"q8_0 is a dtype of GGUF files; {path.name} is none: name a .gguf")
        layout = self._layout(self._entries(), path, metadata, configs)
        placed = tuple(replace(t, offset=layout.offsets[t.name]) for t in self.tensors)
        return placed, layout

    def _entries(self) -> list[Entry]:
        """The tensors as the file has them: those that are to be packed, if that suits them."""
        entries = [Entry(t.name, t.dtype, t.shape) for t in self.tensors]
        if any(t.encoding for t in self.tensors):
            from plymix.formats.gguf import packed

            pairs = zip(entries, self.tensors, strict=True)
            return [packed([e])[0] if t.encoding else e for e, t in pairs]
        return entries

    def _layout(
        self,
        entries: Sequence[Entry],
        path: Path,
        metadata: Mapping[str, str],
        configs: Callable[[Plan], Mapping[str, Content]],
    ) -> Layout:
        limit = int(self.recipe.output.shard)
        if is_folder_name(path):
            if not self.components:
                raise Refusal(
                    f"{path} is to be a diffusers folder and the result has other names: say"
                    ' --layout diffusers (output.layout = "diffusers"), or name a .safetensors'
                )
            from plymix.formats.diffusers import layout_folder

            folder = layout_folder(entries, metadata, configs(self), limit=limit)
            return together(folder.files, folder.others)
        if self.folder:
            raise Refusal(
                f"{path.name} is one file and cannot hold {listed(self.components)} by diffusers'"
                f" names, which clash: name a folder (-o {path.stem}), or say --layout ldm"
            )
        parts = self.arch is None and MODEL_INDEX in self.base.source.configs
        if parts and not self.recipe.steps:
            raise Refusal(
                f"{path.name} is one file, and {self.base.label} is a folder of components whose"
                f" model plymix does not know: name a folder (-o {path.stem}), or take a component"
                f" (plymix convert {self.base.label}/COMPONENT {path.name})"
            )
        writer = writer_for(path)
        if limit and writer.name != "safetensors":
            raise Refusal(f"shards are .safetensors files; {path.name} is none")
        if limit:
            from plymix.formats.sharded import layout_shards

            shards = layout_shards(entries, metadata, limit, path.stem)
            if len(shards.files) > 1:
                (index,) = shards.others
                return together(shards.files, shards.others, index)
        if writer.name == "gguf" and self.arch is not None:  # its readers ask for it
            metadata = {"general.architecture": self.arch.gguf or self.arch.name, **metadata}
        layout: Layout = writer.layout(entries, metadata)
        return layout

    def used(self, i: Input) -> set[str]:
        """The keys of an input that the output is made of."""
        found = (leaf for t in self.tensors for leaf in leaves(t.expr) if leaf.source == i.index)
        return {leaf.info.name for leaf in found}

    def changes(self, other: Plan) -> tuple[str, ...]:
        """Names of the tensors that `other` makes and this plan does not make the same way."""
        theirs = {i.source.path: i.index for i in other.inputs}
        numbers = {i.index: theirs.get(i.source.path, ~i.index) for i in self.inputs}
        return changed(numbered(self.tensors, numbers), other.tensors)

    def close(self) -> None:
        for i in self.inputs:
            i.source.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counts(plan: Plan) -> dict[str, Counter[str]]:
    """Per block: how many tensors are merged and how many copied, from whom."""
    found: dict[str, Counter[str]] = {}
    for tensor in plan.tensors:
        fate = plan.fates[tensor.name]
        block = plan.places[tensor.name].block
        found.setdefault(block, Counter())[fate.how] += 1
    return found


def _room(node: Expr) -> int:
    """Tensors in float32 that it takes to compute a node, its children's values among them."""
    given = len(children(node))
    if isinstance(node, Call):  # its method's `room` is that of up to three models
        return max(2 + given, get_method(node.method).room + max(0, given - 3))
    return 2 + given
