"""Recipes whose steps use a step more than once: what is shared is computed once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import expr, plan
from plymix.engine.worker import Worker
from plymix.formats.base import TensorInfo
from plymix.recipe import from_dict
from small import draw, result_bytes, save

A, B, C = (plymix.model(f"{n}.safetensors") for n in "abc")
SHAPE = (31, 40)


def slerp(a, b, t):
    u, v = (x / np.linalg.norm(x) for x in (a, b))
    angle = np.arccos(np.clip(np.sum(u * v), -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - t) * a + t * b
    size = (1 - t) * np.linalg.norm(a) + t * np.linalg.norm(b)
    return size * (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)


def geometric(a, b, t):
    m = np.abs(a) ** (1 - t) * np.abs(b) ** t
    opposite = np.where(a > 0, np.cos(np.pi * t), np.cos(np.pi * (1 - t)))
    return m * np.where(np.sign(a) == np.sign(b), np.sign(a), opposite)


FORMULAS = {
    "weighted_sum": lambda a, b, t: (1 - t) * a + t * b,
    "geometric_sum": geometric,
    "slerp": slerp,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three files of one tensor, and its values in float64."""
    folder = tmp_path_factory.mktemp("graph")
    drawn = {n: draw("F32", SHAPE, i) for i, n in enumerate("abc")}
    files = {n: str(save(folder / f"{n}.safetensors", {"x": t})) for n, t in drawn.items()}
    return files, {n: t[1].astype(np.float64) for n, t in drawn.items()}


def recipe(models, steps):
    """`steps` are (method, input, input, alpha); a number stands for the step of that index."""
    names = [[f"s{x}" if isinstance(x, int) else x for x in inputs] for _, *inputs, _ in steps]
    return from_dict(
        {
            "models": models[0],
            "steps": {
                f"s{i}": {"method": method, "a": a, "b": b, "alpha": alpha}
                for i, ((method, *_, alpha), (a, b)) in enumerate(zip(steps, names, strict=True))
            },
            "output": {"from": f"s{len(steps) - 1}", "arch": "any"},
        }
    )


def by_hand(models, steps):
    """The last step's result, each worked out in float64 after those it uses."""
    done = []
    for method, a, b, alpha in steps:
        x, y = (done[i] if isinstance(i, int) else models[1][i] for i in (a, b))
        done.append(FORMULAS[method](x, y, alpha))
    return done[-1]


def result(found):
    return np.frombuffer(result_bytes(found)["x"], "f4").reshape(SHAPE)


@st.composite
def graphs(draw):
    steps = []
    for i in range(draw(st.integers(2, 7))):
        known = st.sampled_from([*"abc", *range(i), *([i - 1] * 6 if i else [])])
        method = draw(st.sampled_from(sorted(FORMULAS)))
        steps.append((method, draw(known), draw(known), draw(st.sampled_from([0.2, 0.4, 0.9]))))
    return steps


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_any_graph_is_what_its_steps_give_one_by_one(models, steps):
    want = by_hand(models, steps)
    np.testing.assert_allclose(result(recipe(models, steps)), want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["geometric_sum", "slerp"])
def test_each_step_is_computed_once(models, monkeypatch, method):
    """Sixty levels that each use the one below twice have 2^60 paths."""
    asked = []
    call = Worker._call
    monkeypatch.setattr(Worker, "_call", lambda *x: asked.append(x[1].step) or call(*x))
    steps = [(method, "a", "b", 0.5), *((method, i, i, 0.3) for i in range(60))]
    found = recipe(models, steps)
    np.testing.assert_allclose(result(found), by_hand(models, steps), rtol=1e-3, atol=1e-6)
    assert asked == [f"s{i}" for i in range(61)]
    with plan.build(found) as planned:
        assert planned.memory(1) < 128 << 20
        assert len(set(expr.leaves(planned.tensors[0].expr))) == 2


def test_nests_deeper_than_the_stack(models):
    steps = [("geometric_sum", i - 1 if i else "a", "b", 0.001) for i in range(1500)]
    found = recipe(models, steps)
    np.testing.assert_allclose(result(found), by_hand(models, steps), rtol=1e-3, atol=1e-6)


def test_graphs_made_apart_are_compared_by_what_they_say(models):
    steps = [("geometric_sum", "a", "b", 0.5), *(("slerp", i, i, 0.3) for i in range(60))]
    other = [("geometric_sum", "a", "b", 0.6), *steps[1:]]
    first, again, changed = (recipe(models, x) for x in (steps, steps, other))
    with plan.build(first) as a, plan.build(again) as b, plan.build(changed) as c:
        x, y, z = (planned.tensors[0].expr for planned in (a, b, c))
        assert x == y
        assert x is not y
        assert hash(x) == hash(y)
        assert x != z
        assert x != x.args[0]
        assert a.changes(b) == ()
        assert a.changes(c) == ("x",)


def test_what_waits_for_others():
    """((a, b), (b, c)) and its like twice over: the left half waits while the right is made."""

    def call(*args):
        return expr.Call("s", "slerp", args, (("alpha", 0.5),), "x", 0, (0, 1))

    a, b = (expr.Leaf(i, TensorInfo("x", "F32", SHAPE, 0)) for i in range(2))
    left, right = call(a, b), call(b, a)
    both = call(left, right)
    whole = call(both, call(left, both))
    found = [(node.args, n) for node, n in expr.waiting(whole)]
    assert found == [((a, b), 0), ((b, a), 1), ((left, right), 0), ((left, both), 0),
                     ((both, whole.args[1]), 0)]  # fmt: skip


def test_python_expressions_nest_as_deep():
    x = y = A
    for _ in range(1500):
        x, y = x.slerp(B, alpha=0.5), y.slerp(B, alpha=0.5)
    assert x == y
    assert hash(x) == hash(y)
    assert len(x.recipe().steps) == 1500
    assert plymix.expression.Expression.from_json(x.to_json()) == x
    assert repr(x).endswith("b.safetensors, alpha = 0.5)")


def test_differences_added_up_over_and_over():
    d = A - B
    for _ in range(40):
        d = d + d
    (step,) = (C + d).recipe().steps.values()
    assert (step.method, step.params["alpha"]) == ("add_difference", 2.0**40)
    d = A - B
    for i in range(1200):
        d = d + i * (B - C)
    assert len((C + d * 0.5).recipe().steps) == 1201
