"""Block views against what the tools do, told again here in a few lines of plain Python.

Each function below gives the name of a tensor's weight in one tool's list, from its key alone, by
the tool's own rule: first words, longest prefix, position in a list of numbers.
"""

import re

import pytest

import plymix
from plymix import archs, cli, plan
from plymix.archs.views import tools, view
from plymix.errors import Refusal
from plymix.expr import leaf_terms
from small import coded, load, save
from tiny import UNET, golden, header, write

MODELS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "flux-dev": "flux1", "sd3.5-medium": "sd3"}
TIME, LABEL, OUT = UNET + "time_embed.0.weight", UNET + "label_emb.0.0.weight", UNET + "out.2.bias"


# --- the tools' rules ----------------------------------------------------------------------------


def kohya(key, last):
    """The classic script: regular expressions on the key, leftovers in the first and last block."""
    if not key.startswith(UNET):
        return "VAE" if key.startswith("first_stage_model") else "BASE"
    rest = key[len(UNET) :]
    if rest.startswith(("time_embed", "label_emb")):
        return "IN00"
    if rest.startswith("out."):
        return f"OUT{last:02}"
    if rest.startswith("middle_block."):
        return "M00"
    kind, number = re.match(r"(input|output)_blocks\.(\d+)\.", rest).groups()
    return f"{'IN' if kind == 'input' else 'OUT'}{int(number):02}"


def supermerger(key, model):
    """None: it leaves the tensor alone; else the block whose weight it takes."""
    if "weight" not in key and "bias" not in key:
        return None
    if model == "flux-dev":
        if key.startswith("text_encoders.clip_l"):
            return "CLIP"
        if key.startswith("text_encoders.t5xxl"):
            return "T5"
        if found := re.search(r"(double|single)_blocks\.(\d+)\.", key):
            return f"{found[1][0].upper()}{int(found[2]):02}"
        return "IN" if "_in" in key else "OUT"
    if "first_stage_model" in key or "cond_stage" in key or "conditioner" in key:
        return "BASE"
    if "label_emb" in key and model == "sd2":
        return "BASE"  # no rule for it in the 12-block U-Nets
    return kohya(key, 8 if model == "sdxl" else 11)


def sliders(model):
    """The sliders of ComfyUI's nodes in order, with our names for them."""
    if model == "flux-dev":
        names = {"img_in.": "IMG", "time_in.": "TIME", "guidance_in": "GUIDANCE"}
        names |= {"vector_in.": "VECTOR", "txt_in.": "TXT"}
        names |= {f"double_blocks.{i}.": f"D{i:02}" for i in range(19)}
        names |= {f"single_blocks.{i}.": f"S{i:02}" for i in range(38)}
        return names | {"final_layer.": "OUT"}
    if model == "sd3.5-medium":
        names = {"pos_embed.": "POS", "x_embedder.": "IMG", "context_embedder.": "TXT"}
        names |= {"y_embedder.": "VECTOR", "t_embedder.": "TIME"}
        names |= {f"joint_blocks.{i}.": f"J{i:02}" for i in range(24)}
        return names | {"final_layer.": "OUT"}
    n, dot = (9, "") if model == "sdxl" else (12, ".")
    names = {"time_embed.": "TIME", "label_emb.": "LABEL"}
    names |= {f"input_blocks.{i}{dot}": f"IN{i:02}" for i in range(n)}
    names |= {f"middle_block.{i}.": f"MID{i}" for i in range(3)}
    names |= {f"output_blocks.{i}{dot}": f"OUT{i:02}" for i in range(n)}
    return names | {"out.": "OUT"}


def comfyui(key, model):
    """The longest slider name that the key begins with; the first slider for all others."""
    names = sliders(model)
    rest = key.removeprefix(UNET)
    fitting = [name for name in names if rest.startswith(name)]
    return names[max(fitting, key=len)] if fitting else next(iter(names.values()))


# --- places --------------------------------------------------------------------------------------


def seen(model, tool):
    """(key, place in the view) of every tensor that is no buffer."""
    arch = archs.load(MODELS[model])
    there = {arch.place(key).block for key in golden(model)}
    found = view(arch, tool, there)
    places = ((key, arch.place(key)) for key in golden(model))
    return found, [(key, found.place(at)) for key, at in places if not at.buffer]


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_classic(model):
    found, places = seen(model, "classic")
    assert found.blocks == archs.load(model).blocks
    for key, place in places:
        assert place.block == kohya(key, 8 if model == "sdxl" else 11), key


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl", "flux-dev"])
def test_supermerger(model):
    found, places = seen(model, "supermerger")
    for key, place in places:
        expected = supermerger(key, model)
        assert found.merges(key) == (expected is not None), key
        if expected and not (model == "flux-dev" and place.component == "vae"):
            assert place.block == expected, key


def test_what_supermerger_leaves():
    """The counts of the tensors that its filter of names passes over."""
    for model, count in (("sdxl", 3), ("flux-dev", 152), ("sd1", 0)):
        found, places = seen(model, "supermerger")
        left = [key for key, place in places if not found.merges(key)]
        assert len([k for k in left if not k.startswith("text_encoders.")]) == count
    found, places = seen("sdxl", "supermerger")
    left = {key.rpartition(".")[2] for key, _ in places if not found.merges(key)}
    assert left == {"positional_embedding", "text_projection", "logit_scale"}


@pytest.mark.parametrize("model", MODELS)
def test_comfyui(model):
    found, places = seen(model, "comfyui")
    assert found.blocks == tuple(sliders(model).values())
    for key, place in places:
        if place.component == archs.load(MODELS[model]).denoiser.name:
            assert place.block == comfyui(key, model), key
        else:
            assert place.block not in found.blocks, key


def test_label_embedding_of_sd2():
    sd2 = archs.load("sd2")
    at = {tool: view(sd2, tool).place(sd2.place(LABEL)).block for tool in tools()}
    assert at == {"classic": "IN00", "supermerger": "BASE", "comfyui": "LABEL"}


def test_models_of_less_depth_have_fewer_blocks():
    for model, name, blocks in (("wan2.1-t2v-1.3b", "wan", 32), ("flux2-klein-4b", "flux2", 27)):
        arch = archs.load(name)
        there = {arch.place(key).block for key in golden(model)}
        found = view(arch, "classic", there)
        assert set(found.blocks) == there & set(arch.blocks)
        assert len(found.blocks) == blocks < len(arch.blocks)


def test_views_that_there_are_not():
    with pytest.raises(
        Refusal, match=r"supermerger has no blocks of its own for Z-Image; .*classic"
    ):
        view(archs.load("z-image"), "supermerger")
    with pytest.raises(Refusal, match="unknown block view 'comfy': did you mean comfyui"):
        view(archs.load("sd1"), "comfy")


# --- merges --------------------------------------------------------------------------------------


def shares(folder, model, tool="classic", alpha=None, **options):
    """{key: share of B} of a plan."""
    files = [folder / f"{model}-{x}.safetensors" for x in "ab"]
    for i, file in enumerate(files):
        if not file.exists():
            write(file, model, i)
    recipe = plymix.api.two_models(*files, alpha=alpha, block_view=tool, **options)
    with plan.build(recipe) as made:
        out = {}
        for t in made.tensors:
            terms = {leaf.source: c for c, leaf in leaf_terms(t.expr)}
            if not made.places[t.name].buffer and (terms or made.fates[t.name].how == "copied"):
                out[t.name] = terms.get(1, 0.0)
        return out, made.notes


def numbered(n):
    return [round((i + 1) / 128, 7) for i in range(n)]


@pytest.mark.parametrize(("model", "count"), [("sd1", 30), ("sdxl", 24), ("flux-dev", 63)])
def test_a_list_of_comfyui(model, count, tmp_path):
    names = sliders(model)
    assert len(names) == count
    by_name = dict(zip(names.values(), numbered(count), strict=True))
    got, _ = shares(tmp_path, model, "comfyui", [0.9, *by_name.values()])
    arch = archs.load(MODELS[model])
    for key, share in got.items():
        place = arch.place(key)
        if place.component == "vae":
            assert share == 0
        elif place.component.startswith("text"):
            assert share == 0.9
        else:
            assert share == by_name[comfyui(key, model)], key
    table = {name: value for name, value in by_name.items() if name != "LABEL" or model == "sdxl"}
    same, _ = shares(tmp_path, model, "comfyui", {"base": 0.9, "blocks": table})
    assert same == got


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("sd1", ["BASE", *archs.load("sd1").blocks]),
        ("sdxl", ["BASE", *archs.load("sdxl").blocks, "VAE"]),
        ("flux-dev", ["CLIP", "T5", *archs.load("flux1").blocks]),
    ],
)
def test_a_list_of_supermerger(model, names, tmp_path):
    by_name = dict(zip(names, numbered(len(names)), strict=True))
    vae = "a" if model == "flux-dev" else "blend"
    got, _ = shares(tmp_path, model, "supermerger", [*by_name.values()], vae=vae)
    for key, share in got.items():
        block = supermerger(key, model)
        vae_of_flux = model == "flux-dev" and archs.load("flux1").place(key).component == "vae"
        assert share == (0 if block is None or vae_of_flux else by_name[block]), key


def test_finer_names_in_a_table_and_in_rules(tmp_path):
    table = {"IN00": 0.25, "TIME": 0.5, "CLIP_G": 0.75, "MID1": 1.0}
    got, _ = shares(tmp_path, "sdxl", alpha={"blocks": table, "base": 0.125})
    assert got[UNET + "input_blocks.0.0.weight"] == got[LABEL] == 0.25
    assert got[TIME] == 0.5
    assert got[UNET + "middle_block.1.norm.weight"] == 1
    assert got[UNET + "middle_block.0.in_layers.0.weight"] == got[OUT] == 0
    assert got["conditioner.embedders.1.model.ln_final.weight"] == 0.75
    start = "conditioner.embedders.0.transformer.text_model."
    assert got[start + "final_layer_norm.weight"] == 0.125
    files = {x: str(tmp_path / f"sdxl-{x}.safetensors") for x in "ab"}
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.0, "rules": ["TIME OUT::0.5"]}
    recipe = plymix.recipe.from_dict({"models": files, "steps": {"m": step}, "output": {}})
    with plan.build(recipe) as made:
        merged = {t.name for t in made.tensors if made.fates[t.name].how == "merged"}
    prefixes = (UNET + "time_embed.", UNET + "out.")
    assert merged == {k for k in got if k.startswith(prefixes)}


def test_weights_that_do_nothing_are_told(tmp_path):
    _, notes = shares(tmp_path, "sdxl", alpha=numbered(21))
    assert any("VAE does nothing: the VAE is sdxl-a.safetensors's" in n for n in notes)
    got, notes = shares(tmp_path, "sdxl", alpha=numbered(21), vae="blend")
    assert not any("does nothing" in n for n in notes)
    _, notes = shares(tmp_path, "sdxl", "supermerger", numbered(21), vae="blend")
    assert any(n.endswith("VAE does nothing: supermerger has it in BASE") for n in notes)
    assert got["first_stage_model.decoder.conv_in.weight"] == numbered(21)[20]
    _, notes = shares(tmp_path, "sd1", "comfyui", {"blocks": {"VAE": 0.5}})
    assert any("VAE does nothing" in n for n in notes)


def test_bytes_that_supermerger_leaves_are_the_first_models(tmp_path):
    """Through the engine: alpha 1 gives B but for the tensors its filter passes over."""
    shapes = {key: shape for key, (_, shape) in header("flux-dev").items()}
    some = [k for k in shapes if ".0." in k or "_in." in k]
    for name, value in (("a", 1.0), ("b", 2.0)):
        tensors = {k: coded([value], "F16") for k in some}
        tensors[UNET + "img_in.weight"] = coded([[value]], "F16")
        save(tmp_path / f"{name}.safetensors", tensors)
    files = [tmp_path / f"{x}.safetensors" for x in "ab"]
    plymix.merge(*files, tmp_path / "o.safetensors", alpha=1.0, block_view="supermerger")
    got = {k: x.reshape(-1)[0] for k, (_, x) in load(tmp_path / "o.safetensors")[0].items()}
    kept = {k for k, value in got.items() if value == 1}
    assert kept
    assert {k for k in kept if not k.startswith(("text_encoders.", "vae."))} == {
        k for k in some if k.endswith("_norm.scale")
    }


def test_explain_and_mbw_show_the_view(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, x in enumerate("ab"):
        write(tmp_path / f"{x}.safetensors", "sd1", i)
    words = ["a.safetensors", "b.safetensors", "--block-view", "comfyui"]
    numbers = ",".join(map(str, numbered(30)))
    assert cli.run(["explain", *words, "--alpha", numbers]) == 0
    out = capsys.readouterr().out
    assert "SD1 checkpoint, blocks of ComfyUI" in out
    rows = [line.split()[0] for line in out.splitlines()[3:] if line.strip()]
    assert rows[1:3] == ["TIME", "IN00"]
    assert rows[13:18] == ["IN11", "MID0", "MID1", "MID2", "OUT00"]
    assert cli.run(["mbw", *words, "--weights", numbers, "-o", "o.safetensors"]) == 0
    assert cli.run(["mbw", *words, "--weights", "0.1,0.2", "-o", "p.safetensors"]) == 2
    assert (
        "wants 30: TIME, LABEL, IN00-IN11, MID0-MID2, OUT00-OUT11, OUT" in capsys.readouterr().err
    )
    plain = ["explain", words[0], words[1], "--alpha", numbers, "--arch", "any"]
    assert cli.run([*plain, "--block-view", "comfyui"]) == 2
    assert "--block-view needs a known architecture" in capsys.readouterr().err
