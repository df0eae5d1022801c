"""Names that nobody knows, and arguments of the wrong type: what is said of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import plymix
import plymix.recipe
import tiny
from plymix import replay
from plymix.errors import Refusal, nearest, unknown

PRESETS = [
    "GRAD_A",
    "GRAD_V",
    "SDXL_GRAD_V",
    "FLAT_25",
    "COSINE",
    "SDXL_COSINE",
    "M00",
    "IN09",
    "IN11",
]
METHODS = ["ties", "ties_dare", "dare_ties", "dare_linear", "karcher", "add_difference", "merge"]
METHODS += ["train_difference", "euclidean_add_difference", "presets", "median", "ties_gmedian"]


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("grad", ["GRAD_A", "GRAD_V"]),  # they begin so
        ("GRADV", ["GRAD_V"]),
        ("cosin", ["COSINE"]),
        ("IN99", ["IN09"]),
        ("Dare", ["dare_ties", "dare_linear"]),
        ("gmedian", ["ties_gmedian"]),  # a word of it
        ("mrege", ["merge"]),
        ("addifference", ["add_difference"]),  # not all that end so
        ("nothing", []),
        ("", []),
    ],
)
def test_nearest(asked, offered):
    assert nearest(asked, PRESETS + METHODS) == offered


def test_what_is_said_where_none_is_near():
    assert str(unknown("thing", "x", ["one", "two"])) == "unknown thing 'x': known: one, two"
    assert str(unknown("thing", "x", map(str, range(13)))) == "unknown thing 'x': 13 are known"


# --- Python types -------------------------------------------------------------------------------

A, B, OUT = "a.safetensors", "b.safetensors", "out.safetensors"
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: plymix.open(None), "path is None, not a file's name"),
    (lambda: plymix.open(b"a.ckpt"), "path is b'a.ckpt', not a file's name"),
    (lambda: plymix.inspect(3), "path is 3, "),
    (lambda: plymix.check(None), "path is None, "),
    (lambda: plymix.diff(A, None), "b is None, "),
    (lambda: plymix.model(None), "file is None, "),
    (lambda: plymix.model(A).lora(3), "file is 3, "),
    (lambda: plymix.convert(None, OUT), "file is None, "),
    (lambda: plymix.convert(A, 3), "out is 3, "),
    (lambda: plymix.extract(None, "vae", OUT), "model is None, "),
    (lambda: plymix.repair(None, OUT), "model is None, "),
    (lambda: plymix.import_recipe(None), "path_or_text is None, "),
    (lambda: plymix.import_recipe("{}", kind=3), "unknown kind of record 3: known: a1111"),
    (lambda: plymix.import_recipe("{}", models=3), "models is 3, not a table"),
    (lambda: plymix.Session(None), "None is no Recipe or expression"),
    (lambda: plymix.recipe.load(None), "path is None, "),
    (lambda: replay.replay(None), "path is None, "),
    (lambda: replay.verify(OUT, folders=3), "folders is 3, "),
    (lambda: plymix.merge_method(None, plymix.model(A)), "unknown merge method None"),
    (lambda: plymix.explain(None), "None is no model's file, Recipe or expression"),
    (lambda: plymix.merge([A, B], OUT), "is no model's file, Recipe or expression"),
    (lambda: plymix.merge(A, 3, OUT), "b is 3, "),
    (lambda: plymix.merge(A, B, 3), "out is 3, "),
    (lambda: plymix.explain(A, B, method=None), "unknown merge method None"),
    (lambda: plymix.explain(A, B, models=None), "models is None, "),
    (lambda: plymix.explain(A, B, dtype=None), "dtype is nothing, not a text or a table"),
    (lambda: plymix.explain(A, B, base="x"), "alpha.base is 'x', not a number"),
]
WRONG += [
    (lambda name=name: plymix.explain(A, B, **{name: None}), f"{name} is None, not a file's name")
    for name in ("vae", "text_encoder", "text_encoder_2", "unet", "arch")
]
WRONG += [
    (lambda said=said: plymix.merge(*MODELS, OUT, **said), what)
    for said, what in (
        ({"threads": None}, "threads = None is not a whole number"),
        ({"threads": 1.5}, "threads = 1.5 is not a whole number"),
        ({"device": None}, "unknown device 'None'"),
        ({"progress": 3}, "progress is 3, not a function"),
    )
]
MODELS: list[Path] = []


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[said for _, said in WRONG])
def test_an_argument_of_the_wrong_type_is_refused_by_its_name(
    call: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    MODELS[:] = [tiny.write(tmp_path / name, "sd1", seed=i) for i, name in enumerate((A, B))]
    with pytest.raises(Refusal) as caught:
        call()
    assert said in str(caught.value)
    assert not (tmp_path / OUT).exists()


def test_one_folder_of_models_may_be_named_without_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    for i, name in enumerate((A, B)):
        tiny.write(tmp_path / "store" / name, "sd1", seed=i)
    monkeypatch.chdir(tmp_path)
    for said in ("store", Path("store"), ["store"]):
        assert plymix.explain(A, B, models=said).merged


def test_a_session_takes_what_numpy_gives_and_expressions(tmp_path: Path) -> None:
    a, b = (plymix.model(tiny.write(tmp_path / n, "sd1", seed=i)) for i, n in enumerate((A, B)))
    with plymix.Session(a.weighted_sum(b, alpha=0.5)) as session:
        assert session.set("steps.step1.alpha", np.float32(0.25))
        assert session.recipe.steps["step1"].params["alpha"] == 0.25
        assert session.set("steps.step1.alpha", np.linspace(0, 1, 25))
        assert session.recipe.steps["step1"].params["alpha"][24] == 1
        assert session.change(a.weighted_sum(b, alpha=0.75))
        for call, said in (
            (lambda: session.set(3, 0.5), "path is 3, not a text"),
            (lambda: session.set("steps.step1.alpha", object()), "is no value of a recipe"),
            (lambda: session.change(None), "None is no Recipe or expression"),
            (lambda: session.write(None), "out is None, "),
        ):
            with pytest.raises(Refusal, match=said):
                call()


def test_several_models_may_be_given_by_their_name() -> None:
    a, b, c = map(plymix.model, (A, B, "c.safetensors"))
    assert a.ties(models=[b, c], density=0.5) == a.ties(b, c, density=0.5)
    with pytest.raises(Refusal, match="ties: model 2 is 3, not an expression"):
        a.ties(models=3)
    with pytest.raises(Refusal, match="rules is not a list of texts"):
        a.weighted_sum(b, rules=3)  # type: ignore[arg-type]


def test_a_part_of_an_expression_may_be_a_path(tmp_path: Path) -> None:
    a, b = (tiny.write(tmp_path / name, "sd1", seed=i) for i, name in enumerate((A, B)))
    mix = (plymix.model(a) + plymix.model(b)) / 2
    assert plymix.explain(mix, vae=b) == plymix.explain(mix, vae=str(b))
