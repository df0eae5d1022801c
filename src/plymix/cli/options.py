"""Command line options that several commands share, each written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any, Literal, Optional

from cyclopts import Parameter, Token

from plymix.errors import Refusal

Dtype = Literal["keep", "fp32", "fp16", "bf16"]
Layout = Literal["ldm", "sgm", "sai", "bfl", "diffusers"]
Rounding = Literal["nearest", "stochastic"]
Device = Literal["cpu", "cuda"]


def _named(metavar: str | None) -> dict[str, Any]:
    """How a value is called in the help. cyclopts 4, the last for Python 3.10, cannot say it."""
    return {"metavar": metavar} if "metavar" in signature(Parameter).parameters else {}


def option(help: str, *names: str, default: bool = True, metavar: str | None = None) -> Parameter:
    """An option with its help line; `default=False` keeps a default that says nothing out of it."""
    return Parameter(
        name=list(names) or None, help=help, show_default=default, negative=(), **_named(metavar)
    )


def argument(help: str) -> Parameter:
    """A positional argument with its help line."""
    return Parameter(help=help, show_default=False)


def weight(help: str, *names: str, metavar: str, default: bool = True) -> Parameter:
    """An option whose value may begin with a minus: -0.2 or -0.2,0.3,..."""
    return Parameter(
        name=list(names) or None,
        help=help,
        show_default=default,
        allow_leading_hyphen=True,
        **_named(metavar),
    )


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """What a whole number is written as; cyclopts would take 1.9 for 2."""
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{token.value!r} is not a whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
WholeOrNone = Annotated[int | None, Parameter(converter=_whole)]

Json = Annotated[bool, option("Print one JSON document instead.", default=False)]
DryRun = Annotated[bool, option("Show what would be done, as plymix explain does.", default=False)]
Force = Annotated[bool, option("Replace an existing output file.", default=False)]
Strict = Annotated[
    bool, option("Refuse keys that some models have and others lack.", default=False)
]
Threads = Annotated[Whole, option("Worker threads; 0 is one per processor.", metavar="N")]
OnDevice = Annotated[Device, option("Where to compute; cuda needs torch.")]
Output = Annotated[
    str,
    option(
        "The result: .safetensors, .ckpt, .gguf, or a folder.",
        "--output",
        "-o",
        default=False,
        metavar="FILE",
    ),
]
OneDtype = Annotated[Dtype, option("Number format of the result.")]
Dtypes = Annotated[
    str,
    option(
        "Number format: keep, fp32, fp16, bf16, fp8_e4m3fn, fp8_e5m2, q8_0 (.gguf); or one per"
        " component, as in fp16,vae=fp32.",
        metavar="DTYPE",
    ),
]
InLayout = Annotated[
    Optional[Layout],  # noqa: UP045
    option(
        "Names of the result: diffusers, or the model's own (ldm, sgm, sai, bfl). [default: A's]",
        default=False,
    ),
]
Shard = Annotated[
    str, option("Split .safetensors into files of this size.", default=False, metavar="5GB")
]
Configs = Annotated[
    str,
    option(
        "A diffusers folder whose configs and tokenizers go into a folder that is written.",
        default=False,
        metavar="DIR",
    ),
]
Rounded = Annotated[Rounding, option("How fp8 rounds; stochastic is drawn from --seed.")]
Seed = Annotated[Whole, option("For --rounding stochastic.", metavar="N")]
Folders = Annotated[
    tuple[str, ...],
    option("A folder to look for model files in; repeatable.", default=False, metavar="DIR"),
]
Settings = Annotated[
    tuple[str, ...],
    option(
        "Change one value: --set steps.mix.alpha.base=0.3; repeatable.",
        "--set",
        default=False,
        metavar="PATH=VALUE",
    ),
]
LoraDir = Annotated[
    tuple[str, ...],
    option(
        "A folder to look for the LoRAs of prompt tags in; repeatable. [default: this one, and that"
        " of a BASE]",
        default=False,
        metavar="DIR",
    ),
]
Lbw = Annotated[
    str,
    option(
        "Factor of each block: a preset (IND), a list, or names (IN05-OUT03=0.5,M00).",
        default=False,
        metavar="PRESET|LIST|NAMES",
    ),
]


Presets = Annotated[
    str,
    option(
        "A file of your own presets (MBW's preset.tsv, supermerger's mbwpresets.txt).",
        default=False,
        metavar="FILE",
    ),
]


Arch = Annotated[
    str,
    option(
        "any: merge key by key, whatever the models are. FILE.toml: an architecture of your own.",
        default=False,
        metavar="any|FILE",
    ),
]


OwnArch = Annotated[
    str,
    option("An architecture of your own, to look for first.", default=False, metavar="FILE"),
]


BlockView = Annotated[
    Literal["classic", "supermerger", "comfyui"] | None,
    option("Whose blocks the weights are for. [default: classic]", default=False),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Merge:
    """What a merge of two models may say; `merge` and `explain` take the same."""

    alpha: Annotated[
        str,
        weight("The share of B: number, preset, or list of block weights.", metavar="SPEC"),
    ] = "0.5"
    presets: Presets = ""
    base: Annotated[
        float | None,
        weight(
            "The text encoder's share of B, where alpha has no BASE value.",
            metavar="F",
            default=False,
        ),
    ] = None
    method: Annotated[
        str, option("weighted_sum: A(1-alpha) + B alpha; add_difference: A + alpha(B-C).")
    ] = "weighted_sum"
    c: Annotated[
        str | None,
        option("The third model, of add_difference and its like.", metavar="C", default=False),
    ] = None
    vae: Annotated[
        str, option("Whose VAE: a, b, c, blend or a file.", metavar="a|b|c|blend|FILE")
    ] = "a"
    text_encoder: Annotated[
        str,
        option(
            "Take the text encoder (all of them) from here, whole.",
            metavar="a|b|c|FILE",
            default=False,
        ),
    ] = ""
    text_encoder_2: Annotated[
        str,
        option("The same for the second text encoder.", metavar="a|b|c|FILE", default=False),
    ] = ""
    unet: Annotated[
        str,
        option("The same for the U-Net or transformer.", metavar="a|b|c|FILE", default=False),
    ] = ""
    dtype: Dtypes = "keep"
    rounding: Rounded = "nearest"
    seed: Seed = 0
    layout: InLayout = None
    shard: Shard = ""
    ema: Annotated[
        Literal["drop", "keep", "use"],
        option("EMA weights: leave out, copy A's, or merge them in place of the others."),
    ] = "drop"
    union: Annotated[bool, option("Add keys that only B has.", default=False)] = False
    strict: Strict = False
    arch: Arch = ""
    block_view: BlockView = None
    allow_mixed_prediction: Annotated[
        bool, option("Merge an epsilon with a v-prediction model.", default=False)
    ] = False

    def recipe_options(self) -> dict[str, Any]:
        """The arguments of `plymix.api.two_models`."""
        said = {k: v for k, v in self.__dict__.items() if k != "strict"}
        empty = {"block_view": "classic", "layout": "", "shard": 0}
        return said | {name: said[name] or none for name, none in empty.items()}


def checked_threads(threads: int) -> int:
    if threads < 0:
        raise Refusal(f"--threads {threads} is less than 0; 0 means one per processor")
    return threads
