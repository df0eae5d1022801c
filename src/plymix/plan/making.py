"""The second stage of a plan: what each tensor of the result is made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from plymix import archs, pairing, respelling
from plymix.archs import Place
from plymix.archs.dialects import shape_of
from plymix.errors import Refusal, amount, listed, unknown
from plymix.expr import (
    Const,
    Delta,
    Expr,
    Leaf,
    Linear,
    Sum,
    Tensor,
    calls,
    leaf_terms,
    leaves,
    narrow,
    nodes,
    patched,
)
from plymix.formats.base import TensorInfo
from plymix.formats.diffusers import MODEL_INDEX
from plymix.pairing import DIFFUSERS
from plymix.plan.adjusting import Adjustment
from plymix.plan.opening import Opening, fitted, trimmed
from plymix.plan.settings import AdapterSettings, Settings
from plymix.plan.values import MAX_IDS, Fate, Input
from plymix.recipe import DROPS, DTYPES, REST

PACKED = {"Q8_0": "q8_0, in a .gguf,", "F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2"}
"""Kinds of packed weights, and the dtype of a result that has them as small, or nearly."""

Value = tuple[Expr, tuple[int, ...]]
"""What a model or step has at a key, and its shape."""

Present = tuple[int, Value]
"""An input of a step that has the key, after its number."""


class Making(Opening):
    """Expressions, names and dtypes of the result's tensors."""

    def make(self) -> tuple[tuple[Tensor, ...], dict[str, Place], dict[str, Fate]]:
        """The result's tensors; by their names, where they belong and what became of them."""
        self.known: dict[str, Value | None] = {}  # of one key
        self.known_at = ""
        self.narrowed: set[str] = set()  # differences of the input channels that all models have
        self.keepers: dict[str, str] = {}  # differences -> the model that keeps its other channels
        self.channels: list[tuple[str, Expr, str]] = []  # what steps made of the two kinds, a note
        self.lacking: dict[str, list[str]] = {}  # what a missing tensor led to -> keys
        self.unwritten: Mapping[str, str] = {}  # what the result's layout cannot hold -> why
        self.components: tuple[str, ...] = ()
        self.folder = False
        self.followed = {archs.ema_key(key): key for key in self.base.tensors}
        self.adjusted = Adjustment(self.recipe.output.adjust, self.arch)
        tensors, places, fates = self._tensors()
        self._unpacked(tensors, places)
        self._strength(tensors, fates)
        tensors, places, fates = self._respelt(tensors, places, fates)
        tensors = tuple(self._coded(t, places[t.name]) for t in tensors)
        return tensors, places, fates

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
        if self.habits and self.arch:
            once = respelling.habitual(self.habits, key)
            known = self.arch.place(once)
            if known and known.key == key:
                return once
        if key in self.base.tensors:
            name = self.base.tensors[key].name
            old = "names" in self.recipe.output.repair and self.arch and self.arch.old_name(name)
            return key if old else name
        return next(i.tensors[key].name for i in self.inputs if key in i.tensors)

    @cached_property
    def habits(self) -> Mapping[str, str]:
        """By what habits the base model had its own names, before it got diffusers' ones."""
        base = self.base
        completed = base.detection.kind == "denoiser" and self._others()
        if completed or not (base.paired.dialect or self.recipe.output.layout):
            return {}  # with a layout named: of some transformers both names are the same
        return respelling.remembered(base.source.metadata)

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
        alone = self.recipe.output.component
        keeps_unknown = "unknown" not in self.recipe.output.drop and not alone
        homes = {places[tensor.name].key: tensor for tensor in tensors}
        if layout not in ("", "ldm", self.arch.layout, "diffusers"):
            raise unknown(f"layout of {self.short}", layout, ["diffusers", self.arch.layout])
        if alone and layout != "diffusers":
            return tensors, places, fates
        if alone and self.recipe.output.prefix:
            raise Refusal(
                "--keep-prefix keeps the names of the model, and a diffusers layout has others;"
                " leave out one of them"
            )
        own = not layout and bool(paired.spelling) and not paired.folder
        own = own and homes.keys() <= set(paired.names.values())
        if layout == "diffusers" and not respelling.components(self.arch):
            raise Refusal(
                f"plymix knows no {DIFFUSERS}' names of {self.short}: it writes such models as"
                " .safetensors, .ckpt or .gguf with their own names; name such a file, without"
                " --layout"
            )
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
        if not spelling.views:
            what = f"{alone} of {self.short}" if alone else self.short
            raise Refusal(f"plymix knows no {DIFFUSERS}' names of what is in {what}")
        carried = list(paired.unpaired) if keeps_unknown else []
        if not alone:
            carried += (key for keys in paired.left_out.values() for key in keys)
        self.components = tuple(
            dict.fromkeys(
                (*spelling.views, *(k.partition("/")[0] for k in carried if paired.folder))
            )
        )
        self.folder = (paired.folder or len(self.components) > 1) and not alone
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
        if paired.unpaired and not alone:
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
                f"{base.label} is {base.detection.named}: plymix knows no other layout of it"
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
            if leaf is None and self._may_lack(swap, key):
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
            value = kept
            # Each step after those it uses: a chain of any length nests no calls.
            for name in () if kept else (*self.settings, self.recipe.final):
                value = self._value(name, key, place)
            if value is None:
                return None
            expr, shape = value
            self._tell_channels(key, expr)
            first = next(i for i in (self.base, *self.inputs) if key in i.tensors)
            dtype = self._dtype(first.tensors[key], place.component)
            why = f"{self.view.title} leaves it" if kept else ""
        return self.adjusted(key, expr, shape), shape, dtype, why

    def _kept(self, key: str) -> Value | None:
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

    def _value(self, name: str, key: str, place: Place) -> Value | None:
        """What model or step `name` has at `key`, and its shape; None: it has no such tensor."""
        if key != self.known_at:
            self.known, self.known_at = {}, key
        if name not in self.known:
            self.known[name] = self._made(name, key, place)
            if name in self.differences and self._at_input(key):
                self._remember(name)
        return self.known[name]

    def _made(self, name: str, key: str, place: Place) -> Value | None:
        if name in self.by_name:
            leaf = self._leaf(self.by_name[name], key)
            return None if leaf is None else (leaf, leaf.info.shape)
        settings = self.settings[name]
        if isinstance(settings, AdapterSettings):
            return self._adapted(settings, key, place)
        names = settings.step.inputs
        values = [self._value(used, key, place) if used else None for used in names]
        present = [(i, v) for i, v in enumerate(values) if v is not None]
        if not present:
            return None
        lost = [i for i, v in enumerate(values) if v is None and names[i]]
        if lost and name in self.differences:
            present, lost = self._zeros(names, key, present, lost)
        method = settings.method
        fixed = len(values) if not method.variadic else len(method.inputs)
        several = sum(i >= fixed for i, _ in present)
        alone = lost and all(names[i] in self.differences for i, _ in present)
        if alone and name not in self.differences:
            self._lack(f"left out: only a difference ({names[present[0][0]]}) has them", key)
            return None
        if any(i < fixed for i in lost) or (method.variadic and several < method.min_variadic):
            return self._without(settings, key, present, lost)
        if lost:
            self._lack(
                f"merged without {listed(self._called(names[i]) for i in lost)}, which lacks it",
                key,
            )
        return self._applied(settings, key, place, present)

    def _zeros(
        self, names: Sequence[str], key: str, present: list[Present], lost: list[int]
    ) -> tuple[list[Present], list[int]]:
        """`present` with a 0 for each difference that lacks the tensor, and what else is lost."""
        zeros = [i for i in lost if names[i] in self.differences]
        if zeros:
            lacking = listed(self._called(names[i]) for i in zeros)
            self._lack(f"counted as 0 in a difference: not in {lacking}", key)
        zero = _zero(present[0][1])
        present = sorted([*present, *((i, zero) for i in zeros)], key=lambda one: one[0])
        return present, [i for i in lost if i not in zeros]

    def _adapted(self, settings: AdapterSettings, key: str, place: Place) -> Value | None:
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
        settings: Settings,
        key: str,
        present: list[Present],
        lost: list[int],
    ) -> Value | None:
        """A step that lacks an input at `key` gives its first one unchanged, or difference 0."""
        names = settings.step.inputs
        first = names[present[0][0]]
        if settings.name in self.differences:
            self._lack(f"left out of a difference: not in {self._called(names[lost[0]])}", key)
            return present[0][1] if first in self.differences else _zero(present[0][1])
        if first in self.differences:
            self._lack(f"left out: only a difference ({first}) has them", key)
            return None
        self._lack(f"taken from {self._called(first)}: not in {self._called(names[lost[0]])}", key)
        return present[0][1]

    def _called(self, name: str) -> str:
        """A model or step as people know it: by its file's name, or as the recipe has it."""
        return self.by_name[name].label if name in self.by_name else f"steps.{name}"

    def _lack(self, what: str, key: str) -> None:
        self.lacking.setdefault(what, []).append(key)

    def _applied(
        self,
        settings: Settings,
        key: str,
        place: Place,
        present: list[Present],
    ) -> Value:
        names = settings.step.inputs
        shapes = [shape for _, (_, shape) in present]
        args = [expr for _, (expr, _) in present]
        models = tuple(i for i, _ in present)
        at_input = self._at_input(key)
        if len(set(shapes)) == 1 and not (at_input and self.narrowed.intersection(names)):
            return settings.apply(key, place, args, models), shapes[0]
        if at_input:
            return self._channels(settings, key, place, args, shapes, models)
        fitted = [_fitted_expr(arg, shape, shapes[0]) for arg, shape in zip(args, shapes)]  # noqa: B905
        if any(f is None for f in fitted):
            at = next(i for i, f in enumerate(fitted) if f is None)
            raise Refusal(
                f"{key} has the shape {list(shapes[0])} in {self._called(names[models[0]])} and"
                f" {list(shapes[at])} in {self._called(names[models[at]])}; these models are not"
                " of one kind"
            )
        good = [f for f in fitted if f is not None]
        return settings.apply(key, place, good, models), shapes[0]

    def _channels(
        self,
        settings: Settings,
        key: str,
        place: Place,
        args: list[Expr],
        shapes: list[tuple[int, ...]],
        models: tuple[int, ...],
    ) -> Value:
        """Inpainting, pix2pix: shared channels by the formula, the others from their owner."""
        rest = {(shape[0], *shape[2:]) for shape in shapes}
        names = settings.step.inputs
        assert self.arch is not None
        plain = self.arch.input_channels
        widths = sorted({plain, *(shape[1] for shape in shapes)})
        if len(widths) != 2 or widths[0] != plain or len(rest) != 1:
            text = ", ".join(
                f"{self._called(names[m])} {s[1]}" for m, s in zip(models, shapes, strict=True)
            )
            raise Refusal(
                f"{key} has different numbers of input channels ({text}): only plain models"
                f" ({plain}) and one kind of inpainting or similar model mix"
            )
        inner = [
            narrow(a, plain) if s[1] != plain else a for a, s in zip(args, shapes, strict=True)
        ]
        expr = settings.apply(key, place, inner, models)
        keeper = self._keeper(names)
        value = self.known[keeper]
        assert value is not None
        wide, shape = value
        made = patched(wide, expr, plain)
        if isinstance(made.wide, Leaf):
            others = f"kept from {self.inputs[made.wide.source].label}"
        else:
            others = f"as {self._called(keeper)} makes them"
        said = f"channels 0-{plain - 1} merged, {plain}-{widths[1] - 1} {others}"
        whole = wide if expr == narrow(wide, plain) else made
        if settings.name not in self.differences:
            self.channels.append((settings.name, whole, said))
        return whole, shape

    def _at_input(self, key: str) -> bool:
        return self.arch is not None and key == self.arch.input_conv

    def _keeper(self, names: Iterable[str]) -> str:
        """Which model keeps its further input channels: the first of `names` that has some.

        Differences come after models, and stand for the first model they are made of that has some.
        """
        assert self.arch is not None
        plain, wide = self.arch.input_channels, []
        for name in names:
            value = self.known.get(name)
            if value is not None and value[1][1:2] > (plain,):
                wide.append(name)
        first = next(iter(sorted(wide, key=lambda name: name in self.differences)), "")
        return self.keepers.get(first, first)

    def _remember(self, name: str) -> None:
        """What is to be known of a difference at the input convolution, besides its value."""
        used = self.settings[name].step.inputs
        widths = {value[1][1:2] for value in map(self.known.get, used) if value is not None}
        if len(widths) > 1 or self.narrowed.intersection(used):
            self.narrowed.add(name)
        self.keepers[name] = self._keeper(used)

    def _tell_channels(self, key: str, expr: Expr) -> None:
        """Note of what is in the result which of its channels are merged."""
        there = {id(node) for node in nodes(expr)} if self.channels else ()
        for name, made, said in self.channels:
            if id(made) in there:
                where = "" if name == self.recipe.final else f"in steps.{name} "
                self.notes.append(f"{key}: {where}{said}")
        self.channels.clear()

    def _unpacked(self, tensors: Sequence[Tensor], places: Mapping[str, Place]) -> None:
        """Note what is kept as it is but for its packing, which makes the result larger."""
        if not any(info.encoding for i in self.by_name.values() for info in i.tensors.values()):
            return
        kinds: Counter[str] = Counter()
        for tensor in tensors:
            packed = {leaf.info.encoding for leaf in leaves(tensor.expr)} - {""}
            if packed and self._asked(places[tensor.name].component) == "keep":
                kinds.update(packed)
        for kind, n in kinds.items():
            dtype = next((d for code, d in PACKED.items() if code in kind), "")
            advice = f"--dtype {dtype} keeps their size" if dtype else "plymix does not write it"
            self.notes.append(
                f"{amount(n)} packed as {kind} will be fp16, which takes more room; {advice}"
            )

    def _strength(self, tensors: Sequence[Tensor], fates: Mapping[str, Fate]) -> None:
        """Note sums whose coefficients do not add up to one model, but for `output.adjust`.

        What a method is given may be a difference, whose sum is 0.
        """
        totals: dict[str, float] = {}
        for tensor in tensors:
            if self.adjusted.scale(tensor.name) != 1.0:
                continue
            if fates[tensor.name].how != "merged":
                continue
            whole = leaf_terms(tensor.expr)
            given = () if whole else (arg for call in calls(tensor.expr) for arg in call.args)
            for terms, fine in (*((leaf_terms(arg), (0, 1)) for arg in given), (whole, (1,))):
                total = math.fsum([c for c, _ in terms])
                if terms and all(abs(total - n) > 1e-6 for n in fine):
                    totals[tensor.name] = total
        if totals:
            low, high = min(totals.values()), max(totals.values())
            found = f"{low:.4g}" if high - low < 1e-6 else f"{low:.4g} to {high:.4g}"
            self.notes.append(
                f"the weights of the models sum to {found}, not to 1, in {amount(len(totals))}:"
                f" {listed(totals, 3)}; is a division or a difference missing?"
            )


def _zero(value: Value) -> Value:
    """The difference 0 in the shape of `value`."""
    return Sum(((0.0, value[0]),)), value[1]


def _fitted_expr(expr: Expr, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Expr | None:
    if shape == wanted:
        return expr
    if isinstance(expr, Leaf):
        info = fitted(expr.info, wanted)
        return None if info is None else Leaf(expr.source, info)
    if isinstance(expr, Delta) and expr.of is None and trimmed(shape) == trimmed(wanted):
        return replace(expr, shape=wanted, seen=wanted if not expr.pieces else expr.seen)
    if isinstance(expr, Sum):
        terms = [(c, _fitted_expr(term, shape, wanted)) for c, term in expr.terms]
        if all(term is not None for _, term in terms):
            return Sum(tuple((c, term) for c, term in terms if term is not None))
    return None
