"""What a LoRA file in one dialect calls a model's tensors: names to be written.

`names` finds the tensor that any spelling means; here one spelling is written for each tensor.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

from plymix.adapters.files import Module
from plymix.adapters.names import Names, Target, dialect, plain, spellings, text_encoders
from plymix.archs import Architecture, load, names
from plymix.archs.dialects import View
from plymix.archs.model import shared_facts
from plymix.errors import Refusal, unknown

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

KOHYA = {"up": ".lora_up.weight", "down": ".lora_down.weight", "magnitude": ".dora_scale"}
PEFT = {"up": ".lora_B.weight", "down": ".lora_A.weight", "magnitude": ".lora_magnitude_vector"}


@dataclass(frozen=True)
class Dialect:
    """A way to spell a LoRA file.

    Names of the denoiser's modules begin with `denoiser`, those of a text encoder with `encoder`
    ("" if it cannot say them); in both {component}, {i} (the encoder's number), {n} (the same, none
    where there is but one) and {kind} (clip_l, t5xxl) are filled in. The rest is the architecture's
    `own` name or diffusers', with "_" for "." if `plain`. `ends` are a LoRA's. `only_lora` says no
    other family, and no alpha: the scale is in the numbers.
    """

    name: str
    title: str
    denoiser: str
    encoder: str
    own: bool = False
    plain: bool = False
    ends: Mapping[str, str] = field(default_factory=lambda: KOHYA)
    only_lora: bool = False


DIALECTS = {
    d.name: d
    for d in (
        Dialect("kohya", "kohya, A1111", "lora_unet_", "lora_te{n}_", own=True, plain=True),
        Dialect("kohya-diffusers", "kohya, diffusers' names", "lora_unet_", "lora_te{n}_",
                plain=True),
        Dialect("lycoris", "LyCORIS", "lycoris_", "lycoris_te{i}_", plain=True),
        Dialect("diffusers", "diffusers", "{component}.", "{component}.", ends=PEFT,
                only_lora=True),
        Dialect("peft", "PEFT", "base_model.model.", "", ends=PEFT, only_lora=True),
        Dialect("comfyui", "ComfyUI", "diffusion_model.", "text_encoders.{kind}.transformer.",
                own=True),
    )
}  # fmt: skip
"""Sources: those of `names.toml`, by what they write."""


def dialect_called(name: str) -> Dialect:
    """Raises Refusal with the nearest names."""
    if name not in DIALECTS:
        raise unknown("dialect", name, DIALECTS)
    return DIALECTS[name]


@cache
def layout(arch: str) -> Shapes:
    """The tensors of an architecture's usual model by canonical key; none for one not known."""
    file = Path(__file__).parent / "layouts" / f"{arch}.json.gz"
    if not file.exists():
        return {}
    return {k: tuple(shape) for k, shape in json.loads(gzip.decompress(file.read_bytes())).items()}


@dataclass(frozen=True, slots=True)
class Spelt:
    """A module's name, which parameter of it ("weight", "bias"; "" if the name is a parameter's),
    and which views of the canonical tensor that is; none stand for the whole."""

    name: str
    param: str
    views: tuple[View, ...]


def spelt(arch: Architecture, shapes: Shapes, how: Dialect) -> dict[str, list[Spelt]]:
    """What `how` calls each tensor: several names for one that it has in parts.

    `shapes` are a model's tensors by canonical key.
    """
    found: dict[str, list[Spelt]] = {}
    for kind, start in _components(arch, how):
        denoiser = kind == arch.denoiser.name
        for name, target in _names(arch, kind, shapes, own=how.own and denoiser):
            stem, _, param = name.rpartition(".")
            if param not in ("weight", "bias"):
                stem, param = name, ""
            one = Spelt(start + (plain(stem) if how.plain else stem), param, target.views)
            found.setdefault(target.key, []).append(one)
    return found


def _components(arch: Architecture, how: Dialect) -> Iterator[tuple[str, str]]:
    """Each component that `how` can say, and the start of its modules' names."""
    yield arch.denoiser.name, how.denoiser.format(component=arch.denoiser.name)
    kinds = text_encoders(arch)
    for n, kind in enumerate(kinds, 1):
        block = next(c.block for c in arch.components if c.name == kind).split()[-1]
        comfy = spellings().encoders.get(block, ("",))[0].split(".")
        special = spellings().encoders.get(f"{arch.name} {kind}", ())
        number = "" if len(kinds) == 1 else str(n)
        start = how.encoder.format(
            component=kind, i=n, n=number, kind=comfy[1] if len(comfy) > 1 else kind
        )
        if how.encoder == DIALECTS["kohya"].encoder and special:
            start = special[0]
        if start:
            yield kind, start


def _names(
    arch: Architecture, kind: str, shapes: Shapes, *, own: bool
) -> Iterator[tuple[str, Target]]:
    component = next(c for c in arch.components if c.name == kind)
    prefix = component.prefixes[0] if component.prefixes else shared_facts().prefixes[0]
    theirs = [] if own else list(dialect(arch, kind, shapes))
    if theirs:
        yield from theirs
        return
    for key, shape in shapes.items():
        if key.startswith(prefix):
            rest = key[len(prefix) :]
            yield (rest if own else rest.partition("transformer.")[2] or rest), Target(key, shape)


# --- which tensor each module means --------------------------------------------------------------


def guessed(modules: Sequence[Module]) -> Architecture | None:
    """The one architecture whose usual model has all of `modules`, in just their sizes.

    For files with too few modules to be known by them; None where none or several fit.
    """
    fitting = [name for name in names() if layout(name) and _fit(load(name), modules)]
    return load(fitting[0]) if len(fitting) == 1 else None


def _fit(arch: Architecture, modules: Sequence[Module]) -> bool:
    shapes = layout(arch.name)
    known = Names(arch, shapes)
    for module in modules:
        target = known.find(module)
        if target is None or _sized(module, target, shapes[target.key]) != shapes[target.key]:
            return False
    return True


def located(
    arch: Architecture | None, modules: Sequence[Module], model: Shapes | None = None
) -> tuple[Shapes, list[Target | None]]:
    """The tensor that each module changes, and all tensors' shapes.

    `model` are the tensors of a model. Without one the names are those of the architecture's usual
    model, and how large tensors are is told by the modules. What nothing is known of is None.
    Raises Refusal where modules do not fit one another, or the model.
    """
    shapes = (layout(arch.name) if arch else {}) if model is None else model
    if arch is None or not shapes:
        return {}, [None] * len(modules)
    known = Names(arch, shapes)
    targets = [known.find(module) for module in modules]
    sized: dict[str, tuple[Shape, Module]] = {}
    for i, (module, target) in enumerate(zip(modules, targets, strict=True)):
        if target is None:
            continue
        shape = _sized(module, target, shapes[target.key])
        if shape is None or (
            model is not None and math.prod(shape) != math.prod(shapes[target.key])
        ):
            if model is not None:
                raise _unfit(module, target, shapes[target.key])
            targets[i] = None
            continue
        other = sized.setdefault(target.key, (shape, module))
        if other[0] != shape and math.prod(other[0]) != math.prod(shape):
            raise Refusal(
                f"{module.name} and {other[1].name} change one tensor, {target.key}, as"
                f" {_text(shape)} and as {_text(other[0])}: they are for different models"
            )
    if model is not None:
        return shapes, targets
    shapes = {**shapes, **{key: shape for key, (shape, _) in sized.items()}}
    known = Names(arch, shapes)
    return shapes, [target and known.find(m) for m, target in zip(modules, targets, strict=True)]


def _sized(module: Module, target: Target, shape: Shape) -> Shape | None:
    """The shape of the tensor, whose kind has `shape`, by what the module says; None: cannot be."""
    rows, columns = module.size
    if any(view.transpose for view in target.views):
        return (columns or shape[0], rows or shape[1])
    kernel = math.prod(shape[2:])
    if rows is not None:
        known = Fraction(shape[0] if shape else 1, target.shape[0] if target.shape else 1) * rows
        if known.denominator != 1:
            return None
        shape = (int(known), *shape[1:]) if shape else shape
    if columns is not None and len(shape) > 1:
        if columns % kernel:
            return None
        shape = (shape[0], columns // kernel, *shape[2:])
    return shape if columns is None or len(shape) > 1 or columns == 1 else None


def _unfit(module: Module, target: Target, shape: Shape) -> Refusal:
    made = " x ".join("any" if n is None else str(n) for n in module.size)
    return Refusal(
        f"{module.name} changes a weight of {made}; {target.key} of the model has {_text(shape)}:"
        " they do not fit"
    )


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def spoken(
    modules: Sequence[Module], targets: Sequence[Target | None], arch: Architecture, shapes: Shapes
) -> Dialect | None:
    """The dialect that all of the modules that are known have their names in; None for no one."""
    pairs = [(m.name, t) for m, t in zip(modules, targets, strict=True) if t is not None]
    for how in DIALECTS.values() if pairs else ():
        spellings_of = spelt(arch, shapes, how)
        if all(any(name == s.name for s in spellings_of.get(t.key, ())) for name, t in pairs):
            return how
    return None
