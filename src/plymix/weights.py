"""A weight setting, a block and a key give one number.

    0.5                                                    one number, for every block and for BASE
    "GRAD_V"                                               a preset, in any case
    [0.1, 0.2, ...]                                        one number per block, or BASE and those
    {base = 0.5, blocks = {"IN00-IN05" = 0.2, M00 = 0.5}}  blocks by name; the others get `default`
    {curve = "cosine", from = 0, to = 1}                   a curve, for any number of blocks
    {blocks = [26 numbers], convert = "sd1"}               another architecture's list, converted

Blocks arrive as a tuple of names in the model's order ("IN00", ..., "OUT11"). BASE is the weight of
the text encoder, VAE that of the VAE. Element rules ("IN05-OUT03:attn2:0.3") then replace the
block's number for the keys they match. Nothing here knows a file or an architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby, pairwise
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from plymix import texts
from plymix.errors import FormatError, Refusal, nearest, unknown

SD1_BLOCKS = (
    *(f"IN{i:02}" for i in range(12)),
    "M00",
    *(f"OUT{i:02}" for i in range(12)),
)
"""The 25 blocks that SD1 and SD2 lists and presets are for."""

SDXL_BLOCKS = tuple(b for b in SD1_BLOCKS if b[-2:] < "09")
"""The 19 blocks that SDXL presets are for."""


class Named(msgspec.Struct, frozen=True):
    """Numbers by block name or range, sorted by name: (("IN00-IN05", 0.2), ("M00", 0.5))."""

    pairs: tuple[tuple[str, float], ...] = ()


class Curve(msgspec.Struct, frozen=True, omit_defaults=True):
    """A curve over x = i / (n - 1), i = 0 .. n - 1 numbering the n blocks.

    linear, smoothstep (3x^2 - 2x^3) and cosine ((1 - cos(pi x)) / 2) go from `start` to `end`.
    cubic goes through `points` (x in 0..1 and rising, y), flat before the first and after the last:
    the monotone cubic of Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5, 1984), which never
    leaves the range of two neighbouring points.
    """

    curve: Literal["linear", "smoothstep", "cosine", "cubic"]
    start: float = msgspec.field(default=0.0, name="from")
    end: float = msgspec.field(default=1.0, name="to")
    points: tuple[tuple[float, float], ...] = ()


class Blocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """Weights of the U-Net's blocks with that of the text encoder.

    `blocks` is a preset's name, a list (the blocks, or BASE and the blocks), a curve, or numbers by
    name; blocks that are not named get `default` (0 when not given). With `convert="sd1"` a list or
    preset is an SD1 one, of which another architecture's blocks take the values of their own names.
    """

    blocks: str | tuple[float, ...] | Named | Curve = Named()
    base: float | None = None
    default: float | None = None
    convert: Literal["sd1"] | None = None


Weight = float | str | tuple[float, ...] | Curve | Blocks
"""A weight setting: number, preset name, list, curve, or blocks with BASE. Made by `from_toml`."""


Own = Mapping[str, Sequence[float]]
"""The user's own presets by name, as `load_preset_file` gives them."""

_NO_PRESETS: Own = MappingProxyType({})
_NO_LISTS: Mapping[int, Sequence[str]] = MappingProxyType({})


class Preset(msgspec.Struct, frozen=True):
    """A published list of block weights.

    `values` are for `names`: BASE, if the list has it, then `blocks`. `form` is the closed form in
    x = 0..1 that continues the list to any number of blocks ("" if there is none), `reverse` the
    preset it is 1 minus of, `remark` what is wrong with the published numbers.
    """

    name: str
    values: tuple[float, ...]
    blocks: tuple[str, ...]
    has_base: bool
    form: str
    reverse: str
    aliases: tuple[str, ...]
    source: str
    remark: str

    @property
    def names(self) -> tuple[str, ...]:
        return ("BASE", *self.blocks) if self.has_base else self.blocks


class Resolved(msgspec.Struct, frozen=True):
    """One number per block. `base` is None when the setting does not say; the caller decides.

    `notes` are sentences a user should see ("the SD1 list was converted ..."). `parts` are numbers
    of names that are no blocks: parts of one (TIME), a text encoder (CLIP_L, T5), the VAE.
    """

    base: float | None
    blocks: dict[str, float]
    notes: tuple[str, ...] = ()
    parts: dict[str, float] = {}


# ---------------------------------------------------------------------------- text, TOML and JSON

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*(e[+-]?\d+)?|\.\d+(e[+-]?\d+)?|nan|inf(inity)?)", re.I | re.A)
_RANDOM = re.compile(r"[RUXD]|E[RUX]|ALL_[RUX]")
NO_RANDOM = "a random ratio, and recipes make the same file every time"


def parse(
    text: str,
    *,
    field: str = "weight",
    blocks: Sequence[str] = (),
    own: Own = _NO_PRESETS,
) -> Weight:
    """The setting that a command line word means.

    A number, a preset name, numbers separated by commas or spaces, or an inline TOML table in
    braces. `field`, `blocks` and `own` are those of `from_toml`. Raises Refusal.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    if text.startswith("{"):
        return from_toml(inline_table(text, field), field=field, blocks=blocks, own=own)
    if not text:
        raise Refusal(f"{field} is empty; give a number, a list of numbers or a preset name")
    values = [literal(word) for word in re.split(r"\s*,\s*|\s+", text)]
    value = values[0] if len(values) == 1 else values
    return from_toml(value, field=field, blocks=blocks, own=own)


def is_random(word: object) -> bool:
    """Whether `word` is a symbol of supermerger for a random ratio: R, U, X, D, ER, ALL_R."""
    return isinstance(word, str) and _RANDOM.fullmatch(word.strip()) is not None


def literal(word: str) -> float | str:
    """The number that `word` is (.5, 1e-3, nan), or `word` itself."""
    return float(word) if _NUMBER.fullmatch(word) else word


def inline_table(text: str, field: str) -> Any:
    """The value that `text` is in TOML: a table or list. Raises Refusal naming the field."""
    try:
        document = msgspec.toml.decode("value = " + text)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise Refusal(f"{field}: {text} is not a TOML table or list: {e}") from None
    if len(document) > 1:
        raise Refusal(f"{field}: {text} is more than one TOML table")
    return document["value"]


def from_toml(
    value: object,
    *,
    field: str = "weight",
    blocks: Sequence[str] = (),
    own: Own = _NO_PRESETS,
) -> Weight:
    """The setting that a value from a recipe (TOML, JSON, Python) means, checked in full.

    field   what error messages call the setting
    blocks  the model's blocks if they are known: error messages then name the block of a value
    own     the user's presets by name, as `load_preset_file` gives them. They come before plymix's;
            their numbers, not their names, go into the setting, so a recipe stays complete.

    Raises Refusal that names the field and the position. A Weight is given back as it is.
    """
    if isinstance(value, (Blocks, Curve)):
        value = to_json(value)
    if isinstance(value, str):
        return _preset(value, field, own)
    if isinstance(value, (list, tuple)):
        return _numbers(value, field, blocks)
    if isinstance(value, Mapping):
        if "curve" not in value:
            return _blocks(value, field, blocks, own)
        if "base" not in value:
            return _curve(value, field)
        bare = {k: v for k, v in value.items() if k != "base"}
        return Blocks(_curve(bare, field), base=_number(value["base"], f"{field}.base"))
    return _number(value, field)


def to_json(weight: Weight) -> Any:
    """`weight` as JSON values; `from_toml` reads them back."""
    plain = msgspec.to_builtins(weight)
    if isinstance(weight, Blocks) and isinstance(weight.blocks, Named):
        plain["blocks"] = dict(weight.blocks.pairs)
    return plain


def _number(value: object, where: str) -> float:
    if is_random(value):
        raise Refusal(f"{where} is {value!r}, {NO_RANDOM}; give a number")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Refusal(f"{where} is {value!r}, not a number")
    return finite(value, where)


def finite(value: Any, where: str) -> float:
    """A real number as a float. Raises Refusal where it is none that is finite."""
    try:
        number = float(value)
    except OverflowError:
        raise Refusal(f"{where} is too large a number") from None
    if not math.isfinite(number):
        raise Refusal(f"{where} is {number}, not a finite number")
    return number


def _numbers(values: Sequence[object], field: str, blocks: Sequence[str]) -> tuple[float, ...]:
    names = ("BASE", *blocks) if len(values) == len(blocks) + 1 else blocks
    places = [f" ({n})" for n in names] if len(names) == len(values) else [""] * len(values)
    return tuple(
        _number(v, f"{field}: value {i}{place}")
        for i, (v, place) in enumerate(zip(values, places, strict=True), 1)
    )


def _preset(name: str, field: str, own: Own) -> str | tuple[float, ...]:
    upper = name.strip().upper()
    if not upper:
        raise Refusal(f"{field} is empty; give a number, a list of numbers or a preset name")
    for mine, values in own.items():
        if mine.upper() == upper:
            if not values:
                raise Refusal(f"{field}: preset {mine} has {NO_RANDOM}")
            return _numbers(values, f"{field}: preset {mine}", ())
    names = _preset_names()
    if upper in names:
        return names[upper]
    if "_" in upper and is_random(upper):
        raise Refusal(f"{field}: {name!r} is {NO_RANDOM}; give numbers")
    if _NUMBER.fullmatch(name.strip()):
        raise Refusal(f"{field} is the text {name!r}; a number takes no quotes")
    if _NUMBER.match(name.strip()) and not nearest(name, [*names, *own]):
        raise Refusal(f"{field} is {name!r}, which is neither a number nor a preset")
    help = "a weight is a number, a list of numbers or a preset; `plymix presets` lists these"
    raise unknown(f"preset for {field}", name, [*names, *own], help=help)


def _only(value: Mapping[str, object], fields: Iterable[str], field: str) -> None:
    for name in value:
        if name not in fields:
            raise unknown(f"field of {field}", str(name), fields)


def _curve(value: Mapping[str, object], field: str) -> Curve:
    _only(value, Curve.__struct_encode_fields__, field)
    kind = value["curve"]
    if kind not in (*_EASE, "cubic"):
        raise unknown(f"curve for {field}", str(kind), (*_EASE, "cubic"))
    wrong = {"from", "to"} if kind == "cubic" else {"points"}
    if extra := wrong & value.keys():
        way = "goes through points" if kind == "cubic" else "goes from one number to another"
        raise Refusal(f"{field}: curve {kind!r} {way}; {' and '.join(sorted(extra))} is not its")
    if kind == "cubic":
        return Curve("cubic", points=_points(value.get("points"), f"{field}.points"))
    start = _number(value.get("from", 0.0), f"{field}.from")
    end = _number(value.get("to", 1.0), f"{field}.to")
    return Curve(kind, start, end)  # type: ignore[arg-type]


def _points(value: object, field: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise Refusal(f"{field}: a cubic wants two points or more: points = [[0, 0.2], [1, 0.8]]")
    points = []
    for i, point in enumerate(value, 1):
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise Refusal(f"{field}: point {i} is {point!r}, not [x, y]")
        x, y = (_number(v, f"{field}: {n} of point {i}") for v, n in zip(point, "xy", strict=True))
        points.append((x, y))
    xs = [x for x, _ in points]
    if xs[0] < 0 or xs[-1] > 1 or any(a >= b for a, b in pairwise(xs)):
        raise Refusal(f"{field}: x is {xs}; it must rise from point to point and lie in 0..1")
    return tuple(points)


def path_of(name: str) -> tuple[str, ...]:
    """Where in a weight the number of the block or the field `name` is: ("blocks", "IN05")."""
    return ("base",) if name == "BASE" else (name,) if _is_field(name) else ("blocks", name)


def _is_field(name: str) -> bool:
    """Whether `name` is that of a field of a weight, or comes near one."""
    fields = (*Blocks.__struct_encode_fields__, "curve")
    return name in (*fields, *Curve.__struct_encode_fields__) or bool(nearest(name, fields))


def under_blocks(value: Mapping[str, Any]) -> dict[str, Any]:
    """{M00 = 0.5, default = 0.1}, block names beside the fields, with them under `blocks`.

    What comes near the name of a field is left where it is, to be told as a misspelt one.
    """
    named = {k: v for k, v in value.items() if not _is_field(str(k))}
    if not named or "blocks" in value:
        return dict(value)
    return {k: v for k, v in value.items() if k not in named} | {"blocks": named}


def _blocks(
    value: Mapping[str, object],
    field: str,
    blocks: Sequence[str],
    own: Own,
) -> Blocks:
    value = under_blocks(value)
    _only(value, (*Blocks.__struct_encode_fields__, "curve"), field)
    if not value:
        raise Refusal(f"{field}: an empty table sets nothing; give blocks, default or base")
    convert = value.get("convert")
    if convert not in (None, "sd1"):
        raise unknown(f"conversion for {field}", str(convert), ["sd1"])
    inner = value.get("blocks", {})
    if isinstance(inner, Mapping) and "curve" not in inner:
        chosen: str | tuple[float, ...] | Named | Curve = _by_name(inner, f"{field}.blocks")
    elif isinstance(inner, (str, list, tuple, Mapping)):
        names = SD1_BLOCKS if convert else blocks
        read = from_toml(inner, field=f"{field}.blocks", blocks=names, own=own)
        if isinstance(read, Blocks):
            raise Refusal(f"{field}.blocks: write base beside blocks, not inside the curve")
        assert not isinstance(read, float)
        chosen = read
    else:
        raise Refusal(
            f"{field}.blocks is {inner!r}, not a preset, a list or a table;"
            " for one number in every block write default instead of blocks"
        )
    if "default" in value and not isinstance(chosen, Named):
        raise Refusal(f"{field}: default is for blocks that are not named; blocks names them all")
    if convert and not isinstance(chosen, (str, tuple)):
        raise Refusal(f"{field}: convert is for a list or a preset, not for {inner!r}")
    return Blocks(
        chosen,
        base=_number(value["base"], f"{field}.base") if "base" in value else None,
        default=_number(value["default"], f"{field}.default") if "default" in value else None,
        convert="sd1" if convert else None,
    )


def _by_name(table: Mapping[Any, object], field: str) -> Named:
    for name in table:
        if not isinstance(name, str) or not name.split():
            raise Refusal(f"{field}: {name!r} is not the name of a block")
        if "BASE" in name.upper().split():
            raise Refusal(f"{field}: BASE is the text encoder's; write base = ... beside blocks")
    return Named(tuple(sorted((n, _number(v, f"{field}: {n}")) for n, v in table.items())))


# ------------------------------------------------------------------------------ curves and presets

# The presets' closed forms, as published in words: "f(x)" is smoothstep, "tri" folds y into 0..1.
# Where a preset is the reverse of another one, the preset tables say so.


def _smoothstep(x: float) -> float:
    return x * x * (3 - 2 * x)


def _cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def _tri(y: float) -> float:
    return min(y % 2, 2 - y % 2)


def _fake_hermite(x: float) -> float:
    return (38 * x**3 - 57 * x**2 + 25 * x) / 6


def _true_hermite(x: float) -> float:
    return _fake_hermite(x) + (2 * x**3 - 3 * x**2 + 1) / 24 if x > 0 else 0.0


_FORMS: dict[str, tuple[str, Callable[[float], float]]] = {
    "GRAD_V": ("|1 - 2x|", lambda x: abs(1 - 2 * x)),
    "FLAT_25": ("0.25", lambda x: 0.25),
    "FLAT_75": ("0.75", lambda x: 0.75),
    "ALL_A": ("0", lambda x: 0.0),
    "SMOOTHSTEP": ("f(x) = 3x^2 - 2x^3", _smoothstep),
    "SMOOTHSTEP*2": ("tri(2 f(x))", lambda x: _tri(2 * _smoothstep(x))),
    "SMOOTHSTEP*3": ("tri(3 f(x))", lambda x: _tri(3 * _smoothstep(x))),
    "SMOOTHSTEP*4": ("tri(4 f(x))", lambda x: _tri(4 * _smoothstep(x))),
    "SMOOTHSTEP/2": ("f(tri(2x))", lambda x: _smoothstep(_tri(2 * x))),
    "SMOOTHSTEP/3": ("f(tri(3x))", lambda x: _smoothstep(_tri(3 * x))),
    "SMOOTHSTEP/4": ("f(tri(4x))", lambda x: _smoothstep(_tri(4 * x))),
    "COSINE": ("(1 + cos(pi x)) / 2", _cosine),
    "FAKE_CUBIC_HERMITE": ("h(x) = (38x^3 - 57x^2 + 25x) / 6", _fake_hermite),
    "TRUE_CUBIC_HERMITE": ("h(x) + (2x^3 - 3x^2 + 1) / 24, 0 at x = 0", _true_hermite),
}

_EASE: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "smoothstep": _smoothstep,
    "cosine": lambda x: 1 - _cosine(x),
}


def _grid(n: int) -> list[float]:
    return [i / max(n - 1, 1) for i in range(n)]


def _between(value: float, a: float, b: float) -> float:
    return min(max(value, min(a, b)), max(a, b))


def _along(curve: Curve) -> Callable[[float], float]:
    if curve.curve == "cubic":
        return _monotone_cubic(curve.points)
    ease, a, b = _EASE[curve.curve], curve.start, curve.end

    def value(x: float) -> float:
        t = ease(x)
        return _between((1 - t) * a + t * b, a, b)  # exact at both ends, and where a = b

    return value


def _monotone_cubic(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    xs, ys = zip(*points, strict=True)
    h = [b - a for a, b in pairwise(xs)]
    d = [(b - a) / w for (a, b), w in zip(pairwise(ys), h, strict=True)]
    m = [_end_slope(h, d), *_inner_slopes(h, d), _end_slope(h[::-1], d[::-1])]

    def value(x: float) -> float:
        if x <= xs[0] or x >= xs[-1]:
            return float(ys[0] if x <= xs[0] else ys[-1])
        k = sum(x >= p for p in xs) - 1
        t = (x - xs[k]) / h[k]
        y = (1 + 2 * t) * (1 - t) ** 2 * ys[k] + t * t * (3 - 2 * t) * ys[k + 1]
        y += h[k] * (t * (1 - t) ** 2 * m[k] - t * t * (1 - t) * m[k + 1])
        return _between(y, ys[k], ys[k + 1])

    return value


def _inner_slopes(h: Sequence[float], d: Sequence[float]) -> list[float]:
    """Weighted harmonic means of the secants on both sides, 0 at a turning point."""
    slopes = []
    for (h0, h1), (d0, d1) in zip(pairwise(h), pairwise(d), strict=True):
        w0, w1 = h0 + 2 * h1, 2 * h0 + h1
        slopes.append((w0 + w1) / (w0 / d0 + w1 / d1) if d0 * d1 > 0 else 0.0)
    return slopes


def _end_slope(h: Sequence[float], d: Sequence[float]) -> float:
    """The three-point slope, held to the shape: no turn, and none steeper than 3 secants."""
    if len(d) == 1:
        return d[0]
    slope = ((2 * h[0] + h[1]) * d[0] - h[0] * d[1]) / (h[0] + h[1])
    if slope * d[0] <= 0:
        return 0.0
    return _between(slope, 0.0, 3 * d[0]) if d[0] * d[1] < 0 else slope


@cache
def presets() -> Mapping[str, Preset]:
    """Every preset that plymix brings, by its canonical name, in published order."""
    from importlib.resources import files

    found: dict[str, Preset] = {}
    for file, blocks in (("mbw.toml", SD1_BLOCKS), ("sdxl.toml", SDXL_BLOCKS)):
        document = msgspec.toml.decode((files("plymix") / "presets" / file).read_bytes())
        aliases: dict[str, str] = document.get("alias", {})
        for group in document["group"]:
            for name, values in group["values"].items():
                reverse = group.get("reverse", {}).get(name, "")
                form = _FORMS[reverse or name][0] if (reverse or name) in _FORMS else ""
                found[name] = Preset(
                    name=name,
                    values=tuple(map(float, values)),
                    blocks=blocks,
                    has_base=group["base"],
                    form=f"1 - ({form})" if reverse else form,
                    reverse=reverse,
                    aliases=tuple(a for a, target in aliases.items() if target == name),
                    source=group["source"],
                    remark=group.get("remark", {}).get(name, ""),
                )
    return MappingProxyType(found)


@cache
def _preset_names() -> Mapping[str, str]:
    """Every name a preset answers to (they are all in capitals) and its canonical name."""
    return {name: p.name for p in presets().values() for name in (p.name, *p.aliases)}


def load_preset_file(path: str | Path) -> dict[str, tuple[float, ...]]:
    """The presets of a user's file: MBW-GUI's `preset.tsv` or supermerger's `mbwpresets.txt`.

    A line is a name, a tab, and numbers separated by commas: 25 for SD1 and SD2 or 19 for SDXL, one
    more with BASE first. A heading line and empty lines are allowed. Presets of random symbols
    (`ALL_R`: R,R,R,...) are given with no values, and refused when they are asked for.

    Raises Refusal, FormatError; both name the line.
    """
    path = Path(path)
    lines = texts.text(path, "the presets").splitlines()
    found: dict[str, tuple[float, ...]] = {}
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        name, _, rest = (part.strip() for part in line.partition("\t"))
        if not name or not rest:
            raise _bad_line(f"{where}: {line!r} is not a name, a tab and numbers")
        if number == 1 and not re.search(r"[\d,]", rest):
            continue  # a heading: preset_name <tab> preset_weights
        if name.upper() in first:
            raise _bad_line(f"{where}: {name} stands already in line {first[name.upper()]}")
        first[name.upper()] = number
        found[name] = _preset_line(rest, f"{where} ({name})")
    return found


def _preset_line(text: str, where: str) -> tuple[float, ...]:
    words = re.split(r"\s*,\s*", text)
    names = next((b for b in (SD1_BLOCKS, SDXL_BLOCKS) if len(words) - len(b) in (0, 1)), None)
    if names is None:
        count = f"{len(words)} number{'s' * (len(words) != 1)}"
        raise _bad_line(
            f"{where}: {count}; a preset has 25 (SD1) or 19 (SDXL), and one more with BASE first"
        )
    if any(map(is_random, words)):
        return ()
    try:
        return _numbers([literal(word) for word in words], where, names)
    except Refusal as e:
        raise _bad_line(str(e)) from None


def _bad_line(what: str) -> FormatError:
    """One line that cannot be read refuses the file: nobody merges with a preset half read."""
    return FormatError(f"{what}; mend this line or delete it")


def overridden(own: Own) -> list[str]:
    """The names in `own` that plymix has for a preset with other numbers."""
    names = _preset_names() if own else {}
    found = {n: presets()[names[n.upper()]].values for n in own if n.upper() in names}
    return [name for name, values in found.items() if values != tuple(own[name])]


# ------------------------------------------------------------------------------- setting -> blocks


def spans(names: Iterable[str]) -> str:
    """Names in few words: 'IN00-IN11, M00, OUT00-OUT11'."""

    def run(item: tuple[int, str]) -> tuple[str, int]:
        stem = item[1].rstrip("0123456789")
        return stem, int(item[1][len(stem) :] or item[0]) - item[0]

    runs = [[name for _, name in items] for _, items in groupby(enumerate(names), key=run)]
    return ", ".join(r[0] if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _select(words: Iterable[str], names: Sequence[str], what: str) -> list[str]:
    """The `names` that words mean, each a name or a range of names in either direction.

    A range follows the order of `names`: IN05-OUT03 spans the middle. Raises Refusal.
    """
    place = {name.upper(): i for i, name in enumerate(names)}
    found: list[str] = []
    for word in words:
        first, _, last = word.partition("-")
        ends = [first, last] if last and word.upper() not in place else [word]
        for end in ends:
            if end.upper() not in place:
                raise unknown(what, end, names, help=f"there are {spans(names)}")
        at = [place[end.upper()] for end in ends]
        found += names[min(at) : max(at) + 1]
    return found


def resolve(
    weight: Weight,
    blocks: Sequence[str],
    *,
    base: float | None = None,
    arch_title: str = "SD1",
    field: str = "alpha",
    lists: Mapping[int, Sequence[str]] = _NO_LISTS,
    names: Sequence[str] = (),
) -> Resolved:
    """One number for each of `blocks`, and for BASE if the setting says one.

    `lists` says what lists of other lengths are for (BASE, the blocks, VAE), and `names` what a
    table may name besides the blocks.

    `base` is a weight for BASE that was given apart from the setting (`--base-alpha`). A number is
    for every block and for BASE; a preset's own BASE yields to one that is given, a list's must not
    disagree with it.

    A published preset is used as published where its list fits; elsewhere its closed form is
    computed for the number of blocks and a note says so. A list of the wrong length, and a preset
    that is a list for another architecture and has no closed form, is refused.

    Raises Refusal that names `field`.
    """
    blocks = tuple(blocks)
    weight = from_toml(weight, field=field, blocks=blocks)
    if base is not None:
        base = _number(base, f"{field}: base")
    if isinstance(weight, float):
        return Resolved(weight if base is None else base, dict.fromkeys(blocks, weight))
    whole = weight if isinstance(weight, Blocks) else Blocks(weight)
    listed = preset_base = None
    notes: list[str] = []
    parts: dict[str, float] = {}
    match whole.blocks:
        case Named(pairs):
            said = _named(pairs, (*blocks, *names), arch_title, field)
            # A number for all, of which a set has named every block since, has both the same.
            if whole.default not in (None, whole.base) and {*blocks} <= said.keys():
                notes.append(f"{field}.default does nothing: every block is named")
            values = [said.pop(block, whole.default or 0.0) for block in blocks]
            parts = said
        case Curve() as curve:
            at = _along(curve)
            values = [_number(at(x), f"{field}: the curve") for x in _grid(len(blocks))]
        case str(name):
            preset = presets()[name]
            preset_base, values = _fit(preset, blocks, whole.convert, arch_title, field, notes)
        case tuple(numbers):
            expected = SD1_BLOCKS if whole.convert else blocks
            title = "an SD1 list" if whole.convert else arch_title
            others = {} if whole.convert else lists
            listed, values, parts = _split(numbers, expected, blocks, title, field, others)
            if whole.convert:
                values = _from_sd1(values, blocks, arch_title, field, notes)
    bases = {"base": whole.base, "the list's first value": listed, "what was given apart": base}
    chosen = _settle(bases, preset_base, field, notes)
    return Resolved(chosen, dict(zip(blocks, values, strict=True)), tuple(notes), parts)


def _settle(
    said: Mapping[str, float | None], preset: float | None, field: str, notes: list[str]
) -> float | None:
    """The one weight of BASE, from all who may say it; a preset's own comes last."""
    given = {who: value for who, value in said.items() if value is not None}
    if len(set(given.values())) > 1:
        found = " and ".join(f"{value:g} by {who}" for who, value in given.items())
        raise Refusal(f"{field}: BASE is set to {found}; keep one of them")
    chosen = next(iter(given.values()), preset)
    if preset is not None and chosen != preset:
        notes.append(f"{field}: BASE is {chosen:g}, as asked; the preset has {preset:g}")
    return chosen


def entries(
    weight: Weight, blocks: Sequence[str], names: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """The names that a weight says numbers of, by how it is written: "IN00-IN05", "base".

    `blocks` and `names` as for `resolve`, which has not refused the weight. A number, a preset, a
    list and a curve name nothing but the base beside them.
    """
    if not isinstance(weight, Blocks):
        return {}
    pairs = weight.blocks.pairs if isinstance(weight.blocks, Named) else ()
    found = {text: tuple(_select(text.split(), (*blocks, *names), "block")) for text, _ in pairs}
    return found if weight.base is None else {"base": ("BASE",), **found}


def _named(
    pairs: Iterable[tuple[str, float]], names: Sequence[str], arch_title: str, field: str
) -> dict[str, float]:
    """A number for each of `names` that the pairs name."""
    by: dict[str, tuple[str, float]] = {}
    for text, value in pairs:
        for name in _select(text.split(), names, f"block of {arch_title} in {field}"):
            if name in by:
                raise Refusal(
                    f"{field}: {name} is set by {by[name][0]!r} and by {text!r}; name a block once"
                )
            by[name] = (text, value)
    return {name: value for name, (_, value) in by.items()}


def _split(
    numbers: Sequence[float],
    expected: Sequence[str],
    blocks: Sequence[str],
    title: str,
    field: str,
    lists: Mapping[int, Sequence[str]] = _NO_LISTS,
) -> tuple[float | None, list[float], dict[str, float]]:
    """(BASE or None, one value per expected block, those of other names)."""
    n = len(expected)
    rows = {n: tuple(expected), n + 1: ("BASE", *expected), **lists}
    if len(numbers) not in rows:
        sd1 = len(numbers) in (25, 26) and set(blocks) < set(SD1_BLOCKS)
        hint = '; to use an SD1 list write {blocks = [...], convert = "sd1"}' if sd1 else ""
        given = "1 number" if len(numbers) == 1 else f"{len(numbers)} numbers"
        more = [f", or {m}: {spans(row)}" for m, row in rows.items() if m not in (n, n + 1)]
        raise Refusal(
            f"{field}: {given} given; {title} wants {n}: {spans(expected)},"
            f" or {n + 1} with BASE first{''.join(more)}{hint}"
        )
    found = dict(zip(rows[len(numbers)], numbers, strict=True))
    base = found.pop("BASE", None)
    return base, [found.pop(block) for block in expected], found


def _from_sd1(
    values: Sequence[float],
    blocks: Sequence[str],
    arch_title: str,
    field: str,
    notes: list[str],
) -> list[float]:
    """The SD1 values of the blocks that have an SD1 name, as supermerger shortens 26 to 20."""
    by_name = dict(zip(SD1_BLOCKS, values, strict=True))
    if missing := [b for b in blocks if b not in by_name]:
        raise Refusal(
            f"{field}: an SD1 list cannot be converted to {arch_title}: {spans(missing)}"
            " have no SD1 counterpart; give a list for it, a curve, or blocks by name"
        )
    if dropped := [b for b in SD1_BLOCKS if b not in blocks]:
        notes.append(
            f"{field}: SD1 values converted to {arch_title}: {spans(blocks)} kept by name,"
            f" {spans(dropped)} dropped"
        )
    return [by_name[b] for b in blocks]


def _fit(
    preset: Preset,
    blocks: Sequence[str],
    convert: str | None,
    arch_title: str,
    field: str,
    notes: list[str],
) -> tuple[float | None, list[float]]:
    """(BASE or None, one value per block) of a preset."""
    name = preset.name
    base, values, _ = _split(preset.values, preset.blocks, blocks, name, field)
    if preset.remark:
        notes.append(f"{field}: {name} is used as published: {preset.remark}")
    if convert:
        if preset.blocks != SD1_BLOCKS:
            raise Refusal(f"{field}: {name} is not an SD1 preset; leave convert out")
        return base, _from_sd1(values, blocks, arch_title, field, notes)
    if len(blocks) == len(preset.blocks):
        return base, values
    n = len(blocks)
    if preset.form:
        notes.append(
            f"{field}: {name} is a list for {len(preset.blocks)} blocks; its formula"
            f" {preset.form} was computed for the {n} of {arch_title}"
        )
        return None, [_form(preset, x) for x in _grid(n)]
    raise Refusal(
        f"{field}: {name} is a list for {spans(preset.blocks)}; {arch_title} has {n} blocks:"
        f" {spans(blocks)}; {_instead(preset, blocks)}"
    )


def _form(preset: Preset, x: float) -> float:
    value = _FORMS[preset.reverse or preset.name][1](x)
    return 1 - value if preset.reverse else value


def _instead(preset: Preset, blocks: Sequence[str]) -> str:
    """What to ask for where a preset does not fit."""

    def stem(name: str) -> str:
        return name.removeprefix("SDXL_").removesuffix(".XL")

    kin = {preset.name, *preset.aliases, stem(preset.name)}
    fitting = [
        p.name
        for name, p in ((n, presets()[canonical]) for n, canonical in _preset_names().items())
        if stem(name) in kin and (p.form or len(p.blocks) == len(blocks))
    ]
    ways = [f"use {n}" for n in dict.fromkeys(fitting)]
    if preset.blocks == SD1_BLOCKS and set(blocks) < set(SD1_BLOCKS):
        ways.append(f'write {{blocks = "{preset.name}", convert = "sd1"}} to keep blocks by name')
    return ", or ".join(ways) or "give numbers"


# ----------------------------------------------------------------------------------- element rules


DENOISER = "model.diffusion_model."
"""What the keys of a U-Net begin with."""


class Rule(msgspec.Struct, frozen=True):
    """An element rule in supermerger's syntax, `blocks:elements:ratio`; `str` gives its text.

    `blocks` are names and ranges, BASE (the text encoder) and VAE among them; `elements` are parts
    of keys. No words mean all of them; `not_blocks` and `not_elements` (a leading NOT, in any
    case) mean all but the words'.
    """

    blocks: tuple[str, ...]
    elements: tuple[str, ...]
    ratio: float
    not_blocks: bool = False
    not_elements: bool = False

    def __str__(self) -> str:
        blocks = " ".join(("NOT",) * self.not_blocks + self.blocks)
        elements = " ".join(("NOT",) * self.not_elements + self.elements)
        return f"{blocks}:{elements}:{self.ratio!r}"

    def matches(self, block: str, key: str, blocks: tuple[str, ...], part: str = "") -> bool:
        """Whether the rule is for `key`, which lies in `block` (one of `blocks`, BASE or VAE).

        `part` is a finer name of its place that a rule may use too, if `blocks` has it.
        Element words without a dot are looked for behind the denoiser's prefix: every key of a
        U-Net has "model.diffusion_model." in it, and so "ff", "model" and "fusion". Raises Refusal
        where the rule names a block that the model does not have.
        """
        if self.blocks:
            reach = _reach(self.blocks, blocks)
            if (block in reach or part in reach) == self.not_blocks:
                return False
        if not self.elements:
            return True
        return any(_has(key, word) for word in self.elements) != self.not_elements


def _has(key: str, word: str) -> bool:
    """Whether an element word is in a key: one without a dot, behind the denoiser's prefix."""
    return word in (key if "." in word else key.removeprefix(DENOISER))


@lru_cache(maxsize=256)
def _reach(words: tuple[str, ...], blocks: tuple[str, ...]) -> frozenset[str]:
    names = tuple(dict.fromkeys(("BASE", *blocks, "VAE")))
    return frozenset(_select(words, names, "block in a rule"))


def parse_rules(text: str | Iterable[str], *, field: str = "rules") -> tuple[Rule, ...]:
    """Rules separated by commas or line ends, or a list of such texts.

    "IN05-OUT03:attn2:0.3", "NOT OUT09-OUT11:ff:0", "::0.5". Raises Refusal that names the rule.
    """
    texts = [text] if isinstance(text, str) else list(text)
    for item in texts:
        if not isinstance(item, str):
            raise Refusal(f"{field}: {item!r} is not text like IN05-OUT03:attn2:0.3")
    items = [item for t in texts for item in rule_texts(t)]
    return tuple(_rule(item, f"{field}: rule {n} {item!r}") for n, item in enumerate(items, 1))


def rule_texts(text: str) -> list[str]:
    """The rules in a text that commas or line ends separate, each as it is written."""
    return [item.strip() for item in re.split(r"[,\n]", text) if item.strip()]


def _rule(text: str, where: str) -> Rule:
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 3:
        raise Refusal(f"{where}: a rule is blocks:elements:ratio, like IN05-OUT03:attn2:0.3")
    (not_blocks, blocks), (not_elements, elements) = (_negated(p, where) for p in parts[:2])
    ratio = _number(literal(parts[2]), f"{where}: the ratio")
    return Rule(blocks, elements, ratio, not_blocks, not_elements)


def _negated(text: str, where: str) -> tuple[bool, tuple[str, ...]]:
    words = tuple(text.split())
    negated = bool(words) and words[0].upper() == "NOT"
    if negated and len(words) == 1:
        raise Refusal(f"{where}: NOT wants names after it")
    if "NOT" in (word.upper() for word in words[1:]):
        raise Refusal(f"{where}: NOT stands first, and is for all names after it")
    return negated, words[negated:]


def apply_rules(
    rules: Iterable[Rule],
    block: str,
    key: str,
    value: float,
    blocks: tuple[str, ...],
    part: str = "",
) -> float:
    """The ratio of the last rule that matches, or `value`, the block's, if none does."""
    for rule in rules:
        if rule.matches(block, key, blocks, part):
            value = rule.ratio
    return value


def hits(
    rules: Iterable[Rule], keys: Iterable[tuple[str, ...]], blocks: tuple[str, ...]
) -> list[set[int]]:
    """For each rule the numbers of the (block, key) or (block, key, part) rows that it matches."""
    rows = list(keys)
    return [
        {i for i, (b, k, *part) in enumerate(rows) if r.matches(b, k, blocks, *part)} for r in rules
    ]


def idle_words(rules: Iterable[Rule], keys: Iterable[str]) -> tuple[tuple[Rule, str], ...]:
    """The element words of rules that no key has in it, each with its rule."""
    every = list(keys)
    return tuple((r, w) for r in rules for w in r.elements if not any(_has(k, w) for k in every))


def words_like(word: str, keys: Iterable[str]) -> list[str]:
    """The parts of keys that a misspelt element word may stand for."""
    return nearest(word, {part for key in keys for part in key.removeprefix(DENOISER).split(".")})
