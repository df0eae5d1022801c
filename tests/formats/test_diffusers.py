"""diffusers folders: what is taken, noted and refused, and how one is written."""

import contextlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import engine, plan
from plymix.errors import FormatError, Refusal
from plymix.formats import diffusers, open_model
from plymix.formats.base import Entry
from small import draw, load, recipe, save

PARTS = {
    "unet": {"conv_in.weight": draw("F16", (4, 3, 3, 3), 1), "down/odd.bias": draw("F16", (4,), 2)},
    "vae": {"encoder.conv_in.weight": draw("F32", (2, 3), 3)},
    "text_encoder": {"text_model.embeddings.position_ids": ("I64", np.arange(5)[None])},
}
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WANT = {f"{c}/{k}": x.tobytes() for c, part in PARTS.items() for k, (_, x) in part.items()}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def pipeline(folder, scheduler=None, parts=PARTS):
    put(folder / "model_index.json", INDEX)
    for component, tensors in parts.items():
        known = {"model_type": "clip"} if component == "text_encoder" else {"_class_name": "X"}
        put(folder / component / "config.json", known)
        save(folder / component / FILES[component], tensors, {"format": "pt"})
    put(folder / "scheduler" / "scheduler_config.json", scheduler or {"beta_start": 0.1})
    put(folder / "tokenizer" / "vocab.json", {"a": 0})
    put(folder / "tokenizer" / "merges.txt", "a b")
    put(folder / "README.md", "# a model")
    return folder


def contents(path):
    with open_model(path) as source:
        return {k: bytes(source.read(t)) for k, t in source.tensors.items()}


def test_a_pipeline_is_one_model(tmp_path):
    folder = pipeline(tmp_path / "sd")
    for path in (folder, folder / "model_index.json"):
        with open_model(path) as source:
            assert (source.format, source.path) == ("diffusers", folder)
            assert source.notes == ()
            assert source.metadata == {"format": "pt"}
            assert [f.parent.name for f in source.files] == ["text_encoder", "unet", "vae"]
            assert source.nbytes == sum(f.stat().st_size for f in source.files)
            assert all(t.name == key for key, t in source.tensors.items())
            assert source.configs == {
                p: folder / p
                for p in (
                    "model_index.json",
                    "scheduler/scheduler_config.json",
                    "text_encoder/config.json",
                    "tokenizer/merges.txt",
                    "tokenizer/vocab.json",
                    "unet/config.json",
                    "vae/config.json",
                )
            }
        assert contents(path) == WANT


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({"prediction_type": "epsilon"}, {"modelspec.prediction_type": "epsilon"}),
        ({"prediction_type": "sample"}, {"modelspec.prediction_type": "sample"}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
        ),
        ({"prediction_type": 3, "rescale_betas_zero_snr": "yes"}, {}),
    ],
)
def test_the_scheduler_says_what_the_model_predicts(tmp_path, config, metadata):
    with open_model(pipeline(tmp_path / "sd", config)) as source:
        assert source.metadata == {"format": "pt", **metadata}


def test_models_that_predict_different_things_are_not_merged(tmp_path):
    for name, kind in (("a", "epsilon"), ("b", "v_prediction")):
        pipeline(tmp_path / name, {"prediction_type": kind})
    with pytest.raises(Refusal, match="a predicts epsilon and b predicts v"):
        plan.build(recipe({"a": tmp_path / "a", "b": tmp_path / "b"}))


# ---- which weights


def value(n):
    return {"w": ("F16", np.full(2, n, np.float16))}


def taken(folder):
    """The number in the weights that a component's folder gives, and the notes."""
    with open_model(folder) as source:
        raw = source.read(source.tensors["w"])
        return float(np.frombuffer(raw, np.float16)[0]), source.notes


def shards(folder, n, variant=""):
    dot = f".{variant}" if variant else ""
    file = f"diffusion_pytorch_model{dot}-00001-of-00001.safetensors"
    save(folder / file, value(n))
    index = {"metadata": {"total_size": 4}, "weight_map": {"w": file}}
    put(folder / f"diffusion_pytorch_model.safetensors.index{dot}.json", index)


def test_the_best_weights_of_a_component_are_taken(tmp_path):
    """Each file that is added is better than those before."""
    torch = pytest.importorskip("torch")
    folder = tmp_path / "unet"
    put(folder / "config.json", {"_class_name": "X"})
    stem = "diffusion_pytorch_model"

    def binary(file, n):
        torch.save({"w": torch.full((2,), n, dtype=torch.float16)}, folder / file)

    steps = (
        lambda: binary(f"{stem}.fp16.bin", 1.0),
        lambda: shards(folder, 2, "fp16"),
        lambda: save(folder / f"{stem}.fp16.safetensors", value(3)),
        lambda: binary(f"{stem}.bin", 4.0),
        lambda: shards(folder, 5),
        lambda: save(folder / f"{stem}.safetensors", value(6)),
    )
    for n, step in enumerate(steps, 1):
        step()
        assert taken(folder)[0] == n


def test_other_variants_are_noted(tmp_path):
    folder = pipeline(tmp_path / "sd")
    for variant in ("fp16", "non_ema"):
        file = f"diffusion_pytorch_model.{variant}.safetensors"
        save(folder / "unet" / file, PARTS["unet"])
    save(folder / "sd-v1-5.safetensors", value(1))
    with open_model(folder) as source:
        variants, beside = source.notes
    assert "fp16, non_ema" in variants
    assert "sd-v1-5.safetensors" in beside
    assert contents(folder) == WANT


def test_a_component_alone(tmp_path):
    folder = pipeline(tmp_path / "sd") / "unet"
    with open_model(folder) as source:
        assert source.format == "diffusers"
        assert source.tensors.keys() == PARTS["unet"].keys()
        assert source.configs == {"config.json": folder / "config.json"}
        assert source.path == folder


def test_shards_within_a_component(tmp_path):
    folder = pipeline(tmp_path / "sd")
    (folder / "unet" / FILES["unet"]).unlink()
    shards(folder / "unet", 7)
    found = contents(folder)
    assert np.frombuffer(found["unet/w"], np.float16)[0] == 7
    with open_model(folder) as source:
        assert not any("index" in p for p in source.configs if p != "model_index.json")


def test_what_is_not_there_is_noted(tmp_path):
    folder = pipeline(tmp_path / "sd")
    (folder / "vae" / FILES["vae"]).unlink()
    (folder / "text_encoder" / FILES["text_encoder"]).unlink()
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "text_encoder").rmdir()
    with open_model(folder) as source:
        lost, empty = source.notes
    assert "text_encoder" in lost
    assert "vae" in empty


# ---- what is refused


def nothing(folder):
    for component in PARTS:
        (folder / component / FILES[component]).unlink()


def lone_shard(folder):
    save(folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors", value(1))


def broken(folder):
    path = folder / "vae" / FILES["vae"]
    path.write_bytes(path.read_bytes()[:-1])


def enormous(folder):
    with open(folder / "tokenizer" / "vocab.json", "r+b") as f:
        f.truncate(1 << 33)


def index(**changes):
    return lambda folder: put(folder / "model_index.json", {**INDEX, **changes})


DEFECTS = {
    "no weights": (nothing, "no component with weights"),
    "shards without an index": (lone_shard, "no index"),
    "a damaged part": (broken, f"vae/{FILES['vae']} is truncated"),
    "an enormous config": (enormous, "tokenizer/vocab.json has 8,589,934,592 bytes"),
    "up": (index(**{"../x": ["a", "b"]}), "not a folder's name"),
    "root": (index(**{"/etc": ["a", "b"]}), "not a folder's name"),
    "dots": (index(**{"..": ["a", "b"]}), "not a folder's name"),
    "no object": (lambda folder: put(folder / "model_index.json", []), "not a JSON object"),
    "no JSON": (lambda folder: put(folder / "model_index.json", "{"), "not sound JSON"),
    "deep": (lambda f: put(f / "model_index.json", '{"a":' * 99_999), "not sound JSON"),
    "scheduler": (
        lambda folder: put(folder / "scheduler" / "scheduler_config.json", "{]"),
        "scheduler_config.json is not sound JSON",
    ),
    "large index": (lambda f: put(f / "model_index.json", "{}" + " " * (1 << 20)), "limit"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_named(tmp_path, defect):
    damage, word = DEFECTS[defect]
    folder = pipeline(tmp_path / "sd")
    damage(folder)
    with pytest.raises(FormatError) as caught:
        open_model(folder)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_a_refused_folder_leaves_nothing_open(tmp_path):
    folder = pipeline(tmp_path / "sd")
    broken(folder)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FormatError):
            open_model(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_no_model(tmp_path):
    save(tmp_path / "model.safetensors", value(1))
    with pytest.raises(Refusal, match="is a folder"):
        open_model(tmp_path)
    put(tmp_path / "config.json", {})
    assert taken(tmp_path)[0] == 1


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_folder_is_refused_or_read(tmp_path_factory, data):
    folder = pipeline(tmp_path_factory.mktemp("fuzz") / "sd")
    files = ["model_index.json", "scheduler/scheduler_config.json", f"unet/{FILES['unet']}"]
    path = folder / data.draw(st.sampled_from(files))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0,:[]{}" ./nul')))
    path.write_bytes(raw)
    with contextlib.suppress(Refusal), open_model(folder) as source:
        for info in source.tensors.values():
            source.read(info)


# ---- writing


def written(folder, made, data):
    """The files of a folder's layout, as an engine would fill them."""
    for file, layout in made.files:
        target = engine.MemoryTarget(layout.size)
        for at, piece in layout.pieces:
            target.write_at(at, piece)
        for key, at in layout.offsets.items():
            target.write_at(at, data[key])
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(target.data)
    for file, content in made.others.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else content.read_bytes()
        (folder / file).write_bytes(raw)
    return folder


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_written_as_it_was_read(tmp_path):
    folder = pipeline(tmp_path / "sd")
    with open_model(folder) as source:
        entries = [Entry(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        made = diffusers.layout_folder(entries, {"note": "x"}, source.configs)
    copy = written(tmp_path / "copy", made, WANT)
    assert names(copy) == names(folder) - {"README.md"}
    for file in names(copy):
        if not file.endswith(".safetensors"):
            assert (copy / file).read_bytes() == (folder / file).read_bytes()
    assert load(copy / "vae" / FILES["vae"])[1] == {"format": "pt", "note": "x"}
    assert contents(copy) == WANT


def test_a_sharded_variant_of_a_folder(tmp_path):
    folder = pipeline(tmp_path / "sd")
    with open_model(folder) as source:
        entries = [Entry(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        configs = {p: file.read_bytes() for p, file in source.configs.items()}
        made = diffusers.layout_folder(entries, {}, configs, limit=210, variant="fp16")
    copy = written(tmp_path / "copy", made, WANT)
    stem = "unet/diffusion_pytorch_model"
    assert {
        f"{stem}.fp16-00001-of-00002.safetensors",
        f"{stem}.fp16-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    } < names(copy)
    assert contents(copy) == WANT


def test_a_component_is_written_alone(tmp_path):
    data = {k: x.tobytes() for k, (_, x) in PARTS["vae"].items()}
    entries = [Entry(k, d, x.shape) for k, (d, x) in PARTS["vae"].items()]
    made = diffusers.layout_folder(entries, {}, {"config.json": b'{"_class_name": "VAE"}'})
    copy = written(tmp_path / "vae", made, data)
    assert names(copy) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert contents(copy) == data


def test_what_cannot_be_written():
    unet, config = Entry("unet/w", "F16", (2,)), {"unet/config.json": b"{}"}
    whole = {"model_index.json": b"{}", **config}
    for entries, configs, word in (
        ([unet], config, "needs a model_index.json"),
        ([unet], {"model_index.json": b"{}"}, "unet/config.json is missing"),
        ([Entry("w", "F16", (2,))], {}, "config.json is missing"),
        ([unet, Entry("v_pred", "F16", (0,))], whole, "v_pred"),
    ):
        with pytest.raises(Refusal, match=word):
            diffusers.layout_folder(entries, {}, configs)


def test_diffusers_and_transformers_load_what_is_written(tmp_path):
    library = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = library.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    vae = library.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(tmp_path / "a" / "vae")
    scheduler.save_pretrained(tmp_path / "a" / "scheduler")
    listed = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    put(tmp_path / "a" / "model_index.json", listed)
    with open_model(tmp_path / "a") as source:
        assert source.metadata["modelspec.prediction_type"] == "v"
        entries = [Entry(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        made = diffusers.layout_folder(entries, {}, source.configs, limit=2000)
    written(tmp_path / "b", made, contents(tmp_path / "a"))
    back = library.AutoencoderKL.from_pretrained(tmp_path / "b" / "vae")
    for key, x in vae.state_dict().items():
        assert torch.equal(back.state_dict()[key], x)


# ---- merging


def test_folders_are_merged_into_one_file(tmp_path):
    """By key: two folders with the components' names in the keys."""
    other = {
        c: {k: draw("F16", x.shape, 9) if d == "F16" else (d, x) for k, (d, x) in part.items()}
        for c, part in PARTS.items()
    }
    a, b = pipeline(tmp_path / "a"), pipeline(tmp_path / "b", parts=other)
    plymix.merge(recipe({"a": a, "b": b}, 0.0), out=tmp_path / "zero.safetensors")
    found = load(tmp_path / "zero.safetensors")[0]
    assert {k: x.tobytes() for k, (_, x) in found.items()} == WANT
    plymix.merge(recipe({"a": a, "b": b}, 1.0), out=tmp_path / "one.safetensors")
    found = load(tmp_path / "one.safetensors")[0]
    assert {k: x.tobytes() for k, (_, x) in found.items()} == contents(b)
