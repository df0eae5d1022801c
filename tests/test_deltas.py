"""Differences between models: what gives one, where it ends, and where inputs are wider than it.

What is expected is computed in float64 from the files, by the formulas of the methods.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import recipe as recipes
from plymix.errors import Refusal
from plymix.expression import Expression, Merge, merge_method, model
from small import data, save

A, B, C = (model(f"{n}.safetensors") for n in "abc")
UNET = "model.diffusion_model."
CONV = UNET + "input_blocks.0.0.weight"
LOST = UNET + "output_blocks.3.1.transformer_blocks.0.attn2.to_q.weight"
KINDS = {"inp": "sd1-inpainting", "inq": "sd1-inpainting", "pix": "sd1-pix2pix"}


def step(name, *inputs, **params):
    return merge_method(name, *inputs, **params)


# --- what gives a difference ----------------------------------------------------------------------

MODELS = {  # of models m and differences d
    "sum": lambda m, n, d, e: step("sum", m, d),
    "sum, turned": lambda m, n, d, e: step("sum", d, m),
    "less": lambda m, n, d, e: step("subtract", m, d),
    "plus": lambda m, n, d, e: m + 0.5 * d,
    "minus": lambda m, n, d, e: m - d,
    "mean": lambda m, n, d, e: (m + 3 * n) / 4,
    "slerp": lambda m, n, d, e: step("slerp", m, n),
    "add": lambda m, n, d, e: step("add_difference", m, n, m),
    "add differences": lambda m, n, d, e: step("add_difference", m, d, e),
    "task": lambda m, n, d, e: step("task_arithmetic", m, n),
}
DIFFERENCES = {
    "subtract": lambda m, n, d, e: step("subtract", m, n),
    "perpendicular": lambda m, n, d, e: step("perpendicular", m, n),
    "perpendicular, mixed": lambda m, n, d, e: step("perpendicular", m, d),
    "minus": lambda m, n, d, e: d - 2 * e,
    "plus": lambda m, n, d, e: d + e,
    "times": lambda m, n, d, e: -0.5 * d,
    "less": lambda m, n, d, e: step("subtract", d, e),
    "sum": lambda m, n, d, e: step("sum", d, e),
    "scale": lambda m, n, d, e: step("scale", d, scale=0.5),
    "truncate_rank": lambda m, n, d, e: step("truncate_rank", d),
    "weighted_sum": lambda m, n, d, e: step("weighted_sum", d, e),
    "n_average": lambda m, n, d, e: step("n_average", d, e, d),
    "ties": lambda m, n, d, e: step("ties", d, e),
    "slerp": lambda m, n, d, e: step("slerp", d, e),
    "nuslerp": lambda m, n, d, e: step("nuslerp", d, e),
    "onto": lambda m, n, d, e: step("add_difference", d, m, n),
    "lora": lambda m, n, d, e: d.lora("l.safetensors", 0.5),
}


def told(x: Expression) -> bool:
    """Whether the recipe of `x` says that it gives a difference; Python says the same."""
    recipe = x.recipe()
    found = recipe.final in recipe.differences()
    assert found == (isinstance(x, Merge) and x.is_delta)
    return found


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_what_is_made_of_differences_is_one_and_a_model_is_none(data):
    models, differences = [A, B, C], [A - B, B.subtract(C)]
    for _ in range(data.draw(st.integers(1, 6))):
        made, whither = data.draw(
            st.sampled_from(
                [(f, models) for f in MODELS.values()]
                + [(f, differences) for f in DIFFERENCES.values()]
            )
        )
        pick = [data.draw(st.sampled_from(pool)) for pool in [models] * 2 + [differences] * 2]
        whither.append(made(*pick))
    assert not told(models[-1])
    assert differences[-1] not in models
    assert told(differences[-1])


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_what_makes_a_model(made):
    assert not told(made(A, B, B - C, A - C))


@pytest.mark.parametrize("made", DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_makes_a_difference(made):
    x = made(A, B, B - C, A - C)
    assert told(x)
    assert not any(told(y) for y in (A + x, A.sum(x), x + A, A - x, A.subtract(x)))


def test_a_model_mixed_with_a_difference_is_what_it_was_before():
    """Odd, but somebody's: told by a note (weights that do not sum to 1), not refused."""
    d = B - C
    for x in (A.weighted_sum(d), A.affine_sum(B, weight_a=1.0, weight_b=-1.0), d.weighted_sum(A)):
        assert not told(x)
    assert told(d.subtract(A))


@pytest.mark.parametrize("inputs", [(A,), (A, B, C), (A, B, C, A)])
@pytest.mark.parametrize("name", ["sum", "scale", "add_difference", "task_arithmetic"])
def test_wrong_numbers_of_models_are_refused_by_name(name, inputs):
    """Of a difference, too: what it gives is asked before the recipe is."""
    d = B - C
    plain, odd = (_refusal(name, first, *inputs) for first in (A, d))
    assert odd == plain


def _refusal(name, *inputs):
    try:
        step(name, *inputs)
    except Refusal as e:
        return str(e)
    return ""


# --- merges ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        header = tiny.header("sd1", dtype="F32")
        values = tiny.state(header, seed)
        tiny.write_safetensors(folder / f"{name}.safetensors", header, values)
        del header[LOST], values[LOST]
        tiny.write_safetensors(folder / f"{name}less.safetensors", header, values)
    for seed, (name, kind) in enumerate(KINDS.items(), 3):
        tiny.write(folder / f"{name}.safetensors", kind, seed, dtype="F32")
    return folder


@pytest.fixture
def at(folder, monkeypatch):
    """Expressions by the names of the files, which lie in the current folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PLYMIX_CACHE", str(folder / "cache"))
    return {p.stem: model(p.name) for p in folder.glob("*.safetensors") if len(p.stem) < 6}


def stored(name, key):
    return tiny.read_safetensors(Path(name))[1].get(key)


def near(got, want):
    """Equal but for one rounding to float32, whose error counts in units of the largest value."""
    scale = np.spacing(np.abs(want).max().astype(np.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * scale)


def files(x, tmp_path, **output):
    """The results of an expression and of its recipe as TOML; they have the same tensors."""
    plymix.merge(x, tmp_path / "python.safetensors", force=True, **output)
    (tmp_path / "r.toml").write_text(recipes.to_toml(x.recipe(**output)))
    written = recipes.load(tmp_path / "r.toml")
    plymix.merge(written, tmp_path / "toml.safetensors", force=True)
    first, again = (data(tmp_path / f"{name}.safetensors") for name in ("python", "toml"))
    assert first == again
    return tiny.read_safetensors(tmp_path / "python.safetensors")[1]


BARE = {
    "subtract": lambda a, b, c: b - c,
    "sum": lambda a, b, c: (b - c) + (b - a),
    "sum of sums": lambda a, b, c: ((b - c) + (b - a)).sum((a - c).sum(a - b)),
    "scale": lambda a, b, c: (b - c).scale(scale=0.5),
    "weighted_sum": lambda a, b, c: step("weighted_sum", b - a, c - a),
    "n_average": lambda a, b, c: step("n_average", b - a, c - a, weights=[1, 3]),
    "ties": lambda a, b, c: step("ties", b - a, c - a),
    "add_difference": lambda a, b, c: (b - c).add_difference(b, a),
    "truncate_rank": lambda a, b, c: step("truncate_rank", (b - c).scale(scale=0.5)),
}


@pytest.mark.parametrize("made", BARE.values(), ids=BARE)
def test_a_bare_difference_is_refused(at, tmp_path, made):
    x = made(at["a"], at["b"], at["c"])
    with pytest.raises(Refusal, match=r"gives a difference, not a model: add it to one"):
        plymix.merge(x, tmp_path / "x.safetensors")
    with pytest.raises(Refusal, match=r"steps\.\w+ \(\w+\) gives a difference"):
        plymix.explain(recipes.from_toml(recipes.to_toml(x.recipe())))
    assert list(tmp_path.iterdir()) == []


SUMS = {  # of a, b, c
    "a + weighted_sum": (lambda a, b, c: a + step("weighted_sum", b - a, c - a), (0, 0.5, 0.5)),
    "a + 2 n_average": (lambda a, b, c: a + 2 * step("n_average", b - a, c - a), (-1, 1, 1)),
    "a - average": (lambda a, b, c: a - step("n_average", b - a, c - a), (2, -0.5, -0.5)),
    "a - (b - c)": (lambda a, b, c: step("subtract", a, b - c), (1, -1, 1)),
    "in sum": (lambda a, b, c: step("subtract", a, b - c).sum(b - c), (1, 0, 0)),
    "onto a difference": (lambda a, b, c: a.sum((b - c).add_difference(b, a)), (0, 2, -1)),
    "sum, scale": (lambda a, b, c: a.sum(((b - c) + (b - a)).scale(scale=0.5)), (0.5, 1, -0.5)),
    "n (b-a)": (lambda a, b, c: sum([(b - a) / 4] * 3, start=a), (0.25, 0.75, 0)),
}


@pytest.mark.parametrize(("made", "weights"), SUMS.values(), ids=SUMS)
def test_differences_are_added_as_before(at, tmp_path, made, weights):
    got = files(made(at["a"], at["b"], at["c"]), tmp_path)
    for key in (CONV, LOST):
        want = sum(w * stored(f"{n}.safetensors", key).astype("f8") for w, n in zip(weights, "abc"))  # noqa: B905
        near(got[key], want)


LEFT_OUT = {
    "plain": lambda al, a, b, c: al.sum(b - c),
    "first": lambda al, a, b, c: (b - c).sum(al),
    "scale": lambda al, a, b, c: al.sum((b - c).scale(scale=0.5)),
    "sum": lambda al, a, b, c: al.sum((b - c) + (b - a)),
    "median": lambda al, a, b, c: al.sum(step("median", b - c, b - a, a - c)),
    "onto": lambda al, a, b, c: al.sum((b - c).add_difference(b, a)),
    "linear": lambda al, a, b, c: al.linear(b - c, weights=[1, 1], normalize=False),
    "less": lambda al, a, b, c: al.subtract(b - c),
}


@pytest.mark.parametrize("made", LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_tensor_of_differences_alone_is_left_out(at, tmp_path, made):
    x = made(*(at[n] for n in ("aless", "a", "b", "c")))
    assert LOST not in files(x, tmp_path, union=True)
    said = plymix.explain(x, union=True).notes
    assert any("left out: only a difference (" in note and LOST in note for note in said)


LACKING = {  # what a, b and c are times at the tensor that bless and cless lack
    "sum first": (lambda a, b, c, d: a.sum(d + (b - c)), (1, 1, -1)),
    "sum second": (lambda a, b, c, d: a.sum((b - c) + d), (1, 1, -1)),
    "weighted": (
        lambda a, b, c, d: a.sum(step("weighted_sum", b - c, d, alpha=0.25)),
        (1, 0.75, -0.75),
    ),
    "average": (lambda a, b, c, d: a.sum(step("n_average", d, b - c)), (1, 0.5, -0.5)),
    "less": (lambda a, b, c, d: a.sum(step("subtract", d, b - c)), (1, -1, 1)),
    "plus": (lambda a, b, c, d: a + 2 * step("subtract", b - c, d), (1, 2, -2)),
    "scale": (lambda a, b, c, d: a.sum(d.scale(scale=2.0)), (1, 0, 0)),
    "model less": (lambda a, b, c, d: a.subtract(d), (1, 0, 0)),
}


@pytest.mark.parametrize(("made", "weights"), LACKING.values(), ids=LACKING)
def test_a_difference_of_models_that_lack_a_tensor_is_0_there(at, tmp_path, made, weights):
    x = made(at["a"], at["b"], at["c"], at["bless"] - at["cless"])
    want = sum(w * stored(f"{n}.safetensors", LOST).astype("f8") for w, n in zip(weights, "abc"))  # noqa: B905
    near(files(x, tmp_path)[LOST], want)
    assert any("not in steps." in note and LOST in note for note in plymix.explain(x).notes)


# --- inpainting -----------------------------------------------------------------------------------


# What is written, what the files are times in the channels that all have, whose the others are.
WIDE = {
    "0.7 * (p - b)": (lambda a, b, p, q: a + 0.7 * (p - b), (1, -0.7, 0.7, 0), "p"),
    "sum, scale": (
        lambda a, b, p, q: a.sum(p.subtract(b).scale(scale=0.7)),
        (1, -0.7, 0.7, 0),
        "p",
    ),
    "two": (lambda a, b, p, q: a.sum((p - b) + (p - a)), (0, -1, 2, 0), "p"),
    "twice": (lambda a, b, p, q: a.sum((p - b).sum(p - b)), (1, -2, 2, 0), "p"),
    "deep": (
        lambda a, b, p, q: a.sum(step("n_average", p - b, ((b - p) * 2).scale(scale=-3.0))),
        (1, -3.5, 3.5, 0),
        "p",
    ),
    "less": (lambda a, b, p, q: a.subtract(p - b), (1, 1, -1, 0), "p"),
    "onto": (lambda a, b, p, q: a.sum((a - b).add_difference(p, b)), (2, -2, 1, 0), "p"),
    "two owners": (lambda a, b, p, q: a.sum((p - b) + (q - b)), (1, -2, 1, 1), "p"),
    "other first": (lambda a, b, p, q: a.sum((q - b) + (p - b)), (1, -2, 1, 1), "q"),
    "both wide": (lambda a, b, p, q: a.sum(p.subtract(q)), (1, 0, 1, -1), "p"),
    "both wide, scaled": (lambda a, b, p, q: a.sum((p - q) * 2 + (b - a)), (0, 1, 2, -2), "p"),
    "onto a wide one": (lambda a, b, p, q: q.sum((p - b).scale(scale=0.5)), (0, -0.5, 0.5, 1), "q"),
    "onto one, first": (lambda a, b, p, q: (p - b).scale(scale=0.5).sum(q), (0, -0.5, 0.5, 1), "q"),
    "onto a mix": (
        lambda a, b, p, q: q.weighted_sum(a).sum((p - b).scale(scale=2.0)),
        (0.5, -2, 2, 0.5),
        "q",
    ),
    "mixed twice": (
        lambda a, b, p, q: a.weighted_sum(p).weighted_sum(b),
        (0.25, 0.5, 0.25, 0),
        "p",
    ),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "inp") for case in WIDE),
        *((case, "pix") for case, (_, weights, _) in WIDE.items() if not weights[3]),
    ],
)
def test_channels_that_one_model_has_are_kept(at, tmp_path, case, kind):
    made, weights, owner = WIDE[case]
    names = {"a": "a", "b": "b", "p": kind, "q": "inq"}
    x = made(*(at[name] for name in names.values()))
    got = files(x, tmp_path)[CONV]
    values = {n: stored(f"{name}.safetensors", CONV) for n, name in names.items()}
    assert (got[:, 4:].view("u4") == values[owner][:, 4:].view("u4")).all()
    near(got[:, :4], sum(w * values[n][:, :4].astype("f8") for w, n in zip(weights, names)))  # noqa: B905
    said = [note for note in plymix.explain(x).notes if CONV in note]
    last = values[owner].shape[1] - 1
    whose = f"{names[owner]}.safetensors"
    assert said == [f"{CONV}: channels 0-3 merged, 4-{last} kept from {whose}"]


def test_methods_that_are_no_sums_see_the_channels_of_the_difference(at, tmp_path):
    """What they learn of a whole tensor is of what is shared, not of the kept channels."""
    a, b, c, p = (at[n] for n in ("a", "b", "c", "inp"))
    got = files(a.sum((p - b).perpendicular(p - c)), tmp_path)[CONV]
    va, vb, vc, vp = (stored(f"{n}.safetensors", CONV).astype("f8") for n in ("a", "b", "c", "inp"))
    x, y = vp[:, :4] - vb, vp[:, :4] - vc
    near(got[:, :4], va + y - x * np.vdot(x, y) / np.vdot(x, x))
    assert (got[:, 4:] == vp[:, 4:].astype("f4")).all()


def test_two_wide_differences_of_one_kind_are_whole(at, tmp_path):
    """Where every model has all the channels, all are merged, as those of two models are."""
    a, p, q = (at[n] for n in ("a", "inp", "inq"))
    vp, vq = (stored(f"{n}.safetensors", CONV).astype("f8") for n in ("inp", "inq"))
    near(files(p.sum((p - q).scale(scale=0.5)), tmp_path)[CONV], 1.5 * vp - 0.5 * vq)
    x = q.weighted_sum(a.weighted_sum(p), alpha=0.5)
    near(files(x, tmp_path)[CONV][:, 4:], (vp + vq)[:, 4:] / 2)
    said = [note for note in plymix.explain(x).notes if CONV in note]
    assert said == [f"{CONV}: in steps.step1 channels 0-3 merged, 4-8 kept from inp.safetensors"]


def test_what_scales_a_whole_model_scales_all_its_channels_and_says_so(at, tmp_path):
    a, p = at["a"], at["inp"]
    x = p.scale(scale=2.0).weighted_sum(a, alpha=0.25)
    got = files(x, tmp_path)[CONV]
    va, vp = (stored(f"{n}.safetensors", CONV).astype("f8") for n in ("a", "inp"))
    assert (got[:, 4:] == 2 * vp[:, 4:]).all()
    near(got[:, :4], 1.5 * vp[:, :4] + 0.25 * va)
    said = [note for note in plymix.explain(x).notes if CONV in note]
    assert said == [f"{CONV}: channels 0-3 merged, 4-8 as steps.step1 makes them"]


def test_a_lora_on_a_difference_leaves_the_channels(at, tmp_path):
    down, up = (
        np.random.default_rng(i).normal(size=n) for i, n in enumerate([(2, 4, 3, 3), (8, 2)])
    )
    name = "lora_unet_input_blocks_0_0"
    factors = {
        f"{name}.lora_down.weight": ("F32", down.astype("f4")),
        f"{name}.lora_up.weight": ("F32", up.astype("f4").reshape(8, 2, 1, 1)),
        f"{name}.alpha": ("F32", np.float32(2)),
    }
    lora = save(tmp_path / "l.safetensors", factors)
    x = at["a"].sum((at["inp"] - at["b"]).lora(lora, 0.5).scale(scale=2.0))
    va, vb, vp = (stored(f"{n}.safetensors", CONV).astype("f8") for n in ("a", "b", "inp"))
    got = files(x, tmp_path)[CONV]
    near(got[:, :4], va + 2 * (vp[:, :4] - vb) + np.einsum("or,rihw->oihw", up, down))
    assert (got[:, 4:] == vp[:, 4:].astype("f4")).all()


def test_two_kinds_of_differences_are_refused(at):
    a, b, p, x = (at[n] for n in ("a", "b", "inp", "pix"))
    with pytest.raises(Refusal, match=r"different numbers of input channels.* 9.* 8"):
        plymix.explain(a.sum((p - b) + (x - b)))


def test_explain_says_it_on_the_command_line(at, tmp_path):
    a, b, p = (at[n] for n in ("a", "b", "inp"))
    recipe = a.sum(p.subtract(b).scale(scale=0.7)).recipe()
    (tmp_path / "r.toml").write_text(recipes.to_toml(recipe))
    command = [sys.executable, "-m", "plymix", "explain", "--json", str(tmp_path / "r.toml")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    notes = json.loads(ran.stdout)["notes"]
    assert any("channels 0-3 merged, 4-8 kept from inp.safetensors" in note for note in notes)
    (tmp_path / "r.toml").write_text(recipes.to_toml(((p - b) + (a - b)).recipe()))
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "gives a difference, not a model" in ran.stderr
