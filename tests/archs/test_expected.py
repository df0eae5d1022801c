"""The tables of expected tensors are the golden headers', and one missing tensor is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from plymix import archs
from plymix.archs.expected import expand, missing, tables

MODELS = sorted(path.name.removesuffix(".json.gz") for path in tiny.GOLDEN.glob("*.json.gz"))


def arch_of(model):
    header = tiny.golden(model)
    return archs.detect({key: shape for key, (_, shape, _, _) in header.items()}).arch


def canonical(model):
    arch = arch_of(model)
    places = (arch.place(key) for key in tiny.golden(model))
    return {p.key: p.component for p in places if not p.buffer}


# Names that the tables do not ask for: a file may be without them.
FREE = {"logit_scale", "text_projection", "weight", "pos_embed"}


def starts(arch):
    home = "model.diffusion_model."
    return {c.name: (c.prefixes or (home,))[0] for c in arch.components}


@pytest.mark.parametrize("model", MODELS)
def test_tables_are_the_golden_headers(model):
    """Every row's names are there, and together they are all there is."""
    arch, keys = arch_of(model), canonical(model)
    assert list(missing(arch, keys)) == []
    for component, start in starts(arch).items():
        own = {key[len(start) :] for key, c in keys.items() if c == component}
        rows = tables().get(f"{arch.name} {component}")
        if not own:
            continue
        assert rows, f"no table for {component} of {arch.name}"
        named = set()
        for row in rows:
            found = expand(row.removeprefix("? "), lambda s, own=own: top(s, own))
            named |= set(found)
        rest = {name for name in own - named if name.rpartition(".")[2] not in FREE}
        assert not rest, sorted(rest)[:5]
        free = own - named
        assert all("logit" in n or "projection" in n or n == "pos_embed" for n in free), free


def top(start, keys):
    found = [k[len(start) :].split(".")[0] for k in keys if k.startswith(start)]
    return max([int(n) for n in found if n.isdigit()], default=-1)


@pytest.mark.parametrize("model", MODELS)
def test_any_one_missing_tensor_is_named(model):
    arch, keys = arch_of(model), canonical(model)
    asked = [k for k in keys if "logit_scale" not in k and "text_projection" not in k]
    for lost in asked[:: max(1, len(asked) // 40)]:
        found = list(missing(arch, [k for k in keys if k != lost]))
        alone = not found and lost.endswith(("pos_embed", "y_embedding"))
        assert found == [lost] or alone, lost


def test_braces():
    assert list(expand("a{b,c{1,2}}d")) == ["abd", "ac1d", "ac2d"]
    assert list(expand("x.{0..2}.y")) == ["x.0.y", "x.1.y", "x.2.y"]
    assert list(expand("{a,b}.{0..}", lambda start: {"a.": 1, "b.": -1}[start])) == ["a.0", "a.1"]
    assert list(expand("{0..-1}", lambda _: 2)) == ["0", "1"]
    assert list(expand("n{,_t}.w")) == ["n.w", "n_t.w"]


@given(st.recursive(
    st.text("abc.", max_size=3),
    lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda x: "{" + ",".join(x) + "}"),
    max_leaves=8,
))  # fmt: skip
def test_any_braces(pattern):
    """As many names as a count of the choices says, none with a brace."""

    def count(text):
        if not text.startswith("{"):
            return 1
        parts, depth, part = [], 0, ""
        for c in text[1:-1]:
            depth += (c == "{") - (c == "}")
            if c == "," and depth == 0:
                parts.append(part)
                part = ""
            else:
                part += c
        return sum(map(count, [*parts, part]))

    names = list(expand(pattern))
    assert len(names) == count(pattern)
    assert not any(c in name for name in names for c in "{},")
