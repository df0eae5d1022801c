"""`extract`, `prune` and `repair`: one model in, one file out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from plymix.cli import screen
from plymix.cli.options import (
    Arch,
    Configs,
    Dtypes,
    Force,
    InLayout,
    Json,
    Output,
    OwnArch,
    Shard,
    Threads,
    argument,
    option,
)
from plymix.cli.showing import worked

if TYPE_CHECKING:
    from plymix.upkeep import Upkeep

EXAMPLES = {
    "extract": "Example:\n  PROG model.safetensors --component vae -o vae.safetensors",
    "prune": "Example:\n  PROG model.ckpt -o model-pruned.safetensors --dtype fp16",
    "repair": "Example:\n  PROG model.safetensors -o mended.safetensors",
}

Ema = Literal["drop", "keep", "use"]
Preview = Annotated[bool, option("Say what would be done; nothing is written.", default=False)]


def extract(
    file: Annotated[str, argument("A model.")],
    /,
    *,
    component: Annotated[
        str, option("vae, text_encoder, unet ...: plymix archs NAME lists them.", default=False)
    ],
    output: Output = "",
    keep_prefix: Annotated[
        bool, option("Keep the names that the keys have in the model.", default=False)
    ] = False,
    dtype: Dtypes = "keep",
    ema: Annotated[
        Literal["drop", "use"], option("use: the denoiser's EMA weights in place of the others.")
    ] = "drop",
    layout: InLayout = None,
    shard: Shard = "",
    configs: Configs = "",
    arch: Arch = "",
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write one component of a model into a file of its own.

    The result has the names that such files usually have. Merges take it with --vae,
    --text-encoder, --text-encoder-2 and --unet, with prefix or without.
    """
    from plymix import upkeep

    options: dict[str, Any] = {"keep_prefix": keep_prefix, "dtype": dtype, "ema": ema}
    options |= {"layout": layout or "", "shard": shard or 0, "configs": configs, "arch": arch}
    _show(worked(upkeep.extract, (file, component), output, dry_run, force, threads, options), json)


def prune(
    file: Annotated[str, argument("A model.")],
    /,
    *,
    output: Output = "",
    drop: Annotated[
        tuple[str, ...],
        option(
            "Leave out this too: a component (vae, text_encoder ...), schedules, unknown,"
            " metadata; repeatable.",
            default=False,
            metavar="WHAT",
        ),
    ] = (),
    ema: Annotated[
        Ema, option("EMA weights: leave out, keep, or use in place of the others.")
    ] = "drop",
    dtype: Dtypes = "keep",
    layout: InLayout = None,
    shard: Shard = "",
    configs: Configs = "",
    arch: Arch = "",
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write a model without what only training needs.

    That is EMA weights, losses and optimizers. Says what was left out and how much it saved.
    """
    from plymix import upkeep

    options: dict[str, Any] = {"drop": drop, "ema": ema, "dtype": dtype}
    options |= {"layout": layout or "", "shard": shard or 0, "configs": configs, "arch": arch}
    _show(worked(upkeep.prune, (file,), output, dry_run, force, threads, options), json)


def repair(
    file: Annotated[str, argument("A model, or a part of one.")],
    /,
    *,
    output: Output = "",
    shard: Shard = "",
    configs: Configs = "",
    arch: OwnArch = "",
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Put right what is broken in a model, and nothing else.

    CLIP position ids (damaged, or of a wrong number format), text encoder names of the NovelAI era,
    tensors that do not lie in one piece. Each repair is listed. Where nothing is broken, nothing is
    written.
    """
    from plymix import upkeep

    options = {"shard": shard or 0, "configs": configs, "arch": arch}
    found = worked(upkeep.repair, (file,), output, dry_run, force, threads, options)
    if json or found.repairs:
        _show(found, json)
    else:
        screen.put(f"{found.formula}: nothing to repair; nothing was written")


def _show(found: Upkeep, json: bool) -> None:
    if json:
        screen.put_json(found.to_dict())
        return
    for line in _lines(found):
        screen.put(line)


def _lines(found: Upkeep) -> Iterator[str]:
    from plymix.api import size
    from plymix.errors import amount, listed

    for one in found.repairs:
        yield f"{one.kind}: {one.key}: {one.text}"
    for rule in found.left_out:
        what = amount(len(rule.keys))
        yield f"{what}, {size(rule.nbytes)}, left out ({rule.rule}): {listed(rule.keys, 3)}"
    name = found.path.name if found.path else "the result"
    would = "" if found.path else " would be"
    less = found.left_out and found.saved > 0
    saved = f"; {size(found.saved)} of {size(found.before)} saved" if less else ""
    took = f", {found.seconds:.1f} s" if found.path else ""
    yield (
        f"{name}{would} = {found.formula} [{size(found.after)}, {amount(found.tensors)}{took}]"
        + saved
        + ("" if found.path else "; nothing was written")
    )
