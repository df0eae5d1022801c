"""The configurations of a diffusers folder, read off the shapes of its tensors.

A checkpoint in one file has none. What a class needs to be told is its widths and depths, which
the shapes say, and a few facts that belong to the architecture, which stand in `configs.toml`:
the classes, the VAE's scale, the activation of a text encoder, the scheduler.

Source: the `__init__` of the classes named there, in diffusers 0.42 and transformers 5, and the
configurations published with the models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from plymix.archs.dialects import Shapes
from plymix.archs.model import Architecture, decode
from plymix.errors import Refusal, listed

VERSION = "0.42.0"
"""The version of diffusers whose configurations these are."""

HEAD = 64
"""The width of an attention head in CLIP, SD2, SDXL and SD3."""

_FILE = Path(__file__).with_name("configs.toml")
Config = dict[str, Any]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the shapes do not say of one architecture.

    `pipeline` and `classes` are names of classes, "" the one of all variants; without a pipeline
    only components alone are known; `config` has values
    by component, `v` those that a model that predicts v has instead; `tokenizers` are the classes
    of each text encoder's tokenizer; `index` goes into model_index.json.
    """

    classes: dict[str, str]
    pipeline: dict[str, str] = {}
    scheduler: dict[str, dict[str, Any]] = {}
    tokenizers: dict[str, str] = {}
    config: dict[str, dict[str, Any]] = {}
    v: dict[str, dict[str, Any]] = {}
    index: dict[str, Any] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    facts: dict[str, Facts]


@cache
def _all() -> Mapping[str, Facts]:
    return decode(_FILE, _File).facts


def known(arch: Architecture) -> bool:
    """Whether configurations can be made for `arch`."""
    return arch.name in _all()


def component(arch: Architecture, name: str, shapes: Shapes, prediction: str = "") -> Config:
    """`config.json` of a component whose tensors, by diffusers' names, have these shapes.

    Raises Refusal for an architecture or a build that it is not known for.
    """
    facts = _facts(arch)
    if name not in facts.classes:
        raise Refusal(
            f"plymix does not know the configuration of {name!r} of {arch.short}: name a diffusers"
            f" folder of a {arch.short} model that has {name}/config.json, by --configs FOLDER"
        )
    kind = facts.classes[name]
    found = _READERS[kind](_Shapes(arch, name, shapes))
    found |= facts.config.get(name, {}) | (facts.v.get(name, {}) if prediction == "v" else {})
    if kind in _TRANSFORMERS:
        return {"architectures": [kind], **found}
    return {"_class_name": kind, "_diffusers_version": VERSION, **found}


def pipeline(arch: Architecture, variant: str, components: list[str]) -> Config:
    """`model_index.json` of a folder that has these components."""
    facts = _facts(arch)
    if not facts.pipeline:
        raise Refusal(
            f"plymix does not know the pipeline of {arch.short}, only {listed(facts.classes)}: give"
            " a diffusers folder of such a model by --configs, or take a component alone (extract)"
        )
    found: Config = {
        "_class_name": facts.pipeline.get(variant, facts.pipeline[""]),
        "_diffusers_version": VERSION,
        **facts.index,
    }
    scheduler = _variant(facts.scheduler, variant)["_class_name"]
    rows = {name: (_library(kind), kind) for name, kind in facts.classes.items()}
    rows |= {name: ("transformers", kind) for name, kind in facts.tokenizers.items()}
    rows["scheduler"] = ("diffusers", scheduler)
    there = {*components, "scheduler"}
    return found | {k: list(v) if k in there else [None, None] for k, v in sorted(rows.items())}


def tokenizers(arch: Architecture, components: list[str]) -> dict[str, tuple[str, bool]]:
    """The tokenizers that these components want: class, and whether it is for an OpenCLIP."""
    facts, found = _facts(arch), {}
    for name, kind in facts.tokenizers.items():
        encoder = name.replace("tokenizer", "text_encoder")
        if encoder in components:
            found[name] = kind, facts.config.get(encoder, {}).get("hidden_act") == "gelu"
    return found


def scheduler(arch: Architecture, variant: str, prediction: str, zero_snr: bool) -> Config:
    """`scheduler_config.json`. `prediction` is "epsilon", "v" or "" (taken for epsilon).

    Raises Refusal for another one.
    """
    if prediction not in ("epsilon", "v", ""):
        raise Refusal(
            f"plymix does not know the scheduler of a model that predicts {prediction}: give a"
            " diffusers folder that has it by --configs"
        )
    found = dict(_variant(_facts(arch).scheduler, variant))
    if "prediction_type" in found:
        if prediction == "v":
            found["prediction_type"] = "v_prediction"
        if zero_snr:
            found["rescale_betas_zero_snr"] = True
            found["timestep_spacing"] = "trailing"
    return {"_class_name": found.pop("_class_name"), "_diffusers_version": VERSION, **found}


def text(config: Config) -> bytes:
    """A configuration as diffusers writes it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _facts(arch: Architecture) -> Facts:
    facts = _all().get(arch.name)
    if facts is None:
        raise Refusal(
            f"the shapes of {arch.short} models do not tell their configurations in diffusers: name"
            " a diffusers folder of such a model by --configs FOLDER, and its are used; or write a"
            " .safetensors"
        )
    return facts


def _variant(table: Mapping[str, Config], variant: str) -> Config:
    return table[""] | table.get(variant, {})


def _library(kind: str) -> str:
    return "transformers" if kind in _TRANSFORMERS else "diffusers"


# --- shapes


class _Shapes:
    """Shapes asked by name; a build that lacks what is asked is refused by name."""

    def __init__(self, arch: Architecture, component: str, shapes: Shapes) -> None:
        self._arch, self._component, self.shapes = arch, component, shapes

    def __call__(self, name: str) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            raise self.bad(f"it has no {name}")
        return shape

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def bad(self, what: str) -> Refusal:
        return Refusal(
            f"the configuration of {self._component} ({self._arch.short}) cannot be told from its"
            f" shapes: {what}; give a diffusers folder that has it by --configs"
        )

    def numbers(self, template: str) -> list[int]:
        """The numbers that stand for * in keys that begin with `template`, ascending."""
        pattern = re.compile(re.escape(template).replace(r"\*", "([0-9]{1,4})"))
        found = {int(m[1]) for m in map(pattern.match, self.shapes) if m}
        if found != set(range(len(found))) or not found:
            raise self.bad(f"{template} is not numbered from 0")
        return sorted(found)

    def count(self, template: str) -> int:
        return len(self.numbers(template))


def _groups(width: int) -> int:
    """The groups of a group norm: 32, or fewer for a very narrow model."""
    return math.gcd(32, width)


def _unet(s: _Shapes) -> Config:
    levels = s.numbers("down_blocks.*.resnets.0.conv1.weight")
    widths = [s(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels]
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in s for i in levels]
    depths = [_depth(s, f"down_blocks.{i}.", has) for i, has in zip(levels, attention, strict=True)]
    up = [_depth(s, f"up_blocks.{i}.", has) for i, has in enumerate(reversed(attention))]
    middle = _depth(s, "mid_block.", True)
    if up == depths[::-1] and not attention[-1]:
        up[0] = depths[-1] = middle  # a level without attention has any depth; the middle has this
    if up != depths[::-1] or middle != depths[-1]:
        raise s.bad("its blocks are not equally deep on both ways and in the middle")
    plain = set(depths) == {1}
    found: Config = {
        "in_channels": s("conv_in.weight")[1],
        "out_channels": s("conv_out.weight")[0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "layers_per_block": s.count("down_blocks.0.resnets.*."),
        "transformer_layers_per_block": 1 if plain else depths,
        "cross_attention_dim": s(_first_attention(s) + "attn2.to_k.weight")[1],
        "norm_num_groups": _groups(widths[0]),
        "use_linear_projection": len(s(_first_block(s) + "proj_in.weight")) == 2,
    }
    if not found["use_linear_projection"]:
        found["attention_head_dim"] = 8  # a number of heads, in spite of its name
    else:
        found["attention_head_dim"] = [max(1, width // HEAD) for width in widths]
    if "add_embedding.linear_1.weight" in s:
        found["addition_embed_type"] = "text_time"
        found["addition_time_embed_dim"] = 256
        found["projection_class_embeddings_input_dim"] = s("add_embedding.linear_1.weight")[1]
    return found


def _first_block(s: _Shapes) -> str:
    found = (re.match(r"down_blocks\.[0-9]+\.attentions\.0\.", key) for key in s.shapes)
    first = next(filter(None, found), None)
    if first is None:
        raise s.bad("it has no attention")
    return first.group()


def _first_attention(s: _Shapes) -> str:
    return _first_block(s) + "transformer_blocks.0."


def _depth(s: _Shapes, block: str, attention: bool) -> int:
    """The transformer blocks in each attention of a block."""
    if not attention:
        return 1
    layers = s.numbers(f"{block}attentions.*.")
    found = {s.count(f"{block}attentions.{i}.transformer_blocks.*.") for i in layers}
    if len(found) != 1:
        raise s.bad(f"the attentions of {block[:-1]} are not equally deep")
    return found.pop()


def _vae(s: _Shapes) -> Config:
    levels = s.numbers("encoder.down_blocks.*.resnets.0.conv1.weight")
    widths = [s(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels]
    return {
        "in_channels": s("encoder.conv_in.weight")[1],
        "out_channels": s("decoder.conv_out.weight")[0],
        "latent_channels": s("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": s.count("encoder.down_blocks.0.resnets.*."),
        "norm_num_groups": _groups(widths[0]),
        "use_quant_conv": "quant_conv.weight" in s,
        "use_post_quant_conv": "post_quant_conv.weight" in s,
    }


def _clip(s: _Shapes) -> Config:
    stem = "text_model." if any(key.startswith("text_model.") for key in s.shapes) else ""
    vocabulary, width = s(f"{stem}embeddings.token_embedding.weight")
    found: Config = {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": s(f"{stem}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": s.count(f"{stem}encoder.layers.*."),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": s(f"{stem}embeddings.position_embedding.weight")[0],
        "layer_norm_eps": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published; transformers then takes the largest token for the end
        "pad_token_id": 1,
    }
    if "text_projection.weight" in s:
        found["projection_dim"] = s("text_projection.weight")[0]
    return found


def _t5(s: _Shapes) -> Config:
    vocabulary, width = s("shared.weight")
    first = "encoder.block.0.layer."
    buckets, heads = s(f"{first}0.SelfAttention.relative_attention_bias.weight")
    return {
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": s(f"{first}1.DenseReluDense.wi_0.weight")[0],
        "d_kv": s(f"{first}0.SelfAttention.q.weight")[0] // heads,
        "num_heads": heads,
        "num_layers": s.count("encoder.block.*."),
        "num_decoder_layers": s.count("encoder.block.*."),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _sd3(s: _Shapes) -> Config:
    width, channels, patch, _ = s("pos_embed.proj.weight")
    blocks = s.numbers("transformer_blocks.*.attn.to_q.weight")
    norm = "transformer_blocks.0.attn.norm_q.weight"
    head = s(norm)[0] if norm in s else min(HEAD, width)
    out = s("proj_out.weight")[0]
    return {
        "in_channels": channels,
        "out_channels": out // patch**2,
        "patch_size": patch,
        "num_layers": len(blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight")[1],
        "caption_projection_dim": s("context_embedder.weight")[0],
        "pooled_projection_dim": s("time_text_embed.text_embedder.linear_1.weight")[1],
        "pos_embed_max_size": math.isqrt(s("pos_embed.pos_embed")[1]),
        "qk_norm": "rms_norm" if norm in s else None,
        "dual_attention_layers": [
            i for i in blocks if f"transformer_blocks.{i}.attn2.to_q.weight" in s
        ],
    }


def _streams(s: _Shapes) -> Config:
    """What Flux and its kin share: blocks of two streams (text, picture), then blocks of one."""
    width, channels = s("x_embedder.weight")
    head = s("transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "in_channels": channels,
        "out_channels": s("proj_out.weight")[0],
        "patch_size": 1,
        "num_layers": s.count("transformer_blocks.*."),
        "num_single_layers": s.count("single_transformer_blocks.*."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight")[1],
    }


def _flux(s: _Shapes) -> Config:
    return {
        **_streams(s),
        "pooled_projection_dim": s("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in s,
    }


def _chroma(s: _Shapes) -> Config:
    hidden, inputs = s("distilled_guidance_layer.in_proj.weight")
    return {
        **_streams(s),
        "approximator_num_channels": inputs,
        "approximator_hidden_dim": hidden,
        "approximator_layers": s.count("distilled_guidance_layer.layers.*."),
    }


def _flux2(s: _Shapes) -> Config:
    out, inner = s("transformer_blocks.0.ff.linear_out.weight")
    return {
        **_streams(s),
        "timestep_guidance_channels": s("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": inner / out,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in s,
    }


def _z_image(s: _Shapes) -> Config:
    width, inputs = s("all_x_embedder.2-1.weight")
    head = s("layers.0.attention.norm_q.weight")[0]
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": inputs // 4,
        "dim": width,
        "n_layers": s.count("layers.*."),
        "n_refiner_layers": s.count("noise_refiner.*."),
        "n_heads": width // head,
        "n_kv_heads": s("layers.0.attention.to_k.weight")[0] // head,
        "qk_norm": True,
        "cap_feat_dim": s("cap_embedder.0.weight")[0],
    }


def _lumina2(s: _Shapes) -> Config:
    width, inputs = s("x_embedder.weight")
    head = s("layers.0.attn.norm_q.weight")[0]
    unit = 256  # of the feed-forward width
    if s("layers.0.feed_forward.linear_1.weight")[0] != -(-4 * width // unit) * unit:
        raise s.bad("its feed-forward layers are of an unusual width")
    return {
        "patch_size": 2,
        "in_channels": inputs // 4,
        "out_channels": s("norm_out.linear_2.weight")[0] // 4,
        "hidden_size": width,
        "num_layers": s.count("layers.*."),
        "num_refiner_layers": s.count("noise_refiner.*."),
        "num_attention_heads": width // head,
        "num_kv_heads": s("layers.0.attn.to_k.weight")[0] // head,
        "multiple_of": unit,
        "cap_feat_dim": s("time_caption_embed.caption_embedder.0.weight")[0],
    }


def _auraflow(s: _Shapes) -> Config:
    width, inputs = s("pos_embed.proj.weight")
    head = min(256, width)
    return {
        "patch_size": 2,
        "in_channels": inputs // 4,
        "out_channels": s("proj_out.weight")[0] // 4,
        "num_mmdit_layers": s.count("joint_transformer_blocks.*."),
        "num_single_dit_layers": s.count("single_transformer_blocks.*."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight")[1],
        "caption_projection_dim": s("context_embedder.weight")[0],
        "pos_embed_max_size": s("pos_embed.pos_embed")[1],
    }


def _wan(s: _Shapes) -> Config:
    width, channels, *patch = s("patch_embedding.weight")
    head = min(128, width)
    image = "condition_embedder.image_embedder.norm1.weight"
    layers = s.count("blocks.*.")
    found: Config = {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": s("proj_out.weight")[0] // math.prod(patch),
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "ffn_dim": s("blocks.0.ffn.net.0.proj.weight")[0],
        "text_dim": s("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": s("condition_embedder.time_embedder.linear_1.weight")[1],
        "cross_attn_norm": "blocks.0.norm2.weight" in s,
        "image_dim": s(image)[0] if image in s else None,
        "added_kv_proj_dim": s("blocks.0.attn2.add_k_proj.weight")[1] if image in s else None,
    }
    positions = "condition_embedder.image_embedder.pos_embed"
    if positions in s:
        found["pos_embed_seq_len"] = s(positions)[1]
    if "vace_patch_embedding.weight" in s:
        hints = s.count("vace_blocks.*.")
        found["_class_name"] = "WanVACETransformer3DModel"
        found["vace_in_channels"] = s("vace_patch_embedding.weight")[1]
        found["vace_layers"] = list(range(0, layers, max(1, layers // hints)))
        if len(found["vace_layers"]) != hints:
            raise s.bad(f"its {hints} VACE blocks are not evenly spread over {layers}")
    return found


def _ltx(s: _Shapes) -> Config:
    width, channels = s("proj_in.weight")
    heads = 32  # of every model published
    return {
        "in_channels": channels,
        "out_channels": s("proj_out.weight")[0],
        "patch_size": 1,
        "patch_size_t": 1,
        "num_layers": s.count("transformer_blocks.*."),
        "attention_head_dim": max(1, width // heads),
        "num_attention_heads": heads,
        "cross_attention_dim": s("transformer_blocks.0.attn2.to_k.weight")[1],
        "caption_channels": s("caption_projection.linear_1.weight")[1],
    }


_TRANSFORMERS = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
}
_READERS: dict[str, Callable[[_Shapes], Config]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ChromaTransformer2DModel": _chroma,
    "ZImageTransformer2DModel": _z_image,
    "Lumina2Transformer2DModel": _lumina2,
    "AuraFlowTransformer2DModel": _auraflow,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    **_TRANSFORMERS,
}
