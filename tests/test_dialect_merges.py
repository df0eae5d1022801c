"""The same weights in another tool's names give the same merge, byte for byte.

Files in diffusers' names are made here from the golden maps with numpy alone (see `maps`).
"""

import json

import numpy as np
import pytest

import plymix
import tiny
from maps import ARCH, converted, golden_map
from plymix import api, archs, engine, pairing, plan, replay
from plymix.cli.merging import classic
from plymix.errors import Refusal
from plymix.expr import Leaf, Sum, Tensor, leaves
from plymix.formats import open_model
from plymix.formats.base import Handle, Source, TensorInfo
from plymix.recipe import from_dict
from small import data, load, recipe, result_bytes, save

ENCODER = "cond_stage_model.model.transformer.resblocks."
MODELS = ["sd1", "sd2", "sdxl"]
STEMS = {"text_encoder": "model", "text_encoder_2": "model"}


def weights(model, seed, **options):
    """{canonical key: (dtype, array)} of a small model."""
    made = tiny.header(model, **options)
    values = tiny.state(made, seed)
    return {key: (dtype, values[key]) for key, (dtype, _) in made.items()}


def in_diffusers_names(model, tensors, components=()):
    """{component: {diffusers key: (dtype, array)}} of what a diffusers folder holds."""
    out = {}
    arch = archs.load(ARCH[model])
    tensors = {arch.place(key).key: tensor for key, tensor in tensors.items()}
    for component in components or golden_map(model):
        for key, (names, transform) in golden_map(model)[component].items():
            dtype, values = tensors[key]
            made = converted(values, names, transform)
            out.setdefault(component, {}).update({n: (dtype, x) for n, x in made.items()})
    return out


def dropped(model):
    """The canonical keys that a diffusers folder does not hold."""
    rows = (row for rows in golden_map(model).values() for row in rows.items())
    return {key for key, (names, _) in rows if not names}


def single(path, model, seed=0):
    return save(path, weights(model, seed))


def folder(path, model, seed=0, prediction="epsilon", **others):
    """A diffusers folder of the same weights as `single` has; `others` are more components."""
    components = in_diffusers_names(model, weights(model, seed)) | others
    path.mkdir()
    names = {name: ["diffusers", "Class"] for name in (*components, "scheduler")}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **names}))
    for name, tensors in components.items():
        part = path / name
        part.mkdir()
        (part / "config.json").write_text("{}")
        save(part / f"{STEMS.get(name, 'diffusion_pytorch_model')}.safetensors", tensors)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": prediction})
    )
    return path


def mix(a, b, alpha=0.5, **options):
    """What a merge of two files gives, as {key: bytes}."""
    return result_bytes(recipe({"a": a, "b": b}, alpha, arch="", **options))


def run(models, step, **output):
    """What one step gives, as {key: bytes}."""
    said = {"models": {n: str(p) for n, p in models.items()}, "steps": {"s": step}}
    return result_bytes(from_dict(said | {"output": output}))


def planned(a, b, **options):
    return plan.build(recipe({"a": a, "b": b}, 0.5, arch="", **options))


def differing(got, want):
    """The keys of `got` that `want` has otherwise or not at all."""
    return {key for key, value in got.items() if want.get(key) != value}


def raw(tensors):
    return {key: x.tobytes() for key, (_, x) in tensors.items()}


def halves(made, found):
    """The float16 tensors of {key: bytes} with a header, as `weights` gives them."""
    return {
        key: ("F16", np.frombuffer(value, np.float16).reshape(made[key][1]))
        for key, value in found.items()
        if made[key][0] == "F16"
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{model: {"a", "b", "c": single files, "da", "db", "dc": the same as diffusers folders}}"""
    home = tmp_path_factory.mktemp("models")
    out = {}
    for model in MODELS:
        out[model] = {}
        for seed, name in enumerate("abc"):
            out[model][name] = single(home / f"{model}-{name}.safetensors", model, seed)
            out[model]["d" + name] = folder(home / f"{model}-{name}", model, seed)
    return out


# --- the same bytes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_the_same_merge_from_folders_and_files(files, model, alpha):
    f = files[model]
    want, lost = mix(f["a"], f["b"], alpha), dropped(model)

    # a file is the base: what the folder lacks is the file's
    own = data(f["a"])
    want_here = {key: (own if key in lost else want)[key] for key in want}
    assert mix(f["a"], f["db"], alpha) == want_here

    # a folder is the base: the result has the names of checkpoints
    want_there = {key: want[key] for rows in golden_map(model).values() for key in rows}
    want_there = {key: value for key, value in want_there.items() if key not in lost}
    assert len(want_there) > 900
    for second in ("b", "db"):
        assert mix(f["da"], f[second], alpha) == want_there


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_merge_in_another_dtype(files, dtype):
    f = files["sdxl"]
    got = mix(f["da"], f["db"], dtype=dtype)
    assert len(got) > 2000
    assert not differing(got, mix(f["a"], f["b"], dtype=dtype))


STEPS = [
    {"method": "slerp", "a": "a", "b": "b", "alpha": 0.4},
    {"method": "ties", "base": "a", "models": ["b", "c"], "density": 0.5},
    {"method": "ties_dare", "base": "a", "models": ["b", "c"], "seed": 7},
    {"method": "train_difference", "a": "a", "b": "b", "c": "c"},
]


@pytest.mark.parametrize("model", ["sd2", "sdxl"])
@pytest.mark.parametrize("step", STEPS, ids=[step["method"] for step in STEPS])
def test_methods_see_the_fused_tensors(files, model, step):
    f = files[model]
    used = [n for n in "abc" if n in str(step.values())]
    got = run({n: f["d" + n] for n in used}, step)
    fused = [key for key in got if key.endswith("attn.in_proj_weight")]
    assert len(fused) == (23 if model == "sd2" else 32)
    assert not differing(got, run({n: f[n] for n in used}, step))


@pytest.mark.parametrize("model", MODELS)
def test_end_points_are_the_inputs_bytes(files, model):
    f = files[model]
    of_a, of_b = data(f["a"]), data(f["b"])
    assert mix(f["a"], f["db"], 0.0) == of_a
    assert not differing(mix(f["da"], f["b"], 0.0), of_a)
    got = mix(f["da"], f["db"], 1.0)
    vae = {key: value for key, value in got.items() if key.startswith("first_stage_model.")}
    assert len(vae) == 248
    assert not differing(vae, of_a)
    assert not differing({key: got[key] for key in got.keys() - vae.keys()}, of_b)


def test_every_spelling_of_sd1(tmp_path, files):
    f = files["sd1"]
    b = weights("sd1", 1)
    unet = {key: tensor for key, tensor in b.items() if key.startswith(tiny.UNET)}
    there = in_diffusers_names("sd1", b)
    bare = {key.removeprefix(tiny.UNET): tensor for key, tensor in unet.items()}
    nai = {key.replace(tiny.TEXT, tiny.TEXT.removesuffix(tiny.NAI)): t for key, t in b.items()}
    want, own = mix(f["a"], f["b"]), data(f["a"])
    only_unet = {key: (want if key in unet else own)[key] for key in want}
    for name, tensors, expected in (
        ("bare", bare, only_unet),
        ("diffusion_pytorch_model", there["unet"], only_unet),
        ("nai", nai, want),
    ):
        path = save(tmp_path / f"{name}.safetensors", tensors)
        assert mix(f["a"], path) == expected, name
    # and the other way round
    got = mix(tmp_path / "diffusion_pytorch_model.safetensors", f["a"])
    assert got == raw(
        in_diffusers_names("sd1", halves(tiny.header("sd1"), want), ("unet",))["unet"]
    )
    got = mix(f["db"], tmp_path / "nai.safetensors")
    assert not differing(got, data(f["b"]))


@pytest.mark.parametrize("model", ARCH)
def test_denoisers_in_one_file(tmp_path, model):
    arch = archs.load(ARCH[model])
    component = arch.denoiser.name
    rows = golden_map(model)[component]
    sizes = {"full_width": True} if model == "lumina2" else {}  # its q, k, v: 5 unequal parts
    made = tiny.header(model, **sizes)
    if sizes:
        made = {k: (d, tuple(n if n % 32 else n // 32 for n in s)) for k, (d, s) in made.items()}
    made = {key: made[key] for key in made if arch.place(key).key in rows}
    for seed, name in enumerate("ab"):
        values = tiny.state(made, seed)
        tensors = {key: (dtype, values[key]) for key, (dtype, _) in made.items()}
        save(tmp_path / f"{name}.safetensors", tensors)
        theirs = in_diffusers_names(model, tensors, (component,))[component]
        save(tmp_path / f"d{name}.safetensors", theirs)
    names = {arch.place(key).key: key for key in made}
    lost = {names[key] for key in dropped(model) & names.keys()}
    a, b, da, db = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "da", "db"))
    with planned(da, b) as found:
        assert found.arch == arch
        assert found.base.paired.dialect == "diffusers"
        assert not [note for note in found.notes if "has the names" in note]
        assert len(found.places) == len(found.fates) == len(found.tensors)
    slerp = {"method": "slerp", "a": "a", "b": "b", "alpha": 0.3}  # needs its tensors whole
    for merge in (mix, lambda a, b: run({"a": a, "b": b}, slerp)):
        want = merge(a, b)
        got = merge(a, db)
        assert got.keys() == want.keys()
        assert differing(got, want) <= lost
        # the result of a file in diffusers' names has them too
        want = raw(in_diffusers_names(model, halves(made, want), (component,))[component])
        for second in (b, db):
            assert merge(da, second) == want


def test_what_a_component_file_cannot_hold_makes_a_checkpoint(files):
    f = files["sdxl"]
    file = f["da"] / "unet" / "diffusion_pytorch_model.safetensors"
    a, b = data(f["a"]), data(f["b"])
    with planned(file, f["b"], vae="b") as found:
        assert any("has the names of SDXL checkpoints" in note for note in found.notes)
    got = mix(file, f["b"], 0.0, vae="b")
    assert not differing(got, a | {k: v for k, v in b.items() if k.startswith("first_stage")})
    assert len(got) == 1680 + 248


# --- components


def test_a_vae_from_a_folder_or_file(files):
    f = files["sdxl"]
    a, b = data(f["a"]), data(f["b"])
    vae = {key for key in a if key.startswith("first_stage_model.")}
    file = f["db"] / "vae" / "diffusion_pytorch_model.safetensors"
    for given in (f["db"], f["db"] / "model_index.json", f["db"] / "vae", file):
        got = mix(f["a"], f["a"], 0.0, vae=str(given))
        assert got == {key: (b if key in vae else a)[key] for key in a}


def test_the_text_encoder_of_a_folder(files):
    f = files["sd2"]
    a, b = data(f["a"]), data(f["b"])
    lost = dropped("sd2")
    assert sum(key.startswith(f"{ENCODER}23.") for key in lost) == 12
    took = {key for key in a if key.startswith("cond_stage_model.")} - lost
    want = {key: (b if key in took else a)[key] for key in a}
    for given in (f["db"], f["db"] / "text_encoder"):
        assert mix(f["a"], f["a"], 0.0, text_encoder=str(given)) == want
    with planned(f["a"], f["a"], text_encoder=str(f["db"])) as found:
        notes = [note for note in found.notes if "resblocks.23" in note]
    assert notes == [
        "sd2-b has no cond_stage_model.model.transformer.resblocks.23:"
        " the text encoder of SD2 ends with layer 22 in diffusers; sd2-a.safetensors's is taken"
    ]


@pytest.mark.parametrize(
    ("model", "component"),
    [("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")],
)
@pytest.mark.parametrize("kind", ["part", "checkpoint"])
def test_a_text_encoder_that_came_out_of_a_folder(tmp_path, files, model, component, kind):
    """In one file it still lacks what no diffusers folder has: that stays the base's."""
    f, part = files[model], tmp_path / "part.safetensors"
    if kind == "part":
        plymix.extract(f["db"], component, part)
    else:
        plymix.convert(f["db"], part)
    a, b = data(f["a"]), data(f["b"])
    start = archs.load(model).component(component).prefixes[0]
    if component == "text_encoder" and model == "sdxl" and kind == "checkpoint":
        start = "conditioner.embedders."  # all encoders there are
    took = {key for key in a if key.startswith(start)} - dropped(model)
    took = {key for key in took if not key.endswith("position_ids")}
    assert len(took) > 100
    got = mix(f["a"], f["a"], 0.0, **{component: str(part)})
    assert got == {key: (b if key in took else a)[key] for key in a}
    broken = load(part)[0]
    gone = next(
        k for k in broken if k.endswith(("fc1.bias", "c_fc.bias")) and "embedders.0" not in k
    )
    del broken[gone]
    save(part, broken)
    with pytest.raises(Refusal, match=r"lacks 1 of the \d+ text_encoder"):
        planned(f["a"], f["a"], **{component: str(part)})


def test_a_component_of_another_architecture_is_refused(files):
    with pytest.raises(Refusal, match=r"VAE of sdxl-b \(SDXL checkpoint \(diffusers names\)\)"):
        planned(files["sd1"]["a"], files["sd1"]["b"], vae=str(files["sdxl"]["db"]))
    with pytest.raises(Refusal, match="cannot be merged"):
        planned(files["sd1"]["a"], files["sdxl"]["db"])


def test_inpainting_from_a_folder(tmp_path, files):
    f = files["sd1"]
    nine = single(tmp_path / "nine.safetensors", "sd1-inpainting", 5)
    there = in_diffusers_names("sd1", load(nine)[0])
    unet = save(tmp_path / "unet.safetensors", there["unet"])
    key = tiny.UNET + "input_blocks.0.0.weight"
    with planned(f["da"], unet) as found:
        assert found.inputs[1].detection.variant == "inpainting"
    one = mix(f["a"], nine)
    assert len(one[key]) == 8 * 9 * 9 * 2
    for second in (unet, nine):
        got = mix(f["da"], second)
        assert got[key] == one[key]
    assert mix(unet, f["da"])["conv_in.weight"] == mix(nine, f["a"])[key] == one[key]


# --- accounts


def test_what_has_no_place_is_left_out_and_named(tmp_path):
    checker = {"concept_embeds": ("F16", np.zeros(3, np.float16))}
    b = folder(tmp_path / "b", "sd1", 1, safety_checker=checker)
    unet = b / "unet" / "diffusion_pytorch_model.safetensors"
    save(unet, load(unet)[0] | {"time_embedding.cond_proj.weight": checker["concept_embeds"]})
    a = single(tmp_path / "a.safetensors", "sd1")
    for first, second in ((a, b), (b, a)):
        with planned(first, second) as found:
            name = "a" if first is b else "b"
            why = "safety_checker is no part of SD1 checkpoints"
            assert found.dropped[name][why] == ("safety_checker/concept_embeds",)
            assert "unet/time_embedding.cond_proj.weight" in found.unmatched[name]
            assert f"b: 1 tensor left out: {why}" in found.notes
            assert any("time_embedding.cond_proj" in note for note in found.notes)
            assert not any("concept" in t.name or "cond_proj" in t.name for t in found.tensors)
            used = {leaf.info.name for t in found.tensors for leaf in leaves(t.expr)}
            assert "unet/time_embedding.cond_proj.weight" not in used
    with pytest.raises(Refusal, match="cond_proj"):
        plan.build(recipe({"a": a, "b": b}, arch=""), strict=True)


def test_parts_of_a_tensor_that_is_not_whole_are_told(tmp_path):
    broken = folder(tmp_path / "xl", "sdxl", 1)
    file = broken / "text_encoder_2" / "model.safetensors"
    tensors = load(file)[0]
    attention = "text_model.encoder.layers.3.self_attn."
    del tensors[f"{attention}q_proj.weight"]
    save(file, tensors)
    found = plymix.convert(broken, tmp_path / "o.safetensors")
    name = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    assert f"xl: 2 tensors left out: the rest of {name} is not there" in found.notes
    assert not any("unknown to" in note for note in found.notes)
    assert name not in load(tmp_path / "o.safetensors")[0]
    plymix.convert(broken, tmp_path / "again")  # in diffusers' names they stay
    again = load(tmp_path / "again" / "text_encoder_2" / "model.safetensors")[0]
    assert again.keys() == tensors.keys()


def test_a_component_file_keeps_what_only_it_has(tmp_path, files):
    # The U-Nets of latent consistency models have a tensor more than any checkpoint's.
    there = in_diffusers_names("sd1", weights("sd1", 0))["unet"]
    extra = {"time_embedding.cond_proj.weight": ("F16", np.ones((8, 4), np.float16))}
    unet = save(tmp_path / "lcm.safetensors", there | extra)
    b = files["sd1"]["b"]
    with planned(unet, b) as found:
        assert found.unmatched["a"] == tuple(extra)  # kept, and said to be unmatched
        assert (
            "lcm.safetensors: 1 tensor unknown to SD1, copied: time_embedding.cond_proj.weight"
            in found.notes
        )
    got = mix(unet, b)
    assert got.keys() == there.keys() | extra.keys()
    assert got["time_embedding.cond_proj.weight"] == np.ones(32, np.float16).tobytes()
    assert mix(unet, b, 0.0) == raw(there | extra)


def test_what_a_plan_says(files):
    f = files["sd2"]
    with planned(f["da"], f["b"]) as found:
        notes = "\n".join(found.notes)
        explanation = api.explained(found)
    assert "sd2-a has diffusers' names; the result has the names of SD2 checkpoints" in notes
    assert "sd2-a has no cond_stage_model.model.transformer.resblocks.23" in notes
    assert explanation.architecture == "SD2 checkpoint (diffusers names)"
    shares = {row.block: row for row in explanation.blocks}
    assert shares["IN04"].shares == {"sd2-a": 0.5, "sd2-b.safetensors": 0.5}
    assert shares["BASE"].merged == 280
    assert explanation.merged == 686 + 280
    with planned(f["a"], f["db"]) as found:
        lacking = [note for note in found.notes if "not in sd2-b" in note]
    assert len(lacking) == 1
    assert lacking[0].startswith("14 tensors taken from sd2-a.safetensors: not in sd2-b")


def test_the_scheduler_tells_the_prediction(tmp_path, files):
    v = folder(tmp_path / "v", "sdxl", 1, prediction="v_prediction")
    with pytest.raises(Refusal, match="v predicts v"):
        planned(files["sdxl"]["a"], v)


def test_folders_that_plymix_does_not_know_are_refused_by_name(tmp_path, files):
    svd = folder(tmp_path / "svd", "sd1")
    unet = svd / "unet" / "diffusion_pytorch_model.safetensors"
    key = "down_blocks.0.temporal_transformer_blocks.0.weight"
    save(unet, load(unet)[0] | {key: ("F16", np.zeros(2, np.float16))})
    with pytest.raises(Refusal, match=r"svd is a diffusers folder of .*its unet is"):
        planned(files["sd1"]["a"], svd)
    part = files["sd1"]["da"] / "vae"
    with pytest.raises(Refusal, match="to put it into a model, say --vae vae"):
        planned(files["sd1"]["a"], part)


def test_parts_of_different_dtypes_are_refused(tmp_path, files):
    mixed = folder(tmp_path / "mixed", "sd2")
    encoder = mixed / "text_encoder" / "model.safetensors"
    tensors = load(encoder)[0]
    key = "text_model.encoder.layers.3.self_attn.k_proj.weight"
    tensors[key] = ("F32", tensors[key][1].astype(np.float32))
    save(encoder, tensors)
    with pytest.raises(Refusal, match=r"k_proj.weight \(F32\).*must be of one dtype"):
        planned(files["sd2"]["a"], mixed)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_told_of_a_folder(tmp_path, files, model):
    f = files[model]
    unet = {k: t for k, t in weights(model, 0).items() if k.startswith(tiny.UNET)}
    bare = save(
        tmp_path / "bare.safetensors", {k.removeprefix(tiny.UNET): t for k, t in unet.items()}
    )
    report, file = plymix.inspect(f["da"]), plymix.inspect(f["a"])
    assert report.title == f"{file.title} (diffusers names)"
    assert (report.dialect, report.unknown.count) == ("diffusers", 0)
    assert [c.name for c in report.components] == [
        c.name for c in file.components if c.name in golden_map(model)
    ]
    parameters = [
        {b.name: b.parameters for b in told.blocks if b.name in archs.load(model).blocks}
        for told in (report, file)
    ]
    assert parameters[0] == parameters[1]
    part, alone = (plymix.inspect(p, hashes=True) for p in (f["da"] / "unet", bare))
    assert part.total.tensors == len(unet)
    assert part.hashes.tensors == alone.hashes.tensors  # whatever the names, the same weights
    assert plymix.check(f["da"]).ok


def test_block_lists_for_folders(files):
    f = files["sdxl"]
    with pytest.raises(Refusal, match="25 numbers given; SDXL wants 19"):
        classic(str(f["da"]), str(f["b"]), 0.5, ",".join(["0.25"] * 25))
    numbers = ",".join(["0.25"] * 19)
    told = [classic(str(f[name]), str(f["b"]), 0.5, numbers)[1] for name in ("a", "da")]
    assert told[0] == told[1]
    assert (told[1]["BASE"], told[1]["IN04"], len(told[1])) == (0.5, 0.25, 20)


# --- the result


@pytest.mark.parametrize(("first", "second"), [("a", "db"), ("da", "b"), ("da", "db")])
def test_results_can_be_made_again(tmp_path, files, first, second):
    f = files["sd2"]
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    plymix.merge(f[first], f[second], out, alpha="GRAD_V", base=0.4)
    home = f["a"].parent
    if second == "db":  # the same folder by the file in it
        by_index = tmp_path / "index.safetensors"
        plymix.merge(f[first], f[second] / "model_index.json", by_index, alpha="GRAD_V", base=0.4)
        assert by_index.read_bytes() == out.read_bytes()
    assert replay.verify(out, folders=[home]).ok
    replay.replay(out, again, folders=[home])
    assert again.read_bytes() == out.read_bytes()
    assert load(out)[1]["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_a_session_remakes_what_changes(tmp_path, files):
    f = files["sdxl"]
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    found = recipe({"a": f["da"], "b": f["db"]}, 0.5, arch="")
    with plymix.Session(found) as session:
        session.write(out)
        session.set("steps.mix.alpha", {"base": 0.2, "default": 0.5, "blocks": {}})
        assert any("in_proj_weight" in name for name in session.changed)
        assert not any(name.startswith(tiny.UNET) for name in session.changed)
        session.write(out, force=True)
        plymix.merge(session.recipe, out=whole)
    assert data(out) == data(whole)


# --- how it is done


def test_memory_is_bounded_and_spans_are_joined(files):
    f = files["sdxl"]
    with planned(f["da"], f["db"]) as found:
        # the one tensor that is transposed is the one that is taken whole
        projection = next(t for t in found.tensors if t.name.endswith(".text_projection"))
        assert found.memory(1) == (64 << 20) + projection.numel * 4 * 4
        placed, _ = found.layout(f["a"], {})
        work = engine.items(placed)
        assert sum(isinstance(item, engine.WholeItem) for item in work) == 1
        assert not any(isinstance(item, engine.ChunkItem) for item in work)
        assert sum(item.nbytes for item in work) == found.nbytes
    # a file whose names alone differ goes span by span: the U-Net is one piece where both are
    # stored in the same order
    with planned(f["da"] / "unet", f["db"] / "unet") as found:
        placed, _ = found.layout(f["a"], {})
        assert len(engine.items(placed)) == 1


PIECES = (TensorInfo("q", "F16", (2, 3), 100), TensorInfo("k", "F16", (1, 3), 400, file=1))
FUSED = TensorInfo("qk", "F16", (3, 3), 100, parts=PIECES)


def test_a_tensor_in_pieces_is_cut_where_they_meet():
    whole = Leaf(1, TensorInfo("x", "F16", (3, 3), 1000))
    tensor = Tensor("qk", "F16", (3, 3), Sum(((0.5, Leaf(0, FUSED)), (0.5, whole))), offset=8)
    one, two = engine.items([tensor])
    assert (one.at, one.numel, two.at, two.numel) == (8, 6, 20, 3)
    assert [(o.source, o.file, o.offset) for o in one.operands] == [(0, 0, 100), (1, 0, 1000)]
    assert [(o.source, o.file, o.offset) for o in two.operands] == [(0, 1, 400), (1, 0, 1012)]
    copy = Tensor("qk", "F16", (3, 3), Leaf(0, FUSED))
    assert engine.items([copy]) == [
        engine.CopyItem(0, 0, 100, 0, 12),
        engine.CopyItem(0, 1, 400, 12, 6),
    ]


def test_sums_of_scattered_tensors_are_rounded_once(tmp_path):
    # Halfway cases in float16 that rounding to float32 first would move.
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((300, 200)).astype(np.float16) for _ in "ab")
    (tmp_path / "raw").write_bytes(a.tobytes() + b.tobytes() + a.T.tobytes() + b.T.tobytes())
    handle = Handle(tmp_path / "raw")
    source = Source(tmp_path / "raw", "raw", {}, handles=(handle,))
    n = a.nbytes
    made = []
    for at, strides in ((0, None), (2 * n, (1, 300))):
        infos = [TensorInfo("x", "F16", (300, 200), at + i * n, strides=strides) for i in (0, 1)]
        terms = tuple(zip((0.3, 0.7), (Leaf(0, info) for info in infos), strict=True))
        target = engine.MemoryTarget(n)
        job = engine.Job([source], target)
        engine.perform(job, [Tensor("x", "F16", (300, 200), Sum(terms))])
        made.append(bytes(target.data))
    source.close()
    assert made[0] == made[1]


def test_pickled_parts_that_do_not_lie_in_order(tmp_path, files):
    torch = pytest.importorskip("torch")
    f = files["sd2"]
    other = folder(tmp_path / "other", "sd2", 1)
    encoder = other / "text_encoder" / "model.safetensors"
    state = {key: torch.from_numpy(x.copy()) for key, (_, x) in load(encoder)[0].items()}
    for key in [k for k in state if k.endswith("q_proj.weight")]:
        state[key] = state[key].T.contiguous().T
    torch.save(state, encoder.with_name("pytorch_model.bin"))
    encoder.unlink()
    with open_model(other) as source:
        infos = pairing.pair(source).tensors
        fused = infos[f"{ENCODER}0.attn.in_proj_weight"]
        assert fused.scattered
        assert [part.strides is None for part in fused.parts] == [False, True, True]
    assert mix(f["a"], other) == mix(f["a"], f["db"])
    assert not differing(mix(other, f["a"], 0.0), data(f["b"]))
