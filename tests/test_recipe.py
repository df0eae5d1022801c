"""Recipes: text to value and back, unchanged; everything unknown refused with a suggestion."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix import recipe, weights
from plymix.errors import Refusal
from plymix.setting import with_setting

TOML = """
[models]
sd = "sd-v1-4.ckpt"
wd = { file = "wd.safetensors", size = 12, sha256 = "ab" }

[steps.mix]
method = "weighted_sum"
a = "sd"
b = "wd"
alpha = { base = 0.5, blocks = { "IN00-IN05" = 0.2, M00 = 0.5 } }
rules = ["IN05-OUT03:attn2:0.3"]

[steps.more]
method = "add_difference"
a = "mix"
b = "wd"
c = "sd"
alpha = 0.7

[output]
from = "more"
dtype = "fp16"
vae = "sd"
"""


def test_toml_is_what_it_says():
    found = recipe.from_toml(TOML)
    assert found.models["sd"] == recipe.Model("sd-v1-4.ckpt")
    assert found.models["wd"] == recipe.Model("wd.safetensors", 12, "ab")
    assert found.steps["mix"].inputs == ("sd", "wd")
    assert found.steps["mix"].rules == ("IN05-OUT03:attn2:0.3",)
    assert found.steps["more"].inputs == ("mix", "wd", "sd")
    assert found.final == "more"
    assert found.order() == ("mix", "more")
    assert found.base() == "sd"
    assert found.output.dtype == "fp16"
    assert found.parts == ("sd",)


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "r.toml").write_text(TOML)
    found = recipe.load(tmp_path / "r.toml")
    (tmp_path / "r.json").write_text(recipe.to_json(found))
    assert recipe.load(tmp_path / "r.json") == found
    with pytest.raises(Refusal, match="cannot read"):
        recipe.load(tmp_path / "absent.toml")


names = st.text("abcdefgäß日_019-", min_size=1, max_size=6).filter(
    lambda n: n[0] != "-" and n != "blend"
)
numbers = st.floats(-2, 3, allow_nan=False)
alphas = st.one_of(
    numbers,
    st.just("GRAD_V"),
    st.lists(numbers, min_size=25, max_size=26),
    st.builds(lambda b, d: {"base": b, "default": d, "blocks": {"M00": b}}, numbers, numbers),
)


@st.composite
def written(draw):
    """A recipe as a person may write it, in plain dicts."""
    models = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    steps, known = {}, list(models)
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        if name in known:
            continue
        used = st.sampled_from(known)
        step = draw(
            st.one_of(
                st.builds(
                    lambda a, b, w: {"method": "weighted_sum", "a": a, "b": b, "alpha": w},
                    used,
                    used,
                    alphas,
                ),
                st.builds(
                    lambda m: {"method": "n_average", "models": m},
                    st.lists(used, min_size=1, max_size=3),
                ),
            )
        )
        steps[name] = step
        known.append(name)
    output = draw(
        st.fixed_dictionaries(
            {"from": st.sampled_from(known)},
            optional={
                "dtype": st.sampled_from(list(recipe.DTYPES)),
                "ema": st.sampled_from(recipe.EMA),
                "vae": st.sampled_from([*models, "blend"]),
                "union": st.booleans(),
                "title": st.text(max_size=5),
            },
        )
    )
    return {"models": {m: f"{m}.safetensors" for m in models}, "steps": steps, "output": output}


@given(written())
@settings(max_examples=150, deadline=None)
def test_json_and_value_are_inverse(found):
    first = recipe.from_dict(found)
    text = recipe.to_json(first)
    again = recipe.from_json(text)
    assert recipe.to_json(again) == text
    assert recipe.from_json(recipe.to_json(again)) == again
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert "\n" not in text
    assert (again.models, again.output, again.final) == (first.models, first.output, first.final)


@given(written())
@settings(max_examples=80, deadline=None)
def test_toml_and_value_are_inverse(found):
    first = recipe.from_json(recipe.to_json(recipe.from_dict(found)))
    assert recipe.from_toml(recipe.to_toml(first)) == first


def test_order_of_writing_makes_no_difference():
    found = recipe.to_dict(recipe.from_toml(TOML))
    turned = {k: dict(reversed(v.items())) for k, v in reversed(found.items())}
    assert recipe.to_json(recipe.from_dict(turned)) == recipe.to_json(recipe.from_toml(TOML))


def changed(old, new):
    assert old in TOML
    return TOML.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed("[output]", "[outptu]"), "output"),
        (changed("dtype =", "dtpye ="), "dtype"),
        (changed("fp16", "fp61"), "fp16"),
        (changed("weighted_sum", "weighted_sun"), "weighted_sum"),
        (changed("alpha = 0.7", "alhpa = 0.7"), "alpha"),
        (changed('b = "wd"', 'b = "wdd"'), "wd"),
        (changed('a = "mix"', 'a = "more"'), "circle"),
        (changed('from = "more"', 'from = "mroe"'), "more"),
        (changed('c = "sd"', ""), "c"),
        (changed('c = "sd"', 'c = "sd"\nd = "sd"'), "unknown"),
        (changed('c = "sd"', "c = 3"), "name"),
        (changed("size = 12", 'size = "12"'), "models.wd.size is a text, not a whole number"),
        (changed('dtype = "fp16"', "dtype = 16"), "dtype is a whole number, not a text or a table"),
        (changed('dtype = "fp16"', "union = 1"), "output.union is a whole number, not true or"),
        (changed("size = 12", "sise = 12"), "size"),
        (changed("[steps.more]", "[steps.sd]"), "both"),
        (changed('rules = ["IN05-OUT03:attn2:0.3"]', "rules = 3"), "rules"),
        (changed("alpha = 0.7", "seed = 0.5"), "seed"),
        (changed('sd = "sd-v1-4.ckpt"', 'sd = ""'), "file"),
        (changed('method = "add_difference"', ""), "method"),
        ("[models", "TOML"),
        ("", "models"),
        ("[models]", "models"),
        ('[models]\na = "x"\nb = "y"', "steps"),
        ("models = 3", "models"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    with pytest.raises(Refusal) as caught:
        recipe.from_toml(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '"x"', "{", "[" * 100_000, '{"models": []}']
)
def test_json_that_is_no_recipe(text):
    with pytest.raises(Refusal):
        recipe.from_json(text)


def test_long_circles():
    steps = {
        f"s{i}": {"method": "weighted_sum", "a": f"s{(i + 1) % 5}", "b": "m"} for i in range(5)
    }
    with pytest.raises(Refusal, match="circle: s0 -> s1 -> s2 -> s3 -> s4 -> s0"):
        recipe.from_dict({"models": {"m": "m.ckpt"}, "steps": steps})


def test_unused_steps_are_not_run():
    steps = {
        n: {"method": "weighted_sum", "a": "m", "b": "n", "alpha": 0.5} for n in ("used", "idle")
    }
    found = recipe.from_dict(
        {"models": {"m": "m.ckpt", "n": "n.ckpt"}, "steps": steps, "output": {"from": "used"}}
    )
    assert found.order() == ("used",)


def test_a_part_named_by_its_file_becomes_a_model():
    step = {"method": "weighted_sum", "a": "m", "b": "n"}
    found = recipe.from_dict(
        {
            "models": {"m": "m.ckpt", "n": "n.ckpt"},
            "steps": {"vae": step},
            "output": {"vae": "folder/vae.safetensors"},
        }
    )
    assert found.models[found.output.vae].file == "folder/vae.safetensors"
    assert found.output.vae not in ("vae", "m", "n")


def test_settings_from_the_command_line():
    found = recipe.from_toml(TOML)
    got = with_setting(found, "steps.more.alpha", "0.25")
    assert got.steps["more"].params["alpha"] == 0.25
    assert got.steps["mix"] == found.steps["mix"]
    got = with_setting(found, "steps.mix.alpha.base", "0.9")
    assert got.steps["mix"].params["alpha"]["base"] == 0.9
    assert with_setting(found, "output.dtype", "bf16").output.dtype == "bf16"
    assert with_setting(found, "steps.more.alpha", ".5").steps["more"].params["alpha"] == 0.5
    table = '{ base = 0.25, "IN00-IN05" = 0.5 }'
    got = with_setting(found, "steps.mix.alpha", table)
    assert got.steps["mix"].params["alpha"] == {"base": 0.25, "IN00-IN05": 0.5}
    got = with_setting(got, "steps.mix.alpha.blocks.M00", "1")
    assert got.steps["mix"].params["alpha"] == {
        "base": 0.25,
        "blocks": {"IN00-IN05": 0.5, "M00": 1},
    }
    with pytest.raises(Refusal, match=r"--set steps.mix.alpha: .* is not a TOML table or list"):
        with_setting(found, "steps.mix.alpha", "{ base = }")
    for path, text in (("steps.mox.alpha", "1"), ("output.dtyp", "fp16"), ("steps.mix.alhpa", "1")):
        with pytest.raises(Refusal):
            with_setting(found, path, text)


def test_from_metadata():
    found = recipe.from_toml(TOML)
    assert recipe.from_metadata({recipe.METADATA_KEY: recipe.to_json(found)}, "x") == (
        recipe.from_json(recipe.to_json(found))
    )
    with pytest.raises(Refusal, match="x carries no"):
        recipe.from_metadata({}, "x")


@pytest.mark.parametrize(
    "alpha",
    [
        0.5,
        "GRAD_V",
        [0.1] * 25,
        {"curve": "cosine"},
        {"base": 0.2, "blocks": {"IN00": 0.1}},
        {"blocks": {"curve": "cosine"}},
        {"blocks": {"IN00-IN06": 0.1}},
        {"M00-IN05": 0.1, "OUT11": 0.3},
        {"blocks": {"M00 IN05": 0.1}},
        {"base": 0.2, "default": 0.1, "blocks": {"M00": 0.5}},
        {"base": 0.2, "blocks": "GRAD_V"},
        {"base": 0.2, "IN05": 0.5},
    ],
)
def test_one_block_can_be_set_however_the_weight_is_written(alpha):
    models = {"a": "a.safetensors", "b": "b.safetensors"}
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": alpha}
    before = recipe.from_dict({"models": models, "steps": {"s": step}})
    after = with_setting(before, "steps.s.alpha.blocks.IN05", "0.9")
    after = with_setting(after, "steps.s.alpha.blocks.IN05", "0.3")
    found = after.steps["s"]
    if found.rules:
        assert found.rules == ("IN05::0.3",)
    else:
        assert found.params["alpha"]["blocks"]["IN05"] == 0.3
    assert recipe.from_json(recipe.to_json(after)) == after
    short = with_setting(before, "steps.s.alpha.IN05", "0.3")
    assert short.steps["s"].rules == found.rules
    assert weights.from_toml(short.steps["s"].params["alpha"]) == weights.from_toml(
        found.params["alpha"]
    )
    for name in ("base", "BASE"):
        told = with_setting(before, f"steps.s.alpha.{name}", "0.7").steps["s"]
        assert told.params["alpha"]["base"] == 0.7
    for wrong in ("bas", "blcks"):
        with pytest.raises(Refusal, match=f"'{wrong}': did you mean"):
            weights.from_toml(
                with_setting(before, f"steps.s.alpha.{wrong}", "1").steps["s"].params["alpha"]
            )


def test_a_set_block_is_known_in_any_case():
    models = {"a": "a.safetensors", "b": "b.safetensors"}
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": {"blocks": {"in05": 0.5}}}
    given = recipe.from_dict({"models": models, "steps": {"s": step}})
    after = with_setting(given, "steps.s.alpha.blocks.IN05", "0.1")
    assert after.steps["s"].params["alpha"] == {"blocks": {"in05": 0.1}}


def test_a_set_block_gives_way_to_the_rules_of_its_step():
    models = {"a": "a.safetensors", "b": "b.safetensors"}
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"}
    step["rules"] = ["IN05:attn2:0.9"]
    given = recipe.from_dict({"models": models, "steps": {"s": step}})
    after = with_setting(given, "steps.s.alpha.blocks.IN05", "0.1")
    assert after.steps["s"].rules == ("IN05::0.1", "IN05:attn2:0.9")
    after = with_setting(after, "steps.s.alpha.blocks.IN05", "0.2")
    assert after.steps["s"].rules == ("IN05::0.2", "IN05:attn2:0.9")


def test_a_setting_leaves_the_recipe_it_started_from():
    models = {"a": "a.safetensors", "b": "b.safetensors"}
    alpha = {"base": 0.5, "blocks": {"IN05": 0.5}}
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": alpha}
    before = recipe.from_dict({"models": models, "steps": {"s": step}})
    text = recipe.to_json(before)
    after = with_setting(before, "steps.s.alpha.blocks.IN05", "0.9")
    assert recipe.to_json(before) == text != recipe.to_json(after)


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ('"alpha":0.3', "alpha"),
        ('"m":{"file":"x.ckpt"}', "m"),
        ('"from":"s"', "from"),
        ('"IN00":0.25', "IN00"),
    ],
)
def test_json_that_says_a_key_twice_is_refused(tmp_path, pattern, key):
    """As TOML is, wherever it is read; the second would win in silence."""
    text = (
        '{"models":{"m":{"file":"x.ckpt"},"n":"y.ckpt"},"output":{"from":"s"},'
        '"steps":{"s":{"method":"weighted_sum","a":"m","b":"n","alpha":0.3},'
        '"t":{"method":"weighted_sum","a":"m","b":"n","alpha":{"blocks":{"IN00":0.25}}}}}'
    )
    recipe.from_json(text)
    twice = text.replace(pattern, f"{pattern},{pattern}", 1)
    (tmp_path / "r.json").write_text(twice)
    for read in (
        lambda: recipe.from_json(twice),
        lambda: recipe.load(tmp_path / "r.json"),
        lambda: recipe.from_metadata({recipe.METADATA_KEY: twice}, "x"),
        lambda: with_setting(recipe.from_json(text), "steps.s.alpha", f"{{{pattern},{pattern}}}"),
    ):
        with pytest.raises(Refusal, match=f"key '{key}' occurs twice"):
            read()
