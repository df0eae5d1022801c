"""`inspect`, `check`, `presets`, `methods` and `doctor`: commands that only show."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plymix.cli import screen
from plymix.cli.options import Json, OwnArch, argument, option
from plymix.errors import unknown

if TYPE_CHECKING:
    from plymix.inspection import Amount, Report
    from plymix.registry import Method, Param
    from plymix.weights import Preset

EXAMPLES = {
    "inspect": "Example:\n  PROG model.safetensors --hashes",
    "check": "Example:\n  PROG model.safetensors --dtype fp16",
    "presets": "Example:\n  PROG GRAD_V",
    "methods": "Example:\n  PROG add_difference",
    "doctor": "Example:\n  PROG ~/models",
}

# --- inspect and check --------------------------------------------------------------------------


def inspect(
    *files: Annotated[str, argument("Model files.")],
    hashes: Annotated[
        bool, option("Compute the file's hashes too (reads all of it).", default=False)
    ] = False,
    arch: OwnArch = "",
    json: Json = False,
) -> None:
    """Show what a model file is and holds.

    Architecture, components, number formats, EMA, prediction type, metadata and the recipe it
    carries. With --json: one object for one file, a list of them for several.
    """
    from plymix.errors import Refusal
    from plymix.inspection import inspect as report

    if not files:
        raise Refusal("inspect what? name a model file")
    reports = [report(file, hashes=hashes, arch=arch) for file in files]
    if json:
        documents = [r.to_dict() for r in reports]
        screen.put_json(documents[0] if len(files) == 1 else documents)
        return
    for i, found in enumerate(reports):
        if i:
            screen.put("")
        _show_report(found)


def _show_report(found: Report) -> None:
    screen.put(f"{found.file}: {found.title}")
    for name, value in _facts(found):
        screen.put(f"  {name:<14} {value}")
    screen.put("")
    screen.table(
        ("component", ">tensors", ">parameters", ">size", "dtypes"),
        [_amount_row(c.title, c) for c in found.components]
        + ([_amount_row("total", found.total)] if len(found.components) > 1 else []),
    )
    for title, pairs in (
        ("metadata", found.brief_metadata.items()),
        ("hashes", _hash_rows(found)),
    ):
        if pairs:
            screen.put(f"\n{title}")
            for name, value in pairs:
                screen.put(f"  {name}: {value}")
    for text in found.notes:
        screen.note(text)


def _facts(found: Report) -> Iterator[tuple[str, str]]:
    from plymix.api import size
    from plymix.errors import amount, listed

    yield "size", size(found.size)
    yield "format", found.format + (f", under {found.root!r}" if found.root else "")
    if found.prediction.kind:
        yield "predicts", f"{found.prediction.kind} ({found.prediction.told})"
    if found.zero_terminal_snr:
        yield "schedule", "zero-terminal SNR"
    for name, text in found.markers.items():
        yield "marker", f"{name}: {text}"
    if found.quantised:
        yield "quantised", f"{amount(found.quantised)} of scales and tables"
    if found.unknown.count:
        names = listed([*found.unknown.keys, *[""] * (found.unknown.count - 10)])
        yield "unknown keys", f"{found.unknown.count}: {names}"
    if found.strided:
        yield "strided", amount(found.strided)
    if found.tied:
        yield "tied", f"{found.tied} tensors share their bytes"
    for line in found.recipe:
        yield "plymix recipe", line
    for line in found.webui_recipe:
        yield "webui recipe", line


def _amount_row(name: str, amount: Amount) -> tuple[str, ...]:
    from plymix.api import size

    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in amount.dtypes.items())
    return name, str(amount.tensors), screen.count(amount.parameters), size(amount.nbytes), dtypes


def _hash_rows(found: Report) -> list[tuple[str, str]]:
    if found.hashes is None:
        return []
    named = ((f, getattr(found.hashes, f)) for f in found.hashes.__struct_fields__)
    return [(name, value or "none in this format") for name, value in named]


def check(
    file: Annotated[str, argument("A model file.")],
    /,
    *,
    dtype: Annotated[
        str | None,
        option(
            "Numbers too large for it are errors: fp16, bf16 or fp32.",
            default=False,
            metavar="DTYPE",
        ),
    ] = None,
    arch: OwnArch = "",
    json: Json = False,
) -> int:
    """Look for damage: NaN, infinities, zeros, bad position ids.

    Reads the whole file. Exit code 1 if it is unhealthy, also when it is truncated or damaged.
    """
    from plymix.errors import amount
    from plymix.health import check as examine

    with screen.ProgressLine() as progress:
        health = examine(file, dtype=dtype, arch=arch, progress=progress)
    if json:
        screen.put_json(health.to_dict())
        return health.exit_code
    for finding in health.findings:
        screen.put(f"{finding.severity}: {finding.text}")
    counts = [f.severity for f in health.findings]
    said = ", ".join(
        f"{n} {s}{'s' if n > 1 else ''}" for s in ("error", "warning") if (n := counts.count(s))
    )
    what = f" ({health.title}, {amount(health.tensors)})" if health.title else ""
    screen.put(
        f"{health.file}{what}: {'healthy' if health.ok else 'unhealthy'}"
        f"{', ' + said if said else ''}"
    )
    return health.exit_code


# --- presets ------------------------------------------------------------------------------------


def presets(
    name: Annotated[str | None, argument("A preset, in any case.")] = None, /, *, json: Json = False
) -> None:
    """List the block weight presets, or draw one.

    In plymix merge its numbers are the share of model B, in plymix mbw that of model 1.
    """
    from plymix import weights

    if name is not None:
        found = _preset(name)
        if json:
            screen.put_json(_preset_document(found))
        else:
            _draw_preset(found)
        return
    every = weights.presets().values()
    if json:
        screen.put_json([_preset_document(p) for p in every])
        return
    screen.table(
        ("preset", ">numbers", "", "formula"),
        [(p.name, str(len(p.values)), sparkline(p.values), p.form or p.remark) for p in every],
    )


def _preset(name: str) -> Preset:
    from plymix import weights

    known = {n: p for p in weights.presets().values() for n in (p.name, *p.aliases)}
    if name.upper() not in known:
        raise unknown("preset", name, known, help="plymix presets lists them")
    return known[name.upper()]


def _preset_document(preset: Preset) -> dict[str, Any]:
    import msgspec

    return {**msgspec.to_builtins(preset), "names": list(preset.names)}


LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-~=+*#"


def sparkline(values: Iterable[float]) -> str:
    """Numbers between 0 and 1 (clamped) as one character each."""
    import sys

    levels = LEVELS if screen.encodable(LEVELS, sys.stdout) else ASCII_LEVELS
    top = len(levels) - 1
    return "".join(levels[round(min(max(v, 0.0), 1.0) * top)] for v in values)


def _draw_preset(preset: Preset) -> None:
    also = f" (also {', '.join(preset.aliases)})" if preset.aliases else ""
    screen.put(f"{preset.name}{also}: {len(preset.values)} numbers")
    if preset.form:
        screen.put(f"formula: {preset.form}, x from 0 at {preset.blocks[0]} to 1 at the end")
    if preset.remark:
        screen.put(f"remark: {preset.remark}")
    screen.put(f"source: {preset.source}\n")
    cells = max(10, min(50, screen.width() - 18))
    for block, value in zip(preset.names, preset.values, strict=True):
        drawn = screen.bar(value, cells, rest=" ").rstrip()
        screen.put(f"{block:<5}  {value:<9.6g} {drawn}".rstrip())


# --- methods ------------------------------------------------------------------------------------


def methods(
    name: Annotated[str | None, argument("A method.")] = None, /, *, json: Json = False
) -> None:
    """List the merge methods, or explain one.

    Formula, models, parameters with range and default, source, and a step of a recipe that uses
    it.
    """
    from plymix import registry

    if name is not None:
        found = registry.get_method(name)
        if json:
            screen.put_json(_method_document(found))
        else:
            _explain_method(found)
        return
    every = registry.methods().values()
    if json:
        screen.put_json([_method_document(m) for m in every])
        return
    screen.table(
        ("method", "models", "what it does"),
        [(m.name, _models(m), m.label) for m in every],
    )


def _models(method: Method) -> str:
    fixed = len(method.inputs) - method.optional
    words = [*method.inputs[:fixed], *(f"[{n}]" for n in method.inputs[fixed:])]
    return " ".join([*words, *([f"{method.several}..."] if method.variadic else [])])


def _explain_method(method: Method) -> None:
    for line in f"{method.name}: {method.doc}".splitlines():
        screen.put(textwrap.fill(line, screen.width(), subsequent_indent="  "))
    screen.put("")
    screen.put(f"models: {_models(method)}")
    screen.put(f"kind: {method.kind}{', random (seed)' if method.random else ''}")
    for p in method.params:
        screen.put(f"parameter {p.name}: {_param(p)}")
    screen.put("\nexample:\n" + "\n".join(f"  {line}" for line in example(method)))


def _param(param: Param) -> str:
    kinds = {float: "number", int: "whole number", bool: "true or false", tuple: "one per model"}
    what = " | ".join(param.choices) if param.choices else kinds[param.type]
    bounds = f", {param.range}" if param.type in (float, int, tuple) else ""
    default = "required" if param.required else f"default {_default(param.default)}"
    return f"{what}{bounds}, {default}"


def _default(value: Any) -> str:
    return "equal" if value == () else str(value).lower() if isinstance(value, bool) else str(value)


def example(method: Method) -> list[str]:
    """A recipe step that uses `method`: what must be said, and one parameter."""
    lines = ["[steps.mix]", f'method = "{method.name}"']
    lines += [
        f'{name} = "{name}"' for name in method.inputs[: len(method.inputs) - method.optional]
    ]
    if method.variadic:
        names = [f"{method.several[:-1]}{i + 1}" for i in range(max(2, method.min_variadic))]
        lines.append(f"{method.several} = [{', '.join(f'{chr(34)}{n}{chr(34)}' for n in names)}]")
    for p in [p for p in method.params if p.required] or list(method.params[:1]):
        value = 0.5 if p.required else p.default
        if value != ():
            shown = f'"{value}"' if isinstance(value, str) else _default(value)
            lines.append(f"{p.name} = {shown}")
    return lines


def _method_document(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "label": method.label,
        "kind": method.kind,
        "inputs": list(method.inputs),
        "optional_inputs": method.optional,
        "models": method.min_variadic if method.variadic else 0,
        "random": method.random,
        "delta": method.delta,
        "doc": method.doc,
        "params": [
            {
                "name": p.name,
                "type": p.type.__name__,
                "required": p.required,
                "default": None if p.required else p.default,
                "low": p.range.low,
                "high": p.range.high,
                "choices": list(p.choices),
            }
            for p in method.params
        ],
    }


# --- doctor -------------------------------------------------------------------------------------


def doctor(
    folder: Annotated[
        Path, argument("Where to measure the disk, with a temporary file of 256 MiB.")
    ] = Path("."),
    /,
    *,
    json: Json = False,
) -> int:
    """Test this installation, processor and disk.

    Versions, the arithmetic against float64 on this processor, memory and disk speed. Exit code 1
    if results cannot be trusted here.
    """
    from plymix.doctor import rows

    if not os.path.isdir(folder):
        from plymix.errors import Refusal

        raise Refusal(f"{folder} is not a folder; name the one where your models are")
    found = []
    for row in rows(folder):
        found.append(row)
        if not json:
            mark = "" if row.status == "ok" else f"{row.status}: "
            screen.put(f"{row.topic:<15} {mark}{row.text}")
    if json:
        screen.put_json([row.to_dict() for row in found])
    return 1 if any(row.status == "error" for row in found) else 0
