"""Text <-> Recipe: what a merge is, as one frozen value.

A recipe names its models, its steps (flat, by name; a step may use the results of others) and its
output. It is written by people in TOML and stored in the result as canonical JSON; both have the
same shape:

    [models]           sd = "sd-v1-4.ckpt"      or { file = ..., size = ..., sha256 = ... }
    [steps.mix]        method = "weighted_sum", a = "sd", b = "wd", alpha = 0.5, rules = [...]
    [output]           from = "mix", dtype = "fp16", vae = "sd", ...

Nothing here looks at a file. Unknown fields are errors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from graphlib import CycleError, TopologicalSorter
from itertools import chain, count
from pathlib import Path
from typing import Any, Union

import msgspec

from plymix import texts, urls
from plymix.errors import Refusal, unknown
from plymix.registry import Method, get_method

METADATA_KEY = "plymix.recipe"
"""Where a result carries its recipe in its metadata."""

LORA_KEY = "plymix.lora"
"""Where a LoRA file says how it was made, as JSON: `plymix.loras.record`."""

DTYPES = {
    "keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16",
    "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2", "q8_0": "F32",
}  # fmt: skip
"""What `output.dtype` may say, and what is computed for it. "q8_0" packs what it suits (GGUF)."""

MODELS = (".safetensors", ".ckpt", ".pt", ".gguf")
"""Endings of what is no recipe."""

REST = "default"
"""In a table of dtypes: all components that it does not name."""

LAYOUTS = ("ldm", "sgm", "sai", "bfl", "diffusers")
"""Whose names a result may have: diffusers', or the architecture's own. "ldm" is any one's own."""

ROUNDINGS = ("nearest", "stochastic")
EMA = ("drop", "keep", "use", "exchange")
REPAIRS = ("position_ids", "names")
PARTS = {
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "unet": "denoiser",
}
"""Fields of the output that take components from a model or a file, and what each takes."""

DROPS = ("schedules", "leftovers", "unknown", "metadata")
"""What `output.drop` may name besides the components of an architecture."""

BLEND = "blend"
"""Reserved value of `output.vae`: merge the VAE like the text encoder."""

_NAME = re.compile(r"[\w][\w .+()\-]*", re.UNICODE)


_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ][0-9:.]+(Z|[+-]\d{2}:?\d{2})?)?")


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input file. `size` (bytes) and `sha256` are recorded by a merge, checked by a replay."""

    file: str
    size: int = 0
    sha256: str = ""


class Step(msgspec.Struct, frozen=True):
    """One method applied to named models or steps.

    `inputs` are the names given to the method's tensors in order: first its named ones (`a`, `b`,
    `base`), then `models`; "" stands for an optional one left out before others. `params` are as
    written; `plan` resolves them for each block.
    """

    method: str
    inputs: tuple[str, ...]
    params: dict[str, Any]
    rules: tuple[str, ...] = ()
    seed: int = 0


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is made of the last step's result.

    dtype         of all, or a table {component: dtype}, "default" for those it does not name
    rounding      "stochastic": up or down by chance (seeded by `seed` and key), in fp8 only
    layout        diffusers, or the architecture's own (ldm, sgm, sai, bfl); "": the base model's
    shard         bytes per file at most (or "5GB", "2GiB"); 0: all in one
    vae           a model, a file, or "blend" (merged like the text encoder); "": the base model's
    text_encoder  a model or a file, for all text encoders it has; "": merged by the steps
    text_encoder_2, unet   the same for the second text encoder and the U-Net or transformer
    component     the result is this component alone, by the names of such files; `prefix`: by those
                  of a checkpoint
    drop          what to leave out: components, noise "schedules", "leftovers" of training, keys
                  "unknown" to the architecture, "metadata" that says nothing of the model
    ema           drop; keep the base's as they are; use them as the weights; exchange both
    union, trim   add keys that the base lacks; drop keys that another model lacks
    repair        "position_ids" resets CLIP's to 0..76, "names" writes old text encoder names anew
    adjust        detail, contrast, brightness, colour; saturation (VAE), cfg (cross-attention)
    arch          "any": a plain merge by key; a file (.toml) that describes the architecture; or
                  what such a file says, as a table
    block_view    whose blocks the weights are for: "classic", "supermerger" or "comfyui"
    """

    from_: str = ""
    file: str = ""
    dtype: Union[str, dict[str, str]] = "keep"
    rounding: str = "nearest"
    seed: int = 0
    layout: str = ""
    shard: Union[int, str] = 0
    vae: str = ""
    text_encoder: str = ""
    text_encoder_2: str = ""
    unet: str = ""
    component: str = ""
    prefix: bool = False
    drop: tuple[str, ...] = ()
    ema: str = "drop"
    union: bool = False
    trim: bool = False
    repair: tuple[str, ...] = ()
    arch: str | dict[str, Any] = ""
    block_view: str = "classic"
    allow_mixed_prediction: bool = False
    adjust: dict[str, Any] = {}
    title: str = ""
    date: str = ""


class Recipe(msgspec.Struct, frozen=True):
    """A whole merge. Compares by content; `to_json` and `from_json` are exact inverses."""

    models: dict[str, Model]
    steps: dict[str, Step]
    output: Output

    @property
    def parts(self) -> tuple[str, ...]:
        """Models that the output takes components from."""
        named = (getattr(self.output, part) for part in PARTS)
        return tuple(dict.fromkeys(n for n in named if n in self.models))

    @property
    def recorded(self) -> bool:
        """Whether it was carried out before: then it knows what its files were."""
        return all(model.sha256 for model in self.models.values())

    @property
    def final(self) -> str:
        return self.output.from_

    def uses(self, name: str) -> tuple[str, ...]:
        """The names that `name` is made of directly."""
        step = self.steps.get(name)
        return tuple(filter(None, step.inputs)) if step else ()

    def base(self, name: str | None = None) -> str:
        """The model that `name` (default: the final step) starts from: first input, all the way."""
        name = self.final if name is None else name
        while name in self.steps:
            name = self.uses(name)[0]
        return name

    def order(self) -> tuple[str, ...]:
        """The steps the result needs, each after the steps it uses."""
        done: dict[str, bool] = {}  # name -> whether it is a step
        path = [self.final]
        while path:
            first = next((used for used in self.uses(path[-1]) if used not in done), None)
            if first is not None:
                path.append(first)
            else:
                name = path.pop()
                done[name] = name in self.steps
        return tuple(name for name, is_step in done.items() if is_step)

    def differences(self) -> frozenset[str]:
        """Of the steps the result needs, those that give a difference between models, no model."""
        found: set[str] = set()
        for name in self.order():
            step = self.steps[name]
            given = [used in found if used else None for used in step.inputs]
            if get_method(step.method).gives_difference(given):
                found.add(name)
        return frozenset(found)


@contextmanager
def asking(recipe: Recipe, name: str) -> Iterator[None]:
    """Refusals of a model that only a field of the output names say which: 'output.vae: ...'."""
    try:
        yield
    except Refusal as e:
        field = next((part for part in PARTS if getattr(recipe.output, part) == name), None)
        if field is None or any(name in step.inputs for step in recipe.steps.values()):
            raise
        raise type(e)(f"output.{field}: {e}") from e


def load(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a TOML (or JSON) file."""
    path = Path(urls.given(path, "path")).expanduser()
    if path.suffix.lower() in MODELS:
        raise Refusal(
            f"{path} is a model, not a recipe: plymix replay makes a result again, plymix recipe"
            " show prints what it was made with"
        )
    text = texts.text(path, "the recipe")
    if path.suffix.lower() == ".json":
        return from_json(text)
    return from_toml(text, path.name)


def from_toml(text: str, where: str = "recipe") -> Recipe:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return from_dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise Refusal(f"{where} is not TOML: {e}") from None


def from_json(text: str) -> Recipe:
    try:
        found = json.loads(text, object_pairs_hook=texts.no_twins)
    except (ValueError, RecursionError) as e:
        raise Refusal(f"the recipe is not JSON: {e}") from None
    return from_dict(found)


def to_json(recipe: Recipe) -> str:
    """Canonical JSON: sorted keys, no spaces, defaults left out."""
    return json.dumps(to_dict(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists, in the shape of its TOML."""
    output = msgspec.to_builtins(recipe.output)
    output["from"] = output.pop("from_", "")
    return {
        "models": {name: model_fields(m) for name, m in recipe.models.items()},
        "steps": {name: deepcopy(dict(_step_fields(step))) for name, step in recipe.steps.items()},
        "output": output,
    }


def _step_fields(step: Step) -> Iterator[tuple[str, Any]]:
    method = get_method(step.method)
    yield "method", step.method
    named = zip(method.inputs, step.inputs, strict=False)
    yield from ((field, name) for field, name in named if name)
    if method.variadic:
        yield method.several, list(step.inputs[len(method.inputs) :])
    yield from step.params.items()
    if step.rules:
        yield "rules", list(step.rules)
    if step.seed:
        yield "seed", step.seed


def from_dict(found: Any) -> Recipe:
    """Check a recipe's shape: fields, names, references, cycles. Raises Refusal."""
    _fields("recipe", found, ("models", "steps", "output"))
    models = {name: _model(name, m) for name, m in _table("models", found.get("models")).items()}
    if not models:
        raise Refusal('the recipe names no models: write [models] with name = "file"')
    steps = {name: _step(name, s) for name, s in _table("steps", found.get("steps", {})).items()}
    for name in steps:
        if name in models:
            raise Refusal(f"{name!r} is both a model and a step; rename one")
    output = _output(_table("output", found.get("output", {})), models, steps)
    recipe = Recipe(models, steps, output)
    for part in PARTS:
        recipe = _with_part(recipe, part)
    _check_references(recipe)
    return recipe


def _with_part(recipe: Recipe, part: str) -> Recipe:
    """A file named in `output.vae` or the like, made a model of the recipe with a name."""
    file = urls.public(getattr(recipe.output, part))
    if not file or file in recipe.models or (part == "vae" and file == BLEND):
        return recipe
    if file in recipe.steps:
        raise Refusal(
            f"output.{part} = {file!r} is a step; it takes a model ({', '.join(recipe.models)})"
            " or a file, whole"
        )
    others = [n for n, m in recipe.models.items() if m.file != file]
    name = model_name(file, (*others, *recipe.steps))
    return Recipe(
        {**recipe.models, name: recipe.models.get(name, Model(file))},
        recipe.steps,
        msgspec.structs.replace(recipe.output, **{part: name}),
    )


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"[{where}] is missing or not a table")
    return value


def _fields(where: str, found: Any, known: tuple[str, ...]) -> None:
    for name in _table(where, found):
        if name not in known:
            raise unknown(f"field in {where}", str(name), known)


def check_name(kind: str, name: str) -> str:
    if not _NAME.fullmatch(name) or name == BLEND:
        raise Refusal(f"{kind} name {name!r} is not usable; use letters, digits, - and _")
    return name


def model_name(file: str, taken: Iterable[str]) -> str:
    """A name for a model file: its stem, in letters that a name may have, and not `taken`.

    'models/My Mix v1.0 (fp16).safetensors' -> 'My_Mix_v1.0_(fp16)'
    """
    used = {BLEND, *taken}
    stem = re.sub(r"[^\w.+()-]", "_", Path(urls.name(file.replace("\\", "/"))).stem).lstrip(".+()-")
    stem = stem or "model"
    return next(n for n in chain((stem,), (f"{stem}-{i}" for i in count(2))) if n not in used)


def model_fields(model: Model) -> Any:
    """A model as a recipe writes it: its file's name, or a table where more is known."""
    return model.file if model == Model(model.file) else msgspec.to_builtins(model)


def _model(name: str, found: Any) -> Model:
    check_name("model", name)
    if isinstance(found, str):
        found = {"file": found}
    if isinstance(found, dict) and isinstance(found.get("file"), str):
        found = {**found, "file": urls.public(found["file"])}
    _fields(f"models.{name}", found, Model.__struct_fields__)
    try:
        model = msgspec.convert(found, Model)
    except msgspec.ValidationError as e:
        raise _misfit(f"models.{name}", e) from None
    if not model.file:
        raise Refusal(f"models.{name} names no file")
    return model


_KINDS = {
    "str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false",
    "object": "a table", "array": "a list", "null": "nothing",
}  # fmt: skip


def _misfit(where: str, error: msgspec.ValidationError) -> Refusal:
    """What is wrong with a field, in the words of TOML."""
    match = re.fullmatch(r"Expected `(.+)`, got `(\w+)`(?: - at `\$(.*)`)?", str(error))
    if match is None:
        return Refusal(f"{where}: {error}")
    wanted = " or ".join(_KINDS.get(kind, kind) for kind in match[1].split(" | "))
    return Refusal(f"{where}{match[3] or ''} is {_KINDS.get(match[2], match[2])}, not {wanted}")


def _step(name: str, found: Any) -> Step:
    where = f"steps.{check_name('step', name)}"
    found = dict(_table(where, found))
    if not isinstance(found.get("method"), str):
        raise Refusal(f'{where} has no method: write method = "weighted_sum" or another')
    method = get_method(found.pop("method"))
    inputs = _inputs(where, method, found)
    rules = found.pop("rules", [])
    if isinstance(rules, str):
        rules = [rules]
    if not isinstance(rules, list) or not all(isinstance(r, str) for r in rules):
        raise Refusal(f'{where}.rules is not a list of texts such as "IN05-OUT03:attn2:0.3"')
    own_seed = any(p.name == "seed" for p in method.params)
    seed = 0 if own_seed else found.pop("seed", 0)
    if type(seed) is not int:
        raise Refusal(f"{where}.seed = {seed!r} is not a whole number")
    known = [p.name for p in method.params]
    for field in found:
        if field not in known:
            raise unknown(
                f"field in {where} ({method.name})",
                field,
                [*known, *method.inputs, "rules", "seed", *filter(None, [method.several])],
            )
    for p in method.params:
        if p.required and p.name not in found:
            raise Refusal(f"{where} ({method.name}) needs {p.name}")
    return Step(method.name, inputs, found, tuple(rules), seed)


def _inputs(where: str, method: Method, found: dict[str, Any]) -> tuple[str, ...]:
    given: list[str] = []
    for i, field in enumerate(method.inputs):
        value = found.pop(field, None)
        if value is None:
            if i < len(method.inputs) - method.optional:
                raise Refusal(f"{where} ({method.name}) has no {field}; it takes {method.takes}")
            if any(later in found for later in method.inputs[i + 1 :]):
                raise Refusal(f"{where} ({method.name}) gives a later model but no {field}")
            if method.variadic:
                given.append("")
            continue
        if not isinstance(value, str):
            raise Refusal(f"{where}.{field} = {value!r} is not the name of a model or step")
        given.append(value)
    if method.variadic:
        models = found.pop(method.several, [])
        models = [models] if isinstance(models, str) else models
        if not isinstance(models, list) or not all(isinstance(m, str) for m in models):
            raise Refusal(f"{where}.{method.several} is not a list of names")
        if len(models) < method.min_variadic:
            raise Refusal(
                f"{where} ({method.name}) has {len(models)} in {method.several}; it needs"
                f" {method.min_variadic} or more"
            )
        given += models
    return tuple(given)


def _output(found: dict[str, Any], models: Mapping[str, Any], steps: Mapping[str, Any]) -> Output:
    fields = tuple(f.rstrip("_") for f in Output.__struct_fields__)
    _fields("output", found, fields)
    found = dict(found)
    final = found.pop("from", "")
    if not final:
        if not steps and len(models) == 1:
            final = next(iter(models))
        elif not steps:
            raise Refusal('the recipe has no steps: write [steps.NAME] with method = "..."')
        else:
            final = list(steps)[-1]
    try:
        output = msgspec.convert({**found, "from_": final}, Output)
    except msgspec.ValidationError as e:
        raise _misfit("output", e) from None
    output = msgspec.structs.replace(output, shard=nbytes(output.shard))
    output = msgspec.structs.replace(output, dtype=_dtypes(output.dtype))
    if output.rounding not in ROUNDINGS:
        raise unknown("output.rounding", output.rounding, ROUNDINGS)
    if output.rounding == "stochastic" and not any("fp8" in d for d in dtypes(output).values()):
        raise Refusal('rounding = "stochastic" is for fp8; choose the dtype fp8_e4m3fn or fp8_e5m2')
    if output.layout not in ("", *LAYOUTS):
        raise unknown("output.layout", output.layout, LAYOUTS)
    if output.ema not in EMA:
        raise unknown("output.ema", output.ema, EMA)
    if output.date and not _DATE.fullmatch(output.date):
        raise Refusal(f"output.date = {output.date!r} is not a date such as 2026-11-22")
    for repair in output.repair:
        if repair not in REPAIRS:
            raise unknown("output.repair", repair, REPAIRS)
    said = output.arch
    if isinstance(said, str) and said not in ("", "any") and not said.lower().endswith(".toml"):
        raise unknown("output.arch", said, ["any", "FILE.toml"])
    return output


def dtypes(output: Output) -> dict[str, str]:
    """The dtype asked for each component, and for the REST of them."""
    said = output.dtype
    return {REST: said} if isinstance(said, str) else {REST: "keep", **said}


def _dtypes(said: str | dict[str, str]) -> str | dict[str, str]:
    """A setting of dtypes in its shortest form; texts are 'fp16' or 'fp16,vae=fp32'."""
    if isinstance(said, str):
        table: dict[str, str] = {}
        for entry in said.split(","):
            component, equals, dtype = entry.strip().rpartition("=")
            component = component.strip() if equals else REST
            if component in table:
                raise Refusal(f"output.dtype = {said!r} says {component} twice")
            table[component] = dtype.strip()
    else:
        table = dict(said)
    for dtype in table.values():
        if dtype not in DTYPES:
            raise unknown("output.dtype", dtype, DTYPES)
    return table.get(REST, "keep") if table.keys() <= {REST} else table


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def nbytes(size: int | str) -> int:
    """'5GB' or '4.5 GiB' as bytes; 0 for none. GB are 1000^3 bytes, GiB 1024^3. Raises Refusal."""
    if isinstance(size, int):
        if size < 0:
            raise Refusal(f"output.shard = {size} is less than nothing")
        return size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise Refusal(f"{size!r} is no size of a shard; write it as 5GB, 4.5GB or 2GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def _check_references(recipe: Recipe) -> None:
    known = [*recipe.models, *recipe.steps]
    if recipe.final not in known:
        raise unknown("output.from", recipe.final, known)
    for name in recipe.steps:
        for used in recipe.uses(name):
            if used not in known:
                raise unknown(f"model or step in steps.{name}", used, known)
    try:
        TopologicalSorter({name: recipe.uses(name) for name in recipe.steps}).prepare()
    except CycleError as e:
        loop = " -> ".join(reversed(e.args[1]))
        raise Refusal(f"the steps go round in a circle: {loop}") from None


def from_metadata(metadata: Mapping[str, str], where: str) -> Recipe:
    """The recipe that a result carries. Raises Refusal when it has none."""
    text = metadata.get(METADATA_KEY)
    if text is None and LORA_KEY in metadata:
        raise Refusal(
            f"{where} is a LoRA file that plymix made of others, which a recipe cannot say; plymix"
            " recipe show prints how, plymix replay makes it again"
        )
    if text is None:
        known = metadata.keys() & {"sd_merge_recipe", "prompt", "workflow"}
        others = "; plymix recipe import reads what another tool left in it" if known else ""
        raise Refusal(f"{where} carries no plymix recipe{others}")
    return from_json(text)


def with_output(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with fields of its [output] replaced. Raises Refusal."""
    found = to_dict(recipe)
    return from_dict({**found, "output": {**found["output"], **fields}})


# --- TOML ---------------------------------------------------------------------------------------


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML for people; `from_toml` reads it back to an equal one."""
    found = to_dict(recipe)
    tables: list[tuple[str, dict[str, Any]]] = [("[models]", found["models"])]
    tables += [(f"[steps.{_toml_key(name)}]", step) for name, step in found["steps"].items()]
    return toml([*tables, ("[output]", found["output"])])


def toml(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Tables as TOML: their headings, such as "[models]", each with its fields."""
    return "\n".join("\n".join([heading, *_toml_lines(fields)]) for heading, fields in tables)


def _toml_lines(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        yield f"{_toml_key(name)} = {_toml_value(value)}"
    yield ""


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    """A value on one line. JSON's spelling is TOML's for all but tables and unprintable letters."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
