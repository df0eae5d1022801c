"""Samplers and prompts' tokens against formulas and numbers of their own, without torch."""

import math

import numpy as np
import pytest

from plymix.images import SAMPLERS, samplers
from plymix.images.tokens import END, START, tokens, windows

LEVELS = samplers.schedule()


def betas():
    return np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def training_sigmas():
    kept = np.cumprod(1 - betas())
    return ((1 - kept) / kept) ** 0.5


def wavy(x, sigma):
    """A model's guess with no structure that a sampler could use."""
    return np.tanh(0.3 * x) * 1.5 / (1 + 0.1 * sigma) + 0.2 * np.sin(x) * sigma / (1 + sigma)


def draws(seed=0, shape=(4, 16, 16)):
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal(shape)


def test_every_sampler_has_formulas():
    assert samplers.WAYS.keys() == SAMPLERS.keys()


def test_noise_levels():
    assert np.allclose(LEVELS.sigmas, training_sigmas(), rtol=1e-12)
    assert LEVELS.sigmas[-1] == pytest.approx(14.6146, abs=1e-4)  # SD's well-known ends
    assert LEVELS.sigmas[0] == pytest.approx(0.0292, abs=1e-4)
    for t in (0, 0.25, 17.75, 500, 998.5, 999):
        assert LEVELS.step(LEVELS.sigma(t)) == pytest.approx(t, abs=1e-6)


def test_zero_snr_ends_in_noise():
    """Lin et al. 2023, algorithm 1, on the square root of the signal."""
    roots = np.cumprod(1 - betas()) ** 0.5
    scaled = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    levels = samplers.schedule(zero_snr=True)
    want = ((1 - scaled[:-1] ** 2) / scaled[:-1] ** 2) ** 0.5
    assert np.allclose(levels.sigmas[:-1], want, rtol=1e-9)
    assert levels.sigmas[-1] == pytest.approx(4518.8, abs=0.1)


def test_karras_levels():
    """Karras et al. 2022, equation 5."""
    low, high = training_sigmas()[[0, -1]]
    i = np.arange(10)
    want = (high ** (1 / 7) + i / 9 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert np.allclose(samplers.karras(LEVELS, 10), [*want, 0.0], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 20, 80])
def test_euler_a_is_that_of_k_diffusion(steps):
    """Its formulas written once more, in float64, with the same noise."""
    noise = draws()
    t = np.linspace(999, 0, steps)
    logs = np.log(training_sigmas())
    sigmas = [*np.exp(np.interp(t, np.arange(1000), logs)), 0.0]
    x = noise() * sigmas[0]
    for i in range(steps):
        sigma_from, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = wavy(x, sigma_from)
        inside = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
        sigma_up = min(sigma_to, inside**0.5)
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        d = (x - denoised) / sigma_from
        x = x + d * (sigma_down - sigma_from)
        if sigma_to > 0:
            x = x + noise() * sigma_up
    got = samplers.sample("euler_a", wavy, draws(), steps, LEVELS)
    assert np.abs(got - x).max() < 1e-9


SPREAD = 0.7
"""Standard deviation of the data in `ideal`."""


def ideal(x, sigma):
    """The best guess for normally distributed data: the exact way of the noise is known."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def exact(x, now, after):
    return x * ((SPREAD**2 + after**2) / (SPREAD**2 + now**2)) ** 0.5


ORDERS = {"euler": 1, "ddim": 1, "dpmpp_2m": 2, "dpmpp_2m_karras": 2, "unipc": 2}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    """Half the step, half or a quarter of the error, between two levels that are not 0."""
    function = samplers.WAYS[name].function

    def error(n):
        sigmas = list(np.geomspace(10, 0.5, n + 1))
        x = function(ideal, np.ones(1), [*sigmas, 0.0][: n + 1], lambda: 0.0)
        return abs(float(x[0]) - float(exact(np.ones(1), 10, 0.5)[0]))

    rate = math.log2(error(40) / error(80))
    assert rate == pytest.approx(ORDERS[name], abs=0.35)


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_sde"])
def test_fresh_noise_keeps_the_spread(name):
    """Data of a known spread comes out with that spread: no more noise is added than taken."""
    noise = draws(1, (40_000,))
    got = samplers.sample(name, ideal, noise, 60 if name == "dpmpp_sde" else 400, LEVELS)
    assert got.std() == pytest.approx(SPREAD, rel=0.03)
    assert abs(got.mean()) < 0.02


def test_lcm_is_its_last_guess():
    seen = []

    def guess(x, sigma):
        seen.append(sigma)
        return x * 0 + len(seen)

    assert (samplers.sample("lcm", guess, draws(), 4, LEVELS) == 4).all()
    steps = [LEVELS.step(sigma) for sigma in seen]
    assert steps == pytest.approx([999, 759, 499, 259], abs=1e-6)


def test_ddim_takes_the_steps_of_latent_diffusion():
    steps = [LEVELS.step(s) for s in samplers.leading(LEVELS, 20)]
    assert steps == pytest.approx([*range(951, 0, -50), 0], abs=1e-6)


# --- tokens -------------------------------------------------------------------------------------

KNOWN = {
    # ids of OpenAI CLIP's own tokenizer
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A photo of an  ASTRONAUT riding a horse on mars": [
        320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496,
    ],
    "hello world!": [3306, 1002, 256],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize("text", KNOWN)
def test_known_tokens(text):
    assert tokens(text) == KNOWN[text]


def test_digits_are_words_and_any_letter_has_a_token():
    assert len(tokens("2048")) == 4
    assert tokens("日本語 🍎 ñ")
    assert (START, END) == (49406, 49407)


def test_long_prompts_have_windows():
    assert [len(w) for w in windows("cat " * 160)] == [75, 75, 10]
    assert windows("", 2) == [[], []]
    assert windows("cat", 2) == [[2368], []]
