"""What a LoRA file says about itself, and what a result says that was made of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from plymix import urls
from plymix.archs import Architecture
from plymix.loras.record import Record, formula
from plymix.loras.work import Found

BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux1": "flux1"}
"""kohya's names of base models (`ss_base_model_version`)."""

OF_TRAINING = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "ss_datasets")
"""Tables about the images a LoRA was trained on."""


def carried(inputs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the inputs say of themselves and the result may say: of one all, of several what is the
    same in all, and the tables of their training tags added up."""
    first, *others = inputs
    found = {k: v for k, v in first.items() if all(m.get(k) == v for m in others)}
    tags = _added([_parsed(m.get("ss_tag_frequency")) for m in inputs])
    if tags and others:
        found["ss_tag_frequency"] = json.dumps(tags, sort_keys=True)
    # Hashes are made anew, PEFT's configuration tells scales that are in the numbers now.
    gone = ("sshs_", "plymix.", "modelspec.hash", "lora_adapter_metadata")
    return {k: v for k, v in found.items() if not k.startswith(gone)}


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _added(tables: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{folder: {tag: count}} of several files: folders side by side, counts of one tag added."""
    found: dict[str, dict[str, int]] = {}
    for table in tables:
        for folder, tags in table.items():
            into = found.setdefault(str(folder), {})
            for tag, count in tags.items() if isinstance(tags, dict) else ():
                if isinstance(count, int):
                    into[str(tag)] = into.get(str(tag), 0) + count
    return found


def network(found: Sequence[Found]) -> dict[str, str]:
    """kohya's words for what is in the file: which network, its dimension and alpha."""
    loras = [f for f in found if f.kind in ("lora", "lokr") and f.rank]
    kohya = all(f.kind == "lora" for f in found if f.kind != "nothing")
    said = {"ss_network_module": "networks.lora" if kohya else "lycoris.kohya"}
    plain = [f for f in loras if not _kernel(f)]
    convs = [f for f in loras if _kernel(f)]
    said |= dict(zip(("ss_network_dim", "ss_network_alpha"), _common(plain or convs), strict=True))
    arguments: dict[str, str] = {}
    if plain and convs:
        dim, alpha = _common(convs)
        arguments |= {"conv_dim": dim, "conv_alpha": alpha}
    if any(f.kind == "lokr" for f in found):
        arguments["algo"] = "lokr"
    return said | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _kernel(f: Found) -> bool:
    return any(n > 1 for n in f.part.shape[2:])


def _common(found: Sequence[Found]) -> tuple[str, str]:
    """Rank and alpha, or "Dynamic" where they differ, as kohya's resizing has it."""
    ranks = {(f.rank, f.alpha) for f in found}
    if len(ranks) != 1:
        return "Dynamic", "Dynamic"
    ((rank, alpha),) = ranks
    return str(rank), f"{alpha:g}"


def about(
    arch: Architecture | None, record: Record, inputs: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """What a result says of itself but for its network and its record: what its inputs say of
    themselves where they are LoRAs, SAI ModelSpec, and kohya's name of the base model."""
    files = [one.file for one in record.inputs]
    if record.made == "extract" and record.base:
        files.append(record.base.file)
    names = dict.fromkeys(PurePath(urls.name(file)).stem for file in files)
    own = {} if record.made == "extract" else carried(inputs)
    title = record.title if record.made in ("merge", "extract") else own.get("modelspec.title")
    found = {
        **own,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or record.title,
        "modelspec.date": record.date,
        "modelspec.merged_from": ", ".join(names),
        "modelspec.description": f"Made with plymix: {formula(record)}",
        "format": "pt",
    }
    if arch is not None:
        found["modelspec.architecture"] = f"{arch.modelspec_id()}/lora"
        if arch.name in BASES:
            found["ss_base_model_version"] = BASES[arch.name]
            found["ss_v2"] = str(arch.name == "sd2")
    return found
