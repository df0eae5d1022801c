"""The U-Nets: they guess the noise in a latent (Ho et al. 2020), A from nothing, B from A.

Steps weigh min(SNR, 5) / SNR (Hang et al. 2023, for eps). The noise schedule is SD1's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import captions
import nets
from loop import fit
from plymix.images import samplers
from show import mosaic
from world import STYLES, World

GUIDANCE = 4.0
"""Of the validation pictures, and the judge's."""

STEPS = 24


def train(w: World, style: int, latents: Any, encoder: Any, vae: Any, start: Any = None) -> Any:
    """The U-Net of a style. The first learns together with the text encoder, the second alone.

    `latents` are [2, concepts, placements, 4, h, w]; `start` is the U-Net to begin from.
    """
    s, run = w.settings, w.run
    name = STYLES[style].lower()
    plan = s.a if style == 0 else s.b
    torch.manual_seed(s.seed + 2 + style)
    unet = nets.unet(s, run.device)
    if start is not None:
        unet.load_state_dict(start.state_dict())
    model = torch.compile(unet) if run.compiled else unet
    levels = torch.tensor(samplers.schedule().sigmas, device=run.device)
    signal = 1 / (1 + levels**2)
    weights = (levels**-2).clamp(max=5) * levels**2
    known = latents[style]
    alone = start is not None

    def loss(generator: Any) -> Any:
        which = w.some(plan.batch, generator)
        place = torch.randint(known.shape[1], (plan.batch,), generator=generator, device=run.device)
        t = torch.randint(len(levels), (plan.batch,), generator=generator, device=run.device)
        clean = known[which, place].float()
        noise = torch.randn(clean.shape, generator=generator, device=run.device)
        kept = signal[t][:, None, None, None]
        ids = w.said(which, generator, s.empty)
        with run.autocast():
            if alone:
                with torch.no_grad():
                    context = nets.read(encoder, ids)
            else:
                context = nets.read(encoder, ids)
            mixed = kept.sqrt() * clean + (1 - kept).sqrt() * noise
            guess = model(mixed, t, encoder_hidden_states=context, return_dict=False)[0]
        return (weights[t] * (guess.float() - noise).square().mean((1, 2, 3))).mean()

    def show(path: Path) -> Mapping[str, float]:
        chosen = captions.shown(w.concepts)
        texts = [captions.with_article(_word(c)) for c in chosen]
        mosaic(list(draw(w, unet, encoder, vae, texts)), max(4, len(texts) // 2), path)
        return {}

    modules = {"unet": unet} if alone else {"unet": unet, "text": encoder}
    fit(run, name, plan, modules, loss, show, shares={"text": s.tune}, ema=s.ema, warmup=s.warmup)
    return unet


def _word(concept: captions.Concept) -> str:
    return next((word for word in captions.SHOWN if word in concept.words), concept.words[0])


def draw(w: World, unet: Any, encoder: Any, vae: Any, texts: list[str]) -> Any:
    """A picture for each text, by Euler ancestral with guidance: [n, 3, size, size] in -1..1."""
    n, side = len(texts), w.settings.size // 2 ** (len(w.settings.vae_widths) - 1)
    generator = w.run.generator("draw")
    context = nets.read(encoder, w.asked([*texts, *[""] * n]))
    levels = samplers.schedule()

    def noise() -> Any:
        return torch.randn((n, 4, side, side), generator=generator, device=w.run.device)

    def denoise(x: Any, sigma: float) -> Any:
        scaled = x / (1 + sigma**2) ** 0.5
        with w.run.autocast():
            guess = unet(
                torch.cat([scaled, scaled]),
                torch.tensor(levels.step(sigma), device=w.run.device),
                encoder_hidden_states=context,
                return_dict=False,
            )[0].float()
        said, unsaid = guess.chunk(2)
        return x - sigma * (unsaid + GUIDANCE * (said - unsaid))

    z = samplers.sample("euler_a", denoise, noise, STEPS, levels)
    return vae.decode(z / nets.LATENT_SCALE).sample
