"""The names that LoRA files are matched with where no model is at hand: adapters/layouts/*.json.gz.

    python scripts/write_layouts.py

Each is {canonical key: shape} of an architecture's denoiser and text encoders, taken from the
golden headers of tests/golden.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from plymix import archs

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "tests" / "golden" / "headers"
LAYOUTS = ROOT / "src" / "plymix" / "adapters" / "layouts"
OF = {  # architecture -> golden header; of several sizes the largest
    "anima": "anima",
    "auraflow": "auraflow",
    "chroma": "chroma",
    "cosmos2": "cosmos-predict2-14b",
    "flux1": "flux-dev",
    "flux2": "flux2-dev",
    "hidream": "hidream-i1",
    "hunyuan-video": "hunyuan-video",
    "krea2": "krea2",
    "ltx-video": "ltx-video-13b",
    "lumina2": "lumina2",
    "pixart": "pixart-sigma",
    "qwen-image": "qwen-image",
    "sd1": "sd1",
    "sd2": "sd2",
    "sd3": "sd3.5-medium",
    "sdxl": "sdxl",
    "sdxl-refiner": "sdxl-refiner",
    "ssd-1b": "ssd-1b",
    "vega": "vega",
    "wan": "wan2.1-i2v-14b",
    "z-image": "z-image",
}


def made(name: str) -> dict[str, list[int]]:
    """The layout of the architecture `name`."""
    arch = archs.load(name)
    raw = json.loads(gzip.decompress((HEADERS / f"{OF[name]}.json.gz").read_bytes()))
    found = {}
    for key, (_, shape, _, _) in raw.items():
        place = arch.place(key)
        if place and not place.buffer and place.component not in ("vae", "extra", "ema"):
            found[place.key] = shape
    return found


def main() -> None:
    LAYOUTS.mkdir(exist_ok=True)
    for name in OF:
        text = json.dumps(made(name), separators=(",", ":")).encode()
        (LAYOUTS / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    main()
