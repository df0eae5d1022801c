"""What every registered merge method must do, whoever wrote it.

The tables at the top are the only things a new method may have to be entered in: where it does not
return A from equal models, and which end points and symmetries it promises.
"""

from __future__ import annotations

import keyword
import re

import numpy as np
import pytest

from plymix.registry import methods

METHODS = list(methods().values())
KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
SHAPES = [(), (5,), (4, 3), (4, 3, 3, 3), (1, 7)]


def names(text: str) -> set[str]:
    return set(text.split())


CHANGES_EQUAL_MODELS = {
    "subtract": "a difference of equal models is 0",
    "perpendicular": "works on differences; nothing of A is perpendicular to A",
    "orthonorm": "works on differences and returns their sum",
    "truncate_rank": "returns an approximation",
    "truncate_kronecker": "returns an approximation",
    "sum": "A + A",
    "lora": "its models after the first are differences, which it adds",
    "logistic_sum": "a legacy formula that does not interpolate",
    "randperm": "its purpose is to permute A",
    "balance_attention": "its purpose is to rescale A",
}
"""Methods for which merge(A, A, ...) is not A at the default parameters, and why."""

START = names(
    """
    weighted_sum add_difference task_arithmetic triple_sum sum_twice weighted_subtraction
    smoothstep_sum inv_smoothstep_sum self replace geometric_sum multiply_difference
    multiply_quotient train_difference add_opposite add_strict_opposite
    similarity_add_difference nearswap magmax plus_random slerp slerp_mergekit nuslerp
    norm_direction add_perpendicular ortho_delta euclidean_add_difference cosine_gate_blend
    channel_cosine_gate cosine_scaled tensor tensor2 copy_region tensor_sum top_k_tensor_sum
    sparse_topk_delta smooth_add gaussian_add crossover freq_band_blend feature_weighted polar
    pop_lora turbo
    """
)
"""Methods whose strength (alpha, else t, else scale; a beta likewise) at 0 gives their first model
bit for bit."""

END = names(
    """
    weighted_sum sum_twice triple_sum smoothstep_sum inv_smoothstep_sum replace geometric_sum
    multiply_difference slerp slerp_mergekit nuslerp norm_direction euclidean_add_difference
    cosine_a cosine_b cosine_local_a cosine_local_b tensor tensor2 copy_region tensor_sum
    sparse_topk_delta crossover polar
    """
)
"""Methods that give their second model bit for bit at alpha 1 (see `at_end` for beta)."""

SYMMETRIC = names(
    """
    n_average linear task_arithmetic multislerp karcher maximum minimum magmax sum ties
    ties_count ties_soup breadcrumbs breadcrumbs_ties model_stock sce ram ramplus_tl
    geometric_median median ties_stock ties_gmedian tsv_m iso_c iso_cts
    """
)
"""Methods that do not care in which order their models (after the base) come."""

by_method = pytest.mark.parametrize("m", METHODS, ids=[m.name for m in METHODS])


def test_tables_name_registered_methods():
    tabled = set(CHANGES_EQUAL_MODELS) | START | END | SYMMETRIC
    assert not tabled - {m.name for m in METHODS}


# -- what a method says about itself --------------------------------------------------------------


@by_method
def test_schema(m):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", m.name)
    assert not keyword.iskeyword(m.name)
    assert 3 <= len(m.label) <= 64
    assert m.label[0].isupper()
    assert not m.label.endswith(".")
    assert m.doc.splitlines()[1:2] == [""], "a blank line after the label"
    assert "Source:" in m.doc
    for p in m.params:
        assert re.search(rf"\b{p.name}\b", m.doc), f"{p.name} is not explained"
        assert p.name not in m.inputs
        if not p.required:
            assert p.check(p.default, m.name) == p.default
        if p.range.low is not None and p.range.high is not None:
            assert p.range.low < p.range.high
    assert m.optional <= len(m.inputs)
    assert m.inputs or m.variadic


# -- what it returns ------------------------------------------------------------------------------


@by_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("library", ["numpy float32", "numpy float64", "torch float32"])
def test_result_is_like_the_first_input_and_inputs_stay(m, shape, library):
    for xs in (*samples(m, shape), zeros(m, shape)):
        xs = [to(library, x) for x in xs]
        before = [None if x is None else np.asarray(x).copy() for x in xs]
        found = call(m, xs)
        first = next(x for x in xs if x is not None)
        assert tuple(found.shape) == shape
        assert found.dtype == first.dtype
        assert np.isfinite(np.asarray(found)).all()
        for x, b in zip(xs, before, strict=True):
            assert b is None or np.asarray(x).tobytes() == b.tobytes()


@by_method
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("library", ["numpy float32", "torch float32"])
def test_what_is_not_finite_stops_nothing(m, shape, bad, library):
    """The merge goes on, and tells which tensors of its result hold infinities or NaN."""
    for xs in samples(m, shape):
        for i in (i for i, x in enumerate(xs) if x is not None):
            broken = [copied(x) for x in xs]
            broken[i].reshape(-1)[-1:] = bad
            with np.errstate(all="ignore"):
                found = call(m, [to(library, x) for x in broken])
            assert tuple(found.shape) == shape


# NaN of which models need not reach the result: that give only an order, whose region or row is
# not taken, or whose single elements a median leaves out.
LEAVES_OUT = {
    "arcee_fusion": {0},
    "copy_region": {0, 1},
    "distribution_crossover": {2},
    "rebasin": {1},
    "replace": {0},
    "smooth_add": {1, 2},
    "sparse_topk_delta": {0},
    "tensor_sum": {0, 1},
    "tensor": {0, 1},
    "tensor2": {0, 1},
    "top_k_tensor_sum": {0, 1},
}


@by_method
def test_nan_is_not_lost(m):
    """An element that cannot be compared with others is not quietly the other model's."""
    for xs in samples(m, (12, 16)):
        for i in (i for i, x in enumerate(xs) if x is not None):
            if i in LEAVES_OUT.get(m.name, ()):
                continue
            for at in (0, 17, 100, -1):
                broken = [copied(x) for x in xs]
                broken[i].reshape(-1)[at] = np.nan
                with np.errstate(all="ignore"):
                    assert np.isnan(call(m, broken)).any(), (i, at)


@pytest.mark.parametrize(
    "name", sorted(names("rotate polar truncate_rank tsv_m iso_c iso_cts knots"))
)
@pytest.mark.parametrize("shape", [(4, 3), (3, 4)], ids=str)
def test_what_cannot_be_decomposed_is_nan(name, shape):
    m = methods()[name]
    for xs in samples(m, shape):
        broken = [copied(x) for x in xs]
        broken[0][1, 2] = np.nan
        assert np.isnan(call(m, broken)).any()


@by_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_libraries_and_precisions_agree(m, shape):
    for xs in samples(m, shape):
        precise = call(m, [to("numpy float64", x) for x in xs])
        for library in ("numpy float32", "torch float32"):
            found = call(m, [to(library, x) for x in xs])
            np.testing.assert_allclose(np.asarray(found), precise, rtol=2e-4, atol=2e-4)


@by_method
def test_same_input_same_bytes(m):
    for xs in samples(m, (4, 3, 3, 3)):
        assert call(m, xs).tobytes() == call(m, [copied(x) for x in xs]).tobytes()


@by_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_models_give_that_model(m, shape):
    if m.name in CHANGES_EQUAL_MODELS:
        pytest.skip(CHANGES_EQUAL_MODELS[m.name])
    a = random(shape, 0)
    for xs in samples(m, shape):
        found = call(m, [None if x is None else a for x in xs])
        np.testing.assert_allclose(found, a, rtol=2e-6, atol=2e-6)


# -- how it may be run ----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [m for m in METHODS if m.kind == "elementwise"], ids=lambda m: m.name)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (7, 500, 501), (64, 128, 640)], ids=str)
def test_chunks_do_not_matter(m, cuts):
    for xs in samples(m, (1001,)):
        whole = call(m, xs)
        chunks = zip(*(np.split(x, cuts) for x in xs), strict=True)
        parts = [call(m, list(chunk)) for chunk in chunks]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
        one_by_one = [call(m, [x[i] for x in xs]) for i in range(0, 1001, 100)]
        assert np.array(one_by_one, np.float32).tobytes() == whole[::100].tobytes()


class Sum:
    """A sum of models with coefficients, as a planner would follow it."""

    def __init__(self, terms):
        self.terms = terms

    def __add__(self, other):
        keys = self.terms | other.terms
        return Sum({k: self.terms.get(k, 0) + other.terms.get(k, 0) for k in keys})

    def __sub__(self, other):
        return self + other * -1

    def __mul__(self, number):
        assert type(number) in (int, float)
        return Sum({k: c * number for k, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, number):
        return self * (1 / number)

    def __neg__(self):
        return self * -1


@pytest.mark.parametrize("m", [m for m in METHODS if m.kind == "linear"], ids=lambda m: m.name)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_linear_methods_fold(m, alpha):
    settings = strengths(m, alpha)
    for xs in samples(m, (4, 3)):
        folded = call(m, [Sum({i: 1.0}) for i in range(len(xs))], **settings).terms
        xs = [x.astype(np.float64) for x in xs]
        expected = call(m, xs, **settings)
        np.testing.assert_allclose(sum(c * xs[i] for i, c in folded.items()), expected)
        if alpha == 0 and m.name in START:
            assert {i: c for i, c in folded.items() if c} == {0: 1}
        if alpha == 1 and m.name in END:
            at = call(m, [Sum({i: 1.0}) for i in range(len(xs))], **at_end(m)).terms
            assert {i: c for i, c in at.items() if c} == {1: 1}


# -- what it promises -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(START))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_start_is_the_first_model(name, shape):
    m = methods()[name]
    for xs in samples(m, shape):
        assert (call(m, xs, **strengths(m, 0.0)) == xs[0]).all()


@pytest.mark.parametrize("name", sorted(END))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_end_is_the_second_model(name, shape):
    m = methods()[name]
    for xs in samples(m, shape):
        assert (call(m, xs, **at_end(m)) == xs[1]).all()


@by_method
def test_documents_promise_what_is_tested(m):
    """A doc that says 'exactly A' or 'exactly B' names a promise of the tables above."""
    said = m.doc.replace("\n", " ")
    if re.search(r"\b(alpha|scale|t) 0 is exactly (A|the base)|share of B: 0 is exactly A", said):
        assert m.name in START
    if re.search(r"alpha 1 (is |with \S+ \S+ |gives )?exactly B|, 1 exactly B", said):
        assert m.name in END


@pytest.mark.parametrize("name", sorted(SYMMETRIC))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_of_models_does_not_matter(name, shape):
    m = methods()[name]
    fixed = len(m.inputs) if m.variadic else 0
    for xs in samples(m, shape):
        other = [*xs[:fixed], *reversed(xs[fixed:])]
        np.testing.assert_allclose(call(m, xs), call(m, other), rtol=1e-5, atol=1e-5)


# -- helpers --------------------------------------------------------------------------------------


class Keys(dict):
    """The `Tensors` a `prepare` function is given: here two keys of the same tensors."""

    def shape(self, key):
        return tuple(self[key][0].shape)


def call(m, xs, **params):
    given = {}
    if "key" in m.given:
        given["key"] = KEY
    if "rng" in m.given:
        given["rng"] = lambda model: np.random.Generator(np.random.Philox(key=[7, model]))
    if "state" in m.given:
        keys = Keys({KEY: tuple(xs), KEY.replace("to_q", "to_k"): tuple(xs)})
        given["state"] = m.prepare(keys, **params)
    return m.function(*xs, **given, **params)


def samples(m, shape):
    """Random inputs for `m`: related models, with optional ones given and left out."""
    count = len(m.inputs) + (3 if m.variadic else 0)
    xs = [random(shape, i) for i in range(count)]
    yield xs
    if m.optional and m.variadic:
        yield [None] * m.optional + xs[m.optional :]
    elif m.optional:
        yield xs[: -m.optional]


def zeros(m, shape):
    return [0 * x for x in next(samples(m, shape))]


def random(shape, i):
    r = np.random.default_rng(99)
    common = r.standard_normal(shape, dtype=np.float32)
    own = np.random.default_rng(i).standard_normal(shape, dtype=np.float32)
    return np.asarray(common + np.float32(0.5) * own, dtype=np.float32)


def copied(x):
    return None if x is None else x.copy()


def to(library, x):
    if x is None:
        return None
    if library.startswith("torch"):
        return pytest.importorskip("torch").asarray(x.copy())
    return x.astype(library.split()[1])


def strengths(m, value):
    """Every strength of `m` set to `value`; other settings as they are by default."""
    found = {}
    for p in m.params:
        first = p.name in ("alpha", "t") or (
            p.name == "scale" and m.name in ("task_arithmetic", "magmax")
        )
        if first or (p.name == "beta" and m.name in BETA_IS_STRENGTH):
            found[p.name] = value
    return found


BETA_IS_STRENGTH = {"multiply_difference", "triple_sum", "sum_twice"}


def at_end(m):
    settings = {"alpha": 1.0}
    if any(p.name == "beta" for p in m.params):
        settings["beta"] = {"sparse_topk_delta": 1.0, "multiply_difference": 1.0}.get(m.name, 0.0)
    return settings
