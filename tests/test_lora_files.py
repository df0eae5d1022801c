"""LoRA files made of others, against float64 sums of what numpy reads from the files.

`deltas` reads a file in kohya's spelling and gives what each module adds; nothing in it is plymix.
"""

import errno
import hashlib
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loras as made
import plymix
from plymix import cli, loras
from plymix.errors import Failure
from plymix.loras import work as working
from plymix.recipe import from_dict
from small import draw, load, real, save
from tiny import header, state, write

UNET = "model.diffusion_model."
HEADER = header("sd1", dtype="F32")
Q = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
DEEP = UNET + "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"
CONV = UNET + "input_blocks.4.0.in_layers.2.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
KEYS = (Q, DEEP, CONV, TEXT)
QUIET = {"deadline": None, "max_examples": 15}


def name(key):
    """A module's name as kohya spells it."""
    key = key.removesuffix(".weight")
    if key.startswith(UNET):
        return "lora_unet_" + key.removeprefix(UNET).replace(".", "_")
    return "lora_te_" + key.removeprefix("cond_stage_model.transformer.").replace(".", "_")


def theirs(key):
    """The same as diffusers spells it."""
    return {
        Q: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        DEEP: "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k",
        CONV: "unet.down_blocks.1.resnets.0.conv1",
        TEXT: "text_encoder.text_model.encoder.layers.3.mlp.fc1",
    }[key]


def lora_file(path, changes, metadata=None, spelt=name, dtype="F32"):
    kinds = {"f": dtype, "i": "I64"}
    tensors = {}
    for key, change in changes.items():
        for end, x in change.tensors.items():
            x = np.asarray(x)
            if spelt is theirs:
                end = end.replace("lora_up", "lora_B").replace("lora_down", "lora_A")
            kind = kinds[x.dtype.kind]
            x = x.astype(np.float16) if kind == "F16" else x
            tensors[f"{spelt(key)}.{end}"] = (kind, x)
    return save(path, tensors, metadata)


def changes(seed, keys=KEYS, family=made.lora, **options):
    return {key: family(HEADER[key][1], seed + i, **options) for i, key in enumerate(keys)}


def read(path):
    return {key: real(x).astype(np.float64) for key, x in load(path)[0].items()}


def deltas(path, ends=("lora_up.weight", "lora_down.weight")):
    """{module: what it adds}, by up, down and alpha, or as a whole difference."""
    tensors, found = read(path), {}
    for key, up in tensors.items():
        module, _, end = key.rpartition("." + ends[0])
        if module and not end:
            down = tensors[f"{module}.{ends[1]}"]
            rank = down.shape[0]
            scale = float(tensors.get(f"{module}.alpha", rank)) / rank
            up = up.reshape(up.shape[0], rank)
            found[module] = scale * np.einsum("or,r...->o...", up, down)
        elif key.endswith(".diff"):
            found[key.removesuffix(".diff")] = up
    return found


def close(got, want, rel=2e-6):
    got = got.reshape(want.shape)
    assert np.abs(got - want).max() <= rel * np.abs(want).max() + 1e-12


def ranks(path):
    return {k: x.shape[0] for k, x in read(path).items() if k.endswith("lora_down.weight")}


# --- sums


@given(st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=2, max_size=3),
       st.integers(0, 99))  # fmt: skip
@settings(**QUIET)
def test_the_sum_of_changes_is_the_change_of_the_sum(tmp_path_factory, strengths, seed):
    folder = tmp_path_factory.mktemp("m")
    each = [changes(seed + 10 * i, rank=1 + 2 * i, alpha=0.5 + i) for i in range(len(strengths))]
    files = [lora_file(folder / f"{i}.safetensors", x) for i, x in enumerate(each)]
    loras.merge(
        [f"{f}:{s}" for f, s in zip(files, strengths, strict=True)],
        folder / "o.safetensors",
    ) if any(strengths) else None
    if not any(strengths):
        return
    got = deltas(folder / "o.safetensors")
    for key in KEYS:
        want = sum(s * x[key].delta(None) for s, x in zip(strengths, each, strict=True))
        scale = sum(abs(s) * np.abs(x[key].delta(None)).max()
                    for s, x in zip(strengths, each, strict=True))  # fmt: skip
        assert np.abs(got[name(key)] - want).max() <= 1e-6 * scale


def test_halves_of_a_lora_are_the_lora(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    loras.merge([f"{file}:0.5", f"{file}:0.5"], tmp_path / "o.safetensors")
    for module, want in deltas(file).items():
        close(deltas(tmp_path / "o.safetensors")[module], want, 1e-6)
    loras.merge([f"{file}:0.5", f"{file}:0.5"], tmp_path / "r.safetensors", rank=3)
    assert set(ranks(tmp_path / "r.safetensors").values()) == {3}
    for module, want in deltas(file).items():
        close(deltas(tmp_path / "r.safetensors")[module], want, 1e-5)


def test_one_lora_at_strength_1_is_itself_to_the_byte(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1), dtype="F16")
    loras.merge([str(file)], tmp_path / "o.safetensors")
    before, after = load(file)[0], load(tmp_path / "o.safetensors")[0]
    for key, (dtype, x) in before.items():
        if not key.endswith("alpha"):
            assert after[key][0] == dtype
            assert after[key][1].tobytes() == x.tobytes()


@pytest.mark.parametrize("strengths", [(1, -1), (0.1, 0.2, -0.3), (0,)])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("family", [made.lora, made.full])
def test_a_lora_less_itself_is_refused(tmp_path, strengths, rank, family):
    if family is made.full and len(strengths) == 3:
        strengths = (0.25, 0.5, -0.75)  # whose sum is 0 in float32, too
    file = lora_file(tmp_path / "l.safetensors", changes(1, family=family))
    with pytest.raises(plymix.Refusal, match="nothing is changed"):
        loras.merge([f"{file}:{s}" for s in strengths], tmp_path / "o.safetensors", rank=rank)
    assert [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]


def test_a_module_that_comes_to_nothing_is_told_and_left_out(tmp_path):
    """Of one module the sum is 0, of another a factor, of a third neither."""
    a = lora_file(tmp_path / "a.safetensors", changes(1, (Q, DEEP)))
    other = {Q: changes(1, (Q,))[Q], CONV: changes(4, (CONV,))[CONV]}
    b = lora_file(tmp_path / "b.safetensors", other)
    up = f"{name(CONV)}.lora_up.weight"
    tensors = load(b)[0]
    save(b, {**tensors, up: ("F32", np.zeros_like(tensors[up][1]))})
    found = loras.merge([f"{a}", f"{b}:-1"], tmp_path / "o.safetensors")
    assert set(deltas(tmp_path / "o.safetensors")) == {name(DEEP)}
    assert found.modules == 1
    (note,) = found.notes
    assert note.startswith("2 modules change nothing")
    # A small change beside large ones that cancel is a change.
    loras.merge([f"{a}:1000", f"{a}:-999.99"], tmp_path / "p.safetensors")
    close(deltas(tmp_path / "p.safetensors")[name(Q)], 0.01 * deltas(a)[name(Q)], 0.05)


LINEAR = ("LoRA", "LoRA without alpha", "LoHa", "LoKr", "LoKr, both products",
          "LoKr, first a product", "LoKr, both whole", "full")  # fmt: skip


@pytest.mark.parametrize("family", [*LINEAR, "LoCon-CP", "LoHa-CP", "LoKr-CP"])
def test_every_family_that_is_a_sum_joins_in(tmp_path, family):
    key = CONV if family.endswith("CP") else Q
    make = made.CONV if key == CONV else made.LINEAR
    one = {key: make[family](HEADER[key][1], 3)}
    two = changes(9, (key,))
    a = lora_file(tmp_path / "a.safetensors", one)
    b = lora_file(tmp_path / "b.safetensors", two)
    want = 0.7 * one[key].delta(None) - 0.3 * two[key].delta(None)
    loras.merge([f"{a}:0.7", f"{b}:-0.3"], tmp_path / "o.safetensors")
    close(deltas(tmp_path / "o.safetensors")[name(key)], want)
    small = tmp_path / "r.safetensors"
    found = loras.merge([f"{a}:0.7", f"{b}:-0.3"], small, rank=2)
    s = np.linalg.svd(want.reshape(len(want), -1), compute_uv=False)
    lost = math.sqrt((s[2:] ** 2).sum())
    got = deltas(small)[name(key)]
    assert np.linalg.norm(got - want) == pytest.approx(lost, rel=1e-3, abs=1e-5)
    assert found.error * np.linalg.norm(want) == pytest.approx(lost, rel=1e-3, abs=1e-5)


def test_biases_and_norms_are_added(tmp_path):
    x, y = np.float32([1, 2, 3]), np.float32([0.5, 0, -1])
    files = []
    for i, value in enumerate((x, y)):
        files.append(
            save(
                tmp_path / f"{i}.safetensors",
                {
                    f"{name(Q)}.lora_up.weight": draw("F32", (8, 2), i),
                    f"{name(Q)}.lora_down.weight": draw("F32", (2, 8), i + 5),
                    "lora_unet_input_blocks_1_0_in_layers_0.w_norm": ("F32", value),
                    "lora_unet_input_blocks_1_0_in_layers_0.b_norm": ("F32", -value),
                },
            )
        )
    loras.merge([f"{files[0]}:2", f"{files[1]}:-1"], tmp_path / "o.safetensors")
    got = read(tmp_path / "o.safetensors")
    np.testing.assert_allclose(got["lora_unet_input_blocks_1_0_in_layers_0.diff"], 2 * x - y)
    np.testing.assert_allclose(got["lora_unet_input_blocks_1_0_in_layers_0.diff_b"], y - 2 * x)


def test_strengths_of_text_encoders_and_blocks(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    loras.merge([f"{file}:2:-0.5"], tmp_path / "o.safetensors",
                lbw={"IN01": 0.5, "OUT11": 0.25, "base": 1.0})  # fmt: skip
    before, after = deltas(file), deltas(tmp_path / "o.safetensors")
    for key, strength in {Q: 1.0, DEEP: 0.5, TEXT: -0.5}.items():
        close(after[name(key)], strength * before[name(key)])
    assert np.abs(after.get(name(CONV), np.zeros(1))).max() == 0


def test_files_in_different_spellings_meet(tmp_path):
    one, two = changes(1), changes(20, rank=2)
    a = lora_file(tmp_path / "a.safetensors", one)
    b = lora_file(tmp_path / "b.safetensors", two, spelt=theirs)
    loras.merge([f"{a}", f"{b}:0.5"], tmp_path / "ab.safetensors")
    loras.merge([f"{b}:0.5", f"{a}"], tmp_path / "ba.safetensors")
    ab = deltas(tmp_path / "ab.safetensors")
    ba = deltas(tmp_path / "ba.safetensors", ("lora_B.weight", "lora_A.weight"))
    for key in KEYS:
        want = one[key].delta(None) + 0.5 * two[key].delta(None)
        close(ab[name(key)], want)
        close(ba[theirs(key)], want)
    assert len(ab) == len(ba) == len(KEYS)


# --- ranks


def test_energy_is_kept_as_said_by_the_least_rank(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1, rank=7))
    found = loras.resize(file, tmp_path / "o.safetensors", energy=0.9)
    before, after = deltas(file), deltas(tmp_path / "o.safetensors")
    total = lost = 0.0
    for module, d in before.items():
        s2 = np.linalg.svd(d.reshape(len(d), -1), compute_uv=False) ** 2
        held = np.cumsum(s2) / s2.sum()
        rank = ranks(tmp_path / "o.safetensors")[f"{module}.lora_down.weight"]
        assert rank == 1 + int((held < 0.9).sum())
        total, lost = total + s2.sum(), lost + ((after[module].reshape(d.shape) - d) ** 2).sum()
    assert found.error == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert 1 - found.error**2 >= 0.9
    assert load(tmp_path / "o.safetensors")[1]["ss_network_dim"] == "Dynamic"


def test_a_lower_rank_keeps_the_strength(tmp_path):
    """All of the LoRA's ranks are the same direction, so that one holds it all."""
    change = made.lora(HEADER[Q][1], 4, rank=1, alpha=0.25)
    up, down = change.tensors["lora_up.weight"], change.tensors["lora_down.weight"]
    file = save(
        tmp_path / "l.safetensors",
        {
            f"{name(Q)}.lora_up.weight": ("F32", np.repeat(up, 4, axis=1)),
            f"{name(Q)}.lora_down.weight": ("F32", np.repeat(down, 4, axis=0)),
            f"{name(Q)}.alpha": ("F32", np.float32(0.25)),
        },
    )
    loras.resize(file, tmp_path / "o.safetensors", rank=4)
    assert set(ranks(tmp_path / "o.safetensors").values()) == {1}
    close(deltas(tmp_path / "o.safetensors")[name(Q)], deltas(file)[name(Q)], 1e-5)


def test_a_size_is_used_where_it_matters_most(tmp_path):
    many = [k for k, (_, shape) in HEADER.items() if k.endswith("to_q.weight")][:12]
    big = {k: made.lora(HEADER[k][1], i, rank=8, alpha=8 * 4.0**-i) for i, k in enumerate(many)}
    file = lora_file(tmp_path / "l.safetensors", big)
    uniform = loras.resize(file, tmp_path / "u.safetensors", rank=4)
    found = loras.resize(file, tmp_path / "o.safetensors", size=f"{uniform.nbytes}B")
    assert found.nbytes <= uniform.nbytes
    assert found.error < uniform.error
    given = ranks(tmp_path / "o.safetensors")
    assert given[f"{name(many[0])}.lora_down.weight"] == 8
    with pytest.raises(plymix.Refusal, match="too few"):
        loras.resize(file, tmp_path / "o2.safetensors", size="3kB")


# --- extraction


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i, model in enumerate("ab"):
        write(folder / f"{model}.safetensors", "sd1", i, dtype="F32")
    return folder


def bake(base, lora, out):
    steps = {"x": {"method": "lora", "model": "a", "loras": "l"}}
    models = {"a": str(base), "l": str(lora)}
    plymix.merge(from_dict({"models": models, "steps": steps, "output": {}}), out=out, force=True)
    return read(out)


def test_what_was_baked_is_extracted(models, tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1, rank=2))
    bake(models / "a.safetensors", file, tmp_path / "t.safetensors")
    out = tmp_path / "o.safetensors"
    found = loras.extract(tmp_path / "t.safetensors", models / "a.safetensors", out, rank=2)
    before, after = deltas(file), deltas(out)
    assert after.keys() == before.keys()
    for module, want in before.items():
        got = after[module].reshape(want.shape)
        assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
    assert found.error < 1e-3
    assert found.modules == len(KEYS)


def test_what_is_extracted_is_the_best_there_is(models, tmp_path):
    out = tmp_path / "o.safetensors"
    found = loras.extract(
        models / "b.safetensors", models / "a.safetensors", out, rank=3, threads=2
    )
    a, b, got = (read(p) for p in (models / "a.safetensors", models / "b.safetensors", out))
    mine = deltas(out)
    lost = total = 0.0
    for key, (_, shape) in HEADER.items():
        if len(shape) < 2 or name(key) not in mine:
            continue
        d = (b[key] - a[key]).reshape(shape[0], -1)
        s2 = np.linalg.svd(d, compute_uv=False) ** 2
        error = ((mine[name(key)].reshape(d.shape) - d) ** 2).sum()
        assert error == pytest.approx(s2[3:].sum(), rel=1e-3, abs=1e-8)
        lost, total = lost + error, total + s2.sum()
    assert found.error == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    expected = {
        k
        for k, (_, s) in HEADER.items()
        if k.endswith("weight")
        and len(s) > 1
        and not k.startswith(("first_stage", "model_ema"))
        and "embedding" not in k
    }
    assert set(mine) == {name(k) for k in expected}
    conv = got[f"{name(CONV)}.lora_down.weight"]
    assert conv.shape == (3, *HEADER[CONV][1][1:])
    without = tmp_path / "w.safetensors"
    loras.extract(models / "b.safetensors", models / "a.safetensors", without, rank=3,
                  text_encoders=False, conv=False)  # fmt: skip
    assert not any(k.startswith("lora_te") for k in read(without))
    assert f"{name(CONV)}.alpha" not in read(without)


def test_norms_and_biases_if_asked(models, tmp_path):
    out = tmp_path / "o.safetensors"
    loras.extract(models / "b.safetensors", models / "a.safetensors", out, rank=99, diffs=True)
    after, b = bake(models / "a.safetensors", out, tmp_path / "x.safetensors"), None
    b = read(models / "b.safetensors")
    for key in b:
        if key.startswith((UNET, "cond_stage")) and "embedding" not in key:
            assert np.abs(after[key] - b[key]).max() < 1e-4, key


def test_kronecker_products(models, tmp_path):
    change = {Q: made.lokr(HEADER[Q][1], 3, second=False)}
    file = lora_file(tmp_path / "l.safetensors", change)
    bake(models / "a.safetensors", file, tmp_path / "t.safetensors")
    out = tmp_path / "o.safetensors"
    found = loras.extract(
        tmp_path / "t.safetensors", models / "a.safetensors", out, family="lokr", factor=2
    )
    got = read(out)
    d = np.kron(got[f"{name(Q)}.lokr_w1"], got[f"{name(Q)}.lokr_w2"])
    assert np.linalg.norm(d - change[Q].delta(None)) < 1e-3 * np.linalg.norm(d)
    assert found.error < 1e-3
    loras.extract(tmp_path / "t.safetensors", models / "a.safetensors", tmp_path / "r.safetensors",
                  family="lokr", factor=2, rank=1)  # fmt: skip
    got = read(tmp_path / "r.safetensors")
    assert got[f"{name(Q)}.lokr_w2_b"].shape[0] == 1
    after = bake(models / "a.safetensors", tmp_path / "r.safetensors", tmp_path / "x.safetensors")
    want = np.kron(got[f"{name(Q)}.lokr_w1"],
                   got[f"{name(Q)}.lokr_w2_a"] @ got[f"{name(Q)}.lokr_w2_b"])  # fmt: skip
    close(after[Q] - read(models / "a.safetensors")[Q], want, 1e-4)


@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.8}, {"size": "400kB"}])
def test_the_bytes_do_not_depend_on_threads(models, tmp_path, how):
    results = set()
    for threads in (1, 3):
        pair = models / "b.safetensors", models / "a.safetensors"
        loras.extract(*pair, tmp_path / "o.safetensors",
                      threads=threads, force=True, text_encoders="size" in how, **how)  # fmt: skip
        results.add((tmp_path / "o.safetensors").read_bytes())
    assert len(results) == 1
    if "size" in how:
        assert 390_000 < len(results.pop()) <= 400_000


def test_random_directions_are_seeded_by_seed_and_key(tmp_path):
    """Matrices large enough for random directions; the same for any number of threads."""
    keys = [Q, DEEP]
    for i, model in enumerate("ab"):
        tensors = {key: ("F32", x) for key, x in state(HEADER, seed=i).items()}
        tensors |= {key: draw("F32", (300, 400), 10 * i + j) for j, key in enumerate(keys)}
        save(tmp_path / f"{model}.safetensors", tensors)
    files = {}
    for seed, threads in ((0, 1), (0, 2), (1, 1)):
        out = tmp_path / f"{seed}{threads}.safetensors"
        loras.extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", out, rank=8,
                      seed=seed, threads=threads)  # fmt: skip
        files[seed, threads] = read(out)[f"{name(Q)}.lora_up.weight"]
    assert (files[0, 1] == files[0, 2]).all()
    assert (files[0, 1] != files[1, 1]).any()


# --- spellings

TO = ("kohya", "kohya-diffusers", "lycoris", "diffusers", "comfyui")


@pytest.mark.parametrize("to", TO)
def test_converted_files_do_the_same(models, tmp_path, to):
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    want = bake(models / "a.safetensors", file, tmp_path / "x.safetensors")
    loras.convert(file, tmp_path / "o.safetensors", to=to)
    got = bake(models / "a.safetensors", tmp_path / "o.safetensors", tmp_path / "y.safetensors")
    for key in KEYS:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=1e-6)
    if to == "diffusers":
        assert {k.rpartition(".lora_")[0] for k in read(tmp_path / "o.safetensors")} == {
            theirs(key) for key in KEYS
        }
    loras.convert(tmp_path / "o.safetensors", tmp_path / "back.safetensors", to="kohya")
    for module, d in deltas(file).items():
        close(deltas(tmp_path / "back.safetensors")[module], d)


QKV = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
SINGLE = "model.diffusion_model.single_blocks.1.linear1.weight"


def test_fused_weights_are_split_and_joined(tmp_path):
    h = header("flux-dev", dtype="F32")
    rows = h[QKV][1][0] // 3
    wide = made.lora(h[QKV][1], 1), made.lora(h[SINGLE][1], 2)
    names = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear1")
    tensors = {
        f"{n}.{end}": ("F32", x)
        for n, change in zip(names, wide, strict=True)
        for end, x in change.tensors.items()
    }
    file = save(tmp_path / "l.safetensors", tensors)
    loras.convert(file, tmp_path / "d.safetensors", to="diffusers")
    got = deltas(tmp_path / "d.safetensors", ("lora_B.weight", "lora_A.weight"))
    attn = "transformer.transformer_blocks.0.attn.to_"
    single = "transformer.single_transformer_blocks.1."
    d, e = (change.delta(None) for change in wide)
    for i, one in enumerate("qkv"):
        close(got[attn + one], d[i * rows : (i + 1) * rows])
        close(got[f"{single}attn.to_{one}"], e[i * rows : (i + 1) * rows])
    close(got[f"{single}proj_mlp"], e[3 * rows :])
    assert len(got) == 7
    base = save(
        tmp_path / "base.safetensors", {k: draw("F32", shape) for k, (_, shape) in h.items()}
    )
    loras.convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", to="kohya", base=base)
    back = deltas(tmp_path / "k.safetensors")
    assert set(back) == set(names)
    for n, want in zip(names, (d, e), strict=True):
        close(back[n], want)
    assert ranks(tmp_path / "k.safetensors")[f"{names[0]}.lora_down.weight"] == 9
    # Only q, of rank 3: its rows, and zeros.
    one = {k: x for k, x in load(tmp_path / "d.safetensors")[0].items() if k.startswith(attn + "q")}
    save(tmp_path / "q.safetensors", one)
    loras.convert(tmp_path / "q.safetensors", tmp_path / "kq.safetensors", to="kohya", base=base)
    (back,) = deltas(tmp_path / "kq.safetensors").values()
    close(back[:rows], d[:rows])
    assert not back[rows:].any()


@pytest.mark.parametrize("family", ["LoHa", "LoKr", "OFT", "IA3", "DoRA", "GLoRA"])
def test_other_families_are_renamed_where_that_can_be_said(models, tmp_path, family):
    file = lora_file(tmp_path / "l.safetensors", {Q: made.LINEAR[family](HEADER[Q][1], 3)})
    want = bake(models / "a.safetensors", file, tmp_path / "x.safetensors")[Q]
    loras.convert(file, tmp_path / "o.safetensors", to="lycoris")
    got = bake(models / "a.safetensors", tmp_path / "o.safetensors", tmp_path / "y.safetensors")[Q]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    if family == "DoRA":
        loras.convert(file, tmp_path / "d.safetensors", to="diffusers")
        got = bake(models / "a.safetensors", tmp_path / "d.safetensors", tmp_path / "y.safetensors")
        np.testing.assert_allclose(got[Q], want, rtol=1e-5, atol=1e-6)
        assert read(tmp_path / "d.safetensors")[f"{theirs(Q)}.lora_magnitude_vector"].ndim == 1
    else:
        with pytest.raises(plymix.Refusal, match=r"LoRA only.*attn1_to_q"):
            loras.convert(file, tmp_path / "d.safetensors", to="diffusers")


def test_the_number_format(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    loras.convert(file, tmp_path / "o.safetensors", to="kohya", dtype="bf16")
    kinds = {k: d for k, (d, _) in load(tmp_path / "o.safetensors")[0].items()}
    assert {d for k, d in kinds.items() if not k.endswith("alpha")} == {"BF16"}


# --- what a file says of itself


def test_hashes_and_dimensions_are_new_and_tags_are_added(tmp_path):
    said = {"ss_sd_model_name": "sd-v1-5", "ss_clip_skip": "2", "sshs_model_hash": "0" * 64}
    tags = [{"10_cat": {"cat": 10, "sofa": 1}}, {"10_cat": {"cat": 5}, "1_dog": {"dog": 3}}]
    files = [
        lora_file(
            tmp_path / f"{i}.safetensors",
            changes(i, rank=2 + i),
            {**said, "ss_tag_frequency": json.dumps(t), "ss_seed": str(i)},
        )
        for i, t in enumerate(tags)
    ]
    loras.merge([str(f) for f in files], tmp_path / "o.safetensors")
    found = load(tmp_path / "o.safetensors")[1]
    assert json.loads(found["ss_tag_frequency"]) == {
        "10_cat": {"cat": 15, "sofa": 1}, "1_dog": {"dog": 3},
    }  # fmt: skip
    assert (found["ss_sd_model_name"], found["ss_clip_skip"]) == ("sd-v1-5", "2")
    assert "ss_seed" not in found
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("5", "5")
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    recipe = json.loads(found["plymix.lora"])
    sums = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    assert [i["sha256"] for i in recipe["inputs"]] == sums
    assert [i["file"] for i in recipe["inputs"]] == [f.name for f in files]
    assert str(tmp_path) not in json.dumps(found)


def kohya_hashes(path):
    """As sd-scripts has them: of the file that safetensors itself writes with `ss_*` alone."""
    from safetensors.numpy import load_file
    from safetensors.numpy import save as saved

    metadata = {k: v for k, v in load(path)[1].items() if k.startswith("ss_")}
    file = io.BytesIO(saved(load_file(path), metadata))
    n = int.from_bytes(file.read(8), "little")
    file.seek(8 + n)
    full = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return full, hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def test_kohyas_hashes(tmp_path):
    big = {f"lora_unet_input_blocks_{i}_1_proj_in.lora_up.weight": draw("F16", (640, 320), i)
           for i in (1, 2, 4, 5)}  # fmt: skip
    big |= {k.replace("up", "down").replace("inpdownt", "input"): draw("F16", (320, 640), 9)
            for k in list(big)}  # fmt: skip
    file = save(tmp_path / "l.safetensors", big, {"ss_x": "y" * 999})
    loras.convert(file, tmp_path / "o.safetensors", to="comfyui")
    found = load(tmp_path / "o.safetensors")[1]
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(
        tmp_path / "o.safetensors"
    )


# --- what is refused


def test_what_cannot_be_is_refused_by_name(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    dora = lora_file(tmp_path / "d.safetensors", {Q: made.LINEAR["DoRA"](HEADER[Q][1], 1)})
    a, out = models / "a.safetensors", tmp_path / "o.safetensors"
    tuned_xl = write(tmp_path / "tuned-xl.safetensors", "sdxl")
    xl = save(
        tmp_path / "xl.safetensors",
        {
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q.lora_up.weight":
                draw("F32", (8, 2)),
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q.lora_down.weight":
                draw("F32", (2, 8)),
        },
    )  # fmt: skip
    cases = [
        (lambda: loras.merge([str(file), str(dora)], out), "depends on the weight.*lora bake"),
        (lambda: loras.resize(dora, out, rank=2), "DoRA changes depends"),
        (lambda: loras.merge([str(file), str(xl)], out), "SD1.*SDXL.*do not fit"),
        (lambda: loras.merge([str(a)], out), "is not a LoRA"),
        (lambda: loras.merge([], out), "no LoRA is named"),
        (lambda: loras.resize(file, out), "resize to what"),
        (lambda: loras.resize(file, out, rank=2, energy=0.5), "rank, energy: one of them"),
        (lambda: loras.resize(file, out, energy=1.5), "no share"),
        (lambda: loras.resize(file, out, size="many"), "write 150MB"),
        (lambda: loras.extract(a, a, out), "of what size"),
        (lambda: loras.extract(a, a, out, rank=2), "nothing is changed"),
        (lambda: loras.extract(a, tuned_xl, out, rank=2), "is an SD1 check.* is an SDXL check"),
        (
            lambda: loras.merge([str(xl)], out, base=a),
            "is an SD1 check.* is a LoRA for SDXL",
        ),
        (lambda: loras.extract(a, file, out, rank=2), "name a model, whole"),
        (lambda: loras.extract(a, a, out, rank=2, family="loha"), "lora and lokr"),
        (lambda: loras.extract(a, a, out, rank=2, factor=4), "factor = 4 is for LoKr"),
        (lambda: loras.merge([str(file)], out, rank=0), "rank = 0: give 1 or more"),
        (lambda: loras.resize(file, out, rank=4, conv_rank=0), "conv-rank = 0: give 1"),
        (lambda: loras.merge([str(file)], out, energy=0), "energy = 0 is no share"),
        (lambda: loras.merge([str(file)], out, size=0), "size = 0 is no size"),
        (lambda: loras.merge([str(file)], out, lbw="OUTAL"), "mean OUTALL.*NONE, ALL.*M00"),
        (lambda: loras.merge([str(file)], out, lbw={"OUTAL": 1}), "mean OUTALL.*NONE, ALL.*M00"),
        (lambda: loras.merge([str(file), f"<lora:{file.stem}:1:lbw=WRONG>"], out), "are NONE, ALL"),
        (lambda: loras.convert(file, out, to="peft"), "PEFT cannot say.*lora_te.*FILE:1:0"),
        (lambda: loras.convert(file, out, to="kohia"), "did you mean kohya"),
        (lambda: loras.convert(file, tmp_path / "o.ckpt", to="kohya"), "written as .safetensors"),
        (lambda: loras.convert(file, file, to="comfyui"), "exists"),
        (lambda: loras.convert(file, to="comfyui"), "where to"),
    ]
    before = sorted(tmp_path.iterdir())
    for work, text in cases:
        with pytest.raises(plymix.Refusal, match=text):
            work()
        assert sorted(tmp_path.iterdir()) == before


def test_a_few_modules_tell_their_model_by_their_sizes(tmp_path):
    k = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    for width, model in ((768, "stable-diffusion-v1"), (1024, "stable-diffusion-v2")):
        tensors = {f"{k}.lora_up.weight": draw("F32", (320, 1)),
                   f"{k}.lora_down.weight": draw("F32", (1, width))}  # fmt: skip
        file = save(tmp_path / f"{width}.safetensors", tensors)
        loras.convert(file, tmp_path / f"{width}-d.safetensors", to="diffusers")
        found, said = load(tmp_path / f"{width}-d.safetensors")
        assert f"{theirs(Q).removesuffix('attn1.to_q')}attn2.to_k.lora_A.weight" in found
        assert said["modelspec.architecture"].startswith(model)


def test_names_of_no_known_model_stay_what_they_are(tmp_path):
    strange = {
        "blob.x.lora_A.weight": draw("F32", (2, 6)),
        "blob.x.lora_B.weight": draw("F32", (8, 2)),
    }
    file = save(tmp_path / "l.safetensors", strange)
    loras.merge([f"{file}:0.5", f"{file}:1"], tmp_path / "o.safetensors")
    ends = ("lora_B.weight", "lora_A.weight")
    close(deltas(tmp_path / "o.safetensors", ends)["blob.x"], 1.5 * deltas(file, ends)["blob.x"])
    with pytest.raises(plymix.Refusal, match=r"blob.x.*--base"):
        loras.convert(file, tmp_path / "k.safetensors", to="kohya")


DISKS = {
    "EFBIG": ("more than a file may have there", "`ulimit -f`", "-o; TMPDIR", "a lower rank"),
    "ENOSPC": ("are free (No space left", "-o; TMPDIR", "a lower rank"),
    "EIO": ("cannot write the temporary file in",),
}


@pytest.mark.parametrize("error", DISKS)
@pytest.mark.parametrize("dry", [False, True])
def test_a_disk_that_does_not_take_the_temporary_file(models, tmp_path, monkeypatch, error, dry):
    """It takes the half of the second array; what it is and where is said, and nothing is left."""
    number = getattr(errno, error)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(working.tempfile, "tempdir", str(tmp_path))

    class Small(io.BytesIO):
        written = 0

        def write(self, data):
            if self.written > 2:
                raise OSError(number, os.strerror(number))
            self.written += 1
            return super().write(data[: max(1, len(data) // 2)])

    monkeypatch.setattr(working.tempfile, "TemporaryFile", lambda **_: Small())
    with pytest.raises(Failure) as caught:
        loras.extract(
            models / "b.safetensors",
            models / "a.safetensors",
            here / "x.safetensors",
            rank=2,
            dry_run=dry,
            threads=1,
        )
    text = str(caught.value)
    assert str(tmp_path if dry else here) in text
    assert str(here) not in text or not dry
    assert "nothing was written" in text
    assert all(words in text for words in DISKS[error])
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no files")
@pytest.mark.parametrize("limit", [20_000, 300_000])
def test_a_limit_on_file_size(models, tmp_path, limit):
    """The temporary file, or the result that is larger, meets it; both are said."""
    tuned, base = models / "b.safetensors", models / "a.safetensors"
    code = (
        "import resource, plymix.cli;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "plymix.cli.main()"
    )
    words = ("lora", "extract", tuned, base, "--rank", "2", "-o", tmp_path / "x.safetensors")
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "more than a file may have" in ran.stderr
    what = "the temporary file" if limit < 100_000 else "x.safetensors has"
    assert what in ran.stderr
    assert str(tmp_path) in ran.stderr
    assert "--shard" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_stopping_leaves_nothing(models, tmp_path):
    with pytest.raises(plymix.Cancelled):
        loras.extract(models / "b.safetensors", models / "a.safetensors",
                      tmp_path / "o.safetensors", rank=3, progress=lambda now: False)  # fmt: skip
    assert not list(tmp_path.iterdir())


# --- the command line


def run(capsys, *words):
    code = cli.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_commands(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = models / "a.safetensors", models / "b.safetensors"
    code, out, _ = run(capsys, "lora", "extract", b, a, "--rank", 4, "-o", "l.safetensors")
    assert code == 0
    assert "OUT11" in out
    assert "error" in out
    code, out, _ = run(capsys, "lora", "merge", "l.safetensors:0.5", "l.safetensors:-0.25",
                       "-o", "m.safetensors", "--json")  # fmt: skip
    found = json.loads(out)
    assert (code, found["error"], found["dialect"]) == (0, None, "kohya")
    code, out, _ = run(
        capsys, "lora", "resize", "l.safetensors", "--rank", 2, "--dry-run", "--json"
    )
    assert code == 0
    assert json.loads(out)["path"] is None
    assert json.loads(out)["blocks"][0]["rank_max"] == 2
    code, out, err = run(capsys, "lora", "convert", "l.safetensors", "-o", "m.safetensors",
                         "--to", "diffusers")  # fmt: skip
    assert code == 2
    assert "--force" in err
    code, out, err = run(capsys, "lora", "convert", "l.safetensors", "-o", "m.safetensors",
                         "--to", "diffusers", "--force")  # fmt: skip
    assert code == 0
    assert "exact" in out
    assert not any(line.rstrip().endswith(" 0") for line in out.splitlines())  # no rank is none
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.safetensors", "m.safetensors"]


def test_strict(tmp_path, capsys):
    file = lora_file(tmp_path / "l.safetensors", changes(1))
    tensors = {**load(file)[0], "bundle_emb.x.string_to_param.*": draw("F32", (2, 8))}
    save(file, tensors)
    out = tmp_path / "o.safetensors"
    code, _, err = run(capsys, "lora", "resize", file, "--rank", 2, "-o", out, "--strict")
    assert code == 2
    assert "bundle_emb" in err
    code, _, err = run(capsys, "lora", "resize", file, "--rank", 2, "-o", out)
    assert code == 0
    assert "note: l.safetensors: 1 tensor left out" in err


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (":", "'' is no strength; write FILE:0.8"),
        (":x", "'x' is no strength"),
        (":nan", "'nan' is no strength"),
        (":1:2:3", "'1:2:3' is no strength"),
        ("::", "':' is no strength"),
        (":1e999", "no number"),
        (":1e39", "alpha has numbers beyond what F32 can hold"),
    ],
)
def test_what_is_no_strength_is_said(tmp_path, end, text):
    file = lora_file(tmp_path / "größe mit leer:zeichen.safetensors", changes(1))
    with pytest.raises(plymix.Refusal) as e:
        loras.merge([f"{file}{end}"], tmp_path / "o.safetensors")
    assert text in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    loras.merge([f"{file}:0.5", str(file)], tmp_path / "o.safetensors")
    close(deltas(tmp_path / "o.safetensors")[name(Q)], 1.5 * deltas(file)[name(Q)])


def test_tags_are_looked_for_in_folders(tmp_path, capsys):
    (tmp_path / "loras" / "more").mkdir(parents=True)
    file = lora_file(tmp_path / "loras" / "more" / "l.safetensors", changes(1))
    out = tmp_path / "o.safetensors"
    code, _, _ = run(capsys, "lora", "merge", "<lora:l:0.5>", "--lora-dir", tmp_path, "-o", out)
    assert code == 0
    close(deltas(out)[name(Q)], 0.5 * deltas(file)[name(Q)])


@pytest.mark.parametrize("known", [True, False])
def test_strict_refuses_modules_of_no_known_model(tmp_path, capsys, known):
    more = {f"lora_unet_blob.lora_{end}.weight": draw("F32", shape)
            for end, shape in {"up": (8, 2), "down": (2, 8)}.items()}  # fmt: skip
    file = lora_file(tmp_path / "l.safetensors", changes(1) if known else {})
    save(file, {**load(file)[0], **more})
    out = tmp_path / "o.safetensors"
    code, _, err = run(capsys, "lora", "merge", file, "-o", out, "--strict")
    assert code == 2
    assert "1 modules are in no" in err
    assert "lora_unet_blob (l.safetensors); leave out --strict" in err
    assert not out.exists()
    code, _, err = run(capsys, "lora", "merge", file, "-o", out)
    assert code == 0
    assert ("1 modules are in no SD1 model" in err) == known
    assert "lora_unet_blob" in deltas(out)


# --- other architectures


@pytest.mark.parametrize(
    ("model", "to"),
    [
        ("sdxl", "kohya"),
        ("sdxl", "diffusers"),
        ("flux-dev", "diffusers"),
        ("sd3.5-medium", "comfyui"),
    ],
)
def test_a_whole_difference_comes_back(tmp_path, model, to):
    """One matrix of each kind is another in the tuned model, and is extracted at full rank."""
    h = header(model, dtype="F32")
    before, other = state(h, 0), state(h, 1)
    tables = ("embedding", "shared.weight", "attention_bias", "pos_embed", "first_stage", "vae.")
    kinds = {}
    for key, (_, shape) in h.items():
        if len(shape) > 1 and key.endswith("weight") and not any(t in key for t in tables):
            kinds.setdefault("".join(c for c in key if not c.isdigit()), key)
    tuned = {**before, **{key: other[key] for key in kinds.values()}}
    a, b, lora = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "l"))
    for path, tensors in ((a, before), (b, tuned)):
        save(path, {key: (dtype, tensors[key]) for key, (dtype, _) in h.items()})
    found = loras.extract(b, a, lora, rank=2048, to=to)
    after = bake(a, lora, tmp_path / "o.safetensors")
    assert len(kinds) > 30
    assert found.modules >= len(kinds)
    for key in h:
        if key in kinds.values():
            error = np.abs(after[key] - tuned[key]).max()
            assert error <= 2e-5 * np.abs(tuned[key] - before[key]).max(), key
        else:
            assert np.array_equal(after[key], before[key]), key


def test_models_in_diffusers_names_are_extracted_from_alike(models, tmp_path):
    from plymix import cli as commands

    assert commands.run(["convert", str(models / "b.safetensors"), str(tmp_path / "b")]) == 0
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    loras.extract(models / "b.safetensors", models / "a.safetensors", one, rank=2)
    loras.extract(tmp_path / "b", models / "a.safetensors", other, rank=2)
    x, y = read(one), read(other)
    assert x.keys() == y.keys()
    for key in x:
        np.testing.assert_array_equal(x[key], y[key])


def test_the_names_of_usual_models_are_the_golden_ones():
    import gzip

    import write_layouts  # isort: skip  (scripts/ is on the path since `tiny`)
    from plymix.adapters.spelling import layout

    assert {p.name.partition(".")[0] for p in write_layouts.LAYOUTS.glob("*.gz")} == set(
        write_layouts.OF
    )
    for arch, golden in write_layouts.OF.items():
        raw = json.loads(
            gzip.decompress((write_layouts.HEADERS / f"{golden}.json.gz").read_bytes())
        )
        shapes = {key.removeprefix(UNET): tuple(row[1]) for key, row in raw.items()}
        for key, shape in layout(arch).items():
            assert shapes[key.removeprefix(UNET)] == shape


def test_a_strength_of_0_leaves_out_what_a_spelling_cannot_say(tmp_path):
    file = lora_file(tmp_path / "l.safetensors", changes(1, (Q, TEXT)))
    result = loras.merge([f"{file}:1:0"], tmp_path / "o.safetensors", to="peft")
    assert result.formula == "l.safetensors, text encoder 0"
    ends = ("lora_B.weight", "lora_A.weight")
    got = deltas(tmp_path / "o.safetensors", ends)
    module = "base_model.model." + theirs(Q).removeprefix("unet.")
    assert got.keys() == {module}
    close(got[module], deltas(file)[name(Q)])
