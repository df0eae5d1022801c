"""`convert`."""

from __future__ import annotations

from typing import Annotated, Any

from plymix.cli.options import (
    Arch,
    Configs,
    DryRun,
    Dtypes,
    Force,
    InLayout,
    Json,
    Rounded,
    Seed,
    Shard,
    Threads,
    argument,
    checked_threads,
)
from plymix.cli.showing import finish
from plymix.cli.typed import typed

EXAMPLES = {
    "convert": "Examples:\n  PROG model.ckpt model.safetensors --dtype fp16,vae=fp32"
    "\n  PROG model.safetensors folder\n  PROG folder model.safetensors",
}


def convert(
    model: Annotated[str, argument("The model: a file, a folder, or an index of shards.")],
    result: Annotated[str, argument("The result: .safetensors, .ckpt, .gguf, or a folder.")],
    /,
    *,
    layout: InLayout = None,
    dtype: Dtypes = "keep",
    rounding: Rounded = "nearest",
    seed: Seed = 0,
    shard: Shard = "",
    configs: Configs = "",
    arch: Arch = "",
    force: Force = False,
    threads: Threads = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write a model in another container, layout or dtype.

    A result without an ending is a diffusers folder; its configurations are those of the input, or
    are made. Tensors that keep their dtype keep their bytes; what the layout cannot hold is named.
    """
    from plymix import api

    path = api.output_path("", result)
    api.ready(path, force, (model,))
    checked_threads(threads)
    said: dict[str, Any] = {"layout": layout or "", "dtype": dtype, "rounding": rounding}
    with typed(), api.conversion(model, path, arch, seed=seed, shard=shard or 0, **said) as plan:
        finish(plan, path, json, dry_run, threads, configs=configs)
