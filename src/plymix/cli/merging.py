"""`mbw`, `merge` and `explain`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plymix import urls
from plymix.cli import screen
from plymix.cli.options import (
    Arch,
    BlockView,
    Configs,
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
from plymix.cli.recipes import load, note_presets, planned
from plymix.cli.showing import carry_out, finish, made, mixed, show_blocks
from plymix.cli.typed import typed, words
from plymix.errors import Refusal

if TYPE_CHECKING:
    from plymix.recipe import Recipe
    from plymix.weights import Resolved

EXAMPLES = {
    "mbw": "Example:\n  PROG model1.ckpt model2.ckpt --base_alpha 1.0 --weights GRAD_V --verbose",
    "merge": "Example:\n  PROG a.safetensors b.safetensors -o ab.safetensors --alpha GRAD_V"
    " --base 0.3",
    "explain": "Examples:\n  PROG a.safetensors b.safetensors --alpha GRAD_V\n  PROG recipe.toml",
}

ALSO_OF_RECIPES = ("strict", "presets", "arch", "block_view")
"""Options of a merge of two models that a recipe takes too."""

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
    arch: Arch = "",
    block_view: BlockView = None,
    vae: Annotated[str, option("Take the VAE from this file.", metavar="FILE", default=False)] = "",
    text_encoder: Annotated[
        str, option("Take the text encoder from this file.", metavar="FILE", default=False)
    ] = "",
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

    note_presets(presets)
    said = "--base_alpha" if weights is None else "--weights"
    with typed(said):
        recipe, shares, notes = classic(
            model_1,
            model_2,
            base_alpha,
            weights,
            presets,
            arch,
            block_view or "classic",
            vae=vae,
            text_encoder=text_encoder,
        )
        recipe, path = api.target(recipe, output or default_name(model_1, model_2), force)
        assert path is not None
        with planned(recipe, words=partial(_of_model_1, said)) as plan:
            for text in notes:
                screen.note(text)
            formula = classic_formula(urls.name(model_1), urls.name(model_2), shares, weights)
            for what, file in (("VAE", vae), ("text encoder", text_encoder)):
                formula += f"; {what} of {urls.name(file)}" if file else ""
            if verbose and not json:
                show_blocks(api.explained(plan).blocks, (urls.name(model_1), urls.name(model_2)))
            result = carry_out(plan, path, 0, device)
    if json:
        screen.put_json({**result.to_dict(), "formula": formula, "share_of_model_1": shares})
    else:
        screen.put(made(result, formula))


def classic(
    model_1: str,
    model_2: str,
    base_alpha: float | None,
    weights: str | None,
    presets: str = "",
    arch: str = "",
    block_view: str = "classic",
    *,
    vae: str = "",
    text_encoder: str = "",
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
        own = api.own_presets(presets)
        found = _resolved(model_1, weights, base, own, arch, block_view)
        if found is not None:
            if found.base is not None:
                shares = {"BASE": found.base}
                if base is None:
                    notes += (f"text encoder and VAE take the BASE value, {found.base:g}",)
            notes += found.notes
            blocks = found.blocks | found.parts
            others = {name: rest(value) for name, value in blocks.items()}
            alpha = {"blocks": others if found.parts else [*others.values()]}
            if not (vae and text_encoder):  # from files: nothing takes the share of BASE
                alpha["base"] = rest(shares["BASE"])
            shares |= blocks
    recipe = api.two_models(
        model_1,
        model_2,
        alpha=alpha,
        vae=vae or "blend",
        text_encoder=text_encoder,
        arch=arch,
        block_view=block_view,
    )
    return recipe, shares, notes


def _resolved(
    model: str,
    text: str,
    base: float | None,
    own: Mapping[str, Sequence[float]],
    arch: str,
    tool: str,
) -> Resolved | None:
    """The weights for the blocks of `model`; None if it is no model (the plan says so better)."""
    from plymix import api, archs, pairing
    from plymix import weights as settings
    from plymix.archs.views import view

    setting = settings.parse(text, field="--weights", blocks=settings.SD1_BLOCKS, own=own)
    if arch == "any":
        raise Refusal("--arch any knows no blocks for --weights; leave one of them out")
    with api.open(model) as source:
        found = pairing.pair(source, own=archs.described(arch))
    known = found.detection.arch
    if known is None:
        return None
    there = {place.block for key in found.tensors if (place := known.place(key))}
    seen = view(known, tool, there)
    if isinstance(setting, float):
        raise Refusal(
            f"--weights {text} is one number; {known.short} wants {len(seen.blocks)},"
            f" or a preset's name. To merge everything at {text}, say --base_alpha {text} and no"
            " --weights"
        )
    return settings.resolve(
        setting,
        seen.blocks,
        base=base,
        arch_title=known.short,
        field="--weights",
        lists=seen.lists,
        names=seen.names,
    )


def _of_model_1(option: str, note: str) -> str:
    """A plan's note, which speaks of the share of model 2, in the words of `mbw`."""

    def turned(found: re.Match[str]) -> str:
        return f"alpha goes to {rest(float(found[1])):g}:"

    return words(re.sub(r"alpha goes to (\S+):", turned, note), option)


def rest(share: float) -> float:
    """1 - share in the decimals it was written with: 0.9166666667 -> 0.0833333333."""
    return float(1 - Decimal(repr(share)))


def default_name(model_1: str, model_2: str) -> str:
    """'model1-model2-mbw.safetensors', in the current folder."""
    from plymix import outputs

    stems = (
        re.sub(r"[^\w.+()-]+", "_", Path(urls.name(model)).stem) for model in (model_1, model_2)
    )
    return f"{'-'.join(outputs.shortened(stem, '', 100) for stem in stems)}-mbw.safetensors"


def classic_formula(
    model_1: str, model_2: str, shares: Mapping[str, float], weights: str | None
) -> str:
    """The merge in one line, in percent of both models."""

    def both(share: float) -> str:
        parts = ((share, model_1), (rest(share), model_2))
        return mixed((name, part) for part, name in parts if part)

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
    configs: Configs = "",
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

    checked_threads(threads)
    note_presets(options.presets)
    with typed():
        recipe = api.two_models(a, b, **options.recipe_options())
        recipe, path = api.target(recipe, output, force, dry=dry_run)
        with planned(recipe, strict=options.strict, words=words) as plan:
            finish(plan, path, json, dry_run, threads, device, configs)


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
    configs: Configs = "",
    json: Json = False,
) -> None:
    """Show what a merge or a recipe would do; nothing is written.

    What each block and component becomes, how many tensors are merged or copied, what is left out,
    bytes read and written, memory. Takes the arguments of plymix merge, or a recipe file with those
    of plymix run.
    """
    from plymix import api

    def _explain(recipe: Recipe, beside: Sequence[str] = (), **how: Any) -> None:
        recipe, path = api.target(recipe, output, force, (*models, *beside), dry=True)
        with planned(recipe, models, beside, strict=options.strict, **how) as plan:
            finish(plan, path, json, True, device=device, configs=configs)

    checked_threads(threads)
    if b is None:
        if Path(a).suffix.lower() not in (".toml", ".json"):
            raise Refusal(f"{a}: explain wants two models, or one recipe (.toml or .json)")
        said = [k for k, v in options.__dict__.items() if v != getattr(Merge(), k)]
        if extra := [f"--{name.replace('_', '-')}" for name in said if name not in ALSO_OF_RECIPES]:
            raise Refusal(f"{', '.join(extra)} is for two models; a recipe says it itself")
        recipe, beside = load(
            a,
            set,
            options.presets,
            arch=options.arch,
            block_view=options.block_view or "",
        )
        _explain(recipe, beside)
        return
    if Path(a).suffix.lower() == ".toml":
        raise Refusal(f"{a} is a recipe, which names its models itself; leave out {b}")
    if set:
        raise Refusal("--set is for recipes; for two models say --alpha and the like")
    note_presets(options.presets)
    with typed():
        _explain(api.two_models(a, b, **options.recipe_options()), words=words)
