"""Plans: every key accounted for, every refusal, folding, parts and channels."""

import time
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import archs, engine, expr, plan
from plymix.errors import Refusal
from plymix.recipe import from_dict
from small import deviation, draw, exact, load, real, result_bytes, save
from tiny import golden, header, read_safetensors, state, write, write_safetensors

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
CONV = UNET + "input_blocks.0.0.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def planned(*files, **options):
    """The plan of a merge of two files (three with c=)."""
    strict = options.pop("strict", False)
    return plan.build(plymix.two_models(*files, **options), strict=strict)


def refusal(*files, **options):
    """The one-line message that a merge is refused with, in under a second."""
    began = time.monotonic()
    with pytest.raises(Refusal) as caught, planned(*files, **options):
        pass
    assert time.monotonic() - began < 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(path, arch="sd1", seed=0, change=None, **options):
    """A small checkpoint whose header and values `change(header, values)` may alter."""
    rows = header(arch, **options)
    values = state(rows, seed)
    if change:
        change(rows, values)
        rows = {k: rows[k] for k in values}
    return write_safetensors(path, rows, values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write(folder / "a.safetensors", "sd1", 1), write(folder / "b.safetensors", "sd1", 2)


def contents(planned):
    """{key: bytes} of what a plan gives."""
    with planned:
        target = engine.MemoryTarget(planned.nbytes)
        placed, at = [], 0
        for tensor in planned.tensors:
            placed.append(replace(tensor, offset=at))
            at += tensor.nbytes
        engine.perform(engine.Job(planned.sources, target), placed)
        return {t.name: bytes(target.data[t.offset : t.offset + t.nbytes]) for t in placed}


# --- every key in exactly one class -------------------------------------------------------------


def classes(p, name):
    """How many keys of the input `name` are in the output, dropped, and unmatched but not there."""
    i = next(i for i in p.inputs if i.name == name)
    used = {
        leaf.info.name for t in p.tensors for leaf in expr.leaves(t.expr) if leaf.source == i.index
    }
    dropped = [k for keys in p.dropped[name].values() for k in keys]
    alone = [k for k in p.unmatched[name] if k not in used]
    return used, dropped, alone


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_every_key_of_every_input_is_in_one_class(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("keys")
    keys = list(header("sd1", ema=data.draw(st.booleans())))
    droppable = [k for k in keys if not k.startswith(UNET + "out") and "input_blocks.1." not in k]
    files = {}
    for name in "ab":
        lost = set(data.draw(st.lists(st.sampled_from(droppable), max_size=8)))
        renamed = set(data.draw(st.lists(st.sampled_from(droppable), max_size=4)))
        more = data.draw(st.lists(st.sampled_from(["x.y", "junk", UNET + "new.w"]), unique=True))

        def change(rows, values, lost=lost, renamed=renamed, more=more):
            for k in lost:
                values.pop(k, None)
            for k in renamed & values.keys():
                rows[k + "_"], values[k + "_"] = rows[k], values.pop(k)
            for k in more:
                rows[k], values[k] = ("F16", (2,)), np.zeros(2, "f2")

        ema = data.draw(st.booleans())
        files[name] = made(folder / f"{name}.safetensors", change=change, ema=ema)
    options = {
        "alpha": data.draw(st.sampled_from([0.0, 0.3, 1.0, "GRAD_V"])),
        "vae": data.draw(st.sampled_from(["a", "blend"])),
        "ema": data.draw(st.sampled_from(["drop", "keep"])),
        "union": data.draw(st.booleans()),
    }
    with planned(files["a"], files["b"], **options) as p:
        for name in "ab":
            used, dropped, alone = classes(p, name)
            total = [*used, *dropped, *alone]
            assert len(total) == len(set(total))
            every = set(read_safetensors(files[name])[0])
            assert set(total) == every, every ^ set(total)
        assert len(p.tensors) == len(p.fates) == p.merged + p.copied
        assert len({t.name for t in p.tensors}) == len(p.tensors)


def test_a_full_pair_has_nothing_left_over(pair):
    with planned(*pair, alpha=0.3) as p:
        assert not any(p.unmatched.values())
        assert [t.name for t in p.tensors] == list(header("sd1"))  # the base model's order
        assert classes(p, "a") == (set(header("sd1")), [], [])


def test_blocks_are_those_of_the_published_layout(pair):
    """A block alone at 1 takes from B exactly the tensors that the golden header puts there."""
    rows = golden("sd1")
    for block in (*archs.load("sd1").blocks, "BASE"):
        alpha = {"base": 1.0 * (block == "BASE"), "default": 0.0, "blocks": {}}
        if block != "BASE":
            alpha["blocks"] = {block: 1.0}
        with planned(*pair, alpha=alpha) as p:
            taken = {t.name for t in p.tensors if t.expr.source == 1}
        assert taken == {k for k, row in rows.items() if row[3] == block}


# --- keys that one model lacks ------------------------------------------------------------------


def without(*names):
    def change(rows, values):
        for name in names:
            values.pop(name)

    return change


@pytest.mark.parametrize(("method", "tensors"), [("slerp", 4), ("polar", 50)])
def test_the_memory_that_a_method_declares_is_told(tmp_path, method, tensors):
    x = draw("F16", (60, 40), 1)
    models = {n: str(save(tmp_path / f"{n}.safetensors", {"x": x})) for n in "ab"}
    steps = {"s": {"method": method, "a": "a", "b": "b"}}
    found = from_dict({"models": models, "steps": steps, "output": {"arch": "any"}})
    with plan.build(found) as planned:
        for threads in (1, 3):
            assert planned.memory(threads) == (64 << 20) + threads * tensors * 60 * 40 * 4


def test_keys_only_in_a_stay_and_only_in_b_are_left_out(tmp_path):
    mine, theirs = UNET + "out.0.bias", UNET + "middle_block.0.in_layers.0.bias"
    a = made(tmp_path / "a.safetensors", seed=1, change=without(theirs))
    b = made(tmp_path / "b.safetensors", seed=2, change=without(mine))
    with planned(a, b, alpha=0.3) as p:
        assert p.unmatched == {"a": (mine,), "b": (theirs,)}
        names = {t.name for t in p.tensors}
        assert mine in names
        assert theirs not in names
        assert p.fates[mine].how == "copied"
        assert any(mine in note and "not in b" in note for note in p.notes)
    with planned(a, b, alpha=0.3, union=True) as p:
        assert {t.name for t in p.tensors} == set(header("sd1"))
        got = contents(p)
    assert got[theirs] == load(b)[0][theirs][1].tobytes()
    said = refusal(a, b, alpha=0.3, strict=True)
    assert mine in said
    assert theirs in said


def test_what_is_unmatched_depends_on_the_files_alone(tmp_path):
    """Not on their order, nor on `union`: every key that one of them lacks, and no other."""
    first, *others = [k for k in header("sd1") if k.startswith(UNET + "out.")]
    lacks = {"a": [first], "b": others[:2], "c": [first, others[2]]}

    def change(name):
        def both(rows, values):
            without(*lacks[name])(rows, values)
            for extra in {"a": "zz.a", "b": "zz.all", "c": "zz.all"}[name], "zz.all":
                rows[extra], values[extra] = ("F16", (2,)), np.ones(2, np.float16)

        return both

    files = {n: made(tmp_path / f"{n}.safetensors", "sd1", 1, change(n)) for n in lacks}
    for names in permutations(lacks, 3):
        for count, union in product((2, 3), (False, True)):
            used = names[:count]
            models = {n: str(files[n]) for n in used}
            step = {"method": "n_average", "models": list(used)}
            output = {"union": union, "file": "o.ckpt"}
            asked = from_dict({"models": models, "steps": {"s": step}, "output": output})
            held = {n: set(load(files[n])[0]) for n in used}
            shared = set.intersection(*held.values())
            with plan.build(asked) as p:
                found = {n: set(keys) for n, keys in p.unmatched.items()}
                dropped = {n: {k for ks in p.dropped[n].values() for k in ks} for n in used}
            assert found == {n: keys - shared for n, keys in held.items()}
            assert not any(found[n] & dropped[n] for n in used)
            with pytest.raises(Refusal, match=f"--strict: {sum(map(len, found.values()))} keys"):
                plan.build(asked, strict=True)


def test_unknown_keys_of_b_are_added_by_union_and_said_to_be(tmp_path):
    def stranger(rows, values):
        some = next(k for k in values if k.endswith("bias"))
        rows["zz.extra"], values["zz.extra"] = rows[some], values[some]

    a = made(tmp_path / "a.safetensors", seed=1)
    b = made(tmp_path / "b.safetensors", seed=2, change=stranger)
    for union, fate in ((False, "left out"), (True, "added")):
        with planned(a, b, alpha=0.3, union=union) as p:
            assert any(f"{fate}: zz.extra" in note for note in p.notes)
            assert ("zz.extra" in {t.name for t in p.tensors}) == union


def test_add_difference_where_c_lacks_a_key_keeps_a(tmp_path):
    """Never a bare difference, never zeros."""
    key = UNET + "out.0.bias"
    files = [
        made(tmp_path / f"{n}.safetensors", seed=i, change=without(key) if n == "c" else None)
        for i, n in enumerate("abc")
    ]
    got = contents(planned(*files[:2], c=files[2], method="add_difference", alpha=0.7))
    assert got[key] == load(files[0])[0][key][1].tobytes()


def test_many_unmatched_keys_are_ten_and_a_count(tmp_path):
    lost = [k for k in header("sd1") if k.startswith(UNET + "output_blocks.3.")][:25]
    a = made(tmp_path / "a.safetensors", seed=1)
    b = made(tmp_path / "b.safetensors", seed=2, change=without(*lost))
    with planned(a, b) as p:
        note = next(n for n in p.notes if lost[0] in n)
    assert "25 tensors" in note
    assert "and 15 more" in note
    assert sum(k in note for k in lost) >= 10


# --- inpainting and pix2pix ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inpainting", "pix2pix"])
@pytest.mark.parametrize("order", ["wide first", "wide second"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_extra_input_channels(tmp_path, kind, order, alpha):
    wide = made(tmp_path / "wide.safetensors", f"sd1-{kind}", 1)
    plain = made(tmp_path / "plain.safetensors", "sd1", 2)
    files = (wide, plain) if order == "wide first" else (plain, wide)
    with planned(*files, alpha=alpha) as p:
        shape = next(t.shape for t in p.tensors if t.name == CONV)
        assert any("kept from wide.safetensors" in note for note in p.notes)
        got = np.frombuffer(contents(p)[CONV], "f2").reshape(shape)
    a, b = (load(f)[0][CONV][1] for f in files)
    w = load(wide)[0][CONV][1]
    assert shape == w.shape
    np.testing.assert_array_equal(got[:, 4:].view("u2"), w[:, 4:].view("u2"))
    pairs = [("F16", x[:, :4]) for x in (a, b)]
    want = exact([1 - alpha, alpha], pairs)
    assert deviation(("F16", got[:, :4]), want, "F16")[1] <= 1
    if alpha in (0.0, 1.0):
        assert got[:, :4].tobytes() == pairs[int(alpha)][1].tobytes()


@pytest.mark.parametrize("widest", [0, 1, 2])
def test_make_an_inpainting_model(tmp_path, widest):
    """A + alpha (B - C) with the inpainting model in any place."""
    files = [
        made(tmp_path / f"{n}.safetensors", "sd1-inpainting" if i == widest else "sd1", i)
        for i, n in enumerate("abc")
    ]
    got = contents(planned(*files[:2], c=files[2], method="add_difference", alpha=1.0))
    tensors = [load(f)[0] for f in files]
    wide = tensors[widest][CONV][1]
    conv = np.frombuffer(got[CONV], "f2").reshape(wide.shape)
    np.testing.assert_array_equal(conv[:, 4:], wide[:, 4:])
    want = exact([1, 1, -1], [("F16", t[CONV][1][:, :4]) for t in tensors])
    assert deviation(("F16", conv[:, :4]), want, "F16")[1] <= 1
    other = UNET + "out.2.weight"
    flat = np.frombuffer(got[other], "f2").reshape(tensors[0][other][1].shape)
    assert deviation(("F16", flat), exact([1, 1, -1], [t[other] for t in tensors]), "F16")[1] <= 1


def test_two_kinds_of_extra_channels_are_refused(tmp_path):
    a = made(tmp_path / "a.safetensors", "sd1-inpainting", 1)
    b = made(tmp_path / "b.safetensors", "sd1-pix2pix", 2)
    said = refusal(a, b)
    assert "9" in said
    assert "8" in said


def test_both_wide_is_a_plain_merge(tmp_path):
    files = [made(tmp_path / f"{n}.safetensors", "sd1-inpainting", i) for i, n in enumerate("ab")]
    with planned(*files, alpha=0.5) as p:
        assert expr.plain_terms(next(t for t in p.tensors if t.name == CONV).expr)


# --- names, bare models, EMA --------------------------------------------------------------------


def same_values(a, b, **options):
    """The merge of two files as {canonical key: bytes}."""
    place = archs.load("sd1").place
    return {place(k).key: v for k, v in contents(planned(a, b, **options)).items()}


def test_old_novelai_names_pair_with_the_usual_ones(tmp_path, pair):
    a, b = pair
    old = made(tmp_path / "old.safetensors", "sd1", 2, nai=True)
    write_nai_values(old, b)
    with planned(a, old, alpha=0.3) as p:
        assert not any(p.unmatched.values())
    assert same_values(a, old, alpha=0.3) == same_values(a, b, alpha=0.3)
    with planned(old, a) as p:  # the base model's spelling is kept
        assert all("text_model" not in t.name for t in p.tensors)


def write_nai_values(path, like):
    """The values of `like` under NovelAI's names (random values depend on the name)."""
    values = load(like)[0]
    save(path, {k.replace("transformer.text_model.", "transformer."): v for k, v in values.items()})


def test_a_bare_unet_with_a_checkpoint(tmp_path, pair):
    a, b = pair
    unet = {k: v for k, v in load(b)[0].items() if k.startswith(UNET)}
    bare = save(tmp_path / "bare.safetensors", {k.removeprefix(UNET): v for k, v in unet.items()})
    got, want = (contents(planned(a, x, alpha=0.3)) for x in (bare, b))
    assert {k: got[k] for k in unet} == {k: want[k] for k in unet}
    values = load(a)[0]
    for key in values:
        if not key.startswith(UNET):
            assert got[key] == values[key][1].tobytes()
    with planned(bare, a, alpha=0.3) as p:
        assert {t.name for t in p.tensors} == {k.removeprefix(UNET) for k in unet}


def test_ema(tmp_path):
    a = made(tmp_path / "a.safetensors", seed=1, ema=True)
    b = made(tmp_path / "b.safetensors", seed=2)
    ema = {k for k in header("sd1", ema=True) if k.startswith("model_ema.")}
    values = load(a)[0]
    with planned(a, b, alpha=0.3) as p:
        assert {t.name for t in p.tensors} == set(header("sd1"))
        assert set(p.dropped["a"]["ema = drop"]) == ema
    got = contents(planned(a, b, alpha=0.3, ema="keep"))
    for key in ema:
        assert got[key] == values[key][1].tobytes(), key
    got = contents(planned(a, b, alpha=0.3, ema="use"))
    assert got.keys() == header("sd1").keys()
    key = UNET + "out.2.weight"
    used = values["model_ema.diffusion_modelout2weight"]
    want = exact([0.7, 0.3], [used, load(b)[0][key]])
    flat = np.frombuffer(got[key], "f2").reshape(want.shape)
    assert deviation(("F16", flat), want, "F16")[1] <= 1


# --- VAE and text encoder -----------------------------------------------------------------------


def vae_keys():
    return [k for k, row in golden("sd1").items() if row[2] == "vae"]


@pytest.mark.parametrize("vae", ["a", "b"])
def test_the_vae_is_one_of_them(pair, vae):
    got = contents(planned(*pair, alpha=0.3, vae=vae))
    owner = load(pair["ab".index(vae)])[0]
    for key in vae_keys():
        assert got[key] == owner[key][1].tobytes()


def test_the_vae_is_blended_only_when_asked(pair):
    a, b = (load(f)[0] for f in pair)
    got = contents(planned(*pair, alpha=0.3, vae="blend"))
    key = VAE + "decoder.conv_in.weight"
    want = exact([0.7, 0.3], [a[key], b[key]])
    assert (
        deviation(("F16", np.frombuffer(got[key], "f2").reshape(want.shape)), want, "F16")[1] <= 1
    )


def test_b_without_vae_leaves_that_of_a(tmp_path, pair):
    b = made(tmp_path / "b.safetensors", seed=2, change=without(*vae_keys()))
    got = contents(planned(pair[0], b, alpha=0.3))
    for key in vae_keys():
        assert got[key] == load(pair[0])[0][key][1].tobytes()


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_a_vae_file(tmp_path, pair, prefix):
    rows = {k: draw("F16", golden_shape(k), 9) for k in vae_keys()}
    file = save(
        tmp_path / "vae.safetensors", {prefix + k.removeprefix(VAE): v for k, v in rows.items()}
    )
    got, plain = (
        contents(planned(*pair, alpha=0.3, vae=str(file))),
        contents(planned(*pair, alpha=0.3)),
    )
    assert got.keys() == plain.keys()
    for key in got:
        assert got[key] == (rows[key][1].tobytes() if key in rows else plain[key]), key


def golden_shape(key):
    return header("sd1")[key][1]


def test_a_vae_file_that_lacks_a_tensor(tmp_path, pair):
    rows = {k.removeprefix(VAE): draw("F16", golden_shape(k), 9) for k in vae_keys()[1:]}
    said = refusal(*pair, vae=str(save(tmp_path / "vae.safetensors", rows)))
    assert vae_keys()[0] in said
    assert "vae.safetensors" in said


def test_a_vae_of_another_width(tmp_path, pair):
    rows = {k.removeprefix(VAE): draw("F16", golden_shape(k), 9) for k in vae_keys()}
    key = "decoder.conv_in.weight"
    shape = rows[key][1].shape
    rows[key] = draw("F16", (shape[0], 16, *shape[2:]), 9)
    assert "16" in refusal(*pair, vae=str(save(tmp_path / "vae.safetensors", rows)))


def test_what_is_no_vae(tmp_path, pair):
    said = refusal(*pair, vae=str(made(tmp_path / "x.safetensors", "sdxl")))
    assert "SDXL" in said
    nothing = save(tmp_path / "n.safetensors", {"foo": draw("F16", (2,))})
    assert "n.safetensors has no VAE" in refusal(*pair, vae=str(nothing))


def test_text_encoder_of_another_model(tmp_path, pair):
    models = {
        "a": str(pair[0]),
        "b": str(pair[1]),
        "t": str(made(tmp_path / "t.safetensors", seed=7)),
    }
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}
    found = from_dict(
        {"models": models, "steps": {"m": step}, "output": {"text_encoder": "t", "vae": "b"}}
    )
    got = result_bytes(found)
    t, b = load(tmp_path / "t.safetensors")[0], load(pair[1])[0]
    for key, (_, _, component, block) in golden("sd1").items():
        if component == "text_encoder" and block != "BUFFER":
            assert got[key] == t[key][1].tobytes()
        if component == "vae":
            assert got[key] == b[key][1].tobytes()


# --- refusals -----------------------------------------------------------------------------------


def test_two_architectures(tmp_path, pair):
    x = made(tmp_path / "x.safetensors", "sdxl")
    for files in ((pair[0], x), (x, pair[0])):
        said = refusal(*files)
        for word in ("SD1", "SDXL", "x.safetensors", "a.safetensors", "cannot"):
            assert word in said


def test_a_vae_or_lora_as_a_model(tmp_path, pair):
    vae = save(
        tmp_path / "v.safetensors",
        {k.removeprefix(VAE): draw("F16", golden_shape(k)) for k in vae_keys()},
    )
    said = refusal(pair[0], vae)
    assert "VAE" in said
    assert "--vae v.safetensors" in said
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = save(
        tmp_path / "l.safetensors",
        {
            f"{module}.lora_down.weight": draw("F16", (4, 768)),
            f"{module}.lora_up.weight": draw("F16", (320, 4)),
        },
    )
    said = refusal(pair[0], lora)
    assert "LoRA" in said
    assert "l.safetensors" in said


def test_an_unknown_architecture_needs_any(tmp_path):
    files = [
        save(tmp_path / f"{n}.safetensors", {"blk.0.w": draw("F16", (3,), i)})
        for i, n in enumerate("ab")
    ]
    said = refusal(*files)
    assert "blk.0.w" in said
    assert "--arch any" in said
    got = contents(planned(*files, arch="any", alpha=1.0))
    assert got["blk.0.w"] == load(files[1])[0]["blk.0.w"][1].tobytes()
    assert "arch" in refusal(*files, arch="any", vae="b")


def test_mixed_prediction(tmp_path, pair):
    v = made(tmp_path / "v.safetensors", seed=1, markers=("v_pred", "ztsnr"))
    e = save(tmp_path / "e.safetensors", load(pair[0])[0], {"modelspec.prediction_type": "epsilon"})
    for files in ((v, e), (e, v)):
        assert "--allow-mixed-prediction" in refusal(*files)
        with planned(*files, allow_mixed_prediction=True) as p:
            markers = {t.name for t in p.tensors} & {"v_pred", "ztsnr"}
        assert markers == ({"v_pred", "ztsnr"} if files[0] == v else set())
    x, xv = (made(tmp_path / f"x{m}.safetensors", "sdxl", markers=m) for m in ((), ("v_pred",)))
    assert "predicts" in refusal(x, xv)  # SDXL without a marker is epsilon


def test_two_v_models_keep_their_markers(tmp_path):
    files = [
        made(tmp_path / f"{n}.safetensors", seed=i, markers=("v_pred", "ztsnr"))
        for i, n in enumerate("ab")
    ]
    plymix.merge(*files, tmp_path / "o.safetensors")
    tensors, metadata = load(tmp_path / "o.safetensors")
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    "side", ["scaled_fp8", UNET + "out.2.scale_weight", UNET + "out.2.weight.absmax"]
)
def test_quantised_weights(tmp_path, pair, side):
    q = save(tmp_path / "q.safetensors", load(pair[1])[0] | {side: draw("F32", (1,))})
    said = refusal(pair[0], q)
    assert side in said
    assert "q.safetensors" in said


def test_one_key_in_two_spellings(tmp_path, pair):
    values = load(pair[1])[0]
    key = next(k for k in values if k.startswith(TEXT) and "position" not in k)
    twice = values | {key.replace("transformer.text_model.", "transformer."): values[key]}
    said = refusal(pair[0], save(tmp_path / "t.safetensors", twice))
    assert "twice" in said


def test_shapes_that_differ(tmp_path, pair):
    values = load(pair[1])[0]
    key = UNET + "middle_block.0.emb_layers.1.weight"
    odd = save(tmp_path / "o.safetensors", values | {key: draw("F16", (3, 5))})
    said = refusal(pair[0], odd)
    assert key in said
    assert "[3, 5]" in said


# --- lists of weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "blocks"), [("sd1", 25), ("sd2", 25), ("sdxl", 19)])
def test_lists(tmp_path, arch, blocks):
    files = [made(tmp_path / f"{n}.safetensors", arch, i) for i, n in enumerate("ab")]
    names = archs.load(arch).blocks
    assert len(names) == blocks
    numbers = [round(0.01 * (i + 1), 2) for i in range(blocks)]
    for base, some in ((0.0, numbers), (0.9, [0.9, *numbers])):
        with planned(*files, alpha=some) as p:
            found = p.weights["merge"]["alpha"]
            assert found.base == base
            assert list(found.blocks.values()) == numbers
            for t in p.tensors:
                place = p.places[t.name]
                terms = {leaf.source: c for c, leaf in expr.plain_terms(t.expr)}
                if place.buffer or place.component == "vae":
                    assert terms == {0: 1.0}
                else:
                    alpha = dict(zip(names, numbers, strict=True)).get(place.block, base)
                    assert terms.get(1, 0.0) == alpha
    for wrong in (blocks - 1, blocks + 3, 1, 0):
        said = refusal(*files, alpha=[0.5] * wrong)
        assert str(blocks) in said
        assert str(blocks + 1) in said


def test_the_text_encoder_share(pair):
    key = next(k for k, row in golden("sd1").items() if row[3] == "BASE")
    cases = [
        ({"alpha": 0.3}, 0.3),
        ({"alpha": 0.3, "base": 0.8}, 0.8),
        ({"alpha": "GRAD_V"}, 0.0),
        ({"alpha": "GRAD_V", "base": 0.8}, 0.8),
        ({"alpha": [0.25] + [0.5] * 25}, 0.25),
    ]
    for options, share in cases:
        with planned(*pair, **options) as p:
            t = next(t for t in p.tensors if t.name == key)
            terms = {leaf.source: c for c, leaf in expr.plain_terms(t.expr)}
            assert terms.get(1, 0.0) == share, options


def test_one_weight_by_blocks_for_each_of_several_models(pair):
    """A list of weights may hold presets and tables; they must say BASE, which has no default."""
    models = {"a": str(pair[0]), "b": str(pair[1])}

    def built(weights):
        step = {"method": "n_average", "models": ["a", "b"], "weights": weights}
        return plan.build(from_dict({"models": models, "steps": {"mix": step}}))

    named = {"base": 0.5, "default": 1, "blocks": {"M00": 3}}
    with built([1, named]) as p:
        shares = {
            p.places[t.name].block: {leaf.source: c for c, leaf in expr.plain_terms(t.expr)}[1]
            for t in p.tensors
            if p.places[t.name].block in ("IN05", "M00", "BASE")
        }
    assert shares == {"IN05": 0.5, "M00": 0.75, "BASE": pytest.approx(1 / 3)}
    for weight in ({"M00": 0.5, "default": 1}, "GRAD_V", [0.5] * 25):
        with pytest.raises(Refusal, match=r"steps\.mix\.weights: value 2 says nothing about BASE"):
            built([1, weight])
    with pytest.raises(Refusal, match=r"steps\.mix \(n_average\): weights .* sum to 0"):
        built([1, -1])


# --- folding ------------------------------------------------------------------------------------

NODES = st.recursive(
    st.integers(0, 3),
    lambda inner: st.tuples(
        st.sampled_from(["weighted_sum", "add_difference", "triple_sum"]),
        inner,
        inner,
        inner,
        st.floats(-1, 2).map(lambda x: round(x, 6)),
    ),
    max_leaves=8,
)


def coefficients(node):
    """What a nest of methods comes to, one number per model, from the formulas."""
    if isinstance(node, int):
        return np.eye(4)[node]
    method, a, b, c, alpha = node
    a, b, c = map(coefficients, (a, b, c))
    return {
        "weighted_sum": (1 - alpha) * a + alpha * b,
        "add_difference": a + alpha * (b - c),
        "triple_sum": (1 - alpha - 0.25) * a + alpha * b + 0.25 * c,
    }[method]


@given(NODES.filter(lambda n: not isinstance(n, int)))
@settings(max_examples=40, deadline=None)
def test_any_nest_of_linear_methods_is_one_sum(tmp_path_factory, node):
    folder = tmp_path_factory.mktemp("nest")
    tensors = [draw("F16", (500,), i) for i in range(4)]
    files = [save(folder / f"m{i}.safetensors", {"x": t}) for i, t in enumerate(tensors)]
    steps = {}

    def add(n):
        if isinstance(n, int):
            return f"m{n}"
        method, *inputs, alpha = n
        names = dict(
            zip("abc", map(add, inputs[: 2 if method == "weighted_sum" else 3]), strict=False)
        )
        steps[f"s{len(steps)}"] = {"method": method, **names, "alpha": alpha}
        return f"s{len(steps) - 1}"

    last = add(node)
    found = from_dict(
        {
            "models": {f"m{i}": str(f) for i, f in enumerate(files)},
            "steps": steps,
            "output": {"from": last, "arch": "any"},
        }
    )
    with plan.build(found) as p:
        (tensor,) = p.tensors
        terms = expr.plain_terms(tensor.expr)
        assert terms or tensor.expr == expr.Sum(())
    got = ("F16", np.frombuffer(result_bytes(found)["x"], "f2"))
    want = exact(coefficients(node), tensors)
    largest = np.max([np.abs(real(t)) for t in tensors])
    size = np.abs(coefficients(node)).max()
    # the folded coefficients are float64: what they lose is all that may be lost
    assert deviation(got, want, "F16", float(largest * (1 + size)) * 2.0**-40)[1] <= 1


def test_an_input_with_coefficient_0_is_never_read(pair):
    p = planned(*pair, alpha={"base": 0.0, "default": 0.0, "blocks": {"M00": 0.5}})
    second = p.inputs[1].source
    blocks = {
        (t.offset, t.offset + t.nbytes)
        for k, t in second.tensors.items()
        if k in golden("sd1") and golden("sd1")[k][3] == "M00"
    }
    read = second.read_at
    seen = []

    def only_middle(file, offset, out):
        n = len(memoryview(out).cast("B"))
        assert any(a <= offset and offset + n <= b for a, b in join(blocks)), offset
        seen.append(offset)
        read(file, offset, out)

    second.read_at = only_middle
    contents(p)
    assert seen
    expected = sum(b - a for a, b in blocks)
    assert p.bytes_read == p.nbytes + expected


def join(spans):
    out = []
    for a, b in sorted(spans):
        if out and out[-1][1] == a:
            out[-1][1] = b
        else:
            out.append([a, b])
    return out


def test_inputs_that_cancel_are_never_read(tmp_path):
    """B + 1 (C - C): the plan is a copy of B."""
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (9,), i)})
        for i, n in enumerate("bc")
    }
    models = {"b": str(files["b"]), "c": str(files["c"])}
    step = {"method": "add_difference", "a": "b", "b": "c", "c": "c", "alpha": 0.7}
    with plan.build(
        from_dict({"models": models, "steps": {"s": step}, "output": {"arch": "any"}})
    ) as p:
        assert p.copied == 1
        assert p.tensors[0].expr == expr.Leaf(0, p.inputs[0].source.tensors["x"])


def test_linear_layer_and_1x1_convolution_pair(tmp_path):
    key = UNET + "input_blocks.4.1.proj_in.weight"

    def flatten(rows, values):
        kind, shape = rows[key]
        rows[key], values[key] = (kind, shape[:2]), values[key].reshape(shape[:2])

    conv = made(tmp_path / "conv.safetensors", seed=1)
    flat = made(tmp_path / "flat.safetensors", seed=2, change=flatten)
    shape = golden_shape(key)
    assert shape[2:] == (1, 1)
    for files, wanted in (((conv, flat), shape), ((flat, conv), shape[:2])):
        with planned(*files, alpha=0.3) as p:
            assert next(t.shape for t in p.tensors if t.name == key) == wanted
            got = contents(p)[key]
        pair = [("F16", load(f)[0][key][1].reshape(-1)) for f in files]
        assert deviation(("F16", np.frombuffer(got, "f2")), exact([0.7, 0.3], pair), "F16")[1] <= 1


def test_dtype_of_the_output(tmp_path, pair):
    for name, dtype in {"keep": "F16", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}.items():
        with planned(*pair, alpha=0.0, dtype=name) as p:
            weights = [t for t in p.tensors if not p.places[t.name].buffer]
            assert {t.dtype for t in weights} == {dtype}
    half = made(tmp_path / "half.safetensors", seed=1, dtype="BF16")
    with planned(pair[0], half, alpha=1.0) as p:  # the base model's dtype, whoever gives the values
        assert {t.dtype for t in p.tensors if not p.places[t.name].buffer} == {"F16"}


def test_locate(tmp_path):
    (tmp_path / "sub").mkdir()
    file = save(tmp_path / "sub" / "m.safetensors", {"x": draw("F16", (1,))})
    assert plan.locate("m.safetensors", [tmp_path, tmp_path / "sub"]) == file
    assert plan.locate("sub/m.safetensors", [tmp_path]) == file
    assert not plan.locate("n.safetensors", [tmp_path]).exists()


def test_a_refused_plan_closes_its_files(pair, tmp_path):
    opened = []

    def spy(path):
        opened.append(plymix.open(path))
        return opened[-1]

    with pytest.raises(Refusal):
        plan.build(plymix.two_models(*pair, alpha=[1.0] * 7), open_file=spy)
    assert len(opened) == 2
    assert all(h._file.closed for s in opened for h in s.handles)
