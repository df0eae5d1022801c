"""`mbw`, `merge` and `explain`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plymix.cli import screen
from plymix.cli.options import (
    Device,
    DryRun,
    Folders,
    Force,
    Json,
    Merge,
    OnDevice,
    Output,
    Presets,
    Settings,
    Threads,
    argument,
    checked_threads,
    option,
    weight,
)
from plymix.cli.recipes import load, planned
from plymix.errors import Refusal, listed

if TYPE_CHECKING:
    from plymix.api import Explanation, Result, Share
    from plymix.plan import Plan
    from plymix.recipe import Recipe
    from plymix.weights import Resolved

EXAMPLES = {
    "mbw": "Example:\n  PROG model1.ckpt model2.ckpt --base_alpha 1.0 --weights GRAD_V --verbose",
    "merge": "Example:\n  PROG a.safetensors b.safetensors -o ab.safetensors --alpha GRAD_V"
    " --base 0.3",
    "explain": "Examples:\n  PROG a.safetensors b.safetensors --alpha GRAD_V\n  PROG recipe.toml",
}

# --- mbw ----------------------------------------------------------------------------------------


def mbw(
    model_1: Annotated[str, argument("The first source model.")],
    model_2: Annotated[str, argument("The second source model.")],
    /,
    *,
    base_alpha: Annotated[
        float | None,
        weight(
            "Share of model 1 in text encoder and VAE: 1.0 is model 1. [default: 0.5]",
            "--base_alpha",
            "--base-alpha",
            metavar="F",
            default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        weight(
            "Share of model 1 in each block: 25 numbers (SDXL: 19) or a preset's name.",
            metavar="LIST|PRESET",
            default=False,
        ),
    ] = None,
    presets: Presets = "",
    verbose: Annotated[
        bool, option("Show each block's ratio before merging.", default=False)
    ] = False,
    device: OnDevice = "cpu",
    output: Annotated[
        str,
        option(
            "The result, .safetensors or .ckpt. [default: MODEL_1-MODEL_2-mbw.safetensors]",
            "--output",
            "-o",
            default=False,
            metavar="FILE",
        ),
    ] = "",
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge two models by blocks; numbers are the share of model 1.

    1.0 is 100 % MODEL_1, 0 is 100 % MODEL_2: the other way round than in plymix merge, where alpha
    is the share of the second model. The blocks are IN00-IN11 (time_embed counts as IN00), M00 and
    OUT00-OUT11 (out. counts as OUT11). Without --weights everything is merged at --base_alpha.
    """
    from plymix import api

    path = Path(output or default_name(model_1, model_2))
    api.ready(path, force)
    recipe, shares, notes = classic(model_1, model_2, base_alpha, weights, presets)
    with planned(recipe) as plan:
        for text in notes:
            screen.note(text)
        formula = classic_formula(Path(model_1).name, Path(model_2).name, shares, weights)
        if verbose and not json:
            show_blocks(api.explained(plan).blocks, (Path(model_1).name, Path(model_2).name))
        result = carry_out(plan, path, 0, device)
    if json:
        screen.put_json({**result.to_dict(), "formula": formula, "share_of_model_1": shares})
    else:
        screen.put(made(result, formula))


def classic(
    model_1: str, model_2: str, base_alpha: float | None, weights: str | None, presets: str = ""
) -> tuple[Recipe, dict[str, float], tuple[str, ...]]:
    """The recipe of `mbw`, model 1's share in BASE (and VAE) and each block, and notes.

    The recipe, as every recipe, tells the share of model 2. Raises Refusal.
    """
    from plymix import api
    from plymix import weights as settings

    base: Any = None if base_alpha is None else settings.from_toml(base_alpha, field="--base_alpha")
    flat = 0.5 if base is None else base
    alpha: Any = rest(flat)
    shares = {"BASE": flat}
    notes: tuple[str, ...] = ()
    if weights is not None:
        found = _resolved(model_1, weights, base, api.own_presets(presets))
        if found is not None:
            if found.base is not None:
                shares = {"BASE": found.base}
                if base is None:
                    notes += (f"text encoder and VAE take the BASE value, {found.base:g}",)
            notes += found.notes
            alpha = {
                "base": rest(shares["BASE"]),
                "blocks": [rest(value) for value in found.blocks.values()],
            }
            shares |= found.blocks
    return api.two_models(model_1, model_2, alpha=alpha, vae="blend"), shares, notes


def _resolved(
    model: str, text: str, base: float | None, own: Mapping[str, Sequence[float]]
) -> Resolved | None:
    """The weights for the blocks of `model`; None if it is no model (the plan says so better)."""
    from plymix import api, pairing
    from plymix import weights as settings

    setting = settings.parse(text, field="--weights", blocks=settings.SD1_BLOCKS, own=own)
    if isinstance(setting, float):
        setting = (setting,)  # a list of one: refused with the number that is expected
    with api.open(model) as source:
        arch = pairing.pair(source).detection.arch
    if arch is None:
        return None
    return settings.resolve(
        setting, arch.blocks, base=base, arch_title=arch.short, field="--weights"
    )


def rest(share: float) -> float:
    """1 - share in the decimals it was written with: 0.9166666667 -> 0.0833333333."""
    return float(1 - Decimal(repr(share)))


def default_name(model_1: str, model_2: str) -> str:
    """'model1-model2-mbw.safetensors', in the current folder."""
    stems = (re.sub(r"[^\w.+()-]+", "_", Path(model).stem) for model in (model_1, model_2))
    short = (stem.encode()[:100].decode(errors="ignore") for stem in stems)
    return f"{'-'.join(short)}-mbw.safetensors"


def classic_formula(
    model_1: str, model_2: str, shares: Mapping[str, float], weights: str | None
) -> str:
    """The merge in one line, in percent of both models."""

    def both(share: float) -> str:
        parts = ((share, model_1), (rest(share), model_2))
        return " + ".join(f"{screen.percent(part)} {name}" for part, name in parts if part)

    blocks = [value for name, value in shares.items() if name != "BASE"]
    if not blocks:
        return both(shares["BASE"])
    what = weights if weights and re.match("[A-Za-z]", weights) else f"{len(blocks)} weights"
    low, high = screen.percent(min(blocks)), screen.percent(max(blocks))
    span = low if low == high else f"{low} to {high}"
    return (
        f"w × {model_1} + (1 - w) × {model_2}, w = {what} ({span}) in the U-Net;"
        f" text encoder and VAE {both(shares['BASE'])}"
    )


# --- merge and explain --------------------------------------------------------------------------


def merge(
    a: Annotated[str, argument("The first model.")],
    b: Annotated[str, argument("The second model.")],
    /,
    *,
    output: Output = "",
    options: Merge = Merge(),  # noqa: B008  (frozen)
    force: Force = False,
    threads: Threads = 0,
    device: OnDevice = "cpu",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Merge two models; alpha is the share of the second, B.

    0 is exactly A, 1 is exactly B. A list has one number per block: 25 for SD1 and SD2, 19 for
    SDXL, or one more with BASE (the text encoder) first. The VAE is A's unless --vae says
    otherwise.
    """
    from plymix import api

    if output or not dry_run:
        path = api.output_path(a, output)
        api.ready(path, force)
    checked_threads(threads)
    recipe = api.two_models(a, b, **options.recipe_options())
    with planned(recipe, strict=options.strict) as plan:
        if dry_run:
            show_plan(plan, json)
        else:
            show_result(plan, carry_out(plan, path, threads, device), json)


def explain(
    a: Annotated[str, argument("The first model, or a recipe (.toml, .json).")],
    b: Annotated[str | None, argument("The second model.")] = None,
    /,
    *,
    output: Output = "",
    options: Merge = Merge(),  # noqa: B008  (frozen)
    force: Force = False,
    threads: Threads = 0,
    device: OnDevice = "cpu",
    set: Settings = (),
    models: Folders = (),
    json: Json = False,
) -> None:
    """Show what a merge or a recipe would do; nothing is written.

    What each block and component becomes, how many tensors are merged or copied, what is left out,
    bytes read and written, memory. Takes the arguments of plymix merge, or a recipe file with those
    of plymix run.
    """
    from plymix import api

    checked_threads(threads)
    if b is None:
        if Path(a).suffix.lower() not in (".toml", ".json"):
            raise Refusal(f"{a}: explain wants two models, or one recipe (.toml or .json)")
        said = [k for k, v in options.__dict__.items() if v != getattr(Merge(), k)]
        if extra := [
            f"--{name.replace('_', '-')}" for name in said if name not in ("strict", "presets")
        ]:
            raise Refusal(f"{', '.join(extra)} is for two models; a recipe says it itself")
        recipe, folders = load(a, set, models, options.presets)
    else:
        if set:
            raise Refusal("--set is for recipes; for two models say --alpha and the like")
        recipe, folders = api.two_models(a, b, **options.recipe_options()), [*models]
    file = output or recipe.output.file
    if output:
        api.ready(Path(file), force)
    with planned(recipe, folders, strict=options.strict) as plan:
        show_plan(plan, json)


# --- what is shown ------------------------------------------------------------------------------


def carry_out(plan: Plan, path: Path, threads: int, device: Device) -> Result:
    """Run a plan with its notes and a progress line."""
    from plymix import api

    for text in remarks(plan):
        screen.note(text)
    with screen.ProgressLine() as progress:
        result = api.run(
            plan, path, threads=checked_threads(threads), device=device, progress=progress
        )
    for text in result.notes[len(plan.notes) :]:  # what only the work could tell
        screen.note(text)
    return result


def remarks(plan: Plan) -> Iterator[str]:
    """What a user should know of a plan: its notes, dropped EMA weights, keys without a partner."""
    yield from plan.notes
    for i in plan.inputs:
        for rule, keys in plan.dropped.get(i.name, {}).items():
            if rule.startswith("ema") and i.name in plan.recipe.models:
                done = "left out" if rule == "ema = drop" else "replaced by their EMA copies"
                yield f"{i.label}: {len(keys)} tensors {done} ({rule})"
        told = {*i.strangers, *i.paired.unpaired}
        alone = [k for k in plan.unmatched.get(i.name, ()) if k not in told]
        if alone and i is not plan.base:
            yield f"{i.label}: {len(alone)} tensors without a partner, left out: {listed(alone)}"


def show_result(plan: Plan, result: Result, json: bool) -> None:
    if json:
        screen.put_json(result.to_dict())
    else:
        screen.put(made(result, result.formula))


def made(result: Result, formula: str) -> str:
    """The line that ends a merge: what was made, of what, how large, how fast."""
    from plymix.api import size

    return (
        f"{result.path.name} = {formula} [{size(result.nbytes)}, {result.seconds:.1f} s;"
        f" {result.merged} tensors merged, {result.copied} copied; of the inputs"
        f" {result.dropped} unused, {result.unmatched} unmatched]"
    )


def show_plan(plan: Plan, json: bool) -> None:
    from plymix import api

    explanation = api.explained(plan)
    for text in (*remarks(plan), *explanation.notes[len(plan.notes) :]):
        screen.note(text)
    if json:
        screen.put_json(explanation.to_dict())
        return
    screen.put(explanation.formula)
    screen.put(explanation.architecture)
    screen.put("")
    show_blocks(explanation.blocks, [i.label for i in plan.inputs])
    screen.put("")
    for line in totals(explanation, {i.name: i.label for i in plan.inputs}):
        screen.put(line)


def totals(explanation: Explanation, labels: Mapping[str, str]) -> Iterator[str]:
    from plymix.api import size

    yield f"{explanation.merged} tensors merged, {explanation.copied} copied"
    for name, rules in explanation.dropped.items():
        for rule, n in rules.items():
            yield f"{n} of {labels.get(name, name)} left out: {rule}"
    for name, keys in explanation.unmatched.items():
        if keys:
            yield f"{len(keys)} of {labels.get(name, name)} unmatched: {listed(keys)}"
    yield (
        f"reads {size(explanation.bytes_read)}, writes {size(explanation.bytes_written)},"
        f" needs at most {size(explanation.memory)} of memory; nothing was written"
    )


Row = tuple[str, Mapping[str, float], str, int, int]
"""Block, share of each file, methods, tensors merged, tensors copied."""


def rows(shares: Iterable[Share]) -> list[Row]:
    """One row per block; components of a block that are treated alike are one."""
    found: dict[Any, Row] = {}
    for s in shares:
        key = (s.block, tuple(s.shares.items()), s.method)
        _, _, _, merged, copied = found.get(key, ("", {}, "", 0, 0))
        found[key] = (s.block, s.shares, s.method, merged + s.merged, copied + s.copied)
    return list(found.values())


def show_blocks(shares: Iterable[Share], files: Iterable[str]) -> None:
    """The table of blocks: bars between two files' shares; for more files, the shares in words."""
    known = rows(shares)
    used = [f for f in dict.fromkeys(files) if any(f in row[1] for row in known)]
    plain_mix = all(not row[2] and abs(sum(row[1].values()) - 1) < 1e-6 for row in known)
    if len(used) <= 2 and plain_mix:
        _two_files(known, [*used, *(f for f in files if f not in used)][:2])
    else:
        _many_files(known)


def _two_files(known: list[Row], files: list[str]) -> None:
    first, second = (*files, "")[:2]
    counted = screen.width() >= 72
    side = max(9, min(24, (screen.width() - 46) // 2 if counted else (screen.width() - 24) // 2))
    cells = max(8, min(30, screen.width() - 8 - 2 * (side + 2) - 16 * counted))
    made = screen.grid()
    made.add_column("block")
    made.add_column(screen.cell(screen.shortened(first, side)), justify="right", no_wrap=True)
    made.add_column("", width=cells, no_wrap=True)
    made.add_column(screen.cell(screen.shortened(second, side)), no_wrap=True)
    if counted:
        made.add_column("merged", justify="right")
        made.add_column("copied", justify="right")
    for block, mix, _, merged, copied in known:
        share = mix.get(first, 0.0)
        drawn = screen.bar(share, cells)
        counts = (str(merged), str(copied)) if counted else ()
        made.add_row(
            block,
            screen.percent(share),
            drawn,
            screen.percent(mix.get(second, 0.0)),
            *counts,
        )
    screen.draw(made)


def _many_files(known: list[Row]) -> None:
    def told(mix: Mapping[str, float], methods: str) -> str:
        parts = [f"{screen.percent(c)} {name}" for name, c in mix.items()]
        return " + ".join(parts).replace("+ -", "- ") + (f" by {methods}" if methods else "")

    screen.table(
        ("block", ">merged", ">copied", "made of"),
        [(b, str(m), str(c), told(mix, how).strip()) for b, mix, how, m, c in known],
    )
