"""What other tools call a model's tensors, and what they make of them: independent of plymix.

tests/golden/maps/*.json.gz hold {canonical key: [component, diffusers key(s) or null, transform]}:
ldm, sgm, and other original names against those of diffusers and transformers, as diffusers 0.42's
own converters give them. The transforms are applied here with numpy alone.
"""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np

MAPS = Path(__file__).parent / "golden" / "maps"
ARCH = {  # golden map and header -> architecture
    "sd1": "sd1",
    "sd2": "sd2",
    "sdxl": "sdxl",
    "flux-dev": "flux1",
    "sd3.5-medium": "sd3",
    "chroma": "chroma",
    "flux2-klein-4b": "flux2",
    "auraflow": "auraflow",
    "lumina2": "lumina2",
    "z-image": "z-image",
    "wan2.1-i2v-14b": "wan",
    "cosmos-predict2-2b": "cosmos2",
    "krea2": "krea2",
    "ssd-1b": "ssd-1b",
    "vega": "vega",
    "ltx-video-2b": "ltx-video",
    "hunyuan-video": "hunyuan-video",
    "wan2.1-vace-14b": "wan",
}


@cache
def golden_map(model):
    """{component: {canonical key: ([diffusers keys], transform)}}."""
    raw = json.loads(gzip.decompress((MAPS / f"{model}.json.gz").read_bytes()))
    out = {}
    for key, (component, theirs, transform) in raw.items():
        names = [theirs] if isinstance(theirs, str) else theirs or []
        out.setdefault(component, {})[key] = (names, transform)
    if model == "sd2":  # its U-Net and VAE have the names of SD1's
        out |= {c: rows for c, rows in golden_map("sd1").items() if c != "text_encoder"}
    return out


def converted(tensor, names, transform):
    """What a transform of the maps makes of one canonical tensor: {diffusers key: tensor}."""
    kind, _, sizes = transform.partition(":")
    match kind:
        case "none":
            parts = [tensor]
        case "conv1x1_to_linear":
            parts = [tensor[:, :, 0, 0]]
        case "transpose":
            parts = [tensor.T]
        case "swap_scale_shift":
            shift, scale = np.split(tensor, 2)
            parts = [np.concatenate([scale, shift])]
        case "split_qkv":
            parts = np.split(tensor, 3)
        case "split":  # true widths; ours may be smaller ones in the same ratio
            ends = np.cumsum([int(size) for size in sizes.split(",")])
            parts = np.split(tensor, ends[:-1] * len(tensor) // ends[-1])
        case "fold":
            parts = [tensor.reshape(int(sizes), -1)]
        case "drop":
            parts = []
    return dict(zip(names, parts, strict=True))


def theirs_of(model, component, tensors):
    out = {}
    for key, (names, transform) in golden_map(model)[component].items():
        out |= converted(tensors[key], names, transform)
    return out
