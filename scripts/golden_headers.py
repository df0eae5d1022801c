"""Write the golden headers and maps of models whose layout stands in diffusers' own classes.

    pip install torch diffusers transformers
    python scripts/golden_headers.py            (made with diffusers 0.42.1, torch 2.13.0)

Keys and shapes in diffusers' names come from the model class, built on the meta device from the
published configuration. The original names are told below, and proved: tensors that carry their
own row numbers go through diffusers' own single-file converter, whose result must be what the map
says, key by key and row by row, and must have the keys of the class.

Nothing here uses plymix: what is written is an independent reference for its tests.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
GOLDEN = ROOT / "tests" / "golden"
UNET = "model.diffusion_model."

Shapes = dict[str, tuple[int, ...]]
Rows = dict[str, tuple[list[str], str]]
"""Original key -> the diffusers keys that it is, and how (see tests/maps.py)."""


# --- the classes ---------------------------------------------------------------------------------

XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SSD: dict[str, Any] = {
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
}
VEGA: dict[str, Any] = {
    "transformer_layers_per_block": (1, 1, 2),
    "reverse_transformer_layers_per_block": ([2, 2, 2], [1, 1, 1], 1),
}


def shapes_of(name: str, config: dict[str, Any]) -> Shapes:
    """Keys and shapes of a diffusers class."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


# --- original names ------------------------------------------------------------------------------


def unet(theirs: Shapes) -> Rows:
    """As SDXL's, of which these U-Nets have a part."""
    raw = json.loads(gzip.decompress((GOLDEN / "maps" / "sdxl.json.gz").read_bytes()))
    back = {names: key for key, (part, names, _) in raw.items() if part == "unet"}
    return {back[key].removeprefix(UNET): ([key], "none") for key in theirs}


def ltx(theirs: Shapes) -> Rows:
    found: Rows = {}
    for key in theirs:
        old = re.sub(
            r"^proj_in\.", "patchify_proj.", re.sub(r"^time_embed\.", "adaln_single.", key)
        )
        old = re.sub(r"\.norm_([qk])\.", r".\1_norm.", old)
        found[old] = ([key], "none")
    return found


def wan(theirs: Shapes) -> Rows:
    """Wan-AI's names; VACE's blocks have those of the others and two projections."""
    parts = {
        "scale_shift_table": "modulation",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "norm2": "norm3",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "to_out.0": "o",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "proj_in": "before_proj",
        "proj_out": "after_proj",
    }
    tops = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
    }
    found: Rows = {}
    for key in theirs:
        old = key
        if re.match(r"(vace_)?blocks\.", key):
            for new, name in parts.items():
                old = re.sub(rf"\.{re.escape(new)}(?=\.|$)", f".{name}", old)
        elif key == "scale_shift_table":
            old = "head.modulation"
        elif key.startswith("proj_out."):
            old = key.replace("proj_out.", "head.head.")
        else:
            for new, name in tops.items():
                old = old.replace(new, name)
        found[old] = ([key], "none")
    return found


def hunyuan_video(theirs: Shapes) -> Rows:
    """Tencent's names: fused q, k, v; `linear1` is q, k, v and the MLP of four times the width."""
    text = "context_embedder."
    time = "time_text_embed.timestep_embedder."
    pooled = "time_text_embed.text_embedder."
    guide = "time_text_embed.guidance_embedder."
    rows: dict[str, list[str] | str] = {
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": text + "proj_in",
        "txt_in.t_embedder.mlp.0": text + time + "linear_1",
        "txt_in.t_embedder.mlp.2": text + time + "linear_2",
        "txt_in.c_embedder.linear_1": text + pooled + "linear_1",
        "txt_in.c_embedder.linear_2": text + pooled + "linear_2",
        "time_in.mlp.0": time + "linear_1",
        "time_in.mlp.2": time + "linear_2",
        "vector_in.in_layer": pooled + "linear_1",
        "vector_in.out_layer": pooled + "linear_2",
        "guidance_in.mlp.0": guide + "linear_1",
        "guidance_in.mlp.2": guide + "linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "swap norm_out.linear",
    }
    refiner = {
        "norm1": "norm1",
        "norm2": "norm2",
        "self_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "self_attn_proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm_out.linear",
    }
    double = {
        "img_mod.linear": "norm1.linear",
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "img_attn_q_norm": "attn.norm_q",
        "img_attn_k_norm": "attn.norm_k",
        "img_attn_proj": "attn.to_out.0",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "txt_mod.linear": "norm1_context.linear",
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "txt_attn_q_norm": "attn.norm_added_q",
        "txt_attn_k_norm": "attn.norm_added_k",
        "txt_attn_proj": "attn.to_add_out",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
    }
    single = {
        "modulation.linear": "norm.linear",
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": "proj_out",
        "q_norm": "attn.norm_q",
        "k_norm": "attn.norm_k",
    }
    blocks = (
        ("txt_in.individual_token_refiner.blocks", text + "token_refiner.refiner_blocks", refiner),
        ("double_blocks", "transformer_blocks", double),
        ("single_blocks", "single_transformer_blocks", single),
    )
    for ours, start, inner in blocks:
        for i in range(depth(theirs, start)):
            for name, names in inner.items():
                full = [f"{start}.{i}.{n}" for n in ([names] if isinstance(names, str) else names)]
                rows[f"{ours}.{i}.{name}"] = full
    found: Rows = {}
    for old, names in rows.items():
        how = "none"
        if isinstance(names, str):
            word, _, name = names.rpartition(" ")
            how, names = ("swap_scale_shift" if word else how), [name]
        for end in (".weight", ".bias"):
            full = [name + end for name in names]
            if full[0] in theirs:
                sizes = ",".join(str(theirs[name][0]) for name in full)
                kind = {1: how, 3: "split_qkv"}.get(len(full), f"split:{sizes}")
                found[old + end] = (full, kind)
    return found


def depth(shapes: Shapes, start: str) -> int:
    return len({k.split(".")[start.count(".") + 1] for k in shapes if k.startswith(start + ".")})


# --- blocks --------------------------------------------------------------------------------------


def unet_block(key: str) -> str:
    word, number = re.match(r"([a-z_]+)\.(\d+)\.", key).groups()  # type: ignore[union-attr]
    names = {"input_blocks": "IN", "output_blocks": "OUT"}
    if word in names:
        return f"{names[word]}{int(number):02}"
    return {"middle_block": "M00", "out": "OUT08"}.get(word, "IN00")


def numbered(**blocks: str) -> Callable[[str], str]:
    """The block of a key by what it begins with; OUT and IN for the others."""

    def block(key: str) -> str:
        for letter, start in blocks.items():
            if found := re.match(rf"{start}\.(\d+)\.", key):
                return f"{letter}{int(found[1]):02}"
        if key.startswith("vace_"):
            return "VACE"
        out = ("final_layer.", "proj_out.", "head.")
        return "OUT" if key.startswith(out) or key == "scale_shift_table" else "IN"

    return block


# --- proof ---------------------------------------------------------------------------------------


def joined(theirs: Shapes, names: list[str]) -> tuple[int, ...]:
    return (sum(theirs[name][0] for name in names), *theirs[names[0]][1:])


def prove(rows: Rows, theirs: Shapes, convert: Callable[..., Any]) -> None:
    """Let diffusers convert numbered rows: it must make of them what the map says."""
    import numpy as np
    import torch

    from maps import converted

    tagged, at = {}, 0
    for key, (names, _) in rows.items():
        shape = joined(theirs, names)
        thin = (shape[0], *[1] * (len(shape) - 1))  # what is told apart are rows
        tagged[key] = np.arange(at, at + math.prod(thin), dtype=np.int64).reshape(thin)
        at += math.prod(thin)
    expected: dict[str, Any] = {}
    for key, (names, how) in rows.items():
        expected |= converted(tagged[key], names, how)
    assert expected.keys() == theirs.keys(), set(expected) ^ set(theirs)
    got = convert({key: torch.from_numpy(value.copy()) for key, value in tagged.items()})
    assert got.keys() == theirs.keys(), set(got) ^ set(theirs)
    for key, value in got.items():
        assert np.array_equal(value.numpy(), expected[key]), key


# --- what is written -----------------------------------------------------------------------------


def models() -> dict[str, tuple[str, dict[str, Any], Any, Any, Any, str]]:
    """Name -> class, configuration, original names, converter, blocks, dtype."""
    from diffusers.loaders import single_file_utils as their

    def of_unet(config: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        full = {"layers_per_block": 2, "class_embed_type": None, **XL, **config}

        def convert(state: dict[str, Any]) -> Any:
            return their.convert_ldm_unet_checkpoint(
                {UNET + k: v for k, v in state.items()}, config=full
            )

        return convert

    wan_blocks = numbered(B="blocks")
    hunyuan = numbered(R=r"txt_in\.individual_token_refiner\.blocks", D="double_blocks",
                       S="single_blocks")  # fmt: skip
    vace = {"vace_layers": list(range(0, 40, 5)), "num_layers": 40}
    return {
        "ssd-1b": ("UNet2DConditionModel", XL | SSD, unet, of_unet(SSD), unet_block, "F16"),
        "vega": ("UNet2DConditionModel", XL | VEGA, unet, of_unet(VEGA), unet_block, "F16"),
        "ltx-video-2b": ("LTXVideoTransformer3DModel", {}, ltx,
                         their.convert_ltx_transformer_checkpoint_to_diffusers,
                         numbered(T="transformer_blocks"), "BF16"),
        "ltx-video-13b": ("LTXVideoTransformer3DModel",
                          {"num_layers": 48, "attention_head_dim": 128,
                           "cross_attention_dim": 4096}, ltx,
                          their.convert_ltx_transformer_checkpoint_to_diffusers,
                          numbered(T="transformer_blocks"), "BF16"),
        "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}, hunyuan_video,
                          their.convert_hunyuan_video_transformer_to_diffusers, hunyuan, "BF16"),
        "wan2.1-vace-14b": ("WanVACETransformer3DModel", vace, wan,
                            their.convert_wan_transformer_to_diffusers, wan_blocks, "F16"),
    }  # fmt: skip


def write(path: Path, rows: dict[str, Any]) -> None:
    text = json.dumps(rows, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(text, 9, mtime=0))
    print(f"{path.relative_to(ROOT)}  {len(rows)} rows, {path.stat().st_size} bytes")


def main() -> None:
    for model, (name, config, original, convert, block, dtype) in models().items():
        theirs = shapes_of(name, config)
        rows: Rows = original(theirs)
        prove(rows, theirs, convert)
        part = "unet" if original is unet else "transformer"
        shapes = {key: joined(theirs, names) for key, (names, _) in rows.items()}
        header = {UNET + k: [dtype, list(s), part, block(k)] for k, s in shapes.items()}
        if original is unet:  # in one file with SDXL's text encoders and VAE
            raw = json.loads(gzip.decompress((GOLDEN / "headers" / "sdxl.json.gz").read_bytes()))
            header |= {k: row for k, row in raw.items() if not k.startswith(UNET)}
        write(GOLDEN / "headers" / f"{model}.json.gz", header)
        if model == "ltx-video-13b":  # one map says it for any depth
            continue
        pairs = {
            UNET + k: [part, names[0] if len(names) == 1 else names, how]
            for k, (names, how) in rows.items()
        }
        write(GOLDEN / "maps" / f"{model}.json.gz", pairs)


if __name__ == "__main__":
    main()
