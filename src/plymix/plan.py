"""Recipe + headers -> Plan: every tensor of the result, and exactly what must be read to make it.

Every refusal happens here, before the first tensor is read. A plan accounts for every key of every
input, folds nests of linear steps to one sum per tensor, and fixes the output's header.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import msgspec

from plymix import archs, pairing, respelling, urls, weights
from plymix.archs import Architecture, Detection, Place
from plymix.archs.dialects import checkpoint_name, shape_of
from plymix.archs.model import ANY_ENCODER, shared_facts
from plymix.archs.views import CLASSIC, View, view
from plymix.errors import Refusal, listed, unknown
from plymix.expr import (
    Call,
    Const,
    Delta,
    Expr,
    Leaf,
    Linear,
    Patch,
    Sum,
    Tensor,
    changed,
    chunkable,
    deltas,
    folded,
    leaf_terms,
    leaves,
    narrow,
    numbered,
    plain_terms,
    positional,
)
from plymix.formats import is_folder_name, open_model, writer_for
from plymix.formats.base import WHOLE, Content, Entry, Layout, Source, TensorInfo, together
from plymix.formats.diffusers import MODEL_INDEX
from plymix.pairing import DIFFUSERS, Paired
from plymix.recipe import BLEND, DROPS, DTYPES, PARTS, REST, Recipe, Step, dtypes
from plymix.registry import Method, Param, get_method

if TYPE_CHECKING:
    from plymix.adapters.applying import Applied

MAX_IDS = 1 << 16
"""More position ids than this are none: CLIP has 77."""

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
            found = set(leaves(t.expr))
            largest = max((leaf.info.numel for leaf in found), default=t.numel)
            most = max(most, largest * 4 * (2 + len(found)))
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


def build(
    recipe: Recipe,
    *,
    folders: Sequence[str | os.PathLike[str]] = (),
    paths: Mapping[str, Path] | None = None,
    strict: bool = False,
    open_file: Callable[[Path], Source] = open_model,
    keep_open: bool = False,
) -> Plan:
    """Plan `recipe`. Model files are looked for as named, then in each of `folders`.

    `paths` says where a model is (by its name in the recipe) for those already found.

    With `strict`, keys that some models have and others lack are refused. Raises Refusal; every
    file it opened is closed again then, but with `keep_open`.
    """
    opened: list[Source] = []

    def open_counted(name: str) -> Source:
        known = (paths or {}).get(name)
        model = recipe.models[name]
        source = open_file(known or locate(model.file, folders))
        opened.append(source)
        if model.size and source.nbytes != model.size:
            raise Refusal(
                f"{urls.text(source.path)} has {source.nbytes:,} bytes; the recipe was written for"
                f" a {model.file} of {model.size:,}"
            )
        return source

    try:
        recipe, own = own_architecture(recipe, folders)
        return _Planner(recipe, open_counted, strict, own).plan()
    except BaseException:
        for source in () if keep_open else opened:
            source.close()
        raise


def own_architecture(
    recipe: Recipe, folders: Sequence[str | os.PathLike[str]] = ()
) -> tuple[Recipe, Architecture | None]:
    """The architecture that `recipe` describes, and the recipe with it in place of its file's name.

    Raises Refusal that names the file and the field.
    """
    said = recipe.output.arch
    if said in ("", "any"):
        return recipe, None
    from plymix.archs import own

    if isinstance(said, str):
        said = own.read(locate(said, folders))
        recipe = msgspec.structs.replace(
            recipe, output=msgspec.structs.replace(recipe.output, arch=said)
        )
    return recipe, own.architecture(said)


def locate(file: str, folders: Sequence[str | os.PathLike[str]]) -> Path:
    """`file` as named, or in one of `folders` (by its whole relative path, then by its name)."""
    if urls.is_url(file):
        return urls.path(file)
    path = Path(file).expanduser()
    if path.exists() or path.is_absolute():
        return path
    for folder in folders:
        for candidate in (Path(folder) / path, Path(folder) / path.name):
            if candidate.exists():
                return candidate
    return path


class _Planner:
    """The state of one planning run."""

    def __init__(
        self,
        recipe: Recipe,
        open_file: Callable[[str], Source],
        strict: bool,
        own: Architecture | None = None,
    ) -> None:
        self.recipe = recipe
        self.own = own
        self.open_file = open_file
        self.strict = strict
        self.inputs: list[Input] = []
        self.by_name: dict[str, Input] = {}
        self.applied: dict[str, Applied] = {}  # LoRAs by their names in the recipe
        self.notes: list[str] = []
        self.known: dict[tuple[str, str], tuple[Expr, tuple[int, ...]] | None] = {}
        self.lacking: dict[str, list[str]] = {}  # what a missing tensor led to -> keys
        self.unwritten: Mapping[str, str] = {}  # what the result's layout cannot hold -> why
        self.components: tuple[str, ...] = ()
        self.folder = False

    def plan(self) -> Plan:
        recipe = self.recipe
        needed = self._needed_models()
        self.any = recipe.output.arch == "any"
        self.dtypes = dtypes(recipe.output)
        for name in needed:
            self.by_name[name] = self._open(name)
        if self.any and recipe.parts:
            raise Refusal(f"{listed(PARTS)} need a known architecture; leave out --arch any")
        self.base = self.by_name[recipe.base()]
        self._not_quantised()
        self._same_architecture()
        self._known_dtypes()
        self._same_prediction()
        self.settings = {
            name: self._step_settings(name, recipe.steps[name]) for name in recipe.order()
        }
        for settings in self.settings.values():
            self.notes += settings.notes
        if recipe.final in self.settings and self.settings[recipe.final].method.delta:
            raise Refusal(
                f"steps.{recipe.final} ({recipe.steps[recipe.final].method}) gives a difference,"
                ' not a model: add it to one in another step (method = "sum")'
            )
        unused = [n for n in recipe.steps if n not in self.settings]
        known = (*self.by_name, *self._needed_adapters(), *recipe.parts)
        unused += [n for n in recipe.models if n not in known]
        if unused:
            self.notes.append(f"not used for {recipe.final}: {listed(unused)}")
        if recipe.output.ema in ("use", "exchange") and not any(
            "ema" in i.components for i in self.by_name.values()
        ):
            self.notes.append(f"ema = {recipe.output.ema}: no model has EMA weights")
        self.swaps = self._component_swaps()
        self._idle_parts()
        self.alone = self._alone()
        self.completed = self._completed()
        for name in self._needed_adapters():
            self.applied[name] = self._open_adapter(name)
        self._dialects()
        self.followed = {archs.ema_key(key): key for key in self.base.tensors}
        self.adjusted = _Adjustment(recipe.output.adjust, self.arch)
        tensors, places, fates = self._tensors()
        self._strength(tensors, fates)
        tensors, places, fates = self._respelt(tensors, places, fates)
        tensors = tuple(self._coded(t, places[t.name]) for t in tensors)
        self._idle_rules()
        dropped, unmatched = self._account(tensors)
        self._nothing_matched(tensors)
        if self.strict and any(unmatched.values()):
            worst = {k: v for k, v in unmatched.items() if v}
            text = "; ".join(f"{listed(v)} only in {k}" for k, v in worst.items())
            raise Refusal(f"--strict: {sum(map(len, worst.values()))} keys do not match: {text}")
        return Plan(
            recipe=recipe,
            inputs=tuple(self.inputs),
            base=self.base,
            denoiser=self.swaps.get(self.arch.denoiser.name, self.base) if self.arch else self.base,
            arch=self.arch,
            tensors=tensors,
            places=places,
            fates=fates,
            dropped=dropped,
            unmatched=unmatched,
            notes=tuple(dict.fromkeys(self.notes)),
            view=self.view,
            alone=self.alone,
            weights={name: s.resolved for name, s in self.settings.items()},
            components=self.components,
            folder=self.folder,
        )

    # --- inputs ---------------------------------------------------------------------------------

    def _needed_models(self) -> list[str]:
        recipe = self.recipe
        used = [recipe.base()]
        for step in recipe.order():
            used += [n for n in self._model_inputs(recipe.steps[step]) if n in recipe.models]
        return list(dict.fromkeys(used))

    def _model_inputs(self, step: Step) -> tuple[str, ...]:
        method = get_method(step.method)
        return step.inputs[: len(method.inputs)] if method.adapters else step.inputs

    def _needed_adapters(self) -> list[str]:
        """The LoRAs of all steps, each once."""
        found: dict[str, None] = {}
        for name in self.recipe.order():
            step = self.recipe.steps[name]
            for used in step.inputs[len(self._model_inputs(step)) :]:
                if used not in self.recipe.models:
                    raise Refusal(f"steps.{name}: {used} is a step; a LoRA is a file in [models]")
                found[used] = None
        return list(found)

    def _known_arch(self) -> Architecture:
        if self.arch is None:
            raise Refusal("a LoRA needs a known architecture; leave out --arch any")
        return self.arch

    def _open_adapter(self, name: str) -> Applied:
        from plymix.adapters.applying import Model, apply_to

        models = (*self.by_name.values(), self.base)
        model = Model(
            arch=self._known_arch(),
            shapes={k: info.shape for i in models for k, info in i.tensors.items()},
            label=self.base.label,
            title=self.base.detection.title,
            given={c: i.label for c, i in self.swaps.items() if i is not self.base},
        )
        source = self.open_file(name)
        opened = self._opened(name, source, pairing.unpaired(source), {}, {}, ())
        found = apply_to(source, opened.index, model)
        self.notes += found.notes
        return found

    def _step_settings(self, name: str, step: Step) -> _Settings:
        if get_method(step.method).adapters:
            return _AdapterSettings(name, step, self.view, self._known_arch())
        return _Settings(name, step, self.view, self.short, self._wide_base)

    def _open(self, name: str) -> Input:
        source = self.open_file(name)
        paired = pairing.unpaired(source) if self.any else pairing.pair(source, own=self.own)
        arch = paired.detection.arch
        tensors: dict[str, TensorInfo] = {}
        places: dict[str, Place] = {}
        strangers: list[str] = []
        for key, info in paired.tensors.items():
            place = _any_place(key) if self.any else arch.place(key) if arch else None
            if place is None:
                place = Place(key, "extra", "BUFFER", "BUFFER", True)
                strangers.append(key)
            if place.key in tensors:
                raise Refusal(
                    f"{source.path.name} has the tensor {place.key} twice, as {key!r} and"
                    f" {tensors[place.key].name!r}; remove one (plymix inspect shows both)"
                )
            if not place.buffer and (not info.is_float or not info.numel):
                place = replace(place, buffer=True)
            tensors[place.key] = info
            places[place.key] = place
        return self._opened(name, source, paired, tensors, places, strangers)

    def _opened(
        self,
        name: str,
        source: Source,
        paired: Paired,
        tensors: Mapping[str, TensorInfo],
        places: Mapping[str, Place],
        strangers: Sequence[str],
    ) -> Input:
        file = self.recipe.models[name].file
        at = len(self.inputs)
        opened = Input(at, name, file, source, paired, tensors, places, tuple(strangers))
        self.inputs.append(opened)
        self.notes += (f"{opened.label}: {note}" for note in source.notes)
        return opened

    def _same_architecture(self) -> None:
        if self.any:
            if self.recipe.output.block_view != CLASSIC:
                raise Refusal("--block-view needs a known architecture; leave out --arch any")
            self.arch = None
            self.view = View("any", "any", (ANY,), {}, ())
            self.short = "any architecture"
            return
        for i in self.by_name.values():
            _require_own(i, self.own) if self.own else _require_model(i, self.base)
        base = self.base.detection
        for i in self.by_name.values():
            if i.detection.arch != base.arch:
                raise Refusal(
                    f"{self.base.label} is {base.title} and {i.label} is {i.detection.title}:"
                    " they cannot be merged; choose two models of one architecture"
                )
        assert base.arch is not None
        self.arch, self.short = base.arch, base.arch.short
        there = {place.block for i in self.by_name.values() for place in i.places.values()}
        self.view = view(base.arch, self.recipe.output.block_view, there)
        if self.view.tool != CLASSIC:
            self._see_blocks()
        for i in self.by_name.values():
            if i.strangers:
                output = self.recipe.output
                kept = i is self.base or output.union
                fate = ("copied" if i is self.base else "added") if kept else "left out"
                dropped = output.component or "unknown" in output.drop
                self._strange(i, i.strangers, "left out" if dropped else fate)

    def _see_blocks(self) -> None:
        """The places of all inputs in the blocks of the view."""
        for i in self.inputs:
            places = {key: self.view.place(place) for key, place in i.places.items()}
            self.inputs[i.index] = replace(i, places=places)
        self.by_name = {name: self.inputs[i.index] for name, i in self.by_name.items()}
        self.base = self.inputs[self.base.index]

    def _strange(self, i: Input, keys: Sequence[str], fate: str) -> None:
        self.notes.append(
            f"{i.label}: {len(keys)} tensors unknown to {self.short}, {fate}: {listed(keys)}"
        )

    def _not_quantised(self) -> None:
        if not self.recipe.steps and self.recipe.output.dtype == "keep":
            return  # nothing is computed
        for i in self.by_name.values():
            quantised = archs.quantised(i.source.tensors)
            if quantised:
                kind = next(iter(quantised.values()))
                keys = listed((key for key, of in quantised.items() if of == kind), 3)
                raise Refusal(
                    f"{i.label} holds quantised weights, {kind} ({keys}), which cannot be blended"
                    " as they are; use the fp16, bf16, fp8 or GGUF version of the model"
                )
            odd = {
                key: i.tensors[key]
                for key, place in i.places.items()
                if place.block != "BUFFER" and _unblendable(i.tensors[key], self.any)
            }
            if odd:
                dtypes = listed(sorted({info.dtype for info in odd.values()}))
                raise Refusal(
                    f"{i.label} holds {len(odd)} weights as {dtypes} ({listed(odd, 3)}), which"
                    " cannot be blended; use the fp16, bf16, fp8 or GGUF version of the model"
                )

    def _same_prediction(self) -> None:
        said = {i.label: i.prediction for i in self.by_name.values() if i.prediction}
        if len(set(said.values())) < 2:
            return
        text = " and ".join(f"{label} predicts {kind}" for label, kind in said.items())
        if not self.recipe.output.allow_mixed_prediction:
            raise Refusal(
                f"{text}: such a merge gives noise; if you mean it, say --allow-mixed-prediction"
                " (output.allow_mixed_prediction = true)"
            )
        self.notes.append(f"{text}: merged as asked; the markers of {self.base.label} are kept")

    def _known_dtypes(self) -> None:
        """Refuse dtypes for components that there are not."""
        known = [c.name for c in self.arch.components] if self.arch else []
        for component in self.dtypes:
            if component not in (REST, *known):
                raise unknown(f"component of {self.short} in output.dtype", component, known)
        vae = self.dtypes.get("vae", self.dtypes[REST])
        if vae.startswith("fp8") and "vae" in self.base.components:
            self.notes.append(
                "the VAE becomes fp8 too, which costs pictures their detail: vae=keep in the dtype"
                " leaves it as it is"
            )

    def _wide_base(self, param: Param, step: str) -> float:
        """BASE's weight where a list of block weights says none: the base model's own."""
        if param.name in ("alpha", "beta") and param.range.holds(0.0):
            return 0.0
        if not param.required:
            return float(param.default)
        raise Refusal(
            f"steps.{step}.{param.name} says nothing about BASE (text encoder):"
            f" write {{ base = 0.5, blocks = ... }}"
        )

    # --- components -----------------------------------------------------------------------------

    def _component_swaps(self) -> dict[str, Input]:
        """component -> the input it is copied from whole."""
        if self.any:
            return {}
        assert self.arch is not None
        output = self.recipe.output
        encoders = [c.name for c in self.arch.components if c.name.startswith("text_encoder")]
        swaps: dict[str, Input] = {}
        if output.vae != BLEND:
            swaps["vae"] = self._part("vae", "vae") if output.vae else self.base
        if output.text_encoder:
            part = self._part("text_encoder", *encoders)
            swaps.update(dict.fromkeys(encoders, part))
        if output.text_encoder_2:
            if "text_encoder_2" not in encoders:
                raise Refusal(f"{self.short} has no second text encoder; use text_encoder")
            swaps["text_encoder_2"] = self._part("text_encoder_2", "text_encoder_2")
        if output.unet:
            denoiser = self.arch.denoiser.name
            swaps[denoiser] = self._part("unet", denoiser)
        for component, part in swaps.items():
            if part is not self.base:
                self._complete(component, part)
        return swaps

    def _completed(self) -> bool:
        """Whether a denoiser alone becomes a checkpoint, whose names its keys take then."""
        output, detection = self.recipe.output, self.base.detection
        others = {c for c, part in self.swaps.items() if part is not self.base}
        if self.arch is None or output.component or not others - {self.arch.denoiser.name}:
            return False
        if detection.kind != "denoiser" or detection.prefix or self.base.paired.dialect:
            return False
        self.notes.append(f"the result is a checkpoint and has the names of {self.short} ones")
        return True

    def _alone(self) -> str:
        """The one component the result is to hold; "" for all."""
        output = self.recipe.output
        names = [name for name in output.drop if name not in DROPS]
        if self.arch is None:
            if output.component or names:
                raise Refusal(
                    f"{self.base.label} is {self.base.detection.title}: plymix does not know its"
                    f" components; without them it can drop {listed(DROPS)}"
                )
            return ""
        for name in names:
            try:
                self.arch.component(name)
            except Refusal as e:
                raise Refusal(f"{e}; or {listed(DROPS)}") from None
        if not output.component:
            return ""
        component = self.arch.component(output.component)
        giver = self.swaps.get(component.name, self.base)
        if component.name not in giver.components | self.base.components:
            there = (c.name for c in self.arch.components if c.name in self.base.components)
            raise Refusal(f"{giver.label} has no {component.name}; it has {listed(there)}")
        return component.name

    def _part(self, field: str, *components: str) -> Input:
        """The model that the output's `field` names, as the giver of `components`."""
        name, what = getattr(self.recipe.output, field), PARTS[field]
        part = self.by_name.get(name)
        if part is None:
            known = (i for i in self.inputs if i.name == name)
            part = next(known, None) or self._open_part(name, components)
            theirs = part.detection.arch
            if part.detection.kind in ("checkpoint", "denoiser") and theirs != self.arch:
                raise Refusal(
                    f"the {what} of {part.label} ({part.detection.title}) does not fit"
                    f" {self.base.label} ({self.base.detection.title}); use one for {self.short}"
                )
        if not any(c in part.components for c in components):
            raise Refusal(
                f"{part.label} has no {what}: it is {part.detection.title};"
                f" name a file that has one"
            )
        return part

    def _open_part(self, name: str, components: Sequence[str]) -> Input:
        """A file of `components`: its keys are read as the base architecture spells them."""
        assert self.arch is not None
        source = self.open_file(name)
        paired = pairing.pair(source, self.arch, self.own)
        places: dict[str, Place] = {}
        tensors: dict[str, TensorInfo] = {}
        strangers: list[str] = []
        homes = self._homes(paired, components)
        found = {**paired.tensors, **{key: source.tensors[key] for key in paired.unpaired}}
        for key, info in found.items():
            place = self._part_place(key, components, homes)
            if place is None or place.key in tensors:
                strangers.append(key)
                continue
            tensors[place.key] = info
            places[place.key] = self.view.place(place)
        return self._opened(name, source, paired, tensors, places, strangers)

    def _homes(self, paired: Paired, components: Sequence[str]) -> list[str]:
        """What may stand before the keys of a file of `components` alone; nothing for a model."""
        assert self.arch is not None
        model = paired.detection.arch is not None and not paired.dialect
        homes = [] if model else [home for name in components for home in self.arch.homes(name)]
        if any(home.startswith(ANY_ENCODER) for home in homes):  # whose names the base tells
            owners = dict.fromkeys(
                key.split(".")[1] for key in self.base.places if key.startswith(ANY_ENCODER)
            )
            homes += (
                f"{ANY_ENCODER}{name}.{w}" for name in owners for w in shared_facts().wrappers
            )
        return homes

    def _part_place(
        self, key: str, components: Sequence[str], homes: Sequence[str]
    ) -> Place | None:
        """Where `key` of a file of `components` belongs: as in the base, else as tables say."""
        assert self.arch is not None
        known = next((home + key for home in homes if home + key in self.base.places), None)
        if known is not None:
            return self.base.places[known]
        place = self.arch.place(key)
        if not homes or (place and place.component in components):
            return place
        named = (checkpoint_name(self.arch, DIFFUSERS, name, key) for name in components)
        known = next(filter(None, named), None)
        return self.arch.place(known) if known else None

    def _complete(self, component: str, part: Input) -> None:
        assert self.arch is not None
        if component == self.arch.denoiser.name:
            return  # it comes whole, whatever its variant: nothing of the base's is left
        wanted = {
            k: self.base.tensors[k]
            for k, p in self.base.places.items()
            if p.component == component and not p.buffer
        }
        missing = [k for k in wanted if k not in part.tensors and not part.paired.lacks(k)]
        if missing and component in part.components:
            raise Refusal(
                f"{part.label} lacks {len(missing)} of the {len(wanted)} {component} tensors:"
                f" {listed(missing, 3)}; it is not complete or not for {self.short}"
            )
        for key, info in wanted.items():
            theirs = part.tensors.get(key)
            if theirs is not None and fitted(theirs, info.shape) is None:
                raise Refusal(
                    f"{key} has the shape {list(theirs.shape)} in {part.label} and"
                    f" {list(info.shape)} in {self.base.label}; use a {component} made for"
                    f" {self.short}"
                )

    def _dialects(self) -> None:
        """Note what the inputs with another tool's names lack, and what they have too much."""
        for i in self.inputs:
            paired = i.paired
            if not paired.dialect:
                continue
            keeps = i is self.base and self.recipe.output.layout == "diffusers"
            for why, keys in paired.left_out.items():
                fate = "copied" if keeps else "left out"
                self.notes.append(f"{i.label}: {len(keys)} tensors {fate}: {why}")
            if paired.unpaired and i is not self.base:
                self._strange(i, paired.unpaired, "left out")
            for name, why in () if keeps else paired.absent.items():
                if i is self.base or any(
                    key.startswith(name) and not self.base.places[key].buffer
                    for key in self.base.tensors
                ):
                    self.notes.append(f"{i.label} has no {name.rstrip('.')}: {why}")

    # --- tensors --------------------------------------------------------------------------------

    def _tensors(self) -> tuple[tuple[Tensor, ...], dict[str, Place], dict[str, Fate]]:
        tensors: list[Tensor] = []
        places: dict[str, Place] = {}
        fates: dict[str, Fate] = {}
        for key, place in self._keys():
            made = None if self._left_out(key, place) else self._tensor(key, place)
            if made is None:
                continue
            expr, shape, dtype, why = made
            name = self._spelling(key)
            if name in places:
                raise Refusal(f"two tensors of {self.alone} would be called {name}; say prefix")
            tensors.append(Tensor(name, dtype, shape, expr))
            places[name] = place
            if isinstance(expr, Leaf):
                fates[name] = Fate("copied", why or self.inputs[expr.source].label)
            else:
                fates[name] = Fate("filled" if isinstance(expr, Const) else "merged", why)
        return tuple(tensors), places, fates

    def _spelling(self, key: str) -> str:
        """The output's name of a key: the base model's, else its first owner's."""
        if self.alone and not self.recipe.output.prefix:
            assert self.arch is not None
            return self.arch.alone(key, self.arch.component(self.alone))
        if self.completed:
            return key
        if key in self.base.tensors:
            name = self.base.tensors[key].name
            old = "names" in self.recipe.output.repair and self.arch and self.arch.old_name(name)
            return key if old else name
        return next(i.tensors[key].name for i in self.inputs if key in i.tensors)

    def _respelt(
        self, tensors: tuple[Tensor, ...], places: dict[str, Place], fates: dict[str, Fate]
    ) -> tuple[tuple[Tensor, ...], dict[str, Place], dict[str, Fate]]:
        """The tensors in the layout that is asked for, or in the base's own.

        That is the base's if its file is one component and can hold them all.
        """
        base, paired, layout = self.base, self.base.paired, self.recipe.output.layout
        if self.any:
            if layout and MODEL_INDEX not in base.source.configs:
                return self._lone(tensors, places, fates)
            if layout == "diffusers":
                names = (tensor.name.partition("/")[0] for tensor in tensors)
                self.components, self.folder = tuple(dict.fromkeys(names)), True
            return tensors, places, fates
        assert self.arch is not None
        if self.recipe.output.component:
            if layout:
                raise Refusal(
                    "an extracted component has its architecture's own names, in one file; plymix"
                    " convert writes it otherwise"
                )
            return tensors, places, fates
        keeps_unknown = "unknown" not in self.recipe.output.drop
        homes = {places[tensor.name].key: tensor for tensor in tensors}
        if layout not in ("", "ldm", self.arch.layout, "diffusers"):
            raise unknown(f"layout of {self.short}", layout, ["diffusers", self.arch.layout])
        own = not layout and bool(paired.spelling) and not paired.folder
        own = own and homes.keys() <= set(paired.names.values())
        if layout != "diffusers" and not own:
            if paired.unpaired:
                self._strange(base, paired.unpaired, "left out")
            if paired.dialect:
                self.notes.append(
                    f"{base.label} has {paired.dialect}' names; the result has the names of"
                    f" {self.short} checkpoints, in one file"
                )
                tensors += self._markers(places, fates)
            return tensors, places, fates
        shapes = {key: tensor.shape for key, tensor in homes.items()}
        spelling = respelling.in_diffusers(self.arch, shapes, paired)
        self._unwritten(spelling.unwritten)
        carried = list(paired.unpaired) if keeps_unknown else []
        carried += (key for keys in paired.left_out.values() for key in keys)
        self.components = tuple(
            dict.fromkeys(
                (*spelling.views, *(k.partition("/")[0] for k in carried if paired.folder))
            )
        )
        self.folder = paired.folder or len(self.components) > 1
        out: list[Tensor] = []
        of: dict[str, str] = {}
        for component, group in spelling.views.items():
            for inner, views in group.items():
                name = f"{component}/{inner}" if self.folder else inner
                whole = homes[views[0].key]
                of[name] = whole.name
                shape = shape_of(views, {views[0].key: whole.shape})
                expr = pairing.spelt(whole.expr, views)
                out.append(replace(whole, name=name, shape=shape, expr=expr))
        places = {name: places[home] for name, home in of.items()}
        fates = {name: fates[home] for name, home in of.items()}
        if paired.unpaired:
            self._strange(base, paired.unpaired, "copied" if keeps_unknown else "left out")
        home = f"{self.arch.denoiser.name}/" if self.folder and not paired.folder else ""
        for key in carried:
            info, name = base.source.tensors[key], home + key
            out.append(Tensor(name, info.dtype, info.shape, Leaf(base.index, info)))
            places[name] = Place(key, "extra", "BUFFER", "BUFFER", True)
            fates[name] = Fate("copied", base.label)
        return tuple(out), places, fates

    def _lone(
        self, tensors: tuple[Tensor, ...], places: dict[str, Place], fates: dict[str, Fate]
    ) -> tuple[tuple[Tensor, ...], dict[str, Place], dict[str, Fate]]:
        """A VAE's or text encoder's own file in the layout that is asked for."""
        base, layout = self.base, self.recipe.output.layout
        made = {tensor.name: tensor for tensor in tensors}
        found = respelling.lone({t.name: t.shape for t in tensors}, layout)
        if found is None or self.recipe.steps:
            raise Refusal(
                f"{base.label} is {base.detection.title}: plymix knows no other layout of it"
            )
        part, views = found
        if layout not in ("ldm", part.arch.layout, "diffusers"):
            known = ["diffusers", part.arch.layout]
            raise unknown(f"layout of {part.arch.short}", layout, known)
        if layout == "diffusers":
            self.components = (part.component,)
        used = {view.key for of in views.values() for view in of}
        if lost := [key for key in made if key not in used]:
            self.notes.append(f"not in the result: {listed(lost, 3)} (no such tensor in {layout})")
        out: list[Tensor] = []
        for name, of in views.items():
            info = pairing.seen(name, of, base.source.tensors)
            first = made[of[0].key]
            out.append(replace(first, name=name, shape=info.shape, expr=Leaf(base.index, info)))
            places[name], fates[name] = places[first.name], fates[first.name]
        return tuple(out), places, fates

    def _markers(self, places: dict[str, Place], fates: dict[str, Fate]) -> tuple[Tensor, ...]:
        """What a folder's scheduler says, in the way of SDXL checkpoints: by empty tensors."""
        assert self.arch is not None
        source, found = self.base.source, []
        if self.arch.name == "sdxl" and self.base.prediction == "v":
            found = ["v_pred"]
            found += ["ztsnr"] if archs.zero_terminal_snr(source.tensors, source.metadata) else []
        for key in found:
            places[key] = Place(key, "extra", "BUFFER", "BUFFER", True)
            fates[key] = Fate("filled", "the scheduler says so")
        return tuple(Tensor(key, "F32", (0,), Const(b"", "F32", (0,))) for key in found)

    def _unwritten(self, unwritten: Mapping[str, str]) -> None:
        """Note what the result cannot hold in diffusers' layout."""
        self.unwritten = unwritten
        for why in dict.fromkeys(unwritten.values()):
            keys = [key for key, reason in unwritten.items() if reason == why]
            self.notes.append(f"not in the result: {listed(keys, 3)} ({why})")

    def _keys(self) -> Iterator[tuple[str, Place]]:
        """Canonical keys of the output, in the base model's order, then those added by rule."""
        for key, place in self.base.places.items():
            if not (self.recipe.output.trim and self._trimmed(key, place)):
                yield key, place
        seen = set(self.base.places)
        for component, part in self.swaps.items():
            for key, place in part.places.items():
                if key not in seen and component in (place.component, self._owner(key, place)):
                    seen.add(key)
                    yield key, place
        if self.recipe.output.union:
            for i in self.by_name.values():
                for key, place in i.places.items():
                    if key not in seen and place.component not in (*self.swaps, "ema"):
                        seen.add(key)
                        yield key, place

    def _owner(self, key: str, place: Place) -> str:
        """The component a tensor goes with: a marker with the denoiser, "ema" with nothing."""
        if place.component != "extra" or self.arch is None:
            return place.component
        return self.arch.owner(key)

    def _left_out(self, key: str, place: Place) -> str:
        """The rule of the output that leaves `key` out; "" for none."""
        output = self.recipe.output
        if not output.drop and not self.alone:
            return ""
        owner = self._owner(key, place)
        if self.alone and owner != self.alone:
            return f"component = {output.component}"
        for name in output.drop:
            if (
                (name == "schedules" and archs.is_schedule(key))
                or (name == "leftovers" and archs.is_leftover(key))
                or (name == "unknown" and key in self.strange)
                or (name not in DROPS and self.arch and owner == self.arch.component(name).name)
            ):
                return f"drop = {name}"
        return ""

    @cached_property
    def strange(self) -> frozenset[str]:
        """Keys that the architecture does not know."""
        return frozenset(key for i in self.inputs for key in i.strangers)

    def _trimmed(self, key: str, place: Place) -> bool:
        """Whether `trim` drops a key of the base: another model lacks it."""
        free = place.buffer or place.component in (*self.swaps, "ema")
        return not free and not all(key in i.tensors for i in self.by_name.values())

    def _tensor(self, key: str, place: Place) -> tuple[Expr, tuple[int, ...], str, str] | None:
        """(expression, shape, dtype, reason) of an output tensor; None: dropped by a rule."""
        if place.component == "ema":
            return self._ema_tensor(key)
        swap = self.swaps.get(place.component)
        if place.buffer:
            giver = self.swaps.get(self._owner(key, place))
            if giver and key in archs.markers((key,)) and key not in giver.tensors:
                return None  # it said how another denoiser was trained
            swap = swap or giver
            owner = next(
                i for i in (swap or self.base, self.base, *self.inputs) if key in i.tensors
            )
            return self._buffer(key, owner.tensors[key], owner.index)
        if swap is not None and place.component in swap.components:
            leaf = self._leaf(swap, key)
            if leaf is None and swap.paired.lacks(key):
                leaf, swap = self._leaf(self.base, key), self.base
            if leaf is None:
                return None
            known = self.base.tensors.get(key, leaf.info)
            info = fitted(leaf.info, known.shape) or leaf.info
            expr: Expr = Leaf(leaf.source, info)
            shape, dtype = info.shape, self._dtype(leaf.info, place.component)
            why = "" if swap is self.base else f"{place.component} of {swap.label}"
        else:
            kept = self._kept(key)
            value = kept or self._value(self.recipe.final, key, place)
            if value is None:
                return None
            expr, shape = value
            first = next(i for i in (self.base, *self.inputs) if key in i.tensors)
            dtype = self._dtype(first.tensors[key], place.component)
            why = f"{self.view.title} leaves it" if kept else ""
        return self.adjusted(key, expr, shape), shape, dtype, why

    def _kept(self, key: str) -> tuple[Expr, tuple[int, ...]] | None:
        """The base's tensor, where the view's tool would leave it; None where it merges it."""
        info = self.base.tensors.get(key)
        if info is None or self.view.merges(info.name):
            return None
        leaf = self._leaf(self.base, key)
        return None if leaf is None else (leaf, leaf.info.shape)

    def _ema_tensor(self, key: str) -> tuple[Expr, tuple[int, ...], str, str] | None:
        """EMA weights are kept as the base has them, or exchanged with the weights they follow."""
        ema = self.recipe.output.ema
        info = self.base.tensors.get(key)
        if ema not in ("keep", "exchange") or info is None:
            return None
        if ema == "exchange":
            info = self.base.tensors.get(self.followed.get(key, key), info)
        return Leaf(self.base.index, info), info.shape, self._dtype(info, "ema"), "EMA"

    def _buffer(
        self, key: str, info: TensorInfo, owner: int
    ) -> tuple[Expr, tuple[int, ...], str, str]:
        """A buffer is never blended and never cast: in 16 bits a noise schedule is a wrong one."""
        ids = key.endswith(".position_ids") and info.numel <= MAX_IDS
        if ids and "position_ids" in self.recipe.output.repair:
            known = b"".join(i.to_bytes(8, "little") for i in range(info.numel))
            return Const(known, "I64", info.shape), info.shape, "I64", "position_ids reset"
        return Leaf(owner, info), info.shape, info.dtype, "buffer"

    def _dtype(self, info: TensorInfo, component: str) -> str:
        """The output's dtype; what a file holds in coarse blocks is kept as fp16.

        fp8 is for matrices and kernels: vectors are small, and norms do not stand it.
        """
        asked = self._asked(component)
        if not info.is_float or not info.numel or (asked.startswith("fp8") and len(info.shape) < 2):
            return info.dtype
        return DTYPES[asked] or ("F16" if info.encoding else info.dtype)

    def _asked(self, component: str) -> str:
        """The dtype that the recipe asks for a component. EMA weights follow the denoiser."""
        if component == "ema" and self.arch is not None:
            component = self.arch.denoiser.name
        return self.dtypes.get(component, self.dtypes[REST])

    def _coded(self, tensor: Tensor, place: Place) -> Tensor:
        """`tensor` with what its dtype says beyond a number format: packing, rounding by chance."""
        asked, output = self._asked(place.component), self.recipe.output
        if place.buffer or tensor.dtype != DTYPES[asked]:
            return tensor
        if asked == "q8_0":
            return replace(tensor, encoding="Q8_0")
        if asked.startswith("fp8") and output.rounding == "stochastic":
            return replace(tensor, noise=(output.seed, tensor.name))
        return tensor

    def _leaf(self, owner: Input, key: str) -> Leaf | None:
        info = owner.tensors.get(key)
        if self.recipe.output.ema in ("use", "exchange") and self.arch is not None:
            info = owner.tensors.get(archs.ema_key(key), info)
        return None if info is None else Leaf(owner.index, info)

    def _value(self, name: str, key: str, place: Place) -> tuple[Expr, tuple[int, ...]] | None:
        """What model or step `name` has at `key`, and its shape; None: it has no such tensor."""
        if (name, key) not in self.known:
            self.known = {at: v for at, v in self.known.items() if at[1] == key}
            self.known[name, key] = self._made(name, key, place)
        return self.known[name, key]

    def _made(self, name: str, key: str, place: Place) -> tuple[Expr, tuple[int, ...]] | None:
        if name in self.by_name:
            leaf = self._leaf(self.by_name[name], key)
            return None if leaf is None else (leaf, leaf.info.shape)
        settings = self.settings[name]
        if isinstance(settings, _AdapterSettings):
            return self._adapted(settings, key, place)
        names = settings.step.inputs
        values = [self._value(used, key, place) if used else None for used in names]
        present = [(i, v) for i, v in enumerate(values) if v is not None]
        if not present:
            return None
        method = settings.method
        fixed = len(values) if not method.variadic else len(method.inputs)
        lost = [i for i, v in enumerate(values) if v is None and names[i]]
        several = sum(i >= fixed for i, _ in present)
        if any(i < fixed for i in lost) or (method.variadic and several < method.min_variadic):
            return self._without(settings, key, present, lost)
        if lost:
            self._lack(f"merged without {listed(names[i] for i in lost)}, which lacks it", key)
        return self._applied(settings, key, place, present)

    def _adapted(
        self, settings: _AdapterSettings, key: str, place: Place
    ) -> tuple[Expr, tuple[int, ...]] | None:
        """A model with LoRAs added; what they add comes in an order that is not the recipe's."""
        first, *names = settings.step.inputs
        value = self._value(first, key, place)
        if value is None:
            return None
        expr, shape = value
        params = settings.params(place, key, tuple(range(len(names) + 1)))
        strengths = params["strength"]
        found: list[Linear] = []
        for name, strength in zip(names, strengths, strict=True):
            changes = self.applied[name].deltas(key, shape, expr, params["dora"])
            found.append(Linear(dict.fromkeys(changes if strength else (), 1.0)))
        total: Linear = settings.method.function(Linear.of(expr), *found, strength=strengths)
        order = {applied.index: applied.order for applied in self.applied.values()}

        def rank(term: tuple[Expr, float]) -> tuple[str, str, float]:
            x, c = term
            if not isinstance(x, Delta):
                return ("", "", 0.0)
            return order[x.source], x.factors[0][1].info.name, c

        return Linear(dict(sorted(total.terms.items(), key=rank))).expr(), shape

    def _without(
        self,
        settings: _Settings,
        key: str,
        present: list[tuple[int, tuple[Expr, tuple[int, ...]]]],
        lost: list[int],
    ) -> tuple[Expr, tuple[int, ...]] | None:
        """A step that lacks an input at `key` gives its first one unchanged, or difference 0."""
        names = settings.step.inputs
        if settings.method.delta:
            expr, shape = present[0][1]
            self._lack(f"left out of a difference: not in {names[lost[0]]}", key)
            return Sum(((0.0, expr),)), shape
        first = names[present[0][0]]
        if first in self.settings and self.settings[first].method.delta:
            self._lack(f"left out: only a difference ({first}) has them", key)
            return None
        self._lack(f"taken from {first}: not in {names[lost[0]]}", key)
        return present[0][1]

    def _lack(self, what: str, key: str) -> None:
        self.lacking.setdefault(what, []).append(key)

    def _applied(
        self,
        settings: _Settings,
        key: str,
        place: Place,
        present: list[tuple[int, tuple[Expr, tuple[int, ...]]]],
    ) -> tuple[Expr, tuple[int, ...]]:
        shapes = [shape for _, (_, shape) in present]
        args = [expr for _, (expr, _) in present]
        models = tuple(i for i, _ in present)
        if len(set(shapes)) == 1:
            return settings.apply(key, place, args, models), shapes[0]
        if self.arch is not None and key == self.arch.input_conv:
            return self._channels(settings, key, place, args, shapes, models)
        fitted = [_fitted_expr(arg, shape, shapes[0]) for arg, shape in zip(args, shapes)]  # noqa: B905
        if any(f is None for f in fitted):
            at = next(i for i, f in enumerate(fitted) if f is None)
            raise Refusal(
                f"{key} has the shape {list(shapes[0])} in {settings.step.inputs[models[0]]} and"
                f" {list(shapes[at])} in {settings.step.inputs[models[at]]}; these models are not"
                " of one kind"
            )
        good = [f for f in fitted if f is not None]
        return settings.apply(key, place, good, models), shapes[0]

    def _channels(
        self,
        settings: _Settings,
        key: str,
        place: Place,
        args: list[Expr],
        shapes: list[tuple[int, ...]],
        models: tuple[int, ...],
    ) -> tuple[Expr, tuple[int, ...]]:
        """Inpainting, pix2pix: shared channels by the formula, the others from their owner."""
        widths = sorted({shape[1] for shape in shapes})
        rest = {(shape[0], *shape[2:]) for shape in shapes}
        names = settings.step.inputs
        assert self.arch is not None
        plain = self.arch.input_channels
        if len(widths) != 2 or widths[0] != plain or len(rest) != 1:
            text = ", ".join(f"{names[m]} {s[1]}" for m, s in zip(models, shapes, strict=True))
            raise Refusal(
                f"{key} has different numbers of input channels ({text}): only plain models"
                f" ({plain}) and one kind of inpainting or similar model mix"
            )
        owner = next(i for i, s in enumerate(shapes) if s[1] == widths[1])
        inner = [
            narrow(a, widths[0]) if s[1] != widths[0] else a
            for a, s in zip(args, shapes, strict=True)
        ]
        expr = settings.apply(key, place, inner, models)
        self.notes.append(
            f"{key}: channels 0-{widths[0] - 1} merged, {widths[0]}-{widths[1] - 1} kept from"
            f" {names[models[owner]]}"
        )
        if expr == inner[owner]:
            return args[owner], shapes[owner]
        return Patch(args[owner], expr, widths[0]), shapes[owner]

    def _strength(self, tensors: Sequence[Tensor], fates: Mapping[str, Fate]) -> None:
        """Note sums whose coefficients do not add up to one model, but for `output.adjust`."""
        totals: dict[str, float] = {}
        for tensor in tensors:
            if self.adjusted.scale(tensor.name) != 1.0:
                continue
            terms = leaf_terms(tensor.expr)
            total = math.fsum(c for c, _ in terms)
            if terms and fates[tensor.name].how == "merged" and abs(total - 1) > 1e-6:
                totals[tensor.name] = total
        if totals:
            low, high = min(totals.values()), max(totals.values())
            found = f"{low:.4g}" if high - low < 1e-6 else f"{low:.4g} to {high:.4g}"
            self.notes.append(
                f"the weights of the models sum to {found}, not to 1, in {len(totals)} tensors:"
                f" {listed(totals, 3)}; is a division or a difference missing?"
            )

    # --- accounts -------------------------------------------------------------------------------

    def _idle_parts(self) -> None:
        """Note weights of parts, text encoders or the VAE of which nothing is merged."""
        merged = {
            name
            for place in self.base.places.values()
            if not place.buffer and place.component not in (*self.swaps, "ema")
            for name in (place.part, place.block)
        }
        for step, settings in self.settings.items():
            for param, found in settings.resolved.items():
                for name in (n for n in found.parts if n not in merged):
                    why = f"{self.base.label} has no such tensor to merge"
                    if swap := self.swaps.get("vae") if name == "VAE" else None:
                        why = f'the VAE is {swap.label}\'s; vae = "blend" would merge it'
                    elif name in self.view.moves:
                        why = f"{self.view.title} has it in {self.view.moves[name]}"
                    self.notes.append(f"steps.{step}.{param}: {name} does nothing: {why}")

    def _idle_rules(self) -> None:
        at = [
            (p.block, k, p.part)
            for k, p in self.base.places.items()
            if not p.buffer and p.component != "ema" and p.component not in self.swaps
        ]
        for name, settings in self.settings.items():
            idle = weights.idle_rules(settings.rules, at, settings.rule_blocks)
            if idle:
                vae = any("VAE" in str(r) for r in idle) and "vae" in self.swaps
                advice = (
                    f'the VAE is {self.swaps["vae"].label}\'s and follows no weight; vae = "blend"'
                    " would merge it"
                    if vae
                    else "check its block and element names"
                )
                raise Refusal(
                    f"steps.{name}.rules: {listed(str(r) for r in idle)} matches no tensor of"
                    f" {self.short}: {advice}"
                )

    def _account(
        self, tensors: Sequence[Tensor]
    ) -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, tuple[str, ...]]]:
        """Every key that is not in the output by the rule that left it out, and the unmatched."""
        used: set[tuple[int, str]] = set()
        for tensor in tensors:
            used.update((leaf.source, leaf.info.name) for leaf in leaves(tensor.expr))
        for what, keys in self.lacking.items():
            self.notes.append(f"{len(keys)} tensors {what}: {listed(keys)}")
        dropped: dict[str, dict[str, tuple[str, ...]]] = {}
        unmatched: dict[str, tuple[str, ...]] = {}
        for i in self.inputs:
            if i.name in self.applied:
                dropped[i.name], unmatched[i.name] = self._adapter_account(i, used)
                continue
            unmatched[i.name] = alone = self._unmatched(i)
            ruled = [(info.name, self._drop_rule(i, key)) for key, info in i.tensors.items()]
            ruled += ((key, f"unknown to {self.short}") for key in i.paired.unpaired)
            if i.name not in self.by_name:
                whole = [*(key for key, _ in ruled), *i.strangers]
                ruled = [(key, "not part of the component") for key in whole]
            apart = {*alone, *(key for source, key in used if source == i.index)}
            rules: dict[str, list[str]] = {}
            for key, rule in ruled:
                if key not in apart:
                    rules.setdefault(rule, []).append(key)
            for left_out in (i.paired.left_out, i.source.left_out):
                for why, left in left_out.items():
                    if lost := [key for key in left if (i.index, key) not in used]:
                        rules[why] = lost
            dropped[i.name] = {rule: tuple(keys) for rule, keys in rules.items()}
        return dropped, unmatched

    def _adapter_account(
        self, i: Input, used: set[tuple[int, str]]
    ) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """The keys of a LoRA that change nothing: by rule, and those without a partner."""
        applied = self.applied[i.name]
        rules = {why: list(keys) for why, keys in applied.dropped.items()}
        for modules in applied.at.values():
            for module, _ in modules:
                read = any((i.index, info.name) in used for info in module.factors.values())
                factors = {info.name for info in module.factors.values()}
                idle = [key for key in module.keys if not read or key not in factors]
                why = "read when planning" if read else "weight 0"
                rules.setdefault(why, []).extend(idle)
        return {why: tuple(keys) for why, keys in rules.items() if keys}, applied.unmatched

    def _unmatched(self, i: Input) -> tuple[str, ...]:
        """The keys of a merged model that another one lacks, whatever became of them.

        So the count is the same in any order of the models, and with or without `union`.
        """
        others = [m for m in self.by_name.values() if m is not i]
        if i.name not in self.by_name or not others:
            return ()
        strangers = set(i.strangers)
        return (
            *(
                i.tensors[key].name
                for key, place in i.places.items()
                if (key in strangers or not place.buffer)
                and place.component not in (*self.swaps, "ema")
                and not self._left_out(key, place)
                and not all(key in m.tensors for m in others)
            ),
            *(k for k in i.paired.unpaired if not all(k in m.paired.unpaired for m in others)),
        )

    def _drop_rule(self, i: Input, key: str) -> str:
        """Why a key of `i` that the other models have is not in the output."""
        output, place = self.recipe.output, i.places[key]
        if key in self.unwritten:
            return self.unwritten[key]
        if place.component == "ema" and output.ema != "keep":
            return f"ema = {output.ema}"
        if rule := self._left_out(key, place):
            return rule
        if place.component == "ema":
            return f"ema = {output.ema}"
        swap = self.swaps.get(place.component)
        if swap is not None and swap is not i:
            return f"{place.component} is {swap.label}'s"
        if key in i.strangers:
            return f"unknown to {self.short}"
        if place.buffer:
            return f"buffers are {self.base.label}'s"
        if self._kept(key):
            return f"{self.view.title} leaves them"
        if output.ema == "use" and archs.ema_key(key) in i.tensors:
            return "ema = use"
        return "weight 0"

    def _nothing_matched(self, tensors: Sequence[Tensor]) -> None:
        for i in self.by_name.values():
            shared = sum(1 for k in i.tensors if k in self.base.tensors and not i.places[k].buffer)
            if not shared:
                raise Refusal(
                    f"{i.label} shares no tensor with {self.base.label}: nothing would be merged"
                )
        if not tensors:
            raise Refusal("the result would hold no tensor at all")


def _unblendable(info: TensorInfo, any_arch: bool) -> bool:
    """Whether a weight has numbers that plymix cannot compute with, as packed ones have.

    Whole numbers may be meant, and are copied; bytes are packed weights where the architecture says
    that here is a weight.
    """
    packed = not any_arch and info.dtype in ("I8", "U8")
    return info.numel > 1 and not info.is_float and (packed or info.dtype not in WHOLE)


def _any_place(key: str) -> Place:
    """Where a key belongs when nobody knows the architecture."""
    buffer = archs.is_buffer(key)
    if key.startswith(shared_facts().ema):
        return Place(key, "ema", "EMA", "EMA", buffer)
    return Place(key, "model", "BUFFER" if buffer else ANY, ANY, buffer)


class _Adjustment:
    """`output.adjust`: what is done to named tensors after the merge (see methods/tuning.py)."""

    def __init__(self, asked: Mapping[str, Any], arch: Architecture | None) -> None:
        self.scales: dict[str, float] = {}
        self.offsets: dict[str, tuple[float, ...]] = {}
        self.saturation = self.cfg = 1.0
        self.asked = bool(asked)
        if not asked:
            return
        from plymix.methods import tuning

        fields = ("detail", "contrast", "brightness", "colour", "saturation", "cfg")
        for name in asked:
            if name not in fields:
                raise unknown("field of output.adjust", name, fields)
        if arch is None or arch.name not in tuning.COLOURS_OF:
            raise Refusal("output.adjust works on SD1, SD2 and SDXL models; leave it out here")
        detail = _numbers("detail", asked.get("detail", 0.0), 3)
        contrast, brightness = (
            _numbers(f, asked.get(f, 0.0), 1)[0] for f in ("contrast", "brightness")
        )
        colour = _numbers("colour", asked.get("colour", 0.0), 3)
        values = (*detail, contrast, brightness, *colour)
        for key, (scale, offsets) in tuning.adjust(values, tuning.COLOURS_OF[arch.name]).items():
            self.scales[key] = scale
            self.offsets[key] = offsets
        self.saturation, self.cfg = (
            _numbers(f, asked.get(f, 1.0), 1)[0] for f in ("saturation", "cfg")
        )

    def scale(self, key: str) -> float:
        """What the tensor is multiplied by."""
        scale = self.scales.get(key, 1.0)
        if self.cfg != 1.0:
            from plymix.methods import tuning

            scale *= tuning.cfg_sensitivity(key, self.cfg)
        return scale

    def __call__(self, key: str, expr: Expr, shape: tuple[int, ...]) -> Expr:
        if not self.asked:
            return expr
        total = Linear.of(expr) * self.scale(key)
        if offsets := self.offsets.get(key):
            data = struct.pack(f"<{len(offsets)}f", *offsets)
            if len(offsets) != math.prod(shape):
                raise Refusal(f"output.adjust: {key} has the shape {list(shape)}, not 4 values")
            total += Linear.of(Const(data, "F32", shape))
        if self.saturation != 1.0 and key in _saturated():
            return Call(
                step="output.adjust",
                method="vae_saturation",
                args=(total.expr(),),
                params=(("saturation", self.saturation),),
                key=key,
                seed=0,
                models=(0,),
            )
        return total.expr()


def _saturated() -> tuple[str, ...]:
    from plymix.methods import tuning

    return tuning.VAE_OUTPUTS


def _numbers(field: str, value: Any, count: int) -> tuple[float, ...]:
    """`value` as `count` finite numbers; one number stands for all of them."""
    values = value if isinstance(value, (list, tuple)) else [value] * count
    good = len(values) == count and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not good:
        what = "a number" if count == 1 else f"{count} numbers"
        raise Refusal(f"output.adjust.{field} = {value!r} is not {what}")
    return tuple(map(float, values))


def _require_own(i: Input, own: Architecture) -> None:
    """Refuse a model that is not of the architecture the user describes."""
    if i.detection.arch == own:
        return
    from plymix.archs.own import missing

    lacking = missing(own, i.source.tensors)
    raise Refusal(
        f"{i.label} is not {own.short} as {own.name} describes it: it is {i.detection.title}"
        + (f"; {lacking} is not there" if lacking else "; a rule of [[detect]] does not hold")
    )


def _require_model(i: Input, base: Input) -> None:
    detection = i.detection
    if detection.arch is not None and detection.kind in ("checkpoint", "denoiser"):
        detection.require(i.label)
        return
    advice = {
        "vae": f"to put it into a model, say --vae {i.label}",
        "lora": "to add it to a model: plymix lora bake MODEL LORA -o OUT",
        "text_encoder": 'to put it into a model, use text_encoder = "..." in a recipe\'s [output]',
    }.get(detection.kind, "plymix archs lists what can be merged; --arch any merges key by key")
    beside = "" if i is base else f" and {base.label} is {base.detection.title}"
    seen = f" (it has {detection.seen})" if detection.seen else ""
    raise Refusal(f"{i.label} is {detection.title}{seen}{beside}; {advice}")


def fitted(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo | None:
    """`info` in another shape that differs by trailing ones (linear and 1x1 convolution)."""
    if info.shape == shape:
        return info
    if info.strides is None and _trimmed(info.shape) == _trimmed(shape):
        return replace(info, shape=shape)
    return None


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _fitted_expr(expr: Expr, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Expr | None:
    if shape == wanted:
        return expr
    if isinstance(expr, Leaf):
        info = fitted(expr.info, wanted)
        return None if info is None else Leaf(expr.source, info)
    if isinstance(expr, Delta) and expr.of is None and _trimmed(shape) == _trimmed(wanted):
        return replace(expr, shape=wanted, seen=wanted if not expr.pieces else expr.seen)
    if isinstance(expr, Sum):
        terms = [(c, _fitted_expr(term, shape, wanted)) for c, term in expr.terms]
        if all(term is not None for _, term in terms):
            return Sum(tuple((c, term) for c, term in terms if term is not None))
    return None


class _Settings:
    """A step's parameters, resolved for every block."""

    def __init__(
        self,
        name: str,
        step: Step,
        view: View,
        title: str,
        base_default: Callable[[Param, str], float],
    ) -> None:
        self.name = name
        self.step = step
        self.method: Method = get_method(step.method)
        self.where = f"steps.{name}"
        self.rules = weights.parse_rules(step.rules, field=f"{self.where}.rules")
        self.rule_blocks = tuple(dict.fromkeys((*view.blocks, "BASE", "VAE", *view.names)))
        self.resolved: dict[str, weights.Resolved] = {}
        self.lists: dict[str, list[weights.Resolved]] = {}
        self.notes: list[str] = []
        self.fixed: dict[str, Any] = {}
        self._tried: set[Any] = set()
        self._known: dict[Any, tuple[tuple[str, Any], ...]] = {}
        self.ruled = next((p.name for p in self.method.params if p.type is float), "")
        if self.rules and not self.ruled and not self.method.adapters:
            raise Refusal(f"{self.where}: {step.method} has no weight that rules could set")

        def resolve(value: Any, param: Param, field: str) -> weights.Resolved:
            one = replace(param, type=float)
            found = weights.resolve(
                weights.from_toml(value, field=field, blocks=view.blocks),
                view.blocks,
                arch_title=title,
                field=field,
                lists=view.lists,
                names=view.names,
            )
            base = base_default(param, name) if found.base is None else found.base
            found = weights.Resolved(base, found.blocks, found.notes, found.parts)
            self.notes += found.notes
            values = {base, *found.blocks.values(), *found.parts.values()}
            values.update(self._rule_values(param))
            for at in values:
                one.check(at, self.where)
            far = sorted(v for v in values if not 0 <= v <= 1)
            if param.name == "alpha" and step.method == "weighted_sum" and far:
                self.notes.append(
                    f"{field} goes to {far[-1 if far[-1] > 1 else 0]:g}: beyond both models"
                )
            return found

        for p in self.method.params:
            value = step.params.get(p.name, p.default)
            field = f"{self.where}.{p.name}"
            if p.type is float:
                self.resolved[p.name] = resolve(value, p, field)
            elif p.type is tuple and self.method.adapters:
                continue  # see _AdapterSettings
            elif p.type is tuple:
                self.lists[p.name] = [resolve(v, p, field) for v in self._list(p, value, field)]
            else:
                self.fixed[p.name] = p.check(value, self.where)

    def _rule_values(self, param: Param) -> Iterable[float]:
        return [r.ratio for r in self.rules] if param.name == self.ruled else []

    def _list(self, param: Param, value: Any, field: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise Refusal(f"{field} = {value!r} is not a list with one value per model")
        wanted = len(self.step.inputs) - (len(self.method.inputs) if self.method.variadic else 0)
        if value and len(value) != wanted:
            raise Refusal(f"{field} has {len(value)} values for {wanted} models")
        return list(value)

    def at(self, resolved: weights.Resolved, place: Place) -> float:
        for table, name in (
            (resolved.parts, place.part),
            (resolved.blocks, place.block),
            (resolved.parts, place.block),
        ):
            if name in table:
                return table[name]
        assert resolved.base is not None
        return resolved.base

    def params(self, place: Place, key: str, models: tuple[int, ...]) -> dict[str, Any]:
        """The method's keyword arguments at one key."""
        found = dict(self.fixed)
        for name, resolved in self.resolved.items():
            value = self.at(resolved, place)
            if name == self.ruled and self.rules:
                value = weights.apply_rules(
                    self.rules, place.block, key, value, self.rule_blocks, place.part
                )
            found[name] = value
        first = len(self.method.inputs) if self.method.variadic else 0
        for name, entries in self.lists.items():
            values = [self.at(r, place) for r in entries]
            found[name] = tuple(values[m - first] for m in models if m >= first) if values else ()
        return found

    def _try(self, params: dict[str, Any], models: tuple[int, ...]) -> None:
        """Let the method refuse its settings now, on one element, not in the middle of the work."""
        tried = (models, tuple(sorted(params.items())))
        if tried in self._tried or self.method.kind in ("cross", "group"):
            return
        self._tried.add(tried)
        import numpy as np

        given: dict[str, Any] = {"key": "", "rng": np.random.default_rng}
        given = {name: value for name, value in given.items() if name in self.method.given}
        try:
            with np.errstate(all="ignore"):
                ones = [np.ones(1, np.float32)] * len(models)
                self.method.function(*positional(self.method, ones, models), **params, **given)
        except Refusal as e:
            raise Refusal(f"{self.where} ({self.method.name}): {e}") from None

    def apply(self, key: str, place: Place, args: Sequence[Expr], models: tuple[int, ...]) -> Expr:
        params = self._params_at(place, key, models)
        if self.method.kind == "linear":
            if "key" in self.method.given:
                params = (*params, ("key", key))
            return folded(self.method, args, params, models)
        self._try(dict(params), models)
        return Call(
            step=self.name,
            method=self.method.name,
            args=tuple(args),
            params=params,
            key=key,
            seed=self.step.seed,
            models=models,
        )

    def _params_at(
        self, place: Place, key: str, models: tuple[int, ...]
    ) -> tuple[tuple[str, Any], ...]:
        """`params` in order of their names; the same for a whole block where there are no rules."""
        if self.rules:
            return tuple(sorted(self.params(place, key, models).items()))
        at = (place.block, place.part, models)
        if at not in self._known:
            self._known[at] = tuple(sorted(self.params(place, key, models).items()))
        return self._known[at]


class _AdapterSettings(_Settings):
    """Those of a step that adds LoRAs: a strength for each of them at every key."""

    def __init__(self, name: str, step: Step, view: View, arch: Architecture) -> None:
        from plymix.adapters import strengths

        super().__init__(name, step, view, arch.short, lambda param, step: 0.0)
        self.arch = arch
        loras = len(step.inputs) - len(self.method.inputs)
        self.strengths = strengths.read(step.params, loras, arch, self.where)

    def params(self, place: Place, key: str, models: tuple[int, ...]) -> dict[str, Any]:
        found = []
        own = self.arch.place(key) or place  # factors are for the architecture's own blocks
        for strength in self.strengths:
            factor = strength.factor(own)
            if self.rules:
                factor = weights.apply_rules(
                    self.rules, place.block, key, factor, self.rule_blocks, place.part
                )
            found.append(strength.of(place) * factor)
        return {**self.fixed, "strength": tuple(found)}


def counts(plan: Plan) -> dict[str, Counter[str]]:
    """Per block: how many tensors are merged and how many copied, from whom."""
    found: dict[str, Counter[str]] = {}
    for tensor in plan.tensors:
        fate = plan.fates[tensor.name]
        block = plan.places[tensor.name].block
        found.setdefault(block, Counter())[fate.how] += 1
    return found


def available_cpus() -> int:
    """Processors this process may use, at most 8: beyond that the disk is the limit."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)
