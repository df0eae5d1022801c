"""What a result says about itself: ModelSpec, A1111's records, formulas; and what it never says."""

import hashlib
import json
import re

import pytest

import plymix
from plymix import metadata
from plymix import plan as planning
from plymix.recipe import from_dict
from small import load, save
from tiny import write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pair(tmp_path):
    return [write(tmp_path / f"{n}.safetensors", "sd1", i) for i, n in enumerate(("one", "two"))]


def said(*files, **options):
    out = files[0].parent / "out.safetensors"
    plymix.merge(*files, out, force=True, **options)
    return load(out)[1]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_modelspec(pair):
    found = said(*pair, alpha=0.25)
    assert found["modelspec.sai_model_spec"].startswith("1.0")
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert "one" in found["modelspec.title"]
    assert found["modelspec.merged_from"] == "one, two"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["modelspec.date"])
    assert found["modelspec.implementation"]
    assert "0.25 × two.safetensors" in found["modelspec.description"]
    assert "modelspec.prediction_type" not in found  # SD1 files do not say


@pytest.mark.parametrize(
    ("arch", "options", "name", "prediction"),
    [
        ("sdxl", {}, "stable-diffusion-xl-v1-base", "epsilon"),
        ("sdxl", {"markers": ("v_pred", "ztsnr")}, "stable-diffusion-xl-v1-base", "v"),
        ("sd1-inpainting", {}, "stable-diffusion-v1-inpainting", None),
    ],
)
def test_other_architectures(tmp_path, arch, options, name, prediction):
    files = [write(tmp_path / f"{n}.safetensors", arch, i, **options) for i, n in enumerate("ab")]
    found = said(*files)
    assert found["modelspec.architecture"] == name
    assert found.get("modelspec.prediction_type") == prediction
    recorded = json.loads(found["sd_merge_recipe"])
    assert recorded["is_inpainting"] is (arch == "sd1-inpainting")


def test_a1111_records(pair):
    found = said(*pair, alpha=0.25, dtype="fp16")
    recorded = json.loads(found["sd_merge_recipe"])
    assert recorded["primary_model_hash"] == sha(pair[0])
    assert recorded["secondary_model_hash"] == sha(pair[1])
    assert recorded["tertiary_model_hash"] is None
    assert recorded["interp_method"] == "Weighted sum"
    assert recorded["multiplier"] == 0.25
    assert recorded["save_as_half"] is True
    models = json.loads(found["sd_merge_models"])
    assert models.keys() == {sha(p) for p in pair}
    raw = pair[0].read_bytes()
    first = models[sha(pair[0])]
    assert first["name"] == "one.safetensors"
    assert first["legacy_hash"] == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]


def test_a1111_records_name_models_in_their_own_places(pair, tmp_path):
    """A step has no hash: its place is empty, and no other model moves up into it."""
    a, b = map(plymix.model, pair)
    plymix.merge(((a + b) / 2).add_difference(b, a, alpha=0.5), tmp_path / "steps.safetensors")
    recorded = json.loads(load(tmp_path / "steps.safetensors")[1]["sd_merge_recipe"])
    assert recorded["primary_model_hash"] is None
    assert recorded["secondary_model_hash"] == sha(pair[1])
    assert recorded["tertiary_model_hash"] == sha(pair[0])
    plymix.merge(a, tmp_path / "same.safetensors", dtype="bf16")
    recorded = json.loads(load(tmp_path / "same.safetensors")[1]["sd_merge_recipe"])
    assert recorded["primary_model_hash"] == sha(pair[0])


def test_ancestors_are_kept(pair, tmp_path):
    """Those plymix wrote, and those that other programs wrote into an input."""
    foreign = {"f" * 64: {"name": "grandparent.ckpt", "legacy_hash": "12345678"}}
    tensors = load(pair[1])[0]
    mother = save(
        tmp_path / "mother.safetensors",
        tensors,
        {"sd_merge_models": json.dumps(foreign), "sd_merge_recipe": '{"type": "webui"}'},
    )
    child = tmp_path / "child.safetensors"
    plymix.merge(pair[0], mother, child)
    models = json.loads(said(child, pair[1])["sd_merge_models"])
    assert models.keys() == {"f" * 64, *(sha(p) for p in (*pair, mother, child))}
    assert models["f" * 64] == foreign["f" * 64]
    assert "webui" in json.dumps(models[sha(mother)]["sd_merge_recipe"])


@pytest.mark.parametrize("text", ["", "not json", "[]", "3", "[" * 50_000, '{"a": 1}'])
def test_foreign_records_that_are_damaged(pair, tmp_path, text):
    odd = save(
        tmp_path / "odd.safetensors",
        load(pair[1])[0],
        {"sd_merge_models": text, "sd_merge_recipe": text, "modelspec.prediction_type": ""},
    )
    found = said(pair[0], odd)
    assert sha(odd) in json.loads(found["sd_merge_models"])


@pytest.mark.parametrize(
    "folder", ["/home/me/secret/", "C:\\Users\\me\\secret\\", "~/secret/", "\\\\nas\\secret\\"]
)
def test_whole_paths_in_foreign_records_lose_their_folders(pair, tmp_path, folder):
    own = {"custom_name": "half/half", "bake_in_vae": folder + "v.pt", "checks": [1, "x"]}
    records = {
        "sd_merge_recipe": json.dumps(own),
        "sd_merge_models": json.dumps(
            {"aa": {"name": folder + "old.ckpt", "sd_merge_recipe": own}}
        ),
    }
    tensors, _ = load(pair[0])
    found = said(save(tmp_path / "c.safetensors", tensors, records), pair[1])
    assert "secret" not in json.dumps(found)
    models = json.loads(found["sd_merge_models"])
    kept = {"custom_name": "half/half", "bake_in_vae": "v.pt", "checks": [1, "x"]}
    assert models["aa"] == {"name": "old.ckpt", "sd_merge_recipe": kept}
    assert [m["sd_merge_recipe"] for m in models.values() if m["name"] == "c.safetensors"] == [kept]


def once(text):
    """A JSON object as a dict, none of whose names stands there twice."""

    def pairs(found):
        assert len(dict(found)) == len(found), [name for name, _ in found]
        return dict(found)

    return json.loads(text, object_pairs_hook=pairs)


def test_one_file_as_both_models(pair, tmp_path):
    """Under one name or two, as a copy or as an ancestor: a record for each content, not file."""
    a, b = pair
    (tmp_path / "again").mkdir()
    copies = [tmp_path / "copy.safetensors", tmp_path / "again" / "one.safetensors"]
    for copy in copies:
        copy.write_bytes(a.read_bytes())
    for twin in (a, *copies):
        found = once(said(a, twin, alpha=0.3)["sd_merge_models"])
        assert {key: record["name"] for key, record in found.items()} == {sha(a): "one.safetensors"}
    child = tmp_path / "child.safetensors"
    plymix.merge(a, b, child)
    for pair in ((child, a), (copies[0], child)):
        found = once(said(*pair)["sd_merge_models"])
        assert found.keys() == {sha(a), sha(b), sha(child)}
    assert found[sha(a)]["name"] == "copy.safetensors"
    near = bytearray(a.read_bytes())
    near[-1] ^= 1  # where no sample is
    copies[0].write_bytes(near)
    assert once(said(a, copies[0])["sd_merge_models"]).keys() == {sha(a), sha(copies[0])}


def test_results_of_twins_are_replayed_and_verified(pair, tmp_path):
    """Whether its hash is known before the merge or not, a model has the same records."""
    from plymix import replay

    child, out = tmp_path / "child.safetensors", tmp_path / "grandchild.safetensors"
    plymix.merge(*pair, child)
    plymix.merge(child, pair[0], out)
    assert replay.verify(out).ok
    again = replay.replay(out, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == out.read_bytes()


def test_prompts_and_paths_of_the_inputs_stay_behind(pair, tmp_path):
    private = {"prompt": "a private prompt", "workflow": "{}", "ss_train_data_dir": "/home/me/x"}
    odd = save(tmp_path / "odd.safetensors", load(pair[1])[0], private)
    found = said(odd, pair[0])
    text = json.dumps(found)
    assert "private prompt" not in text
    assert "/home/me" not in text
    assert str(tmp_path) not in text


def test_the_ckpt_holds_the_state_dict(pair, tmp_path):
    torch = pytest.importorskip("torch")
    out = tmp_path / "o.ckpt"
    plymix.merge(*pair, out, alpha=0.25)
    loaded = torch.load(out, weights_only=True)
    assert loaded["state_dict"].keys() == load(pair[0])[0].keys()


def made(method, alpha=None, **more):
    models = {n: f"folder/{n}.ckpt" for n in "abc"}
    inputs = dict(zip("abc", "abc" if method == "add_difference" else "ab", strict=False))
    step = {"method": method, **inputs, **more}
    if alpha is not None:
        step["alpha"] = alpha
    return from_dict({"models": models, "steps": {"s": step}})


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        (made("weighted_sum", 0.25), ["0.75 × a.ckpt", "0.25 × b.ckpt"]),
        (made("weighted_sum", 0.0), ["a.ckpt"]),
        (made("weighted_sum", "GRAD_V"), ["a.ckpt", "b.ckpt", "GRAD_V"]),
        (made("add_difference", 0.5), ["a.ckpt", "0.5", "b.ckpt", "c.ckpt"]),
        (made("slerp"), ["slerp", "a.ckpt", "b.ckpt"]),
    ],
)
def test_formulas_name_the_files_and_no_folder(recipe, parts):
    text = metadata.formula(recipe)
    for part in parts:
        assert part in text
    assert "folder" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (made("weighted_sum", -1), "2 × a.ckpt - b.ckpt"),
        (made("weighted_sum", 2), "-a.ckpt + 2 × b.ckpt"),
        (made("add_difference", -0.5), "a.ckpt - 0.5 × (b.ckpt - c.ckpt)"),
        (made("add_difference", 1), "a.ckpt + (b.ckpt - c.ckpt)"),
    ],
)
def test_a_negative_share_is_a_difference(recipe, text):
    assert metadata.formula(recipe) == text


def test_a_nested_formula():
    models = {n: f"{n}.ckpt" for n in "abc"}
    steps = {
        "x": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5},
        "y": {"method": "weighted_sum", "a": "x", "b": "c", "alpha": 0.25},
    }
    text = metadata.formula(from_dict({"models": models, "steps": steps}))
    assert text == "0.75 × (0.5 × a.ckpt + 0.5 × b.ckpt) + 0.25 × c.ckpt"


def test_long_chains_have_a_formula_and_a_plan(tmp_path):
    """However many steps there are, and where each uses the one before twice."""
    models = {n: str(write(tmp_path / f"{n}.safetensors", "sd1", i)) for i, n in enumerate("ab")}
    once = {f"s{i}": ["b", f"s{i - 1}" if i else "a"] for i in reversed(range(1100))}
    twice = {f"s{i}": [f"s{i - 1}" if i else "a"] * 2 for i in range(60)}
    for used in (once, twice):
        steps = {
            name: {"method": "weighted_sum", "a": b, "b": a, "alpha": 0.5}
            for name, (a, b) in used.items()
        }
        output = {"from": f"s{len(steps) - 1}", "component": "vae", "vae": "blend"}
        found = from_dict({"models": models, "steps": steps, "output": output})
        assert found.order() == tuple(f"s{i}" for i in range(len(steps)))
        text = metadata.formula(found)
        assert len(text) < 3 * metadata.LONGEST
        assert "steps.s" in text
        with planning.build(found) as planned:
            assert planned.tensors


def test_a_formula_tells_what_else_changes_the_weights():
    models = {n: f"{n}.ckpt" for n in "ab"}
    steps = {"x": {"method": "weighted_sum", "a": "a", "b": "b"}}
    output = {"ema": "use", "adjust": {"detail": [0.5, 0, 0], "contrast": 1}}
    text = metadata.formula(from_dict({"models": models, "steps": steps, "output": output}))
    end = "; EMA weights used; adjusted contrast = 1, detail = [0.5, 0, 0]"
    assert text == f"0.5 × a.ckpt + 0.5 × b.ckpt{end}"


def test_place_holders_have_the_length_of_a_hash(pair):
    with planning.build(plymix.two_models(*pair)) as plan:
        tokens = {metadata.pending(i) for i in plan.inputs}
        assert len(tokens) == 2
        assert {len(t) for t in tokens} == {64}
        assert all(json.dumps(t) == f'"{t}"' for t in tokens)


def test_the_date_can_be_set(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert metadata.today() == "2023-11-14"
