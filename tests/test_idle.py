"""Words of a recipe that do nothing: refused, but in recipes that were carried out before told."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

import plymix
from plymix import hashes, recipe, replay
from plymix.errors import Refusal
from tiny import write


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """A folder with SD1's a, b and a VAE-less u, and SDXL's xa and xb, each its own numbers."""
    home = tmp_path_factory.mktemp("idle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLYMIX_CACHE", str(home / "cache"))
        patch.chdir(home)
        for i, name in enumerate(("a", "b")):
            write(home / f"{name}.safetensors", "sd1", i)
            write(home / f"x{name}.safetensors", "sdxl", i)
        plymix.extract("a.safetensors", "unet", "u.safetensors", keep_prefix=True)
        yield


def found(output=None, models="ab", **step):
    """A recipe of one step, as a TOML file says it."""
    one, two = models.split() if " " in models else models
    return {
        "models": {"a": f"{one}.safetensors", "b": f"{two}.safetensors"},
        "steps": {"mix": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5, **step}},
        "output": output or {},
    }


def recorded(recipe):
    """The same as a result carries it, which knows what its files were."""
    files = {
        name: {"file": file, "sha256": hashes.sha256(Path(file))}
        for name, file in recipe["models"].items()
    }
    return {**recipe, "models": files}


BLOCKS = [i / 30 for i in range(25)]
XL = "xa xb"

IDLE = {
    "seed": (found({"seed": 9}), "output.seed = 9"),
    "seed of a step": (found(seed=9), "steps.mix.seed = 9"),
    "blocks and unet": (found({"unet": "b"}, alpha="GRAD_V"), "steps.mix.alpha"),
    "list and unet": (found({"unet": "b"}, alpha=BLOCKS), "steps.mix.alpha"),
    "curve and unet": (found({"unet": "a"}, alpha={"curve": "cosine"}), "steps.mix.alpha"),
    "base and text_encoder": (
        found({"text_encoder": "b"}, alpha={"base": 0.3, "blocks": "GRAD_V"}),
        "steps.mix.alpha.base = 0.3",
    ),
    "base and both": (
        found({"text_encoder": "b", "text_encoder_2": "a"}, XL, alpha={"base": 0.3, "default": 1}),
        "steps.mix.alpha.base = 0.3",
    ),
    "prefix": (found({"prefix": True}), "output.prefix"),
    "saturation, no VAE": (
        found({"adjust": {"saturation": 1.2}, "drop": ["vae"]}),
        "output.adjust.saturation",
    ),
    "saturation of a U-Net": (
        found({"adjust": {"saturation": 1.2}}, "ub"),
        "output.adjust.saturation",
    ),
    "cfg of a VAE": (found({"adjust": {"cfg": 1.2}, "component": "vae"}), "output.adjust.cfg"),
    "one of two": (
        found({"adjust": {"contrast": 1, "saturation": 2}, "component": "unet"}),
        "output.adjust.saturation",
    ),
    "part and drop": (found({"unet": "b", "drop": ["unet"]}), "output.unet"),
    "blend and drop": (found({"vae": "blend", "drop": ["vae"]}), "output.vae"),
    "part and component": (found({"text_encoder": "b", "component": "vae"}), "output.text_encoder"),
}
"""Recipes with a word that does nothing, and how an error names it."""

ACTIVE = {
    "seed": (found({"seed": 9, "rounding": "stochastic", "dtype": "fp8_e4m3fn"}), "output.seed"),
    "base and unet": (
        found({"unet": "b"}, alpha={"base": 0.3, "default": 0.5}),
        "steps.mix.alpha.base",
    ),
    "VAE and unet": (
        found({"unet": "b", "vae": "blend"}, alpha={"blocks": {"VAE": 0.3}, "base": 0.5}),
        "steps.mix.alpha.blocks",
    ),
    "base and the second": (
        found({"text_encoder_2": "b"}, XL, alpha={"base": 0.3, "default": 1}),
        "steps.mix.alpha.base",
    ),
    "base, vae and text_encoder": (
        found({"text_encoder": "b", "vae": "blend"}, alpha={"base": 0.3, "blocks": "GRAD_V"}),
        "steps.mix.alpha.base",
    ),
    "prefix": (found({"prefix": True, "component": "unet"}), "output.prefix"),
    "cfg": (found({"adjust": {"cfg": 1.2}, "drop": ["vae"]}), "output.adjust.cfg"),
    "saturation": (
        found({"adjust": {"saturation": 1.2}, "component": "vae"}),
        "output.adjust.saturation",
    ),
    "part and component": (
        found({"text_encoder": "b", "component": "text_encoder"}),
        "output.text_encoder",
    ),
    "blend": (found({"vae": "blend"}), "output.vae"),
    "one encoder dropped": (
        found({"text_encoder": "b", "drop": ["text_encoder"]}, XL),
        "output.text_encoder",
    ),
}
"""Recipes that come near those, with the word that does something."""


def without(recipe, word):
    """The recipe without what an error or a test calls `word`."""
    recipe = deepcopy(recipe)
    *way, last = word.partition(" = ")[0].split(".")
    at = recipe
    for key in way:
        at = at[key]
    del at[last]
    return recipe


def tensors(asked, out):
    """The result without its metadata: the entries of its header, and its data."""
    plymix.merge(recipe.from_dict(asked), out, force=True)
    data = out.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return {**json.loads(data[8:start]), "__metadata__": {}}, data[start:]


@pytest.mark.parametrize(("asked", "word"), IDLE.values(), ids=IDLE)
def test_what_does_nothing_is_refused(asked, word):
    for read in (recipe.from_dict(asked), recipe.from_json(json.dumps(asked))):
        with pytest.raises(Refusal) as caught:
            plymix.explain(read)
        assert str(caught.value).startswith(word)
        assert (
            "leave it out" in str(caught.value)
            or "keep one" in str(caught.value)
            or "both" in str(caught.value)
        )


@pytest.mark.parametrize(("asked", "word"), IDLE.values(), ids=IDLE)
def test_it_does_nothing_and_is_told_where_it_was_carried_out(tmp_path, asked, word):
    """The tensors are those of the recipe without the word; the result is made again as it was."""
    out = tmp_path / "out.safetensors"
    with_word = tensors(recorded(asked), out)
    assert replay.verify(out).ok
    again = replay.replay(out, tmp_path / "again.safetensors")
    assert sum(note.startswith(word) for note in again.notes) == 1
    assert out.read_bytes() == again.path.read_bytes()
    if word != "steps.mix.alpha":
        asked = without(asked, word)
    else:
        asked = deepcopy(asked)
        asked["steps"]["mix"]["alpha"] = {"base": 0, "default": 0.9}
    assert tensors(asked, tmp_path / "less.safetensors") == with_word


@pytest.mark.parametrize(("asked", "word"), ACTIVE.values(), ids=ACTIVE)
def test_what_does_something_is_not_refused(tmp_path, asked, word):
    less = without(asked, word)
    out = tmp_path / "out.safetensors"
    assert tensors(asked, out) != tensors(less, out)
