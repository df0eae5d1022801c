"""Samplers: from noise to a picture's latent, in the formulas of the papers.

The notation is k-diffusion's (Karras et al. 2022, "Elucidating the design space ..."): the latent
is x = x0 + sigma * noise, with sigma falling from about 14.6 to 0, and `denoise(x, sigma)` is the
model's guess of x0. An array is whatever multiplies and adds (torch, numpy); sigmas are floats.

Every sampler is a function `(denoise, x, sigmas, noise) -> x`, where `noise()` draws as many
standard normal values as x has. `SAMPLERS` says which steps each takes.

Sources: euler_a, dpmpp_2m, dpmpp_sde: Katherine Crowson's k-diffusion, whose steps in time are
`linspace`; DDIM: Song et al. 2021 (eta 0), steps as in CompVis' latent diffusion; DPM-Solver++: Lu
et al. 2022; UniPC: Zhao et al. 2023 (B2(h), order 2); LCM: Luo et al. 2023.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

Denoise = Callable[[Any, float], Any]
Noise = Callable[[], Any]
Function = Callable[[Denoise, Any, Sequence[float], Noise], Any]

TRAINED = 1000
"""Steps of the noise schedule that the models were trained with."""

# --- noise levels -------------------------------------------------------------------------------


class Schedule:
    """The noise levels of the training's steps 0..999, and what lies between them.

    beta rises from 0.00085 to 0.012, linear in its root: SD1, SD2 and SDXL alike. With
    `zero_snr` the levels are stretched so that the last one is nothing but noise (Lin et al. 2023,
    algorithm 1); infinity is cut to 4518, as ComfyUI does.
    """

    def __init__(self, zero_snr: bool = False) -> None:
        roots = [
            0.00085**0.5 + i * (0.012**0.5 - 0.00085**0.5) / (TRAINED - 1) for i in range(TRAINED)
        ]
        kept, signal = 1.0, []
        for root in roots:
            kept *= 1 - root * root
            signal.append(kept)
        if zero_snr:
            first, last = signal[0] ** 0.5, signal[-1] ** 0.5
            signal = [((s**0.5 - last) * first / (first - last)) ** 2 for s in signal]
            signal[-1] = 4.8973451890853435e-08
        self.sigmas = [((1 - s) / s) ** 0.5 for s in signal]
        self._logs = [math.log(sigma) for sigma in self.sigmas]

    def sigma(self, t: float) -> float:
        """The noise level of a step, logarithmic between two of them."""
        low = min(int(t), TRAINED - 2)
        part = t - low
        return math.exp((1 - part) * self._logs[low] + part * self._logs[low + 1])

    def step(self, sigma: float) -> float:
        """The step of a noise level, clamped to 0..999."""
        log = math.log(sigma)
        low = min(max(bisect_right(self._logs, log) - 1, 0), TRAINED - 2)
        part = (log - self._logs[low]) / (self._logs[low + 1] - self._logs[low])
        return low + min(max(part, 0.0), 1.0)


@cache
def schedule(zero_snr: bool = False) -> Schedule:
    return Schedule(zero_snr)


def linspace(levels: Schedule, steps: int) -> list[float]:
    """k-diffusion: steps evenly spaced from 999 to 0, both included; then 0."""
    gap = (TRAINED - 1) / max(steps - 1, 1)
    return [*(levels.sigma(TRAINED - 1 - i * gap) for i in range(steps)), 0.0]


def karras(levels: Schedule, steps: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, between the schedule's ends; then 0."""
    low, high = (levels.sigmas[i] ** (1 / rho) for i in (0, -1))
    gap = (low - high) / max(steps - 1, 1)
    return [*((high + i * gap) ** rho for i in range(steps)), 0.0]


def leading(levels: Schedule, steps: int) -> list[float]:
    """Latent diffusion's DDIM: every (1000 // steps)-th step from 1 on; it ends at step 0."""
    gap = TRAINED // steps
    return [*(levels.sigmas[min(i * gap + 1, TRAINED - 1)] for i in range(steps)[::-1]),
            levels.sigmas[0]]  # fmt: skip


def rounded(levels: Schedule, steps: int) -> list[float]:
    """UniPC: steps + 1 whole steps evenly spaced from 999 to 0, without the last; then 0."""
    gap = (TRAINED - 1) / steps
    return [*(levels.sigmas[round(i * gap)] for i in range(1, steps + 1)[::-1]), 0.0]


def distilled(levels: Schedule, steps: int) -> list[float]:
    """LCM: of the 50 steps it is distilled from, as many as asked, from the noisiest on; then 0."""
    origin = [TRAINED // 50 * (i + 1) - 1 for i in range(50)][::-1]
    return [*(levels.sigmas[origin[50 * i // steps]] for i in range(steps)), 0.0]


# --- samplers -----------------------------------------------------------------------------------


def euler(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """Karras et al. 2022, algorithm 2 without churn. DDIM with eta 0 is the same step."""
    for now, after in _pairs(sigmas):
        d = (x - denoise(x, now)) / now
        x = x + d * (after - now)
    return x


def ancestral(now: float, after: float) -> tuple[float, float]:
    """(down, up): go down to the noise level `down`, then add `up`, to arrive at `after`."""
    up = min(after, (after**2 * (now**2 - after**2) / now**2) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


def euler_a(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """Euler steps below the next level, and fresh noise up to it."""
    for now, after in _pairs(sigmas):
        down, up = ancestral(now, after)
        d = (x - denoise(x, now)) / now
        x = x + d * (down - now)
        if after > 0:
            x = x + noise() * up
    return x


def dpmpp_2m(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """DPM-Solver++(2M): Lu et al. 2022, algorithm 2, in lambda = -log(sigma)."""
    last, last_h = None, 0.0
    for now, after in _pairs(sigmas):
        x0 = denoise(x, now)
        if after == 0:
            return x0
        h = math.log(now / after)
        guess = x0
        if last is not None:
            r = last_h / h
            guess = x0 * (1 + 1 / (2 * r)) - last * (1 / (2 * r))
        x = x * (after / now) - guess * math.expm1(-h)
        last, last_h = x0, h
    return x


def dpmpp_sde(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """DPM-Solver++ (SDE, second order, one midpoint): two calls of the model per step.

    Both amounts of noise of a step are increments of one Brownian path in sigma, from its start to
    the midpoint and to its end, as k-diffusion's Brownian tree has them.
    """
    for now, after in _pairs(sigmas):
        x0 = denoise(x, now)
        if after == 0:
            return x0
        middle = (now * after) ** 0.5
        first, second = noise(), noise()
        path = first * (now - middle) ** 0.5 + second * (middle - after) ** 0.5
        path = path / (now - after) ** 0.5
        down, up = ancestral(now, middle)
        half = x * (down / now) - x0 * (down / now - 1) + first * up
        x0 = denoise(half, middle)  # r = 1/2: all of the second guess, none of the first
        down, up = ancestral(now, after)
        x = x * (down / now) - x0 * (down / now - 1) + path * up
    return x


def unipc(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """UniPC-2 with B2(h) = e^h - 1: each guess of the model corrects the step that led to it."""
    guesses: list[tuple[float, Any]] = []  # (lambda, x0) of the last two levels
    start, start_sigma, order = x, 0.0, 1
    for i, (now, after) in enumerate(_pairs(sigmas)):
        at, x0 = -math.log(now), denoise(x, now)
        if guesses:
            x = _corrected(start, now / start_sigma, guesses, at, x0, order)
        guesses = [*guesses, (at, x0)][-2:]
        if after == 0:
            return x0
        order = min(2, len(guesses), len(sigmas) - 1 - i)
        start, start_sigma = x, now
        h = math.log(now / after)
        x = x * (after / now) - x0 * math.expm1(-h)
        if order == 2:
            r = (guesses[0][0] - at) / h
            x = x - (guesses[0][1] - x0) * (math.expm1(-h) * 0.5 / r)
    return x


def _corrected(
    start: Any, ratio: float, guesses: Sequence[tuple[float, Any]], at: float, x0: Any, order: int
) -> Any:
    """UniC: the step from `start` once more, now with the guess `x0` at its end."""
    here, m0 = guesses[-1]
    h = at - here
    b = phi = math.expm1(-h)
    x = start * ratio - m0 * b
    if order == 1:
        return x - (x0 - m0) * (b * 0.5)
    r = (guesses[0][0] - here) / h
    phi2 = phi / -h - 1
    phi3 = phi2 / -h - 1 / 2
    b1, b2 = phi2 / b, 2 * phi3 / b
    first = (b1 - b2) / (1 - r)
    return x - ((guesses[0][1] - m0) * (first / r) + (x0 - m0) * (b1 - first)) * b


def lcm(denoise: Denoise, x: Any, sigmas: Sequence[float], noise: Noise) -> Any:
    """Multistep consistency sampling: the guess, made noisy again to the next level."""
    for now, after in _pairs(sigmas):
        x = denoise(x, now)
        if after > 0:
            x = x + noise() * after
    return x


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(sigmas))


class Way(NamedTuple):
    """A sampler and the noise levels it goes through.

    `whole`: its first latent is noise * sqrt(1 + sigma^2), unit variance in the model's own scale;
    else noise * sigma, as k-diffusion starts. `calls` of the model make up one step.
    """

    function: Function
    levels: Callable[[Schedule, int], list[float]]
    whole: bool = False
    calls: int = 1


WAYS: Mapping[str, Way] = {
    "euler": Way(euler, linspace),
    "euler_a": Way(euler_a, linspace),
    "ddim": Way(euler, leading, whole=True),
    "dpmpp_2m": Way(dpmpp_2m, linspace),
    "dpmpp_2m_karras": Way(dpmpp_2m, karras),
    "dpmpp_sde": Way(dpmpp_sde, linspace, calls=2),
    "unipc": Way(unipc, rounded, whole=True),
    "lcm": Way(lcm, distilled, whole=True),
}


def sample(name: str, denoise: Denoise, noise: Noise, steps: int, levels: Schedule) -> Any:
    """A latent by the sampler `name`, in the model's own scale. The first noise drawn is its start.

    `denoise(x, sigma)` gets x in k-diffusion's scale (x0 + sigma * noise).
    """
    way = WAYS[name]
    sigmas = way.levels(levels, steps)
    start = (1 + sigmas[0] ** 2) ** 0.5 if way.whole else sigmas[0]
    x = way.function(denoise, noise() * start, sigmas, noise)
    return x / (1 + sigmas[-1] ** 2) ** 0.5
