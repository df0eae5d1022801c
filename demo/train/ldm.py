"""The trained networks -> two checkpoints with SD1's own names, in fp16."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import captions
import plymix
from plymix.engine.files import write_whole as write_bytes
from plymix.formats.base import Entry
from plymix.formats.safetensors import layout
from settings import Settings

FILES = {"A": "emoji-shaded.safetensors", "B": "emoji-flat.safetensors"}
UNET_B = "emoji-flat-unet.safetensors"
"""B's U-Net alone: all that it does not share with A."""

TITLES = {"A": "Tiny emoji, shaded on white", "B": "Tiny emoji, flat on pale blue"}
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"

FOLDER = {
    "unet": ("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("transformers", "CLIPTextModel", "model.safetensors"),
}
"""A diffusers folder's components: the library, the class, the file of weights."""


def write(path: Path, modules: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """A checkpoint of `modules` (unet, vae, text_encoder); a finished file or none."""
    with tempfile.TemporaryDirectory() as name:
        folder, single = Path(name) / "model", Path(name) / "single.safetensors"
        index = {part: [library, kind] for part, (library, kind, _) in FOLDER.items()}
        folder.mkdir()
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": "StableDiffusionPipeline", **index})
        )
        for part, module in modules.items():
            (folder / part).mkdir()
            values = {k: v.cpu().contiguous() for k, v in module.state_dict().items()}
            save_file(values, folder / part / FOLDER[part][2])
        plymix.convert(folder, single, layout="ldm", dtype="fp16")
        state = {**load_file(single), **buffers()}
    write_bytes(path, packed(state, metadata))


def packed(state: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The library's own has its metadata in an order that changes by itself."""
    kinds = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    entries = [Entry(key, kinds[t.dtype], tuple(t.shape)) for key, t in sorted(state.items())]
    plan = layout(entries, metadata)
    made = bytearray(plan.size)
    for at, piece in plan.pieces:
        made[at : at + len(piece)] = piece
    for key, at in plan.offsets.items():
        raw = state[key].contiguous().numpy().tobytes()
        made[at : at + len(raw)] = raw
    return bytes(made)


def buffers() -> dict[str, Any]:
    """What SD1's files hold besides weights: position ids, and the schedule in float32.

    The names and formulas are those of CompVis' `DDPM.register_schedule`, with eta 0 for the
    posterior; computed in float64.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = 1 - betas
    kept = np.cumprod(alphas)
    before = np.append(1.0, kept[:-1])
    variance = betas * (1 - before) / (1 - kept)
    made = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / kept),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / kept - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - kept),
    }
    found = {name: torch.from_numpy(value.astype(np.float32)) for name, value in made.items()}
    return {**found, POSITIONS: torch.arange(77).view(1, 77)}


@torch.no_grad()
def forget(encoder: Any, every: Iterable[captions.Concept]) -> int:
    """Set the rows of tokens that no caption has to zero, so that the file packs well: how many."""
    table = encoder.get_input_embeddings().weight
    unused = torch.ones(len(table), dtype=torch.bool, device=table.device)
    unused[captions.used(every)] = False
    table[unused] = 0
    return int(unused.sum())


def metadata(s: Settings, style: str) -> dict[str, str]:
    """Of the file: what its shapes cannot tell, and where it is from."""
    config = {
        "unet": {"norm_num_groups": s.unet_groups, "attention_head_dim": s.unet_heads},
        "vae": {"norm_num_groups": s.vae_groups},
        "text_encoder": {"num_attention_heads": s.text_heads},
    }
    return {
        "plymix.model_config": json.dumps(config),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": TITLES[style],
        "modelspec.resolution": f"{s.size}x{s.size}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": "Apache-2.0 (Noto Emoji, changed), MIT (Fluent Emoji); see MODEL_CARD",
        "modelspec.description": "A tiny model with SD1's structure, to see what merges do."
        f" {s.size} pixels; seed {s.seed}.",
        "format": "pt",
    }
