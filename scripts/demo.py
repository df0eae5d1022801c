"""`make demo`: the experiment of block-weighted merging, on a pair of real, tiny models.

1. The classic command on the pair: the block table, and what really changed in each block, measured
   on the finished file.
2. Pictures: both models, 50:50, shallow layers of the one with deep layers of the other, and the
   reverse; four seeds; then the same merges for four prompts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from plymix import archs, kernels
from plymix.formats import Source, open_model

ROOT = Path(__file__).resolve().parent.parent
PAIR = ROOT / "demo" / "pair"
OUT = ROOT / "demo" / "out"

A, B, UNET = "emoji-shaded.safetensors", "emoji-flat.safetensors", "emoji-flat-unet.safetensors"
MERGES = ("A", "B", "0.5", "GRAD_A", "GRAD_V base=1 vae=b")
"""Shares of B: GRAD_A has shallow layers of A and deep ones of B, GRAD_V the reverse."""

ASKED = "masterpiece, best quality, a rocket"
PROMPTS = ("a red apple", "a rocket", "a penguin", "a cat", "a house", "a car")
USUAL = ("--negative", "lowres, bad anatomy, worst quality, low quality, blurry", "--sampler",
         "euler_a", "--steps", "40", "--cfg", "4", "--size", "128x128", "--force")  # fmt: skip


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in (A, UNET):
        shutil.copyfile(PAIR / name, OUT / name)
    print(f"{A} draws shaded emoji; its U-Net exchanged, {B} draws flat ones with an outline:\n")
    plymix("merge", A, A, "--alpha", "0", "--unet", UNET, "-o", B, "--force")

    print("\nThe classic command: shallow layers of model 1, deep layers of model 2.\n")
    merged = "merged.safetensors"
    plymix("mbw", A, B, "--base_alpha", "1.0", "--weights", "GRAD_V", "--verbose",
           "--output", merged, "--force")  # fmt: skip
    print(f"\nWhat changed, measured on the file (share of the way from {A} to {B}):\n")
    for block, share in measured(OUT / A, OUT / B, OUT / merged).items():
        print(f"  {block:<6} {share:7.1%}  {'█' * round(24 * share)}")
    print("\nIs the file what its recipe says?\n")
    plymix("verify", merged)

    print("\nWhat they draw: five merges, four seeds; no checkpoint is written for it.\n")
    each = [word for merge in MERGES for word in ("--each", merge)]
    plymix("compare", A, B, *each, "--prompt", ASKED, "--seeds", "1-4", *USUAL,
           "-o", "sheet.png")  # fmt: skip
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    plymix("compare", A, B, *each, *asked, "--seeds", "1", *USUAL, "-o", "prompts.png")

    place = OUT.relative_to(ROOT)
    print(f"\nLook at {place / 'sheet.png'} and {place / 'prompts.png'}, or at their pages,")
    print(f"{place / 'sheet.html'} and {place / 'prompts.html'}. Next: plymix blocks {A} {B}")


def plymix(*words: str) -> None:
    shown = (f'"{word}"' if " " in word or not word else word for word in words)
    print("$ plymix " + " ".join(shown), flush=True)
    code = subprocess.run([sys.executable, "-m", "plymix", *words], cwd=OUT, check=False).returncode
    if code:
        sys.exit(code)


def measured(a: Path, b: Path, merged: Path) -> dict[str, float]:
    """Block -> |merged - A| / |B - A| over all its tensors, in block order.

    Blocks in which A and B are the same are left out.
    """
    sd1 = archs.load("sd1")
    moved: dict[str, float] = {}
    whole: dict[str, float] = {}
    with open_model(a) as first, open_model(b) as second, open_model(merged) as result:
        for name in result.tensors:
            place = sd1.place(name)
            if place is None or place.buffer:
                continue
            x, y, z = (values(source, name) for source in (first, second, result))
            moved[place.block] = moved.get(place.block, 0.0) + float(np.abs(z - x).sum())
            whole[place.block] = whole.get(place.block, 0.0) + float(np.abs(y - x).sum())
    blocks = [block for block in (*sd1.blocks, "BASE", "VAE") if whole[block]]
    return {block: moved[block] / whole[block] for block in blocks}


def values(source: Source, name: str) -> np.ndarray:
    info = source.tensors[name]
    return kernels.float32(source.read(info), info.dtype).astype(np.float64)


if __name__ == "__main__":
    main()
