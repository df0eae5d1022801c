"""Write src/plymix/archs/sizes.toml: parameters per block, counted in the golden headers.

    python scripts/block_sizes.py

Nothing here uses plymix: blocks and shapes stand in tests/golden/headers.
"""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

from tiny_checkpoints import golden

TARGET = Path(__file__).resolve().parent.parent / "src" / "plymix" / "archs" / "sizes.toml"
MODELS = {  # golden header -> architecture, and what the model is called
    "anima": ("anima", "Anima"),
    "auraflow": ("auraflow", "AuraFlow"),
    "chroma": ("chroma", "Chroma"),
    "cosmos-predict2-14b": ("cosmos2", "Cosmos-Predict2 14B"),
    "cosmos-predict2-2b": ("cosmos2", "Cosmos-Predict2 2B"),
    "flux-dev": ("flux1", "Flux.1 dev"),
    "flux2-dev": ("flux2", "Flux.2 dev"),
    "flux2-klein-9b": ("flux2", "Flux.2 klein 9B"),
    "flux2-klein-4b": ("flux2", "Flux.2 klein 4B"),
    "hidream-i1": ("hidream", "HiDream-I1"),
    "hunyuan-video": ("hunyuan-video", "HunyuanVideo"),
    "krea2": ("krea2", "Krea 2"),
    "ltx-video-13b": ("ltx-video", "LTX-Video 13B"),
    "ltx-video-2b": ("ltx-video", "LTX-Video 2B"),
    "lumina2": ("lumina2", "Lumina 2"),
    "pixart-sigma": ("pixart", "PixArt-Sigma"),
    "qwen-image": ("qwen-image", "Qwen-Image"),
    "sd1": ("sd1", "SD1"),
    "sd2": ("sd2", "SD2"),
    "sd3.5-medium": ("sd3", "SD3.5 medium"),
    "sdxl": ("sdxl", "SDXL base"),
    "sdxl-refiner": ("sdxl-refiner", "SDXL refiner"),
    "ssd-1b": ("ssd-1b", "SSD-1B"),
    "vega": ("vega", "Segmind Vega"),
    "wan2.1-i2v-14b": ("wan", "Wan 2.1 i2v 14B"),
    "wan2.1-t2v-14b": ("wan", "Wan 2.1 t2v 14B"),
    "wan2.1-vace-14b": ("wan", "Wan 2.1 VACE 14B"),
    "wan2.2-ti2v-5b": ("wan", "Wan 2.2 ti2v 5B"),
    "wan2.1-t2v-1.3b": ("wan", "Wan 2.1 t2v 1.3B"),
    "z-image": ("z-image", "Z-Image"),
}
HEAD = """\
# Parameters in each block of published models, buffers left out; of an architecture's models the
# deepest comes first. Written by scripts/block_sizes.py from the tests' golden headers.
"""
OUTSIDE = ("BASE", "CLIP", "T5", "VAE")


def sizes(model: str) -> dict[str, int]:
    """Block -> parameters, in the model's order, text encoders and VAE last."""
    found: dict[str, int] = {}
    for key, (_, shape, _, block) in golden(model).items():
        if block != "BUFFER" and key.rpartition(".")[2] != "pos_embed":
            found[block] = found.get(block, 0) + math.prod(shape)
    order = sorted(found, key=lambda b: (b in OUTSIDE, _stem_order(b, found), b))
    return {block: found[block] for block in order}


def _stem_order(block: str, found: dict[str, int]) -> int:
    """Numbered runs in the order in which their first block stands in the file; OUT at the end."""
    stems = ["IN", *dict.fromkeys(b.rstrip("0123456789") for b in found), "OUT"]
    stem = block.rstrip("0123456789")
    return len(stems) if stem == "OUT" else stems.index(stem)


def made() -> str:
    lines = [HEAD]
    for model, (arch, title) in MODELS.items():
        lines.append(f'[{arch}."{title}"]')
        rows = sizes(model).items()
        for (_, n), run in groupby(rows, key=lambda row: (row[0].rstrip("0123456789"), row[1])):
            names = [name for name, _ in run]
            name = names[0] if len(names) == 1 else f'"{names[0]}..{names[-1]}"'
            lines.append(f"{name} = {n:_}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(made(), encoding="utf-8", newline="\n")
    print(f"{TARGET.name}: {len(MODELS)} models")
