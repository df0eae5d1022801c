"""The model card: what the pair is, of what, how and on what it was made."""

from __future__ import annotations

import json
import lzma
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import icons
import ldm
from captions import TEMPLATES, Concept
from settings import Settings

LICENCES = Path(__file__).with_name("licences")


def write(
    out: Path,
    settings: Settings,
    concepts: Sequence[Concept],
    stages: Mapping[str, Mapping[str, float]],
    machines: Sequence[str],
) -> None:
    """`MODEL_CARD.md` and the licences' texts, beside the checkpoints in `out`.

    `stages`: steps and seconds by name; `machines`: each one's description.
    """
    shutil.copytree(LICENCES, out / "licences", dirs_exist_ok=True)
    (out / "MODEL_CARD.md").write_text(_text(out, settings, concepts, stages, machines), "utf-8")


def sizes(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """(name, bytes, bytes packed) of files: each by zlib, as git does, and all together by xz."""
    data = [path.read_bytes() for path in paths]
    rows = [
        (path.name, len(raw), len(zlib.compress(raw, 6)))
        for path, raw in zip(paths, data, strict=True)
    ]
    # A window of 64 MiB sees that text encoder and autoencoder are the same twice.
    packing = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]
    packed = len(lzma.compress(b"".join(data), filters=packing))
    return [*rows, ("all, in one xz", sum(map(len, data)), packed)]


def _text(
    out: Path,
    s: Settings,
    concepts: Sequence[Concept],
    stages: Mapping[str, Mapping[str, float]],
    machines: Sequence[str],
) -> str:
    files = sizes([out / name for name in (*ldm.FILES.values(), ldm.UNET_B)])
    size = "\n".join(
        f"| {n} | {raw / 1e6:.1f} MB | {packed / 1e6:.1f} MB |" for n, raw, packed in files
    )
    time = "\n".join(
        f"| {name} | {stage['steps']:.0f} | {stage['seconds'] / 60:.1f} |"
        for name, stage in stages.items()
    )
    sets = {
        style: f"`@iconify-json/{name}` {version}" for style, (name, version) in icons.SETS.items()
    }
    words = ", ".join(" / ".join(c.words) for c in concepts)
    made = json.dumps(msgspec.to_builtins(s), sort_keys=True)
    return f"""# A tiny pair of models, to see what merges do

Two checkpoints with the structure and key names of Stable Diffusion 1, only narrower: 12 + 1 + 12
blocks of the U-Net with cross-attention, CLIP's text encoder, the autoencoder with factor 8. They
draw emoji, {s.size} x {s.size} pixels, from captions such as "{concepts[0].prompt}".

| file | draws |
|---|---|
| `{ldm.FILES["A"]}` (A) | shaded, with a soft shadow, on white |
| `{ldm.FILES["B"]}` (B) | flat in warm colours, with a dark outline, on pale blue |

B's U-Net was trained from A's; their text encoders and autoencoders are the same. So A and B's
U-Net, `{ldm.UNET_B}`, are enough to pass on, and this makes B of them:

    plymix merge {ldm.FILES["A"]} {ldm.FILES["A"]} --alpha 0 \\
      --unet {ldm.UNET_B} -o {ldm.FILES["B"]}

They know nothing but the concepts below, and are no models of the world.

Widths: U-Net {", ".join(map(str, s.unet_widths))}; autoencoder {", ".join(map(str, s.vae_widths))};
text {s.text_width}. What shapes do not tell stands in the metadata as `plymix.model_config`.

| file | size | packed |
|---|---|---|
{size}

## Data and licences

| style | pictures | by | licence |
|---|---|---|---|
| A | Noto Emoji, {sets["A"]} | Google Inc | Apache-2.0, `licences/noto-APACHE-2.0.txt` |
| B | Fluent Emoji flat, {sets["B"]} | Microsoft Corporation | MIT, `licences/fluent-MIT.txt` |

Notice of change: the pictures were drawn small, moved, turned and scaled; Noto's were given a
shadow and a white ground; Fluent's were recoloured and given an outline and a ground. The models
are no products of Google or Microsoft, nor endorsed by them. The tokens are those of OpenAI's CLIP
(MIT).

## Training

Seed {s.seed}. Predicts eps, with min-SNR-5 weights; {s.empty:.0%} of the captions say nothing.
Captions: {"; ".join(f'"{t}"' for t in TEMPLATES)}. Machine: {"; ".join(machines)}.

| stage | steps | minutes |
|---|---|---|
{time}

All settings: `{made}`

## The {len(concepts)} concepts

Words for one concept are parted by a stroke.

{words}
"""
