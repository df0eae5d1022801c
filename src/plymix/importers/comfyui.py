"""ComfyUI: the graph of nodes in a result's metadata (`prompt`, `workflow`) or in a JSON file.

From published descriptions: the merge nodes and their arithmetic. `ratio` is the share of model1,
so alpha = 1 - ratio; a slider of a block node is for the keys that begin with its name, the longest
name wins, and keys without one follow the first slider. From memory: the order of the values of a
node in `workflow` (in `prompt` they have names).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plymix import archs
from plymix.archs.views import view
from plymix.errors import Refusal
from plymix.expression import Expression, Merge, merge_method
from plymix.importers.base import Imported, Record, complement, number
from plymix.weights import DENOISER

WIDGETS = {
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CheckpointLoader": ("config_name", "ckpt_name"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "VAELoader": ("vae_name",),
    "ModelMergeSimple": ("ratio",),
    "CLIPMergeSimple": ("ratio",),
    "ModelMergeBlocks": ("input", "middle", "out"),
    "ModelMergeSubtract": ("multiplier",),
    "CLIPMergeSubtract": ("multiplier",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointSave": ("filename_prefix",),
    "ModelSave": ("filename_prefix",),
}
"""Values of a node in a workflow, in order."""


def _sliders(inputs: int, outputs: int) -> tuple[str, ...]:
    return (
        "time_embed.",
        "label_emb.",
        *(f"input_blocks.{i}." for i in range(inputs)),
        *(f"middle_block.{i}." for i in range(3)),
        *(f"output_blocks.{i}." for i in range(outputs)),
        "out.",
    )


WIDGETS["ModelMergeSD1"] = WIDGETS["ModelMergeSD2"] = _sliders(12, 12)
WIDGETS["ModelMergeSDXL"] = _sliders(9, 9)

SLIDERS = {
    *("ModelMergeBlocks", "ModelMergeSD1", "ModelMergeSD2", "ModelMergeSDXL"),
    *("ModelMergeSD3_2B", "ModelMergeSD35_Large", "ModelMergeAuraflow", "ModelMergeFlux1"),
    *("ModelMergeMochiPreview", "ModelMergeLTXV", "ModelMergeCosmos7B", "ModelMergeCosmos14B"),
    *("ModelMergeCosmosPredict2_2B", "ModelMergeCosmosPredict2_14B", "ModelMergeWAN2_1"),
    "ModelMergeQwenImage",
}
"""Nodes with one ratio for each group of keys."""

BLOCKS_OF = {
    "ModelMergeSD1": "sd1",
    "ModelMergeSD2": "sd2",
    "ModelMergeSDXL": "sdxl",
    "ModelMergeSD3_2B": "sd3",
    "ModelMergeSD35_Large": "sd3",
    "ModelMergeFlux1": "flux1",
}
"""Nodes whose sliders are the blocks of an architecture's view (`plymix.archs.views`)."""

LABELLED = ("ModelMergeSD1", "ModelMergeSD2")
"""Nodes with a slider for `label_emb.`, which their models do not have."""

SAMPLING = ("ModelSamplingDiscrete", "ModelSamplingContinuousEDM", "RescaleCFG", "CLIPSetLastLayer")
"""Nodes that change how a model is used, not its weights."""

Prompt = Mapping[str, Any]


def read(record: Record) -> Imported:
    """The recipe of a graph that saves a checkpoint. Raises Refusal."""
    prompt = record.fields
    if "nodes" in prompt:
        prompt = _from_workflow(prompt)
    graph = _Graph(record, prompt)
    record.fields = {}
    saves = [i for i, node in prompt.items() if _class(node) in ("CheckpointSave", "ModelSave")]
    if not saves:
        raise Refusal("ComfyUI: no CheckpointSave node in the graph; nothing says what is merged")
    if len(saves) > 1:
        record.note(f"{len(saves)} nodes save a model; the last one is imported")
    inputs = _inputs(prompt[saves[-1]])
    made = graph.at(inputs.get("model"), "model")
    output: dict[str, Any] = {"title": str(inputs.get("filename_prefix", "")).rpartition("/")[2]}
    if "clip" in inputs:
        made, output["text_encoder"] = _with_clip(made, graph.at(inputs["clip"], "clip"))
        if not output["text_encoder"]:  # a denoiser's own file has none that it could be merged to
            output["union"] = any(_class(node) == "UNETLoader" for node in prompt.values())
    if "vae" in inputs:
        vae = graph.at(inputs["vae"], "vae")
        if vae != _base(made):
            output["vae"] = vae
    if _class(prompt[saves[-1]]) == "ModelSave":  # the denoiser alone, by the names of checkpoints
        output |= {"component": "unet", "prefix": True}
    if graph.tables:
        output["block_view"] = "comfyui"
    return record.done(made, {k: v for k, v in output.items() if v})


def _base(x: Expression) -> Expression:
    while isinstance(x, Merge):
        x = x.used[0]
    return x


def _with_clip(made: Expression, clip: Expression) -> tuple[Expression, Expression | str]:
    """The merge of the models with that of the text encoders, and output.text_encoder."""
    both = _combined(made, clip)
    if both is not None:
        return both, ""
    if isinstance(clip, Merge):  # a step that takes BASE, the text encoders, from it
        alpha = {"base": 1.0, "default": 0.0, "blocks": {}}
        return merge_method("weighted_sum", made, clip, alpha=alpha), ""
    return made, clip


def _combined(made: Expression, clip: Expression) -> Expression | None:
    """One merge that does `made` to the U-Net and `clip` to the text encoder, or None."""
    if made == clip:
        return made
    if not isinstance(made, Merge) or not isinstance(clip, Merge) or made.method != clip.method:
        return None
    if len(made.used) != len(clip.used):
        return None
    inputs = [_combined(m, c) for m, c in zip(made.used, clip.used, strict=True)]
    if None in inputs:
        return None
    params = dict(made.settings)
    if made.settings != clip.settings:
        if made.method not in ("weighted_sum", "add_difference"):
            return None
        alpha, base = params["alpha"], clip.settings["alpha"]
        if isinstance(alpha, dict):
            params["alpha"] = {**alpha, "base": base}
        elif alpha != base:
            params["alpha"] = {"base": base, "default": alpha, "blocks": {}}
    return merge_method(made.method, *inputs, rules=made.rules, **params)


class _Graph:
    """The expression of each output of each node, made when asked for."""

    def __init__(self, record: Record, prompt: Prompt) -> None:
        self.record = record
        self.prompt = prompt
        self.made: dict[tuple[str, str], Expression] = {}
        self.open: set[tuple[str, str]] = set()
        self.tables = False  # whether a merge's weights are a table of ComfyUI's blocks

    def at(self, link: Any, what: str) -> Expression:
        """What arrives by a link: [node, output number]; `what` is model, clip or vae."""
        if not isinstance(link, (list, tuple)) or not link or str(link[0]) not in self.prompt:
            raise Refusal(f"ComfyUI: a {what} input of the graph is not connected")
        at = (str(link[0]), what)
        if at in self.open:
            raise Refusal(f"ComfyUI: the graph goes round in a circle at node {at[0]}")
        if at not in self.made:
            self.open.add(at)
            self.made[at] = self._node(at[0], what)
            self.open.discard(at)
        return self.made[at]

    def _node(self, number_of_node: str, what: str) -> Expression:
        node = self.prompt[number_of_node]
        kind, inputs = _class(node), _inputs(node)
        where = f"ComfyUI: {kind} (node {number_of_node})"
        match kind:
            case "CheckpointLoaderSimple" | "CheckpointLoader" | "unCLIPCheckpointLoader":
                return self.record.model(inputs.get("ckpt_name", ""), where)
            case "UNETLoader":
                return self.record.model(inputs.get("unet_name", ""), where)
            case "VAELoader":
                return self.record.model(inputs.get("vae_name", ""), where)
            case "ModelMergeAdd" | "CLIPMergeAdd":
                return self.at(inputs.get(f"{what}1"), what) + self.at(inputs.get(f"{what}2"), what)
            case "ModelMergeSubtract" | "CLIPMergeSubtract":
                scale = number(inputs.get("multiplier", 1.0), where)
                first, second = (self.at(inputs.get(f"{what}{i}"), what) for i in "12")
                return merge_method("subtract", first, second) * scale
            case "CLIPMergeSimple" | "ModelMergeSimple":
                return self._blend(
                    kind, inputs, what, {"": number(inputs.get("ratio", 1.0), where)}
                )
            case _ if kind in SAMPLING:
                self.record.note(f"{kind} changes how a model is used; it is not in the recipe")
                return self.at(inputs.get(what), what)
            case _ if kind in SLIDERS and what == "model":
                order = WIDGETS.get(kind, tuple(inputs))  # JSON need not keep it
                sliders = {
                    name: number(inputs[name], where)
                    for name in order
                    if isinstance(inputs.get(name), (int, float)) and not _is_idle(kind, name)
                }
                if sliders:
                    return self._blend(kind, inputs, what, sliders)
        raise Refusal(f"{where}: plymix does not know what it does to a {what}")

    def _blend(
        self, kind: str, inputs: Mapping[str, Any], what: str, sliders: dict[str, float]
    ) -> Expression:
        """Shares of the first model by the beginnings of keys; the first is for all others."""
        first, second = (self.at(inputs.get(f"{what}{i}"), what) for i in "12")
        alphas = {name: complement(ratio) for name, ratio in sliders.items()}
        default = next(iter(alphas.values()))
        if table := _by_block(kind, alphas):
            self.tables = True
            alpha = {"blocks": table, "default": default}
            return merge_method("weighted_sum", first, second, alpha=alpha)
        # In a list of rules the last one that fits wins, here the longest name.
        rules = [
            f":diffusion_model.{name}:{alpha!r}"
            for name, alpha in sorted(alphas.items(), key=lambda item: len(item[0]))
            if alpha != default
        ]
        return merge_method("weighted_sum", first, second, alpha=default, rules=rules)


def _by_block(kind: str, alphas: Mapping[str, float]) -> dict[str, float]:
    """The weights by the names of the view; {} for sliders that are not one block each."""
    if kind not in BLOCKS_OF:
        return {}
    arch = archs.load(BLOCKS_OF[kind])
    seen = view(arch, "comfyui")
    table: dict[str, float] = {}
    for name, alpha in alphas.items():
        if name == "pos_embed.":  # a buffer, which its node has a slider for
            continue
        place = arch.place(f"{DENOISER}{name.rstrip('.')}.0.weight")
        block = seen.place(place).block if place else ""
        if block not in seen.blocks or block in table:
            return {}
        table[block] = alpha
    return table


def _is_idle(kind: str, slider: str) -> bool:
    return kind in LABELLED and slider == "label_emb."


def _class(node: Any) -> str:
    return str(node.get("class_type", "")) if isinstance(node, Mapping) else ""


def _inputs(node: Any) -> Mapping[str, Any]:
    found = node.get("inputs") if isinstance(node, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _rows(value: Any, kind: type) -> list[Any]:
    """The entries of a list that are of a kind."""
    return [v for v in value if isinstance(v, kind)] if isinstance(value, list) else []


def _from_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow (nodes, links, values in order) as a prompt (nodes with named inputs)."""
    links = {str(k[0]): [str(k[1]), k[2]] for k in _rows(workflow.get("links"), list) if k[4:]}
    prompt: dict[str, Any] = {}
    for node in _rows(workflow.get("nodes"), dict):
        kind = str(node.get("type", ""))
        if node.get("mode") in (2, 4) and kind in WIDGETS:
            raise Refusal(f"ComfyUI: {kind} (node {node.get('id')}) is muted or bypassed")
        values = node.get("widgets_values")
        if isinstance(values, list):
            values = dict(zip(WIDGETS.get(kind, ()), values, strict=False))
        inputs = dict(values) if isinstance(values, Mapping) else {}
        for port in _rows(node.get("inputs"), dict):
            if str(port.get("link")) in links:
                inputs[str(port.get("name"))] = links[str(port.get("link"))]
        prompt[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return prompt
