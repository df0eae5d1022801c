"""Written folders against diffusers and transformers themselves, where they are installed.

Nothing is fetched: folders are made here, and the libraries are told that there is no network.
"""

import json
import os

import numpy as np
import pytest

import plymix
import tiny
from maps import ARCH
from plymix import archs, pairing, respelling
from plymix.archs import configs
from plymix.archs.dialects import shape_of
from plymix.images import tokens
from small import load

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
MODELS = ["sd1", "sd2", "sdxl", "sd3.5-medium", "flux-dev"]
ALONE = {  # whose transformers alone have configurations: golden header -> architecture
    "chroma": "chroma",
    "z-image": "z-image",
    "lumina2": "lumina2",
    "auraflow": "auraflow",
    "flux2-dev": "flux2",
    "flux2-klein-4b": "flux2",
    "flux2-klein-9b": "flux2",
    "wan2.1-t2v-1.3b": "wan",
    "wan2.1-i2v-14b": "wan",
    "wan2.1-vace-14b": "wan",
    "wan2.2-ti2v-5b": "wan",
    "ltx-video-2b": "ltx-video",
    "ltx-video-13b": "ltx-video",
    "sdxl-refiner": "sdxl-refiner",
}


def module_of(config):
    """A module without memory for its weights, built by the library from a configuration."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        said = {k: v for k, v in config.items() if k != "architectures"}
        return kind(kind.config_class(**said))


@pytest.mark.parametrize("model", [*MODELS, *ALONE])
def test_configs_from_shapes_give_the_published_networks(model):
    """At full width: every name and every shape, in both directions."""
    arch = archs.load(ALONE.get(model) or ARCH[model])
    full = tiny.header(model, full_width=True)
    shapes = {arch.place(key).key: shape for key, (_, shape) in full.items()}
    spelt = respelling.in_diffusers(arch, shapes, pairing.Paired(archs.detect(shapes), {}))
    assert len(spelt.views) >= (3 if model in MODELS else 1)
    for component, views in spelt.views.items():
        mine = {n: shape_of(v, {v[0].key: shapes[v[0].key]}) for n, v in views.items()}
        module = module_of(configs.component(arch, component, mine))
        theirs = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        start = "" if any(k.startswith("text_model.") for k in theirs) else "text_model."
        if component.startswith("text_encoder") and "shared.weight" not in theirs:
            theirs = {k if k in mine else start + k: v for k, v in theirs.items()}
        tied = {"encoder.embed_tokens.weight"}  # T5's, the same tensor as `shared.weight`
        theirs = {k: v for k, v in theirs.items() if k not in tied and "position_ids" not in k}
        assert mine == theirs, component


def loaded(folder, component):
    index = json.loads((folder / "model_index.json").read_text())
    library, kind = index[component]
    home = getattr(diffusers if library == "diffusers" else transformers, kind)
    return home.from_pretrained(folder / component, torch_dtype=torch.float32)


def state_of(module):
    return {k: v.numpy() for k, v in module.state_dict().items() if "position_ids" not in k}


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_the_libraries_load_what_is_written(tmp_path, model):
    """Each component by its own loader, tensor for tensor; shards too."""
    file = tiny.write(tmp_path / "a.safetensors", model, dtype="F32")
    plymix.convert(file, tmp_path / "folder", shard="1MB")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if component not in index:
            continue
        held = {}
        for shard in (tmp_path / "folder" / component).glob("*.safetensors"):
            held |= {key: x for key, (_, x) in load(shard)[0].items()}
        got = state_of(loaded(tmp_path / "folder", component))
        stem = "text_model."
        short = {k.removeprefix(stem) if k not in got else k: x for k, x in held.items()}
        assert got.keys() == short.keys()
        assert all(np.array_equal(got[key], short[key]) for key in got), component


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_diffusers_writes_the_same_tensors_from_the_same_file(tmp_path, model):
    """`from_single_file` and `save_pretrained`, which are its own converters."""
    file = tiny.write(tmp_path / "a.safetensors", model, dtype="F32")
    plymix.convert(file, tmp_path / "folder")
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for component, kind in parts.items():
        theirs = getattr(diffusers, kind).from_single_file(
            str(file), config=str(tmp_path / "folder"), subfolder=component, local_files_only=True
        )
        theirs.save_pretrained(tmp_path / component)
        name = "diffusion_pytorch_model.safetensors"
        want = load(tmp_path / component / name)[0]
        got = load(tmp_path / "folder" / component / name)[0]
        assert got.keys() == want.keys()
        assert all(got[key][1].tobytes() == want[key][1].tobytes() for key in got)
        plymix.convert(tmp_path / component, tmp_path / f"{component}.safetensors", layout="ldm")


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_whole_pipelines_are_loaded_offline(tmp_path, model):
    file = tiny.write(tmp_path / "a.safetensors", model, dtype="F32")
    plymix.convert(file, tmp_path / "folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(pipe).__name__ == (
        "StableDiffusionXLPipeline" if model == "sdxl" else "StableDiffusionPipeline"
    )
    text = "A castle (by the sea), 1girl's naïve 東京 <3"
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None:
            assert tokenizer(text).input_ids == [tokens.START, *tokens.tokens(text), tokens.END]
            assert tokenizer.model_max_length == 77
    pads = {"sd1": [tokens.END], "sd2": [0], "sdxl": [tokens.END, 0]}[model]
    found = [
        getattr(pipe, n).pad_token_id for n in ("tokenizer", "tokenizer_2") if hasattr(pipe, n)
    ]
    assert found == pads
    pipe.save_pretrained(tmp_path / "theirs")
    plymix.convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    was, now = load(file)[0], load(tmp_path / "back.safetensors")[0]
    assert len(now) > 1000
    assert all(now[key][1].tobytes() == was[key][1].tobytes() for key in now)
