"""The first stage of a plan: open the inputs, and refuse what does not go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from plymix import archs, pairing
from plymix.archs import Architecture, Place
from plymix.archs.dialects import absent, checkpoint_name, meant
from plymix.archs.model import ANY_ENCODER, shared_facts
from plymix.archs.views import CLASSIC, View, view
from plymix.errors import Refusal, amount, listed, unknown
from plymix.formats.base import WHOLE, Source, TensorInfo
from plymix.pairing import DIFFUSERS, Paired
from plymix.plan.settings import AdapterSettings, Settings
from plymix.plan.values import ANY, Input
from plymix.recipe import BLEND, DROPS, PARTS, REST, Recipe, Step, dtypes
from plymix.registry import Param, get_method

if TYPE_CHECKING:
    from plymix.adapters.applying import Applied


class Opening:
    """The models, components and LoRAs of a recipe, and the settings of its steps."""

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
        self.absent: dict[int, Mapping[str, str]] = {}  # what `_absent` found, by input
        self.notes: list[str] = []

    def open(self) -> None:
        """Open what the recipe uses. Raises Refusal."""
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
        self.differences = recipe.differences()
        if recipe.final in self.differences:
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
            named=self.base.detection.named,
            given={c: i.label for c, i in self.swaps.items() if i is not self.base},
        )
        source = self.open_file(name)
        opened = self._opened(name, source, pairing.unpaired(source), {}, {}, ())
        found = apply_to(source, opened.index, model)
        self.notes += found.notes
        return found

    def _step_settings(self, name: str, step: Step) -> Settings:
        if get_method(step.method).adapters:
            return AdapterSettings(name, step, self.view, self._known_arch())
        return Settings(name, step, self.view, self.short, self._wide_base)

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
                    f"{self.base.label} is {base.named} and {i.label} is {i.detection.named}:"
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
            f"{i.label}: {amount(len(keys))} unknown to {self.short}, {fate}: {listed(keys)}"
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
            if component not in (REST, *known) and self.arch is None:
                raise Refusal(
                    f"output.dtype names {component!r}, and plymix does not know the components of"
                    f" {self.base.label} ({self.base.detection.title}); say one dtype for all"
                )
            if component not in (REST, *known):
                raise unknown(f"component of {self.short} in output.dtype", component, known)
        vae = self.dtypes.get("vae", self.dtypes[REST])
        if vae.startswith("fp8") and "vae" in self.base.components:
            self.notes.append(
                "the VAE becomes fp8 too, which costs pictures their detail: vae=keep in the dtype"
                " leaves it as it is"
            )

    def _wide_base(self, param: Param, field: str) -> float:
        """BASE's weight where a list of block weights says none: the base model's own."""
        if param.name in ("alpha", "beta") and param.range.holds(0.0):
            return 0.0
        if isinstance(param.default, (int, float)):
            return float(param.default)
        raise Refusal(
            f"{field} says nothing about BASE (text encoder): write {{ base = 0.5, blocks = ... }}"
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
        if self.arch is None or output.component or not self._others():
            return False
        if detection.kind != "denoiser" or detection.prefix or self.base.paired.dialect:
            return False
        self.notes.append(f"the result is a checkpoint and has the names of {self.short} ones")
        return True

    def _others(self) -> set[str]:
        """The components besides the denoiser that are another file's."""
        given = {c for c, part in self.swaps.items() if part is not self.base}
        return given - {self.arch.denoiser.name} if self.arch else given

    def _alone(self) -> str:
        """The one component the result is to hold; "" for all."""
        output = self.recipe.output
        names = [name for name in output.drop if name not in DROPS]
        if self.arch is None:
            if output.component or names:
                raise Refusal(
                    f"{self.base.label} is {self.base.detection.named}: plymix does not know its"
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
                f"{part.label} has no {what}: it is {part.detection.named};"
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
        lacking = [k for k in wanted if k not in part.tensors]
        missing = [k for k in lacking if not self._may_lack(part, k)]
        if missing and component in part.components:
            raise Refusal(
                f"{part.label} lacks {len(missing)} of the {len(wanted)} {component} tensors:"
                f" {listed(missing, 3)}; it is not complete or not for {self.short}"
            )
        for name, why in self._absent(part).items() if lacking else ():
            if any(meant(name, key) for key in lacking):
                self.notes.append(
                    f"{part.label} has no {name.rstrip('.')}: {why}; {self.base.label}'s is taken"
                )
        for key, info in wanted.items():
            theirs = part.tensors.get(key)
            if theirs is not None and fitted(theirs, info.shape) is None:
                raise Refusal(
                    f"{key} has the shape {list(theirs.shape)} in {part.label} and"
                    f" {list(info.shape)} in {self.base.label}; use a {component} made for"
                    f" {self.short}"
                )

    def _absent(self, part: Input) -> Mapping[str, str]:
        """What `part` has not because files in diffusers' names never have it, and why."""
        assert self.arch is not None
        if part.index not in self.absent:
            self.absent[part.index] = absent(self.arch, DIFFUSERS, part.tensors.keys())
        return self.absent[part.index]

    def _may_lack(self, part: Input, key: str) -> bool:
        """Whether `part` is complete without `key`, as one made of a folder is."""
        return any(meant(name, key) for name in self._absent(part))

    def _dialects(self) -> None:
        """Note what the inputs with another tool's names lack, and what they have too much."""
        for i in self.inputs:
            paired = i.paired
            if not paired.dialect:
                continue
            keeps = i is self.base and self.recipe.output.layout == "diffusers"
            for why, keys in () if self.alone else paired.left_out.items():
                fate = "copied" if keeps else "left out"
                self.notes.append(f"{i.label}: {amount(len(keys))} {fate}: {why}")
            if paired.unpaired and i is not self.base and not self.alone:
                self._strange(i, paired.unpaired, "left out")
            filled = i in self.swaps.values() and i is not self.base  # told already
            for name, why in () if keeps or filled else paired.absent.items():
                if self.alone and self.arch and self.arch.owner(name) != self.alone:
                    continue
                if i is self.base or any(
                    meant(name, key) and not self.base.places[key].buffer
                    for key in self.base.tensors
                ):
                    self.notes.append(f"{i.label} has no {name.rstrip('.')}: {why}")

    def merged_places(self) -> dict[str, Place]:
        """The keys of the base model, and their places, that the weights of steps are for."""
        others = {*self.swaps, "ema"}
        return {
            key: place
            for key, place in self.base.places.items()
            if not place.buffer and place.component not in others
        }

    def _idle_parts(self) -> None:
        """Note weights of parts, text encoders or the VAE of which nothing is merged."""
        places = self.merged_places().values()
        merged = {name for place in places for name in (place.part, place.block)}
        for step, settings in self.settings.items():
            for param, found in settings.resolved.items():
                for name in (n for n in found.parts if n not in merged):
                    why = f"{self.base.label} has no such tensor to merge"
                    if swap := self.swaps.get("vae") if name == "VAE" else None:
                        why = f'the VAE is {swap.label}\'s; vae = "blend" would merge it'
                    elif name in self.view.moves:
                        why = f"{self.view.title} has it in {self.view.moves[name]}"
                    self.notes.append(f"steps.{step}.{param}: {name} does nothing: {why}")


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


def _require_own(i: Input, own: Architecture) -> None:
    """Refuse a model that is not of the architecture the user describes."""
    if i.detection.arch == own:
        return
    from plymix.archs.own import missing

    lacking = missing(own, i.source.tensors)
    raise Refusal(
        f"{i.label} is not {own.short} as {own.name} describes it: it is {i.detection.named}"
        + (f"; {lacking} is not there" if lacking else "; a rule of [[detect]] does not hold")
    )


def _require_model(i: Input, base: Input) -> None:
    detection = i.detection
    if detection.arch is not None and detection.kind in ("checkpoint", "denoiser"):
        detection.require(i.label)
        return
    advice = {
        "vae": f"to put it into a model, say --vae {i.label}",
        "shard": "name that index, or the folder it is in",
        "lora": "to add it to a model: plymix lora bake MODEL LORA -o OUT",
        "text_encoder": 'to put it into a model, use text_encoder = "..." in a recipe\'s [output]',
    }.get(detection.kind, "plymix archs lists what can be merged; --arch any merges key by key")
    beside = "" if i is base else f" and {base.label} is {base.detection.named}"
    seen = f" (it has {detection.seen})" if detection.seen else ""
    raise Refusal(f"{i.label} is {detection.named}{seen}{beside}; {advice}")


def fitted(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo | None:
    """`info` in another shape that differs by trailing ones (linear and 1x1 convolution)."""
    if info.shape == shape:
        return info
    if info.strides is None and trimmed(info.shape) == trimmed(shape):
        return replace(info, shape=shape)
    return None


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
