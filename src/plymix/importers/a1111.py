"""A1111's checkpoint merger, and tools that write the same record: Chattiori-Model-Merger.

A1111 (from its published metadata): `sd_merge_recipe` names the models by sha256 as primary,
secondary and tertiary; `multiplier` is the share of the secondary model, as plymix's alpha is.
Chattiori-Model-Merger (from memory): the same hashes with `merge_method`, `alpha_info` and
`beta_info`, each a number, a preset's name or a list of block weights.
"""

from __future__ import annotations

from typing import Any

from plymix import weights
from plymix.errors import Refusal, unknown
from plymix.importers.base import Imported, Record, block_weights, merged, number

METHODS = {
    "weighted sum": ("weighted_sum", 2, ("alpha",)),
    "ws": ("weighted_sum", 2, ("alpha",)),
    "add difference": ("add_difference", 3, ("alpha",)),
    "ad": ("add_difference", 3, ("alpha",)),
    "training difference": ("train_difference", 3, ("alpha",)),
    "td": ("train_difference", 3, ("alpha",)),
    "smooth add difference": ("smooth_add", 3, ("alpha",)),
    "sad": ("smooth_add", 3, ("alpha",)),
    "multiply difference": ("multiply_difference", 3, ("alpha", "beta")),
    "md": ("multiply_difference", 3, ("alpha", "beta")),
    "similarity add difference": ("similarity_add_difference", 3, ("alpha", "beta")),
    "sim": ("similarity_add_difference", 3, ("alpha", "beta")),
    "triple sum": ("triple_sum", 3, ("alpha", "beta")),
    "trs": ("triple_sum", 3, ("alpha", "beta")),
    "sum twice": ("sum_twice", 3, ("alpha", "beta")),
    "st": ("sum_twice", 3, ("alpha", "beta")),
    "tensor sum": ("tensor", 2, ("alpha", "beta")),
    "ts": ("tensor", 2, ("alpha", "beta")),
    "no interpolation": ("", 1, ()),
    "noin": ("", 1, ()),
}
"""The other tool's name in small letters -> method, number of models, parameters."""

MODELS = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")


def read(record: Record) -> Imported:
    """The recipe of a `sd_merge_recipe` by A1111 or Chattiori. Raises Refusal."""
    record.take("type")
    said = str(record.take("interp_method", "merge_method"))
    if said.lower() not in METHODS:
        raise unknown(f"{record.tool} method", said, METHODS)
    method, count, params = METHODS[said.lower()]
    models = [record.model(record.take(name), name) for name in MODELS[:count]]
    for name in MODELS[count:]:
        record.take(name)
    settings: dict[str, Any] = {}
    for param in params:
        names = ("multiplier", "alpha_info") if param == "alpha" else ("beta_info",)
        settings[param] = _weight(record.take(*names), f"{record.tool}: {' or '.join(names)}")
    record.take("multiplier", "alpha_info", "beta_info")
    output: dict[str, Any] = {"title": str(record.take("custom_name", "output_name"))}
    if record.truth("save_as_half"):
        output["dtype"] = "fp16"
    vae = record.take("bake_in_vae")
    if vae:
        output["vae"] = record.part(vae, "the VAE")
    elif method and record.tool == "A1111":
        record.blended_vae()
    # Facts about the result, not settings: they follow from the models.
    record.take("config_source", "is_inpainting", "is_instruct_pix2pix", "block_weights")
    return record.done(merged(method, *models, **settings) if method else models[0], output)


def _weight(value: Any, where: str) -> Any:
    if value == "":
        raise Refusal(f"{where} is missing")
    if isinstance(value, (int, float)) or isinstance(weights.literal(str(value).strip()), float):
        return number(value, where)
    return block_weights(value, None, where)
