"""Every family of LoRA in every spelling for every architecture: what there is to be tried.

`tests/adapters/test_matrix.py` runs it; the table in docs/reference/loras.md is written from it.
Nothing here uses plymix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from loras import CONV, LINEAR, Change, full, set_
from maps import ARCH, converted, golden_map

UNET = "model.diffusion_model."
Shape = tuple[int, ...]
KOHYA: Mapping[str, str] = {}
AB = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
PEFT_ENDS = {**AB, "dora_scale": "lora_magnitude_vector"}
ALL = frozenset((*LINEAR, *CONV))
OF_LYCORIS = ALL - {"set"}
OF_LORA = frozenset(n for n in CONV if n.startswith(("LoRA", "LoCon")))


@dataclass(frozen=True)
class Spelling:
    """A way in which tools write a module's keys.

    `start` stands before a module's name, which is the architecture's own or diffusers', with "_"
    for "." if `plain`; `ends` are its names for the ends of kohya's keys. `known` are the families
    that the tools which write it have; `tools` says who they are. Some are not used for U-Nets.
    """

    start: str
    tools: str
    own: bool = False
    plain: bool = False
    ends: Mapping[str, str] = field(default_factory=lambda: KOHYA)
    respell: tuple[tuple[str, str], ...] = ()
    known: frozenset[str] = ALL
    of_transformers: bool = False

    def name(self, name: str) -> str:
        for a, b in self.respell:
            name = name.replace(a, b)
        return self.start + (name.replace(".", "_") if self.plain else name)

    def keys(self, name: str, change: Change) -> dict[str, Any]:
        """The tensors of a module's change, by the file's keys."""
        tensors = {}
        for end, x in change.tensors.items():
            end = self.ends.get(end, end)
            if end == "lora_magnitude_vector":
                if x.shape[0] == 1:  # of columns: PEFT has none
                    end = "dora_scale"
                elif x.ndim == 2:  # of convolutions PEFT has (1, out, 1, 1)
                    x = x[:, 0]
                else:
                    x = np.swapaxes(x, 0, 1)
            tensors[f"{self.name(name)}.{end}"] = x
        return tensors


DIFFUSERS = OF_LORA | {"DoRA"}
SPELLINGS = {
    "kohya": Spelling(
        "lora_unet_", "kohya, A1111, Forge, LyCORIS", own=True, plain=True, known=OF_LYCORIS
    ),
    "kohya, diffusers' names": Spelling(
        "lora_unet_", "kohya for SD1 and SD2, LyCORIS", plain=True, known=OF_LYCORIS
    ),
    "LyCORIS": Spelling("lycoris_", "LyCORIS, SimpleTuner", plain=True, known=OF_LYCORIS),
    "LyCORIS, own names": Spelling(
        "lycoris_", "LyCORIS", own=True, plain=True, known=OF_LYCORIS
    ),
    "OneTrainer": Spelling(
        "lora_transformer_", "OneTrainer", plain=True, of_transformers=True,
        known=OF_LORA | {"LoHa", "DoRA", "DoRA LoHa"},
    ),
    "diffusers": Spelling("unet.", "diffusers", ends=PEFT_ENDS, known=DIFFUSERS),
    "ai-toolkit": Spelling(
        "transformer.", "diffusers, ai-toolkit, SimpleTuner", ends=PEFT_ENDS, known=DIFFUSERS,
        of_transformers=True,
    ),
    "old diffusers": Spelling(
        "unet.", "diffusers before 0.22",
        ends={"lora_up.weight": "up.weight", "lora_down.weight": "down.weight"},
        respell=((".to_out.0", ".to_out"), (".to_", ".processor.to_")), known=OF_LORA,
    ),
    "PEFT": Spelling(
        "base_model.model.", "PEFT", ends=PEFT_ENDS,
        known=DIFFUSERS | {n for n in CONV if n.startswith(("LoHa", "LoKr"))},
    ),
    "PEFT, unnamed": Spelling(
        "base_model.model.", "scripts that save a PEFT model's state",
        ends={k: v.replace(".weight", ".default.weight") for k, v in AB.items()}, known=DIFFUSERS,
    ),
    "PEFT, own names": Spelling(
        "base_model.model.", "fal", own=True, ends=PEFT_ENDS, known=DIFFUSERS, of_transformers=True
    ),
    "ComfyUI": Spelling(
        "diffusion_model.", "ComfyUI, ai-toolkit, musubi-tuner, diffusion-pipe", own=True,
        ends=PEFT_ENDS,
    ),
    "checkpoint": Spelling(
        UNET, "names as in a checkpoint", own=True, ends=PEFT_ENDS, known=DIFFUSERS
    ),
    "BFL": Spelling(
        "", "BFL's control LoRAs", own=True, ends=PEFT_ENDS, known=DIFFUSERS | {"set"},
        of_transformers=True,
    ),
}  # fmt: skip
"""Before the names of the denoiser's modules. x-flux has names of its own: test_spellings."""

ENCODERS = {  # model, component of the map or none, prefix of the keys -> what names begin with
    ("sd1", "text_encoder", "cond_stage_model.transformer."): (
        "lora_te_", "lora_te1_", "lycoris_te1_", "text_encoder.",
        "base_model.model.text_encoder.", "text_encoders.clip_l.transformer.",
    ),
    ("sd2", "text_encoder", "cond_stage_model.model."): ("lora_te_", "text_encoder."),
    ("sdxl", "text_encoder", "conditioner.embedders.0.transformer."): (
        "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.",
    ),
    ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."): (
        "lora_te2_", "lycoris_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.",
    ),
    ("sd3.5-medium", "", "text_encoders.clip_l.transformer."): ("lora_te1_", "text_encoder."),
    ("sd3.5-medium", "", "text_encoders.clip_g.transformer."): ("lora_te2_", "text_encoder_2."),
    ("sd3.5-medium", "", "text_encoders.t5xxl.transformer."): ("lora_te3_", "text_encoder_3."),
    ("flux-dev", "", "text_encoders.clip_l.transformer."): ("lora_te1_", "text_encoder."),
    ("flux-dev", "", "text_encoders.t5xxl.transformer."): (
        "lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer.",
    ),
}  # fmt: skip

NO_MAP = ("pixart-sigma", "qwen-image", "hidream-i1", "anima", "sdxl-refiner", "wan2.2-ti2v-5b",
          "cosmos-predict2-14b")  # fmt: skip
"""Models of which no other program's converter is recorded: tried in their own names."""

MODELS = (*ARCH, *NO_MAP)


ROWS = {"weight_decompose": True, "wd_on_out": True}
COLUMNS = {"weight_decompose": True, "wd_on_out": False}
LYCORIS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("LoConModule", {}, "layers"),
    "LoRA of rank-stabilised scale": ("LoConModule", {"rs_lora": True}, "layers"),
    "LoRA with a scalar": ("LoConModule", {"use_scalar": True}, "layers"),
    "LoCon-CP": ("LoConModule", {"use_tucker": True}, "kernels"),
    "LoHa": ("LohaModule", {}, "layers"),
    "LoHa-CP": ("LohaModule", {"use_tucker": True}, "kernels"),
    "LoKr": ("LokrModule", {"factor": 4}, "layers"),
    "LoKr, both products": (
        "LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}, "layers"
    ),
    "LoKr, both whole": ("LokrModule", {"factor": 4, "full_matrix": True}, "layers"),
    "LoKr-CP": ("LokrModule", {"factor": 2, "use_tucker": True, "lora_dim": 1}, "kernels"),
    "GLoRA": ("GLoRAModule", {}, "layers"),
    "GLoRA-CP": ("GLoRAModule", {"use_tucker": True}, "kernels"),
    "IA3": ("IA3Module", {}, "layers"),
    "IA3 on input": ("IA3Module", {"train_on_input": True}, "layers"),
    "OFT": ("DiagOFTModule", {}, "layers"),
    "OFT, limited": ("DiagOFTModule", {"constraint": 0.01}, "layers"),
    "OFT, rescaled": ("DiagOFTModule", {"rescaled": True}, "layers"),
    "BOFT": ("ButterflyOFTModule", {}, "layers"),
    "BOFT, limited": ("ButterflyOFTModule", {"constraint": 0.01}, "layers"),
    "BOFT, rescaled": ("ButterflyOFTModule", {"rescaled": True}, "layers"),
    "full": ("FullModule", {}, "layers"),
    "DyLoRA": ("DyLoraModule", {"block_size": 1}, "layers"),
    "DoRA": ("LoConModule", ROWS, "layers"),
    "DoRA of columns": ("LoConModule", COLUMNS, "layers"),
    "DoRA LoCon-CP": ("LoConModule", {"use_tucker": True, **ROWS}, "kernels"),
    "DoRA LoHa": ("LohaModule", ROWS, "layers"),
    "DoRA LoHa of columns": ("LohaModule", COLUMNS, "layers"),
    "DoRA LoHa-CP": ("LohaModule", {"use_tucker": True, **ROWS}, "kernels"),
    "DoRA LoKr": ("LokrModule", {"factor": 4, **ROWS}, "layers"),
    "DoRA LoKr-CP": (
        "LokrModule", {"factor": 2, "use_tucker": True, "lora_dim": 1, **ROWS}, "kernels"
    ),
}  # fmt: skip
"""Modules of LyCORIS by family: the class, its arguments, and the layers it is for ("layers":
linear ones and convolutions)."""

PEFT: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA of rank-stabilised scale": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
"""LoraConfig's arguments by family, for linear layers and convolutions."""
PEFT_OTHERS = ("LoHa", "LoHa-CP", "LoKr")
"""Families of other configurations of PEFT."""


def component_of(model: str) -> str:
    """What the maps call the denoiser; "" for a model without a map."""
    maps = golden_map(model) if model in ARCH else ()
    return next((c for c in maps if c in ("unet", "transformer")), "")


def parts(model: str, component: str, key: str, x: Any) -> dict[str, Any]:
    """A tensor as another program's spelling has it: {name: part}; none where it has no such."""
    rows = golden_map(model)[component]
    names, transform = rows.get(key) or rows.get(key.removeprefix(UNET)) or ([], "drop")
    return converted(x, names, transform) if names else {}


def picked(shapes: Mapping[str, Shape]) -> list[str]:
    """Keys: one of each kind, and as many more matrices and kernels as there are families."""
    kinds: dict[str, list[str]] = {}
    for key in shapes:
        kinds.setdefault("".join(c for c in key if not c.isdigit()), []).append(key)
    found = [keys[0] for keys in kinds.values()]
    for ndim, families in ((2, LINEAR), (4, CONV)):
        here = [keys for keys in kinds.values() if len(shapes[keys[0]]) == ndim]
        more = [key for row in zip_longest(*(keys[1:] for keys in here)) for key in row if key]
        found += more[: max(0, len(families) - len(here))]
    return found


def fits(family: str, shape: Shape) -> bool:
    """Whether tests/loras.py can draw the family for a weight: it halves and quarters sides."""
    out, in_ = shape[:2]
    if family.endswith("CP") and len(shape) != 4:
        return False
    if "LoKr" in family:
        return out % 2 == in_ % 2 == 0
    if "GLoRA" in family:  # which of its two kinds a file is, is told by the rank being the less
        return min(out, in_) > 3
    if "BOFT" in family:
        return out % 4 == 0 and math.log2(out // 4).is_integer()
    return "OFT" not in family or out % 2 == 0


class Drawn:
    """Changes of one parameter after the other, of every family in turn."""

    def __init__(self) -> None:
        self.count = 0
        self.turns = {2: list(LINEAR), 4: list(CONV)}

    def __call__(self, name: str, shape: Shape) -> Change:
        """Lines, and what is no module's weight, get differences, some of them a new value."""
        self.count += 1
        end, seed = name.rpartition(".")[2], self.count
        if len(shape) > 1 and end == "weight":
            turn = self.turns[2 if len(shape) == 2 else 4]
            family = next(f for f in turn if fits(f, shape))
            turn.remove(family)
            turn.append(family)
            return (CONV if len(shape) > 2 else LINEAR)[family](shape, seed)
        if end not in ("weight", "bias"):
            return full(shape, seed)
        if end == "weight" and seed % 10 == 0:
            return set_(shape, seed)
        kind = {"weight": ("w_norm", "diff"), "bias": ("b_norm", "diff_b")}[end][seed % 2]
        change = full(shape, seed)
        return Change({kind: change.tensors["diff"]}, change.delta)
