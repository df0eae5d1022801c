"""`--set` and `Session.set`: the last set wins, however the weight is written."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import hashes, plan, recipe, weights
from plymix.errors import Refusal
from plymix.setting import with_setting
from plymix.weights import SD1_BLOCKS

NAMES = ("BASE", *SD1_BLOCKS)
ELEMENTS = "M00-OUT02:attn2:0.0625"
LIST = [i / 32 for i in range(25)]
WEIGHTS = [
    0.5,
    "GRAD_V",
    LIST,
    [0.75, *LIST],
    {"base": 0.3},
    {"default": 0.2},
    {"IN05": 0.4, "base": 0.3},
    {"in05": 0.4, "IN08-OUT03": 0.7, "default": 0.1},
    {"base": 0.2, "blocks": {"IN00-IN11": 0.4, "OUT11-OUT03": 0.3}},
    {"IN00-IN05 M00": 0.2, "default": 0.7},
    {"curve": "cosine"},
    {"blocks": {"curve": "linear", "from": 1, "to": 0}, "base": 0.1},
    {"base": 0.2, "blocks": "GRAD_A"},
    {"base": 0.75, "blocks": [0.75, *LIST]},
]


def made(alpha, rules=(), method="weighted_sum", files="{}.safetensors", **more):
    step = {"method": method, "a": "a", "b": "b", "alpha": alpha, "rules": [*rules], **more}
    models = {name: str(files).format(name) for name in "ab"}
    return recipe.from_dict({"models": models, "steps": {"m": step}})


def numbers(found, element="to_q", param="alpha"):
    """What each block gets of SD1, for keys with `element` in them."""
    step = found.steps["m"]
    resolved = weights.resolve(step.params[param], SD1_BLOCKS)
    known = {"BASE": resolved.base or 0.0, **resolved.blocks}
    rules = weights.parse_rules(step.rules) if param == "alpha" else ()
    return {b: weights.apply_rules(rules, b, f"x.{element}.y", known[b], SD1_BLOCKS) for b in NAMES}


def reached(name):
    """The blocks that the words of a set are for, by SD1's order."""
    at = {n: i for i, n in enumerate(NAMES)}
    for word in name.upper().split():
        ends = sorted(at[end] for end in word.split("-"))
        yield from NAMES[ends[0] : ends[-1] + 1]


def is_disjoint(name):
    """A row of blocks names each once."""
    found = list(reached(name))
    return len(found) == len(set(found))


block = st.sampled_from(SD1_BLOCKS)
word = block | st.tuples(block, block).map("-".join)
names = st.lists(word, min_size=1, max_size=2).map(" ".join).filter(is_disjoint)
names |= st.sampled_from(["base", "BASE"])
share = st.integers(0, 64).map(lambda n: n / 64)
sets = st.lists(st.tuples(names, st.booleans(), share), max_size=6)
whole_rules = st.lists(st.tuples(word | st.just("") | word.map("NOT {}".format), share), max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WEIGHTS), whole_rules, sets)
def test_the_last_set_of_a_block_wins(alpha, rules, sets):
    """Over what the recipe says of it in any form, and over the sets before; nothing else moves."""
    rules = [f"{name}::{value}" for name, value in rules]
    found = made(alpha, [*rules, ELEMENTS])
    expected, finer = numbers(found), numbers(found, "attn2")
    for name, lower, value in sets:
        found = with_setting(found, f"steps.m.alpha.{name.lower() if lower else name}", f"{value}")
        expected |= dict.fromkeys(reached(name), value)
    assert numbers(found) == expected
    held = set(reached("M00-OUT02"))
    for b, value in numbers(found, "attn2").items():
        assert value == (finer[b] if b in held else expected[b])
    assert recipe.from_json(recipe.to_json(found)) == found


@pytest.mark.parametrize("alpha", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["IN05", "in05", "IN03-IN06", "M00", "OUT03", "base", "BASE"])
def test_every_way_to_write_a_weight(alpha, name):
    before = made(alpha)
    expected = numbers(before) | dict.fromkeys(reached(name), 0.55)
    assert numbers(with_setting(before, f"steps.m.alpha.{name}", "0.55")) == expected
    if name != "base":
        at = f"steps.m.alpha.blocks.{name}"
        assert numbers(with_setting(before, at, "0.55")) == expected


@pytest.mark.parametrize("whole", ["0.9", "GRAD_A", '{"base": 0.2, "blocks": {"M00": 0.1}}'])
def test_a_set_of_the_whole_weight_is_over_all_its_blocks(whole):
    found = made("GRAD_V", ["IN00-IN05::0.2", ELEMENTS, "::0.3"])
    for at in ("IN03", "base"):
        found = with_setting(found, f"steps.m.alpha.{at}", "0.7")
    found = with_setting(found, "steps.m.alpha", whole)
    assert found.steps["m"].rules == (ELEMENTS,)
    assert numbers(found) == numbers(made(found.steps["m"].params["alpha"]))


def test_a_set_of_all_blocks_leaves_the_text_encoder():
    found = made(0.5, ["BASE::0.25", "IN03::0.1"])
    found = with_setting(found, "steps.m.alpha.blocks", "GRAD_V")
    assert numbers(found) == numbers(made({"base": 0.25, "blocks": "GRAD_V"}))


def test_elements_that_a_rule_for_the_block_overrode_stay_overridden():
    found = with_setting(made(0.5, [ELEMENTS, "M00::0.3"]), "steps.m.alpha.M00", "0.9")
    assert numbers(found, "attn2")["M00"] == 0.9
    assert numbers(found, "attn2")["OUT00"] == 0.0625


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        (["D00-S05::0.2", "S03:qkv:0.1"], "S03", ["D00-S05::0.2", "S03::0.9", "S03:qkv:0.1"]),
        (["D03:qkv:0.1", "S03::0.2"], "D03", ["D03:qkv:0.1", "S03::0.2"]),
        (["IN00::0.2", "IN05:attn2:0.1"], "TIME", ["IN00::0.2", "TIME::0.9", "IN05:attn2:0.1"]),
        (["BASE-S05::0.2"], "BASE", ["BASE-S05::0.2", "BASE::0.9"]),
        (["D00-S05::0.2"], "BASE", ["D00-S05::0.2"]),
        (["NOT D00-D05::0.2"], "D03", ["NOT D00-D05::0.2"]),
        (["NOT D00-D05::0.2"], "D06", ["NOT D00-D05::0.2", "D06::0.9"]),
        (["S00::0.4\nD00::0.2, d01:: 0.3"], "D00-D05", ["S00::0.4", "D00-D05::0.9"]),
    ],
)
def test_ranges_that_only_a_model_knows(rules, name, expected):
    got = with_setting(made(0.5, rules), f"steps.m.alpha.{name}", "0.9").steps["m"]
    assert list(got.rules) == expected


def test_what_a_set_cannot_say():
    found = made(0.5, ["IN05::0.1"], method="triple_sum", c="b", beta="GRAD_V")
    with pytest.raises(Refusal, match=r"m\.beta\.IN05: this needs a rule, and rules set alpha"):
        with_setting(found, "steps.m.beta.IN05", "0.3")
    table = with_setting(found, "steps.m.beta", "0.25")
    table = with_setting(table, "steps.m.beta.IN05", "0.5")
    assert numbers(table, param="beta")["IN05"] == 0.5
    assert table.steps["m"].rules == ("IN05::0.1",)
    for value in ("[1, 2]", "GRAD_V", "true"):
        with pytest.raises(Refusal, match="not a number"):
            with_setting(made("GRAD_V"), "steps.m.alpha.IN05", value)
    for name in ("", " ", "NOT IN05", "IN05:attn2", "IN05,IN06"):
        for alpha in (0.5, "GRAD_V"):
            with pytest.raises(Refusal, match="is not the name of a block"):
                with_setting(made(alpha), f"steps.m.alpha.{name}", "0.5")
    with pytest.raises(Refusal, match=r"steps\.m\.alpha\.IN05 is not a table"):
        with_setting(found, "steps.m.alpha.IN05.x", "1")


def test_a_field_of_a_curve():
    for alpha in ({"curve": "linear"}, {"blocks": {"curve": "linear"}}):
        found = with_setting(made(alpha), "steps.m.alpha.to", "0.5")
        assert numbers(found) == numbers(made({"curve": "linear", "to": 0.5}))


# --- with models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        tiny.write(folder / f"{name}.safetensors", seed=seed)
    return folder


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(WEIGHTS), sets)
def test_a_session_makes_what_the_recipe_written_whole_makes(folder, tmp_path, alpha, sets):
    """The same bytes, and every set says the tensors that it changed."""
    files = folder / "{}.safetensors"
    expected = numbers(made(alpha))
    with plymix.Session(made(alpha, [ELEMENTS], files=files)) as session:
        for name, _, value in sets:
            moved = {b for b in reached(name) if not math.isclose(expected[b], value)}
            expected |= dict.fromkeys(reached(name), value)
            changed = session.set(f"steps.m.alpha.{name}", value)
            assert {session.plan.places[key].block for key in changed} == moved
        session.write(tmp_path / "session.safetensors", force=True)
    whole = {"base": expected.pop("BASE"), "blocks": expected}
    whole = made(whole, [ELEMENTS], files=files)
    plymix.merge(whole, tmp_path / "whole.safetensors", force=True)
    got, want = (tiny.read_safetensors(tmp_path / f"{n}.safetensors") for n in ("session", "whole"))
    assert got[0] == want[0]
    assert all(got[1][key].tobytes() == x.tobytes() for key, x in want[1].items())


def notes(folder, alpha, *rules):
    with plan.build(made(alpha, rules, files=folder / "{}.safetensors")) as found:
        return [note for note in found.notes if "does nothing" in note]


def test_what_has_no_effect_is_said(folder):
    def said(what, why="rules are for all of its tensors"):
        return [f"steps.m.{what} does nothing: {why}"]

    later = "later rules are for all of its tensors"
    assert notes(folder, 0.5, "IN05:attn2:0.3", "M00::0.1") == []
    assert notes(folder, 0.5, "IN05:attn2:0.3", "IN05::0.1") == said("rules: IN05:attn2:0.3", later)
    assert notes(folder, 0.5, "IN05:weight:0.1", "IN05:NOT weight:0.2") == []
    both = notes(folder, "GRAD_V", "IN05::0.9", "IN05:weight:0.1", "IN05:NOT weight:0.2")
    assert both == said("rules: IN05::0.9", later)
    table = {"base": 0.1, "IN04-IN05": 0.3, "M00": 0.4, "default": 0.2}
    assert notes(folder, table, "IN05::0.9") == []
    assert notes(folder, table, "IN03-M00::0.9") == [
        *said("alpha: IN04-IN05"), *said("alpha: M00")
    ]  # fmt: skip
    assert notes(folder, table, "BASE::0.9") == said("alpha: base")
    assert notes(folder, table, "::0.9") == said("alpha")
    assert notes(folder, table, "BASE::0.1") == []
    assert notes(folder, 0.5, "NOT IN05::0.9", "IN05::0.8") == said("alpha")
    named = {"IN00-OUT11": 0.3, "default": 0.2}
    assert notes(folder, named) == said("alpha.default", "every block is named")


@pytest.mark.parametrize(
    ("rule", "word", "near"),
    [
        ("IN04:NOT atn2:0.9", "atn2", "did you mean attn2"),
        ("IN04:attn2 typo:0.9", "typo", "check its element names"),
        (":to_w attn1:0.9", "to_w", "did you mean to_"),
    ],
)
def test_an_element_that_no_tensor_has_is_refused(folder, rule, word, near):
    with pytest.raises(Refusal, match=rf"steps\.m\.rules: .* has '{word}': {near}"):
        notes(folder, 0.5, rule)


def test_an_element_need_not_be_in_the_blocks_of_its_rule(folder):
    """As in a rule that is for the U-Net's layers and the text encoder's."""
    for rule in ("IN00-IN02:skip_connection attn2:0.9", "IN05:attn1 quant_conv mlp:0.9"):
        assert notes(folder, 0.5, rule) == []


def test_an_element_that_no_tensor_has_is_told_of_a_result_made_before(folder):
    found = recipe.to_dict(made(0.5, ["IN04:attn2 typo:0.9"], files=folder / "{}.safetensors"))
    for name, model in found["models"].items():
        found["models"][name] = {"file": model, "sha256": hashes.sha256(Path(model))}
    with plan.build(recipe.from_dict(found)) as planned:
        assert any("no tensor of SD1 has 'typo'" in note for note in planned.notes)
