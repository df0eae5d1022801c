"""Components taken out, models pruned and repaired: against the bytes that went in."""

import json
import re

import numpy as np
import pytest

import plymix
import tiny
from maps import golden_map
from plymix import archs, cli, replay
from plymix.errors import Refusal
from plymix.formats import open_model
from small import data, save
from test_dialect_merges import folder, in_diffusers_names, single, weights

UNET = "model.diffusion_model."
SCHEDULE = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
}  # fmt: skip

# Component -> what stands before its keys in a checkpoint, and in the files that people trade:
# written down from such files' key lists, not from plymix's data.
HOMES = {
    ("sd1", "unet"): UNET,
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd1", "vae"): "first_stage_model.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
    ("sdxl", "vae"): "first_stage_model.",
    ("sd3.5-medium", "transformer"): UNET,
    ("sd3.5-medium", "text_encoder_2"): "text_encoders.clip_g.transformer.",
    ("sd3.5-medium", "text_encoder_3"): "text_encoders.t5xxl.transformer.",
    ("flux-dev", "transformer"): UNET,
    ("flux-dev", "text_encoder_2"): "text_encoders.t5xxl.transformer.",
    ("flux-dev", "vae"): "vae.",
}
TE2 = "conditioner.embedders.1."


def contents(path):
    """{key: (dtype, shape, bytes)} of a safetensors file, and its metadata."""
    header, state, metadata = tiny.read_safetensors(path)
    return {k: (*header[k], state[k].tobytes()) for k in header}, metadata


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(home):
    """Makes a small model, once: model("sd1", 1, ema=True) -> its path."""
    made = {}

    def give(arch, seed=0, **options):
        key = (arch, seed, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.write(home / f"{arch}-{len(made)}.safetensors", arch, seed, **options)
        return made[key]

    return give


@pytest.fixture
def run(capsys):
    """A command line: (exit code, stdout, stderr)."""

    def one(*words):
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return one


# --- extract ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "component"), HOMES)
@pytest.mark.parametrize("keep_prefix", [False, True])
def test_a_component_alone(model, tmp_path, arch, component, keep_prefix):
    path, start = model(arch), HOMES[arch, component]
    out = tmp_path / "part.safetensors"
    found = plymix.extract(path, component, out, keep_prefix=keep_prefix)
    got, said = contents(out)
    own = {k: v for k, v in contents(path)[0].items() if k.startswith(start)}
    assert len(own) > 10
    assert got == (own if keep_prefix else {k.removeprefix(start): v for k, v in own.items()})
    assert (found.tensors, found.after) == (len(own), out.stat().st_size)
    assert said["modelspec.architecture"].endswith(component) is (
        component not in ("unet", "transformer")
    )
    assert replay.verify(out, folders=[path.parent]).ok


def test_every_component_of_every_layout_has_a_file_of_its_own(model, tmp_path):
    """All tensors go to just one component, but schedules."""
    for arch in ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3.5-medium", "flux-dev"):
        path = model(arch)
        known = plymix.inspect(path)
        keys = []
        for c in archs.load(known.architecture).components:
            found = plymix.extract(path, c.name, tmp_path / f"{arch}-{c.name}.safetensors")
            keys.append(found.tensors)
        schedules = [k for k in tiny.header(arch) if k in SCHEDULE or k.endswith(".sigmas")]
        assert sum(keys) == len(tiny.header(arch)) - len(schedules)


def test_the_denoisers_markers_go_with_it(model, tmp_path):
    path = model("sdxl", 3, markers=("v_pred", "ztsnr"))
    plymix.extract(path, "unet", tmp_path / "u.safetensors")
    assert plymix.inspect(tmp_path / "u.safetensors").prediction.kind == "v"
    plymix.extract(path, "vae", tmp_path / "v.safetensors")
    assert "v_pred" not in contents(tmp_path / "v.safetensors")[0]


def test_the_ema_weights_as_a_file_of_their_own(model, tmp_path):
    path = model("sd1", 4, ema=True)
    plymix.extract(path, "unet", tmp_path / "u.safetensors", ema="use")
    got, all_ = contents(tmp_path / "u.safetensors")[0], contents(path)[0]
    assert len(got) == 686
    assert all(v == all_[tiny.ema_name(UNET + k)] for k, v in got.items())


def test_from_a_diffusers_folder(home, tmp_path):
    path = folder(tmp_path / "sd1", "sd1", 5)
    plymix.extract(path, "vae", tmp_path / "vae.safetensors")
    got = contents(tmp_path / "vae.safetensors")[0]
    want = {k: v for k, v in weights("sd1", 5).items() if k.startswith("first_stage_model.")}
    assert {k: v[2] for k, v in got.items()} == {
        k.removeprefix("first_stage_model."): x.tobytes() for k, (_, x) in want.items()
    }


@pytest.mark.parametrize("component", ["vae", "unet", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_component_as_diffusers_has_it(model, tmp_path, component, kind):
    """From a file or a folder, into a file or a folder of its own that its class can load."""
    whole = folder(tmp_path / "xl", "sdxl", 5)
    given = single(tmp_path / "xl.safetensors", "sdxl", 5) if kind == "file" else whole
    want = in_diffusers_names("sdxl", weights("sdxl", 5), [component])[component]
    want = {key: x.tobytes() for key, (_, x) in want.items()}
    file, home = tmp_path / "part.safetensors", tmp_path / component
    plymix.extract(given, component, file, layout="diffusers")
    plymix.extract(given, component, home)
    (held,) = home.glob("*.safetensors")
    assert data(file) == data(held) == want
    config = json.loads((home / "config.json").read_text())
    if kind == "file":  # the test's folder has empty configurations, which are kept
        assert held.stem == ("model" if "text" in component else "diffusion_pytorch_model")
        assert ("_class_name" in config) == (held.stem != "model")
    assert replay.verify(file, folders=[tmp_path]).ok
    assert replay.verify(home, folders=[tmp_path]).ok
    with pytest.raises(Refusal, match="--keep-prefix keeps the names"):
        plymix.extract(given, component, tmp_path / "x", keep_prefix=True)


def test_shards_and_configs(model, tmp_path):
    path = model("sdxl", 1)
    found = plymix.extract(path, "unet", tmp_path / "u.safetensors", shard="1MB")
    assert found.path == tmp_path / "u.safetensors.index.json"
    with open_model(found.path) as source:
        assert len(source.files) > 2
        assert len(source.tensors) == 1680
    lent = folder(tmp_path / "lent", "sdxl", 2)
    (lent / "vae" / "config.json").write_text('{"_class_name": "Mine"}')
    plymix.extract(path, "vae", tmp_path / "vae", configs=lent)
    assert (tmp_path / "vae" / "config.json").read_text() == '{"_class_name": "Mine"}'
    plymix.prune(path, tmp_path / "xl", drop=["unet"], shard="100KB", configs=lent)
    assert (tmp_path / "xl" / "vae" / "config.json").read_text() == '{"_class_name": "Mine"}'
    assert len([*(tmp_path / "xl" / "vae").glob("*.safetensors")]) > 1
    old = tiny.write(tmp_path / "old.safetensors", "sd1", 6, nai=True)
    found = plymix.repair(old, tmp_path / "new.safetensors", shard="1MB")
    assert found.path.name == "new.safetensors.index.json"


@pytest.mark.parametrize("component", ["vae", "unet", "text_encoder_2"])
def test_only_what_is_taken_is_spoken_of(tmp_path, component):
    path = folder(tmp_path / "xl", "sdxl", 5, safety_checker=weights("sd1", 1))
    found = plymix.extract(path, component, tmp_path / "part.safetensors")
    notes = [note for note in found.notes if note.startswith("xl ")]
    assert len(notes) == len(found.notes) == (component == "text_encoder_2")
    assert all("embedders.1.model.logit_scale" in note for note in notes)


def test_what_is_not_there(model, tmp_path):
    with pytest.raises(Refusal, match="unknown component of SD1 'vea': did you mean vae"):
        plymix.extract(model("sd1"), "vea", tmp_path / "x.safetensors")
    bare = model("sdxl", 1, bare=True)
    with pytest.raises(Refusal, match="has no vae; it has unet"):
        plymix.extract(bare, "vae", tmp_path / "x.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_writes_nothing_and_knows_the_size(model, tmp_path):
    would = plymix.extract(model("sd1"), "vae", dry_run=True)
    done = plymix.extract(model("sd1"), "vae", tmp_path / "v.safetensors", dtype="keep")
    assert (would.path, would.after) == (None, done.after)


# --- the four options ---------------------------------------------------------------------------

OPTIONS = {
    "sd1": {"vae": "vae", "text_encoder": "text_encoder", "unet": "unet"},
    "sd2": {"vae": "vae", "text_encoder": "text_encoder", "unet": "unet"},
    "sdxl": {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet"},
    "sd3.5-medium": {"text_encoder": "text_encoder_3", "text_encoder_2": "text_encoder_2"},
    "flux-dev": {"text_encoder_2": "text_encoder_2", "unet": "transformer", "vae": "vae"},
}
CASES = [(arch, option, c) for arch, of in OPTIONS.items() for option, c in of.items()]


def prefix_of(arch, component):
    known = archs.load({"flux-dev": "flux1", "sd3.5-medium": "sd3"}.get(arch, arch))
    return (known.component(component).prefixes or (UNET,))[0]


@pytest.mark.parametrize("keep_prefix", [False, True])
@pytest.mark.parametrize(("arch", "option", "component"), CASES)
def test_a_merge_takes_an_extracted_component(
    model, tmp_path, arch, option, component, keep_prefix
):
    """The result has the donor's component and all the rest as without it."""
    a, b, donor = (model(arch, seed) for seed in (1, 2, 3))
    part = tmp_path / "part.safetensors"
    plymix.extract(donor, component, part, keep_prefix=keep_prefix)
    plymix.merge(a, b, tmp_path / "plain.safetensors", alpha=0.3)
    plymix.merge(a, b, tmp_path / "with.safetensors", alpha=0.3, **{option: part})
    plain, got = (contents(tmp_path / f"{n}.safetensors")[0] for n in ("plain", "with"))
    theirs, start = contents(donor)[0], prefix_of(arch, component)
    assert list(got) == list(plain)
    for key, value in got.items():
        ids = key.endswith("position_ids")
        assert value == (theirs if key.startswith(start) and not ids else plain)[key], key
    assert got != plain


@pytest.mark.parametrize("arch", ["z-image", "lumina2", "qwen-image"])
def test_a_text_encoder_of_any_name(tmp_path, arch):
    """ComfyUI's all-in-one files: `text_encoders.`, a name, `transformer.`, and its own names."""
    start = "text_encoders.qwen3_4b.transformer."

    def whole(name, seed):
        header = {UNET + k: v for k, v in tiny.header(arch, bare=True).items()}
        key = start + "model.layers.{}.self_attn.q_proj.weight"
        header |= {key.format(i): ("F16", (4, 4)) for i in (0, 1)}
        return tiny.write_safetensors(tmp_path / name, header, tiny.state(header, seed))

    a, donor = whole("a.safetensors", 1), whole("d.safetensors", 2)
    part = tmp_path / "te.safetensors"
    plymix.extract(donor, "text_encoder", part)
    theirs = contents(donor)[0]
    own = {k: v for k, v in theirs.items() if k.startswith(start)}
    assert contents(part)[0] == {k.removeprefix(start): v for k, v in own.items()}
    plymix.merge(a, a, tmp_path / "o.safetensors", text_encoder=part)
    got = contents(tmp_path / "o.safetensors")[0]
    assert got == contents(a)[0] | own


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae", "unet"])
def test_a_component_in_diffusers_names(model, tmp_path, component):
    a, b = model("sdxl", 1), model("sdxl", 2)
    theirs = in_diffusers_names("sdxl", weights("sdxl", 9), [component])[component]
    part = save(tmp_path / "part.safetensors", theirs)
    plymix.merge(a, b, tmp_path / "o.safetensors", **{component: part})
    got, want = contents(tmp_path / "o.safetensors")[0], weights("sdxl", 9)
    held = {k for k, (names, _) in golden_map("sdxl")[component].items() if names}
    assert len(held) > 100
    assert all(got[key][2] == want[key][1].tobytes() for key in held)


def test_models_give_their_parts_by_letter(model, tmp_path):
    a, b = model("sdxl", 1), model("sdxl", 2)
    out = tmp_path / "o.safetensors"
    plymix.merge(a, b, out, alpha=0.4, text_encoder="b", text_encoder_2="a", unet="b", vae="a")
    got, of_a, of_b = (contents(p)[0] for p in (out, a, b))
    for key in got:
        theirs = of_a if key.startswith((TE2, "first_stage")) else of_b
        assert got[key] == theirs[key] or key.endswith("position_ids")


def test_a_denoiser_alone_becomes_a_checkpoint(model, tmp_path):
    """With components it takes the names of checkpoints, which other programs know."""
    whole = model("sdxl", 6)
    parts = {}
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        parts[component] = tmp_path / f"{component}.safetensors"
        plymix.extract(whole, component, parts[component])
    u = parts.pop("unet")
    plymix.merge(u, u, tmp_path / "again.safetensors", alpha=0, **parts)
    assert contents(tmp_path / "again.safetensors")[0] == contents(whole)[0]


def test_another_kind_of_denoiser_comes_whole(model, tmp_path):
    """An inpainting U-Net with nine channels in a model that had four, and its markers."""
    a, wide = model("sd1", 1), model("sd1-inpainting", 2)
    plymix.merge(a, a, tmp_path / "o.safetensors", unet=wide)
    got, theirs = contents(tmp_path / "o.safetensors")[0], contents(wide)[0]
    assert all(got[k] == v for k, v in theirs.items() if k.startswith(UNET))
    assert plymix.inspect(tmp_path / "o.safetensors").variant == "inpainting"
    xl, v = model("sdxl", 1, markers=("v_pred",)), model("sdxl", 2)
    plymix.merge(xl, xl, tmp_path / "eps.safetensors", unet=v)
    assert "v_pred" not in contents(tmp_path / "eps.safetensors")[0]
    plymix.merge(v, v, tmp_path / "v.safetensors", unet=xl)
    found = plymix.inspect(tmp_path / "v.safetensors")
    assert found.prediction.kind == "v"
    assert found.metadata["modelspec.prediction_type"] == "v"


def test_parts_that_do_not_fit(model, tmp_path):
    a = model("sd1", 1)
    with pytest.raises(Refusal, match="SD1 has no second text encoder"):
        plymix.explain(a, a, text_encoder_2=model("sd1", 2))
    with pytest.raises(Refusal, match="SDXL"):
        plymix.explain(a, a, unet=model("sdxl", 1))
    plymix.extract(model("sd1", 2), "text_encoder", tmp_path / "t.safetensors")
    with pytest.raises(Refusal, match="has no VAE"):
        plymix.explain(a, a, vae=tmp_path / "t.safetensors")
    rows = {k: v for k, v in weights("sd1", 1).items() if "text_model" in k}
    rows.pop("cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight")
    with pytest.raises(Refusal, match=r"lacks 1 of the 196 .*layers\.3\.mlp\.fc1\.weight"):
        plymix.explain(a, a, text_encoder=save(tmp_path / "less.safetensors", rows))


# --- prune --------------------------------------------------------------------------------------


def test_what_a_pruned_model_has(model, tmp_path):
    path, out = model("sd1", 4, ema=True), tmp_path / "p.safetensors"
    found = plymix.prune(path, out)
    was, got = contents(path)[0], contents(out)[0]
    ema = {k for k in was if k.startswith("model_ema.")}
    assert got == {k: v for k, v in was.items() if k not in ema}
    (left,) = found.left_out
    assert (left.rule, set(left.keys)) == ("ema = drop", ema)
    assert left.nbytes == sum(len(was[k][2]) for k in ema)
    assert found.saved == path.stat().st_size - out.stat().st_size > 0
    assert replay.verify(out, folders=[path.parent]).ok


def test_ema_in_place_of_the_weights(model, tmp_path):
    path, out = model("sd1", 4, ema=True), tmp_path / "p.safetensors"
    plymix.prune(path, out, ema="use")
    was, got = contents(path)[0], contents(out)[0]
    assert got == {
        k: was[tiny.ema_name(k)] if k.startswith(UNET) else v
        for k, v in was.items()
        if not k.startswith("model_ema.")
    }


def test_more_to_drop(model, tmp_path):
    rows = weights("sd1", 8)
    rows["first_stage_model.loss.discriminator.main.0.weight"] = rows["betas"]
    rows["loss.logvar"] = rows["betas"]
    rows["whatever.this.is"] = rows["betas"]
    path, out = save(tmp_path / "m.safetensors", rows), tmp_path / "p.safetensors"
    found = plymix.prune(path, out, drop=["vae", "schedules", "unknown"], dtype="fp32")
    rules = {left.rule: set(left.keys) for left in found.left_out}
    assert rules["drop = leftovers"] == {
        "first_stage_model.loss.discriminator.main.0.weight",
        "loss.logvar",
    }
    assert rules["drop = schedules"] == SCHEDULE
    assert rules["drop = unknown"] == {"whatever.this.is"}
    assert len(rules["drop = vae"]) == 248
    got, was = contents(out)[0], contents(path)[0]
    assert set(got) == set(was).difference(*rules.values())
    for key, (dtype, _, value) in got.items():
        if dtype == "F32":
            want = np.frombuffer(was[key][2], np.float16).astype(np.float32)
            assert value == want.tobytes()
    assert {v[0] for v in got.values()} == {"F32", "I64"}


def test_what_nobody_knows_is_pruned_too(tmp_path):
    """A model of an unknown kind: EMA and losses are known by their names."""
    row = ("F16", np.ones((2, 3), np.float16))
    rows = {"backbone.x": row, "loss.y": row, "model_ema.backbonex": row, "betas": row}
    path = save(tmp_path / "m.safetensors", rows)
    plymix.prune(path, tmp_path / "p.safetensors", drop=["schedules"])
    assert set(contents(tmp_path / "p.safetensors")[0]) == {"backbone.x"}
    with pytest.raises(Refusal, match="does not know its components"):
        plymix.prune(path, tmp_path / "q.safetensors", drop=["vae"])


def test_what_the_model_says_of_itself_stays(model, tmp_path):
    said = {
        "modelspec.license": "CC0", "modelspec.title": "My model", "modelspec.author": "me",
        "modelspec.hash_sha256": "0x12", "ss_epoch": "3", "prompt": "{}",
    }  # fmt: skip
    header = tiny.header("sd1")
    path = tiny.write_safetensors(tmp_path / "m.safetensors", header, tiny.state(header), said)
    plymix.prune(path, tmp_path / "p.safetensors")
    got = contents(tmp_path / "p.safetensors")[1]
    kept = {k: v for k, v in said.items() if k != "modelspec.hash_sha256"}
    assert {k: got.get(k) for k in kept} == kept
    assert got.get("modelspec.hash_sha256") != "0x12"
    plymix.prune(path, tmp_path / "q.safetensors", drop=["metadata"])
    got = contents(tmp_path / "q.safetensors")[1]
    assert got["modelspec.license"] == "CC0"
    assert not {"ss_epoch", "prompt"} & set(got)


@pytest.mark.parametrize("what", ["extract", "prune"])
def test_scaled_weights_become_numbers(tmp_path, what):
    """Codes of fp8 (1.5 is 0x3c) times 4, for every matrix of the U-Net; scales are no tensors."""
    rows = weights("sd1", 3)
    matrices = [k for k, (_, x) in rows.items() if k.startswith(UNET) and x.ndim == 2]
    for key in matrices:
        rows[key] = ("F8_E4M3", np.full(rows[key][1].shape, 0x3C, np.uint8))
        rows[key.removesuffix("weight") + "scale_weight"] = ("F32", np.full((), 4, np.float32))
    rows["scaled_fp8"] = ("F8_E4M3", np.zeros(0, np.uint8))
    path, out = save(tmp_path / "scaled.safetensors", rows), tmp_path / "out.safetensors"
    if what == "extract":
        found = plymix.extract(path, "unet", out, keep_prefix=True, dtype="fp32")
    else:
        found = plymix.prune(path, out, dtype="fp32")
    assert found.left_out == ()
    got = contents(out)[0]
    assert not [k for k in got if "scale" in k]
    for key in matrices:
        assert set(np.frombuffer(got[key][2], np.float32)) == {6.0}, key
    assert replay.verify(out).ok


def test_a_folder_without_its_vae(model, tmp_path):
    """diffusers' own way to say that a component is not there: null and no configuration."""
    whole, out = tmp_path / "whole", tmp_path / "pruned"
    plymix.convert(model("sd1"), whole)
    plymix.prune(whole, out, drop=["vae"])
    index = json.loads((out / "model_index.json").read_text())
    assert index.pop("vae") == [None, None]
    before = json.loads((whole / "model_index.json").read_text())
    assert before.pop("vae") == ["diffusers", "AutoencoderKL"]
    assert index == before
    files = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    left = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert left == {p for p in files if p.parts[0] != "vae"}
    for file in left:
        if file.suffix == ".safetensors":
            assert contents(out / file)[0] == contents(whole / file)[0]
    assert replay.verify(out, folders=[tmp_path]).ok


def test_what_cannot_be_dropped(model, tmp_path):
    with pytest.raises(Refusal, match=r"component of SD1 'scheduels'.*schedules"):
        plymix.prune(model("sd1"), tmp_path / "p.safetensors", drop=["scheduels"])
    all_ = ["vae", "unet", "text_encoder", "schedules"]
    with pytest.raises(Refusal, match="no tensor at all"):
        plymix.prune(model("sd1"), tmp_path / "p.safetensors", drop=all_)


def test_a_torch_checkpoint_with_an_optimizer(model, tmp_path):
    torch = pytest.importorskip("torch")
    state = {"model.diffusion_model.w": torch.arange(6.0).reshape(2, 3).T, "loss.x": torch.ones(2)}
    torch.save({"state_dict": state, "optimizer_states": [torch.ones(9)]}, tmp_path / "m.ckpt")
    found = plymix.prune(tmp_path / "m.ckpt", tmp_path / "p.safetensors")
    got = contents(tmp_path / "p.safetensors")[0]
    want = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert got == {"model.diffusion_model.w": ("F32", (3, 2), np.ascontiguousarray(want).tobytes())}
    assert any("optimizer" in note for note in found.notes)


# --- repair -------------------------------------------------------------------------------------

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def with_ids(path, dtype, values, key=IDS, arch="sd1"):
    rows = {k: v for k, v in weights(arch, 3).items() if k != key}
    rows[key] = (dtype, np.asarray(values).reshape(1, -1))
    return save(path, rows)


BROKEN = np.arange(77, dtype=np.float16)
BROKEN[5] = 4.5


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F16", BROKEN),
        ("I64", np.arange(77, dtype=np.int64)[::-1]),
        ("F32", np.arange(77, dtype=np.float32)),
        ("I32", np.arange(77, dtype=np.int32)),
    ],
)
@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_position_ids(tmp_path, arch, dtype, values):
    key = IDS if arch == "sd1" else IDS.replace("cond_stage_model", "conditioner.embedders.0")
    path = with_ids(tmp_path / "m.safetensors", dtype, values, key, arch)
    out = tmp_path / "r.safetensors"
    found = plymix.repair(path, out)
    assert [(r.kind, r.key) for r in found.repairs] == [("position_ids", key)]
    was, got = contents(path)[0], contents(out)[0]
    assert got.pop(key) == ("I64", (1, 77), np.arange(77, dtype="<i8").tobytes())
    was.pop(key)
    assert got == was
    assert replay.verify(out, folders=[tmp_path]).ok
    assert plymix.check(out).ok


def test_names_of_the_novelai_era(model, tmp_path):
    path, out = model("sd1", 7, nai=True, ema=True), tmp_path / "r.safetensors"
    found = plymix.repair(path, out)
    assert {r.kind for r in found.repairs} == {"names"}
    assert len(found.repairs) == 197
    was, got = contents(path)[0], contents(out)[0]
    old = re.compile(r"^(cond_stage_model\.transformer\.)(?=embeddings|encoder|final)")
    assert got == {old.sub(r"\1text_model.", k): v for k, v in was.items()}


def test_a_folder_is_repaired_into_a_folder(model, tmp_path):
    """Position ids that an old folder holds as floats; all else keeps its bytes and its place."""
    path, out = tmp_path / "sd1", tmp_path / "mended"
    plymix.convert(model("sd1"), path)
    file = path / "text_encoder" / "model.safetensors"
    header, state, _ = tiny.read_safetensors(file)
    rows = {k: (header[k][0], state[k]) for k in header}
    rows["text_model.embeddings.position_ids"] = ("F32", np.full((1, 77), 0.5, np.float32))
    save(file, rows)
    plymix.repair(path, out)
    for each in path.glob("*/*.safetensors"):
        was, got = contents(each)[0], contents(out / each.relative_to(path))[0]
        was.pop("text_model.embeddings.position_ids", None)
        ids = got.pop("text_model.embeddings.position_ids", None)
        assert got == was
        if ids:
            assert ids == ("I64", (1, 77), np.arange(77, dtype=np.int64).tobytes())
    assert replay.verify(out, folders=[tmp_path]).ok


def test_a_text_encoder_alone(tmp_path):
    rows = {"text_model.encoder.layers.0.self_attn.q_proj.weight": ("F16", np.ones((2, 2), "f2"))}
    rows["text_model.embeddings.position_ids"] = ("F16", BROKEN.reshape(1, 77))
    path = save(tmp_path / "clip_l.safetensors", rows)
    plymix.repair(path, tmp_path / "r.safetensors")
    got = contents(tmp_path / "r.safetensors")[0]
    assert got["text_model.embeddings.position_ids"][0] == "I64"


def test_tensors_in_strides(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"x.weight": torch.arange(6.0).reshape(2, 3).T, "y.weight": torch.ones(2)}
    torch.save(state, tmp_path / "m.ckpt")
    found = plymix.repair(tmp_path / "m.ckpt", tmp_path / "r.ckpt")
    assert [(r.kind, r.key) for r in found.repairs] == [("contiguous", "x.weight")]
    got = torch.load(tmp_path / "r.ckpt", weights_only=True)
    got = got.get("state_dict", got)
    assert got["x.weight"].is_contiguous()
    assert torch.equal(got["x.weight"], state["x.weight"])


def test_a_sound_file_is_left_alone(model, tmp_path):
    found = plymix.repair(model("sd1"), tmp_path / "r.safetensors")
    assert (found.path, found.repairs) == (None, ())
    assert not [*tmp_path.iterdir()]


# --- the command line ---------------------------------------------------------------------------


def test_the_commands(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model("sd1", 4, ema=True)
    code, out, _ = run("extract", path, "--component", "vae", "-o", "v.safetensors")
    assert (code, "248 tensors" in out) == (0, True)
    code, _, err = run("extract", path, "--component", "vae", "-o", "v.safetensors")
    assert (code, "--force" in err) == (2, True)
    code, out, _ = run("prune", path, "-o", "p.safetensors", "--drop", "vae", "--dry-run")
    assert code == 0
    assert "688 tensors" in out
    assert "(ema = drop)" in out
    assert "248 tensors" in out
    assert "saved" in out
    assert "nothing was written" in out
    code, out, _ = run("prune", path, "-o", "p.safetensors", "--json")
    document = json.loads(out)
    assert document["saved"] == path.stat().st_size - (tmp_path / "p.safetensors").stat().st_size
    code, out, _ = run("repair", path, "-o", "r.safetensors")
    assert (code, "nothing to repair" in out) == (0, True)
    broken = with_ids(tmp_path / "b.safetensors", "F16", BROKEN)
    code, out, _ = run("repair", broken, "-o", "r.safetensors")
    assert (code, f"position_ids: {IDS}" in out) == (0, True)
    with open_model("r.safetensors") as source:
        assert source.tensors[IDS].dtype == "I64"


def test_parts_on_the_command_line(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, donor = (model("sd1", seed) for seed in (1, 2, 3))
    run("extract", donor, "--component", "text_encoder", "-o", "te.safetensors")
    run("extract", donor, "--component", "vae", "-o", "vae.safetensors")
    parts = ("--text-encoder", "te.safetensors", "--vae", "vae.safetensors")
    assert run("merge", a, b, "-o", "m.safetensors", *parts)[0] == 0
    code, out, _ = run("mbw", a, b, "-o", "w.safetensors", *parts)
    assert code == 0
    assert "text encoder of te.safetensors" in out
    theirs = contents(donor)[0]
    for name in ("m", "w"):
        got = contents(tmp_path / f"{name}.safetensors")[0]
        own = [k for k in got if k.startswith(("cond_stage_model.", "first_stage_model."))]
        assert all(got[k] == theirs[k] for k in own)
