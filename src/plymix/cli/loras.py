"""`lora bake` and `lora inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from plymix.cli import screen
from plymix.cli.options import (
    DryRun,
    Force,
    Json,
    Lbw,
    LoraDir,
    OnDevice,
    OneDtype,
    Output,
    Threads,
    argument,
    checked_threads,
    option,
)
from plymix.cli.recipes import planned
from plymix.cli.showing import finish
from plymix.cli.typed import typed

if TYPE_CHECKING:
    from plymix.adapters.report import Found

EXAMPLES = {
    "lora bake": "Examples:\n  PROG base.safetensors style.safetensors:0.8 eyes.safetensors:-0.3"
    ' -o out.safetensors\n  PROG base.safetensors "<lora:style:0.8:lbw=OUTALL>" --lora-dir loras'
    " -o out.safetensors",
    "lora inspect": "Example:\n  PROG style.safetensors --base base.safetensors",
}


def bake(
    base: Annotated[str, argument("The model.")],
    /,
    *loras: Annotated[str, argument("FILE, FILE:STRENGTH, FILE:STRENGTH:TEXT_STRENGTH or a tag.")],
    output: Output = "",
    lbw: Lbw = "",
    rules: Annotated[
        tuple[str, ...],
        option(
            "A factor by element rule (IN05-OUT03:attn2:0); repeatable.",
            default=False,
            metavar="RULE",
        ),
    ] = (),
    lora_dir: LoraDir = (),
    dora: Annotated[
        Literal["trained", "comfyui"],
        option("Whose norms a DoRA divides rows by: the changed or the base weight's."),
    ] = "trained",
    dtype: OneDtype = "keep",
    strict: Annotated[bool, option("Refuse a LoRA that does not match whole.", default=False)] = (
        False
    ),
    force: Force = False,
    threads: Threads = 0,
    device: OnDevice = "cpu",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Add LoRAs to a model, in one pass, exactly.

    Every LoRA's strength is 1 if none is given; it may be negative, and the order does not matter.
    A tag of a prompt, <lora:name:0.8:lbw=IND>, does as well as a file: there the first of two
    numbers is the text encoder's, as in A1111. LoRA, LoCon, LoHa, LoKr, GLoRA, IA3, OFT, BOFT and
    DoRA in every trainer's spelling.
    """
    from dataclasses import replace

    from plymix import api
    from plymix.adapters import asking

    checked_threads(threads)
    parent = Path(base).expanduser().parent
    found = asking.asked(loras, lora_dir or (parent, "."))
    blocks = asking.factors(lbw) if lbw else None
    each = [
        replace(
            lora, blocks=blocks if lora.blocks is None else lora.blocks, rules=lora.rules or rules
        )
        for lora in found
    ]
    with typed():
        recipe = asking.recipe(base, each, dora=dora, dtype=dtype)
        recipe, path = api.target(recipe, output, force, dry=dry_run)
        with planned(recipe, strict=strict) as plan:
            finish(plan, path, json, dry_run, threads, device)


def inspect(
    file: Annotated[str, argument("The LoRA.")],
    /,
    *,
    base: Annotated[
        str, option("A model to compare it with.", default=False, metavar="MODEL")
    ] = "",
    json: Json = False,
) -> None:
    """Show what a LoRA is, holds and fits.

    Its family, ranks and alphas, how many modules it changes in each block, what its metadata says,
    and the model it is for. With --base: which of its modules are in that model.
    """
    from plymix import api, pairing
    from plymix.adapters import Names, read
    from plymix.adapters.report import report

    with api.open(file) as source:
        adapter = read(source)
        if not base:
            found = report(adapter)
        else:
            with api.open(base) as model:
                paired = pairing.pair(model)
                arch = paired.detection.require(model.path.name) if not paired.dialect else None
                arch = arch or paired.detection.arch
                assert arch is not None
                places = {key: arch.place(key) for key in paired.tensors}
                shapes = {p.key: paired.tensors[k].shape for k, p in places.items() if p}
                found = report(adapter, Names(arch, shapes), model.path.name)
    if json:
        screen.put_json(found.to_dict())
    else:
        _show(found)


def _show(found: Found) -> None:
    from plymix.api import size
    from plymix.errors import amount, listed

    def counted(values: object) -> str:
        items = dict(values).items()  # type: ignore[call-overload]
        return ", ".join(f"{name} ({n})" for name, n in items)

    screen.put(f"{found.file}: {found.title}")
    rows = [
        ("size", size(found.nbytes)),
        ("modules", f"{found.modules}: {counted(found.algorithms)}"),
        ("rank", counted(found.ranks)),
        ("alpha", counted(found.alphas) or "none"),
        ("dtype", counted(found.dtypes)),
        *((why, amount(n)) for why, n in found.others.items()),
        *found.metadata.items(),
    ]
    if found.base:
        fit = f"{found.matched} of {found.modules} modules are in it"
        lost = f"; not in it: {listed(found.unmatched)}" if found.unmatched else ""
        rows.append((found.base, fit + lost))
    screen.table(("", ""), [(name, text) for name, text in rows if text], wrap=1)
    screen.put("")
    screen.table(("block", ">modules"), [(name, str(n)) for name, n in found.blocks.items()])
