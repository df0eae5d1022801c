"""Weight settings, presets and element rules.

The presets' closed forms and the run lengths below were written from the tables' description, apart
from the code; digests pin the digits as published.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plymix import api, recipe, weights
from plymix.errors import FormatError, Refusal
from plymix.setting import with_setting
from plymix.weights import (
    SD1_BLOCKS,
    SDXL_BLOCKS,
    Blocks,
    Curve,
    Named,
    Rule,
    apply_rules,
    from_toml,
    hits,
    load_preset_file,
    overridden,
    parse,
    parse_rules,
    presets,
    resolve,
    spans,
    to_json,
)

FLUX_BLOCKS = ("IN", *(f"D{i:02}" for i in range(19)), *(f"S{i:02}" for i in range(38)), "OUT")
prop = settings(deadline=None, max_examples=60)


# ----------------------------------------------------------------------------------- the tables


def smooth(x):
    return 3 * x**2 - 2 * x**3


def fold(y):
    y = np.mod(y, 2.0)
    return np.where(y > 1, 2 - y, y)


def fake(x):
    return (38 * x**3 - 57 * x**2 + 25 * x) / 6


def true(x):
    return np.where(x == 0, 0, fake(x) + (2 * x**3 - 3 * x**2 + 1) / 24)


CLOSED = {
    "GRAD_V": lambda x: np.abs(1 - 2 * x),
    "GRAD_A": lambda x: 1 - np.abs(1 - 2 * x),
    "FLAT_25": lambda x: 0.25 + 0 * x,
    "FLAT_75": lambda x: 0.75 + 0 * x,
    "SMOOTHSTEP": smooth,
    "REVERSE-SMOOTHSTEP": lambda x: 1 - smooth(x),
    **{f"SMOOTHSTEP*{q}": lambda x, q=q: fold(q * smooth(x)) for q in (2, 3, 4)},
    **{f"R_SMOOTHSTEP*{q}": lambda x, q=q: 1 - fold(q * smooth(x)) for q in (2, 3, 4)},
    **{f"SMOOTHSTEP/{q}": lambda x, q=q: smooth(fold(q * x)) for q in (2, 3, 4)},
    **{f"R_SMOOTHSTEP/{q}": lambda x, q=q: 1 - smooth(fold(q * x)) for q in (2, 3, 4)},
    "COSINE": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "REVERSE_COSINE": lambda x: (1 - np.cos(np.pi * x)) / 2,
    "TRUE_CUBIC_HERMITE": true,
    "TRUE_REVERSE_CUBIC_HERMITE": lambda x: 1 - true(x),
    "FAKE_CUBIC_HERMITE": fake,
    "FAKE_REVERSE_CUBIC_HERMITE": lambda x: 1 - fake(x),
    "ALL_A": lambda x: 0 * x,
    "ALL_B": lambda x: 1 + 0 * x,
}

STEPS = {  # (value, how many blocks), from IN00 to OUT11
    "WRAP08": [(1, 4), (0, 17), (1, 4)],
    "WRAP12": [(1, 6), (0, 13), (1, 6)],
    "WRAP14": [(1, 7), (0, 11), (1, 7)],
    "WRAP16": [(1, 8), (0, 9), (1, 8)],
    "MID12_50": [(0, 5), (0.5, 14), (0, 6)],
    "OUT07": [(0, 18), (1, 7)],
    "OUT12": [(0, 13), (1, 12)],
    "OUT12_5": [(0, 12), (0.5, 1), (1, 12)],
    "RING08_SOFT": [(0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5)],
    "RING08_5": [(0, 6), (1, 4), (0, 5), (1, 4), (0, 6)],
    "RING10_5": [(0, 5), (1, 5), (0, 5), (1, 5), (0, 5)],
    "RING10_3": [(0, 6), (1, 5), (0, 3), (1, 5), (0, 6)],
}

REVERSED = [
    ("GRAD_V", "GRAD_A"),
    ("SMOOTHSTEP", "REVERSE-SMOOTHSTEP"),
    *((f"SMOOTHSTEP{op}{q}", f"R_SMOOTHSTEP{op}{q}") for op in "*/" for q in (2, 3, 4)),
    ("COSINE", "REVERSE_COSINE"),
    ("TRUE_CUBIC_HERMITE", "TRUE_REVERSE_CUBIC_HERMITE"),
    ("FAKE_CUBIC_HERMITE", "FAKE_REVERSE_CUBIC_HERMITE"),
    ("ALL_A", "ALL_B"),
]

ALIASES = {
    **{f"{q}SMOOTHSTEP": f"SMOOTHSTEP*{q}" for q in (2, 3, 4)},
    **{f"{q}R_SMOOTHSTEP": f"R_SMOOTHSTEP*{q}" for q in (2, 3, 4)},
    **{
        f"{word}{r}SMOOTHSTEP": f"{r.lstrip('_')}SMOOTHSTEP/{q}"
        for word, q in (("HALF", 2), ("ONE_THIRD", 3), ("ONE_FOURTH", 4))
        for r in ("_", "_R_")
    },
    "REVERSE_SMOOTHSTEP": "REVERSE-SMOOTHSTEP",
    "CUBIC_HERMITE": "FAKE_CUBIC_HERMITE",
    "REVERSE_CUBIC_HERMITE": "FAKE_REVERSE_CUBIC_HERMITE",
}


def grid(n):
    return np.arange(n) / (n - 1)


def by_source(word):
    return {n: p for n, p in presets().items() if word in p.source}


@pytest.mark.parametrize(
    ("source", "count", "digest"),
    [
        ("merge-block-weighted-gui", 38, "c69edee676a79c13"),
        ("meh", 1, "645f74566dba3a6d"),
        ("SD.Next", 20, "680a07d817e4ae60"),
        ("model-mixer", 20, "43b56905853e7e65"),
    ],
)
def test_the_tables_hold_the_published_digits(source, count, digest):
    rows = [f"{n}:" + ",".join(map(repr, p.values)) for n, p in by_source(source).items()]
    assert len(rows) == count
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest().startswith(digest)


def test_spot_values_are_exact():
    assert presets()["GRAD_V"].values[:3] == (1.0, 0.9166666667, 0.8333333333)
    assert presets()["REVERSE-SMOOTHSTEP"].values[21] == 0.0429687499999996
    assert presets()["SMOOTHSTEP*2.XL"].values[2] == 0.0178326475
    assert presets()["LOW_OFFSET_CUBIC_HERMITE"].values[2] == 0.0995159384645


def test_every_mbw_preset_is_covered_by_one_description():
    assert set(CLOSED) | set(STEPS) == set(by_source("merge-block-weighted-gui"))
    assert not set(CLOSED) & set(STEPS)
    assert {n for n, p in presets().items() if p.form} == set(CLOSED)


@pytest.mark.parametrize("name", CLOSED)
def test_the_table_follows_its_closed_form(name):
    np.testing.assert_allclose(presets()[name].values, CLOSED[name](grid(25)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", STEPS)
def test_the_table_follows_its_steps(name):
    assert presets()[name].values == tuple(float(v) for v, n in STEPS[name] for _ in range(n))


@pytest.mark.parametrize(("one", "other"), REVERSED)
def test_a_reverse_is_one_minus_its_partner(one, other):
    total = np.add(presets()[one].values, presets()[other].values)
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-9)
    assert presets()[one].reverse == other or presets()[other].reverse == one


@pytest.mark.parametrize("preset", presets().values(), ids=lambda p: p.name)
def test_lengths_and_names_of_a_preset(preset):
    sdxl = preset.name.startswith("SDXL_") or preset.name.endswith(".XL")
    assert preset.blocks == (SDXL_BLOCKS if sdxl else SD1_BLOCKS)
    assert len(preset.names) == len(preset.values)
    assert preset.has_base == (sdxl or preset.name.startswith("LOW_OFFSET"))
    assert preset.source
    assert all(0 <= v <= 1 for v in preset.values)
    assert preset.name == preset.name.upper()


def test_a_remark_stands_where_an_sdxl_table_departs_from_its_name():
    for name, preset in (by_source("SD.Next") | by_source("model-mixer")).items():
        stem = name.removeprefix("SDXL_").removesuffix(".XL")
        form = CLOSED.get(ALIASES.get(stem, stem))
        if form is not None:
            follows = np.allclose(preset.values[1:], form(grid(19)), rtol=0, atol=1e-6)
            assert follows == (preset.remark == ""), name
    assert "IN06 to OUT02" in presets()["RING08_5.XL"].remark


def test_aliases():
    assert {a: p.name for p in presets().values() for a in p.aliases} == ALIASES
    for alias, name in ALIASES.items():
        assert parse(alias.lower()) == name


def test_block_names():
    assert SD1_BLOCKS[0] == "IN00"
    assert SD1_BLOCKS[12] == "M00"
    assert SD1_BLOCKS[24] == "OUT11"
    assert len(SDXL_BLOCKS) == 19
    assert (SDXL_BLOCKS[8:11]) == ("IN08", "M00", "OUT00")
    assert SDXL_BLOCKS[-1] == "OUT08"


def test_importing_parses_no_table():
    code = (
        "import sys, plymix.weights as w;"
        "assert not {'tomllib', 'tomli', 'numpy', 'torch'} & set(sys.modules);"
        "w.parse('0.5'); assert w.presets.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- resolving


def test_a_number_is_for_the_blocks_and_base():
    found = resolve(0.3, SD1_BLOCKS)
    assert found.base == 0.3
    assert found.blocks == dict.fromkeys(SD1_BLOCKS, 0.3)
    assert resolve(1, ("IN00",), base=0.2).base == 0.2


def test_a_preset_leaves_base_open():
    found = resolve("grad_v", SD1_BLOCKS)
    assert found.base is None
    assert tuple(found.blocks) == SD1_BLOCKS
    assert tuple(found.blocks.values()) == presets()["GRAD_V"].values
    assert found.notes == ()
    assert resolve("GRAD_V", SD1_BLOCKS, base=0.4).base == 0.4


def test_a_preset_with_base():
    low = presets()["LOW_OFFSET_CUBIC_HERMITE"]
    found = resolve(low.name, SD1_BLOCKS)
    assert (found.base, *found.blocks.values()) == low.values
    assert found.blocks["OUT11"] == 0.5
    given_apart = resolve(low.name, SD1_BLOCKS, base=0.2)
    assert given_apart.base == 0.2
    assert "BASE is 0.2" in given_apart.notes[0]
    assert resolve("SDXL_COSINE", SDXL_BLOCKS).base == 0
    assert resolve("SDXL_ALL_B", SDXL_BLOCKS).base == 1


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("blocks", [SDXL_BLOCKS, FLUX_BLOCKS], ids=["SDXL", "Flux"])
def test_a_curve_preset_fits_any_number_of_blocks(name, blocks):
    found = resolve(name, blocks, arch_title="Other")
    expected = CLOSED[name](grid(len(blocks)))
    np.testing.assert_allclose(list(found.blocks.values()), expected, rtol=0, atol=1e-12)
    ends = list(found.blocks.values())
    assert (ends[0], ends[-1]) == (presets()[name].values[0], presets()[name].values[-1])
    assert found.base is None
    assert name in found.notes[0]
    assert "Other" in found.notes[0]


def test_one_block_and_no_block():
    assert resolve("COSINE", ("ALL",)).blocks == {"ALL": 1.0}
    assert resolve("COSINE", ()).blocks == {}
    assert resolve((), ()).blocks == {}
    assert resolve((0.5,), ()).base == 0.5


def test_a_published_mistake_is_told():
    assert "COSINE" in resolve("COSINE.XL", SDXL_BLOCKS).notes[0]
    assert resolve("SDXL_COSINE", SDXL_BLOCKS).notes == ()


@pytest.mark.parametrize(
    ("name", "blocks", "said"),
    [
        ("WRAP08", SDXL_BLOCKS, "use SDXL_WRAP08, or write"),
        ("OUT12", SDXL_BLOCKS, 'blocks = "OUT12", convert = "sd1"'),
        ("SDXL_COSINE", SD1_BLOCKS, "use COSINE"),
        ("SDXL_HALF_SMOOTHSTEP", SD1_BLOCKS, "use SMOOTHSTEP/2"),
        ("SMOOTHSTEP*2.XL", SD1_BLOCKS, "use SMOOTHSTEP*2"),
        ("SDXL_WRAP08", SD1_BLOCKS, "use WRAP08"),
        ("OUT09.XL", FLUX_BLOCKS, "give numbers"),
    ],
)
def test_a_table_for_other_blocks_is_refused_with_a_way_out(name, blocks, said):
    with pytest.raises(Refusal) as e:
        resolve(name, blocks, arch_title="This", field="--alpha")
    assert str(e.value).startswith(f"--alpha: {name} is a list for")
    assert f"This has {len(blocks)} blocks: {spans(blocks)}" in str(e.value)
    assert str(e.value).endswith(said) or said in str(e.value)


def test_a_list_with_and_without_base():
    numbers = tuple(i / 100 for i in range(26))
    found = resolve(numbers, SD1_BLOCKS)
    assert found.base == 0.0
    assert tuple(found.blocks.items()) == tuple(zip(SD1_BLOCKS, numbers[1:], strict=True))
    assert resolve(numbers[1:], SD1_BLOCKS).base is None
    assert resolve(numbers[1:], SD1_BLOCKS).blocks == found.blocks


def test_a_wrong_length_names_the_blocks():
    with pytest.raises(Refusal) as e:
        resolve((0.0,) * 24, SD1_BLOCKS, field="--weights")
    assert str(e.value) == (
        "--weights: 24 numbers given; SD1 wants 25: IN00-IN11, M00, OUT00-OUT11,"
        " or 26 with BASE first"
    )
    with pytest.raises(Refusal, match=r'SDXL wants 19: .* convert = "sd1"'):
        resolve((0.0,) * 26, SDXL_BLOCKS, arch_title="SDXL")


@prop
@given(st.integers(0, 80), st.sampled_from([SD1_BLOCKS, SDXL_BLOCKS, FLUX_BLOCKS]))
def test_wrong_lengths_are_always_refused(n, blocks):
    numbers = (0.5,) * n
    if n in (len(blocks), len(blocks) + 1):
        assert tuple(resolve(numbers, blocks).blocks) == blocks
    else:
        with pytest.raises(Refusal, match=f"{n} numbers? given"):
            resolve(numbers, blocks)


def test_base_is_said_once():
    numbers = [0.1] * 26
    for weight, apart in [
        (numbers, 0.2),
        ({"blocks": numbers, "base": 0.2}, None),
        ({"blocks": "GRAD_V", "base": 0.3}, 0.2),
    ]:
        with pytest.raises(Refusal, match="BASE is set to"):
            resolve(from_toml(weight), SD1_BLOCKS, base=apart)
    assert resolve(from_toml({"blocks": numbers, "base": 0.1}), SD1_BLOCKS, base=0.1).base == 0.1


def test_blocks_by_name():
    weight = from_toml({"blocks": {"IN00-IN05": 0.2, "m00": 0.5, "OUT01 OUT03-OUT02": 0.7}})
    found = resolve(weight, SD1_BLOCKS).blocks
    expected = dict.fromkeys(SD1_BLOCKS, 0.0)
    expected |= dict.fromkeys(SD1_BLOCKS[:6], 0.2)
    expected |= {"M00": 0.5, "OUT01": 0.7, "OUT02": 0.7, "OUT03": 0.7}
    assert found == expected
    weight = from_toml({"base": 0.9, "default": 0.4, "blocks": {"IN11-OUT00": 1}})
    assert [b for b, v in resolve(weight, SD1_BLOCKS).blocks.items() if v == 1] == [
        "IN11",
        "M00",
        "OUT00",
    ]
    assert resolve(weight, SD1_BLOCKS).blocks["IN00"] == 0.4
    assert resolve(weight, SD1_BLOCKS).base == 0.9
    assert resolve(from_toml({"base": 0.5}), SD1_BLOCKS).blocks == dict.fromkeys(SD1_BLOCKS, 0.0)


def test_bad_block_names():
    with pytest.raises(Refusal, match="IN02 is set by 'IN00-IN03' and by 'IN02'"):
        resolve(from_toml({"blocks": {"IN02": 1, "IN00-IN03": 1}}), SD1_BLOCKS)
    with pytest.raises(Refusal, match=r"'IN4'.*did you mean.*IN04.*IN00-IN11, M00, OUT00-OUT11"):
        resolve(from_toml({"blocks": {"IN4": 1}}), SD1_BLOCKS)
    with pytest.raises(Refusal, match=r"'OUT11'.*IN00-IN08, M00, OUT00-OUT08"):
        resolve(from_toml({"blocks": {"OUT00-OUT11": 1}}), SDXL_BLOCKS)
    with pytest.raises(Refusal, match="write base"):
        from_toml({"blocks": {"BASE": 1}})


def test_an_sd1_list_on_sdxl():
    numbers = [i / 100 for i in range(26)]
    found = resolve(from_toml({"blocks": numbers, "convert": "sd1"}), SDXL_BLOCKS, arch_title="X")
    kept = [*range(9), 12, *range(13, 22)]  # positions in the 25-value list
    assert list(found.blocks.values()) == [numbers[1 + i] for i in kept]
    assert found.base == numbers[0]
    assert found.notes == (
        "alpha: SD1 values converted to X: IN00-IN08, M00, OUT00-OUT08 kept by name,"
        " IN09-IN11, OUT09-OUT11 dropped",
    )
    preset = resolve(from_toml({"blocks": "WRAP08", "convert": "sd1"}), SDXL_BLOCKS)
    assert [b for b, v in preset.blocks.items() if v] == ["IN00", "IN01", "IN02", "IN03", "OUT08"]
    same = resolve(from_toml({"blocks": numbers, "convert": "sd1"}), SD1_BLOCKS)
    assert same == resolve(tuple(numbers), SD1_BLOCKS)


def test_conversions_that_cannot_be():
    with pytest.raises(Refusal, match="an SD1 list wants 25"):
        resolve(from_toml({"blocks": [0.1] * 20, "convert": "sd1"}), SDXL_BLOCKS)
    with pytest.raises(Refusal, match="not an SD1 preset"):
        resolve(from_toml({"blocks": "SDXL_COSINE", "convert": "sd1"}), SDXL_BLOCKS)
    with pytest.raises(Refusal, match="D00-D18, S00-S37"):
        resolve(from_toml({"blocks": "COSINE", "convert": "sd1"}), FLUX_BLOCKS)
    with pytest.raises(Refusal, match="did you mean sd1"):
        from_toml({"blocks": "COSINE", "convert": "sd"})
    with pytest.raises(Refusal, match="convert is for a list or a preset"):
        from_toml({"blocks": {"M00": 1}, "convert": "sd1"})


# ---------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("curve", "form"),
    [
        ("linear", lambda x: x),
        ("smoothstep", smooth),
        ("cosine", lambda x: (1 - np.cos(np.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("blocks", [SD1_BLOCKS, SDXL_BLOCKS, FLUX_BLOCKS, ("A", "B")])
def test_curves(curve, form, blocks):
    found = resolve(from_toml({"curve": curve, "from": 0.1, "to": 0.7}), blocks)
    values = list(found.blocks.values())
    np.testing.assert_allclose(values, 0.1 + 0.6 * form(grid(len(blocks))), rtol=0, atol=1e-14)
    assert (values[0], values[-1]) == (0.1, 0.7)
    assert (found.base, found.notes) == (None, ())


finite = st.floats(-2, 2, allow_nan=False).map(lambda v: round(v, 6))
knots = st.lists(
    st.tuples(st.integers(0, 100).map(lambda i: i / 100), finite),
    min_size=2,
    max_size=6,
    unique_by=lambda p: p[0],
).map(sorted)


@prop
@given(knots, st.integers(2, 60))
def test_cubic_is_the_monotone_cubic_of_scipy(points, n):
    from scipy.interpolate import PchipInterpolator

    xs, ys = zip(*points, strict=True)
    weight = from_toml({"curve": "cubic", "points": [list(p) for p in points]})
    values = list(resolve(weight, tuple(f"B{i}" for i in range(n))).blocks.values())
    reference = PchipInterpolator(xs, ys)(np.clip(grid(n), xs[0], xs[-1]))
    np.testing.assert_allclose(values, reference, rtol=0, atol=1e-9)
    assert min(ys) <= min(values)
    assert max(values) <= max(ys)


@prop
@given(st.sampled_from(["linear", "smoothstep", "cosine"]), finite, finite)
def test_a_curve_is_exact_at_its_ends_and_stays_between_them(curve, a, b):
    weight = from_toml({"curve": curve, "from": a, "to": b})
    values = list(resolve(weight, SD1_BLOCKS).blocks.values())
    assert (values[0], values[-1]) == (a, b)
    assert values == sorted(values, reverse=a > b)
    assert min(a, b) <= min(values)
    assert max(values) <= max(a, b)


def test_cubic_goes_through_its_points():
    points = [[0, 0.2], [0.25, 0.9], [0.5, 0.9], [1, 0.1]]
    values = resolve(from_toml({"curve": "cubic", "points": points}), SD1_BLOCKS).blocks
    assert [values[b] for b in ("IN00", "IN06", "M00", "OUT11")] == [0.2, 0.9, 0.9, 0.1]
    assert values["IN09"] == 0.9  # no overshoot between equal points


def test_a_curve_with_base():
    flat = from_toml({"curve": "linear", "to": 0.5, "base": 0.25})
    nested = from_toml({"base": 0.25, "blocks": {"curve": "linear", "to": 0.5}})
    assert flat == nested == Blocks(Curve("linear", 0.0, 0.5), base=0.25)
    assert resolve(flat, SD1_BLOCKS).base == 0.25


# ------------------------------------------------------------------------- text, TOML, JSON, errors


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("0.5", 0.5),
        (" -1e-1\n", -0.1),
        (".5", 0.5),
        ("1.", 1.0),
        ("cosine", "COSINE"),
        ("0.1,0.2", (0.1, 0.2)),
        (" 0.1 ,0.2\n, 3  4", (0.1, 0.2, 3.0, 4.0)),
        ("{base = 0.5, blocks = 'GRAD_V'}", Blocks("GRAD_V", base=0.5)),
        ("{curve = 'cosine', to = 0.5}", Curve("cosine", 0.0, 0.5)),
        (
            "{blocks = {M00 = 1, IN00-IN02 = 0.5}}",
            Blocks(Named((("IN00-IN02", 0.5), ("M00", 1.0)))),
        ),
    ],
)
def test_parse(text, weight):
    assert parse(text) == weight


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0," * 6 + "abc" + ",0" * 18, "--weights: value 7 (IN06) is 'abc', not a number"),
        ("0," * 6 + "abc" + ",0" * 19, "--weights: value 7 (IN05) is 'abc', not a number"),
        ("nan," + "0," * 24 + "0", "--weights: value 1 (BASE) is nan, not a finite number"),
        ("0,1,-inf", "--weights: value 3 is -inf, not a finite number"),
        ("0,,1", "--weights: value 2 is '', not a number"),
        ("0,0x1", "--weights: value 2 is '0x1', not a number"),
        ("0,1_0", "--weights: value 2 is '1_0', not a number"),
        ("0,true", "--weights: value 2 is 'true', not a number"),
        ("0,٣", "--weights: value 2 is '٣', not a number"),
        ("0,R", "--weights: value 2 is 'R', a random ratio, and recipes"),
        ("R", "unknown preset for --weights 'R'"),
        ("all_u", "--weights: 'all_u' is a random ratio, and recipes"),
        ("1e999", "--weights is inf, not a finite number"),
        ("  ", "--weights is empty"),
        ("GRAD_X", "unknown preset for --weights 'GRAD_X': did you mean GRAD_"),
        ("one_thrid_smoothstep", "did you mean ONE_THIRD_SMOOTHSTEP"),
        ("{", "--weights: { is not a TOML table"),
        ("{}\nx = 1", "is more than one TOML table"),
        ("{}", "--weights: an empty table sets nothing"),
    ],
)  # fmt: skip
def test_parse_refuses(text, said):
    with pytest.raises(Refusal) as e:
        parse(text, field="--weights", blocks=SD1_BLOCKS)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "w is True, not a number"),
        (None, "w is None, not a number"),
        ([0.1, False], "w: value 2 is False, not a number"),
        ([0.1, [0.2]], "w: value 2 is [0.2], not a number"),
        (10**400, "w is too large a number"),
        (math.nan, "w is nan"),
        ("0.5", "a number takes no quotes"),
        ("1.5x", "w is '1.5x', which is neither a number nor a preset"),
        ({"bloks": "GRAD_V"}, "unknown field of w 'bloks': did you mean blocks?"),
        ({"crve": "linear"}, "did you mean curve"),
        ({"curve": "linaer"}, "did you mean linear"),
        ({"curve": "linear", "points": [[0, 0], [1, 1]]}, "points is not its"),
        ({"curve": "linear", "default": 1}, "unknown field of w 'default'"),
        ({"curve": "linear", "to": "x"}, "w.to is 'x', not a number"),
        ({"curve": "cubic", "from": 0, "points": [[0, 0], [1, 1]]}, "from is not its"),
        ({"curve": "cubic"}, "two points or more"),
        ({"curve": "cubic", "points": [[0, 0], [1]]}, "point 2 is [1], not [x, y]"),
        ({"curve": "cubic", "points": [[0, 0], [1, "y"]]}, "y of point 2 is 'y', not a number"),
        ({"curve": "cubic", "points": [[0.5, 0], [0.5, 1]]}, "must rise"),
        ({"curve": "cubic", "points": [[0, 0], [1.5, 1]]}, "lie in 0..1"),
        ({"blocks": 0.5}, "write default instead of blocks"),
        ({"blocks": {"M00": "x"}}, "w.blocks: M00 is 'x', not a number"),
        ({"blocks": {5: 1}}, "5 is not the name of a block"),
        ({"blocks": {" ": 1}}, "' ' is not the name of a block"),
        ({"blocks": "GRAD_V", "default": 1}, "default is for blocks that are not named"),
        ({"blocks": {"curve": "linear", "base": 1}}, "write base beside blocks"),
        ({"base": "x"}, "w.base is 'x', not a number"),
        ({"curve": "linear", "base": True}, "w.base is True, not a number"),
    ],
)
def test_from_toml_refuses(value, said):
    with pytest.raises(Refusal) as e:
        from_toml(value, field="w")
    assert said in str(e.value)


def test_a_weight_built_by_hand_is_checked_too():
    with pytest.raises(Refusal, match=r"value 1 \(IN00\) is nan"):
        resolve((math.nan,) * 25, SD1_BLOCKS)
    with pytest.raises(Refusal, match="must rise"):
        resolve(Curve("cubic", points=((1.0, 0.0), (0.0, 1.0))), SD1_BLOCKS)
    with pytest.raises(Refusal, match="base is nan"):
        resolve(0.5, SD1_BLOCKS, base=math.nan)
    assert from_toml(np.float32(0.5)) == 0.5


numbers = st.floats(allow_nan=False, allow_infinity=False)
lists = st.lists(numbers, min_size=1, max_size=40)
names = st.sampled_from([*presets(), *ALIASES]).flatmap(
    lambda n: st.sampled_from([n, n.lower(), n.title()])
)
curves = st.fixed_dictionaries(
    {"curve": st.sampled_from(["linear", "smoothstep", "cosine"])},
    optional={"from": finite, "to": finite},
) | knots.map(lambda p: {"curve": "cubic", "points": [list(q) for q in p]})
block = st.sampled_from(SDXL_BLOCKS)
spots = st.tuples(block, block).map("-".join) | block
tables = st.fixed_dictionaries(
    {"blocks": st.dictionaries(spots, finite, max_size=4)},
    optional={"base": finite, "default": finite},
)
others = st.fixed_dictionaries(
    {"blocks": names | lists | curves}, optional={"base": finite}
) | st.fixed_dictionaries({"blocks": names | lists, "convert": st.just("sd1")})
settings_ = numbers | names | lists | curves | tables | others


def as_toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {as_toml(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@prop
@given(settings_)
def test_every_setting_survives_json_and_toml(value):
    weight = from_toml(value)
    assert hash(weight) is not None
    assert from_toml(weight) == weight
    assert from_toml(json.loads(json.dumps(to_json(weight)))) == weight
    if isinstance(value, dict):
        assert parse(as_toml(value)) == weight
        assert from_toml(dict(reversed(value.items()))) == weight


@prop
@given(numbers | names | lists, st.sampled_from([",", " ", "\n", " , ", ",\n"]))
def test_every_plain_setting_survives_text(value, comma):
    assume(not isinstance(value, list) or len(value) > 1)
    text = comma.join(map(repr, value)) if isinstance(value, list) else str(value)
    assert parse(text) == from_toml(value)


@prop
@given(settings_, st.sampled_from([SD1_BLOCKS, SDXL_BLOCKS, FLUX_BLOCKS]), st.none() | finite)
def test_resolve_gives_exactly_the_blocks_or_refuses(value, blocks, base):
    try:
        found = resolve(from_toml(value), blocks, base=base)
    except Refusal:
        return
    assert tuple(found.blocks) == blocks
    assert all(type(v) is float and math.isfinite(v) for v in found.blocks.values())
    assert base is None or found.base == base


def test_spans():
    assert spans(SD1_BLOCKS) == "IN00-IN11, M00, OUT00-OUT11"
    assert spans(FLUX_BLOCKS) == "IN, D00-D18, S00-S37, OUT"
    assert spans(("IN00", "IN01", "IN03", "TIME", "LABEL")) == "IN00-IN01, IN03, TIME, LABEL"
    assert spans(()) == ""


# -------------------------------------------------------------------------------------- own presets


def write(tmp_path, text):
    path = tmp_path / "preset.tsv"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_a_preset_file(tmp_path):
    numbers25 = ",".join(str(i / 100) for i in range(25))
    path = write(
        tmp_path,
        "\ufeffpreset_name\tpreset_weights\r\n"
        f"mine\t{numbers25}\r\n\r\nwith base \t 0.5, {numbers25}\n"
        f"ALL_R\t{','.join('R' * 26)}\nXL\t{','.join('1' * 20)}",
    )
    own = load_preset_file(path)
    listed = tuple(i / 100 for i in range(25))
    assert own == {"mine": listed, "with base": (0.5, *listed), "ALL_R": (), "XL": (1.0,) * 20}
    assert parse("MINE", own=own) == listed
    assert from_toml({"base": 0.1, "blocks": "xl"}, own=own) == Blocks((1.0,) * 20, base=0.1)
    with pytest.raises(Refusal, match="ALL_R has a random ratio, and recipes"):
        parse("ALL_R", own=own)
    with pytest.raises(Refusal, match=r"did you mean .*mine"):
        parse("minee", own=own)
    converted = resolve(
        from_toml({"blocks": "with base"} | {"convert": "sd1"}, own=own), SDXL_BLOCKS
    )
    assert converted.blocks["OUT08"] == 0.21


def test_own_presets_come_first():
    assert parse("grad_v", own={"GRAD_V": (0.5,) * 25}) == (0.5,) * 25


def test_own_presets_in_a_list_of_weights():
    values = [{"base": 0.5, "blocks": "mine"}, "MINE", 0.25]
    step = {"method": "linear", "models": ["a", "b", "a"], "weights": values}
    found = recipe.from_dict({"models": {n: n for n in "ab"}, "steps": {"m": step}})
    listed = (0.125,) * 25
    got = api.with_own_presets(found, {"Mine": listed}).steps["m"].params["weights"]
    assert got == [{"base": 0.5, "blocks": listed}, listed, 0.25]
    with pytest.raises(Refusal, match=r"preset for steps\.m\.weights: value 2 'MINE'"):
        api.with_own_presets(
            with_setting(found, "steps.m.weights", '[0.5, "MINE", 0.5]'), {"other": listed}
        )


def test_own_presets_that_differ_from_ours_of_that_name():
    ours = presets()["GRAD_V"].values
    own = {"grad_v": ours, "GRAD_A": (0.5,) * 25, "mine": (0.5,) * 25}
    assert overridden(own) == ["GRAD_A"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\t" + ",".join("1" * 24), "preset.tsv, line 1 (a): 24 numbers; a preset has 25"),
        ("\n\na\t" + ",".join("1" * 24) + ",x", "line 3 (a): value 25 (OUT11) is 'x'"),
        ("a\t" + ",".join("1" * 25) + ",nan", "line 1 (a): value 26 (OUT11) is nan"),
        ("no tab", "line 1: 'no tab' is not a name, a tab and numbers"),
        ("heading\tvalues\nagain\tvalues", "line 2 (again): 1 number;"),
        (f"a\t{'1,' * 24}1\nA\t{'1,' * 24}1", "line 2: A stands already in line 1"),
    ],
)
def test_a_bad_preset_file_names_the_line(tmp_path, text, said):
    with pytest.raises(FormatError) as e:
        load_preset_file(write(tmp_path, text))
    assert said in str(e.value)
    assert str(e.value).endswith("; mend this line or delete it")


def test_an_unreadable_preset_file(tmp_path):
    with pytest.raises(Refusal, match="cannot read the presets"):
        load_preset_file(tmp_path / "none.tsv")
    (tmp_path / "b.tsv").write_bytes(b"a\t\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8"):
        load_preset_file(tmp_path / "b.tsv")


# -------------------------------------------------------------------------------------------- rules


def test_rules_are_read():
    rules = parse_rules("IN05-OUT03:attn2:0.3, NOT OUT09-OUT11:ff:0\n\n::0.5\nM00 BASE:NOT a b:-1")
    assert rules == (
        Rule(("IN05-OUT03",), ("attn2",), 0.3),
        Rule(("OUT09-OUT11",), ("ff",), 0.0, not_blocks=True),
        Rule((), (), 0.5),
        Rule(("M00", "BASE"), ("a", "b"), -1.0, not_elements=True),
    )
    assert parse_rules(["IN05-OUT03:attn2:0.3", "NOT OUT09-OUT11:ff:0,::0.5"]) == rules[:3]
    assert str(rules[1]) == "NOT OUT09-OUT11:ff:0.0"
    assert parse_rules("not M00:Not a b:0.5") == parse_rules("NOT M00:NOT a b:0.5")
    assert parse_rules("") == ()


@pytest.mark.parametrize(
    ("block", "key", "expected"),
    [
        ("IN05", "x.attn2.to_k", 0.3),
        ("M00", "x.attn2.to_k", 0.3),
        ("OUT03", "x.attn2.to_k", 0.3),
        ("OUT04", "x.attn2.to_k", 0.9),
        ("IN05", "x.attn1.to_k", 0.9),
        ("OUT08", "x.ff.net", 0.0),
        ("OUT09", "x.ff.net", 0.9),
        ("BASE", "x.ff.net", 0.0),
        ("VAE", "decoder.conv_in", 0.7),
    ],
)
def test_the_last_matching_rule_wins(block, key, expected):
    rules = parse_rules("OUT03-IN05:attn2:0.2,in05-out03:attn2:0.3,NOT OUT09-OUT11:ff:0,VAE::0.7")
    assert apply_rules(rules, block, key, 0.9, SD1_BLOCKS) == expected


def idle_rules(rules, rows, blocks):
    return tuple(r for r, at in zip(rules, hits(rules, rows, blocks), strict=True) if not at)


def test_rules_that_match_nothing_are_found():
    rules = parse_rules("M00:attn2:0.1,IN03:attn2:0.2,VAE::0.3")
    keys = [("M00", "middle.attn2"), ("IN03", "input.3.op"), ("BASE", "text")]
    assert idle_rules(rules, iter(keys), SD1_BLOCKS) == rules[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("IN05:attn2", "blocks:elements:ratio"),
        ("IN05:attn2:0:1", "blocks:elements:ratio"),
        ("::0,IN05:attn2:x", "rules: rule 2 'IN05:attn2:x': the ratio is 'x', not a number"),
        ("IN05:attn2:", "the ratio is '', not a number"),
        ("IN05:attn2:nan", "the ratio is nan, not a finite number"),
        ("IN05:attn2:R", "a random ratio, and recipes make the same file every time"),
        ("NOT:attn2:1", "NOT wants names after it"),
        ("not:attn2:1", "NOT wants names after it"),
        ("IN05:attn2 Not ff:1", "NOT stands first"),
        ([0.5], "0.5 is not text"),
    ],
)
def test_bad_rules(text, said):
    with pytest.raises(Refusal) as e:
        parse_rules(text)
    assert said in str(e.value)


def test_a_rule_for_a_block_that_does_not_exist():
    with pytest.raises(Refusal, match=r"'IN4'.*did you mean.*IN04"):
        parse_rules("IN4:attn:1")[0].matches("IN00", "k", SD1_BLOCKS)


def reference(text, block, key, names):
    """One rule, matched by text alone: (matches, ratio)."""
    blocks, elements, ratio = text.split(":")
    flags = []
    for words, hit in ((blocks, in_span(block, names)), (elements, lambda w: w in key)):
        words = words.split()
        negate = [w.upper() for w in words[:1]] == ["NOT"]
        words = words[negate:]
        flags.append(not words or any(map(hit, words)) is not negate)
    return all(flags), float(ratio)


def in_span(block, names):
    def hit(word):
        ends = sorted(names.index(end) for end in re.findall(r"[A-Z0-9]+", word))
        return ends[0] <= names.index(block) <= ends[-1]

    return hit


ALL_NAMES = ["BASE", *SD1_BLOCKS, "VAE"]
name = st.sampled_from(ALL_NAMES)
element = st.sampled_from(["attn1", "attn2", "to_q", "ff", "norm", "bias"])


def words(part):
    some = st.lists(part, min_size=1, max_size=3).map(" ".join)
    return st.just("") | some | some.map("NOT {}".format) | some.map("not {}".format)


rule_texts = st.tuples(
    words(name | st.tuples(name, name).map("-".join)), words(element), finite.map(repr)
).map(":".join)


@prop
@given(
    st.lists(rule_texts, max_size=5),
    name,
    st.lists(element, max_size=3).map(".".join),
    finite,
)
def test_rules_agree_with_an_independent_matcher(texts, block, key, value):
    rules = parse_rules(texts)
    results = [reference(text, block, key, ALL_NAMES) for text in texts]
    assert [r.matches(block, key, SD1_BLOCKS) for r in rules] == [hit for hit, _ in results]
    expected = next((ratio for hit, ratio in reversed(results) if hit), value)
    assert apply_rules(rules, block, key, value, SD1_BLOCKS) == expected
    idle = tuple(r for r, (hit, _) in zip(rules, results, strict=True) if not hit)
    assert idle_rules(rules, [(block, key)], SD1_BLOCKS) == idle
    assert parse_rules([str(r) for r in rules]) == rules


def test_the_module_has_what_its_docstring_shows():
    for line in re.findall(r"^    (\S.*?)   +", weights.__doc__, re.M):
        text = line.replace("[0.1, 0.2, ...]", "0.1, 0.2").replace("[26 numbers]", str([0.1] * 26))
        assert parse(text.strip('"')) is not None


def test_ff_is_the_feed_forward_layer_and_not_the_middle_of_diffusion():
    (rule,) = weights.parse_rules(["IN05:ff:0.5"])
    inside = "model.diffusion_model.input_blocks.5.1.transformer_blocks.0."
    blocks = weights.SD1_BLOCKS
    assert rule.matches("IN05", inside + "ff.net.0.proj.weight", blocks)
    assert not rule.matches("IN05", inside + "attn2.to_q.weight", blocks)
    (whole,) = weights.parse_rules([":diffusion_model.input_blocks.5.:0.5"])
    assert whole.matches("IN05", inside + "attn2.to_q.weight", blocks)


def test_block_names_may_stand_beside_the_fields():
    bare = weights.from_toml({"IN00-IN05": 0.2, "M00": 0.5, "base": 0.1, "default": 0.3})
    table = {"blocks": {"IN00-IN05": 0.2, "M00": 0.5}, "base": 0.1, "default": 0.3}
    assert bare == weights.from_toml(table)
    for wrong, said in (
        ({"M00": 0.5, "bas": 0.1}, "did you mean base"),
        ({"M00": 0.5, "blocks": {"IN05": 1}}, "unknown field of w 'M00'"),
        ({"M00": "x"}, "M00 is 'x', not a number"),
    ):
        with pytest.raises(Refusal, match=said):
            weights.from_toml(wrong, field="w")
