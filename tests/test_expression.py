"""Expressions: what recipe they build, and that the merge is the arithmetic they spell."""

import copy
import json
import math
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import replay
from plymix.errors import Refusal
from plymix.expression import Expression, merge_method, model
from plymix.recipe import Model
from plymix.registry import methods

A, B, C, D = (model(f"{n}.safetensors") for n in "abcd")


def steps(x: Expression) -> dict[str, tuple]:
    return {n: (s.method, s.inputs, s.params) for n, s in x.recipe().steps.items()}


# --- what is built --------------------------------------------------------------------------------


def test_a_model_alone_is_a_recipe_without_steps():
    recipe = A.recipe(dtype="fp16")
    assert recipe.steps == {}
    assert recipe.models["a"].file == "a.safetensors"
    assert (recipe.final, recipe.output.dtype) == ("a", "fp16")


HUGE = 10**400
"""A number that no float holds."""


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: A.weighted_sum(B, alpha=HUGE), "weighted_sum: alpha is too large a number"),
        (lambda: A.weighted_sum(B, alpha={"IN05": -HUGE}), "alpha: IN05 is too large a number"),
        (lambda: A.linear(B, weights=[1, HUGE]), "linear: weights is too large a number"),
        (lambda: A * HUGE, "the factor of a model is too large a number"),
        (lambda: Fraction(HUGE) * A, "the factor of a model is too large a number"),
        (lambda: A * math.nan, "the factor of a model is nan, not a finite number"),
        (lambda: A / HUGE, "the divisor of a model is too large a number"),
        (lambda: (A + B) / 0, r"a.safetensors \+ b.safetensors cannot be divided by 0"),
        (lambda: (A - B) / -0.0, r"cannot be divided by 0"),
    ],
)
def test_numbers_that_no_model_can_be_multiplied_by(ask, said):
    with pytest.raises(Refusal, match=said):
        ask()


@pytest.mark.parametrize(
    ("made", "method", "inputs", "params"),
    [
        ((A + B) / 2, "linear", ("a", "b"), {"weights": [0.5, 0.5]}),
        (0.3 * A + B * 0.7, "linear", ("a", "b"), {"weights": [0.3, 0.7]}),
        (A + B, "linear", ("a", "b"), {"weights": [1, 1], "normalize": False}),
        (3 * A - 2 * B, "linear", ("a", "b"), {"weights": [3, -2]}),
        (sum([A, B, C]) / 3, "linear", ("a", "b", "c"), {"weights": [1 / 3] * 3}),
        (A + A + B, "linear", ("a", "b"), {"weights": [2, 1], "normalize": False}),
        (A - B, "subtract", ("a", "b"), {}),
        (0.7 * (A - B), "subtract", ("a", "b"), {"scale": 0.7}),
        (-(A - B), "subtract", ("a", "b"), {"scale": -1}),
        (A + 0.7 * (B - C), "add_difference", ("a", "b", "c"), {"alpha": 0.7}),
        ((B - C) * 0.7 + A, "add_difference", ("a", "b", "c"), {"alpha": 0.7}),
        (A - (B - C) / 2, "add_difference", ("a", "b", "c"), {"alpha": -0.5}),
    ],
)
def test_arithmetic_is_the_method_that_keeps_its_meaning(made, method, inputs, params):
    assert steps(made) == {"step1": (method, inputs, params)}


def test_nested_arithmetic():
    made = (A + B) / 2 + 0.7 * (C - D)
    assert steps(made) == {
        "step1": ("linear", ("a", "b"), {"weights": [0.5, 0.5]}),
        "step2": ("add_difference", ("step1", "c", "d"), {"alpha": 0.7}),
    }
    both = A + ((B - C) + 2 * (C - D))
    assert [s[0] for s in steps(both).values()] == ["add_difference"] * 2


def test_neutral_operations_change_nothing():
    assert A * 1 == A / 1 == 0 + A == A
    assert (A * 49) / 49 == A
    assert (A + B) / 2 == A / 2 + 0.5 * B
    assert A.add_difference(B, C, alpha=0.7) == A + 0.7 * (B - C)


def test_named_methods_take_what_the_recipe_takes():
    made = A.weighted_sum(B, alpha="GRAD_V", rules="IN05:attn2:0.3", seed=7)
    step = made.recipe().steps["step1"]
    assert (step.method, step.inputs, step.params) == (
        "weighted_sum",
        ("a", "b"),
        {"alpha": "GRAD_V"},
    )
    assert (step.rules, step.seed) == (("IN05:attn2:0.3",), 7)
    assert A.add_difference(B, c=C) == A.add_difference(B, C)
    ties = A.ties(B, C, density=0.3)
    assert ties == plymix.merge_method("ties", A, B, C, density=0.3)
    assert ties.recipe().steps["step1"].inputs == ("a", "b", "c")
    array = A.weighted_sum(B, alpha=np.linspace(0, 1, 25, dtype=np.float32))
    assert len(array.recipe().steps["step1"].params["alpha"]) == 25


def test_an_optional_model_before_others_may_be_left_out():
    made = merge_method("multislerp", None, A, B)
    assert made.recipe().steps["step1"].inputs == ("", "a", "b")
    assert Expression.from_json(made.to_json()) == made
    assert made != A.multislerp(A, B)


@pytest.mark.parametrize("name", list(methods()))
def test_every_registered_method_is_a_method(name):
    method = methods()[name]
    several = [B, C] if method.variadic and not method.adapters else []
    several = [B] if method.adapters else several  # one LoRA at a time; see Expression.lora
    made = getattr(A, name)(*[B, C, D][: len(method.inputs) - 1], *several)
    assert made.recipe().steps["step1"].method == name
    assert Expression.from_json(made.to_json()) == made
    assert name in dir(A)
    assert method.adapters or getattr(A, name).__doc__.startswith(method.label)


def test_unknown_names_are_named_with_the_nearest():
    with pytest.raises(AttributeError, match=r"slurp.*slerp"):
        A.slurp  # noqa: B018
    with pytest.raises(Refusal, match=r"alhpa.*alpha"):
        A.slerp(B, alhpa=0.3)
    with pytest.raises(Refusal, match=r"slurp.*slerp"):
        merge_method("slurp", A, B)
    with pytest.raises(Refusal, match=r"dtyp.*dtype"):
        (A + B).recipe(dtyp="fp16")
    with pytest.raises(Refusal, match=r"takes a, b; 3 given"):
        A.slerp(B, C)
    with pytest.raises(Refusal, match="has no c"):
        A.add_difference(B)
    with pytest.raises(Refusal, match=r"model 2 is 'b.ckpt'"):
        A.slerp("b.ckpt")
    with pytest.raises(Refusal, match="not a finite"):
        A * math.nan
    with pytest.raises(Refusal, match="alpha is <object"):
        A.slerp(B, alpha=object())
    for bad in (lambda: A + 1, lambda: A * B, lambda: A * True, lambda: "x" * A, lambda: A - 1):
        with pytest.raises(TypeError):
            bad()


def test_names_come_from_the_files_and_never_meet():
    made = model("x/step1.ckpt") + model("y/step1.ckpt") + model("z/blend.ckpt") + model("-.ckpt")
    recipe = (made / 4).recipe()
    assert [m.file for m in recipe.models.values()] == [
        "x/step1.ckpt",
        "y/step1.ckpt",
        "z/blend.ckpt",
        "-.ckpt",
    ]
    assert list(recipe.models) == ["step1", "step1-2", "blend-2", "model"]
    assert list(recipe.steps) == ["step2"]
    assert plymix.Recipe is type(recipe)


def test_a_shared_expression_is_one_step():
    mix = A.slerp(B)
    for _ in range(30):  # a tree of 2^30 leaves, were it not shared
        mix = mix.slerp(mix.maximum(C))
    assert len(mix.recipe().steps) == 61
    assert Expression.from_json(mix.to_json()) == mix


def test_a_vae_may_be_a_model():
    recipe = A.slerp(B).recipe(vae=model("v.pt"), text_encoder=B)
    assert recipe.models[recipe.output.vae].file == "v.pt"
    assert recipe.output.text_encoder == "b"
    with pytest.raises(Refusal, match="takes a model file"):
        A.recipe(vae=A.slerp(B))


# --- values ---------------------------------------------------------------------------------------

weights = st.one_of(
    st.floats(-2, 2),
    st.sampled_from(["GRAD_V", "ALL_A"]),
    st.fixed_dictionaries({"base": st.floats(0, 1), "blocks": st.just("GRAD_A")}),
)
expressions = st.recursive(
    st.sampled_from([A, B, C, D]),
    lambda inner: st.one_of(
        st.builds(lambda x, y: x + y, inner, inner),
        st.builds(lambda x, y: x - y, inner, inner),
        st.builds(lambda x, k: x * k, inner, st.floats(-3, 3)),
        st.builds(lambda x, y, w: x.weighted_sum(y, alpha=w), inner, inner, weights),
        st.builds(lambda x, y: x.ties(y, density=0.3, rules=("::0.5",)), inner, inner),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(expressions)
def test_json_round_trip_and_content(x):
    again = Expression.from_json(x.to_json())
    assert again == x
    assert hash(again) == hash(x)
    assert again.recipe() == x.recipe()
    assert copy.deepcopy(x) == pickle.loads(pickle.dumps(x)) == x
    text = repr(x)
    assert ".safetensors" in text
    assert text == repr(again)


def coefficients(x: Expression, name: str | None = None) -> dict[str, float]:
    """What a recipe of linear steps does to each model, step by step from their definitions."""
    recipe = x.recipe()

    def at(name: str) -> np.ndarray:
        if name in recipe.models:
            return np.array([1.0 if n == recipe.models[name].file[0] else 0.0 for n in "abcd"])
        step = recipe.steps[name]
        v = [at(i) for i in step.inputs]
        p = step.params
        match step.method:
            case "sum":
                return v[0] + v[1]
            case "scale":
                return v[0] * p["scale"]
            case "subtract":
                return (v[0] - v[1]) * p.get("scale", 1.0)
            case "add_difference":
                return v[0] + p["alpha"] * (v[1] - v[2])
            case "linear":
                total = sum(p["weights"]) if p.get("normalize", True) else 1.0
                return sum(w * x for w, x in zip(p["weights"], v, strict=True)) / total
        raise AssertionError(step.method)

    return at(recipe.final)


ratios = st.integers(-8, 8).map(lambda n: n / 4)
pairs = st.recursive(
    st.sampled_from(list(zip((A, B, C, D), np.eye(4), strict=True))),
    lambda inner: st.one_of(
        st.builds(lambda x, y: (x[0] + y[0], x[1] + y[1]), inner, inner),
        st.builds(lambda x, y: (x[0] - y[0], x[1] - y[1]), inner, inner),
        st.builds(lambda x, k: (x[0] * k, x[1] * k), inner, ratios),
        st.builds(lambda x, k: (x[0] / k, x[1] / k), inner, ratios.filter(bool)),
        st.builds(lambda x: (-x[0], -x[1]), inner),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(pairs)
def test_arithmetic_is_linear_algebra(pair):
    made, expected = pair
    np.testing.assert_allclose(coefficients(made), expected, rtol=1e-9, atol=1e-9)


def test_content_is_all_that_is_said():
    same = A.dare_linear(B, weights=[1], density=0.5, rules="::0.5", seed=1)
    assert same == A.dare_linear(B, density=0.5, weights=(1.0,), rules=["::0.5"], seed=1)
    others = [
        B.dare_linear(A, weights=[1], density=0.5, rules="::0.5", seed=1),
        A.dare_ties(B, weights=[1], density=0.5, rules="::0.5", seed=1),
        A.dare_linear(B, weights=[1], density=0.6, rules="::0.5", seed=1),
        A.dare_linear(B, weights=[1], density=0.5, rules="::0.6", seed=1),
        A.dare_linear(B, weights=[1], density=0.5, rules="::0.5", seed=2),
    ]
    assert len({same, *others}) == 6


def test_it_prints_with_file_names():
    assert repr((A + B) / 2) == "0.5 × a.safetensors + 0.5 × b.safetensors"
    assert repr(A + 0.7 * (B - C)) == "a.safetensors + 0.7 × (b.safetensors - c.safetensors)"
    assert repr(model("/secret/a.ckpt") - B) == "a.ckpt - b.safetensors"
    assert repr(0.5 * (A - B)) == "0.5 × (a.safetensors - b.safetensors)"
    ruled = repr(A.weighted_sum(B, alpha="GRAD_V", rules=["::0.5"]))
    assert ruled.endswith("α = GRAD_V, rules = ::0.5")


# --- merges ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        tiny.write(folder / f"{name}.safetensors", seed=seed, dtype="F32")
    short = {k: v for k, v in tiny.header(dtype="F32").items() if ".norm3." not in k}
    tiny.write_safetensors(folder / "short.safetensors", short, tiny.state(short, 9))
    return folder


def floats(path: Path) -> dict[str, np.ndarray]:
    header, values, _ = tiny.read_safetensors(path)
    return {k: v.astype(np.float64) for k, v in values.items() if header[k][0] == "F32"}


def blended(key: str) -> bool:
    return key.startswith("model.diffusion_model.")


def test_a_merge_is_its_arithmetic(folder, tmp_path):
    a, b, c = (plymix.model(folder / f"{n}.safetensors") for n in "abc")
    x = (a + b) / 2 + 0.7 * (b - c)
    result = plymix.merge(x, tmp_path / "out.safetensors", dtype="fp32")
    assert str(result.path).endswith("out.safetensors")
    got = floats(tmp_path / "out.safetensors")
    va, vb, vc = (floats(folder / f"{n}.safetensors") for n in "abc")
    for key in filter(blended, got):
        expected = (va[key] + vb[key]) / 2 + 0.7 * (vb[key] - vc[key])
        assert np.abs(got[key] - expected).max() <= np.spacing(
            np.abs(expected).max().astype(np.float32)
        )
    plymix.merge(x, out=tmp_path / "again.safetensors", dtype="fp32")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "out.safetensors"
    ).read_bytes()


def test_the_mean_of_two_is_exact(folder, tmp_path):
    """0.5 A + 0.5 B in float32 equals the float64 mean rounded once, in every element."""
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    plymix.merge((a + b) / 2, tmp_path / "out.safetensors")
    got = tiny.read_safetensors(tmp_path / "out.safetensors")[1]
    va, vb = (floats(folder / f"{n}.safetensors") for n in "ab")
    for key in filter(blended, va):
        assert (got[key] == ((va[key] + vb[key]) / 2).astype(np.float32)).all()


def test_a_model_without_a_tensor(folder, tmp_path):
    """A mean goes on without it; a difference is 0."""
    a, b, short = (plymix.model(folder / f"{n}.safetensors") for n in ("a", "b", "short"))
    va, vb = (floats(folder / f"{n}.safetensors") for n in "ab")
    key = next(k for k in va if ".norm3." in k)
    cases = {
        "mean": ((a + short) / 2, va[key]),
        "three": ((a + b + 2 * short) / 4, (va[key] + vb[key]) / 2),
        "difference": (a + 0.7 * (b - short), va[key]),
        "other": (a + 0.7 * (short - b), va[key]),
        "scaled": (a + merge_method("scale", b - short, scale=0.5), va[key]),
    }
    for name, (x, expected) in cases.items():
        plymix.merge(x, tmp_path / f"{name}.safetensors")
        got = tiny.read_safetensors(tmp_path / f"{name}.safetensors")[1][key]
        assert (got == expected.astype(np.float32)).all(), name


def test_explain_and_session_take_expressions(folder):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    said = plymix.explain((a + 3 * b) / 4, dtype="fp16")
    at = {share.block: share.shares for share in said.blocks}
    assert at["M00"] == {"a.safetensors": 0.25, "b.safetensors": 0.75}
    assert not any("sum to" in note for note in said.notes)
    with plymix.Session(a.weighted_sum(b, alpha=0.5)) as session:
        assert len(session.set("steps.step1.alpha", 0.1)) > 0
    with pytest.raises(Refusal, match="no second model"):
        plymix.merge(a, "b.safetensors", "out.safetensors")


def test_a_session_goes_on_after_a_refused_change(folder):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    alpha = {"base": 0.5, "blocks": {"IN05": 0.5}}
    out = folder / "refused-change.safetensors"
    with plymix.Session(a.weighted_sum(b, alpha=alpha)) as session:
        session.write(out)
        before = out.read_bytes()
        with pytest.raises(Refusal, match="IN55"):
            session.set("steps.step1.alpha.blocks.IN55", 0.3)
        session.write(out, force=True)
        assert out.read_bytes() == before
        changed = session.set("steps.step1.alpha.blocks.IN05", 0.3)
        assert all(".input_blocks.5." in name for name in changed)
        assert session.tensor(changed[0]).size


def test_a_session_changes_one_block_of_a_range(folder, tmp_path):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    alpha = {"base": 0.5, "blocks": {"IN00-IN06": 0.25, "M00": 0.5}}
    single = {f"IN0{i}": 0.75 if i == 5 else 0.25 for i in range(7)} | {"M00": 0.5}
    with plymix.Session(a.weighted_sum(b, alpha=alpha)) as session:
        changed = session.set("steps.step1.alpha.blocks.IN05", 0.75)
        session.write(tmp_path / "session.safetensors")
    assert all(".input_blocks.5." in name for name in changed)
    whole = a.weighted_sum(b, alpha={"base": 0.5, "blocks": single})
    plymix.merge(whole, tmp_path / "whole.safetensors")
    states = [tiny.read_safetensors(tmp_path / f"{n}.safetensors")[1] for n in ("session", "whole")]
    assert all((states[0][k] == x).all() for k, x in states[1].items())


def test_a_session_writes_shards(folder, tmp_path):
    """Which have no file of the name that was given; they are made whole each time."""
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    found = a.weighted_sum(b, alpha=0.25).recipe(shard="1MB")
    with plymix.Session(found) as session:
        for share in (0.25, 0.5):
            session.set("steps.step1.alpha", share)
            for folder_ in ("session", "whole"):
                (tmp_path / folder_).mkdir(exist_ok=True)
            index = session.write(tmp_path / "session" / "s.safetensors", force=True).path
            plymix.merge(session.recipe, tmp_path / "whole" / "s.safetensors", force=True)
            made = sorted(index.parent.iterdir())
            assert len(made) > 2
            for path in made:
                assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_a_session_finds_models_as_run_and_replay_do(folder, tmp_path):
    """By name in the folders, and by content whatever they are called there."""
    whole = tmp_path / "whole.safetensors"
    plymix.merge(folder / "a.safetensors", folder / "b.safetensors", whole)
    found = replay.embedded(whole)  # says the SHA-256 of both
    (tmp_path / "models" / "deep").mkdir(parents=True)
    for old, new in (("a", "a.safetensors"), ("b", "deep/renamed.safetensors")):
        shutil.copy(folder / f"{old}.safetensors", tmp_path / "models" / new)
    out, hashing = tmp_path / "out.safetensors", []
    options = {"folders": [tmp_path / "models"], "progress": hashing.append}
    with plymix.Session(found, **options) as session:
        session.write(out)
        assert out.read_bytes() == whole.read_bytes()
        assert session.set("steps.merge.alpha", 0.25)
    by_name = msgspec.structs.replace(  # a recipe that a person wrote says no SHA-256
        found, models={name: Model(model.file) for name, model in found.models.items()}
    )
    with pytest.raises(Refusal, match=r"b\.safetensors does not exist"):
        plymix.Session(by_name, **options)
    shutil.copy(folder / "a.safetensors", tmp_path / "models" / "deep" / "renamed.safetensors")
    with pytest.raises(Refusal, match=r"b\.safetensors \([\d,]+ bytes\) is missing"):
        plymix.Session(found, **options)


@pytest.mark.parametrize("method", ["cosine_a", "cosine_b"])
def test_a_session_knows_methods_that_look_at_all_tensors(method, folder):
    """Where one block's weight moves, what the method learns from all blocks stays right."""
    models = {n: str(folder / f"{n}.safetensors") for n in "ab"}
    alpha = {"base": 0.5, "default": 0.5, "blocks": {"IN05": 0.5}}
    step = {"method": method, "a": "a", "b": "b", "alpha": alpha}
    found = plymix.recipe.from_dict({"models": models, "steps": {"mix": step}})
    out, whole = (folder / f"{method}-{n}.safetensors" for n in ("session", "whole"))
    with plymix.Session(found) as session:
        session.write(out)
        session.set("steps.mix.alpha.blocks.IN05", 0.125)
        name = next(n for n in session.changed if ".input_blocks.5." in n)
        seen = session.tensor(name)
        session.write(out, force=True)
        plymix.merge(session.recipe, whole)
    assert out.read_bytes() == whole.read_bytes()
    _, state, _ = tiny.read_safetensors(whole)
    assert (seen == state[name].astype(np.float32)).all()


def test_a_plan_tells_sources_apart_by_file(folder):
    """The same place in another file is another value; a new number of a file is none."""
    first, second, back = (
        {
            "models": {n: str(folder / f"{n}.safetensors") for n in names},
            "output": {"from": names[0]},
        }
        for names in ("a", "b", "a")
    )
    step = {"mix": {"method": "weighted_sum", "a": "b", "b": "a", "alpha": 1.0}}
    both = {"models": second["models"] | first["models"], "steps": step, "output": {"vae": "a"}}
    with plymix.Session(plymix.recipe.from_dict(first)) as session:
        assert len(session.change(plymix.recipe.from_dict(second))) == len(session.plan.tensors)
        session.change(plymix.recipe.from_dict(back))
        changed = session.change(plymix.recipe.from_dict(both))
    assert all(session.plan.places[name].buffer for name in changed)


def test_weights_that_are_not_one_model_are_noted(folder):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    assert any("sum to 2" in note for note in plymix.explain(a + b).notes)
    assert any("sum to 0.5" in note for note in plymix.explain(a / 2).notes)
    assert not any("sum to" in note for note in plymix.explain(a.slerp(b)).notes)
    assert any("sum to 2" in note for note in plymix.explain((a + b).slerp(b)).notes)
    assert not any("sum to" in note for note in plymix.explain((2 * a - b).slerp(b)).notes)
    adjusted = plymix.explain((a + b) / 2, adjust={"detail": [0.5, 0, 0], "cfg": 1.2})
    assert not any("sum to" in note for note in adjusted.notes)


def test_a_result_prints_what_to_know_of_it(folder, tmp_path):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    line, note = str(plymix.merge(a + b, tmp_path / "ab.safetensors")).splitlines()
    assert line.startswith("ab.safetensors = a.safetensors + b.safetensors  [")
    assert note.startswith("note: the weights of the models sum to 2, not to 1, in ")
    assert "\n" not in str(plymix.merge((a + b) / 2, tmp_path / "half.safetensors"))


def test_nothing_is_looked_at_until_asked():
    x = plymix.model("/nowhere/a.ckpt").slerp(plymix.model("/nowhere/b.ckpt"))
    assert json.loads(x.to_json())["models"] == {"a": "/nowhere/a.ckpt", "b": "/nowhere/b.ckpt"}
    with pytest.raises(Refusal, match="nowhere"):
        plymix.explain(x)
