"""`make demo`: two small checkpoints with SD1's real key names, merged by the classic command.

Shows the block table, then what really changed in each block, measured on the finished file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from plymix import archs, kernels
from plymix.formats import Source, open_model

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo" / "out"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    run([sys.executable, str(ROOT / "scripts" / "tiny_checkpoints.py"), str(OUT), "--pair"])
    a, b = sorted(p for p in OUT.glob("*.safetensors") if "merged" not in p.name)[:2]
    merged = OUT / "merged.safetensors"
    plymix("mbw", a.name, b.name, "--base_alpha", "1.0", "--weights", "GRAD_V", "--verbose",
           "--output", merged.name, "--force")  # fmt: skip
    print("\nWhat changed, measured on the finished file (share of the way from", end=" ")
    print(f"{a.name} to {b.name}):\n")
    for block, share in measured(a, b, merged).items():
        print(f"  {block:<6} {share:7.1%}  {'█' * round(24 * share)}")
    print("\nIs the file what its recipe says?\n")
    plymix("verify", merged.name)
    print(f"\nThe result is {merged.relative_to(ROOT)}. Look at it: plymix inspect {merged.name}")


def plymix(*words: str) -> None:
    print("$ plymix " + " ".join(words), flush=True)
    run([sys.executable, "-m", "plymix", *words])


def run(command: list[str]) -> None:
    code = subprocess.run(command, cwd=OUT, check=False).returncode
    if code:
        sys.exit(code)


def measured(a: Path, b: Path, merged: Path) -> dict[str, float]:
    """Block -> |merged - A| / |B - A| over all its tensors, in block order."""
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
    return {block: moved[block] / whole[block] for block in (*sd1.blocks, "BASE", "VAE")}


def values(source: Source, name: str) -> np.ndarray:
    info = source.tensors[name]
    return kernels.float32(source.read(info), info.dtype).astype(np.float64)


if __name__ == "__main__":
    main()
