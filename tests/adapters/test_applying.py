"""LoRAs in recipes: where, how strong, in what order; and what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from loras import loha, lokr, lora
from plymix import engine, plan
from plymix.recipe import from_dict
from small import deviation, load, real, save
from tiny import header, write

UNET = "model.diffusion_model."
Q = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
DEEP = UNET + "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
CONV = UNET + "input_blocks.4.0.in_layers.2.weight"
IN = UNET + "input_blocks.0.0.weight"
KEYS = (Q, DEEP, TEXT, CONV)
HEADER = header("sd1", dtype="F32")


def name(key):
    """A module's name as kohya spells it, with ldm's names."""
    key = key.removesuffix(".weight")
    if key.startswith(UNET):
        return "lora_unet_" + key.removeprefix(UNET).replace(".", "_")
    return "lora_te_" + key.removeprefix("cond_stage_model.transformer.").replace(".", "_")


def lora_file(path, changes, metadata=None):
    """A LoRA of {key: Change}."""
    kinds = {"f": "F32", "i": "I64"}
    return save(
        path,
        {
            f"{name(key)}.{end}": (kinds[np.asarray(x).dtype.kind], x)
            for key, change in changes.items()
            for end, x in change.tensors.items()
        },
        metadata,
    )


def changes(seed, keys=KEYS, family=lora):
    return {key: family(HEADER[key][1], seed + i) for i, key in enumerate(keys)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i, model in enumerate("ab"):
        write(folder / f"{model}.safetensors", "sd1", i, dtype="F32")
    write(folder / "half.safetensors", "sd1", 0)
    lora_file(folder / "x.safetensors", changes(10))
    lora_file(folder / "y.safetensors", changes(20, KEYS[:2], loha))
    lora_file(folder / "z.safetensors", changes(30, KEYS, lokr))
    return folder


def recipe(folder, steps, models=("a", "b", "x", "y", "z"), **output):
    """A recipe of the folder's files; the last step is the result."""
    return from_dict(
        {
            "models": {m: str(folder / f"{m}.safetensors") for m in models},
            "steps": steps,
            "output": {"date": "2026-01-01", **output},
        }
    )


def tensors_of(found):
    """The result of a recipe, {key: array}."""
    with plan.build(found) as planned:
        return {key: planned_tensor(planned, key) for key in KEYS}


def planned_tensor(planned, key, **options):
    tensor = next(t for t in planned.tensors if t.name == key)
    target = engine.MemoryTarget(tensor.nbytes)
    engine.perform(engine.Job(planned.sources, target), [replace(tensor, offset=0)], **options)
    kind = {"F32": "<f4", "F16": "<f2"}[tensor.dtype]
    return np.frombuffer(target.data, kind).reshape(tensor.shape)


def step(loras, strength=1.0, model="a", **fields):
    return {"method": "lora", "model": model, "loras": loras, "strength": strength, **fields}


def values(path):
    return {key: real(x).astype(np.float64) for key, x in load(path)[0].items()}


# --- sums


def test_the_order_of_loras_changes_no_byte(folder, tmp_path):
    strengths = {"x": 0.7, "y": -0.3, "z": 0.45}
    results = set()
    for i, order in enumerate(itertools.permutations("xyz")):
        found = recipe(folder, {"s": step(list(order), [strengths[n] for n in order])})
        results.add(b"".join(x.tobytes() for x in tensors_of(found).values()))
        chained = {
            f"s{i}": step([n], strengths[n], model=f"s{i - 1}" if i else "a")
            for i, n in enumerate(order)
        }
        results.add(b"".join(x.tobytes() for x in tensors_of(recipe(folder, chained)).values()))
    assert len(results) == 1


def test_loras_of_one_name_are_told_by_what_is_in_them(folder, tmp_path):
    files = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        files.append(lora_file(tmp_path / str(i) / "last.safetensors", changes(40 + i)))
    found = []
    for order in (files, files[::-1]):
        models = {"a": str(folder / "a.safetensors"), "l": str(order[0]), "m": str(order[1])}
        strength = [0.3, 0.6] if order == files else [0.6, 0.3]
        made = {"models": models, "steps": {"s": step(["l", "m"], strength)}}
        found.append(tensors_of(from_dict(made | {"output": {}})))
    assert all(found[0][key].tobytes() == found[1][key].tobytes() for key in KEYS)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_no_byte(threads, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.work, "SPAN", 1 << 12)
    found = recipe(folder, {"s": step(["x", "y", "z"], [0.5, 0.25, -1])}, models="axyz")
    out = tmp_path / "o.safetensors"
    plymix.merge(found, out=out, threads=threads)
    alone = tmp_path / "one.safetensors"
    plymix.merge(found, out=alone, threads=1)
    assert out.read_bytes() == alone.read_bytes()


def test_a_bake_is_folded_with_other_sums(folder):
    steps = {
        "s": step(["x"], 0.5),
        "t": step(["y"], 2.0, model="b"),
        "mix": {"method": "weighted_sum", "a": "s", "b": "t", "alpha": 0.25},
    }
    found = recipe(folder, steps)
    a, b = values(folder / "a.safetensors"), values(folder / "b.safetensors")
    x, y = changes(10), changes(20, KEYS[:2], loha)
    got = tensors_of(found)
    for key in KEYS:
        more = 2.0 * y[key].delta(None) if key in y else 0
        want = 0.75 * (a[key] + 0.5 * x[key].delta(None)) + 0.25 * (b[key] + more)
        np.testing.assert_allclose(got[key], want, rtol=1e-6, atol=2e-7)
    with plan.build(found) as planned:
        mixed = next(t for t in planned.tensors if t.name == Q)
        assert len(mixed.expr.terms) == 4  # two models and two LoRAs in one pass


def test_a_half_precision_result_is_rounded_once(folder, tmp_path):
    found = recipe(folder, {"s": step(["x"], 0.8, model="half")}, models=("half", "x"))
    got = tensors_of(found)
    base = values(folder / "half.safetensors")
    for key, change in changes(10).items():
        want = base[key] + 0.8 * change.delta(None)
        share, worst = deviation(("F16", got[key]), want, "F16")
        assert share <= 1e-3
        assert worst <= 1


def test_taking_a_lora_off_again(folder, tmp_path):
    out = tmp_path / "baked.safetensors"
    plymix.merge(recipe(folder, {"s": step(["x"], 0.9)}, models="ax"), out=out)
    made = {"models": {"b": str(out), "x": str(folder / "x.safetensors")}}
    back = tensors_of(from_dict(made | {"steps": {"s": step(["x"], -0.9, model="b")}}))
    a = values(folder / "a.safetensors")
    for key in KEYS:
        np.testing.assert_allclose(back[key], a[key], atol=2 * np.finfo(np.float32).eps)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(-2, 2))
def test_strengths_are_linear(strengths, factor):
    names = "xyz"
    a = values(FOLDER[0] / "a.safetensors")
    one = tensors_of(recipe(FOLDER[0], {"s": step([*names], strengths)}))
    more = tensors_of(recipe(FOLDER[0], {"s": step([*names], [factor * s for s in strengths])}))
    for key in (Q, CONV):
        grown = a[key] + factor * (one[key] - a[key])
        np.testing.assert_allclose(more[key], grown, rtol=1e-5, atol=2e-6)


FOLDER = []


@pytest.fixture(autouse=True)
def _remember(folder):
    FOLDER[:] = [folder]
