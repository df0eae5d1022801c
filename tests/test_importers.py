"""Records of other tools, written by hand from their descriptions, and the recipes they give."""

import csv
import io
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import plymix
import tiny
from plymix import cli
from plymix import recipe as recipes
from plymix.errors import Refusal
from plymix.importers import import_recipe
from plymix.recipe import Model

SHA_A, SHA_B, SHA_C = ("a1" * 32, "b2" * 32, "c3" * 32)
KNOWN = {
    SHA_A: {"name": "a.safetensors", "legacy_hash": "aaaaaaaa", "sd_merge_recipe": None},
    SHA_B: {"name": "sub/b.safetensors", "legacy_hash": "bbbbbbbb", "sd_merge_recipe": None},
    SHA_C: {"name": "c.ckpt", "legacy_hash": "cccccccc", "sd_merge_recipe": "{}"},
}
GRAD_V = [abs(1 - i / 12) for i in range(25)]


def a1111(**changes) -> dict:
    said = {
        "type": "webui",
        "primary_model_hash": SHA_A,
        "secondary_model_hash": SHA_B,
        "tertiary_model_hash": None,
        "interp_method": "Weighted sum",
        "multiplier": 0.7,
        "save_as_half": False,
        "custom_name": "mix",
        "config_source": 0,
        "bake_in_vae": "None",
        "discard_weights": "",
        "is_inpainting": False,
        "is_instruct_pix2pix": False,
    }
    return {
        "sd_merge_recipe": json.dumps({**said, **changes}),
        "sd_merge_models": json.dumps(KNOWN),
    }


def comfy(ratio: float = 0.3, **changes) -> dict:
    """Two checkpoints, models and text encoders merged, the VAE of the first."""
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub/b.safetensors"}},
        "3": {
            "class_type": "ModelMergeSimple",
            "inputs": {"ratio": ratio, "model1": ["1", 0], "model2": ["2", 0]},
        },
        "4": {
            "class_type": "CLIPMergeSimple",
            "inputs": {"ratio": ratio, "clip1": ["1", 1], "clip2": ["2", 1]},
        },
        "5": {
            "class_type": "CheckpointSave",
            "inputs": {
                "filename_prefix": "checkpoints/mix",
                "model": ["3", 0],
                "clip": ["4", 0],
                "vae": ["1", 2],
            },
        },
    }
    return {**prompt, **changes}


def only_step(imported):
    (step,) = imported.recipe.steps.values()
    return step


def read(metadata: dict, **options):
    return import_recipe(json.dumps(metadata), **options)


# --- directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.7, 0.1, 1.0, 0.0, 1.2])
def test_the_same_merge_from_a1111_and_comfyui(share):
    """A1111's multiplier is the share of the second model, ComfyUI's ratio that of the first."""
    ours = read(a1111(multiplier=share)).recipe
    theirs = read(comfy(round(1 - share, 10))).recipe
    assert ours.steps == theirs.steps
    assert ours.output == theirs.output
    assert {n: m.file for n, m in ours.models.items()} == {
        n: m.file for n, m in theirs.models.items()
    }
    assert only_step(read(a1111(multiplier=share))).params == {"alpha": share}
    assert [m.sha256 for m in ours.models.values()] == [SHA_A, SHA_B]


def test_the_same_bytes_from_a1111_and_comfyui(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed, dtype="F16")
    files = {}
    for name, metadata in (("web", a1111()), ("comfy", {"prompt": json.dumps(comfy())})):
        header = {"x": ("F32", (1,))}
        carrier = tiny.write_safetensors(
            tmp_path / f"{name}-old.safetensors", header, tiny.state(header), metadata
        )
        files[name] = tmp_path / f"{name}.safetensors"
        found = import_recipe(carrier).recipe
        models = {n: Model(m.file) for n, m in found.models.items()}  # the hashes are made up
        plymix.merge(replace(found, models=models), files[name], models=[str(tmp_path)])
    assert files["web"].read_bytes() == files["comfy"].read_bytes()
    a, b, got = (
        tiny.read_safetensors(p)[1]
        for p in (tmp_path / "a.safetensors", tmp_path / "b.safetensors", files["web"])
    )
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    expected = (0.3 * a[key].astype(float) + 0.7 * b[key].astype(float)).astype("float16")
    assert (got[key] == expected).mean() > 0.99
    vae = "first_stage_model.decoder.conv_in.weight"
    assert (got[vae] == a[vae]).all()


# --- A1111 ----------------------------------------------------------------------------------------


def test_a1111_add_difference_with_everything():
    found = read(
        a1111(
            interp_method="Add difference",
            tertiary_model_hash=SHA_C,
            multiplier=0.35,
            save_as_half=True,
            bake_in_vae="vae-ft-mse.safetensors",
            discard_weights="model_ema.*",
        )
    )
    step = only_step(found)
    assert (step.method, step.params) == ("add_difference", {"alpha": 0.35})
    assert [found.recipe.models[n].file for n in step.inputs] == [
        "a.safetensors",
        "sub/b.safetensors",
        "c.ckpt",
    ]
    output = found.recipe.output
    assert (output.dtype, output.title) == ("fp16", "mix")
    assert found.recipe.models[output.vae].file == "vae-ft-mse.safetensors"
    text = "\n".join(found.notes)
    assert "discard_weights = model_ema.*" in text
    assert "c.ckpt is itself a merge" in text
    assert "blend" not in text


def test_a1111_no_interpolation_and_the_blended_vae():
    alone = read(a1111(interp_method="No interpolation"))
    assert (alone.recipe.steps, alone.recipe.final) == ({}, "a")
    assert any("VAE" in note and "blend" in note for note in read(a1111()).notes)


def test_models_are_found_by_name_and_by_hash():
    metadata = a1111()
    del metadata["sd_merge_models"]
    found = read(metadata, models={SHA_A[:10]: "here/a.ckpt"})
    assert [m.file for m in found.recipe.models.values()] == ["here/a.ckpt", SHA_B]
    assert any(SHA_B in note for note in found.notes)
    named = read(a1111(), models={"b": "x/b2.safetensors"})
    assert [m.file for m in named.recipe.models.values()] == ["a.safetensors", "x/b2.safetensors"]


def test_unknown_methods_and_writers_are_refused():
    with pytest.raises(Refusal, match="Weighted sun"):
        read(a1111(interp_method="Weighted sun"))
    with pytest.raises(Refusal, match="some-tool"):
        read(a1111(type="some-tool"))
    with pytest.raises(Refusal, match="no record of a merge"):
        read({"prompt": "not JSON"})
    with pytest.raises(Refusal, match="nonsense"):
        read(a1111(), kind="nonsense")
    with pytest.raises(Refusal, match="does not exist"):
        import_recipe("/nowhere/old.safetensors")
    with pytest.raises(Refusal, match="multiplier"):
        read(a1111(multiplier=None))
    for said in (1e-05, "1e-05", " .00001 "):  # Chattiori's numbers are texts
        assert only_step(read(a1111(multiplier=said))).params == {"alpha": 1e-05}


def test_chattiori():
    said = {
        "type": "merge-models-chattiori",
        "primary_model_hash": SHA_A,
        "secondary_model_hash": SHA_B,
        "tertiary_model_hash": SHA_C,
        "merge_method": "Sum Twice",
        "block_weights": True,
        "alpha_info": ",".join(map(str, [0.2, *GRAD_V])),
        "beta_info": "0.25",
        "pruned": True,
    }
    found = read({"sd_merge_recipe": json.dumps(said), "sd_merge_models": json.dumps(KNOWN)})
    step = only_step(found)
    assert step.method == "sum_twice"
    assert step.params == {"alpha": {"base": 0.2, "blocks": GRAD_V}, "beta": 0.25}
    assert any("pruned" in note for note in found.notes)


# --- supermerger and MBW-GUI ----------------------------------------------------------------------

SUPERMERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": ",".join(map(str, GRAD_V)),
    "weights_beta": None,
    "model_a": SHA_A,
    "model_b": SHA_B,
    "model_c": "",
    "base_alpha": 0.4,
    "base_beta": 0,
    "mode": "Weight sum:A*(1-alpha)+B*alpha",
    "mbw": True,
    "elemental_merge": "IN05-OUT03:attn2:0.3,NOT OUT09-OUT11:ff:0",
    "calcmode": "normal",
}


def supermerger(**changes):
    said = json.dumps({**SUPERMERGER, **changes})
    return read({"sd_merge_recipe": said, "sd_merge_models": json.dumps(KNOWN)})


def test_supermerger_blocks_and_rules():
    step = only_step(supermerger())
    assert step.method == "weighted_sum"
    assert step.params == {"alpha": {"base": 0.4, "blocks": GRAD_V}}
    assert step.rules == ("IN05-OUT03:attn2:0.3", "NOT OUT09-OUT11:ff:0.0")
    listed = only_step(supermerger(weights_alpha=[0.9, *GRAD_V], base_alpha=None))
    assert listed.params == {"alpha": {"base": 0.9, "blocks": GRAD_V}}
    rules = ["IN05-OUT03:attn2:0.3", "NOT OUT09-OUT11:ff:0"]  # its code splits them
    for said in (rules, "\n".join(rules)):
        assert only_step(supermerger(elemental_merge=said)).rules == step.rules


@pytest.mark.parametrize(
    ("changes", "method", "params"),
    [
        ({"mbw": False}, "weighted_sum", {"alpha": 0.4}),
        ({"mbw": False, "calcmode": "cosineB"}, "cosine_b", {"alpha": 0.4}),
        ({"mbw": False, "calcmode": "tensor2"}, "tensor2", {"alpha": 0.4, "beta": 0}),
        ({"mbw": False, "mode": "Add difference:A+(B-C)*alpha"}, "add_difference", {"alpha": 0.4}),
        (
            {"mbw": False, "mode": "Add difference", "calcmode": "trainDifference"},
            "train_difference",
            {"alpha": 0.4},
        ),
        (
            {"mbw": False, "mode": "Add difference", "calcmode": "extract", "base_beta": 0.25},
            "extract",
            {"alpha": 0.4, "beta": 0.25, "gamma": 0.3},
        ),
        (
            {"mbw": False, "mode": "Add difference", "calcmode": "extract", "opt_value": 2},
            "extract",
            {"alpha": 0.4, "beta": 0, "gamma": 2},
        ),
        ({"mbw": False, "mode": "Triple sum", "base_beta": 0.1}, "triple_sum",
         {"alpha": 0.4, "beta": 0.1}),
        ({"mbw": False, "mode": "sum Twice", "base_beta": 0.1}, "sum_twice",
         {"alpha": 0.4, "beta": 0.1}),
    ],
)  # fmt: skip
def test_supermerger_modes(changes, method, params):
    step = only_step(supermerger(model_c=SHA_C, **changes))
    assert (step.method, step.params) == (method, params)


def test_supermerger_has_its_own_view_of_the_blocks():
    assert supermerger().recipe.output.block_view == "supermerger"
    numbers = [i / 64 for i in range(61)]
    step = only_step(supermerger(weights_alpha=numbers[:21], base_alpha=None))
    assert step.params["alpha"] == {"base": 0.0, "blocks": numbers[1:20]}
    step = only_step(supermerger(weights_alpha=numbers, base_alpha=None))
    assert step.params["alpha"] == {"blocks": numbers}


def test_supermerger_names_what_it_cannot_say():
    found = supermerger(Exclude=["IN01"], future=3)
    assert any("Exclude" in note for note in found.notes)
    assert any("future = 3" in note for note in found.notes)
    for changes, what in (
        ({"calcmode": "magic"}, "magic"),
        ({"calcmode": "trainDifference"}, "known: normal, cosinea, cosineb, plus random, self, t"),
        ({"mode": "Quadruple"}, "quadruple"),
        ({"elemental_merge": "IN01:attn:R"}, "random"),
        ({"weights_alpha": "0.1,0.2"}, "2 numbers"),
        ({"weights_alpha": "R"}, "weights_alpha: value 1 is 'R', a random ratio"),
        ({"weights_alpha": "0.1,R" + ",0.2" * 24}, "weights_alpha: value 2 is 'R', a random ratio"),
        ({"weights_alpha": ["U", *GRAD_V]}, "value 1 is 'U', a random ratio"),
        ({"adjust": "1,2,R"}, "adjust: value 3 is 'R'"),
        ({"model_b": ""}, "model B"),
    ):
        with pytest.raises(Refusal, match=what):
            supermerger(**changes)


def test_supermergers_adjust():
    """Each of the eight numbers does to the output what supermerger's does to its key."""
    values = [1.0, -2.0, 3.0, 4.0, -5.0, 0.5, 0.25, 6.0]
    found = supermerger(adjust=", ".join(map(str, values)))
    assert found.recipe.output.adjust == {
        "detail": [1.0, -2.0, 3.0],
        "contrast": 4.0,
        "brightness": -5.0,
        "colour": [0.5, 0.25, 6.0],
    }
    assert not any("adjust" in note for note in found.notes)
    few = supermerger(adjust=[0, 0, 0, 2, 0, 0, 0, 0])
    assert few.recipe.output.adjust == {"contrast": 2}
    assert supermerger(adjust="").recipe.output.adjust == {}
    old = supermerger(adjust="1,2,3,4,5,6,7")
    assert old.recipe.output.adjust == {}
    assert any("adjust = 1,2,3,4,5,6,7 is not taken over: 7 numbers" in n for n in old.notes)


def history(rows: list[dict], delimiter: str) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def test_supermerger_history(tmp_path):
    row = {
        "ID": "1",
        "Time": "2023-05-01",
        "Name": "x",
        "Weights alpha": ",".join(map(str, GRAD_V)),
        "Weights beta": "",
        "Model A": "a.safetensors [a1a1a1a1a1]",
        "Model B": "b.safetensors [b2b2b2b2b2]",
        "Model C": "",
        "alpha": "0.4",
        "beta": "0",
        "Mode": "Weight sum:A*(1-alpha)+B*alpha",
        "use MBW": "True",
        "custum name": "old",
        "save setting": "['save model', 'fp16']",
        "use ID": "",
    }
    path = tmp_path / "mergehistory.csv"
    path.write_text(history([row, {**row, "ID": "2", "use MBW": "False"}], ","))
    last = import_recipe(path)
    assert only_step(last).params == {"alpha": 0.4}
    assert "entry 2 of 2" in last.notes[0]
    first = import_recipe(path, entry=0)
    assert only_step(first).params == {"alpha": {"base": 0.4, "blocks": GRAD_V}}
    assert [m.file for m in first.recipe.models.values()] == ["a.safetensors", "b.safetensors"]
    assert (first.recipe.output.dtype, first.recipe.output.title) == ("fp16", "old")
    with pytest.raises(Refusal, match="2 entries"):
        import_recipe(path, entry=5)


def test_mbw_gui_history(tmp_path):
    row = {
        "model_A": "a.ckpt [a1a1a1a1]",
        "model_A_hash": "a1a1a1a1",
        "model_A_sha256": "",
        "model_B": "b.ckpt",
        "model_B_hash": "",
        "model_B_sha256": SHA_B,
        "model_O": "mix.safetensors",
        "base_alpha": "0.5",
        "weight_name": "GRAD_V",
        "weight_values": ",".join(map(str, GRAD_V)),
        "remark": "nice",
    }
    path = tmp_path / "history.tsv"
    path.write_text(history([row], "\t"))
    found = import_recipe(path)
    assert only_step(found).params == {"alpha": {"base": 0.5, "blocks": GRAD_V}}
    assert [(m.file, m.sha256) for m in found.recipe.models.values()] == [
        ("a.ckpt", ""),
        ("b.ckpt", SHA_B),
    ]
    assert any("remark = nice" in note for note in found.notes)


def test_a_file_of_presets_is_not_a_merge(tmp_path):
    path = tmp_path / "preset.tsv"
    path.write_text("preset_name\tpreset_weights\nMINE\t" + ",".join(map(str, GRAD_V)))
    with pytest.raises(Refusal, match="--presets"):
        import_recipe(path)


def test_model_mixer():
    text = (
        "a cat\nSteps: 20, ModelMixer model a: a.safetensors [a1a1a1a1a1],"
        " ModelMixer base model: sd.ckpt, ModelMixer model b: b.safetensors,"
        " ModelMixer mode b: Sum,"
        " ModelMixer alpha b: 0.3, ModelMixer model c: c.safetensors, ModelMixer mode c: Add-Diff,"
        f' ModelMixer mbw c: True, ModelMixer mbw weights c: "{",".join(map(str, [0, *GRAD_V]))}",'
        ' ModelMixer elemental c: "IN01:attn1:0.5"'
    )
    found = import_recipe(text)
    one, two = found.recipe.steps.values()
    assert (one.method, one.inputs, one.params) == ("weighted_sum", ("a", "b"), {"alpha": 0.3})
    assert (two.method, two.inputs) == ("add_difference", ("step1", "c", "sd"))
    assert two.params == {"alpha": {"base": 0, "blocks": GRAD_V}}
    assert two.rules == ("IN01:attn1:0.5",)
    with pytest.raises(Refusal, match="cosine"):
        import_recipe(text + ", ModelMixer calcmode b: Cosine")


# --- ComfyUI --------------------------------------------------------------------------------------


def test_comfyui_text_encoder_apart():
    own = comfy()
    own["5"]["inputs"]["clip"] = ["2", 1]
    recipe = read(own).recipe
    assert recipe.models[recipe.output.text_encoder].file == "sub/b.safetensors"
    other = comfy()
    other["4"]["inputs"]["ratio"] = 1.0
    assert only_step(read(other)).params == {"alpha": {"base": 0, "default": 0.7, "blocks": {}}}
    crossed = comfy()
    crossed["4"]["inputs"].update(clip1=["2", 1], clip2=["1", 1])
    *_, last = read(crossed).recipe.steps.values()
    assert last.params == {"alpha": {"base": 1.0, "default": 0.0, "blocks": {}}}


@pytest.mark.parametrize("model", [["3", 0], ["1", 0], ["9", 0]])
def test_comfyui_text_encoders_merged_otherwise(model, tmp_path):
    """The U-Net by one formula or as it is, the text encoder by another, of other models."""
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed, dtype="F32")
    start = "model.diffusion_model."
    header, values, _ = tiny.read_safetensors(tmp_path / "a.safetensors")
    bare = {key: kind for key, kind in header.items() if key.startswith(start)}
    tiny.write_safetensors(
        tmp_path / "bare.safetensors",
        {key.removeprefix(start): kind for key, kind in bare.items()},
        {key.removeprefix(start): values[key] for key in bare},
    )
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": "bare.safetensors"}}
    prompt = comfy() | ({"9": loader} if model == ["9", 0] else {})
    prompt["4"]["inputs"].update(clip1=["2", 1], clip2=["1", 1], ratio=0.25)
    prompt["5"]["inputs"]["model"] = model
    plymix.merge(read(prompt).recipe, tmp_path / "out.safetensors", models=[str(tmp_path)])
    a, b, got = (tiny.read_safetensors(tmp_path / f"{n}.safetensors")[1] for n in ("a", "b", "out"))
    assert got.keys() == a.keys()
    ratio = prompt["3"]["inputs"]["ratio"] if model == ["3", 0] else 1.0
    for start, share in (("model.diffusion_model.", 1 - ratio), ("cond_stage_model.", 0.25)):
        for key in (k for k in got if k.startswith(start) and "position_ids" not in k):
            expected = (1 - share) * a[key].astype(float) + share * b[key].astype(float)
            assert abs(got[key] - expected).max() < 1e-7, key


def test_comfyui_model_save_is_the_denoiser_alone(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed)
    prompt = comfy()
    prompt["5"] = {"class_type": "ModelSave", "inputs": {"model": ["3", 0]}}
    plymix.merge(read(prompt).recipe, tmp_path / "out.safetensors", models=[str(tmp_path)])
    whole, got = (tiny.read_safetensors(tmp_path / f"{n}.safetensors")[0] for n in ("a", "out"))
    assert list(got) == [key for key in whole if key.startswith("model.diffusion_model.")]


def test_comfyui_vae_and_sampling_nodes():
    prompt = comfy()
    prompt["6"] = {"class_type": "VAELoader", "inputs": {"vae_name": "v.pt"}}
    prompt["7"] = {"class_type": "ModelSamplingDiscrete", "inputs": {"model": ["3", 0]}}
    prompt["5"]["inputs"].update(vae=["6", 0], model=["7", 0])
    found = read(prompt)
    assert found.recipe.models[found.recipe.output.vae].file == "v.pt"
    assert any("ModelSamplingDiscrete" in note for note in found.notes)


def test_comfyui_add_and_subtract_are_add_difference():
    prompt = comfy()
    prompt["8"] = {
        "class_type": "ModelMergeSubtract",
        "inputs": {"multiplier": 0.5, "model1": ["2", 0], "model2": ["1", 0]},
    }
    prompt["9"] = {
        "class_type": "ModelMergeAdd",
        "inputs": {"model1": ["3", 0], "model2": ["8", 0]},
    }
    prompt["5"]["inputs"].update(model=["9", 0], clip=["1", 1])
    _, two = read(prompt).recipe.steps.values()
    assert (two.method, two.inputs, two.params) == (
        "add_difference",
        ("step1", "b", "a"),
        {"alpha": 0.5},
    )


@pytest.mark.parametrize("kind", ["ModelMergeBlocks", "ModelMergeSD1", "workflow"])
def test_comfyui_sliders_by_key(kind, tmp_path):
    """Each key gets 1 - ratio of the longest slider name that begins it, else of the first."""
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed, dtype="F32")
    if kind == "ModelMergeBlocks":
        sliders = {"input": 0.2, "middle": 0.5, "out": 1.0}
    else:
        blocks = [f"{s}_blocks.{i}." for s in ("input", "output") for i in range(12)]
        names = ["time_embed.", "label_emb.", *blocks[:12]]
        names += [*(f"middle_block.{i}." for i in range(3)), *blocks[12:], "out."]
        sliders = {name: i / 32 for i, name in enumerate(names)}
    prompt = comfy()
    prompt["3"]["class_type"] = "ModelMergeSD1" if kind == "workflow" else kind
    del prompt["3"]["inputs"]["ratio"]
    prompt["3"]["inputs"].update(sliders)
    if kind == "workflow":
        prompt = workflow(prompt)
    found = read(prompt)
    plymix.merge(found.recipe, tmp_path / "out.safetensors", models=[str(tmp_path)])
    a, b, got = (tiny.read_safetensors(tmp_path / f"{n}.safetensors")[1] for n in ("a", "b", "out"))
    start = "model.diffusion_model."
    for key in (k for k in got if k.startswith(start)):
        fits = [s for s in sliders if key.removeprefix(start).startswith(s)]
        ratio = sliders[max(fits, key=len, default=next(iter(sliders)))]
        expected = ratio * a[key].astype(float) + (1 - ratio) * b[key].astype(float)
        assert abs(got[key] - expected).max() < 1e-7, key


def test_comfyui_sliders_of_blocks_become_a_table_of_its_view():
    prompt = comfy()
    prompt["3"]["class_type"] = "ModelMergeFlux1"
    sliders = {"img_in.": 0.5, "guidance_in": 0.75, "double_blocks.0.": 0.25, "final_layer.": 1.0}
    prompt["3"]["inputs"] = {"model1": ["1", 0], "model2": ["2", 0], **sliders}
    found = read(prompt)
    assert found.recipe.output.block_view == "comfyui"
    alpha = {"IMG": 0.5, "GUIDANCE": 0.25, "D00": 0.75, "OUT": 0.0}
    assert only_step(found).params["alpha"]["blocks"] == alpha
    assert only_step(found).params["alpha"]["default"] == 0.5
    assert read(comfy()).recipe.output.block_view == "classic"


def test_comfyui_the_longest_slider_wins():
    prompt = comfy()
    prompt["3"]["class_type"] = "ModelMergeFlux1"
    sliders = {"img_in.": 0.5, "double_blocks.0.": 0.25, "double_blocks.": 1.0}
    prompt["3"]["inputs"] = {"model1": ["1", 0], "model2": ["2", 0], **sliders}
    assert only_step(read(prompt)).rules == (
        ":diffusion_model.double_blocks.:0.0",
        ":diffusion_model.double_blocks.0.:0.75",
    )


def workflow(prompt: dict) -> dict:
    """The same graph as the editor saves it: values in order, links in a table."""
    nodes, links = [], []
    for number, node in prompt.items():
        values, ports = [], []
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                links.append([len(links), int(value[0]), value[1], int(number), len(ports), "X"])
                ports.append({"name": name, "link": len(links) - 1})
            else:
                values.append(value)
        nodes.append(
            {
                "id": int(number),
                "type": node["class_type"],
                "inputs": ports,
                "widgets_values": values,
            }
        )
    return {"nodes": nodes, "links": links}


def test_comfyui_workflow_is_the_prompt():
    assert read(workflow(comfy())) == read(comfy())


def test_comfyui_refusals():
    unknown = comfy()
    unknown["3"]["class_type"] = "ModelMergeMagic"
    unknown["3"]["inputs"]["strength"] = 0.5
    lora = comfy(**{"9": {"class_type": "LoraLoader", "inputs": {"model": ["3", 0]}}})
    lora["5"]["inputs"]["model"] = ["9", 0]
    circle = comfy()
    circle["3"]["inputs"]["model1"] = ["3", 0]
    open_end = comfy()
    open_end["3"]["inputs"]["model1"] = ["77", 0]
    unsaved = comfy()
    del unsaved["5"]
    for prompt, what in (
        (unknown, "ModelMergeMagic"),
        (lora, "LoraLoader"),
        (circle, "circle"),
        (open_end, "not connected"),
        (unsaved, "no CheckpointSave"),
    ):
        with pytest.raises(Refusal, match=what):
            read(prompt)


def test_plymix_carries_its_own(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed)
    x = plymix.model(tmp_path / "a.safetensors").slerp(plymix.model(tmp_path / "b.safetensors"))
    plymix.merge(x, tmp_path / "out.safetensors")
    assert import_recipe(tmp_path / "out.safetensors").recipe.steps == x.recipe().steps


def test_the_command(tmp_path, capsys):
    graph, out = tmp_path / "graph.json", tmp_path / "recipe.toml"
    graph.write_text(json.dumps(comfy()))
    assert cli.run(["recipe", "import", str(graph), "-o", str(out), "--model", "b=z.ckpt"]) == 0
    expected = import_recipe(graph, models={"b": "z.ckpt"})
    assert recipes.load(out) == expected.recipe
    assert cli.run(["recipe", "import", str(graph), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run(["recipe", "import", str(graph), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert cli.run(["recipe", "import", str(graph)]) == 0
    assert recipes.from_toml(capsys.readouterr().out) == import_recipe(graph).recipe


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value, path=()):
    """Every place of a JSON document, itself among them."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


DOCUMENTS = [
    comfy(),
    workflow(comfy()),
    SUPERMERGER,
    json.loads(a1111()["sd_merge_recipe"]),
    {"sd_merge_recipe": a1111()["sd_merge_recipe"], "sd_merge_models": KNOWN},
]


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(DOCUMENTS), junk)
def test_a_damaged_record_is_refused_or_read(data, document, value):
    document = json.loads(json.dumps(document))
    path = data.draw(st.sampled_from([p for p in places(document) if p]))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    try:
        found = import_recipe(json.dumps(document))
    except Refusal:
        return
    assert recipes.from_json(recipes.to_json(found.recipe)) == found.recipe


# --- TOML -----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.from_regex(r"[a-zA-Z_][\w .+()\-]{0,8}", fullmatch=True).filter(lambda n: n != "blend")
values = st.one_of(
    st.floats(-10, 10),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {"base": st.floats(0, 1), "blocks": st.dictionaries(texts, st.floats(0, 1))}
    ),
    texts,
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(names, min_size=4, max_size=4, unique_by=str.casefold),
    texts,
    texts,
    values,
    st.integers(0, 2**62),
)
def test_toml_round_trip(names, file, title, alpha, seed):
    a, b, one, two = names
    found = recipes.from_dict(
        {
            "models": {a: file, b: {"file": file, "size": 12, "sha256": SHA_A}},
            "steps": {
                one: {"method": "weighted_sum", "a": a, "b": b, "alpha": alpha, "seed": seed},
                two: {"method": "ties", "base": one, "models": [a, b], "rules": ["::0.5"]},
            },
            "output": {"from": two, "title": title, "adjust": {"detail": [0.5, 0, 0]}},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recipes.from_toml(recipes.to_toml(found)) == found


def test_toml_is_readable():
    text = recipes.to_toml(read(a1111()).recipe)
    assert '[steps.step1]\nmethod = "weighted_sum"\na = "a"\nb = "b"\nalpha = 0.7' in text


def test_a_model_that_is_not_the_one_the_recipe_names_is_refused(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", seed=seed)
    found = recipes.from_dict(
        {
            "models": {
                "a": "a.safetensors",
                "b": {"file": "b.safetensors", "sha256": SHA_B},
            },
            "steps": {"s": {"method": "weighted_sum", "a": "a", "b": "b"}},
        }
    )
    with pytest.raises(Refusal, match=r"b\.safetensors is not the b.* begins b2b2b2b2b2"):
        plymix.merge(found, tmp_path / "out.safetensors", models=[str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    sized = recipes.from_dict(
        {
            **recipes.to_dict(found),
            "models": {"a": "a.safetensors", "b": {"file": "b.safetensors", "size": 5}},
        }
    )
    with pytest.raises(Refusal, match=r"written for a b\.safetensors of 5"):
        plymix.explain(sized, models=[str(tmp_path)])
