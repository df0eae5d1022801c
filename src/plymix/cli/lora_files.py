"""`lora merge`, `lora extract`, `lora resize` and `lora convert`: LoRA files made of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from plymix.cli import screen
from plymix.cli.options import (
    Force,
    Json,
    Lbw,
    LoraDir,
    OneDtype,
    Threads,
    Whole,
    WholeOrNone,
    argument,
    option,
)
from plymix.cli.showing import worked

if TYPE_CHECKING:
    from plymix.loras import Made

EXAMPLES = {
    "lora merge": "Examples:\n  PROG style.safetensors:0.7 eyes.safetensors:-0.3"
    " -o both.safetensors\n  PROG style.safetensors eyes.safetensors --rank 32 -o both.safetensors",
    "lora extract": "Example:\n  PROG tuned.safetensors base.safetensors --rank 32"
    " -o lora.safetensors",
    "lora resize": "Example:\n  PROG big.safetensors --energy 0.99 -o small.safetensors",
    "lora convert": "Example:\n  PROG style.safetensors --to diffusers -o style-d.safetensors",
}

To = Literal["kohya", "kohya-diffusers", "lycoris", "diffusers", "peft", "comfyui"]
Output = Annotated[
    str, option("The result: .safetensors.", "--output", "-o", default=False, metavar="FILE")
]
Rank = Annotated[
    WholeOrNone, option("Give every module this rank at most.", default=False, metavar="N")
]
ConvRank = Annotated[
    WholeOrNone, option("Another rank for convolution kernels.", default=False, metavar="N")
]
Energy = Annotated[
    float | None,
    option(
        "Keep this share of each module's change (of its squared numbers): 0.99.",
        default=False,
        metavar="F",
    ),
]
Size = Annotated[
    str | None,
    option(
        "Make the file this large, with ranks where they matter most: 150MB.",
        default=False,
        metavar="SIZE",
    ),
]
Base = Annotated[
    str,
    option(
        "A model they fit, to take names from; only for models that plymix does not know.",
        default=False,
        metavar="MODEL",
    ),
]
Spelling = Annotated[
    To | None, option("Whose spelling. [default: the first file's]", default=False)
]
Seed = Annotated[Whole, option("Of random numbers, where there are any.", metavar="N")]
Strict = Annotated[
    bool, option("Refuse files with tensors that are no part of a LoRA.", default=False)
]
Preview = Annotated[bool, option("Compute, show, and write nothing.", default=False)]


def merge(
    *loras: Annotated[str, argument("FILE, FILE:STRENGTH, FILE:STRENGTH:TEXT_STRENGTH or a tag.")],
    output: Output = "",
    rank: Rank = None,
    energy: Energy = None,
    size: Size = None,
    lbw: Lbw = "",
    lora_dir: LoraDir = (),
    to: Spelling = None,
    base: Base = "",
    dtype: OneDtype = "keep",
    seed: Seed = 0,
    strict: Strict = False,
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write one LoRA that does what several do together.

    Their changes are added, each times its strength, which may be negative. The result is exact
    unless --rank, --energy or --size asks for a smaller file; what that loses is shown by block.
    """
    from plymix import loras as making
    from plymix.adapters import asking

    options: dict[str, Any] = {"rank": rank, "energy": energy, "size": size}
    options |= {"to": to or "", "base": base}
    options |= {"lbw": asking.factors(lbw) if lbw else None, "strict": strict, "seed": seed}
    options |= {"folders": lora_dir or (".",)}
    _run(making.merge, (loras,), output, options, dtype, dry_run, force, threads, json)


def extract(
    tuned: Annotated[str, argument("The model to describe.")],
    base: Annotated[str, argument("The model that the LoRA is to be used with.")],
    /,
    *,
    output: Output = "",
    rank: Rank = None,
    conv_rank: ConvRank = None,
    energy: Energy = None,
    size: Size = None,
    family: Annotated[Literal["lora", "lokr"], option("lokr: Kronecker products.")] = "lora",
    factor: Annotated[
        WholeOrNone,
        option(
            "LoKr: largest side of the small factor. [default: -1, about the root]",
            default=False,
            metavar="N",
        ),
    ] = None,
    no_text_encoders: Annotated[
        bool, option("Leave out the text encoders.", "--no-text-encoders", default=False)
    ] = False,
    no_conv: Annotated[bool, option("Leave out convolution kernels.", default=False)] = False,
    diffs: Annotated[
        bool, option("With norms and biases, as whole differences.", default=False)
    ] = False,
    to: Annotated[To, option("Whose spelling.")] = "kohya",
    dtype: OneDtype = "keep",
    seed: Seed = 0,
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write the LoRA that makes one model of another.

    It comes as near as its size allows: --rank, --energy or --size. What is lost is shown by block.
    Text encoders and convolutions are in it. One tensor is in memory for each thread.
    """
    from plymix import loras as making

    options: dict[str, Any] = {"rank": rank, "conv_rank": conv_rank, "energy": energy}
    options |= {"size": size, "family": family, "factor": factor, "diffs": diffs}
    options |= {"text_encoders": not no_text_encoders, "conv": not no_conv, "to": to, "seed": seed}
    _run(making.extract, (tuned, base), output, options, dtype, dry_run, force, threads, json)


def resize(
    file: Annotated[str, argument("The LoRA.")],
    /,
    *,
    output: Output = "",
    rank: Rank = None,
    conv_rank: ConvRank = None,
    energy: Energy = None,
    size: Size = None,
    to: Spelling = None,
    base: Base = "",
    dtype: OneDtype = "keep",
    seed: Seed = 0,
    strict: Strict = False,
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write a LoRA with other ranks.

    Its strength stays what it was. --rank is for all modules; with --energy and --size each gets
    what it needs. What is lost is shown by block. LoHa, LoKr and whole differences become LoRAs.
    """
    from plymix import loras as making

    options = {"rank": rank, "conv_rank": conv_rank, "energy": energy, "size": size}
    options |= {"to": to or "", "base": base, "strict": strict, "seed": seed}
    _run(making.resize, (file,), output, options, dtype, dry_run, force, threads, json)


def convert(
    file: Annotated[str, argument("The LoRA.")],
    /,
    *,
    to: Annotated[To, option("Whose spelling.", default=False)],
    output: Output = "",
    base: Base = "",
    dtype: OneDtype = "keep",
    strict: Strict = False,
    dry_run: Preview = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Write a LoRA in another program's spelling.

    What it does stays the same. What that spelling has no words for is refused by name.
    """
    from plymix import loras as making

    options = {"to": to, "base": base, "strict": strict}
    _run(making.convert, (file,), output, options, dtype, dry_run, force, threads, json)


def _run(
    work: Any,
    given: tuple[Any, ...],
    output: str,
    options: dict[str, Any],
    dtype: str,
    dry_run: bool,
    force: bool,
    threads: int,
    json: bool,
) -> None:
    options = {**options, "dtype": dtype}
    made: Made = worked(work, given, output, dry_run, force, threads, options)
    if json:
        screen.put_json(made.to_dict())
    else:
        show(made)


def show(made: Made) -> None:
    from plymix.api import size

    columns = ["block", ">modules", ">rank"] + ([">error"] if made.error is not None else [])
    rows = []
    for b in made.blocks:
        rank = f"{b.rank_min}" if b.rank_min == b.rank_max else f"{b.rank_min}-{b.rank_max}"
        rank = rank if b.rank_max else ""  # copied as it is, or whole differences alone
        error = [screen.percent(b.error)] if b.error is not None else []
        rows.append([b.block, str(b.modules), rank, *error])
    screen.table(columns, rows)
    lost = "exact" if made.error is None else f"error {screen.percent(made.error)}"
    name = made.path.name if made.path else "the result"
    would = "" if made.path else " would be"
    written = f", {made.seconds:.1f} s]" if made.path else "]; nothing was written"
    screen.put(
        f"{name}{would} = {made.formula} [{size(made.nbytes)}, {made.modules} modules, {lost}"
        + written
    )
