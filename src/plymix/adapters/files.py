"""A LoRA-like file -> its modules: what each changes, by which family, from which tensors.

    adapter = read(open_model("style.safetensors"))
    adapter.modules[0]        # Module("lora_unet_...", "weight", "LoRA", {"up": ..., "down": ...})

Headers are read, and numbers of one element (alpha, scalar); nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from plymix import pairing
from plymix.adapters.families import Family, families
from plymix.archs import Detection
from plymix.errors import FormatError, Refusal
from plymix.formats.base import Source, TensorInfo

MAGNITUDE = "magnitude"
"""The factor that makes a module of any family a DoRA."""

COMMON = {
    ".alpha": "alpha",
    ".scalar": "scalar",
    ".dora_scale": MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".reshape_weight": "reshape",
}
"""Ends of keys that any family's module may have."""

NUMBERS = ("alpha", "scalar", "on_input")

PEFT_BIAS = {".lora_up.bias", ".lora_B.bias"}
"""Ends of biases that have their LoRA's scale: of PEFT's `lora_bias`. Others are as they stand."""

_PEFT_OTHERS = re.compile(
    r"(?:^|\.)(oft_[Rr]|boft_[Rs]|ia3_l|vera_lambda_[bd]|hra_u|randlora_lambda|fourierft_spectrum)"
    r"(?:\.|$)"
)
"""Methods of PEFT that are no LoRA. How a weight follows from their numbers stands in their
configuration, which is not in the file: for OFT even the direction of the rotation does."""

_PEFT_NAME = re.compile(
    r"(\.lora_(?:[AB]|magnitude_vector))\.(?!weight$|bias$)[^.]+(\.(?:weight|bias)|)$"
)
"""PEFT puts the adapter's name ("default") into the keys of files saved without its own saver."""


@dataclass(frozen=True)
class Module:
    """A change of one weight.

    `name` is the module's as the file spells it, `param` what of it is changed: "weight", "bias" or
    "" where `name` is the parameter's itself. `factors` are tensors of the file by the names that
    the family's function has for them; with one called "magnitude" the module is a DoRA. The change
    at strength 1 is `scale` times what the function gives (alpha / rank, and the file's own factor,
    where they apply); `numbers` are the function's other numbers. `keys` are all of the file's keys
    that the module is made of.
    """

    name: str
    param: str
    family: str
    factors: Mapping[str, TensorInfo]
    scale: float = 1.0
    alpha: float | None = None
    rank: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    keys: tuple[str, ...] = ()

    @property
    def algorithm(self) -> str:
        """The family's name, "DoRA" before it where there is a magnitude: "DoRA LoHa"."""
        if MAGNITUDE not in self.factors:
            return self.family
        return "DoRA" if self.family == "LoRA" else f"DoRA {self.family}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.factors.items() if name != MAGNITUDE}

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Rows of the weight and the product of its other dimensions, as far as factors tell."""
        return families()[self.family].size(self.shapes)

    @property
    def on_weight(self) -> bool:
        """Whether the change depends on the weight."""
        return families()[self.family].on_weight or MAGNITUDE in self.factors


@dataclass(frozen=True)
class Adapter:
    """An open LoRA-like file. `others` are its keys that change no weight, by what they are."""

    source: Source
    detection: Detection
    modules: tuple[Module, ...]
    others: Mapping[str, tuple[str, ...]]

    @property
    def algorithms(self) -> Counter[str]:
        return Counter(module.algorithm for module in self.modules)


def read(source: Source) -> Adapter:
    """The modules of a LoRA-like file, in its order.

    Raises Refusal for a file that is no such thing, naming what it is.
    """
    detection = pairing.pair(source).detection
    if detection.kind in ("lora", "unknown"):
        modules, others = _modules(source)
        if modules:
            return Adapter(source, detection, modules, others)
    raise Refusal(
        f"{source.path.name} is not a LoRA: it is {detection.named}; name a LoRA or one of its kin"
        " (LoCon, LoHa, LoKr, DoRA, ...)"
    )


class Parts(dict[str, TensorInfo]):
    """A module's tensors by factor, and the ends of keys that only some families have."""

    def __init__(self) -> None:
        self.ends: set[str] = set()


def _modules(source: Source) -> tuple[tuple[Module, ...], dict[str, tuple[str, ...]]]:
    groups: dict[tuple[str, str], Parts] = {}  # (module, param) -> factors
    others: dict[str, list[str]] = {}
    bases = {key.removesuffix(".on_input") for key in source.tensors if key.endswith(".on_input")}
    for key, info in source.tensors.items():
        if other := _PEFT_OTHERS.search(key):
            raise Refusal(
                f"{source.path.name} holds {other[1]}, a method of PEFT's own: what its numbers do"
                " stands in adapter_config.json, not in the file; merge it in PEFT, save the model"
                " and make a LoRA of that (plymix lora extract)"
            )
        if key.startswith("bundle_emb."):
            others.setdefault("an embedding in the file", []).append(key)
        elif key.endswith(".weight") and key[: -len(".weight")] in bases:  # (IA)^3
            groups.setdefault((key[: -len(".weight")], "weight"), Parts())["weight"] = info
        elif key.endswith(".scale"):  # a norm's own, in BFL's control LoRAs
            groups.setdefault((key, ""), Parts())["value"] = info
        elif (found := _split(key)) is not None:
            name, end, factor = found
            param, _, factor = factor.rpartition(" ")
            parts = groups.setdefault((name, param or "weight"), Parts())
            if factor in parts:
                raise Refusal(
                    f"{source.path.name} has the {factor} of {name} twice, as"
                    f" {parts[factor].name!r} and {key!r}: two adapters are in it; save them apart"
                )
            if end.startswith(".lora_magnitude_vector"):  # of convolutions (1, out, 1, 1)
                info = replace(info, shape=(info.numel,))
            parts[factor] = info
            parts.ends |= {end} - COMMON.keys()
        else:
            others.setdefault("no part of a LoRA that plymix knows", []).append(key)
    config = _Config(source.metadata)
    modules: list[Module] = []
    for (name, param), parts in groups.items():
        shared = groups.get((name, "weight"), Parts()) if param == "bias" else Parts()
        made = _module(source, name, param, parts, shared, config)
        if made is not None:
            modules.append(made)
        else:
            keys = [info.name for info in parts.values()]
            others.setdefault("incomplete modules", []).extend(keys)
    return tuple(modules), {why: tuple(keys) for why, keys in others.items()}


def _split(key: str) -> tuple[str, str, str] | None:
    """Module, end of the key, factor: 'a.b.lora_A.weight' -> ('a.b', '.lora_A.weight', 'down')."""
    pattern, factors = _endings()
    match = pattern.match(_PEFT_NAME.sub(r"\1\2", key) if "lora_" in key else key)
    return (match[1], match[2], factors[match[2]]) if match else None


@cache
def _endings() -> tuple[re.Pattern[str], Mapping[str, str]]:
    factors = dict(COMMON)
    for family in families().values():
        factors.update(family.suffixes)
    longest = sorted(factors, key=len, reverse=True)
    return re.compile(f"(.+?)({'|'.join(map(re.escape, longest))})$"), factors


def _module(
    source: Source, name: str, param: str, parts: Parts, shared: Parts, config: _Config
) -> Module | None:
    known = {n: _number(source, info) for n, info in parts.items() if n in NUMBERS}
    factors = {n: info for n, info in parts.items() if n not in known}
    family = _family(parts)
    if family is None or "reshape" in factors:
        return None
    _check(source, name, family, factors)
    rank = family.rank({n: info.shape for n, info in factors.items()})
    alpha = known.get("alpha") or None  # 0 is LyCORIS' way to say "as the rank"
    numbers = {n: known[n] for n in family.numbers if n in known}
    scale = known.get("scalar", 1.0)
    if rank:
        scale *= alpha / rank if alpha else config.scale(name, rank)
    elif "constraint" in family.numbers:
        numbers["constraint"] = alpha or 0.0
    if "down" in shared and parts.ends & PEFT_BIAS:
        alphas = [shared["alpha"]] if "alpha" in shared else []
        rank_of = shared["down"].shape[0]
        of = [_number(source, info) / rank_of for info in alphas]
        scale = next(iter(of), config.scale(name, rank_of))
    return Module(
        name=name,
        param=param,
        family=family.name,
        factors=factors,
        scale=scale,
        alpha=alpha,
        rank=rank,
        numbers=numbers,
        keys=tuple(info.name for info in parts.values()),
    )


def _check(source: Source, name: str, family: Family, factors: Mapping[str, TensorInfo]) -> None:
    """Raises FormatError for factors that are no floats, or that cannot be multiplied."""
    shapes = {n: info.shape for n, info in factors.items() if n != MAGNITUDE}
    try:
        fit = all(map(math.prod, shapes.values())) and family.fits(shapes)
        family.size(shapes)
    except (IndexError, ValueError):  # too few dimensions
        fit = False
    if not fit:
        sizes = ", ".join(f"{n} {' x '.join(map(str, s)) or 1}" for n, s in shapes.items())
        raise FormatError(
            f"{source.path.name}: the factors of {name} make no {family.name} ({sizes}): the file"
            " is damaged, or no LoRA"
        )
    for info in factors.values():
        if not info.is_float:
            raise FormatError(
                f"{source.path.name}: {info.name} is {info.dtype}; the factors of a LoRA are floats"
            )


def _family(parts: Parts) -> Family | None:
    shapes = {name: info.shape for name, info in parts.items()}
    known = (f for f in families().values() if parts.ends <= f.suffixes.keys())
    return next((family for family in known if family.holds(shapes)), None)


def _number(source: Source, info: TensorInfo) -> float:
    """A tensor of one element. Raises FormatError for another, and for what is no number."""
    if info.numel != 1:
        raise FormatError(f"{source.path.name}: {info.name} has {info.numel} elements, not one")
    data = source.read(info)
    if info.is_float:
        from plymix import kernels

        value = float(kernels.float32(data, info.dtype)[0])
    else:
        value = float(int.from_bytes(data, "little", signed=info.dtype[0] == "I"))
    if not math.isfinite(value):
        raise FormatError(f"{source.path.name}: {info.name} is {value}, not a number")
    return value


class _Config:
    """What the metadata says of alpha where no tensor does: PEFT's own configuration.

    diffusers keeps it as JSON with a component before each field: {"unet.lora_alpha": 32, ...}.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._fields: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            found = {}
        for name, value in found.items() if isinstance(found, dict) else ():
            component, _, field = name.rpartition(".")
            self._fields.setdefault(component, {})[field] = value

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) as rs-LoRA has it; else 1."""
        for component, fields in self._fields.items():
            rest = module.removeprefix(f"{component}.") if component else module
            if component and rest == module:
                continue
            alpha = next(_patterned(fields.get("alpha_pattern"), rest), fields.get("lora_alpha"))
            if isinstance(alpha, (int, float)) and math.isfinite(alpha):
                return float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        return 1.0


def _patterned(patterns: Any, module: str) -> Iterator[Any]:
    """Values whose name, as PEFT reads it, is the module's or its end."""
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        if module == name or module.endswith(f".{name}"):
            yield value
