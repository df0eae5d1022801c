"""LoRAs in recipes: where, how strong, in what order; and what is refused."""

import hashlib
import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import plymix.engine.worker
import plymix.replay
from loras import dora, loha, lokr, lora, oft
from plymix import Refusal, archs, engine, expr, plan
from plymix.adapters import placing, strengths
from plymix.expr import leaves
from plymix.formats import Entry, writer_for
from plymix.recipe import from_dict
from small import deviation, load, real, save
from tiny import header, state, write

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


def test_each_row_of_a_product_is_computed_once(folder, tmp_path, monkeypatch):
    """And with as many others as are worth it, however small the pieces of the work."""
    together, asked = placing.together, []

    def noted(terms, factors):
        rows, which = together(terms, factors), terms[0][1]
        return lambda *some: asked.append((which.factors, which.shape[0], *some)) or rows(*some)

    monkeypatch.setattr(placing, "together", noted)
    monkeypatch.setattr(expr, "ROWS", 8)
    for module in (engine.work, engine.worker):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(engine.work, "SPAN", 256)
    found = recipe(folder, {"s": step(["x", "y", "z"], [0.5, 0.25, -1])}, models="axyz")
    plymix.merge(found, out=tmp_path / "o.safetensors", threads=1)
    assert len(asked) == len(set(asked)) > len(KEYS)
    assert all(stop == min(start + 8, count) for _, count, start, stop in asked)


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


@settings(max_examples=5, deadline=None)
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


# --- strengths


def test_text_encoders_blocks_and_rules_have_their_own_strength(folder):
    blocks = {"IN01": 0.5, "OUT09-OUT11": 0.25, "base": 1.0}
    found = recipe(
        folder,
        {"s": step(["x"], 2.0, te_strength=-1.0, blocks=[blocks], rules=["IN04:in_layers:3"])},
    )
    got, a, x = tensors_of(found), values(folder / "a.safetensors"), changes(10)
    for key, strength in {Q: 1.0, DEEP: 0.5, TEXT: -1.0, CONV: 6.0}.items():
        want = a[key] + strength * x[key].delta(None)
        np.testing.assert_allclose(got[key], want, rtol=1e-6, atol=2e-7)


# Numbers of sd-webui-lora-block-weight for BASE and the blocks of KEYS: IN01, OUT11, IN04.
PRESETS = {
    "NONE": (0, 0, 0, 0),
    "ALL": (1, 1, 1, 1),
    "ALL0.5": (0.5, 0.5, 0.5, 0.5),
    "INS": (1, 1, 0, 1),
    "IND": (1, 0, 0, 0),
    "INALL": (1, 1, 0, 1),
    "MIDD": (1, 0, 0, 0),
    "OUTD": (1, 0, 0, 0),
    "OUTS": (1, 0, 1, 0),
    "OUTALL": (1, 0, 1, 0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_lora_block_weights(name):
    base, first, last, fourth = PRESETS[name]
    found = strengths.factors(name, archs.load("sd1"))
    assert [found[b] for b in ("BASE", "IN01", "OUT11", "IN04")] == [base, first, last, fourth]


@pytest.mark.parametrize(
    ("arch", "values", "expected"),
    [
        (
            "sd1",
            17,
            {"BASE": 0, "IN01": 1, "IN02": 2, "IN04": 3, "M00": 7, "OUT03": 8, "OUT11": 16},
        ),
        ("sd1", 26, {"BASE": 0, "IN00": 1, "IN11": 12, "M00": 13, "OUT11": 25}),
        ("sdxl", 12, {"BASE": 0, "IN04": 1, "IN08": 4, "M00": 5, "OUT00": 6, "OUT05": 11}),
        ("sdxl", 20, {"BASE": 0, "IN00": 1, "M00": 10, "OUT00": 11, "OUT08": 19}),
        ("flux1", 61, {"CLIP": 0, "T5": 1, "IN": 2, "D00": 3, "S00": 22, "OUT": 60}),
        ("z-image", 0, {}),
    ],
)
def test_lists_of_lora_block_weights(arch, values, expected):
    arch = archs.load(arch)
    if not values:  # no list of its own: one number per block, or the text encoder's before them
        found = strengths.factors([7.0, *range(len(arch.blocks))], arch)
        assert found[arch.blocks[-1]] == len(arch.blocks) - 1
        assert found["BASE"] == 7
        return
    found = strengths.factors(list(range(values)), arch)
    assert {name: found[name] for name in expected} == expected
    named = {"sd1": {"OUT00", "IN03"}, "sdxl": {"OUT08", "IN00"}}
    if values in (17, 12):  # blocks that the short list has no number for
        assert all(found[name] == 0 for name in named[arch.name])


def test_a_lora_of_strength_0_is_not_read(folder):
    off = recipe(folder, {"s": step(["x", "y"], [0.0, 1.0])})
    with plan.build(off) as planned:
        read = {leaf.source for t in planned.tensors for leaf in leaves(t.expr)}
        index = {i.name: i.index for i in planned.inputs}
        assert index["x"] not in read
        assert index["y"] in read
        assert "weight 0" in planned.dropped["x"]
    with plan.build(recipe(folder, {"s": step(["x"], 0.0)})) as planned:
        assert planned.merged == 0  # the base model as it is


# --- what does not fit


def refused(folder, files, match, base="a", **options):
    models = {"m": str(folder / f"{base}.safetensors")}
    models |= {f"l{i}": str(file) for i, file in enumerate(files)}
    loras = [name for name in models if name != "m"]
    found = from_dict({"models": models, "steps": {"s": step(loras, model="m")}, "output": {}})
    with pytest.raises(Refusal, match=match):
        plan.build(found, **options)


def test_modules_without_a_partner_are_named_and_strict_refuses_them(folder, tmp_path):
    strange = {f"lora_unet_nowhere_{i}": lora((8, 8), i) for i in range(12)}
    tensors = {
        f"{module}.{end}": ("F32", x)
        for module, change in strange.items()
        for end, x in change.tensors.items()
    }
    tensors |= {f"{name(Q)}.{end}": ("F32", x) for end, x in lora(HEADER[Q][1]).tensors.items()}
    tensors["bundle_emb.word.string_to_param.*"] = ("F32", np.zeros((1, 24)))
    file = save(tmp_path / "l.safetensors", tensors)
    models = {"a": str(folder / "a.safetensors"), "x": str(file)}
    found = from_dict({"models": models, "steps": {"s": step(["x"])}, "output": {}})
    with plan.build(found) as planned:
        assert len(planned.unmatched["x"]) == 36
        assert any(
            "12 of 13 modules match nothing" in n and "nowhere_9" in n for n in planned.notes
        )
        assert not any("nowhere_11" in note for note in planned.notes)
        assert any("embedding" in note for note in planned.notes)
    refused(folder, [file], r"--strict: 36 keys", strict=True)


def test_what_matches_nothing_is_an_error(folder, tmp_path):
    tensors = {f"lora_unet_nowhere.{end}": ("F32", x) for end, x in lora((8, 8)).tensors.items()}
    file = save(tmp_path / "l.safetensors", tensors)
    refused(folder, [file], r"none of the 1 modules of l.safetensors .*nowhere.* a.safetensors")


def test_a_lora_for_another_architecture_is_refused_naming_both(folder, tmp_path):
    h = header("sdxl", dtype="F32")
    keys = [
        UNET + "input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight",
        UNET + "middle_block.1.transformer_blocks.0.attn2.to_v.weight",
    ]
    file = lora_file(tmp_path / "xl.safetensors", {k: lora(h[k][1]) for k in keys})
    refused(folder, [file], r"xl.safetensors is a LoRA for SDXL.* and a.safetensors is an SD1")


def test_a_shape_that_does_not_fit_is_refused(folder, tmp_path):
    file = lora_file(tmp_path / "wide.safetensors", {Q: lora((16, 8))})
    refused(folder, [file], r"wide.safetensors: .*to_q changes a weight of 16 x 8; .* 8 x 8")


def test_a_model_is_no_lora_and_a_lora_no_model(folder, tmp_path):
    refused(
        folder, [folder / "b.safetensors"], "b.safetensors is not a LoRA: it is an SD1 checkpoint"
    )
    refused(folder, [folder / "x.safetensors"], "x.safetensors is a LoRA for SD1", base="x")
    twice = {f"{name(Q)}.lora_A.{n}.weight": ("F32", np.ones((2, 8))) for n in ("one", "two")}
    refused(folder, [save(tmp_path / "t.safetensors", twice)], "two adapters")
    steps = {"s": step(["x"]), "t": step(["s"], model="b")}
    with pytest.raises(Refusal, match=r"steps.t: s is a step; a LoRA is a file"):
        plan.build(recipe(folder, steps))


def test_an_inpainting_model_takes_the_loras_of_plain_ones(folder, tmp_path):
    write(tmp_path / "inpaint.safetensors", "sd1-inpainting", 3, dtype="F32")
    change = lora(HEADER[IN][1])
    file = lora_file(tmp_path / "l.safetensors", {IN: change})
    models = {"m": str(tmp_path / "inpaint.safetensors"), "l": str(file)}
    found = from_dict({"models": models, "steps": {"s": step(["l"], model="m")}, "output": {}})
    with plan.build(found) as planned:
        got = planned_tensor(planned, IN)
    before = values(tmp_path / "inpaint.safetensors")[IN]
    np.testing.assert_allclose(got[:, :4], before[:, :4] + change.delta(None), rtol=1e-6, atol=2e-7)
    assert (got[:, 4:] == before[:, 4:]).all()


def test_pefts_configuration_beside_a_file_is_told(folder, tmp_path):
    change = lora(HEADER[Q][1], alpha=None)
    file = lora_file(tmp_path / "adapter_model.safetensors", {Q: change})
    models = {"a": str(folder / "a.safetensors"), "l": str(file)}
    found = from_dict({"models": models, "steps": {"s": step(["l"])}, "output": {}})
    with plan.build(found) as planned:
        assert not any("alpha" in note for note in planned.notes)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32, "r": 16}')
    with plan.build(found) as planned:
        assert any("multiply its strength by 2" in note for note in planned.notes)


def test_a_lora_in_a_checkpoint_file(folder, tmp_path):
    """Saved by torch: plymix's own writer of that format makes it."""
    change = lora(HEADER[Q][1])
    tensors = {f"{name(Q)}.{end}": x for end, x in change.tensors.items()}
    path = tmp_path / "l.pt"
    entries = [Entry(key, "F32", x.shape) for key, x in tensors.items()]
    layout = writer_for(path).layout(entries, {})
    data = bytearray(layout.size)
    for at, piece in layout.pieces:
        data[at : at + len(piece)] = piece
    for key, x in tensors.items():
        raw = np.asarray(x, "<f4").tobytes()
        data[layout.offsets[key] : layout.offsets[key] + len(raw)] = raw
    path.write_bytes(data)
    models = {"a": str(folder / "a.safetensors"), "l": str(path)}
    got = tensors_of(from_dict({"models": models, "steps": {"s": step(["l"], 0.5)}, "output": {}}))
    a = values(folder / "a.safetensors")
    np.testing.assert_allclose(got[Q], a[Q] + 0.5 * change.delta(None), rtol=1e-6, atol=2e-7)


# --- as part of recipes


def test_a_result_is_replayed_and_verified(folder, tmp_path):
    mixed = {
        "x": changes(10)[Q],
        "y": dora(lora(HEADER[Q][1], 1), HEADER[Q][1]),
        "z": oft(HEADER[DEEP][1]),
    }
    lora_file(tmp_path / "d.safetensors", {Q: mixed["y"], DEEP: mixed["z"]})
    models = {n: str(folder / f"{n}.safetensors") for n in "ax"}
    models["d"] = str(tmp_path / "d.safetensors")
    made = {"s": step(["x", "d"], [0.5, 0.8], te_strength=0.25, blocks=["INS", 1.0])}
    out = tmp_path / "out.safetensors"
    plymix.merge(from_dict({"models": models, "steps": made, "output": {}}), out=out)
    folders = [folder, tmp_path]
    plymix.replay.replay(out, tmp_path / "again.safetensors", folders=folders)
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    assert plymix.replay.verify(out, folders=folders).ok
    stored = load(out)[1]["plymix.recipe"]
    digest = hashlib.sha256((tmp_path / "d.safetensors").read_bytes()).hexdigest()
    assert digest in stored


def test_loras_in_expressions(folder, tmp_path):
    a, b = (plymix.model(folder / f"{n}.safetensors") for n in "ab")
    x, y = folder / "x.safetensors", folder / "y.safetensors"
    made = (a.lora(x, 0.8, 0.5).lora(y, -0.2, blocks="IND") + b) / 2
    assert plymix.Expression.from_json(made.to_json()) == made
    got, known = tensors_of(made.recipe()), changes(10)
    first, second = values(folder / "a.safetensors"), values(folder / "b.safetensors")
    for key, strength in {CONV: 0.8, TEXT: 0.5}.items():
        want = (first[key] + strength * known[key].delta(None) + second[key]) / 2
        np.testing.assert_allclose(got[key], want, rtol=1e-6, atol=2e-7)
    assert "0.8 × x.safetensors" in repr(a.lora(x, 0.8))


def test_a_base_in_diffusers_names_gets_the_same_change(folder, tmp_path):
    """Fused q, k and v of SDXL's second text encoder, in a folder that has them apart."""
    h = header("sdxl", dtype="F32")
    made = state(h)
    key = "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"
    out, in_ = h[key][1]
    module = "lora_te2_text_model_encoder_layers_2_self_attn_"
    tensors, want = {}, made[key].astype(np.float64)
    for i, part in enumerate(("q_proj", "v_proj")):
        change = lora((out // 3, in_), i)
        tensors |= {f"{module}{part}.{e}": ("F32", x) for e, x in change.tensors.items()}
        rows = slice(0, out // 3) if part == "q_proj" else slice(2 * out // 3, out)
        want[rows] += 0.5 * change.delta(None)
    file = save(tmp_path / "l.safetensors", tensors)
    base = save(tmp_path / "xl.safetensors", {k: (d, made[k]) for k, (d, _) in h.items()})
    models = {"m": str(base), "l": str(file)}
    found = from_dict({"models": models, "steps": {"s": step(["l"], 0.5, "m")}, "output": {}})
    with plan.build(found) as planned:
        got = planned_tensor(planned, key)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-7)
        k = slice(out // 3, 2 * out // 3)
        assert (got[k] == made[key][k]).all()


# --- memory


def test_factors_that_do_not_fit_together_are_read_again(folder, monkeypatch):
    found = recipe(folder, {"s": step(["x", "y", "z"], [0.5, 0.25, -1])})
    at_once = tensors_of(found)
    monkeypatch.setattr(engine.worker, "_limit", lambda term: 1)
    apart = tensors_of(found)
    for key in KEYS:
        np.testing.assert_allclose(apart[key], at_once[key], rtol=1e-6, atol=1e-7)


def test_a_large_change_is_never_whole_in_memory(folder, tmp_path):
    """20 LoRAs on one large matrix: their factors are held, as many as fit, and no change is."""
    h = header("sd1")
    key = UNET + "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
    h[key] = ("F16", (4096, 1024))  # 16 MiB in float32
    values = state({key: h[key]})[key]
    everything = {k: (d, x) for (k, x), (d, _) in zip(state(h).items(), h.values(), strict=True)}
    save(tmp_path / "base.safetensors", {**everything, key: ("F16", values)})
    rng = np.random.default_rng(0)
    models = {"m": str(tmp_path / "base.safetensors")}
    for i in range(20):
        up, down = (rng.standard_normal(s).astype("f2") for s in ((4096, 16), (16, 1024)))
        tensors = {f"{name(key)}.lora_up.weight": ("F16", up)}
        tensors |= {f"{name(key)}.lora_down.weight": ("F16", down)}
        models[f"l{i}"] = str(save(tmp_path / f"l{i}.safetensors", tensors))
    loras = list(models)[1:]
    found = from_dict({"models": models, "steps": {"s": step(loras, 0.01, "m")}, "output": {}})
    with plan.build(found) as planned:
        tensor = replace(next(t for t in planned.tensors if t.name == key), offset=0)
        target = engine.MemoryTarget(tensor.nbytes)
        job = engine.Job(planned.sources, target)
        engine.perform(job, [tensor], threads=1)
        tracemalloc.start()
        engine.perform(job, [tensor], threads=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # factors in float32, twice over while they are joined, no more than the tensor has elements
    assert peak < 2 * 4096 * 1024 * 4 + 12 * engine.worker.CHUNK * 4
