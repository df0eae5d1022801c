"""sd-mecha, mergekit and torch by hand on what they share with plymix.

    python benchmarks/peers.py ENVIRONMENT      install both into a virtual environment

Each is run as its users run it: sd-mecha by a script over its Python API (it computes in float32
and writes float16 by default), mergekit by `mergekit-pytorch`, told to do the same. Where the
tools define a method differently (DARE's divisor, TIES' vote, DELLA's window) each runs its own.
sd-mecha's TIES with dropout multiplies by Model Stock's factor unless `apply_stock` is True. What
merges LoRAs into models, kohya's scripts among them, is a script over torch, written out here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import deltas, step, toml

PACKAGES = ("sd-mecha", "mergekit")
PEERS = (*PACKAGES, "torch")
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Shared:
    """A method that more than one tool has: our recipe, and theirs or "" where there is none.

    `group` names the files it needs; `torch` is a whole script.
    """

    name: str
    recipe: str
    mecha: str = ""
    kit: str = ""
    torch: str = ""
    group: str = "sd1"

    def line(self, tool: str) -> str:
        """The command of a tool, "" where it does not have the method."""
        return {
            "plymix": f"plymix run {self.name}.toml -o out.safetensors",
            "sd-mecha": f"python {self.name}.py" if self.mecha else "",
            "mergekit": f"mergekit-pytorch {self.name}.yaml out" if self.kit else "",
            "torch": f"python {self.name}-torch.py" if self.torch else "",
        }[tool]

    @property
    def files(self) -> dict[str, str]:
        """What the commands read."""
        script = (
            "import sd_mecha\n\n"
            'a, b, c = (sd_mecha.model(f"{x}.safetensors") for x in "abc")\n'
            f'sd_mecha.merge({self.mecha}, output="out.safetensors")\n'
        )
        found = {"toml": self.recipe, "py": self.mecha and script, "yaml": self.kit}
        texts = {f"{self.name}.{suffix}": text for suffix, text in found.items() if text}
        return texts | ({f"{self.name}-torch.py": self.torch} if self.torch else {})


def kit(method: str, models: Mapping[str, Mapping[str, Any]], base: str = "", **params: Any) -> str:
    """mergekit's configuration: each model with its own parameters, computed in float32."""
    lines = [f"merge_method: {method}", "models:"]
    for model, own in models.items():
        lines.append(f"  - model: {model}.safetensors")
        if own:
            lines += ["    parameters:", *(f"      {k}: {_yaml(v)}" for k, v in own.items())]
    if base:
        lines.append(f"base_model: {base}.safetensors")
    if params:
        lines += ["parameters:", *(f"  {k}: {_yaml(v)}" for k, v in params.items())]
    return "\n".join([*lines, "dtype: float32", "out_dtype: float16", ""])


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def task(method: str, **own: Any) -> str:
    """mergekit over the differences of b and c from a."""
    return kit(method, {"b": {"weight": 1, **own}, "c": {"weight": 1, **own}}, "a")


# The gradient 1 ... 0 ... 1 over the 25 blocks, as share of a.
GRADIENT = [round(abs(12 - i) / 12, 10) for i in range(25)]
BLOCKS = [*(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
PLACES = [
    *(f"input_blocks.{i}." for i in range(12)),
    "middle_block.",
    *(f"output_blocks.{i}." for i in range(12)),
]


def by_place(values: list[float], rest: float) -> list[dict[str, Any]]:
    """A mergekit setting: the first filter found in a tensor's name gives its value."""
    found = [{"filter": p, "value": v} for p, v in zip(PLACES, values, strict=True)]
    return [*found, {"value": rest}]


_rest = [round(1 - v, 10) for v in GRADIENT]
_blocks = {"BASE": 0.0, **dict(zip(BLOCKS, _rest, strict=True))}
_three: dict[str, Any] = {"mix": {"method": "n_average", "models": ["a", "b", "c"]}}
_karcher: dict[str, Any] = {"mix": {"method": "karcher", "models": ["a", "b", "c"]}}

_strengths = {f"lora-{i}": s for i, s in (("1", 0.8), ("2", 0.5), ("3", -0.3))}
_bake: dict[str, Any] = {
    "method": "lora", "model": "xl-a", "loras": [*_strengths], "strength": [*_strengths.values()]
}  # fmt: skip
_BY_HAND = f"""import torch
from safetensors.torch import load_file, save_file

model = load_file("xl-a.safetensors")
keys = {{
    "lora_unet_" + key.split("diffusion_model.", 1)[1][: -len(".weight")].replace(".", "_"): key
    for key in model
    if "diffusion_model." in key and key.endswith(".weight")
}}
for name, strength in {_strengths}.items():
    lora = load_file(name + ".safetensors")
    for up in [key for key in lora if key.endswith(".lora_up.weight")]:
        module = up.removesuffix(".lora_up.weight")
        down = lora[module + ".lora_down.weight"].float()
        scale = float(lora.get(module + ".alpha", len(down))) / len(down)
        w = model[keys[module]]
        change = lora[up].float() @ down
        model[keys[module]] = (w.float() + strength * scale * change).to(w.dtype)
save_file(model, "out.safetensors")
"""
"""One LoRA after the other in float32, rounded each time: kohya's way."""

SHARED: tuple[Shared, ...] = (
    Shared(
        "gradient",
        toml("ab", step("weighted_sum", "ab", alpha={"base": 0.0, "blocks": _rest})),
        f'sd_mecha.weighted_sum(a, b, alpha=sd_mecha.convert({_blocks}, "sd1-ldm"))',
        kit(
            "linear",
            {"a": {"weight": by_place(GRADIENT, 1.0)}, "b": {"weight": by_place(_rest, 0.0)}},
        ),
    ),
    Shared(
        "weighted_sum",
        toml("ab", step("weighted_sum", "ab", alpha=0.3)),
        "sd_mecha.weighted_sum(a, b, alpha=0.3)",
        kit("linear", {"a": {"weight": 0.7}, "b": {"weight": 0.3}}),
    ),
    Shared(
        "add_difference",
        toml("abc", step("add_difference", "abc", alpha=0.7)),
        "sd_mecha.add_difference(a, b, c, alpha=0.7)",
        kit("task_arithmetic", {"a": {"weight": 1}, "b": {"weight": 0.7}}, "c"),
    ),
    Shared(
        "average",
        toml("abc", _three),
        "sd_mecha.n_average(a, b, c)",
        kit("linear", {x: {"weight": 1} for x in "abc"}),
    ),
    Shared(
        "slerp",
        toml("ab", step("slerp", "ab", alpha=0.3)),
        "sd_mecha.slerp(a, b, alpha=0.3)",
        kit("slerp", {"a": {}, "b": {}}, "a", t=0.3),
    ),
    Shared(
        "ties",
        toml("abc", deltas("ties", density=0.2)),
        # Its add_difference_ties stops with an AttributeError (1.1.8); this is what it is made of.
        "sd_mecha.extensions.merge_methods.resolve('add_difference')(a, sd_mecha.ties_sum("
        "sd_mecha.subtract(b, a), sd_mecha.subtract(c, a), k=0.2))",
        task("ties", density=0.2),
    ),
    Shared(
        "dare_linear",
        toml("abc", deltas("dare_linear", density=0.5)),
        "sd_mecha.dropout(a, b, c, probability=0.5, alpha=1.0, seed=0)",
        task("dare_linear", density=0.5),
    ),
    Shared(
        "dare_ties",
        toml("abc", deltas("dare_ties", density=0.5)),
        "sd_mecha.add_ties_with_dare(a, b, c, probability=0.5, seed=0, apply_stock=True)",
        task("dare_ties", density=0.5),
    ),
    Shared(
        "della",
        toml("abc", deltas("della", density=0.5, epsilon=0.15)),
        "sd_mecha.add_ties_with_dare("
        "a, b, c, probability=0.5, della_eps=0.3, seed=0, apply_stock=True)",
        task("della", density=0.5, epsilon=0.15),
    ),
    Shared(
        "breadcrumbs",
        toml("abc", deltas("breadcrumbs", density=0.9, gamma=0.01)),
        kit=task("breadcrumbs", density=0.9, gamma=0.01),
    ),
    Shared(
        "model_stock",
        toml("abc", deltas("model_stock")),
        "sd_mecha.n_model_stock(a, b, c)",
        kit("model_stock", {"b": {}, "c": {}}, "a"),
    ),
    Shared(
        "sce",
        toml("abc", deltas("sce", select=0.5)),
        kit=kit("sce", {"b": {}, "c": {}}, "a", select_topk=0.5),
    ),
    Shared(
        "nearswap",
        toml("ab", step("nearswap", "ab", t=0.001)),
        kit=kit("nearswap", {"b": {}}, "a", t=0.001),
    ),
    Shared(
        "karcher",
        toml("abc", _karcher),
        kit=kit("karcher", {x: {} for x in "abc"}),
    ),
    Shared(
        "arcee_fusion",
        toml("ab", step("arcee_fusion", "ab")),
        kit=kit("arcee_fusion", {"b": {}}, "a"),
    ),
    Shared(
        "train_difference",
        toml("abc", step("train_difference", "abc", alpha=1.0)),
        "sd_mecha.add_difference(a, b, c,"
        " alpha=sd_mecha.train_difference_mask(a, b, c, alpha=1.0))",
    ),
    Shared(
        "geometric_sum",
        toml("ab", step("geometric_sum", "ab", alpha=0.3)),
        "sd_mecha.geometric_sum(a, b, alpha=0.3)",
    ),
    Shared(
        "add_perpendicular",
        toml("abc", step("add_perpendicular", "abc", alpha=0.7)),
        "sd_mecha.add_perpendicular(a, b, c, alpha=0.7)",
    ),
    Shared(
        "lora_bake",
        toml({n: f"{n}.safetensors" for n in ("xl-a", *_strengths)}, {"mix": _bake}),
        torch=_BY_HAND,
        group="loras",
    ),
)


def install(env: Path) -> str:
    """Make the environment if it is not there, and give both tools' versions, torch's too."""
    python = env / "bin" / "python"
    if not (env / "bin" / "mergekit-pytorch").exists():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # This torch first, so that a build for the processor is taken where the index has one.
        if subprocess.run([*pip, TORCH], check=False).returncode:
            subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
    ask = "from importlib.metadata import version as v\nfor n in {}: print(n, v(n), end=', ')"
    names = [*PACKAGES, "torch"]
    said = subprocess.run([python, "-c", ask.format(names)], check=True, stdout=subprocess.PIPE)
    return said.stdout.decode().strip(", ")


if __name__ == "__main__":
    print(install(Path(sys.argv[1])))
