"""The autoencoder: its training, its latents' scale folded into its weights, and the latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import nets
from loop import fit, get, put
from show import mosaic
from world import World

NOISE = 0.1
"""Standard deviation of what is added to latents of about unit size while it learns."""

CHUNK = 256


def train(w: World) -> Any:
    """Losses: L1, L2, L1 of the gradients, and a little on the latents' size."""
    s, run = w.settings, w.run
    torch.manual_seed(s.seed)
    vae = nets.vae(s, run.device)

    def loss(generator: Any) -> Any:
        with torch.no_grad():
            real = w.both(w.some(s.vae.batch, generator), generator)
            if s.crop:
                real = _cropped(real, s.crop, generator)
        with run.autocast():
            z = vae.encode(real).latent_dist.mean
            drawn = torch.randn(z.shape, generator=generator, device=z.device)
            made = vae.decode(z + NOISE * drawn).sample
        made, off = made.float(), made.float() - real
        edges = sum(off.diff(dim=axis).abs().mean() for axis in (2, 3))
        size = z.float().square().mean()
        return off.abs().mean() + off.square().mean() + 0.5 * edges + 1e-3 * size

    def show(path: Path) -> Mapping[str, float]:
        real = w.both(w.some(8, run.generator("vae-show")), run.generator("vae-show"))
        made = vae.decode(vae.encode(real).latent_dist.mean).sample
        mosaic([*real, *made], len(real), path)
        return {"L1": float((made - real).abs().mean())}

    fit(run, "vae", s.vae, {"vae": vae}, loss, show, ema=s.ema, warmup=s.warmup)
    return vae


def _cropped(pictures: Any, size: int, generator: Any) -> Any:
    """The same random part of each: grounds are dull, so it lies near the middle."""
    room = pictures.shape[-1] - size
    x, y = torch.randint(room + 1, (2,), generator=generator, device=generator.device).tolist()
    return pictures[..., y : y + size, x : x + size]


def latents(w: World, vae: Any) -> Any:
    """Latents [2, concepts, placements, 4, h, w] as the U-Net sees them, in bfloat16.

    `vae` is folded in place: its latents times 0.18215 have mean 0 and deviation 1 per channel.
    """
    file = w.run.work / "latents.pt"
    if file.exists():
        saved = get(file, w.run.device)
        vae.load_state_dict(saved["vae"])
        return saved["latents"]
    every: Any = torch.arange(len(w.concepts), device=w.run.device)
    rows = []
    with torch.no_grad():
        for style in range(2):
            for k in range(w.settings.placements):
                generator = w.run.generator("placement", k)
                part = []
                for which in every.split(CHUNK if w.run.device != "cpu" else 16):
                    w.run.check()
                    pictures = w.pictures(which, style, generator)
                    part.append(vae.encode(pictures).latent_dist.mean.float())
                rows.append(torch.cat(part))
                done = len(rows) / (2 * w.settings.placements)
                w.run.report("latents", done, 0)
        z: Any = torch.stack(rows)
        z = z.unflatten(0, (2, w.settings.placements)).transpose(1, 2)
        mean, deviation = z.mean((0, 1, 2, 4, 5)), z.std((0, 1, 2, 4, 5))
        z = (z - mean[:, None, None]) / deviation[:, None, None]
    fold(vae, mean, deviation * nets.LATENT_SCALE)
    made = z.to(torch.bfloat16).contiguous()
    put(file, {"vae": vae.state_dict(), "latents": made})
    return made


@torch.no_grad()
def fold(vae: Any, mean: Any, deviation: Any) -> None:
    """Make `vae`'s latents (z - mean) / deviation, per channel; what it decodes stays.

    The encoder's variance becomes that of the noise it was trained with.
    """
    out, back = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    out.weight[:n] /= deviation[:, None, None, None]
    out.bias[:n] = (out.bias[:n] - mean) / deviation
    out.weight[n:] = 0
    out.bias[n:] = 2 * (math.log(NOISE) - deviation.log())
    back.bias += F.linear(mean, back.weight[:, :, 0, 0])
    back.weight *= deviation[None, :, None, None]
