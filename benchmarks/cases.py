"""What is measured: commands, the yardstick each is held against, and the bars.

A case belongs to a group; a group names the files it needs (`FILES`). Commands run in the folder
of these files and write `out.safetensors`, or another name that begins with "out".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

FILES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "sd1": ("sd1", "F16", tuple(f"{x}.safetensors" for x in "abcd")),
    "ckpt": ("sd1", "F32", ("a.ckpt", "b.ckpt")),
    "sdxl": ("sdxl", "F16", ("xl-a.safetensors", "xl-b.safetensors")),
    "flux": ("flux-dev", "BF16", ("flux-a.safetensors", "flux-b.safetensors")),
    "loras": ("sdxl", "F16", ("xl-a.safetensors", *(f"lora-{i}.safetensors" for i in "123"))),
}
"""Group -> (architecture, dtype, file names); those of LoRAs begin with "lora-"."""

SPARSE = {"flux"}
"""Groups whose files are headers and holes (all zero), so that 24 GB need no room."""

LORA_RANK = 32

MIB_LINEAR = 64
MIB_LARGEST = 49408 * 768 * 4 / 2**20  # SD1.5's token embedding in float32
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MIB_TENSOR = MIB_LINEAR + 4 * MIB_LARGEST * WORKERS
MIB_ELEMENTWISE = MIB_LINEAR + 16 * (WORKERS - 1)
"""Peak memory: linear merges; methods that hold whole tensors, 4 per worker; element-wise ones,
which have a process for each worker but the first."""


@dataclass(frozen=True)
class Case:
    """One row. `yardstick` is a shell line; a `seconds` bar needs none.

    `files` are texts that the command reads, written beside the models. With `cold` the cache of
    input hashes is emptied before each run of the command (not of the yardstick).
    """

    name: str
    group: str
    title: str
    command: str
    yardstick: str = ""
    ratio: float | None = None
    seconds: float | None = None
    mib: float | None = None
    cold: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


def cat_cp(*names: str) -> str:
    """Read every input once, write one of them."""
    return f"cat {' '.join(names)} > /dev/null && cp {names[0]} out{os.path.splitext(names[0])[1]}"


def toml(models: Mapping[str, str] | str, steps: Mapping[str, Mapping[str, Any]]) -> str:
    """A recipe. `models` may be letters: a is a.safetensors."""
    named = models if isinstance(models, Mapping) else {x: f"{x}.safetensors" for x in models}
    lines = ["[models]", *(f'{name} = "{file}"' for name, file in named.items())]
    for name, fields in steps.items():
        lines += ["", f"[steps.{name}]", *(f"{k} = {_value(v)}" for k, v in fields.items())]
    return "\n".join([*lines, "", "[output]", 'vae = "blend"', ""])


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value).lower()


def _key(key: str) -> str:
    return key if key.isalnum() else f'"{key}"'


def recipe_case(
    name: str, title: str, steps: Mapping[str, Mapping[str, Any]], models: str, **bars: Any
) -> Case:
    """A recipe over SD1.5 files, held against reading them and writing one."""
    return Case(
        name,
        "sd1",
        title,
        f"plymix run {name}.toml -o out.safetensors",
        cat_cp(*(f"{x}.safetensors" for x in models)),
        files={f"{name}.toml": toml(models, steps)},
        **bars,
    )


def step(method: str, models: str, **params: Any) -> dict[str, Mapping[str, Any]]:
    """One step over the named models in order: a, b, c."""
    return {"mix": {"method": method, **dict(zip("abc", models, strict=False)), **params}}


def deltas(method: str, **params: Any) -> dict[str, Mapping[str, Any]]:
    """One step over the differences of b and c from a."""
    return {"mix": {"method": method, "base": "a", "models": ["b", "c"], **params}}


FOUR_BLOCKS = ",".join("0.5" if i in (7, 8, 16, 17) else "1" for i in range(25))
"""IN07, IN08, OUT03, OUT04: 1280 channels wide, among the largest."""

GRADIENT_XL = ",".join(f"{abs(9 - i) / 9:.10g}" for i in range(19))
TWO_XL = "xl-a.safetensors xl-b.safetensors"
TWO_FLUX = "flux-a.safetensors flux-b.safetensors"
MBW = "plymix mbw a.safetensors b.safetensors --base_alpha 1 --weights GRAD_V -o out.safetensors"

CHAIN: Mapping[str, Mapping[str, Any]] = {
    "one": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"},
    "two": {"method": "add_difference", "a": "one", "b": "c", "c": "d", "alpha": 0.7},
    "three": {
        "method": "weighted_sum",
        "a": "two",
        "b": "d",
        "alpha": {"default": 0.2, "blocks": {"IN05-OUT03": 0.3}},
    },
    "four": {"method": "triple_sum", "a": "three", "b": "a", "c": "c", "alpha": 0.2, "beta": 0.1},
    "five": {"method": "weighted_sum", "a": "four", "b": "b", "alpha": 0.25},
}

TWELVE = {f"m{i + 1}": f"m{i + 1}.safetensors" for i in range(12)}
"""Twelve names of the four SD1.5 files (hard links): as many inputs, without as many gigabytes."""

CLASSIC = Case(
    "mbw",
    "sd1",
    "SD1.5 fp16 pair, 25-block gradient",
    MBW,
    cat_cp("a.safetensors", "b.safetensors"),
    ratio=1.0,
    mib=MIB_LINEAR,
)

BLOCKS4 = Case(
    "blocks4",
    "sd1",
    "4 of 25 blocks changed",
    "plymix mbw a.safetensors b.safetensors --base_alpha 1"
    f" --weights {FOUR_BLOCKS} -o out.safetensors",
    "cp a.safetensors out.safetensors",
    ratio=1.0,
    mib=MIB_LINEAR,
)


def waiting(case: Case) -> Case:
    """`case` held against a copy that is on the disk when it is done, as a result of plymix is."""
    return replace(
        case,
        name=f"{case.name}-sync",
        title=f"{case.title}; the yardstick waits for the disk too",
        yardstick=f"{case.yardstick} && sync out.safetensors",
    )


CASES: tuple[Case, ...] = (
    CLASSIC,
    waiting(CLASSIC),
    Case(
        "mbw-first",
        "sd1",
        "the gradient, inputs never seen (hashed meanwhile); held against the first row",
        MBW,
        MBW,
        ratio=2.0,
        mib=MIB_LINEAR,
        cold=True,
    ),
    BLOCKS4,
    waiting(BLOCKS4),
    recipe_case("chain", "5 linear steps over 4 models", CHAIN, "abcd", ratio=1.0, mib=MIB_LINEAR),
    Case(
        "twelve",
        "sd1",
        "average of 12 models",
        "plymix run twelve.toml -o out.safetensors",
        cat_cp(*TWELVE.values()),
        mib=MIB_LINEAR,
        files={
            "twelve.toml": toml(TWELVE, {"mix": {"method": "n_average", "models": list(TWELVE)}})
        },
    ),
    *(
        recipe_case(
            name, f"element-wise: {name}", step(name, m, **p), m, ratio=3.0, mib=MIB_ELEMENTWISE
        )
        for name, m, p in (
            ("geometric_sum", "ab", {"alpha": 0.3}),
            ("multiply_difference", "abc", {"alpha": 0.5}),
            ("train_difference", "abc", {"alpha": 1.0}),
        )
    ),
    recipe_case(
        "slerp",
        "whole tensors: slerp",
        step("slerp", "ab", alpha=0.3),
        "ab",
        ratio=10.0,
        mib=MIB_TENSOR,
    ),
    *(
        recipe_case(
            name,
            f"whole tensors: {name}, 2 differences",
            deltas(name, **p),
            "abc",
            ratio=10.0,
            mib=MIB_TENSOR,
        )
        for name, p in (("ties", {"density": 0.2}), ("dare_linear", {"density": 0.5}))
    ),
    Case("help", "sd1", "help", "plymix --help", seconds=0.3),
    Case(
        "ckpt",
        "ckpt",
        "SD1.5 fp32 .ckpt pair to fp16, 25-block gradient",
        "plymix merge a.ckpt b.ckpt --alpha GRAD_V --base 0 --vae blend --dtype fp16"
        " -o out.safetensors",
        cat_cp("a.ckpt", "b.ckpt"),
        ratio=1.2,
        mib=MIB_LINEAR,
    ),
    Case(
        "sdxl",
        "sdxl",
        "SDXL fp16 pair, 19-block gradient",
        f"plymix mbw {TWO_XL} --base_alpha 1 --weights {GRADIENT_XL} -o out.safetensors",
        cat_cp(*TWO_XL.split()),
        ratio=1.0,
        mib=MIB_LINEAR,
    ),
    Case(
        "folder",
        "sdxl",
        "the same, into a diffusers folder",
        f"plymix mbw {TWO_XL} --base_alpha 1 --weights {GRADIENT_XL} -o out",
        cat_cp(*TWO_XL.split()),
        ratio=1.0,
        mib=MIB_LINEAR,
    ),
    Case(
        "shards",
        "sdxl",
        "SDXL fp16 pair at 0.3, into 3 shards",
        f"plymix merge {TWO_XL} --alpha 0.3 --shard 3GB -o out.safetensors",
        cat_cp(*TWO_XL.split()),
        ratio=1.0,
        mib=MIB_LINEAR,
    ),
    Case(
        "convert",
        "sdxl",
        "SDXL fp16 checkpoint to a diffusers folder",
        "plymix convert xl-a.safetensors out",
        "cp xl-a.safetensors out.safetensors",
        ratio=1.0,
        mib=MIB_LINEAR,
    ),
    Case(
        "bake",
        "loras",
        f"3 LoRAs of rank {LORA_RANK} (U-Net) into SDXL fp16",
        "plymix lora bake xl-a.safetensors lora-1.safetensors:0.8 lora-2.safetensors:0.5"
        " lora-3.safetensors:-0.3 -o out.safetensors",
        cat_cp("xl-a.safetensors", *(f"lora-{i}.safetensors" for i in "123")),
        ratio=2.0,
        mib=MIB_TENSOR,
    ),
    *(
        Case(
            name,
            "flux",
            f"Flux.1 bf16 pair, 24 GB each, at 0.3{title}",
            f"plymix merge {TWO_FLUX} --alpha 0.3{more} -o out.safetensors",
            # Without the option cp would see the holes, and write nothing.
            f"cat {TWO_FLUX} > /dev/null && cp --sparse=never flux-a.safetensors out.safetensors",
            ratio=1.0,
            mib=MIB_LINEAR,
        )
        for name, title, more in (("flux", "", ""), ("flux-shards", ", 3 shards", " --shard 8GB"))
    ),
    Case("inspect", "sdxl", "inspect a 7 GB file", "plymix inspect xl-a.safetensors", seconds=0.3),
    Case(
        "explain",
        "sdxl",
        "explain a merge of two 7 GB files",
        f"plymix explain {TWO_XL} --alpha 0.3",
        seconds=0.3,
    ),
)
