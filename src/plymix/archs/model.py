"""One architecture: its file's schema, and the way from a key to its place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from plymix.errors import unknown

_HERE = Path(__file__).parent
T = TypeVar("T")

ANY_ENCODER = "text_encoders."
"""The prefix of text encoders that have no fixed name: their own name follows it."""

KNOWN_PLACES = 20_000
"""How many places an architecture remembers."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a key means.

    `key` is the canonical spelling, equal for all spellings of one tensor. `component` is a name
    of the architecture's components, "ema" or "extra". `block` is one of the architecture's blocks,
    or BASE (CLIP, T5, ... where the community's lists split it), VAE, EMA or BUFFER. `part` is a
    finer name where there is one (TIME, LABEL, OUT, CLIP_L, ...), else the block. A `buffer` is
    never blended but copied from the base model.
    """

    key: str
    component: str
    block: str
    part: str
    buffer: bool = False


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a checkpoint that is a model of its own.

    `prefixes` begin its keys, the first one in the canonical spelling. `blocks` maps key templates
    (after the prefix; "{i}" is a number; a trailing dot means any key that begins so) to "BLOCK" or
    "BLOCK PART"; the longest that fits wins. `block` is for all other keys, and without it they are
    no keys of this component.
    """

    name: str
    title: str
    prefixes: tuple[str, ...] = ()
    block: str = ""
    blocks: dict[str, str] = {}


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must hold of a file's keys: see `plymix.archs.detection`."""

    keys: dict[str, bool | list[int | str]]
    dialect: str = ""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of model within an architecture, told by `keys`."""

    name: str
    keys: dict[str, bool | list[int | str]]
    title: str = ""
    modelspec: str = ""


class OwnView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a tool divides an architecture, where not as its `blocks`: see `plymix.archs.views`.

    `blocks` are names of blocks and parts, in the tool's order; `moves` says in which of them, or
    BASE, it has a part.
    """

    blocks: tuple[str, ...] = ()
    moves: dict[str, str] = {}


class Family(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is needed to recognise a model by name."""

    short: str
    detect: tuple[Rule, ...]
    variants: tuple[Variant, ...] = ()
    lora: tuple[Rule, ...] = ()


class Architecture(Family, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """An architecture, as its file in `data/` tells it.

    `blocks` are the denoiser's, in order; where models of one architecture differ in depth it holds
    the deepest one's. `lists` says what each accepted length of a list of block weights means,
    `lora_lists` the same for LoRA block weights. `views` are other tools' divisions. `input_conv`
    is the key whose dimension 1 grows in inpainting and similar variants; `input_channels` of it
    are in all of them, and come first. `layout` says whose names its own are.
    `gguf` is its `general.architecture` as ComfyUI-GGUF has it, where that is not `name`.
    """

    name: str = ""
    title: str
    modelspec: str = ""
    gguf: str = ""
    blocks: tuple[str, ...]
    lists: dict[int, tuple[str, ...]] = {}
    lora_lists: dict[int, tuple[str, ...]] = {}
    views: dict[str, OwnView] = {}
    components: tuple[Component, ...]
    aliases: dict[str, str] = {}
    buffers: tuple[str, ...] = ()
    input_conv: str | None = None
    input_channels: int = 4
    layout: str = "ldm"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def denoiser(self) -> Component:
        """The U-Net or transformer."""
        return self.components[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The finer names within the denoiser's blocks: TIME, LABEL, OUT ..."""
        parts = (target.partition(" ")[2] for target in self.denoiser.blocks.values())
        return tuple(dict.fromkeys(part for part in parts if part and part not in self.blocks))

    @property
    def outside(self) -> tuple[str, ...]:
        """Blocks and finer names of the other components: BASE, CLIP_L, ..., VAE."""
        targets = [t for c in self.components[1:] for t in (c.block, *c.blocks.values())]
        return tuple(dict.fromkeys(name for target in targets for name in target.split()))

    def sizes(self) -> dict[str, dict[str, int]]:
        """Parameters of each block, text encoders and VAE too, in published models; deepest first.

        Nothing for an architecture that a user describes.
        """
        return _sizes().get(self.name, {})

    def modelspec_id(self, variant: str = "base") -> str:
        """The SAI ModelSpec architecture id of a variant."""
        own = (v.modelspec for v in self.variants if v.name == variant and v.modelspec)
        return next(own, self.modelspec)

    def component(self, name: str) -> Component:
        """The component called `name`; "unet", "transformer" and "denoiser" are the denoiser.

        Raises Refusal with the nearest names.
        """
        if name in ("unet", "transformer", "denoiser"):
            return self.denoiser
        known = {component.name: component for component in self.components}
        if name not in known:
            raise unknown(f"component of {self.short}", name, known)
        return known[name]

    def owner(self, key: str) -> str:
        """The component that `key` goes with, known or not; "" for none.

        Markers of how a model was trained go with the denoiser.
        """
        key = self._table.respelled(key)
        return self.denoiser.name if key in shared_facts().markers else self._table.owner(key) or ""

    def old_name(self, key: str) -> str:
        """The canonical name of a text encoder's key that is spelt as in old files; "" for others.

        '...transformer.encoder.layers.0.x' -> '...transformer.text_model.encoder.layers.0.x'
        """
        place = self.place(key)
        if place is None or place.key == key or not place.component.startswith("text_encoder"):
            return ""
        home = self.component(place.component).prefixes[0]
        return place.key if key.startswith(home) else ""

    def homes(self, name: str) -> tuple[str, ...]:
        """What may stand before the keys of a file of the component `name`, in a checkpoint."""
        prefixes = self.component(name).prefixes[:1]
        return tuple(p + w for p in prefixes for w in (*shared_facts().wrappers, ""))

    def alone(self, key: str, component: Component) -> str:
        """The canonical `key` as a file that holds nothing but `component` has it.

        'cond_stage_model.transformer.text_model.x' -> 'text_model.x'
        """
        prefix = component.prefixes[0] if component.prefixes else shared_facts().prefixes[0]
        name = key.removeprefix(prefix)
        if component.name.startswith("text_encoder"):
            stem = "" if prefix != ANY_ENCODER else name.partition(".")[0] + "."
            starts = (stem + w for w in shared_facts().wrappers)
            name = name.removeprefix(next(filter(name.startswith, starts), ""))
        return name

    def place(self, key: str) -> Place | None:
        """Where `key` belongs, in any spelling of its own layout; None: no key of this model."""
        known = self._places
        if key not in known:
            if len(known) > KNOWN_PLACES:  # a hostile file's keys are not worth keeping
                known.clear()
            known[key] = self._placed(key)
        return known[key]

    def _placed(self, key: str) -> Place | None:
        table = self._table
        key = table.respelled(key)
        if table.is_buffer(key):
            return Place(key, table.owner(key) or "extra", "BUFFER", "BUFFER", True)
        for prefix, component, blocks in table.components:
            if key.startswith(prefix):
                at = blocks(key[len(prefix) :])
                return Place(key, component, *at) if at else None
        return None

    @cached_property
    def _places(self) -> dict[str, Place | None]:
        """What `place` found: models of one recipe share their places."""
        return {}

    @cached_property
    def _table(self) -> _Table:
        return _Table(self)


class Names:
    """A set of names written as exact names, starts ("vae.*") and ends ("*.position_ids")."""

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = list(patterns)
        self._exact = frozenset(p for p in patterns if "*" not in p)
        self._starts = tuple(p[:-1] for p in patterns if p.endswith("*"))
        self._ends = tuple(p[1:] for p in patterns if p.startswith("*"))

    def __contains__(self, name: str) -> bool:
        return name in self._exact or name.endswith(self._ends) or name.startswith(self._starts)


class _Blocks:
    """Block templates of one component, compiled to one regular expression."""

    def __init__(self, component: Component, known: frozenset[str] | None = None) -> None:
        self._default = _block_part(component.block) if component.block else None
        self._known = known  # blocks that exist; None: any
        rules: list[str] = []
        self._targets: dict[int, str] = {}  # group number of a rule -> its "BLOCK PART" template
        group = 1
        for template, target in _longest_first(component.blocks):
            pattern = re.escape(template).replace(r"\{i\}", "(0|[1-9][0-9]{0,3})")
            rules.append(f"({pattern})" if template.endswith(".") else rf"({pattern})\Z")
            self._targets[group] = target
            group += 1 + template.count("{i}")
        self._regex = re.compile("|".join(rules) or "(?!)")
        self._seen: dict[str, tuple[str, str] | None] = {}

    def __call__(self, rest: str) -> tuple[str, str] | None:
        """(block, part) of a key without its prefix; None if it has none."""
        match = self._regex.match(rest)
        if match is None:
            return self._default
        start = match.group()
        if start not in self._seen:
            rule = match.lastindex or 0
            number = match.group(rule + 1) if "{i" in self._targets[rule] else "0"
            at = _block_part(self._targets[rule].format(i=int(number)))
            fits = self._known is None or at[0] in self._known
            self._seen[start] = at if fits else None
        return self._seen[start]


class _Table:
    """An architecture compiled for looking up keys."""

    def __init__(self, arch: Architecture) -> None:
        shared = shared_facts()
        denoiser, *others = arch.components
        self._home = shared.prefixes[0]
        self._denoiser = _Blocks(denoiser, frozenset(arch.blocks))
        self.is_buffer = Names((*shared.unblended, *arch.buffers)).__contains__
        # (canonical prefix, name, blocks) of every component
        self.components = [(self._home, denoiser.name, self._denoiser)]
        self.components += [(c.prefixes[0], c.name, _Blocks(c)) for c in others]
        ema = Component("ema", "EMA weights", (shared.ema,), "EMA")
        self.components.append((shared.ema, ema.name, _Blocks(ema)))
        self._homes = tuple(prefix for prefix, _, _ in self.components)
        # other spellings of a key's end or start -> the canonical one
        aliases = list(_longest_first(arch.aliases))
        self._ends = {old[1:]: new[1:] for old, new in aliases if old.startswith("*")}
        self._starts = {old: new for old, new in aliases if not old.startswith("*")}
        self._prefixes = dict.fromkeys(shared.prefixes[1:], self._home)
        for component in others:
            home, *also = component.prefixes
            self._prefixes.update(dict.fromkeys(also, home))
            self._prefixes.update({s: home + s for s in shared.bare.get(component.name, ())})

    def owner(self, key: str) -> str | None:
        """The component whose prefix a canonical key has."""
        return next((name for prefix, name, _ in self.components if key.startswith(prefix)), None)

    def respelled(self, key: str) -> str:
        """The canonical spelling of a key."""
        key = _replaced_start(key, self._starts)
        for old, new in self._ends.items():
            if key.endswith(old):
                key = key[: -len(old)] + new
        if key.startswith(self._homes) or self.is_buffer(key):
            return key
        if self._denoiser(key):
            return self._home + key
        return _replaced_start(key, self._prefixes)


def _replaced_start(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def _longest_first(table: dict[str, str]) -> Iterable[tuple[str, str]]:
    """The rows of a table in an order that does not depend on how it was written."""
    return sorted(table.items(), key=lambda row: (-len(row[0]), row[0]))


def _block_part(target: str) -> tuple[str, str]:
    """'IN00 TIME' -> ('IN00', 'TIME'); 'IN00' -> ('IN00', 'IN00')."""
    block, _, part = target.partition(" ")
    return block, part or block


class LoraFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Globs that tell a LoRA-like file's algorithm and the spelling of its names."""

    algorithms: dict[str, list[str]]
    dialects: dict[str, list[str]]


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that is no whole model, told by one of `keys` (globs)."""

    kind: str
    title: str
    keys: tuple[str, ...]
    dialect: str = ""
    channels: str = ""


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that has a view of the blocks, and what of it holds for every architecture."""

    title: str
    words: tuple[str, ...] = ()
    moves: dict[str, str] = {}


class Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`shared.toml`."""

    prefixes: tuple[str, ...]
    parts: tuple[str, ...]
    ema: str
    buffers: tuple[str, ...]
    schedules: tuple[str, ...]
    leftovers: tuple[str, ...]
    wrappers: tuple[str, ...]
    quantised: dict[str, tuple[str, ...]]
    markers: dict[str, str]
    views: dict[str, Tool]
    bare: dict[str, tuple[str, ...]]
    lora: LoraFacts
    kinds: tuple[Kind, ...]

    @property
    def unblended(self) -> tuple[str, ...]:
        """Names of what is never blended in any architecture."""
        return (*self.buffers, *self.schedules, *self.markers)


def decode(path: Path, type: type[T]) -> T:
    """A TOML file of this package as `type`; an architecture is called as its file is."""
    raw = msgspec.toml.decode(path.read_bytes())
    if "blocks" in raw:
        raw = expanded({**raw, "name": path.stem})
    return msgspec.convert(raw, type, str_keys=True)


def expanded(raw: dict[str, Any]) -> dict[str, Any]:
    """An architecture's table with its block ranges ("IN00..IN11") written out."""
    lists = {
        kind: {n: _expanded(names) for n, names in raw.get(kind, {}).items()}
        for kind in ("lists", "lora_lists")
    }
    views = {
        tool: {**view, "blocks": _expanded(view.get("blocks", []))}
        for tool, view in raw.get("views", {}).items()
    }
    return {**raw, "blocks": _expanded(raw.get("blocks", [])), **lists, "views": views}


def _expanded(names: list[str]) -> list[str]:
    out: list[str] = []
    for name in names:
        first, _, last = name.partition("..")
        if last:
            stem = first.rstrip("0123456789")
            digits = len(first) - len(stem)
            numbers = range(int(first[len(stem) :]), int(last[len(stem) :]) + 1)
            out += [f"{stem}{i:0{digits}}" for i in numbers]
        else:
            out.append(name)
    return out


@cache
def shared_facts() -> Shared:
    return decode(_HERE / "shared.toml", Shared)


@cache
def _sizes() -> dict[str, dict[str, dict[str, int]]]:
    """`sizes.toml`: architecture -> model -> block -> parameters."""
    raw = msgspec.toml.decode((_HERE / "sizes.toml").read_bytes())
    return {
        arch: {
            model: {block: n for name, n in rows.items() for block in _expanded([name])}
            for model, rows in models.items()
        }
        for arch, models in raw.items()
    }


@cache
def names() -> tuple[str, ...]:
    """The architectures that can be merged."""
    return tuple(sorted(path.stem for path in (_HERE / "data").glob("*.toml")))


@cache
def load(name: str) -> Architecture:
    """The architecture called `name`. Raises Refusal with the nearest names."""
    if name not in names():
        raise unknown("architecture", name, names())
    return decode(_HERE / "data" / f"{name}.toml", Architecture)


class _Families(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    families: tuple[Family, ...]


COMMON = ("sdxl", "sd1", "sd2")
"""The architectures of most files; looked at first, so that the others' data need not be read."""


def families() -> Iterator[Family]:
    """Everything that can be recognised: the architectures, then those known by name only.

    Each is read when its turn comes.
    """
    yield from map(load, COMMON)
    yield from (load(name) for name in names() if name not in COMMON)
    yield from _known_by_name()


@cache
def _known_by_name() -> tuple[Family, ...]:
    others: Any = decode(_HERE / "families.toml", _Families)
    return tuple(others.families)


def ema_key(key: str) -> str:
    """The name of the EMA copy of a denoiser tensor, given its canonical key.

    'model.diffusion_model.out.0.bias' -> 'model_ema.diffusion_modelout0bias'. The dots are lost on
    the way (ldm/modules/ema.py), so names are made from keys and never taken apart.
    """
    return shared_facts().ema + key.removeprefix("model.").replace(".", "")


def markers(keys: Iterable[str]) -> dict[str, str]:
    """The marker tensors among `keys` and what each says: {'v_pred': 'v-prediction'}."""
    known = shared_facts().markers
    return {key: known[key] for key in keys if key in known}


@cache
def _named(field: str) -> Names:
    return Names(getattr(shared_facts(), field))


def is_schedule(key: str) -> bool:
    """Whether `key` is a table of a noise schedule."""
    return key in _named("schedules")


def is_leftover(key: str) -> bool:
    """Whether `key` is of use to training alone."""
    return key in _named("leftovers")


def is_buffer(key: str) -> bool:
    """Whether `key` is a buffer or marker in any architecture."""
    return key in _named("unblended")


def quantised(keys: Collection[str]) -> dict[str, str]:
    """Those of `keys` that hold scales and tables of quantised weights, and whose they are.

    A weight beside them is not a plain number: it cannot be blended before it is dequantised.
    """
    kinds = shared_facts().quantised
    every = Names(pattern for patterns in kinds.values() for pattern in patterns)
    some = [key for key in keys if key in every]
    found: dict[str, str] = {}
    for kind, patterns in kinds.items() if some else ():
        names = Names(patterns)
        found.update((key, kind) for key in some if key in names)
    return found
